"""Too much at once: who comes in is bounded and told when to come, and what can wait is refused before what cannot."""

import asyncio
import time
from http import HTTPStatus

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from protocol import client, server
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.server import Error
from prove.client import Client
from server import connection
from server.admission import Admission
from server.config import Settings
from server.pressure import LATE_SECONDS
from tests.world import World, message, sent

CLIENTS = 150


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 0.5)), max_size=300))
def test_never_more_than_so_many_are_on_their_way_in(steps: list[tuple[bool, float]]) -> None:
    clock = Clock()
    admission = Admission(at_once=5, clock=clock)
    inside = 0
    for is_coming, seconds in steps:
        clock.now += seconds
        if is_coming:
            try:
                admission.begin()
                inside += 1
            except Refused as refused:
                assert inside == 5
                assert refused.retry_after_ms is not None
                assert 250 <= refused.retry_after_ms <= 30_000
        elif inside:
            admission.end()
            inside -= 1
        assert inside <= 5


@pytest.mark.parametrize("rate", [20, 500])
def test_those_who_come_when_told_come_about_as_fast_as_others_get_in(rate: int) -> None:
    clock = Clock()
    admission = Admission(at_once=50, clock=clock)
    for _ in range(50):
        admission.begin()
    for _ in range(5 * rate):  # five seconds of it
        clock.now += 1 / rate
        admission.end()
        admission.begin()
    told = []
    for _ in range(4 * rate):
        with pytest.raises(Refused) as refused:
            admission.begin()
        told.append(refused.value.retry_after_ms or 0)
    # They need four seconds, after those who are inside: the last are told about that, and not all the same.
    last = sorted(told[-rate:])
    assert 3_000 + 50_000 / rate * 0.9 < sum(last) / len(last) < 5_500 + 50_000 / rate * 1.3
    assert len(set(last)) > 10


async def test_a_full_door_says_when_to_come_and_everyone_gets_in(world: World) -> None:
    worker = world.workers[0].app
    worker.admission._at_once = 10  # noqa: SLF001 - a small door
    ada = await world.user("Ada")
    people = [ada, *await world.users(*(f"Person {number}" for number in range(CLIENTS // 40)))]
    turned_away = 0

    async def come(number: int) -> Client:
        nonlocal turned_away
        while True:
            one = Client(world.url, people[number % len(people)].token)
            try:
                await one.open()
            except InvalidStatus as error:
                assert error.response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
                told = msgspec.json.decode(error.response.body or b"", type=Error)
                assert told.code == ErrorCode.UNAVAILABLE
                assert int(error.response.headers["retry-after"]) >= 1
                turned_away += 1
                await asyncio.sleep((told.retry_after_ms or 0) / 1000)
                continue
            return await one.settled()

    clients = await asyncio.gather(*(come(number) for number in range(CLIENTS)))
    assert turned_away > 0
    assert worker.admission.refused == turned_away
    assert worker.admission._inside == 0  # noqa: SLF001
    await asyncio.gather(*(one.close() for one in clients))


async def test_who_says_nothing_keeps_nobody_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ENTER_SECONDS", 0.2)
    worker = world.workers[0].app
    worker.admission._at_once = 2  # noqa: SLF001
    ada = await world.user("Ada")
    silent = [Client(world.url, None) for _ in range(5)]
    for one in silent:
        await one.open()
    # Who says that they will resume, and do not, keep a place for a moment only.
    for _ in range(2):
        await world.connect(ada, query="?resume=1")
    with pytest.raises(InvalidStatus, match="503"):
        await Client(world.url, ada.token).open()
    async with asyncio.timeout(5):
        while worker.admission._inside:  # noqa: SLF001
            await asyncio.sleep(0.01)
    await world.connect(ada)
    for one in silent:
        assert await one.closed() == CloseCode.WITH_TOKEN


async def test_first_typing_then_presence_then_receipts_never_messages(settings: Settings) -> None:
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        channel = await world.channel(ada)
        first = await sent(ada, channel)
        pressure = world.workers[0].app.pressure
        frames = (
            client.Typing(conversation_id=channel),
            client.SetPresence(status="busy"),
            client.Read(conversation_id=channel, message_id=first),
        )
        for level, late in enumerate((0.0, *LATE_SECONDS)):
            pressure.late = late
            codes = []
            for frame in frames:
                answer = await ada.ask(frame)
                codes.append(answer.code if isinstance(answer, Error) else None)
                if isinstance(answer, Error):
                    assert answer.retry_after_ms is not None
            assert codes == [ErrorCode.UNAVAILABLE] * level + [None] * (3 - level)
            pressure.late = late
            await ada.call(message(channel), server.Sent)


async def test_a_worker_notices_that_it_is_behind_and_recovers(world: World) -> None:
    pressure = world.workers[0].app.pressure
    ada = await world.connect(await world.user("Ada"))
    channel = await world.channel(ada)
    async with asyncio.timeout(20):
        while pressure.level < 3:
            time.sleep(0.6)  # noqa: ASYNC251 - the loop is late, on purpose
            await asyncio.sleep(0)
        assert isinstance(await ada.ask(client.Typing(conversation_id=channel)), Error)
        while pressure.level:
            await asyncio.sleep(0.05)
    await ada.call(client.Typing(conversation_id=channel))
