"""Messages with due notifications: order, pauses, bounds and failed pages."""

import asyncio
import random
from collections.abc import Callable
from functools import partial

import pytest

from protocol.ids import ConversationId, MessageId, UserId, uuid7
from server.core.tally import Tally
from server.db.database import Db
from server.jobs import push_due
from server.jobs.push_drops import Drops
from server.jobs.push_due import FIRST_PAGE, NEXT_PAGE, DueMessages
from server.queries import push
from server.queries.push import FIRST, PushPage
from tests.world import World


class Desk:
    """A `DueMessages` whose messages are due immediately, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.drops = Drops()
        self.due = DueMessages(self.drops, clock=lambda: self.now)

    def add(self, here: ConversationId, sender: UserId, count: int = 1) -> list[MessageId]:
        ids = [MessageId(uuid7()) for _ in range(count)]
        for one in ids:
            self.due.add(here, sender, one, seconds=0.0)
        return ids

    def begin(self) -> list[PushPage]:
        return self.due.begin(self.now)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def place() -> ConversationId:
    return ConversationId(uuid7())


def user() -> UserId:
    return UserId(uuid7())


def test_large_conversation_delays_no_other_and_pauses(desk: Desk) -> None:
    crowd, pair, more = place(), place(), user()
    desk.add(crowd, user())
    (first,) = desk.begin()
    desk.due.done(first, more, limit=FIRST_PAGE, seconds=0.1)
    said = desk.add(pair, user())
    assert desk.begin() == [PushPage(pair, FIRST, tuple(said))], (
        "it does not wait for further pages of the large conversation"
    )
    second = desk.due.further()
    assert second == first._replace(after=more)
    desk.due.done(second, more, limit=NEXT_PAGE, seconds=0.1)
    assert desk.due.further() is None
    assert desk.due.wait() == pytest.approx(push_due.PAGE_PAUSE_FACTOR * 0.1)
    desk.now += push_due.PAGE_PAUSE_FACTOR * 0.1
    third = desk.due.further()
    assert third is not None
    desk.due.done(third, None, limit=NEXT_PAGE, seconds=0.1)
    desk.add(crowd, user())
    assert desk.begin() == [], "a large conversation pauses after a pass"
    desk.now += push_due.PAUSE_PER_CANDIDATE * (FIRST_PAGE + NEXT_PAGE) + 0.001
    assert [one.conversation_id for one in desk.begin()] == [crowd]


def test_full_table_drops_messages_of_the_sender_with_the_most(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_due, "MAX_WAITING", 12)
    monkeypatch.setattr(push_due, "MAX_OF_SENDER", 10)
    monkeypatch.setattr(push_due, "MAX_TOGETHER", 5)
    here, greedy, ada = place(), user(), user()
    hers = desk.add(here, ada)
    desk.due.add(here, ada, hers[0], seconds=0.0)
    theirs = desk.add(here, greedy, 11)
    assert (len(desk.due), desk.drops.counts) == (11, {"messages_full": 1})
    elsewhere = [desk.add(place(), user()) for _ in range(4)]
    assert (len(desk.due), desk.drops.counts) == (12, {"messages_full": 4})
    pages = desk.begin()
    assert pages[0] == PushPage(here, FIRST, (*hers, *theirs[-5:])), "the newest of the greedy sender, all of others"
    assert [one.message_ids for one in pages[1:]] == [tuple(one) for one in elsewhere]
    assert desk.drops.counts == {"messages_full": 4, "replaced": 2}


def test_failed_page_is_retried_alone_and_finally_dropped(desk: Desk) -> None:
    for _ in range(3):
        desk.add(place(), user(), 2)
    pages = desk.begin()
    assert len(pages) == 3
    for one in pages:
        desk.due.failed(one)
    assert (desk.begin(), desk.due.further()) == ([], None)
    for number in range(push_due.MAX_TRIES):
        desk.now += push_due.RETRY_SECONDS
        page = desk.due.further()
        assert page is not None
        if number == 1:
            desk.due.done(page, None, limit=NEXT_PAGE, seconds=0.0)
            continue
        desk.due.failed(page)
    assert (len(desk.due), desk.drops.counts) == (4, {}), "one page succeeded"
    desk.now += push_due.MAX_PAUSE
    while (page := desk.due.further()) is not None:
        desk.due.failed(page)
        desk.now += push_due.RETRY_SECONDS
    assert (len(desk.due), desk.drops.counts) == (0, {"database": 4})
    desk.add(place(), user())
    desk.due.forget(desk.now)
    assert (len(desk.due), desk.begin()) == (0, [])


def act(
    desk: Desk, rng: random.Random, pages: list[PushPage], places: list[ConversationId], people: list[UserId]
) -> None:
    """Do a random step of a worker. `pages` are the pages that are in flight."""
    choice = rng.random()
    if choice < 0.6:
        desk.add(rng.choice(places), rng.choice(people))
    elif choice < 0.7:
        pages += desk.begin()
    elif choice < 0.75 and not pages:
        desk.due.forget(desk.now - rng.random())
    elif pages and rng.random() < 0.2:
        desk.due.failed(pages.pop())
    elif pages:
        desk.due.done(pages.pop(), user() if rng.random() < 0.3 else None, limit=FIRST_PAGE, seconds=0.01)
    elif (further := desk.due.further()) is not None:
        pages.append(further)


def test_count_of_waiting_messages_is_right_after_any_steps() -> None:
    """The count equals the messages, every pass ends, and nothing is left at the end."""
    rng = random.Random(14)
    desk = Desk()
    places, people = [place() for _ in range(5)], [user() for _ in range(5)]
    pages: list[PushPage] = []
    for _ in range(5_000):
        act(desk, rng, pages, places, people)
        desk.now += 0.01
        waiting = [one for here in desk.due._conversations.values() for one in here.messages]  # noqa: SLF001
        assert len(waiting) == len(set(waiting)) == len(desk.due)
    for _ in range(1_000):
        desk.now += push_due.MAX_PAUSE
        for page in [*pages, *desk.begin()]:
            desk.due.done(page, None, limit=FIRST_PAGE, seconds=0.01)
        pages = [] if (further := desk.due.further()) is None else [further]
    desk.begin()
    assert (len(desk.due), desk.due._conversations, desk.due._senders) == (0, {}, {})  # noqa: SLF001


def test_tally_finds_the_key_with_the_highest_count() -> None:
    rng = random.Random(14)
    tally: Tally[int] = Tally()
    counts = dict.fromkeys(range(10), 0)
    for _ in range(5_000):
        key = rng.randrange(10)
        change = -1 if counts[key] and rng.random() < 0.5 else 1
        counts[key] += change
        tally.add(key, change)
        assert all(tally[one] == counts[one] for one in counts)
        if any(counts.values()):
            assert counts[tally.most()] == max(counts.values())


async def test_further_pages_are_read_while_first_pages_are_always_due(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slow database, first pages of other conversations are due whenever some were read."""
    notices, desk = world.workers[0].app.web_push, Desk()
    crowd, asked = place(), list[PushPage]()
    first = desk.add(crowd, user())

    async def read(pages: list[PushPage], limit: int) -> None:
        asked.extend(pages)
        desk.now += 1.0
        for one in pages:
            is_last = one.conversation_id != crowd or len(asked) >= 10
            desk.due.done(one, None if is_last else UserId(uuid7()), limit=limit, seconds=0.1)
        if len(asked) < 100:
            desk.add(place(), user())
        await asyncio.sleep(0)

    async def has_endpoints(_: Db) -> bool:
        return True

    monkeypatch.setattr(push, "is_anybody_there", has_endpoints)
    monkeypatch.setattr(desk.due, "begin", partial(_begin, desk, desk.due.begin))
    monkeypatch.setattr(notices, "_due", desk.due)
    monkeypatch.setattr(notices, "_read_pages", read)
    async with asyncio.timeout(5):
        await notices.push_due()
    pages = [number for number, one in enumerate(asked) if one.message_ids == tuple(first)]
    assert pages[:2] == [0, 1], "the first page and its next page come without a pause"
    assert len(asked) >= 100
    assert pages[-1] <= 10
    assert len(pages) >= 4


def _begin(desk: Desk, begin: Callable[[float], list[PushPage]], _: float) -> list[PushPage]:
    return begin(desk.now)
