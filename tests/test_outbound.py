"""Outgoing HTTP to URLs that users name: no private addresses, bounded time and size; and link previews."""

import asyncio
import contextlib
import gc
import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h11
import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import client, server
from protocol.values import LinkPreview
from server.auth import passwords
from server.core.config import Settings
from server.core.stopwatch import Stopwatch
from server.domain import markdown
from server.fairness.loop_time import LoopTime
from server.jobs import previews, push_posts, resolver, safe_http
from server.jobs.push_drops import Drops
from server.jobs.push_hosts import HOST_USERS, Host
from server.jobs.push_posts import SLOW_SLOTS, Failed, Posts, Push
from server.jobs.safe_http import SafeHttp, Unreachable
from tests.browser import post_to, prepared_push
from tests.world import Room, World, http_client, message, sent, until

PAGE = """<html><head><title>The Engine &amp; its notes</title>
<meta property="og:description" content="On the  Analytical
Engine"><meta property="og:image" content="/engine.png"></head><body><title>no</title></body></html>"""


class FakeSite:
    """A web server that answers with the bytes that a test gives it."""

    def __init__(self) -> None:
        self.answer: Callable[[str], bytes | Awaitable[bytes]] = lambda _: page(PAGE)
        self.asked: list[str] = []
        self.url = ""
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        answer = self.answer(head.split(" ")[1])
        try:
            writer.write(answer if isinstance(answer, bytes) else await answer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def page(body: str, kind: str = "text/html; charset=utf-8") -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body.encode())}\r\n\r\n{body}".encode()


@pytest.fixture
async def site() -> AsyncIterator[FakeSite]:
    site = FakeSite()
    await site.start()
    yield site
    await site.stop()


@pytest.fixture
async def restricted() -> AsyncIterator[SafeHttp]:
    one = SafeHttp(to_private=False)
    yield one
    await one.close()


@pytest.fixture
async def unrestricted() -> AsyncIterator[SafeHttp]:
    one = SafeHttp(to_private=True)
    yield one
    await one.close()


NEAR = [
    "http://127.0.0.1/", "http://localhost/", "http://127.1/", "http://2130706433/", "http://0x7f.0.0.1/", "http://[::1]/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:10.0.0.1]/", "http://10.0.0.1/", "http://172.16.0.1/",
    "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://0.0.0.0/",
    "http://[fe80::1]/", "http://[fc00::1]/", "http://[2002:7f00:1::]/", "http://224.0.0.1/", "http://240.0.0.1/",
    "http://[::]/", "http://[64:ff9b::7f00:1]/",
]  # fmt: skip
NOWHERE = ["ftp://example.org/", "file:///etc/passwd", "http:///x", "http://user@example.org/", "gopher://x/", "x", ""]


@pytest.mark.parametrize("url", [*NEAR, *NOWHERE])
async def test_private_addresses_are_never_connected_to(
    restricted: SafeHttp, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(*_: object, **__: object) -> None:
        raise OSError("sent")

    # The stub prevents connections to these addresses if the check is broken.
    monkeypatch.setattr(await restricted.transport(), "handle_async_request", send)
    with pytest.raises(Unreachable, match="not a public one" if url in NEAR else "not an address on the web"):
        await restricted.get(url, most=10)


async def test_certificates_are_read_once_and_outside_the_event_loop(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    read = httpx.create_ssl_context

    def noted(**options: Any) -> ssl.SSLContext:
        threads.append(threading.current_thread())
        return read(**options)

    monkeypatch.setattr(httpx, "create_ssl_context", noted)
    await asyncio.gather(*(unrestricted.get(site.url, most=10) for _ in range(5)))
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_addresses_that_reach_private_networks_are_not_public() -> None:
    """Also addresses that embed another address, and deprecated ranges. The test only parses them."""
    near = [
        "127.0.0.1", "0.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "192.168.0.1", "224.0.0.1", "240.0.0.1",
        "::", "::1", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1", "2002:7f00:1::",
        "2002:a00:1::1", "64:ff9b::127.0.0.1", "64:ff9b:1::10.0.0.1", "2001:0:7f00:1::", "2001:db8::1",
        "192.0.0.8", "192.0.0.192", "192.88.99.1", "::ffff:192.0.0.192", "2002:c000:c0::", "3fff::1", "5f00::1",
    ]  # fmt: skip
    assert [one for one in near if safe_http._is_public(ipaddress.ip_address(one))] == []  # noqa: SLF001
    far = ["8.8.8.8", "2606:4700:4700::1111", "2002:808:808::1"]
    assert [one for one in far if not safe_http._is_public(ipaddress.ip_address(one))] == []  # noqa: SLF001


async def test_name_that_resolves_to_a_private_address_is_refused(
    restricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(site.url.rsplit(":", 1)[1])
    answers = iter([
        ["93.184.216.34"], ["127.0.0.1"], ["127.0.0.1", "93.184.216.34"], ["93.184.216.34", "127.0.0.1"]
    ])  # fmt: skip

    def resolve(_: str, asked: int, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, asked)) for one in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    asked: list[str] = []

    async def connect(request: object, **_: object) -> None:
        asked.append(str(request.url))  # type: ignore[attr-defined]
        raise OSError

    monkeypatch.setattr(await restricted.transport(), "handle_async_request", connect)  # no network in tests
    for _ in range(4):
        with pytest.raises(Unreachable):
            await restricted.get(f"http://rebinding.example:{port}/", most=10)
    assert asked == [f"http://93.184.216.34:{port}/"], "one private address refuses all addresses of the name"


async def test_answers_leave_no_cookies_objects_or_log_entries(
    unrestricted: SafeHttp, site: FakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def answer(_: str) -> bytes:
        cookies = "".join(f"set-cookie: n{len(site.asked)}.{number}=x\r\n" for number in range(500))
        return f"HTTP/1.1 201 Created\r\n{cookies}content-length: 0\r\n\r\n".encode()

    site.answer = answer

    async def post() -> None:
        assert (await unrestricted.post(f"{site.url}/push", b"x", {"ttl": "60"}, stopwatch=Stopwatch())).status == 201

    await post()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10):
        await post()
    gc.collect()
    assert len(gc.get_objects()) < before + 1_000, "objects of ten answers remain"
    assert "cookie:" not in site.asked[-1]
    assert caplog.records == []


async def test_slow_resolver_does_not_block_the_loop(restricted: SafeHttp, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    asked: list[str] = []

    def resolve(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        answered.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    waiting = [asyncio.create_task(restricted.get(f"http://{number}.example/", most=1)) for number in range(100)]
    try:
        await until(lambda: len(asked) == len(waiting))
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 3) == "done"
    finally:
        answered.set()
    for one in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(one, Unreachable)


class FakeResolver:
    """A resolver. `good` names resolve to this machine, and all others hang until `answered` is set."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, *_: object, **__: object) -> list[object]:
        self.asked.append(host)
        if not host.startswith("good"):
            self.answered.wait()
            raise OSError("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeResolver]:
    names = FakeResolver()
    monkeypatch.setattr(socket, "getaddrinfo", names)
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.5)
    yield names
    names.answered.set()


def posts_by(asker: SafeHttp, drops: Drops) -> Posts:
    async def send(post: Push, stopwatch: Stopwatch) -> None:
        try:
            await asker.post(post.endpoint, post.payload, {}, stopwatch=stopwatch)
        except Unreachable as error:
            raise Failed from error

    return Posts(prepared_push, send, drops)


async def test_names_that_hang_do_not_fail_push_services_that_answer(
    unrestricted: SafeHttp, site: FakeSite, names: FakeResolver
) -> None:
    port = site.url.rsplit(":", 1)[1]
    drops = Drops()
    queue = posts_by(unrestricted, drops)
    silent = 2 * SLOW_SLOTS
    try:
        queue.add(post_to(f"http://good-known:{port}/"))
        queue.start()
        await until(lambda: len(site.asked) == 1)
        for number in range(silent):
            queue.add(post_to(f"http://silent-{number}/"))
        queue.add(post_to(f"http://good-new:{port}/"))
        queue.start()
        await until(lambda: len(names.asked) == 1 + SLOW_SLOTS)
        queue.add(post_to(f"http://good-known:{port}/"))
        queue.start()
        await until(lambda: len(site.asked) == 2)
        assert not drops.counts, "a known host does not wait for names that hang"
        await until(lambda: len(site.asked) == 3 and drops.counts["host_failed"] == silent)
        assert not names.answered.is_set(), "a new host waits for one round of time-outs only"
    finally:
        names.answered.set()
        await queue.close()


async def test_names_that_hang_take_a_bounded_number_of_threads(
    unrestricted: SafeHttp, site: FakeSite, names: FakeResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "MAX_OVERDUE", 8)
    drops = Drops()
    queue = posts_by(unrestricted, drops)
    silent = 2 * SLOW_SLOTS
    try:
        for number in range(silent):
            queue.add(post_to(f"http://silent-{number}/"))
        queue.add(post_to(f"http://good:{site.url.rsplit(':', 1)[1]}/"))
        queue.start()
        await until(lambda: drops.counts["host_failed"] == 8)
        await until(lambda: len(names.asked) == SLOW_SLOTS + 8)
        with pytest.raises(Unreachable):
            await unrestricted.get("http://silent-0/", most=1)
        assert len(names.asked) == SLOW_SLOTS + 8, "a lookup in progress takes no second thread"
        names.answered.set()
        await until(lambda: len(site.asked) == 1)
        await until(lambda: drops.counts["host_failed"] == silent)
    finally:
        names.answered.set()
        await queue.close()


@pytest.fixture
def no_thread() -> Iterator[None]:
    """Make the system refuse new threads, since it has no room for so large a stack."""
    before = threading.stack_size(1 << 46)
    yield
    threading.stack_size(before)


@pytest.mark.usefixtures("no_thread")
async def test_lookup_fails_if_no_thread_can_be_started(unrestricted: SafeHttp) -> None:
    drops = Drops()
    queue = posts_by(unrestricted, drops)
    queue.add(post_to("http://good/"))
    queue.start()
    await until(lambda: drops.counts.total() == 1)
    assert drops.counts == {"host_failed": 1}
    (pause,) = queue._pauses._pauses.values()  # noqa: SLF001
    assert pause.until > time.monotonic(), "the lookup is not repeated immediately"
    assert not unrestricted._resolver._running  # noqa: SLF001
    await queue.close()


@pytest.mark.usefixtures("no_thread")
async def test_request_is_answered_as_unavailable_if_no_thread_can_be_started(
    room: Room,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(markdown, "_thread", ThreadPoolExecutor(1))
    monkeypatch.setattr(passwords, "_threads", ThreadPoolExecutor(1))
    long = message(room.group, "*long* " * 1_000, is_markdown=True)
    refused = await room.ada.ask(long)
    assert isinstance(refused, server.Error)
    assert refused.code == "unavailable"
    assert refused.retry_after_ms
    async with http_client(world.url) as http:
        answer = await http.post("/v1/auth/login", json={"email": "ada@example.org", "password": "correct horse"})
    assert answer.status_code == 503
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    threading.stack_size(0)
    await room.ada.call(long)


def test_lookup_that_hangs_does_not_delay_shutdown() -> None:
    script = """
import asyncio, socket, threading
from server.jobs import safe_http
asked = threading.Event()
def silent(*_, **__):
    asked.set()
    threading.Event().wait()
async def main():
    asker = safe_http.SafeHttp(to_private=False)
    asking = asyncio.create_task(asker.get("http://silent/", most=1))
    while not asked.is_set():
        await asyncio.sleep(0.01)
    asking.cancel()
    await asker.close()
    print("closed")
socket.getaddrinfo = silent
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=20, cwd=Path(__file__).parent.parent, capture_output=True
    )
    assert ended.stdout == b"closed\n"


async def test_target_of_a_redirect_is_checked_again(unrestricted: SafeHttp, site: FakeSite) -> None:
    site.answer = lambda path: (
        page("here") if path == "/there" else b"HTTP/1.1 302 Found\r\nlocation: /there\r\ncontent-length: 0\r\n\r\n"
    )
    answer = await unrestricted.get(site.url, most=100)
    assert (answer.body, answer.url) == (b"here", f"{site.url}/there")
    site.answer = lambda _: b"HTTP/1.1 302 Found\r\nlocation: /again\r\ncontent-length: 0\r\n\r\n"
    with pytest.raises(Unreachable, match="redirects"):
        await unrestricted.get(site.url, most=100)
    site.answer = lambda _: b"HTTP/1.1 302 Found\r\nlocation: http://[\r\ncontent-length: 0\r\n\r\n"
    with pytest.raises(Unreachable, match="to no address"):
        await unrestricted.get(site.url, most=100)
    # The target of a redirect is checked even if the first URL is allowed.
    unrestricted._to_private = False  # noqa: SLF001
    site.answer = lambda _: b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    with pytest.raises(Unreachable):
        await unrestricted.get(site.url, most=100)


async def test_long_answers_are_truncated_and_slow_ones_are_abandoned(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.answer = lambda _: page("x" * 1_000_000)
    assert len((await unrestricted.get(site.url, most=1_000)).body) == 1_000
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.5)
    never = asyncio.Event()

    async def slow(path: str) -> bytes:
        await asyncio.sleep(0.3)
        return f"HTTP/1.1 302 Found\r\nlocation: {path}x\r\ncontent-length: 0\r\n\r\n".encode()

    # All redirects share one time limit.
    site.answer = slow
    with pytest.raises(Unreachable) as unreachable:
        await unrestricted.get(site.url, most=1_000)
    assert unreachable.value.url == f"{site.url}/x"
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.2)

    async def silence() -> bytes:
        await never.wait()
        return b""

    site.answer = lambda _: silence()
    with pytest.raises(Unreachable):
        await unrestricted.get(site.url, most=1_000)
    never.set()


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Events:
    """Counts the parsed parts of answers, in total and per turn of the loop. Each part may take a given time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.0) -> None:
        self.total = self._in_turn = self.most_in_turn = 0
        self.used = 0.0
        parse = h11.Connection.next_event

        def next_event(connection: h11.Connection) -> object:
            self.total += 1
            self._in_turn += 1
            self.used += seconds
            return parse(connection)

        monkeypatch.setattr(h11.Connection, "next_event", next_event)

    async def count_turns(self) -> None:
        while True:
            self.most_in_turn = max(self.most_in_turn, self._in_turn)
            self._in_turn = 0
            await asyncio.sleep(0)


@pytest.mark.parametrize(("begin", "part"), [
    (b"", b"HTTP/1.1 103 E\r\n\r\n"), (CHUNKED, b"1\r\nx\r\n"), (b"HTTP/1.1 200 OK\r\n", b"a:\r\n"), (b"", b"x"),
    (CHUNKED + b"0\r\n", b"a:\r\n"), (CHUNKED, b"1;a\r\nx\r\n"),
], ids=["103", "chunks", "headers", "not HTTP", "trailers", "extensions"])  # fmt: skip
async def test_endless_answer_is_abandoned_and_does_not_block_others(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch, begin: bytes, part: bytes
) -> None:
    events = Events(monkeypatch)
    site.answer = lambda _: begin + part * (2_000_000 // len(part))
    turns = asyncio.create_task(events.count_turns())
    with pytest.raises(Unreachable, match="too many parts"):
        await unrestricted.get(site.url, most=200_000)
    with contextlib.suppress(Unreachable):
        assert len((await unrestricted.post(site.url, b"x", {}, stopwatch=Stopwatch())).body) == safe_http.MOST_OF_POST
    turns.cancel()
    assert events.total < 2 * 2 * safe_http.MAX_BESIDE_BYTES / 5
    assert events.most_in_turn <= safe_http.TURN_BYTES / 5


async def test_answer_that_arrives_byte_by_byte_is_abandoned(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_http, "TURN_BYTES", 1)
    monkeypatch.setattr(safe_http, "MAX_READS", 200)
    site.answer = lambda _: page("x" * 10)
    assert (await unrestricted.get(site.url, most=1_000)).body == b"x" * 10
    site.answer = lambda _: page("x" * 200)
    with pytest.raises(Unreachable, match="too many parts"):
        await unrestricted.get(site.url, most=1_000)


async def test_parsing_of_answers_takes_a_bounded_share_of_the_loop(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previews and notifications have separate shares, and neither waits for the other's."""
    events = Events(monkeypatch, seconds=0.001)
    monkeypatch.setattr(safe_http, "TURN_BYTES", 60)
    site.answer = lambda _: CHUNKED + b"1\r\nx\r\n" * 200 + b"0\r\n\r\n"
    for name, ask in (
        ("_gets", unrestricted.get(site.url, most=1_000)),
        ("_posts", unrestricted.post(site.url, b"x", {}, stopwatch=Stopwatch())),
    ):
        setattr(unrestricted, name, LoopTime(1.0, 0.01, used=lambda: events.used))
        began, used = time.monotonic(), events.used
        assert (await ask).body == b"x" * 200
        assert events.used - used >= 0.2
        assert time.monotonic() - began >= events.used - used - 0.05
    unrestricted._gets = LoopTime(1e-9, 1e-9, used=lambda: events.used)  # noqa: SLF001
    waiting = [asyncio.create_task(unrestricted.get(site.url, most=1_000)) for _ in range(2)]
    assert (await unrestricted.post(site.url, b"x", {}, stopwatch=Stopwatch())).body == b"x" * 200
    assert not any(one.done() for one in waiting)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_answer_is_parsed_per_turn_of_the_loop(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrestricted._posts = LoopTime(1.0, 60.0)  # noqa: SLF001
    read = safe_http._Stream.read  # noqa: SLF001
    turn = 0
    parsed: list[int] = []
    arrived: list[int] = []
    all_wait = asyncio.Event()

    async def recorded(stream: safe_http._Stream, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        data = await read(stream, max_bytes, timeout)
        parsed.append(turn)
        return data

    async def together() -> bytes:
        arrived.append(1)
        if len(arrived) == 40:
            all_wait.set()
        await all_wait.wait()
        return page("x")

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(safe_http._Stream, "read", recorded)  # noqa: SLF001
    site.answer = lambda _: together()
    counting = asyncio.create_task(count_turns())
    await asyncio.gather(*(unrestricted.post(site.url, b"x", {}, stopwatch=Stopwatch()) for _ in range(40)))
    counting.cancel()
    assert len(parsed) >= 40
    assert len(set(parsed)) == len(parsed)


def overdraw(share: LoopTime) -> None:
    """Use up a share for 0.6 seconds."""
    share._left, share._at = -0.06, time.monotonic()  # noqa: SLF001


async def test_waits_for_the_share_of_the_loop_do_not_count_as_slowness(
    unrestricted: SafeHttp, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.5)
    monkeypatch.setattr(push_posts, "SLOW_SECONDS", 0.25)
    drops = Drops()
    queue = posts_by(unrestricted, drops)

    async def post(users: int) -> Host:
        for _ in range(users):
            queue.add(post_to(site.url))
        queue.start()
        await until(lambda: not queue._queued and not queue._tasks)  # noqa: SLF001
        (host,) = queue._hosts.values()  # noqa: SLF001
        return host

    async def late() -> bytes:
        await asyncio.sleep(0.3)
        return page("")

    overdraw(unrestricted._posts)  # noqa: SLF001
    assert (await post(1)).is_fast
    assert not drops.counts
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 10.0)
    site.answer = lambda _: late()
    assert (await post(HOST_USERS)).is_slow, "the answer alone is waited for"
    assert not drops.counts
    await queue.close()
    site.answer = lambda path: (
        page("here") if path == "/there" else b"HTTP/1.1 302 Found\r\nlocation: /there\r\ncontent-length: 0\r\n\r\n"
    )
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.5)
    overdraw(unrestricted._gets)  # noqa: SLF001
    assert (await unrestricted.get(site.url, most=100)).body == b"here"


# ---------------------------------------------------------------------------------------------------- previews


@pytest.mark.parametrize(("text", "link"), [
    ("See https://example.org/a?b=c.", "https://example.org/a?b=c"), ("(http://x.y/)", "http://x.y/"), ("none", None),
    ("javascript:alert(1)", None), ("<https://x.y/z>", "https://x.y/z"),
])  # fmt: skip
def test_first_link_of_a_text_is_found(text: str, link: str | None) -> None:
    assert previews.first_link(text) == link


@pytest.mark.parametrize("body", [b"", b"\xff\xfe<title>", b"<title></title>", b"<" * 50_000, b"<meta " * 20_000])
def test_page_without_metadata_has_no_preview(body: bytes) -> None:
    assert previews.read(body, "https://x.y", "https://x.y") is None


MARKUP = [
    "<title>", "</title>", "<meta ", "property=og:title ", "property=og:image ", "content='", "http://[", "'", '"', "=",
    "<", ">", "<!", "<![", "<!--", "-->", "<!doctype ", "<?", "</", "<script>", "&#", "&#xd800;", "&#0;", "&amp", "a",
    " ", "\0", "]]>", "<![CDATA[", "\ud800",
]  # fmt: skip


@given(st.lists(st.sampled_from(MARKUP), max_size=40))
def test_any_page_is_parsed_without_an_error(parts: list[str]) -> None:
    body = f"<title>{''.join(parts)}".encode(errors="surrogatepass")
    for whole in (body, b"<title>A page</title>" + body):
        preview = previews.read(whole, "https://x.y", "https://x.y")
        if preview is not None:
            stored = msgspec.json.encode(preview)
            assert b"\\u0000" not in stored
            assert b"\\ud8" not in stored.lower()
        assert preview is not None or whole is body


def test_parse_time_is_linear_in_the_length_of_a_page() -> None:
    """At most 100 times the time of an ordinary page of the same length."""

    def seconds(body: str) -> float:
        page = f"<title>a</title>{body * 50_000}".encode(errors="surrogatepass")[:50_000]
        began = time.thread_time()
        previews.read(page, "https://x.y", "https://x.y")
        return time.thread_time() - began

    most = 100 * min(seconds("<p class=a>Text</p>") for _ in range(3))
    assert [part for part in MARKUP if seconds(part) > most] == []


def test_preview_is_bounded_and_its_picture_has_a_web_address() -> None:
    body = f'<title>{"t" * 999}</title><meta property="og:image" content="javascript:alert(1)">'.encode()
    preview = previews.read(body, "https://x.y", "https://x.y")
    assert preview == LinkPreview(url="https://x.y", title="t" * 300)


class TestInTheServer:
    """If previews are enabled, one is added to the message by an edit. Otherwise no page is fetched."""

    @pytest.fixture
    def settings(self, settings: Settings, request: pytest.FixtureRequest) -> Settings:
        is_on = request.node.callspec.params["is_on"]
        return msgspec.structs.replace(settings, link_previews=is_on, private_addresses=True)

    @pytest.mark.parametrize("is_on", [True, False])
    async def test_preview_is_added_only_if_enabled(
        self, room: Room, world: World, site: FakeSite, *, is_on: bool
    ) -> None:
        message_id = await sent(room.ada, room.group, f"Look: {site.url}/engine.")
        await room.ada.call(message(room.group, "No link"))
        if not is_on:
            await room.charles.synced()
            assert site.asked == []
            return
        event = await room.charles.event(server.MessageEdited)
        assert event.message.id == message_id
        assert event.message.link_preview == LinkPreview(
            url=f"{site.url}/engine",
            title="The Engine & its notes",
            description="On the Analytical Engine",
            image=f"{site.url}/engine.png",
        )
        assert event.message.edited_at is None
        await room.ada.call(client.Edit(**room.at(message_id), content="Never mind"))
        edited = await room.charles.event(server.MessageEdited, lambda event: event.message.content == "Never mind")
        assert edited.message.link_preview is None
        assert await world.db.fetchval("SELECT count(*) FROM message WHERE link_preview IS NOT NULL") == 0

    @pytest.mark.parametrize("is_on", [True])
    async def test_queued_link_is_fetched_only_while_its_message_contains_it(
        self,
        room: Room,
        world: World,
        site: FakeSite,
        *,
        is_on: bool,  # noqa: ARG002 - of the fixture
    ) -> None:
        may_answer = asyncio.Event()

        async def answer() -> bytes:
            await may_answer.wait()
            return page(PAGE)

        site.answer = lambda _: answer()
        await sent(room.ada, room.group, f"{site.url}/first/")
        await until(lambda: len(site.asked) == 1)
        names = ("deleted", "moderated", "edited", "kept")
        ids = {name: await sent(room.ada, room.group, f"{site.url}/{name}") for name in names}
        await room.ada.call(client.Delete(**room.at(ids["deleted"])))
        await world.moderate_as_owner(client.Moderate(**room.at(ids["moderated"]), reason="Rude"))
        await room.ada.call(client.Edit(**room.at(ids["edited"]), content="Never mind"))
        may_answer.set()
        await room.charles.event(
            server.MessageEdited,
            lambda event: event.message.id == ids["kept"] and event.message.link_preview is not None,
        )
        asked = {head.split(" ")[1] for head in site.asked if "/first/" not in head}
        assert asked == {"/kept"}
        await until(lambda: world.workers[0].app.previews._bound.taken == 0)  # noqa: SLF001

    @pytest.mark.parametrize("is_on", [True])
    async def test_links_of_one_user_do_not_delay_links_of_others(
        self,
        world: World,
        site: FakeSite,
        monkeypatch: pytest.MonkeyPatch,
        *,
        is_on: bool,  # noqa: ARG002 - of the fixture
    ) -> None:
        monkeypatch.setattr(previews, "PAUSE_SECONDS", 0.0)
        looks = world.workers[0].app.previews
        silent = asyncio.Event()

        async def answer() -> bytes:
            await silent.wait()
            return page(PAGE)

        site.answer = lambda path: answer() if path.startswith("/silent") else page(PAGE)
        ada, *others = await world.users("Ada", "Bob", "Charles", "Dora")
        connected = [await world.connect(one) for one in (ada, *others)]
        about = [await world.channel(one) for one in connected]
        for number in range(2 * previews.MAX_FETCHES):
            await sent(connected[0], about[0], f"{site.url}/silent/{number}")
        for one, where in zip(connected[1:], about[1:], strict=True):
            await sent(one, where, f"{site.url}/good")
        for one in connected[1:]:
            await one.event(server.MessageEdited)
        assert [head.split(" ")[1] for head in site.asked if "/silent" in head] == ["/silent/0"]
        # Queued links of one user also leave room for the links of others.
        looks._bound.most = looks._bound.taken + 4  # noqa: SLF001
        await sent(connected[0], about[0], f"{site.url}/silent/too-many")
        await sent(connected[1], about[1], f"{site.url}/another")
        await connected[1].event(server.MessageEdited, lambda event: "/another" in event.message.content)
        silent.set()
        await until(lambda: looks._bound.taken == 0)  # noqa: SLF001
        assert not any("too-many" in head for head in site.asked)
        assert not looks._lines._lines  # noqa: SLF001

    @pytest.mark.parametrize("is_on", [True])
    async def test_failing_host_is_paused_for_a_while(
        self,
        world: World,
        site: FakeSite,
        monkeypatch: pytest.MonkeyPatch,
        *,
        is_on: bool,  # noqa: ARG002 - of the fixture
    ) -> None:
        monkeypatch.setattr(previews, "MAX_PAUSES", 2)
        looks = world.workers[0].app.previews
        site.answer = lambda path: b"nonsense\r\n\r\n" if path == "/broken" else page(PAGE)
        people = await world.users("Ada", "Bob", "Charles", "Dora")
        connected = [await world.connect(one) for one in people]
        about = [await world.channel(one) for one in connected]

        async def asked(who: int, path: str) -> bool:
            before = len(site.asked)
            await sent(connected[who], about[who], f"{site.url}{path}")
            await until(lambda: looks._bound.taken == 0)  # noqa: SLF001
            return len(site.asked) > before

        assert [await asked(0, "/broken"), await asked(0, "/good")] == [True, False], "the host is paused for this user"
        assert [await asked(1, "/good"), await asked(1, "/broken"), await asked(2, "/broken")] == [True, True, True]
        assert not await asked(3, "/good"), "the host is paused after failures for three users"
        for number in range(3):
            looks._pause(f"http://host-{number}.example/", people[0].id)  # noqa: SLF001
        assert len(looks._pauses) == 2  # noqa: SLF001
        assert await asked(0, "/good")


async def test_one_waiting_task_runs_per_turn_of_the_loop_even_if_others_give_up() -> None:
    """Parts of 64 answers parsed in one turn blocked a worker for 30 ms."""
    share = LoopTime(1.0, 60.0)
    turn = 0
    served: list[tuple[int, int]] = []

    async def read(number: int) -> None:
        await share.turn()
        served.append((turn, number))

    tasks = [asyncio.create_task(read(number)) for number in range(64)]
    while len(served) < 60:
        turn += 1
        await asyncio.sleep(0)
        if turn == 1:
            for gives_up in tasks[::16]:
                gives_up.cancel()
        assert turn < 1_000
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [number for _, number in served] == [number for number in range(64) if number % 16]
    assert len({turn for turn, _ in served}) == 60
