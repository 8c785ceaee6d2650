"""Limits per user, per connection and per address; docs/limits.md has the table."""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httpx
import msgspec
import pytest
from starlette.requests import HTTPConnection
from starlette.routing import Route
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from protocol import client, server
from protocol.codec import encode
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import MessageId, UserId, uuid7
from protocol.limits import MAX_CONTENT, MAX_FRAME_BYTES, MAX_PAGE_BYTES
from protocol.server import Error
from prove.client import Client
from server.core import deadlines
from server.core.config import Settings
from server.core.proxies import Proxies
from server.core.throttle import Throttle
from server.db.database import Database
from server.db.readiness import CHECK_SECONDS, Readiness
from server.fairness.shared_bound import CLIENT_SHARE_DIVISOR
from server.gateway import websocket
from server.gateway.connection import MAX_INBOX, Connection
from server.gateway.sockets import UNREAD_BYTES, Sockets
from server.http.middleware import PROBES
from server.limits.per_address import LATE_RATE, OF_A_PROXY, Addresses
from server.limits.token_bucket import Pace, TokenBuckets, too_many
from server.queries import conversations
from tests.world import World, http_client, message, received_message, sent, until

UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


async def refused(asker: Client, count: int) -> int:
    """Send `count` frames concurrently and return how many are refused."""
    answers = await asyncio.gather(*(asker.ask(client.Ping()) for _ in range(count)))
    late = [answer for answer in answers if isinstance(answer, Error)]
    for answer in late:
        assert answer.code is ErrorCode.RATE_LIMITED
        assert answer.retry_after_ms is not None
    return len(late)


async def test_frames_of_one_connection_are_limited(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, frame_rate=5.0, ephemeral_rate=1e6)
    async with World(settings, workers=1) as world:
        who = await world.user("Ada")
        one, other = await world.connect(who), await world.connect(who)
        assert 20 <= await refused(one, 50) <= 30
        assert await refused(other, 10) == 0


async def test_frames_of_one_user_are_limited_across_two_workers(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, ephemeral_rate=40.0)
    async with World(settings) as world:
        who, another = await world.users("Ada", "Charles")
        here, there = await world.connect(who, 0), await world.connect(who, 1)
        # The workers share the count from now on. Earlier frames are not counted.
        assert await refused(here, 20) == await refused(there, 20) == 0
        await asyncio.sleep(0.7)
        assert await refused(here, 120) <= 10
        await asyncio.sleep(0.7)
        await refused(there, 10)
        await asyncio.sleep(0.7)
        # The burst is 160, and 40 refill per second. Alone, this worker would allow most of another 160.
        assert await refused(there, 140) > 40
        assert await refused(await world.connect(another, 1), 100) == 0


async def test_without_redis_each_worker_counts_separately(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, ephemeral_rate=5.0)
    async with World(settings) as world:
        one = await world.connect(await world.user("Ada"))
        for worker in world.workers:
            await worker.app._redis.aclose()  # noqa: SLF001
            worker.app._redis.connection_pool.connection_kwargs["path"] = "/nowhere"  # type: ignore[union-attr]  # noqa: SLF001
        assert 10 <= await refused(one, 40) <= 20


async def test_requests_of_one_address_are_limited(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    settings = msgspec.structs.replace(settings, address_rate=0.25)
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        who = await world.user("Ada")
        ask = {"content": b'{"type":"ping"}', "headers": {"authorization": f"Bearer {who.token}"}}
        answers = [await http.post("/v1/call", **ask) for _ in range(4)]  # type: ignore[arg-type]
        codes = [answer.status_code for answer in answers]
        assert codes[0] == HTTPStatus.OK
        assert HTTPStatus.TOO_MANY_REQUESTS in codes
        assert int(answers[-1].headers["retry-after"]) >= 1
        with pytest.raises(InvalidStatus, match="429"):
            await Client(world.url, who.token).open()
        routes = {route.path for route in world.workers[0].app.starlette.routes if isinstance(route, Route)}
        assert {"/v1/call", "/v1/asyncapi.json", "/v1/auth/login"} < routes
        assert {await status(http, path) for path in routes - PROBES} == {HTTPStatus.TOO_MANY_REQUESTS}
        assert {await status(http, path) for path in PROBES} == {HTTPStatus.OK}
    assert logged(caplog) == [f"too many requests from address 127.0.0.1; refusing further ones{OF_A_PROXY}"]


async def test_answers_over_the_rate_of_an_address_are_delayed_and_their_connections_can_be_evicted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endless refused requests and probes took a quarter of a worker. Other clients of the proxy are answered."""
    made: list[Addresses] = []
    require, asked = Addresses.require, list[str]()

    def counted(self: Addresses, request: HTTPConnection) -> None:
        asked.append(request.url.path)
        require(self, request)

    def kept(*args: Any, **options: Any) -> Addresses:
        made.append(Addresses(*args, **options))
        return made[-1]

    monkeypatch.setattr(Addresses, "require", counted)
    monkeypatch.setattr("server.app.app.Addresses", kept)
    settings = msgspec.structs.replace(settings, address_rate=0.1, trusted_proxies="1")
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        sockets = world.workers[0].app.sockets
        (addresses,) = made
        addresses._late_rate = 1e-6  # noqa: SLF001 - a million seconds for each
        mal = "203.0.113.9"
        assert (await http.get("/nowhere", headers={"X-Forwarded-For": mal})).status_code == HTTPStatus.NOT_FOUND
        asked.clear()
        late = []
        for line, more in (("GET /healthz", ""), ("GET /readyz", ""), ("GET /nowhere", ""), ("GET /v1/ws", UPGRADE)):
            late.append(await asyncio.open_connection(*world.url.removeprefix("http://").split(":")))
            asking = f"{line} HTTP/1.1\r\nHost: here\r\nX-Forwarded-For: {mal}\r\n{more}\r\n"
            late[-1][1].write(asking.encode() * (1 if more else 2))
        await until(lambda: addresses._late == {mal: len(late)})  # noqa: SLF001
        assert sorted(asked) == ["/healthz", "/nowhere", "/readyz", "/v1/ws"]
        assert len(sockets._waiting) == len(late) + 1  # noqa: SLF001 - one more is the idle connection of `http`
        for other in ({}, {"X-Forwarded-For": "198.51.100.7"}):
            assert (await http.get("/readyz", headers=other)).status_code == HTTPStatus.OK
        for _, writer in late:
            writer.close()
        await until(lambda: not addresses._late)  # noqa: SLF001
        await until(lambda: len(sockets._waiting) == len(sockets) == 1)  # noqa: SLF001


def test_delayed_answers_of_an_address_are_spaced_by_the_rate() -> None:
    def asking(host: str) -> HTTPConnection:
        return HTTPConnection({"type": "http", "client": (host, 1), "headers": []})

    for rate, at_least in ((1.0, LATE_RATE), (500.0, 500.0)):
        addresses = Addresses(rate, connections=1, too_many=Throttle())
        with addresses.late(asking("10.0.0.1")) as first, addresses.late(asking("10.0.0.1")) as second:
            assert (first, second) == (1 / at_least, 2 / at_least)
            with addresses.late(asking("10.0.0.2")) as other:
                assert other == first
        with addresses.late(asking("10.0.0.1")) as again:
            assert again == first


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log entries about addresses."""
    return [record.getMessage() for record in caplog.records if "address" in record.getMessage()]


async def test_every_early_answer_counts_against_its_address(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "https://chat.example"
    counted: list[str] = []
    monkeypatch.setattr(Addresses, "require", lambda _, request: counted.append(request.url.path))
    ask = {"Access-Control-Request-Method": "POST"}
    early: list[tuple[str, str, dict[str, str], int]] = [
        ("OPTIONS", "/v1/call", ask | {"Origin": ours}, 200),
        ("OPTIONS", "/v1/call", ask | {"Origin": "https://evil.example"}, 400),
        ("OPTIONS", "/healthz", ask | {"Origin": ours}, 200),
        ("OPTIONS", "/v1/call", {"Origin": ours}, 405),
        ("OPTIONS", "/v1/call", ask, 405),
        ("GET", "/v1/call", {}, 405),
        ("GET", "/v1/ws", {}, 426),
        ("GET", "/nowhere", {"Origin": ours}, 404),
        ("GET", "/healthz", {}, 200),
        ("GET", "/readyz", {}, 200),
        ("POST", "/v1/call", {}, 401),
    ]
    origins = msgspec.structs.replace(settings, origins=ours)
    async with World(origins, workers=1) as world, http_client(world.url) as http:
        for method, path, headers, code in early:
            answer = await http.request(method, path, headers=headers)
            assert (answer.status_code, counted) == (code, [path]), (method, path, headers)
            counted.clear()
        for path in ("/v1/ws", "/nowhere"):
            with pytest.raises(InvalidStatus):
                async with connect(
                    world.url.replace("http", "ws") + path, additional_headers={"authorization": "Bearer x"}
                ):
                    pass
            assert counted == [path]
            counted.clear()

        def refuse(*_: object) -> None:
            raise too_many("requests of this address", 5.0)

        monkeypatch.setattr(Addresses, "require", refuse)
        for method, path, headers, _ in early:
            is_probe = method == "GET" and path in PROBES
            code = HTTPStatus.OK if is_probe else HTTPStatus.TOO_MANY_REQUESTS
            assert (await http.request(method, path, headers=headers)).status_code == code
        answer = await http.get("/nowhere", headers={"Origin": ours})
        assert answer.headers["access-control-allow-origin"] == ours


async def status(http: httpx.AsyncClient, path: str) -> int:
    return (await http.get(path)).status_code


async def test_readiness_probes_share_one_check_per_second() -> None:
    now, looks = 100.0, list[asyncio.Future[bool]]()

    def look() -> asyncio.Future[bool]:
        looks.append(asyncio.get_running_loop().create_future())
        return looks[-1]

    readiness = Readiness(look, clock=lambda: now)
    asking = [asyncio.create_task(readiness.is_given()) for _ in range(100)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    now += 5.0  # it takes long, and no second one begins
    asking += [asyncio.create_task(readiness.is_given()) for _ in range(100)]
    await asyncio.sleep(0)
    looks[0].set_result(False)
    assert await asyncio.gather(*asking[1:]) == [False] * 199
    assert len(looks) == 1
    again = asyncio.create_task(readiness.is_given())
    await asyncio.sleep(0)
    looks[1].set_result(True)
    assert await again
    now += CHECK_SECONDS / 2
    assert await readiness.is_given()
    assert len(looks) == 2


async def test_probes_query_the_database_once_per_second(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    is_ready = Database.is_ready

    async def counted(database: Database) -> bool:
        nonlocal asked
        asked += 1
        return await is_ready(database)

    monkeypatch.setattr(Database, "is_ready", counted)
    began = time.monotonic()
    async with http_client(world.url) as http:
        assert {await status(http, "/readyz") for _ in range(20)} == {HTTPStatus.OK}
    assert asked <= 1 + (time.monotonic() - began) / CHECK_SECONDS


async def test_connections_of_one_address_are_limited(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    settings = msgspec.structs.replace(settings, connections_per_address=3)
    async with World(settings, workers=1) as world:
        who = await world.user("Ada")
        first = await world.connect(who)
        for _ in range(2):
            await Client(world.url, None).open()
        for _ in range(3):
            with pytest.raises(InvalidStatus, match="429"):
                await Client(world.url, who.token).open()
        assert logged(caplog) == [f"too many connections from address 127.0.0.1; refusing further ones{OF_A_PROXY}"]
        await first.close()
        async with asyncio.timeout(5):
            while True:
                try:
                    await (await world.connect(who)).call(client.Ping())
                except InvalidStatus:
                    await asyncio.sleep(0.01)  # the server notices soon that the first is gone
                else:
                    break


def test_address_is_logged_once_per_limit_that_it_exceeds(caplog: pytest.LogCaptureFixture) -> None:
    """Several places refuse its connections, and it may have been logged for another limit."""
    address = "198.51.100.1"
    sockets = Sockets(most=1_000, per_address=1, proxies=Proxies.read(""), frames=Pace.of(1.0), outbox_bytes=1 << 20)
    addresses = Addresses(0.25, connections=1, too_many=sockets.too_many)
    request = HTTPConnection({"type": "http", "client": (address, 1), "headers": []})

    def refusals(do: Callable[[], object]) -> int:
        count = 0
        for _ in range(20):
            try:
                do()
            except Refused:
                count += 1
        return count

    assert refusals(lambda: addresses.require(request)) > 1
    assert refusals(lambda: addresses.connect(request)) == 19
    assert refusals(lambda: sockets.arrive(address)) > 1
    sockets.flooded(address)
    assert [text.partition(address)[0] for text in logged(caplog)] == [
        "too many requests from address ", "too many connections from address ", "closing a connection from address ",
    ]  # fmt: skip


async def test_concurrent_connections_of_one_user_are_limited(settings: Settings) -> None:
    async with World(settings, workers=1) as world:
        who, other = await world.users("Ada", "Charles")

        async def come() -> Client:
            one = Client(world.url, None)
            await one.open()
            return one

        async def introduce(one: Client) -> None:
            await one.socket.send(encode(client.Authenticate(token=who.token)).decode())

        async def stays(one: Client) -> bool:
            try:
                await one.settled()
            except ConnectionError:
                assert await one.closed() == CloseCode.TOO_MANY_CONNECTIONS
                return False
            return True

        # A few statements authenticate all of them, so that they begin in the same turn of the loop.
        everyone = [await come() for _ in range(60)]
        await asyncio.gather(*map(introduce, everyone))
        staying = [
            one for one, is_in in zip(everyone, await asyncio.gather(*map(stays, everyone)), strict=True) if is_in
        ]
        assert len(staying) == settings.connections_per_user
        await (await world.connect(other)).call(client.Ping())
        # Refused connections take no place, and closed ones return theirs.
        await staying[0].close()
        roster = world.workers[0].app.connections
        await until(lambda: len(roster) == settings.connections_per_user)  # including Charles
        again = []
        for _ in range(2):
            everyone.append(await come())
            await introduce(everyone[-1])
            again.append(await stays(everyone[-1]))
        assert again == [True, False]
        await asyncio.gather(*(one.close() for one in everyone))


async def test_user_who_reconnects_too_often_is_refused_with_a_delay(settings: Settings) -> None:
    """Twice the maximum of open connections may begin, however soon they end."""
    async with World(msgspec.structs.replace(settings, connections_per_user=1), workers=1) as world:
        ada, charles = await world.users("Ada", "Charles")
        app = world.workers[0].app
        now = time.monotonic_ns()
        app._connects._clock = lambda: now  # noqa: SLF001
        for _ in range(2):
            await (await world.connect(ada)).close()
            await until(lambda: len(app.connections) == 0)
        with pytest.raises(InvalidStatus) as told:
            await world.connect(ada)
        assert told.value.response.status_code == HTTPStatus.TOO_MANY_REQUESTS
        error = msgspec.json.decode(told.value.response.body or b"", type=Error)
        assert (error.code, bool(error.retry_after_ms)) == (ErrorCode.RATE_LIMITED, True)
        await (await world.connect(charles)).call(client.Ping())
        # Clients that authenticate with a frame get the same refusal in a frame, with a delay.
        late = Client(world.url, None)
        await late.open()
        answer = await late.raw(encode(client.Authenticate(token=ada.token)).decode())
        assert (answer.code, answer.retry_after_ms) == (error.code, error.retry_after_ms)
        assert await late.closed() == CloseCode.GOING_AWAY
        assert len(app.admission) == 0
        now += (error.retry_after_ms or 0) * 1_000_000
        await (await world.connect(ada)).call(client.Ping())


@pytest.mark.long
async def test_answer_may_be_larger_than_the_outbox(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, outbox_bytes=32 * 1024, heartbeat_seconds=1.2)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        channel = await world.channel(ada, is_public=True)
        for _ in range(100):
            await sent(ada, channel, "x" * 8_000)
        charles = await world.user("Charles")
        reader = await world.connect(charles)
        await reader.call(client.Join(conversation_id=channel))
        pages = await asyncio.gather(
            *(reader.call(client.History(conversation_id=channel, limit=100), server.MessagePage) for _ in range(5))
        )
        assert all(len(page.messages) == 100 for page in pages)
        await sent(ada, channel, "And on it goes")
        await reader.event(server.MessageSent, lambda event: event.message.content == "And on it goes")
        # A client that does not read gets one such answer at a time, and is closed when it is silent.
        (held,) = world.workers[0].app.hub.online_users.sockets(charles.id)
        reader.socket.transport.pause_reading()
        for number in range(10):
            frame = client.History(id=number, conversation_id=channel, limit=100)
            await reader.socket.send(encode(frame).decode())
        most = 0
        async with asyncio.timeout(20):
            while not held.socket.transport.is_closing():  # type: ignore[attr-defined]
                most = max(most, held.socket.transport.get_write_buffer_size())  # type: ignore[attr-defined]
                await asyncio.sleep(0.02)
        assert most < 2_000_000
        reader.socket.transport.resume_reading()
        assert await reader.closed() in {CloseCode.SILENT, 1006}
        await ada.call(message(channel), server.Sent)


def hold_little(reader: Client) -> None:
    """Limit the kernel's buffer for bytes that a client does not read. Some kernels hold 30 MB."""
    reader.socket.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)


async def test_unread_large_answer_closes_the_connection(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is closed even if it answers pings, since it does not read."""
    monkeypatch.setattr(websocket, "STALL_SECONDS", 0.3)
    settings = msgspec.structs.replace(settings, outbox_bytes=32 * 1024)
    async with World(settings, workers=1) as world:
        ada = await world.user("Ada")
        reader = await world.connect(ada)
        channel = await world.channel(reader)
        for _ in range(100):
            await sent(reader, channel, "x" * 9_000)
        (held,) = world.workers[0].app.hub.online_users.sockets(ada.id)
        transport = held.socket.transport  # type: ignore[attr-defined]
        await reader.call(client.History(conversation_id=channel, limit=100))
        await until(lambda: held.socket._stalled is None)  # type: ignore[attr-defined]  # noqa: SLF001
        assert not transport.is_closing(), "a client that reads is not closed"
        hold_little(reader)
        reader.socket.transport.pause_reading()
        for number in range(15):
            frame = client.History(id=number, conversation_id=channel, limit=100)
            await reader.socket.send(encode(frame).decode())
        async with asyncio.timeout(20):
            while not transport.is_closing():
                await reader.socket.pong()
                await asyncio.sleep(0.02)
        reader.socket.transport.resume_reading()


async def test_each_large_answer_has_its_own_deadline(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has read a small answer is not closed because a larger one follows."""
    looks: list[tuple[int, int]] = []

    def look(self: websocket.WebSocket, before: int) -> None:
        self._stalled = None
        looks.append((self.transport.get_write_buffer_size(), before))

    monkeypatch.setattr(websocket, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(websocket.WebSocket, "_is_stalled", look)
    settings = msgspec.structs.replace(settings, outbox_bytes=32 * 1024)
    async with World(settings, workers=1) as world:
        reader = await world.connect(await world.user("Ada"))
        channel = await world.channel(reader)
        for _ in range(100):
            await sent(reader, channel, "x" * 9_000)
        await reader.call(client.History(conversation_id=channel, limit=2))
        hold_little(reader)
        reader.socket.transport.pause_reading()
        for number in range(10):
            frame = client.History(id=number, conversation_id=channel, limit=100)
            await reader.socket.send(encode(frame).decode())
        await until(lambda: any(waiting for waiting, _ in looks))
        reader.socket.transport.resume_reading()
    assert all(waiting <= before for waiting, before in looks)


async def test_frame_takes_tokens_by_its_cost(settings: Settings) -> None:
    """Reads have a rate of 10 and a burst of 40.

    Of frames that take 21, one fits; of frames that read little, nearly 40.
    """
    settings = msgspec.structs.replace(settings, read_rate=10.0)
    async with World(settings, workers=1) as world:
        about = await world.channel(await world.connect(await world.user("Charles")))
        for frames, fewest, most in (
            ([client.ListThreads()], 1, 3),
            ([client.GetBadge()], 1, 3),
            ([client.Resume(epoch="", versions={}, user_version=0)], 1, 3),
            ([client.Watch(user_ids=[UserId(uuid7()) for _ in range(500)])], 1, 3),
            ([client.ListStars(limit=100), client.ListRelationships(limit=100)], 3, 5),
            ([client.History(conversation_id=about, limit=100)], 10, 14),
            ([client.Watch(user_ids=[UserId(uuid7())]), client.ListStars(limit=1), client.GetMe()], 30, 50),
        ):
            asker = await world.connect(await world.user("Ada"))
            wanted = [frames[n % len(frames)] for n in range(60)]
            answers = [await asker.ask(msgspec.structs.replace(frame)) for frame in wanted]
            answered = [one for one in answers if not isinstance(one, Error) or one.code is ErrorCode.NOT_FOUND]
            late = [one for one in answers if isinstance(one, Error) and one.code is not ErrorCode.NOT_FOUND]
            assert fewest <= len(answered) <= most, frames
            assert {one.code for one in late} == {ErrorCode.RATE_LIMITED}
            assert all(one.retry_after_ms for one in late)
            assert asker.ready.limits.further_tokens == {
                "create_group": 20, "add_participants": 20, "invite": 20,
                "list_threads": 20, "watch": 100, "get_users": 20, "resume": 20, "get_badge": 20,
                "list_conversations": 10, "list_relationships": 10, "list_stars": 10, "why": 10,
                "send": 10, "edit": 10, "schedule": 10, "forward": 10,
                "history": 3, "list_participants": 3, "list_replies": 3, "list_reports": 3, "list_audit": 3,
                "list_pins": 3, "list_edits": 3,
                "list_drafts": 3, "list_scheduled": 3, "list_invitations": 3,
            }  # fmt: skip


def tag(frame: Any) -> str:
    return str(type(frame).__struct_config__.tag)


async def test_page_has_a_maximum_size_in_bytes(world: World) -> None:
    """The next pages contain the rest, in order, for every kind of list."""
    people = await world.users("Ada", "Charles")
    ada, charles = [await world.connect(who) for who in people]
    about = await world.group(ada, people[1])
    root = await sent(charles, about, "Root")
    ids = [await sent(ada, about, f"engine <@{people[1].id}> " + "😀" * 9_900, parent_message_id=root,
                      also_in_conversation=True) for _ in range(40)]  # fmt: skip
    await world.indexed()
    for message_id in ids:
        await charles.call(client.Star(conversation_id=about, message_id=message_id))

    async def walked(frame: Any, **asked: Any) -> list[MessageId]:
        """Return the ids on a page and on the next ones, in order."""
        answer = await charles.ask(msgspec.structs.replace(frame, id=None, limit=100, **asked))
        assert len(encode(answer)) < MAX_PAGE_BYTES + 100_000
        assert isinstance(answer, server.Reply)
        page: Any = answer.result
        if isinstance(page, server.MessagePage):
            found = [one.id for one in page.messages]
            if isinstance(frame, client.ListReplies):
                before: dict[str, Any] = {"before_order": page.messages[0].thread_order}
            else:
                before = {"before": found[0]}
            if page.has_before and "after" not in asked:
                return await walked(frame, **before) + found
            return found + await walked(frame, after=found[-1]) if page.has_after and "after" in asked else found
        rows = getattr(page, {"message_list": "messages", "search_page": "hits"}.get(tag(page), "entries"))
        found = [getattr(row, "message", row).id for row in rows]
        return found if page.after is None else found + await walked(frame, after=page.after)

    history = client.History(conversation_id=about)
    assert await walked(history) == [root, *ids]
    assert await walked(history, after=root) == ids
    around = await charles.call(client.History(conversation_id=about, around=ids[20], limit=100), server.MessagePage)
    there = [one.id for one in around.messages]
    assert ids[20] in there
    assert there == ids[ids.index(there[0]) : ids.index(there[-1]) + 1]
    assert around.has_before
    assert around.has_after
    assert await walked(client.ListReplies(conversation_id=about, message_id=root)) == ids
    for frame in (client.ListStars(), client.Search(text="engine"), client.ListFeed()):
        assert await walked(frame) == ids[::-1], frame
    assert set(await walked(client.Search(text="engine", order="relevance"))) == set(ids)


async def test_large_answer_takes_tokens_by_its_size(settings: Settings) -> None:
    """Reads have a rate of 10 and a burst of 40. A page of 1 MB and thirty small ones use it up, also over HTTP."""
    settings = msgspec.structs.replace(settings, read_rate=10.0)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        small, large = await world.channel(ada, is_public=True), await world.channel(ada, is_public=True)
        for number in range(40):
            await sent(ada, large, "😀" * MAX_CONTENT)
            await sent(ada, small, f"Number {number}")
        for is_http in (False, True):
            who = await world.user("Charles")
            reader = await world.connect(who)
            await reader.call(client.Join(conversation_id=small))
            await reader.call(client.Join(conversation_id=large))

            async def ask(frame: client.Frame, *, over_http: bool = is_http) -> int | None:
                if not over_http:
                    answer = await reader.ask(frame)  # noqa: B023 - called in this iteration
                    return answer.retry_after_ms if isinstance(answer, Error) else None
                async with http_client(world.url) as http:
                    bearer = {"authorization": f"Bearer {who.token}"}  # noqa: B023 - as above
                    response = await http.post("/v1/call", content=encode(frame), headers=bearer)
                return response.json().get("retry_after_ms")  # type: ignore[no-any-return]

            began = time.monotonic()
            for _ in range(30):
                assert await ask(client.History(conversation_id=small, limit=33)) is None
            assert await ask(client.History(conversation_id=large, limit=100)) is None, "the answer is returned"
            wait = await ask(client.GetMe()) or 0
            refilled = 1_000 * (time.monotonic() - began)  # on a busy machine, more tokens refill meanwhile
            assert wait + refilled > 2_000
            assert await ask(client.SetDraft(conversation_id=small, content="I thi")) is None, (
                "writes have their own tokens"
            )


@pytest.mark.parametrize("size", [10, MAX_CONTENT])
async def test_socket_is_not_read_while_many_of_its_frames_wait(world: World, size: int) -> None:
    ada = await world.user("Ada")
    one = await world.connect(ada)
    about = await world.channel(one)
    (there,) = world.workers[0].app.hub.online_users.sockets(ada.id)
    assert isinstance(there, Connection)
    frames = [message(about, "x" * size) for _ in range(MAX_INBOX + 1)]
    async with world.db.transaction():
        await conversations.lock(world.db, about)
        count = 0
        while not there.socket.read_paused:
            await one.socket.send(encode(frames[count]).decode())
            # One frame is being handled, and the others wait.
            await until(lambda: len(there._inbox) == count and bool(there._worker))  # noqa: B023, SLF001
            count += 1
        if size == MAX_CONTENT:
            assert MAX_FRAME_BYTES <= there._inbox_bytes < MAX_FRAME_BYTES + 2 * MAX_CONTENT  # noqa: SLF001
        else:
            assert len(there._inbox) == MAX_INBOX  # noqa: SLF001
    await one.call(client.Ping())
    await received_message(one, frames[count - 1].message_id)


def test_bytes_of_unanswered_requests_are_limited_per_address_and_in_total() -> None:
    sockets = Sockets(
        most=1_000, per_address=1_000, proxies=Proxies.read(""), frames=Pace.of(1.0), outbox_bytes=1 << 20
    )
    left = UNREAD_BYTES
    for address in map(str, range(9)):
        sockets.hold(address, left // CLIENT_SHARE_DIVISOR - 1)
        with pytest.raises(Refused, match="unanswered requests"):
            sockets.hold(address, 2)
        sockets.hold(address, 1)
        left -= left // CLIENT_SHARE_DIVISOR
    # With nine addresses at their limits, the largest frame of another one still fits.
    sockets.hold("another", MAX_FRAME_BYTES)
    for number in range(1_000):
        with contextlib.suppress(Refused):
            sockets.hold(f"further {number}", 10_000)
    assert sockets.unread.taken <= UNREAD_BYTES
    sockets.release("0", UNREAD_BYTES // CLIENT_SHARE_DIVISOR)
    sockets.hold("0", MAX_FRAME_BYTES)


async def test_user_can_begin_three_exports_and_no_fourth(world: World) -> None:
    headers = {"Authorization": f"Bearer {(await world.user('Ada')).token}"}
    others = {"Authorization": f"Bearer {(await world.user('Charles')).token}"}
    async with http_client(world.url) as http:
        answers = [await http.get("/v1/auth/export", headers=headers) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 0 < int(answers[-1].headers["retry-after"]) <= 60
        assert (await http.get("/v1/auth/export", headers=others)).status_code == 200


def test_full_buckets_are_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "SWEEP_AT", 10)
    times = itertools.count(step=10**9)
    allowance: TokenBuckets[int] = TokenBuckets("frames", rate=1.0, burst=2, clock=lambda: next(times))
    for user in range(100):
        assert allowance.take(user) == 0
        assert len(allowance._full_at) <= 11  # noqa: SLF001
