"""Every refusal tells a person what to do next, or names the bound."""

import ast
import json
import re
from collections.abc import Iterator
from datetime import time
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from msgspec import inspect

from protocol import client, json_object, limits, server
from protocol.codec import advice, decode, decode_client
from protocol.errors import ErrorCode, Refused
from protocol.ids import MessageId, uuid7
from protocol.payloads import Payload
from protocol.roles import Act
from protocol.values import ConversationSettings
from server.core.errors import CONSTRAINTS, INTERNAL, UNFIT, NotActive, NotFound
from server.domain.permissions import OBSTACLES
from tests.prose import faults
from tests.test_hostile_values import filled, frames, valid
from tests.test_wire_bounds import BODIES, BOUNDS, CLIENT, answer
from tests.trees import parsed
from tests.world import Room, World, http_client, refused, sent

ROOT = Path(__file__).parent.parent
VERBS = (
    "Add|Ask|Cancel|Change|Check|Choose|Close|Connect|Correct|Delete|Do not|Edit|Encode|End|Give|Invite|Leave|Lift|"
    "Log in|Look|Make|Name|Nest|Offer|Pin|Read|Reconnect|Remove|Reply|Retry|Schedule|Send|Shorten|Split|Take|Tell|Try|"
    "Unblock|Unfollow|Unpin|Unstar|Unwatch|Use|Wait|Write"
)
ACTS = re.compile(rf"(?:^|[.:,;] (?:or )?)(?:{VERBS})\b")
BEGINS = re.compile(r"[A-Z`{]")
NAMES_BOUND = re.compile(r"\bat (?:most|least)\b|\bmust\b|\bbetween\b|\blonger than\b|\bmore than\b|^Requires\b|_A_DAY")
ELSEWHERE = re.compile(r"server/(?:ops/transfer|queries/transfers|queries/cursor|core/config|core/proxies|db/hosts)")
"""Files whose ValueErrors reach no client."""


def _text(node: ast.expr) -> str | None:
    """Return the text of an expression, with the source of interpolated parts, or None if it is not text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(
                str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part)}}}" for part in values
            )
    return None


def sentences() -> Iterator[tuple[str, str]]:
    """Yield all texts of refusals in the code, each with its place."""
    for path in sorted([*(ROOT / "protocol").rglob("*.py"), *(ROOT / "server").rglob("*.py")]):
        if ELSEWHERE.match(str(path.relative_to(ROOT))):
            continue
        for node in ast.walk(parsed(path)):
            texts: list[ast.expr] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                texts = node.args[1:2] if node.func.id == "Refused" else []
                texts = node.args[:1] if node.func.id == "ValueError" else texts
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                texts = [node.value] if node.targets[0].id == "sentence" else []
            for text in texts:
                if (sentence := _text(text)) is not None:
                    yield f"{path.relative_to(ROOT)}:{text.lineno}", sentence


OF_OTHERS = re.compile(r"server/(?:ops/transfer|cli|queries)/")
"""Rooms whose `Fatal` and log texts are not rewritten yet."""


def entries() -> Iterator[tuple[str, str]]:
    """Yield all texts of fatal errors and log entries in the code, each with its place."""
    for path in sorted((ROOT / "server").rglob("*.py")):
        if OF_OTHERS.match(str(path.relative_to(ROOT))):
            continue
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Call(
                    func=ast.Name(id="Fatal")
                    | ast.Attribute(attr="debug" | "info" | "warning" | "error" | "exception" | "critical"),
                    args=[text, *_],
                ) if (sentence := _text(text)) is not None:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", sentence


def is_useful(sentence: str) -> bool:
    return bool(ACTS.search(sentence) or NAMES_BOUND.search(sentence))


def test_every_sentence_of_a_refusal_says_what_to_do_or_names_the_bound() -> None:
    found = dict(sentences())
    assert len(found) > 90
    tables = [*OBSTACLES.values(), *(one[1] for one in CONSTRAINTS.values()), *limits.RULES.values(), UNFIT]
    found |= {f"a table: {one}": one for one in (*tables, INTERNAL.message, NotFound().message, NotActive().message)}
    assert {place: one for place, one in found.items() if not is_useful(one)} == {}
    assert {place: one for place, one in found.items() if not BEGINS.match(one)} == {}
    assert not is_useful("This is not allowed.")


def test_messages_are_short_sentences_that_begin_with_their_subject() -> None:
    """The rule holds for refusals, fatal errors and log entries."""
    found = dict(sentences()) | dict(entries())
    tables = [*OBSTACLES.values(), *(one[1] for one in CONSTRAINTS.values()), *limits.RULES.values(), UNFIT]
    found |= {f"a table: {one}": one for one in (*tables, INTERNAL.message, NotFound().message, NotActive().message)}
    assert len(found) > 200
    assert {place: wrong for place, one in found.items() if (wrong := faults(one))} == {}


@pytest.mark.parametrize(
    ("frame", "code", "message"),
    [
        ('{"type": "sned"}', ErrorCode.BAD_FRAME, "`send`, or another one of the frame types in docs/protocol.md."),
        ('{"type": "x"}', ErrorCode.BAD_FRAME, "one of the frame types in docs/protocol.md."),
        ('{"a": 1}', ErrorCode.BAD_FRAME, "one of the frame types in docs/protocol.md."),
        ("[1]", ErrorCode.INVALID, "Give an object, not a list."),
        ('{"type": "join", "x": 1}', ErrorCode.INVALID, "Remove `x`: there is no such field."),
        ('{"type": "unpin", "conversation_id": "5"}', ErrorCode.INVALID, "Give a UUID such as"),
        ('{"type": "history"}', ErrorCode.INVALID, "Give `conversation_id`."),
        (
            '{"type": "presence", "status": "asleep"}',
            ErrorCode.INVALID,
            "Give `away`, `busy`, `invisible`, ",
        ),
        ('{"type": "update_profile", "quiet_from": "22:00"}', ErrorCode.INVALID, "Give a time of day such as 22:00:00"),
        ('{"type": "update_profile", "name": ""}', ErrorCode.INVALID, "Give at least 1 character."),
        ('{"type": "watch", "user_ids": []}', ErrorCode.INVALID, "Give at least 1 element."),
        ('{"type": "ping", "type": "get_me"}', ErrorCode.BAD_FRAME, "Give `type` only once; the second is `get_me`."),
        ('{"type": "watch", "user_ids": 5}', ErrorCode.INVALID, "Give a list, not an integer."),
        ('{"type": "list_stars", "limit": 1000}', ErrorCode.INVALID, "Give a number of at most 100."),
    ],
)
def test_error_about_an_undecodable_frame_says_what_to_send(frame: str, code: ErrorCode, message: str) -> None:
    with pytest.raises(Refused) as told:
        decode_client(frame)
    assert told.value.code is code
    assert message in told.value.message


NOT_OF_THE_WIRE = re.compile(
    r"Expected|\bgot\b|regex|out of range|`(?:str|int|float|bool|array|object|null|uuid|datetime|time)\b"
)
"""Words of the decoder that client developers do not know."""
WRONG = (
    "null", "true", "1", "-5", "1.5", '"x"', '""', "[]", "[[]]", "{}", '{"x": {}}', '"\\u0000"', "1" * 20, "1" * 40,
    "1e400",
)  # fmt: skip
UNKNOWN = ("x", "conversationId", "größe", "a`b", "$", "x" * 100_000)


def refusals() -> Iterator[tuple[str, Refused]]:
    """Yield the refusals of invalid frames and bodies, with their places.

    Each has a wrong value, a value beyond a bound, a missing field or an unknown field.
    """
    for bound in BOUNDS:
        if (refused := answer(bound, bound.beyond)) is not None:
            yield str(bound), refused
    for kind in CLIENT:
        about = inspect.type_info(kind)
        whole = valid(about, "", {}, whole=True)
        texts = [(f"{place} {one}", filled(text, one)) for place, text in frames(kind, {}) for one in WRONG]
        texts += [(f"with {one[:9]}", json.dumps(valid(about, "", {}) | {one: 1}).encode()) for one in UNKNOWN]
        texts += [(f"without {name}", json.dumps({key: whole[key] for key in whole if key != name}).encode())
                  for name in whole if name != "type"]  # fmt: skip
        decoder = msgspec.json.Decoder(kind, dec_hook=json_object.accept) if kind in BODIES else None
        for place, data in texts:
            try:
                _ = decode_client(data) if decoder is None else decode(data, decoder)
            except Refused as refused:
                yield f"{kind.__name__} {place}", refused


def test_refusals_of_values_are_sentences_in_terms_of_the_protocol_with_a_path() -> None:
    found = list(refusals())
    assert len(found) > 5_000
    assert {one.message for _, one in found if NOT_OF_THE_WIRE.search(one.message)} == set()
    assert {one.message for _, one in found if not (is_useful(one.message) and BEGINS.match(one.message))} == set()
    assert {one.message for _, one in found if not one.message.endswith(".") or len(one.message) > 600} == set()
    assert [place for place, one in found if one.path is None and one.code is ErrorCode.INVALID] == []
    schema = json.dumps(msgspec.json.schema_components(CLIENT), default=str)
    patterns = {json.loads(f'"{one}"') for one in re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', schema)}
    assert len(patterns) > 8
    assert patterns <= limits.RULES.keys()
    for name in ("conversationId", "größe", "a`b"):
        with refused(ErrorCode.INVALID, name):
            decode_client(json.dumps({"type": "ping", name: 1}))
    with refused(ErrorCode.INVALID, "status"):
        decode_client('{"type": "presence", "status": "`type`"}')


def lists_of_values(kind: inspect.Type) -> Iterator[tuple[str, list[str]]]:
    """Yield JSON with `?` for each value of a type that must be one of a list, and that list."""
    match kind:
        case inspect.LiteralType(values=values):
            yield "?", [str(value) for value in values]
        case inspect.Metadata(type=inner):
            yield from lists_of_values(inner)
        case inspect.UnionType(types=types):
            for one in types:
                yield from lists_of_values(one)
        case inspect.ListType(item_type=inner) | inspect.VarTupleType(item_type=inner):
            yield from ((f"[{text}]", values) for text, values in lists_of_values(inner))
        case inspect.StructType(fields=fields, tag=tag):
            head = "" if tag is None else f'"type": "{tag}", '
            for field in fields:
                name = field.encode_name
                yield from ((f'{{{head}"{name}": {text}}}', values) for text, values in lists_of_values(field.type))


def test_refusal_of_a_value_lists_the_allowed_ones() -> None:
    found = [one for frame in get_args(client.ClientFrame) for one in lists_of_values(inspect.type_info(frame))]
    assert len(found) > 20
    for text, values in found:
        with pytest.raises(Refused) as told:
            decode_client(text.replace("?", '"nonsense"'))
        assert told.value.code is ErrorCode.INVALID
        assert set(re.findall(r"`(\w+)`", told.value.message)) == set(values), text
    kinds = [str(one.__struct_config__.tag) for one in get_args(Payload)]
    with pytest.raises(Refused) as told:
        decode_client('{"type": "send", "payload": {"type": "nonsense"}}')
    assert re.findall(r"`(\w+)`", told.value.message) == kinds
    with pytest.raises(Refused, match=r"one of those in docs/protocol\.md"):
        raise Refused(ErrorCode.INVALID, advice("Invalid enum value 'x'"))


NO_FIELD = re.compile(
    r"You can (?:have|make|report|star)\b|of your friend requests\b|scheduled messages\b"  # a bound of the user's
    r"|^Requires the role|slow mode|^Your user has .* connections"
    r"|^UNFIT$|path does not exist|Registration is closed|changing the account"
    r"|^This path|body (?:has|is)\b|nested too deeply"
)
"""Refusals that are not about a field."""


def test_every_refusal_about_a_field_has_its_path() -> None:
    codes = {"INVALID", "FORBIDDEN", "CONFLICT", "NOT_FOUND"}
    without = []
    for path in sorted([*(ROOT / "protocol").rglob("*.py"), *(ROOT / "server").rglob("*.py")]):
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Call(func=ast.Name(id="Refused"), args=[ast.Attribute(attr=code), text], keywords=keywords):
                    has_path = any(keyword.arg in {"path", None} for keyword in keywords)
                    sentence = _text(text) or ast.unparse(text)
                    if code in codes and not has_path and not NO_FIELD.search(sentence):
                        without.append(f"{path.relative_to(ROOT)}:{node.lineno} {sentence}")
    assert without == [], "\n".join(without)


OF_EVERYTHING = {
    "Another search of your user is running. Retry after its reply.": "all searches of the user",
    "Too many attempts. Retry after `retry_after_ms`.": "all logins to the account or from the address",
    "Too many requests of this connection are unanswered. Read the responses first.": "the connection",
    "Too many connections from this address. Close one, or retry after `retry_after_ms`.": "the address",
}
"""Refusals that apply to all frames of a kind from the user, connection or address."""
HOLDS_BACK = re.compile(r"(?:of (?:your|this) (?:user|session|connection|address)\b.*|^notifications)$")


def test_rate_limit_refusals_name_their_scope() -> None:
    """Otherwise a client would hold back all frames for hours because one conversation is in slow mode."""
    without, allowances = set(), {}
    for path in sorted((ROOT / "server").rglob("*.py")):
        tree = parsed(path)
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="Refused"), args=[ast.Attribute(attr="RATE_LIMITED"), text]):
                    if all(keyword.arg != "path" for keyword in node.keywords):
                        without.add(_text(text))
                case ast.Call(func=ast.Name(id="TokenBuckets"), args=[what, *_]):
                    allowances[_text(what) or ""] = path.name
    assert without == set(OF_EVERYTHING)
    # The test of new endpoints covers their path.
    assert {what for what in allowances if not HOLDS_BACK.search(what)} == {"new push endpoints"}


A_ROLE = re.compile(r"\b(owner|admin|moderator|member|guest)s?\b")
WHO_MAY = {
    "The conversation is archived.": Act.EDIT_CONVERSATION,
    "Your role cannot send in this conversation.": Act.SET_ROLES,
    "You are banned from this conversation.": Act.REMOVE_MEMBERS,
    "Your role cannot lift a ban.": Act.REMOVE_MEMBERS,
    "A moderator has hidden this message.": Act.MODERATE,
    "Only the sender and moderators may trace a message.": Act.MODERATE,
}
"""The act whose lowest role a sentence names, by the beginning of the sentence."""


def test_refusals_name_the_lowest_permitted_role() -> None:
    found = {one for one in (*OBSTACLES.values(), *dict(sentences()).values()) if A_ROLE.search(one)}
    named = {one: [act.value.least for begins, act in WHO_MAY.items() if one.startswith(begins)] for one in found}
    assert {one: A_ROLE.findall(one) for one in found} == named
    assert len(found) == len(WHO_MAY)


def test_nearest_type_is_suggested_for_a_misspelt_one() -> None:
    for frame in get_args(client.ClientFrame):
        name = str(frame.__struct_config__.tag)
        if len(name) > 4:
            with pytest.raises(Refused, match="or another one of"):
                decode_client(f'{{"type": "{name[:2]}{name[3]}{name[2]}{name[4:]}z"}}')
    assert advice("Something new") == "Something new."


async def test_refusals_over_http_are_json_that_says_what_to_do(world: World) -> None:
    expected = {
        ("GET", "/nope"): (404, "/v1/openapi.json"),
        ("POST", "/v1/auth/reset"): (404, "/v1/openapi.json"),
        ("GET", "/v1/call"): (405, "Use POST"),
        ("DELETE", "/healthz"): (405, "GET"),
        ("GET", "/v1/ws"): (426, "by WebSocket"),
    }
    async with http_client(world.url) as http:
        for (method, path), (status, message) in expected.items():
            answer = await http.request(method, path)
            assert (answer.status_code, answer.json()["type"]) == (status, "error")
            assert message in answer.json()["message"]
        assert (await http.get("/v1/ws")).headers["upgrade"] == "websocket"
        assert (await http.get("/v1/call")).headers["allow"] == "POST"
        short = {"name": "Ada", "email": "ada@example.org", "password": "short"}
        answer = await http.post("/v1/auth/register", json=short)
        assert (answer.json()["path"], answer.json()["message"]) == ("password", "Give at least 8 characters.")
        answer = await http.post("/v1/auth/register", json=short | {"email": "nonsense"})
        assert (answer.json()["path"], "such as ada@example.org" in answer.json()["message"]) == ("email", True)


async def test_refusals_of_unsuitable_frames_name_the_suitable_one(room: Room) -> None:
    text = room.at(await sent(room.ada, room.group))
    for frame in (client.Vote(**text, options=[0]), client.ClosePoll(**text), client.ListVotes(**text)):
        with refused(ErrorCode.CONFLICT, "message_id"):
            await room.ada.call(frame)
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.ada.call(client.Vote(conversation_id=room.group, message_id=MessageId(uuid7()), options=[0]))
    with refused(ErrorCode.INVALID, "quiet_until"):
        await room.ada.call(client.UpdateProfile(quiet_from=time(22)))
    await room.ada.call(client.UpdateProfile(quiet_from=time(22), quiet_until=time(7)))
    with refused(ErrorCode.INVALID, "quiet_from"):
        await room.ada.call(client.UpdateProfile(quiet_from=None))
    await room.ada.call(client.UpdateProfile(quiet_until=time(8)))
    await room.ada.call(client.UpdateProfile(quiet_from=None, quiet_until=None))


async def test_refusals_name_the_setting_or_block_that_the_user_can_change(room: Room, world: World) -> None:
    said = room.at(await sent(room.ada, room.group))
    settings = ConversationSettings(edit_window_seconds=0)
    await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=settings))
    with pytest.raises(Refused, match="Messages cannot be edited in this conversation"):
        await room.ada.call(client.Edit(**said, content="Anew"))
    mary = await world.user("Mary")
    ada, charles = room.users[0].id, room.users[1].id
    await room.ada.call(client.Block(user_id=mary.id))
    for frame in (client.CreateDirect, client.RequestFriend, client.Follow):
        with pytest.raises(Refused, match="Unblock them first") as told:
            await room.ada.call(frame(user_id=mary.id))
        assert (told.value.code, told.value.path) == (ErrorCode.CONFLICT, "user_id")
    # A block by the other user is not revealed.
    other = await world.connect(mary)
    for frame in (client.CreateDirect, client.RequestFriend, client.Follow):
        with refused(ErrorCode.NOT_FOUND, "user_id"):
            await other.call(frame(user_id=ada))
    made = await room.ada.call(client.CreateDirect(user_id=charles), server.OneConversation)
    await room.charles.call(client.Block(user_id=ada))
    for one in (room.ada, room.charles):
        with pytest.raises(Refused, match="Unblock them if you block them"):
            await sent(one, made.view.conversation.id)
