"""Each turn of the event loop is short, so that no account delays others for long."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from protocol.client import History, ListPins, Pin, Resume
from protocol.limits import MAX_CONTENT, MAX_PAGE
from protocol.payloads import Poll
from server.app.sends import MAX_BATCH_CHARACTERS
from server.core.proxies import Proxies
from server.db import rows
from server.db.pool import Lease
from server.db.rows import PORTION, Reader
from server.fairness.batcher import Batcher
from server.fairness.lanes import HEAVY_SHARE
from server.gateway.connection import MAX_INBOX
from server.gateway.dispatch import Dispatch
from server.gateway.http_protocol import Http
from server.gateway.sockets import Sockets
from server.limits.token_bucket import Pace
from server.queries import messages
from server.queries.sending import Outgoing, weight
from tests.test_unreadable_pages import filled, walks_of, whole_of
from tests.world import Room, World, http_client, message, until


class Turn:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.number = 0
        self._next = asyncio.get_running_loop().call_soon(self._count)

    def _count(self) -> None:
        self.number += 1
        self._next = asyncio.get_running_loop().call_soon(self._count)

    def stop(self) -> None:
        self._next.cancel()


@pytest.fixture
async def turn() -> Any:
    counting = Turn()
    yield counting
    counting.stop()


async def test_concurrent_connections_are_accepted_over_many_turns_of_the_loop(turn: Turn) -> None:
    sockets = Sockets(
        most=1_000, per_address=1_000, proxies=Proxies.read(""), frames=Pace.of(1.0), outbox_bytes=1 << 20
    )
    begun: list[tuple[int, int]] = []
    for number in range(21):
        sockets.begin("one", partial(lambda number: begun.append((turn.number, number)), number))
    await until(lambda: len(begun) == 21)
    assert max(Counter(at for at, _ in begun).values()) == 1
    assert [number for _, number in begun] == list(range(21))


async def test_failure_to_accept_a_connection_does_not_affect_others(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive, begun = Http._receive, 0  # noqa: SLF001

    def fails(self: Http, data: bytes) -> None:
        nonlocal begun
        begun += 1
        if begun % 2:
            raise MemoryError
        receive(self, data)

    monkeypatch.setattr(Http, "_receive", fails)
    ada = await world.user("Ada")
    async with http_client(world.url) as http:
        for _ in range(3):
            with pytest.raises(httpx.TransportError):
                await http.get("/livez")
            await world.connect(ada)
    assert sum("first bytes" in record.getMessage() for record in caplog.records) == 3


async def test_concurrent_frames_are_refused_over_many_turns_of_the_loop(
    world: World, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await world.connect(await world.user("Ada"))
    run = Dispatch.run
    at: Counter[int] = Counter()

    async def counted(self: Dispatch, *given: Any) -> Any:
        at[turn.number] += 1
        return await run(self, *given)

    monkeypatch.setattr(Dispatch, "run", counted)
    for _ in range(MAX_INBOX):
        await ada.socket.send('{"type":"vote"}')
    await until(lambda: sum(at.values()) == MAX_INBOX)
    assert max(at.values()) <= 4


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of large and small pages that are being read, and its maximum."""
    now: Counter[str] = Counter()
    read = messages.page

    async def page(*given: Any, **options: Any) -> Any:
        size = "large" if given[3].older >= MAX_PAGE else "small"
        now[size] += 1
        now[f"most {size}"] = max(now[f"most {size}"], now[size])
        try:
            await asyncio.sleep(0.01)  # like a database far away
            return await read(*given, **options)
        finally:
            now[size] -= 1

    monkeypatch.setattr(messages, "page", page)
    return now


async def test_large_pages_of_a_user_are_read_one_at_a_time_beside_small_ones(
    world: World, pages: Counter[str]
) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.befriend(ada, charles)
    sockets = [await world.connect(ada) for _ in range(4)]
    other = await world.connect(charles)
    group = await world.group(sockets[0], charles)
    await asyncio.gather(*(one.call(History(conversation_id=group, limit=2)) for one in sockets))
    assert pages["most small"] > 1
    await asyncio.gather(*(one.call(History(conversation_id=group, limit=MAX_PAGE)) for one in sockets))
    assert pages["most large"] == 1
    await asyncio.gather(*(one.call(History(conversation_id=group, limit=MAX_PAGE)) for one in (sockets[0], other)))
    assert pages["most large"] == 2


async def test_page_is_decoded_in_parts(turn: Turn) -> None:
    reader, text = Reader(dict[str, str]), '{"said": "' + "x" * (PORTION // 4) + '"}'
    before = turn.number
    read = await reader.each([text] * 41).decoded()
    assert (len(read), turn.number - before) == (41, 10)


@pytest.fixture
def portions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of connections that the task holds before each part, which is one row here."""
    held: Counter[Any] = Counter()
    portions: list[int] = []
    enter, leave = Lease.__aenter__, Lease.__aexit__

    async def entered(lease: Lease) -> Any:
        connection = await enter(lease)
        held[asyncio.current_task()] += 1
        return connection

    async def left(lease: Lease, *error: Any) -> None:
        held[asyncio.current_task()] -= 1
        await leave(lease, *error)

    async def portion(seconds: float) -> None:
        portions.append(held[asyncio.current_task()])
        await asyncio.sleep(seconds)

    monkeypatch.setattr(Lease, "__aenter__", entered)
    monkeypatch.setattr(Lease, "__aexit__", left)
    monkeypatch.setattr(rows, "PORTION", -1)
    monkeypatch.setattr(rows, "asyncio", SimpleNamespace(sleep=portion))
    return portions


async def test_no_connection_is_held_while_rows_are_decoded(room: Room, world: World, portions: list[int]) -> None:
    there = await filled(room, world)
    await room.ada.call(Pin(**room.at(there.root)))
    again = await world.connect(room.users[0], query="?resume=1")
    frames = [
        ListPins(conversation_id=room.group),
        *(one.frame for one in walks_of(room, there) + whole_of(room, there)),
    ]
    resumes = [{room.group: 1}, {room.group: 1_000}, {}]
    frames += [Resume(epoch=again.ready.epoch, versions=versions, user_version=1) for versions in resumes]
    for frame in frames:
        portions.clear()
        await again.call(frame)
        assert (frame, set(portions)) == (frame, {0})


async def test_short_message_does_not_wait_for_long_messages_of_others(world: World, monkeypatch: Any) -> None:
    (ada, charles), held, app = await world.users("Ada", "Charles"), asyncio.Event(), world.workers[0].app
    chatty, quiet = await world.connect(ada), await world.connect(charles)
    rooms = await world.channel(chatty), await world.channel(quiet)
    sends, batches = app._sends, list[int]()  # noqa: SLF001

    async def wait(work: Callable[[list[Outgoing]], Awaitable[list[Any]]], batch: list[Outgoing]) -> list[Any]:
        batches.append(max(weight(out) for out in batch))
        if batches[-1] > MAX_BATCH_CHARACTERS // HEAVY_SHARE:
            await held.wait()
        return await work(batch)

    batchers: list[Batcher[Outgoing, Any]] = [sends._common, sends.lanes._light, sends.lanes._heavy]  # noqa: SLF001
    for batcher in batchers:
        monkeypatch.setattr(batcher, "_work", partial(wait, batcher._work))  # noqa: SLF001
    poll = Poll(options=[f"{number:0255}" for number in range(20)])
    frames = message(rooms[0], "x" * MAX_CONTENT), message(rooms[0], "x", payload=poll)
    long: list[asyncio.Future[Any]] = [asyncio.ensure_future(chatty.call(one)) for one in frames]
    await until(lambda: bool(batches))
    async with asyncio.timeout(5):
        await quiet.call(message(rooms[1], "x" * (MAX_BATCH_CHARACTERS // HEAVY_SHARE)))
    assert not any(one.done() for one in long)
    held.set()
    await asyncio.gather(*long)
    assert sorted(batches)[::2] == [MAX_BATCH_CHARACTERS // HEAVY_SHARE, MAX_CONTENT]
