"""Hostile values in every field of every frame and HTTP body get a reply that is not `internal`."""

import asyncio
import itertools
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Any, NamedTuple, Self
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec import inspect
from websockets.asyncio.client import connect

from protocol import json_object
from protocol.client import CreateChannel, CreateGroup, Send
from protocol.codec import decode_client, encode
from protocol.errors import ErrorCode, Refused
from protocol.http import ChangePassword, Confirm, Login, Register
from protocol.ids import ConversationId, uuid7
from protocol.limits import MAX_FRAME_BYTES
from protocol.server import Error, Reply
from prove.client import Client
from prove.writes import PUSH_POINT
from server.context import Context
from server.core.config import Settings
from server.core.errors import UNFIT
from server.gateway.connection import Connection
from server.gateway.dispatch import Dispatch
from server.routes import ROUTES
from tests.conftest import Servers
from tests.test_protocol import JSON
from tests.world import UserSession, World, http_client, refused, sent, until

HOLE = "the place of a hostile value"
BIG = MAX_FRAME_BYTES - 2_000


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


# JSON texts, some of which no encoder would write.
SMALL = [
    "null", "true", '""', "[]", "{}", "0", "-1", "1.5", "-0.0",
    *(str(sign * 2**bits + more) for bits in (15, 31, 32, 53, 63, 64) for sign in (1, -1) for more in (-1, 0)),
    "1e308", "-1e308", "1e999", "5e-324", "1e-400", "NaN", "Infinity", "9" * 400, "9" * 5_000,
    r'"\u0000"', r'"a\u0000b"', r'"\ud800"', r'"\udc00\ud800"', '"\x7f"', r'"\u202eevil\u202c"', r'"x\n"', r'"x\ty"',
    '"' + "x" * 300 + '"', '"' + "\U0001f469\u200d\U0001f680" * 20 + '"', '"\'; DROP TABLE message; --"',
    '"00000000-0000-0000-0000-000000000000"', '"ffffffff-ffff-ffff-ffff-ffffffffffff"', '"' + str(uuid7()) + '"',
    '"0000-01-01T00:00:00Z"', '"0001-01-01T00:00:00Z"', '"0001-01-01T00:00:00+23:59"', '"0001-01-01T00:00:00"',
    '"9999-12-31T23:59:59-23:59"', '"9999-12-31T23:59:59.999999Z"', '"10000-01-01T00:00:00Z"', '"24:00:00"',
    '"10:00:00+05:00"', '"infinity"', '"nan"', '"-infinity"',
    '"0001-01-01T00:00:00+23:59/00000000-0000-0000-0000-000000000000"',
    '"9999-12-31T23:59:59-23:59/00000000-0000-0000-0000-000000000000"',
    '"2025-01-01T00:00:00Z/nan/2025-01-01T00:00:00Z/00000000-0000-0000-0000-000000000000"',
    '"2025-01-01T00:00:00Z/1e999/0001-01-01T00:00:00+23:59/00000000-0000-0000-0000-000000000000"',
    '"0001-01-01T00:00:00+23:59/0/2025-01-01T00:00:00Z/00000000-0000-0000-0000-000000000000"',
    nested(1_000), nested(900), nested(21), nested(300, '{"a":', "}").replace(":}", ":1}", 1),
    nested(960, '{"a":', "}").replace(":}", ":1}", 1), r'{"a\u0000":1}', r'{"a":"\u0000"}', r'{"a":[{"b":"x\u0000"}]}',
    '{"a":1,"a":2}', '{"a":1e308}', '{"a":' + "9" * 400 + "}", '{"a":18446744073709551616}', '["x","x"]', "[null]",
]  # fmt: skip
LARGE = [
    '"' + "x" * BIG + '"',
    '"' + "\U0001f600" * (BIG // 4) + '"',
    "[" + ",".join(["0"] * (BIG // 2)) + "]",
    "{" + ",".join(f'"{number:07}":0' for number in range(BIG // 12)) + "}",
    "1" * BIG,
    "[" + ",".join([f'"{uuid7()}"'] * (BIG // 39)) + "]",
]
LAST = (
    "leave",
    "delete",
    "remove",
    "transfer",
    "set_role",
    "unban",
    "block",
    "decline",
    "moderate",
    "archive",
    "unfriend",
)


def valid(  # noqa: C901, PLR0911, PLR0912 - one case for each type
    kind: inspect.Type, name: str, ids: dict[str, str], *, whole: bool = False
) -> Any:
    """Return a valid value of a type. With `whole`, structs have all fields."""
    match kind:
        case inspect.StructType():
            fields = {
                field.encode_name: valid(field.type, field.encode_name, ids, whole=whole)
                for field in kind.fields
                if whole or field.required
            }
            return ({kind.tag_field: kind.tag} if kind.tag_field else {}) | fields
        case inspect.UnionType():
            return valid(
                next(one for one in kind.types if not isinstance(one, inspect.NoneType)), name, ids, whole=whole
            )
        case inspect.UUIDType():
            return ids.get(name) or str(uuid7())
        case inspect.StrType():
            return TEXTS.get(name, "words")
        case inspect.IntType():
            return max(kind.ge or 0, 1)
        case inspect.FloatType():
            return 1.0
        case inspect.BoolType():
            return True
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.DateTimeType():
            return "2027-01-01T00:00:00Z"
        case inspect.TimeType():
            return "10:00:00"
        case inspect.ListType():
            count = max(kind.min_length or 0, 1)
            return [
                valid(kind.item_type, name.removesuffix("s"), ids) if place == 0 else f"{place}"
                for place in range(count)
            ]
        case inspect.DictType():
            return {ids.get("conversation_id") or str(uuid7()): valid(kind.value_type, "", ids)}
        case _:  # an object of the client
            return {"a": {"b": [1, "c"]}}


TEXTS = {
    "url": "https://example.org/x", "image": "https://example.org/x", "website": "https://example.org/x",
    "poster": "https://example.org/x", "endpoint": "https://example.org/x", "p256dh": PUSH_POINT, "auth": "A" * 22,
    "mime_type": "image/png", "language": "python", "time_zone": "Europe/London", "emoji": "\N{THUMBS UP SIGN}",
    "email": "ada@example.org", "password": "correct horse", "new_password": "another horse",
    "after": "2025-01-01T00:00:00Z/" + str(uuid7()),
}  # fmt: skip


def holes(kind: inspect.Type, around: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values and keys in `around`, which is a valid `kind`, outermost first."""
    yield ()
    match kind:
        case inspect.StructType():
            for field in kind.fields:
                for rest in holes(field.type, around.get(field.encode_name)):
                    yield (field.encode_name, *rest)
        case inspect.UnionType():
            for one in kind.types:
                if not isinstance(one, inspect.NoneType | inspect.StructType):
                    yield from list(holes(one, around))[1:]
        case inspect.ListType():
            yield (0,)
        case inspect.DictType() | inspect.CustomType():
            yield ("a new key",)
            yield (HOLE,)


def with_hole(value: Any, way: tuple[Any, ...]) -> Any:
    if not way:
        return HOLE
    if way == (HOLE,):
        return {HOLE: 1}
    if isinstance(value, list):
        return [HOLE, *value[1:]]
    return (value or {}) | {way[0]: with_hole((value or {}).get(way[0]), way[1:])}


def frames(kind: type[msgspec.Struct], ids: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the JSON of valid structs with HOLE in one place each, and the name of the place."""
    about = inspect.type_info(kind)
    assert isinstance(about, inspect.StructType)
    for field in about.fields:
        nested_in = [field.type] if not isinstance(field.type, inspect.UnionType) else list(field.type.types)
        structs = [one for one in nested_in if isinstance(one, inspect.StructType)]
        base = valid(about, "", ids)
        for one in structs:
            inner = valid(one, field.encode_name, ids, whole=True)
            for way in holes(one, inner):
                frame = base | {field.encode_name: with_hole(inner, way)}
                yield ".".join(map(str, (one.cls.__name__, *way))), json.dumps(frame)
        if not structs:
            full = base | {field.encode_name: valid(field.type, field.encode_name, ids)}
            for way in holes(field.type, full[field.encode_name]):
                yield (
                    ".".join(map(str, (field.encode_name, *way))),
                    json.dumps(with_hole(full, (field.encode_name, *way))),
                )


def filled(text: str, value: str) -> bytes:
    """Return a frame with a hostile value in place of HOLE. Only texts can be keys."""
    if f'"{HOLE}":' in text and not value.startswith('"'):
        value = json.dumps(value[:100])
    return text.replace(f'"{HOLE}"', value).encode("utf-8", "surrogatepass")


@pytest.fixture
async def lone(settings: Settings) -> AsyncIterator[World]:
    """One worker, so that there is one log, without rate limits."""
    quick = msgspec.structs.replace(
        settings, ephemeral_rate=1e6, login_attempts=10**6, login_attempts_per_address=10**6
    )
    async with World(quick, workers=1) as world:
        yield world


QUOTES_NO_VALUE = re.compile(
    r'ERROR:  .* (violates|conflicts with) \w+( key)? constraint "\w+"'
    # from a lock that SEND does not wait for
    r"|ERROR:  canceling statement due to lock timeout"
    # from sessions that end: tests/databases.py terminates them, and clients may disconnect first
    r"|FATAL:  (terminating connection due to administrator command|connection to client lost)|LOG:  "
)


@pytest.fixture(autouse=True)
def _postgres_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail if PostgreSQL refuses a value, except taken keys, since its log would quote the value."""
    if "lone" not in request.fixturenames:
        yield
        return
    servers: Servers = request.getfixturevalue("servers")
    before = servers.postgres.log.path.stat().st_size
    yield
    lines = servers.postgres.log.path.read_bytes()[before:].decode(errors="replace").splitlines()
    assert [line for line in lines if not QUOTES_NO_VALUE.search(line)] == []


async def ids_in(world: World) -> tuple[UserSession, dict[str, str]]:
    """Return a connected user, and the ids of rows that they created, by field."""
    ada, charles = await world.users("Ada", "Charles")
    return ada, await ids_of(world, await world.connect(ada), charles)


async def ids_of(world: World, client: Client, charles: UserSession) -> dict[str, str]:
    group = await world.group(client, charles)
    message_id = await sent(client, group)
    return {
        "conversation_id": str(group), "to_conversation_id": str(group), "message_id": str(message_id),
        "user_id": str(charles.id), "participant": str(charles.id), "quoted_message_id": str(message_id),
        "parent_message_id": str(message_id),
    }  # fmt: skip


def assert_quiet(log: pytest.LogCaptureFixture) -> None:
    """Assert that nothing failed, and that the database refused nothing."""
    loud = [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]
    assert not loud, loud[:5]


def each_frame() -> list[type[msgspec.Struct]]:
    """Return all frames. Those that delete what others need come last."""
    return sorted(ROUTES, key=lambda frame: str(frame.__struct_config__.tag).startswith(LAST))


def ids_for(kind: type[msgspec.Struct], ids: dict[str, str]) -> dict[str, str]:
    """Return the ids for a frame, except the id of a row that it creates."""
    is_new = kind.__struct_config__.tag in {"send", "schedule", "create_group", "create_channel"}
    own = "conversation_id" if issubclass(kind, CreateGroup | CreateChannel) else "message_id"
    return {name: one for name, one in ids.items() if not (is_new and name == own)}


class Direct(NamedTuple):
    """Handles frames as a connection does, without a socket."""

    dispatch: Dispatch
    context: Context
    ids: dict[str, str]

    @classmethod
    async def of(cls, world: World) -> Self:
        somebody, ids = await ids_in(world)
        (one,) = world.workers[0].app.hub.online_users.sockets(somebody.id)
        assert isinstance(one, Connection)
        return cls(one._deps.dispatch, one.context, ids)  # noqa: SLF001

    async def run_all(self, values: list[str]) -> int:
        """Send each value in each field. Assert that no reply is `internal`, and return the number of frames."""
        wrong, count = [], 0
        for kind in each_frame():
            for place, text in frames(kind, ids_for(kind, self.ids)):
                for value in values:
                    answer = await self.dispatch.run(self.context, filled(text, value))
                    encode(answer)
                    count += 1
                    if isinstance(answer, Error) and (answer.code is ErrorCode.INTERNAL or answer.message == UNFIT):
                        wrong.append((kind.__name__, place, value[:60]))
        assert not wrong, (len(wrong), count, wrong[:20])
        return count


@pytest.mark.long
async def test_every_field_of_every_frame_takes_hostile_values(lone: World, caplog: pytest.LogCaptureFixture) -> None:
    assert await (await Direct.of(lone)).run_all(SMALL) > 10_000
    assert_quiet(caplog)


@pytest.mark.long
async def test_every_field_of_every_frame_takes_large_values(lone: World, caplog: pytest.LogCaptureFixture) -> None:
    assert await (await Direct.of(lone)).run_all(LARGE) > 1_000
    assert_quiet(caplog)


@pytest.mark.long
@pytest.mark.timeout(600)
@given(data=st.data())
@examples(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_json_in_any_field_gets_a_reply(lone: World, data: st.DataObject) -> None:
    """A single frame does not close its connection. Each example closes its connection, since all come from one
    address.
    """
    ada, charles = await lone.users("Ada", "Charles")
    async with Client(lone.url, ada.token) as client:
        await client.settled()
        kind = data.draw(st.sampled_from(each_frame()))
        ids = ids_for(kind, await ids_of(lone, client, charles))
        _, text = data.draw(st.sampled_from(list(frames(kind, ids))))
        await client.socket.send(filled(text, json.dumps(data.draw(JSON))).decode())
        await client.socket.send('{"type":"ping"}')
        await until(lambda: client.is_over or sum(isinstance(one, Reply | Error) for one in client.events) == 2)
        assert not client.is_over, client.socket.close_code
        assert ErrorCode.INTERNAL not in {one.code for one in client.events if isinstance(one, Error)}


async def test_connection_stays_open_after_hostile_values(lone: World, caplog: pytest.LogCaptureFixture) -> None:
    somebody, ids = await ids_in(lone)
    value = itertools.cycle(SMALL)
    every = [
        filled(text, next(value)).decode("utf-8", "surrogatepass")
        for kind in each_frame()
        for _, text in frames(kind, ids)
    ]
    every += [filled(text, big).decode() for big in LARGE for _, text in itertools.islice(frames(Send, ids), 3)]
    url = lone.workers[0].url.replace("http", "ws") + "/v1/ws"
    for batch in batches(every, 150):
        token = {"Authorization": f"Bearer {somebody.token}"}
        async with connect(url, additional_headers=token, max_size=None, compression=None) as socket:
            for text in [*batch, '{"type":"ping","id":"last"}']:
                await socket.send(text)
            answers: list[Any] = []
            while not answers or answers[-1].get("re") != "last":
                said = json.loads(await asyncio.wait_for(socket.recv(), 15))
                if said["type"] in {"reply", "error"}:
                    answers.append(said)
            assert len(answers) == len(batch) + 1
            assert "internal" not in {one.get("code") for one in answers}
    assert_quiet(caplog)


@pytest.mark.long
async def test_every_field_of_every_body_takes_hostile_values(lone: World, caplog: pytest.LogCaptureFixture) -> None:
    somebody = await lone.user("Ada")
    bodies: dict[str, type[msgspec.Struct]] = {
        "register": Register,
        "login": Login,
        "delete": Confirm,
        "password": ChangePassword,
        "deactivate": Confirm,
    }
    async with http_client(lone.workers[0].url) as http:
        for name, kind in bodies.items():
            texts = [text for _, text in frames(kind, {})]
            for text, value in itertools.product(texts, SMALL):
                headers = {"Authorization": f"Bearer {somebody.token}"}
                answer = await http.post(f"/v1/auth/{name}", content=filled(text, value), headers=headers)
                assert answer.status_code < 500, (name, text, value[:60])
    assert_quiet(caplog)


def batches(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---------------------------------------------------------------------------------------------- ids that collide


def sharing(one: UUID, count: int) -> list[UUID]:
    """Return different UUIDv7s with the time and the Python hash of a UUIDv7."""
    low, middle = one.int & (1 << 62) - 1, one.int >> 64 & 0xFFF
    rest = one.int - low - (middle << 64)
    # 2^64 is 8 modulo 2^61 - 1.
    found = [UUID(int=rest + (number << 64) + (low + 8 * (middle - number)) % (2**61 - 1)) for number in range(count)]
    assert len({one, *found}) >= count
    assert {hash(other) for other in found} == {hash(one)}
    return found


INFINITE = ("0001-01-01T00:00:00Z", "0001-01-01T01:00:00+01:00",
            "9999-12-31T23:59:59.999999Z", "9999-12-31T22:59:59.999999-01:00")  # fmt: skip
"""The first and the last time of Python, which the driver stores as `-infinity` and `infinity`."""


def test_times_that_the_driver_stores_as_infinite_are_refused_in_every_field() -> None:
    taken, refused_in = [], set()
    for kind in each_frame():
        for place, text in frames(kind, {}):
            for value in INFINITE:
                try:
                    frame = decode_client(filled(text, json.dumps(value)))
                except Refused as refusal:
                    if "must be later than 0001" in refusal.message:
                        refused_in.add(place.split(".")[-1])
                    continue
                if any(isinstance(one, datetime) and one.year in {1, 9999} for one in leaves(frame)):
                    taken.append((kind.__name__, place, value))
    assert taken == []
    assert refused_in == {"muted_until", "sent_before", "sent_after", "send_at", "up_to", "closes_at"}


def leaves(value: object) -> Iterator[object]:
    """Yield the values within structs and lists, recursively."""
    if isinstance(value, msgspec.Struct):
        value = list(msgspec.structs.asdict(value).values())
    if isinstance(value, list):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def test_ids_that_share_a_hash_are_refused() -> None:
    """This applies to each frame with many ids, since a dictionary of thousands of them takes seconds."""
    many = {
        (str(frame.__struct_config__.tag), field.encode_name)
        for frame in ROUTES
        for field in inspect.type_info(frame).fields  # type: ignore[attr-defined]
        if getattr(field.type, "max_length", None) is not None and field.type.max_length > 100
        and (isinstance(field.type, inspect.DictType)
             or (isinstance(field.type, inspect.ListType) and isinstance(field.type.item_type, inspect.UUIDType)))
    }  # fmt: skip
    assert many == {("resume", "versions"), ("watch", "user_ids"), ("unwatch", "user_ids")}
    ids = [str(one) for one in sharing(uuid7(), 2)]
    for kind, field in many:
        for named in ([ids[0], ids[0].upper()], ids):
            frame: dict[str, Any] = {"type": kind, field: named}
            if kind == "resume":
                frame = {"type": kind, "epoch": "", field: dict.fromkeys(named, 1)}
            if named is not ids:
                decode_client(json.dumps(frame))
                continue
            with refused(ErrorCode.INVALID, field):
                decode_client(json.dumps(frame))


async def test_conversations_with_the_same_hash_are_refused(lone: World) -> None:
    ids = [uuid7(), *(uuid4() for _ in range(100)), UUID(int=0), UUID(int=2**128 - 1)]
    hashes = await lone.db.fetch(
        "SELECT id_hash(one) FROM unnest($1::uuid[]) WITH ORDINALITY u (one, n) ORDER BY n", ids
    )
    assert [row[0] for row in hashes] == [hash(one) for one in ids]
    ada = await lone.connect(await lone.user("Ada"))
    first, other = sharing(uuid7(), 2)
    await ada.call(CreateChannel(conversation_id=ConversationId(first), title="First"))
    for _ in range(2):
        with refused(ErrorCode.CONFLICT, "conversation_id"):
            await ada.call(CreateChannel(conversation_id=ConversationId(other), title="Other"))


@given(
    depth=st.integers(json_object.MAX_READ_DEPTH - 4, json_object.MAX_READ_DEPTH + 3),
    beside=st.lists(st.sampled_from(["[]", "{}", '"[]"', '"]["', '"{}}"', "[[]]", "1"]), max_size=80),
)
def test_stored_object_is_read_up_to_the_depth_limit(depth: int, beside: list[str]) -> None:
    text = '{"a": ' + "[" * (depth - 1) + "1" + "]" * (depth - 1) + ', "b": [' + ", ".join(beside) + "]}"
    decoder = msgspec.json.Decoder(json_object.Json, dec_hook=json_object.read)
    if depth <= json_object.MAX_READ_DEPTH:
        assert decoder.decode(text) == json.loads(text)
    else:
        with pytest.raises(msgspec.ValidationError, match="levels deep"):
            decoder.decode(text)
