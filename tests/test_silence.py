"""Connections that send nothing or never finish are counted, are closed, and do not block other clients."""

import asyncio
import contextlib
import logging
import re
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import client
from protocol.errors import Refused
from prove.client import Client
from server.core.config import Settings
from server.core.proxies import Proxies
from server.fairness.shared_bound import CLIENT_SHARE_DIVISOR
from server.gateway import http_protocol, websocket
from server.gateway import sockets as sockets_module
from server.gateway.sockets import FREE_BYTES, UNREAD_BYTES, Sockets
from server.gateway.websocket import WebSocket
from server.limits.token_bucket import Pace
from tests.cluster import Cluster
from tests.world import World, http_client, until

PATIENCE = 10.0
SHORT = 0.3
POST = b"POST /v1/call HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer TOKEN\r\nContent-Length: 250000\r\n\r\n"
CHUNKED = b"POST /v1/call HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer TOKEN\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "STALL_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(http_protocol, name, SHORT)


@pytest.fixture
async def alone(settings: Settings) -> AsyncIterator[World]:
    async with World(settings, workers=1) as world:
        yield world


async def dial(world: World, source: str = "127.0.0.1") -> Streams:
    host, _, port = world.url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port), local_addr=(source, 0))


async def with_token(world: World, request: bytes) -> bytes:
    """Return a request of a user with a session, whose body the server reads."""
    return request.replace(b"TOKEN", (await world.user("Ada")).token.encode())


async def received(reader: asyncio.StreamReader) -> bytes:
    """Return all bytes until the connection ends, even if it ends with a reset because of unread bytes."""
    said = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            while more := await reader.read(65_536):
                said += more
    return said


async def drip(streams: Streams, bytes_: bytes) -> None:
    """Keep writing single bytes, so that no deadline between two bytes would end the connection."""
    _, writer = streams
    with contextlib.suppress(ConnectionError):
        while True:
            for one in bytes_:
                writer.write(bytes((one,)))
                await writer.drain()
                await asyncio.sleep(SHORT / 20)


@pytest.mark.parametrize(
    ("begin", "more", "answer"),
    [
        (b"", b"", b""),
        (b"GET / HTTP/1.1\r\nHost:", b"", b"HTTP/1.1 408"),
        (b"GET / HTTP/1.1\r\nHost:", b"x", b"HTTP/1.1 408"),
        (b"", b"\r\n", b""),
        (DONE, b"", b"HTTP/1.1 200"),
        (DONE, b"\r\n", b"HTTP/1.1 200"),
        (DONE + b"GET / HTTP/1.1\r\nHost:", b"x", b"HTTP/1.1 200"),
        (POST, b"", b"HTTP/1.1 408"),
        (POST + b"x" * 1000, b"x", b"HTTP/1.1 408"),
        (CHUNKED, b"1\r\nx\r\n", b"HTTP/1.1 408"),
    ],
    ids=[
        "nothing", "half-header", "dripping-header", "dripping-empty-lines", "idle", "idle-with-empty-lines",
        "idle-with-half-header", "no-body", "dripping-body", "dripping-chunks",
    ],
)  # fmt: skip
async def test_unfinished_request_ends(alone: World, short: None, begin: bytes, more: bytes, answer: bytes) -> None:  # noqa: ARG001
    app = alone.workers[0].app
    alone.workers[0].server.config.timeout_keep_alive = SHORT  # type: ignore[assignment]
    streams = await dial(alone)
    await until(lambda: len(app.sockets) == 1)
    streams[1].write(await with_token(alone, begin))
    dripping = asyncio.create_task(drip(streams, more)) if more else None
    assert (await received(streams[0])).startswith(answer)
    await until(lambda: len(app.sockets) == 0)
    if dripping is not None:
        dripping.cancel()
    streams[1].close()
    assert_nothing_is_kept(app.sockets)


HANDSHAKE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /v1/ws HTTP/1.1\r\nHost: here\r\n" + b"a: b\r\n" * 200,
        b"GET /v1/ws HTTP/1.1\r\nHost: here\r\nCookie: " + b"a" * 9_000 + b"\r\n",
        b"GET /v1/ws?" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: here\r\n",
        b"GET /v1/ws HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n",
        b"POST /v1/call HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n",
        b"GET /v1/ws HTTP/1.0\r\nHost: here\r\nSec-WebSocket-Version: 12\r\n",
    ],
    ids=["200-headers", "long-header", "long-address", "body", "chunks", "wrong-version"],
)
async def test_every_invalid_upgrade_is_answered_and_ends(alone: World, short: None, begin: bytes) -> None:  # noqa: ARG001
    app = alone.workers[0].app
    reader, writer = await dial(alone)
    writer.write(begin + HANDSHAKE)
    assert (await received(reader)).startswith(b"HTTP/1.1 4")
    writer.close()
    await until(lambda: len(app.sockets) == 0)
    assert_nothing_is_kept(app.sockets)


async def test_handshake_without_an_answer_of_the_application_ends(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "HANDSHAKE_SECONDS", SHORT)
    reader, writer = await dial(alone)
    async with alone.db.transaction():
        await alone.db.execute("LOCK TABLE session IN ACCESS EXCLUSIVE MODE")
        token = b"Authorization: Bearer " + b"x" * 43 + b"\r\n"
        writer.write(b"GET /v1/ws HTTP/1.1\r\nHost: here\r\n" + token + HANDSHAKE)
        assert await received(reader) == b""
    writer.close()


async def test_trailers_are_not_headers(alone: World) -> None:
    """A proxy may forward trailers of a client, who could then choose an address or a token."""
    trailer = await with_token(alone, b"Authorization: Bearer TOKEN\r\n\r\n")
    reader, writer = await dial(alone)
    writer.write(
        b"POST /v1/call HTTP/1.1\r\nHost: here\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'f\r\n{"type":"ping"}\r\n0\r\n' + trailer
    )
    assert (await received(reader)).startswith(b"HTTP/1.1 401")
    writer.close()


async def test_no_path_redirects_to_the_host_of_the_request(alone: World) -> None:
    reader, writer = await dial(alone)
    writer.write(b"GET /healthz/ HTTP/1.1\r\nHost: elsewhere.example\r\nConnection: close\r\n\r\n")
    said = await received(reader)
    assert said.startswith(b"HTTP/1.1 404")
    assert b"elsewhere" not in said
    writer.close()


HOSTS = [
    ("1.1", [], 400), ("1.1", ["here", "there"], 400), ("1.1", ["here", "here"], 400), ("1.0", ["here", "there"], 400),
    ("1.1", ["here/there"], 400), ("1.1", ["me@here"], 400), ("1.1", ["here there"], 400), ("1.1", ["here:80:90"], 400),
    ("1.1", ["here#there"], 400), ("1.1", ["[::1"], 400), ("1.1", ["here:port"], 400),
    ("1.1", ["here"], 200), ("1.1", [""], 200), ("1.1", ["here:80"], 200), ("1.1", ["[::1]:80"], 200),
    ("1.1", ["xn--nxasmq6b.example"], 200), ("1.1", ["a_b.example"], 200), ("1.0", [], 200), ("1.0", ["here"], 200),
]  # fmt: skip


async def test_request_needs_exactly_one_valid_host(alone: World) -> None:
    """RFC 9112, section 3.2: a proxy in front may have read another host from the request."""
    for version, hosts, status in HOSTS:
        lines = "".join(f"Host: {host}\r\n" for host in hosts)
        for line, fine in (("GET /healthz", 200), ("GET /v1/ws", 101)):
            if fine == 101 and version == "1.0":
                continue
            shake = HANDSHAKE.decode() if fine == 101 else "\r\n"
            # The first request of a connection, and a later one.
            for before in (b"", DONE) if fine == 200 and version == "1.1" else (b"",):
                reader, writer = await dial(alone)
                if before:
                    writer.write(before)
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(re.findall(rb"content-length: (\d+)", head)[0]))
                writer.write(f"{line} HTTP/{version}\r\n{lines}{shake}".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                writer.close()
                assert head.split()[1] == b"%d" % (fine if status == 200 else status), (version, hosts, line, before)


async def test_unread_answer_ends_connection(alone: World, short: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr("server.http.openapi.document", lambda: {"pad": "x" * 30_000_000})
    # Otherwise uvicorn would end the connection as idle, since it has handed over the whole answer.
    alone.workers[0].server.config.timeout_keep_alive = 3_600
    app = alone.workers[0].app
    reader, writer = await dial(alone)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /v1/openapi.json HTTP/1.1\r\nHost: here\r\n\r\n")
    await until(lambda: len(app.sockets) == 1)
    await until(lambda: len(app.sockets) == 0)
    writer.close()
    assert reader is not None


async def test_silent_sockets_are_limited_per_address(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    settings = msgspec.structs.replace(settings, connections_per_address=3)
    async with World(settings, workers=1) as world:
        app = world.workers[0].app
        silent = [await dial(world, "127.0.0.2") for _ in range(3 + sockets_module.SPARE)]
        await until(lambda: len(app.sockets) == len(silent))
        reader, writer = await dial(world, "127.0.0.2")
        assert (await received(reader)).startswith(b"HTTP/1.1 429")
        assert caplog.text.count("too many connections from address 127.0.0.2") == 1
        writer.close()
        await (await world.connect(await world.user("Ada"))).call(client.Ping())
        for _, one in silent:
            one.close()
        await until(lambda: len(app.sockets) == 1)


async def test_address_of_a_trusted_proxy_has_no_limit(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, connections_per_address=3, trusted_proxies="1")
    async with World(settings, workers=1) as world:
        silent = [await dial(world) for _ in range(40)]
        who = await world.user("Ada")
        one = Client(world.url, who.token, headers={"X-Forwarded-For": "203.0.113.1"})
        await one.open()
        await one.call(client.Ping())
        await one.close()
        for _, writer in silent:
            writer.close()


async def test_requests_behind_a_proxy_count_for_the_forwarded_address(settings: Settings) -> None:
    """Their bytes and connections count from the end of the header to the answer, and not between two requests."""
    settings = msgspec.structs.replace(settings, connections_per_address=3, trusted_proxies="1")
    async with World(settings, workers=1) as world:
        sockets = world.workers[0].app.sockets
        sockets.unread.most = 400_000  # of which one address may use a quarter
        ada, by_mal, by_eve = (await with_token(world, POST)).partition(b"Content")[0], b"203.0.113.9", b"198.51.100.7"

        async def ask(client_ip: bytes, sent: int, of: int) -> Streams:
            streams = await dial(world)
            head = ada + b"X-Forwarded-For: " + client_ip + b"\r\nContent-Length: %d\r\n\r\n" % of
            streams[1].write(head + b'{"type":"ping"}'.ljust(sent))
            return streams

        open_ = [await ask(by_mal, 99_000, 100_000)]
        await until(lambda: sockets.unread.taken == 99_000 - FREE_BYTES)
        too_large = await ask(by_mal, 10_000, 100_000)
        assert (await received(too_large[0])).startswith(b"HTTP/1.1 503")
        too_large[1].close()
        done = await ask(by_eve, 60_000, 60_000)
        assert (await done[0].readline()).startswith(b"HTTP/1.1 200")
        await until(lambda: sockets._of_address == {sockets_module.PROXY: 1, by_mal.decode(): 1})  # noqa: SLF001

        open_ += [await ask(by_mal, 50, 100_000) for _ in range(3 + sockets_module.SPARE - 1)]
        await until(lambda: sockets._of_address[by_mal.decode()] == len(open_))  # noqa: SLF001
        too_many = await ask(by_mal, 0, 100_000)
        assert (await received(too_many[0])).startswith(b"HTTP/1.1 429")
        eve_token, of_eve = (await world.user("Eve")).token, {"X-Forwarded-For": by_eve.decode()}
        async with Client(world.url, eve_token, headers=of_eve) as eve:
            await eve.call(client.Ping())
            assert sockets._of_address[by_eve.decode()] == 1  # noqa: SLF001
        for _, writer in (*open_, done, too_many):
            writer.transport.abort()
        await until(lambda: len(sockets) == 0)
        assert_nothing_is_kept(sockets)


async def test_unfinished_bodies_are_bounded(alone: World) -> None:
    """400 requests of 250 KB would be 100 MB."""
    app = alone.workers[0].app
    held: list[Streams] = []
    request = await with_token(alone, POST)
    for _ in range(60):
        held.append(await dial(alone, "127.0.0.2"))
        held[-1][1].write(request + b"x" * 249_000)
    # Requests over the limit are refused, and the others continue.
    async with asyncio.timeout(PATIENCE):
        while app.sockets.unread.taken < UNREAD_BYTES // CLIENT_SHARE_DIVISOR * 3 // 4:
            await asyncio.sleep(0.01)
    assert app.sockets.unread.taken <= UNREAD_BYTES // CLIENT_SHARE_DIVISOR
    answers = [asyncio.create_task(reader.read(12)) for reader, _ in held]
    async with asyncio.timeout(PATIENCE):
        while not any(task.done() and not task.exception() and task.result().endswith(b"503") for task in answers):
            await asyncio.sleep(0.01)
    async with http_client(alone.url) as http:
        headers = {"Authorization": f"Bearer {(await alone.user('Charles')).token}"}
        answer = await http.post("/v1/call", content=b'{"type":"ping"}' + b" " * 200_000, headers=headers)
        assert answer.status_code == 200
    for _, writer in held:
        writer.transport.abort()
    await asyncio.gather(*answers, return_exceptions=True)
    await until(lambda: len(app.sockets) <= 1)
    assert_nothing_is_kept(app.sockets)


async def test_body_that_ends_too_early_is_not_logged_as_an_error(
    alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    _, writer = await dial(alone)
    writer.write(await with_token(alone, POST) + b"x" * (FREE_BYTES + 500))
    app = alone.workers[0].app
    await until(lambda: app.sockets.unread.taken == 500)
    writer.close()
    await until(lambda: len(app.sockets) == 0 and not alone.workers[0].server.server_state.tasks)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    "endless",
    [
        b"GET / HTTP/1.1\r\nx: " + b"x" * 8_000_000,
        b"GET /" + b"x" * 8_000_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1_000_000,
        CHUNKED + b"1\r\nx\r\n" * 1_000_000,
        CHUNKED + b"0\r\n" + b"x: y\r\n" * 1_000_000,
        DONE * 100_000,
    ],
    ids=["long-header", "long-path", "many-headers", "tiny-chunks", "many-trailers", "pipelined-requests"],
)
async def test_endless_requests_are_cut_off(alone: World, endless: bytes) -> None:
    sockets = alone.workers[0].app.sockets
    _, writer = await dial(alone)
    await until(lambda: len(sockets) == 1)
    with contextlib.suppress(ConnectionError):
        writer.write(await with_token(alone, endless))
    await until(lambda: len(sockets) == 0)
    writer.transport.abort()
    assert_nothing_is_kept(sockets)


LARGE = b"x" * 3_000_000
MORE = b"Content-Length: %d\r\n\r\n" % len(LARGE) + LARGE


REFUSED = [
    (b"POST /v1/call HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer TOKEN\r\n" + MORE, 422),
    (CHUNKED + b"%x\r\n" % len(LARGE) + LARGE + b"\r\n0\r\n\r\n", 422),
    (b"POST /v1/call HTTP/1.1\r\nHost: here\r\nConnection: close\r\n" + MORE, 422),
    (b"POST /v1/call HTTP/1.0\r\nHost: here\r\n" + MORE, 422),
    (b"POST /healthz HTTP/1.1\r\nHost: here\r\n" + MORE, 405),
    (b"POST /nowhere HTTP/1.1\r\nHost: here\r\nConnection: close\r\n" + MORE, 404),
    (b"POST /v1/auth/login HTTP/1.0\r\nHost: here\r\nOrigin: https://evil.example\r\n" + MORE, 403),
    (b"GET / HTTP/1.1\r\nx: " + LARGE, 431),
    (b"not HTTP at all\r\n" + LARGE, 400),
]


async def test_client_that_sends_before_it_reads_receives_the_refusal(alone: World) -> None:
    host, _, port = alone.url.removeprefix("http://").rpartition(":")
    sockets = alone.workers[0].app.sockets
    token = (await alone.user("Ada")).token.encode()

    def asked(request: bytes) -> bytes:
        with socket.create_connection((host, int(port)), PATIENCE) as one:
            one.sendall(request.replace(b"TOKEN", token))
            said = b""
            while more := one.recv(65_536):
                said += more
            return said

    for request, status in REFUSED:
        said = await asyncio.to_thread(asked, request)
        assert said.startswith(b"HTTP/1.1 %d " % status), said
        assert said.count(b"HTTP/1.1 ") == 1, said
        await until(lambda: len(sockets) == 0)
        assert_nothing_is_kept(sockets)


async def test_refused_client_that_stays_is_closed(alone: World, short: None) -> None:  # noqa: ARG001
    sockets = alone.workers[0].app.sockets
    for more in (b"", b"x"):
        streams = await dial(alone)
        streams[1].write(b"GET / HTTP/1.1\r\nx: " + b"x" * 70_000)
        assert (await streams[0].read(12)) == b"HTTP/1.1 431"
        assert len(sockets) == len(sockets._waiting) == 1  # noqa: SLF001
        dripping = asyncio.create_task(drip(streams, more)) if more else None
        await received(streams[0])
        await until(lambda: len(sockets) == 0)
        if dripping is not None:
            dripping.cancel()
        streams[1].close()
        assert_nothing_is_kept(sockets)


# ------------------------------------------------------------------------------------------------ counting


def assert_nothing_is_kept(sockets: Sockets) -> None:
    kept = (sockets.unread.taken, sockets.unread._held, sockets._waiting)  # noqa: SLF001
    of_users = (sockets.unread_of_users.taken, sockets.unread_of_users._held)  # noqa: SLF001
    assert (len(sockets), sockets._of_address, *kept, *of_users) == (0, {}, 0, {}, {}, 0, {})  # noqa: SLF001


async def test_addresses_take_turns_in_opening_connections() -> None:
    sockets = counting(most=1_000)
    begun: list[str] = []
    for key in ["a"] * 100 + ["b"] * 10 + ["c"]:
        sockets.begin(key, partial(begun.append, key))
    for _ in range(4):
        await asyncio.sleep(0)
    assert begun == ["a", "b", "c", "a"]
    sockets.begin("d", partial(begun.append, "d"))
    await until(lambda: len(begun) == 112)
    assert "d" in begun[:8]
    assert begun[:21].count("b") >= 9
    assert not sockets._beginning  # noqa: SLF001


def counting(*, most: int, per_address: int = 100) -> Sockets:
    return Sockets(most=most, per_address=per_address, proxies=Proxies(), frames=Pace.of(1.0), outbox_bytes=1_048_576)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["wait", "work", "leave"])), max_size=200))
def test_number_of_connections_never_exceeds_its_limits(steps: list[tuple[int, str]]) -> None:
    sockets = counting(most=8)
    here: dict[object, str] = {}

    def closing(one: object) -> None:
        sockets.leave(here.pop(one))

    for address, then in steps:
        one = object()
        try:
            here[one] = sockets.arrive(f"198.51.100.{address}")
        except Refused:
            assert len(here) == 8 or list(here.values()).count(f"198.51.100.{address}") == 6
            continue
        if then == "wait":
            sockets.waits(one, lambda one=one: closing(one))  # type: ignore[misc]
        elif then == "leave":
            closing(one)
        assert len(sockets) == len(here) <= 8
        assert max([*map(list(here.values()).count, here.values()), 0]) <= 6
    for one in list(here):
        sockets.works(one)
        closing(one)
    assert_nothing_is_kept(sockets)


def test_longest_waiting_connection_is_evicted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sockets = counting(most=4)
    closed: list[int] = []
    for number in range(4):
        sockets.arrive(f"198.51.100.{number}")
        sockets.waits(number, lambda number=number: closed.append(number))  # type: ignore[misc]
    sockets.works(0)
    for number in range(3):
        sockets.arrive(f"203.0.113.{number}")
    assert closed == [1, 2, 3]
    with pytest.raises(Refused, match="too many connections"):
        sockets.arrive("203.0.113.9")
    assert sockets.shed == 4
    assert len(caplog.records) == 1


# ---------------------------------------------------------------------------------------- a real worker process

DESCRIPTORS = 700


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Give child processes few descriptors: their hard limit is this process's temporary soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8_000:
        pytest.fail("this test needs 8,000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.more
@pytest.mark.usefixtures("few_descriptors")
async def test_three_thousand_silent_sockets_do_not_block_other_clients(settings: Settings, tmp_path: Path) -> None:
    cluster = Cluster(settings, tmp_path, 1)
    (url,) = cluster.urls()
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with World(settings, workers=0) as world:
        who = await world.user("Ada")
        try:
            worker = cluster.workers[0]
            worker.start()
            assert worker.process is not None
            process = worker.process.pid
            # This must be set before the worker reads its limits.
            resource.prlimit(process, resource.RLIMIT_NOFILE, (DESCRIPTORS // 2, DESCRIPTORS))
            await asyncio.to_thread(worker.wait_ready)
            assert resource.prlimit(process, resource.RLIMIT_NOFILE) == (DESCRIPTORS, DESCRIPTORS)
            async with Client(url, who.token) as bystander:
                silent: list[asyncio.StreamWriter] = []

                async def come(number: int) -> None:
                    source = f"127.0.1.{number % 200}"
                    with contextlib.suppress(OSError):
                        silent.append((await asyncio.open_connection(host, int(port), local_addr=(source, 0)))[1])

                for start in range(0, 3_000, 250):
                    await asyncio.gather(*(come(number) for number in range(start, start + 250)))
                    await bystander.call(client.Ping())
                assert len(silent) > DESCRIPTORS
                before = cpu_ticks(process)
                # Another client can still connect, and requests still have the resources that they need.
                async with Client(url, who.token) as newcomer:
                    await newcomer.settled()
                async with http_client(url) as http:
                    assert (await http.get("/readyz")).status_code == 200
                    page = (await http.get("/metrics")).text
                shed = [line for line in page.splitlines() if line.startswith("openchat_sockets_shed_total")]
                assert float(shed[0].split()[-1]) > 0
                for _ in range(20):
                    await bystander.call(client.Ping())
                    await asyncio.sleep(0.05)
                assert cpu_ticks(process) - before < 100, "the worker uses too much CPU time"

                async def sockets() -> float:
                    async with http_client(url) as http:
                        page = (await http.get("/metrics")).text
                    (line,) = [one for one in page.splitlines() if one.startswith("openchat_sockets{")]
                    return float(line.split()[-1])

                async with asyncio.timeout(http_protocol.HEAD_SECONDS + 10):
                    while await sockets() > 5:
                        await asyncio.sleep(0.2)
                await bystander.call(client.Ping())
                for writer in silent:
                    writer.close()
        finally:
            cluster.stop()


def cpu_ticks(process: int) -> int:
    """Return the CPU time of a process, in hundredths of a second."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_refused_upgrade_leaves_no_deadline(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of a handshake would keep the transport for half a minute."""
    made: list[WebSocket] = []
    begin = WebSocket.__init__

    def noted(self: WebSocket, *args: Any, **fields: Any) -> None:
        begin(self, *args, **fields)
        made.append(self)

    monkeypatch.setattr(WebSocket, "__init__", noted)
    reader, writer = await dial(alone)
    writer.write(b"GET /v1/ws HTTP/1.1\r\nHost: here\r\n" + b"a: " + b"b" * 9_000 + b"\r\n" + HANDSHAKE)
    assert (await received(reader)).startswith(b"HTTP/1.1 4")
    writer.close()
    await until(lambda: len(alone.workers[0].app.sockets) == 0)
    assert [one._deadline for one in made] == [None]  # noqa: SLF001
