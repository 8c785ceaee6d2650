"""Under overload, connecting clients are admitted in bounded numbers, and deferrable frames are refused first."""

import asyncio
import contextlib
import itertools
import time
from http import HTTPStatus
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from protocol import client, server
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import UserId
from protocol.server import Error
from prove.client import Client
from server.core.config import Settings
from server.gateway.websocket import WebSocket
from server.limits.admission import Admission, Slot
from server.limits.load_shedding import LATE_SECONDS
from tests.world import World, message, sent, until

CLIENTS = 150


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.floats(0, 0.5)), max_size=300))
def test_number_of_connecting_clients_is_bounded(steps: list[tuple[int, bool, float]]) -> None:
    clock = Clock()
    admission = Admission(max_connecting=8, clock=clock)
    inside: list[Slot] = []
    for who, is_coming, seconds in steps:
        clock.now += seconds
        before = len(inside)
        if is_coming:
            try:
                inside.append(admission.begin(f"192.0.2.{who % 5}"))
                inside[-1].require(UserId(UUID(int=who)))
            except Refused as refused:
                if len(inside) > before:
                    inside.pop().end()  # the address has room, but the user does not
                assert refused.retry_after_ms is not None
                assert 250 <= refused.retry_after_ms <= 30_000
        elif inside:
            place = inside.pop(who % len(inside))
            place.end()
            place.end()  # has no effect
            if who % 2:
                place.again()
                inside += [place] * place.is_held
        assert len(admission) == len(inside) <= 8
    for place in inside:
        place.end()
    assert len(admission) == 0
    assert not admission._addresses._held.keys() | admission._users._held.keys()  # noqa: SLF001


@given(st.lists(st.integers(0, 11), max_size=1_000), st.booleans())
def test_twelve_clients_cannot_take_all_places(who: list[int], is_address: bool) -> None:  # noqa: FBT001
    admission = Admission()
    for number in [*who, *list(range(12)) * 64]:
        with contextlib.suppress(Refused):
            place = admission.begin(f"192.0.2.{number}" if is_address else f"203.0.113.{len(admission)}")
            try:
                place.require(UserId(UUID(int=0 if is_address else number)))
            except Refused:
                place.end()
    assert len(admission) > 180 or is_address
    admission.begin("198.51.100.1").require(UserId(UUID(int=99)))


def test_client_that_retries_constantly_delays_others_only_by_its_share() -> None:
    clock = Clock()
    admission = Admission(max_connecting=40, clock=clock)
    for number in range(40):
        admission.begin(f"192.0.2.{number}")
    for _ in range(2_000):
        clock.now += 0.002
        with pytest.raises(Refused):
            admission.begin("192.0.2.1")
    with pytest.raises(Refused) as refused:
        admission.begin("198.51.100.1")
    # At the estimated rate of 200 per second, 40 are inside, and a quarter as many have been given a time.
    assert (refused.value.retry_after_ms or 0) <= (40 + 10 + 1) * 1_000 / 200 * 1.3


@pytest.mark.parametrize("rate", [20, 500])
def test_retry_times_match_the_rate_of_admission(rate: int) -> None:
    clock = Clock()
    admission = Admission(max_connecting=50, clock=clock)
    numbers = itertools.count()
    inside = [admission.begin(str(next(numbers))) for _ in range(50)]
    for _ in range(5 * rate):  # for five seconds
        clock.now += 1 / rate
        inside.pop(0).end()
        inside.append(admission.begin(str(next(numbers))))
    told = []
    for _ in range(4 * rate):
        with pytest.raises(Refused) as refused:
            admission.begin(str(next(numbers)))
        told.append(refused.value.retry_after_ms or 0)
    # They need four seconds, after the clients inside. The last ones get about that delay, with variation.
    last = sorted(told[-rate:])
    assert 3_000 + 50_000 / rate * 0.9 < sum(last) / len(last) < 5_500 + 50_000 / rate * 1.3
    assert len(set(last)) > 10


async def test_refused_clients_get_a_retry_time_and_all_connect_in_the_end(world: World) -> None:
    worker = world.workers[0].app
    worker.admission._addresses.most = 40  # noqa: SLF001 - few places, ten of them for one address
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
    assert len(worker.admission) == 0
    await asyncio.gather(*(one.close() for one in clients))


async def test_silent_clients_keep_no_places(world: World) -> None:
    worker = world.workers[0].app
    worker.admission._addresses.most = worker.admission._users.most = 2  # noqa: SLF001 - one place for each
    ada, charles = await world.users("Ada", "Charles")
    silent = [Client(world.url, None) for _ in range(5)]
    for one in silent:
        await one.open()
    # Clients that announce a resume and do not send it keep no place.
    resuming = [await world.connect(ada, query="?resume=1") for _ in range(5)]
    for one in resuming:
        await one.event(server.Ready)
    await world.connect(charles)
    # Their late `resume` is handled, and takes a place meanwhile.
    async with world.db.transaction():
        await world.db.execute("LOCK TABLE conversation_participant")
        late = asyncio.create_task(resuming[0].call(client.Resume(epoch="", versions={}), server.Resumed))
        await until(lambda: len(worker.admission) == 1)
        with pytest.raises(InvalidStatus, match="503"):
            await Client(world.url, charles.token).open()
        # The share of this client has no place left, and its resume is handled without one.
        others = asyncio.create_task(resuming[1].call(client.Resume(epoch="", versions={}), server.Resumed))
    await asyncio.gather(late, others)
    await until(lambda: len(worker.admission) == 0)
    await world.connect(charles)
    for one in silent:
        assert await one.closed() == CloseCode.WITH_TOKEN


async def test_client_that_does_not_read_keeps_no_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = world.workers[0].app
    ada = await world.user("Ada")
    await world.channel(await world.connect(ada))
    is_slow = True
    monkeypatch.setattr(WebSocket, "is_behind", property(lambda one: is_slow and one.receiver.attached))
    slow = await world.connect(ada)  # has its first page, which it appears not to read
    entering = [one for one in worker.hub.online_users.sockets(ada.id) if one._entering is not None]  # type: ignore[attr-defined]  # noqa: SLF001
    assert (len(entering), len(worker.admission)) == (1, 0)
    is_slow = False
    await slow.synced()
    assert entering[0]._entering is None  # type: ignore[attr-defined]  # noqa: SLF001


async def test_typing_is_shed_first_then_presence_then_receipts_and_never_messages(settings: Settings) -> None:
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        channel = await world.channel(ada)
        first = await sent(ada, channel)
        load_shedding = world.workers[0].app.load_shedding
        frames = (
            client.Typing(conversation_id=channel),
            client.SetPresence(status="busy"),
            client.Read(conversation_id=channel, message_id=first),
        )
        for level, late in enumerate((0.0, *LATE_SECONDS)):
            load_shedding.late = late
            codes = []
            for frame in frames:
                answer = await ada.ask(frame)
                codes.append(answer.code if isinstance(answer, Error) else None)
                if isinstance(answer, Error):
                    assert answer.retry_after_ms is not None
            assert codes == [ErrorCode.UNAVAILABLE] * level + [None] * (3 - level)
            load_shedding.late = late
            await ada.call(message(channel), server.Sent)


async def test_worker_detects_its_overload_and_recovers(world: World) -> None:
    load_shedding = world.workers[0].app.load_shedding
    ada = await world.connect(await world.user("Ada"))
    channel = await world.channel(ada)
    async with asyncio.timeout(20):
        while load_shedding.level < 3:
            time.sleep(0.6)  # noqa: ASYNC251 - block the loop on purpose
            await asyncio.sleep(0)
        assert isinstance(await ada.ask(client.Typing(conversation_id=channel)), Error)
        while load_shedding.level:
            await asyncio.sleep(0.05)
    await ada.call(client.Typing(conversation_id=channel))
