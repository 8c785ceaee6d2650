"""Comparisons with PostgreSQL: spread over a round, fast after an outage, and bounded in what they start."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

import pytest

from protocol.ids import ConversationId, UserId
from server.hub import rounds, topics
from server.hub.online_users import RECHECKS_AT_ONCE
from server.hub.rounds import AT_ONCE, Rounds, follow_up
from server.hub.topics import FETCHES_AT_ONCE, Fetched, Topic
from tests.world import World, until


class Counted:
    """Rounds over some numbers, and the batches that were compared, with their times."""

    def __init__(self, count: int, *, seconds: float = 3_600.0) -> None:
        self.batches: list[list[int]] = []
        self.times: list[float] = []
        self.is_urgent = False
        self.failures = 0
        self.may_compare = asyncio.Event()
        self.may_compare.set()
        self.rounds = Rounds[int](
            lambda: range(count), self._compare, seconds=lambda: seconds, is_urgent=lambda: self.is_urgent
        )

    async def _compare(self, batch: Sequence[int]) -> None:
        self.times.append(time.monotonic())
        self.batches.append(list(batch))
        await self.may_compare.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError

    @property
    def compared(self) -> list[int]:
        return [number for batch in self.batches for number in batch]


@pytest.fixture
async def running() -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks: list[asyncio.Task[None]] = []
    yield tasks
    for task in tasks:
        task.cancel()


def run(counted: Counted, running: list[asyncio.Task[None]]) -> None:
    running.append(asyncio.create_task(counted.rounds.run()))


async def test_slow_round_is_spread_over_its_time(
    running: list[asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FAST_SECONDS", 0.01)
    counted = Counted(3 * AT_ONCE + 1, seconds=0.4)
    run(counted, running)
    await until(lambda: len(counted.batches) >= 4)
    assert counted.compared[: 3 * AT_ONCE + 1] == list(range(3 * AT_ONCE + 1))
    assert max(map(len, counted.batches)) == AT_ONCE
    pauses = [later - earlier for earlier, later in zip(counted.times[:3], counted.times[1:4], strict=True)]
    assert min(pauses) > 0.05, "a fourth of the round lies between two batches, less what another program took"


async def test_fast_round_follows_each_request_and_is_not_repeated(
    running: list[asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FAST_SECONDS", 0.05)
    counted = Counted(2 * AT_ONCE)
    counted.may_compare.clear()
    run(counted, running)
    counted.rounds.soon()
    await until(lambda: len(counted.batches) == 1)
    # A request during a round may concern what that round has compared already. Several share the next round.
    counted.rounds.soon()
    counted.rounds.soon()
    counted.may_compare.set()
    await until(lambda: len(counted.batches) == 4)
    assert counted.compared == 2 * list(range(2 * AT_ONCE))
    assert not counted.rounds._is_fast()  # noqa: SLF001


async def test_urgent_rounds_have_a_min_interval(
    running: list[asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FAST_SECONDS", 0.05)
    counted = Counted(1)
    counted.is_urgent = True
    run(counted, running)
    await until(lambda: len(counted.batches) == 4)
    assert counted.times[3] - counted.times[0] > 0.1


async def test_failed_round_is_repeated_soon(
    running: list[asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FAST_SECONDS", 0.01)
    monkeypatch.setattr(rounds, "RETRY_SECONDS", 0.01)
    counted = Counted(2 * AT_ONCE)
    counted.failures = 2
    run(counted, running)
    counted.rounds.soon()
    await until(lambda: len(counted.batches) == 4)
    assert [batch[0] for batch in counted.batches] == [0, 0, 0, AT_ONCE]


async def test_followed_up_tasks_are_bounded() -> None:
    active, most = 0, 0

    async def work() -> None:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0)
        active -= 1

    await follow_up((asyncio.create_task(work()) if number % 2 else None for number in range(40)), at_once=3)
    assert (most, active) == (3, 0)


async def test_comparison_starts_few_fetches_concurrently(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an outage during which all conversations changed."""
    followed = world.workers[0].app.hub.topics
    active, counts = 0, list[int]()

    async def since(*_: object) -> Fetched | None:
        nonlocal active
        active += 1
        counts.append(active)
        await asyncio.sleep(0)
        active -= 1
        return None

    async def versions(conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
        return dict.fromkeys(conversation_ids, 1_000)

    monkeypatch.setattr(topics, "GAP_SECONDS", 0.0)
    monkeypatch.setattr(followed._store, "since", since)  # noqa: SLF001
    monkeypatch.setattr(followed._store, "versions", versions)  # noqa: SLF001
    ids = [ConversationId(uuid4()) for _ in range(100)]
    for conversation_id in ids:
        topic = followed._topics[conversation_id] = Topic(conversation_id)  # noqa: SLF001
        topic.quiet_at = asyncio.get_running_loop().time()  # it is not closed meanwhile
    await followed.compare(ids)
    assert (len(counts), max(counts)) == (100, FETCHES_AT_ONCE)


async def test_comparison_starts_few_rechecks_concurrently(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an outage during which all users had news."""
    people = await world.users(*(f"P{number}" for number in range(RECHECKS_AT_ONCE + 4)))
    for person in people:
        await world.connect(person)
    online_users = world.workers[0].app.hub.online_users
    await until(lambda: not online_users._rechecks)  # noqa: SLF001
    recheck, counts = online_users.recheck, list[int]()

    def counted(user_id: UserId) -> None:
        recheck(user_id)
        users = online_users._users.values()  # noqa: SLF001
        counts.append(sum(user.recheck is not None and not user.recheck.done() for user in users))

    monkeypatch.setattr(online_users, "recheck", counted)
    await world.db.execute('UPDATE "user" SET version = version + 1')
    await online_users.compare([person.id for person in people])
    assert (len(counts), max(counts)) == (len(people), RECHECKS_AT_ONCE)
