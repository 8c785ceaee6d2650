"""Short turns of the loop: whatever one account asks for, others are served in between."""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import httpx
import pytest

from protocol.client import History
from protocol.limits import MAX_PAGE
from server.connection import MAX_INBOX
from server.dispatch import Dispatch
from server.http_protocol import Http
from server.limits import Pace
from server.proxies import Proxies
from server.queries import messages
from server.sockets import BEGIN_AT_ONCE, Sockets
from tests.world import World, http_client, until


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


async def test_connections_that_begin_at_once_are_taken_in_over_many_turns(turn: Turn) -> None:
    sockets = Sockets(most=1_000, per_address=1_000, proxies=Proxies.read(""), frames=Pace.of(1.0))
    begun: list[tuple[int, int]] = []
    for number in range(BEGIN_AT_ONCE * 5 + 1):
        sockets.begin("one", partial(lambda number: begun.append((turn.number, number)), number))
    await until(lambda: len(begun) == BEGIN_AT_ONCE * 5 + 1)
    assert max(Counter(at for at, _ in begun).values()) == BEGIN_AT_ONCE
    assert [number for _, number in begun] == list(range(BEGIN_AT_ONCE * 5 + 1))


async def test_connection_that_cannot_be_taken_in_keeps_nobody_else_out(
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


async def test_frames_that_arrive_at_once_are_refused_over_many_turns(
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
    """How many large and small pages are read now, and the most at a time."""
    now: Counter[str] = Counter()
    read = messages.page

    async def page(*given: Any, **options: Any) -> Any:
        size = "large" if given[3].older >= MAX_PAGE else "small"
        now[size] += 1
        now[f"most {size}"] = max(now[f"most {size}"], now[size])
        try:
            await asyncio.sleep(0.01)  # as a database that is far away
            return await read(*given, **options)
        finally:
            now[size] -= 1

    monkeypatch.setattr(messages, "page", page)
    return now


async def test_large_pages_of_a_user_are_read_one_at_a_time_and_small_ones_beside(
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
