"""Batches: a bad item does not fail or delay others in its statement, and users take turns."""

# ruff: noqa: SLF001 - statements and queues are only visible in private attributes
import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest

from protocol import server
from protocol.codec import encode
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from server.app import background
from server.app.app import App
from server.auth.tickets import Ticket
from server.auth.tokens import token_hash
from server.core.config import Settings
from server.core.faults import OF_SOME
from server.db import database
from server.fairness.batcher import Batcher, Slow
from server.fairness.lanes import HELD, Held, Lanes
from server.fairness.lock_queue import Places
from server.http import endpoints
from server.hub import comparisons
from server.queries import batches, sending
from server.queries.push import PushPost
from server.queries.sending import NotStored, Outgoing, Source
from tests.test_held_rows import schedule
from tests.test_send_waits import SECONDS, Stage
from tests.world import (
    UserSession,
    World,
    all_sent,
    are_stored,
    http_client,
    message,
    new_messages,
    received_message,
    refused,
    sent,
    until,
)

OTHERS = 40
"""Valid messages in one statement with an invalid one."""
HALVINGS = 6
"""Max statements that store the valid ones, if the invalid one fails in an unforeseen way."""


class BadMessages(NamedTuple):
    """Invalid messages, created by `create`. The valid ones beside them are stored by at most `most` statements."""

    create: Callable[["Crowd"], Awaitable[list[Outgoing]]]
    most: int = 1


async def _taken_elsewhere(stage: "Crowd") -> list[Outgoing]:
    there = await sent(stage.author, stage.group)
    return [_out(stage.charles, stage.own, there)]


async def _taken_by_another_user(stage: "Crowd") -> list[Outgoing]:
    there = await sent(stage.other, stage.elsewhere)
    return [_out(stage.charles, stage.own, there)]


async def _twice(stage: "Crowd") -> list[Outgoing]:
    return [_out(stage.charles, stage.own, MessageId(uuid7()))] * 2


async def _twice_in_two_conversations(stage: "Crowd") -> list[Outgoing]:
    new = MessageId(uuid7())
    return [_out(stage.charles, stage.own, new), _out(stage.charles, stage.group, new)]


async def _twice_by_two_senders(stage: "Crowd") -> list[Outgoing]:
    new = MessageId(uuid7())
    return [_out(stage.charles, stage.group, new), _out(stage.ada, stage.group, new)]


async def _to_a_missing_conversation(stage: "Crowd") -> list[Outgoing]:
    return [_out(stage.charles, about, MessageId(uuid7())) for about in (ConversationId(uuid7()), stage.elsewhere)]


async def _about_a_missing_message(stage: "Crowd") -> list[Outgoing]:
    new, nothing = MessageId(uuid7()), MessageId(uuid7())
    return [
        _out(stage.charles, stage.own, new, parent_message_id=nothing),
        _out(stage.charles, stage.own, MessageId(uuid7()), quoted_message_id=new),
        Outgoing(stage.charles.id, message(stage.own), source=Source(stage.own, nothing, stage.ada.id, None)),
        Outgoing(stage.charles.id, message(stage.own), source=Source(stage.own, nothing, UserId(nothing), None)),
        Outgoing(UserId(uuid7()), message(stage.own)),
    ]


async def _unforeseen(stage: "Crowd") -> list[Outgoing]:
    return [Outgoing(stage.charles.id, message(stage.own, "\0"))]


async def _out_of_range(stage: "Crowd") -> list[Outgoing]:
    await stage.world.db.execute("UPDATE conversation SET message_count = 2147483647 WHERE id = $1", stage.own)
    return [Outgoing(stage.charles.id, message(stage.own))]


def _out(who: UserSession, about: ConversationId, message_id: MessageId, **fields: Any) -> Outgoing:
    frame = msgspec.structs.replace(message(about, **fields), message_id=message_id)
    return Outgoing(who.id, frame)


BAD_MESSAGES = {
    "id taken in another conversation of the sender": BadMessages(_taken_elsewhere),
    "id taken in a conversation of other users": BadMessages(_taken_by_another_user),
    "id twice": BadMessages(_twice),
    "id twice in two conversations": BadMessages(_twice_in_two_conversations),
    "id twice by two senders": BadMessages(_twice_by_two_senders),
    "no such conversation, or not a participant": BadMessages(_to_a_missing_conversation),
    "no such message or user": BadMessages(_about_a_missing_message),
    "content that PostgreSQL refuses": BadMessages(_unforeseen, HALVINGS),
    "number out of range of its column": BadMessages(_out_of_range, HALVINGS),
}
# In autocommit mode each statement has its own transaction, whose id is in `xmin`.
STATEMENTS = "SELECT count(DISTINCT xmin::text), count(*) FROM message WHERE id = ANY($1)"


class Crowd(Stage):
    """The stage, with a channel of the sender of invalid messages."""

    async def begin(self) -> None:
        await super().begin()
        self.own = await self.world.channel(self.sender, title="Own")
        self.sends = self.world.workers[0].app._sends

    def submit(self, *batch: Outgoing) -> list["asyncio.Future[Any]"]:
        return [asyncio.ensure_future(self.sends.submit(one)) for one in batch]

    def good(self, count: int) -> list[Outgoing]:
        return [Outgoing(self.mary.id, message(self.elsewhere)) for _ in range(count)]

    async def statements(self, good: Sequence[Outgoing]) -> int:
        """Assert that these messages are stored, and return by how many statements."""
        row = await self.world.db.fetchrow(STATEMENTS, [one.frame.message_id for one in good])
        assert row is not None
        assert row[1] == len(good)
        return int(row[0])


@asynccontextmanager
async def staged(settings: Settings) -> AsyncIterator[tuple[World, Crowd]]:
    """One worker, and the crowd on its stage."""
    async with World(settings, workers=1) as world:
        stage = Crowd(world)
        await stage.begin()
        yield world, stage


async def test_invalid_message_causes_no_further_statement_for_the_others(settings: Settings) -> None:
    async with staged(settings) as (_, stage):
        found = {}
        for name, kind in BAD_MESSAGES.items():
            bad, good = await kind.create(stage), stage.good(OTHERS)
            (first,) = stage.submit(*stage.good(1))
            before, ends = stage.submit(*good[:5]), stage.submit(*bad)
            after = stage.submit(*good[5:])
            async with asyncio.timeout(SECONDS):
                assert are_stored(await asyncio.gather(first, *before, *after)), name
                stored = await asyncio.gather(*ends, return_exceptions=True)
            # Of two messages with one id, the first one is stored if the sender may send it.
            assert [one for one in stored if isinstance(one, sending.Stored)] == stored[: name.startswith("id twice")]
            found[name] = await stage.statements(good)
        assert {name: count for name, count in found.items() if count > BAD_MESSAGES[name].most} == {}


TAKE = """
INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version)
SELECT $2, id, created_by, 'Taken', 100, 100 FROM conversation WHERE id = $1
"""
WAITS = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted)"


async def test_message_whose_id_is_taken_concurrently_causes_one_statement_for_the_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SHARED_LOCK_MS", 1_000)
    async with staged(settings) as (world, stage):
        bad, good = message(stage.own), stage.good(OTHERS)
        async with world.db.transaction():
            await world.db.execute(TAKE, stage.group, bad.message_id)
            waiting = stage.submit(*stage.good(1), *good[:5], Outgoing(stage.charles.id, bad), *good[5:])
            async with asyncio.timeout(SECONDS):
                while not await world.db.fetchval(WAITS):
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(SECONDS):
            stored = await asyncio.gather(*waiting)
        assert [place for place, one in enumerate(stored) if one == NotStored("duplicate")] == [6]
        assert await stage.statements(good) == 1


# Storing one message waits for an advisory lock.
SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(64);
    RETURN new;
END $$;
CREATE TRIGGER slow BEFORE INSERT ON message FOR EACH ROW WHEN (new.content = 'Slow') EXECUTE FUNCTION slow()
"""


async def test_slow_message_delays_only_its_conversation(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SENDING_SECONDS", 0.2)
    async with staged(settings) as (world, stage):
        await world.db.execute(SLOW)
        for count in (0, OTHERS):  # alone, and with others
            await world.db.execute("SELECT pg_advisory_lock(64)")
            slow = Outgoing(stage.charles.id, message(stage.own, "Slow"))
            good = stage.good(count)
            first = stage.submit(*stage.good(1))
            (stuck,), others = stage.submit(slow), stage.submit(*good)
            async with asyncio.timeout(SECONDS):
                assert are_stored(await asyncio.gather(*first, *others))
                # Later messages do not wait either.
                assert are_stored(await asyncio.gather(*stage.submit(*stage.good(3))))
            assert not stuck.done()
            await world.db.execute("SELECT pg_advisory_unlock(64)")
            assert are_stored([await asyncio.wait_for(stuck, SECONDS)])


# Committing a message takes long, as with a slow disk or a synchronous standby.
LATE = """
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON message DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
WHEN (new.content = 'Late') EXECUTE FUNCTION late()
"""


async def test_slow_commit_does_not_count_as_a_slow_statement(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SENDING_SECONDS", 0.2)
    async with staged(settings) as (world, stage):
        await world.db.execute(LATE)
        late, good = Outgoing(stage.charles.id, message(stage.own, "Late")), stage.good(OTHERS)
        async with asyncio.timeout(SECONDS):
            assert are_stored(await asyncio.gather(*stage.submit(*stage.good(1), late, *good)))
        assert await stage.statements([late, *good]) == 1


async def test_frozen_statement_fails_one_batch_and_its_connection_is_discarded(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.3)
    async with staged(settings) as (world, stage):
        await asyncio.gather(*stage.submit(*stage.good(2)))
        pool = world.workers[0].app._database._state.sending
        (frozen,) = pool._free
        pid = frozen.get_server_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            (first,), others = stage.submit(*stage.good(1)), stage.submit(*(good := stage.good(OTHERS)))
            async with asyncio.timeout(SECONDS):
                with pytest.raises(TimeoutError):
                    await first
                assert are_stored(await asyncio.gather(*others))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert frozen not in pool._free
        assert await stage.statements(good) == 1


async def test_repeated_frame_after_an_unknown_outcome_is_notified_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(settings) as (world, stage):
        store, due = sending.send_plain, world.workers[0].app.web_push._due

        async def lost(db: Any, items: list[Outgoing]) -> Any:
            await store(db, items)
            raise TimeoutError  # after the commit

        frame = message(stage.group, "In doubt")
        with monkeypatch.context() as lose, refused(ErrorCode.UNAVAILABLE, None):
            lose.setattr(sending, "send_plain", lost)
            await stage.author.call(frame, server.Sent)
        before = len(due)
        for _ in range(3):
            await stage.author.call(frame, server.Sent)
            assert len(due) == before + 1
        # The outcome of this message is known. It is notified once, too.
        await stage.author.call(again := message(stage.group, "Again"), server.Sent)
        await stage.author.call(again, server.Sent)
        assert len(due) == before + 2

        async def away(db: Any, items: list[Outgoing]) -> Any:  # noqa: ARG001 - same signature
            raise TimeoutError  # before the statement

        # This message is stored by the repeated frame.
        frame = message(stage.group, "Not stored")
        with monkeypatch.context() as lose, refused(ErrorCode.UNAVAILABLE, None):
            lose.setattr(sending, "send_plain", away)
            await stage.author.call(frame, server.Sent)
        for _ in range(3):
            await stage.author.call(frame, server.Sent)
            assert len(due) == before + 3
        # This message was stored and notified before. A repeated frame that fails does not notify again.
        await stage.author.call(frame := message(stage.group, "Stored"), server.Sent)
        await world.db.execute(
            "UPDATE message SET created_at = created_at - interval '1 minute' WHERE content = 'Stored'"
        )
        due.forget(time.monotonic() + 3_600)
        with monkeypatch.context() as lose, refused(ErrorCode.UNAVAILABLE, None):
            lose.setattr(sending, "send_plain", away)
            await stage.author.call(frame, server.Sent)
        await stage.author.call(frame, server.Sent)
        assert len(due) == 0


async def test_message_with_an_unknown_outcome_is_delivered_once_by_the_comparison_of_versions(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each device, with and without a repeated frame, also for messages stored by one statement."""
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 3_600.0)
    monkeypatch.setattr(comparisons, "COMPARE_USERS_SECONDS", 3_600.0)
    monkeypatch.setattr(comparisons, "HEARTBEAT_SECONDS", 3_600.0)
    async with staged(settings) as (world, stage):
        devices = [stage.author, stage.sender, *[await world.connect(who) for who in (stage.ada, stage.charles)]]
        frames = [message(stage.group, "In doubt") for _ in devices]
        store, runs = sending.send_plain, []

        async def lost(db: Any, items: list[Outgoing]) -> Any:
            await store(db, items)
            runs.append(len(items))
            raise TimeoutError  # after the commit

        def received() -> list[list[MessageId]]:
            return [[one.id for one in new_messages(device) if one.content == "In doubt"] for device in devices]

        with monkeypatch.context() as lose:
            lose.setattr(sending, "send_plain", lost)
            answers = await asyncio.gather(*(one.ask(frame) for one, frame in zip(devices, frames, strict=True)))
        assert [getattr(answer, "code", None) for answer in answers] == [ErrorCode.UNAVAILABLE] * 4
        assert sum(runs) == 4
        for one, frame in zip(devices[:2], frames[:2], strict=True):
            await one.call(frame, server.Sent)
            await one.call(frame, server.Sent)
        await asyncio.gather(*(device.synced() for device in devices))
        assert received() == [[]] * 4
        world.workers[0].app.hub.comparisons.soon()
        await until(lambda: all(len(ids) == len(frames) for ids in received()))
        last = await sent(stage.author, stage.group, "After them")
        for device in devices:
            await received_message(device, last)
        assert [sorted(ids) for ids in received()] == [sorted(frame.message_id for frame in frames)] * 4


def _several(items: list[int], error: type[BaseException]) -> None:
    if len(items) > 1:
        raise error


def _deadlock(items: list[int], which: int) -> None:
    if which in items:
        raise asyncpg.DeadlockDetectedError("deadlock detected")


def _slow(items: list[int], which: range) -> None:
    if set(items) & set(which):
        raise Slow


# For 69 items: what a run does, the sizes of the runs, and how many items fail. The first run has one item, the next
# one 64.
FAILURES: dict[str, tuple[Callable[[list[int]], object], list[int], int]] = {
    "too few outcomes": (lambda items: items.pop() and None if len(items) > 1 else None, [1, 64, 4], 68),
    "a cancellation": (lambda items: _several(items, asyncio.CancelledError), [1, 64, 4], 68),
    "a lost database": (lambda items: _several(items, TimeoutError), [1, 64, 4], 68),
    "a full disk": (lambda items: _several(items, asyncpg.DiskFullError), [1, 64, 4], 68),
    "a deadlock of one": (lambda items: _deadlock(items, 17), [1, 64, 32, 16, 16, 8, 4, 2, 1, 1, 2, 4, 8, 32, 4], 1),
    "all slow": (lambda items: _slow(items, range(1, 69)), [1, 64, 8, 1, 1, 4, 1, 1], 68),
    "one slow": (lambda items: _slow(items, range(17, 18)), [1, 64, *[8] * 3, *[1] * 8, *[8] * 5, 4], 1),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_failed_work_leaves_no_item_waiting(name: str) -> None:
    happen, runs, failed = FAILURES[name]
    asked: list[int] = []

    async def work(items: list[int]) -> list[int]:
        await asyncio.sleep(0)
        outcomes = list(items)
        happen(outcomes)
        return outcomes

    batcher: Batcher[int, int] = Batcher(counted(work, asked), most=64)
    async with asyncio.timeout(SECONDS):
        answers = await asyncio.gather(*(batcher.submit(one) for one in range(69)), return_exceptions=True)
    assert asked == runs
    assert sum(isinstance(one, Exception) for one in answers) == failed
    assert not any(isinstance(one, asyncio.CancelledError) for one in answers)
    assert await batcher.submit(0) == 0


# ------------------------------------------------------------------------------------------ statements that read


class Read(NamedTuple):
    """A batched query: how to submit an item, a valid item, and items without a result."""

    batcher: Batcher[Any, Any]
    ask: Callable[[Any], Awaitable[Any]]
    good: Any
    bad: Sequence[Any]


async def _reads(world: World, ada: UserSession, about: ConversationId) -> dict[str, Read]:
    app = world.workers[0].app
    hub_store: Any = app.hub.topics._store
    sessions, tickets, notices = app.sessions, app._tickets, app.web_push
    session_id = await world.db.fetchval("SELECT id FROM session WHERE token = $1", token_hash(ada.token))
    (ticket,) = await tickets.issue([Ticket(session_id, 1)])
    nobody = UserId(uuid7())
    return {
        "versions": Read(hub_store._versions, hub_store.versions, [about], [[], [nobody], [nobody, nobody]]),
        "users": Read(hub_store._users, hub_store.user_versions, [ada.id], [[], [nobody], [nobody, nobody]]),
        "memberships": Read(hub_store.memberships, hub_store.memberships.submit, ada.id, [nobody, UserId(about)]),
        "tokens": Read(sessions._lookups, sessions.authenticate, ada.token, ["", "\0", "x" * 4096, "\N{SNOWMAN}"]),
        "sessions": Read(sessions._returns, sessions._returns.submit, session_id, [nobody]),
        "looks at tickets": Read(tickets._lookups, tickets.find, ticket, ["", "ticket.\0", "ticket." + "x" * 4096]),
        "tickets": Read(tickets._returns, tickets.redeem, ticket, ["", "ticket.\0", "ticket." + "x" * 4096]),
        "posts": Read(
            notices._reads,
            notices._read_one,
            None,
            [PushPost(ada.id, end, about, MessageId(nobody)) for end in ("", "https://x.example/\N{SNOWMAN}")],
        ),
    }


async def test_invalid_item_causes_no_further_query_for_the_others(settings: Settings) -> None:
    async with World(settings, workers=1) as world:
        (ada,) = await world.users("Ada")
        about = await world.channel(await world.connect(ada))
        reads = await _reads(world, ada, about)
        for name, read in reads.items():
            runs: list[int] = []
            answers: list[Any] = []
            work = read.batcher._work
            asked = [read.bad[0], *read.bad, *([] if read.good is None else [read.good])]
            async with asyncio.timeout(SECONDS):
                while sum(runs) != len(asked):  # jobs and new connections query, too
                    while read.batcher._is_running:
                        await asyncio.sleep(0)
                    runs.clear()
                    read.batcher._work = counted(work, runs)
                    answers = await asyncio.gather(*(read.ask(one) for one in asked), return_exceptions=True)
                    read.batcher._work = work
            assert read.good is None or not (answers[-1] is None or isinstance(answers[-1], Exception)), name
            assert runs == [1, len(asked) - 1], name
        app = world.workers[0].app
        # These batchers send messages, make changes, or write presence, and have no row in the table.
        each: list[Lanes[Any, Any, Any]] = [app._sends.lanes, app._reactions, app._votes, app._services.joins]
        writes = {app._sends._common, *(one for lanes in each for one in (lanes._light, lanes._heavy))}
        others = writes | {app.presence._flushes, app.presence._pending._tells}
        assert _batchers(app) - others == {read.batcher for read in reads.values()}, "each has a row"


def counted(work: Any, runs: list[int]) -> Any:
    """Wrap the work of a `Batcher` to record the number of items of each run."""

    async def work_counted(items: list[Any]) -> Any:
        runs.append(len(items))
        return await work(items)

    return work_counted


def _batchers(app: App) -> set[Batcher[Any, Any]]:
    """Return every `Batcher` reachable from a worker's app."""
    found: set[Batcher[Any, Any]] = set()
    seen: set[int] = set()
    todo: list[Any] = [app]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Batcher):
            found.add(one)
        elif type(one).__module__.startswith("server."):
            slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
            todo += [*getattr(one, "__dict__", {}).values(), *(getattr(one, name, None) for name in slots)]
    return found


# -------------------------------------------------------------------------------------------------------- turns


async def test_owners_of_items_take_turns() -> None:
    batches: list[list[str]] = []
    may_go_on = asyncio.Event()

    async def work(items: list[str]) -> list[str]:
        batches.append(items)
        await may_go_on.wait()
        return items

    batcher = Batcher(work, most=4, owner=lambda item: item[0])
    items = [*(f"a{number}" for number in range(9)), "b0", "b1", "c0"]
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    given_up = [asyncio.create_task(batcher.submit(item)) for item in ("d0", "d1", "d2")]
    await asyncio.sleep(0)
    for task in given_up[:2]:
        task.cancel()
    may_go_on.set()
    assert await asyncio.gather(*tasks, given_up[2]) == [*items, "d2"]
    assert batches == [["a0"], ["a1", "b0", "c0", "d2"], ["a2", "b1", "a3", "a4"], ["a5", "a6", "a7", "a8"]]


def in_lane(stage: Crowd) -> int:
    """Return how many messages wait for the locked group: one in flight, and those queued behind it."""
    return 1 + sum(map(len, stage.sends.lanes._lanes[stage.group]._waiting._lines.values()))


@pytest.mark.parametrize("kind", OF_SOME)
async def test_item_that_makes_postgresql_end_the_statement_fails_alone(kind: type[Exception]) -> None:
    async def work(items: list[int]) -> list[int]:
        await asyncio.sleep(0)
        if 7 in items:
            raise kind
        return items

    batcher = Batcher(work, most=64)
    outcomes = await asyncio.gather(*(batcher.submit(item) for item in range(20)), return_exceptions=True)
    assert [one for one in outcomes if isinstance(one, int)] == [item for item in range(20) if item != 7]
    assert isinstance(outcomes[7], kind)


async def test_items_of_one_key_wait_in_one_lane() -> None:
    """The item of a cancelled submitter stays in the queue and takes its turn."""
    batches: list[list[str]] = []
    is_free = asyncio.Event()

    async def wait(items: list[str]) -> list[str | Held]:
        batches.append(items)
        await is_free.wait()
        return list(items)

    async def run(items: list[str]) -> list[str | Held]:
        return [HELD] * len(items)

    lanes = Lanes[str, str, str](
        key=lambda item: item[0], owner=lambda item: item, run=run, wait=wait, places=Places(2, patience=9), most=4
    )
    first, second, third = [asyncio.create_task(lanes.submit(f"a{number}")) for number in range(3)]
    while not batches:
        await asyncio.sleep(0)
    first.cancel()
    while len(batches) < 2:
        await asyncio.sleep(0)
    for one in (second, third):
        one.cancel()
    await asyncio.wait([first, second, third])
    late = asyncio.create_task(lanes.submit("a3"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert batches == [["a0"], ["a1", "a2"]], "one run per key at a time"
    is_free.set()
    assert await late == "a3"
    assert batches[2:] == [["a3"]]
    assert lanes._lanes == {}


VERSIONS = "SELECT array_agg(sent_version) FROM message WHERE id = ANY($1)"


async def test_many_messages_of_one_user_delay_another_user_by_at_most_two_statements(settings: Settings) -> None:
    """With large and small messages, in the shared statement and in the lane of a locked conversation."""
    few = msgspec.structs.replace(settings, database_connections=4)
    async with World(few, workers=1) as world, AsyncExitStack() as all_of_them:
        stage = Crowd(world)
        await stage.begin()
        # Open all connections and prepare the statement before messages wait. A lane takes any connection.
        connect = world.workers[0].app._database.connection
        for db in [await all_of_them.enter_async_context(connect()) for _ in range(few.database_connections)]:
            await sending.send(db, [])
        await all_of_them.aclose()
        sizes = (10_000, 1)
        await asyncio.gather(*stage.submit(*(Outgoing(stage.ada.id, message(stage.group, "x" * one)) for one in sizes)))

        async def earlier(size: int, *, is_held: bool) -> int:
            """Return how many messages of one user are stored before that of another user."""
            flood = [Outgoing(stage.ada.id, message(stage.group, "x" * size)) for _ in range(150)]
            last = message(stage.group, "Last")
            held = world.db.transaction()
            if is_held:
                await held.start()
                await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE", stage.group)
            flooding = stage.submit(*flood)
            await asyncio.sleep(0)
            (bystander,) = stage.submit(Outgoing(stage.charles.id, last))
            if is_held:
                async with asyncio.timeout(SECONDS):
                    while len(stage.sends.lanes._lanes) != 1 or in_lane(stage) < len(flood):
                        await asyncio.sleep(0)
                await held.rollback()
            assert are_stored(await asyncio.gather(bystander, *flooding))
            (mine,) = await world.db.fetchval(VERSIONS, [last.message_id])
            return sum(one < mine for one in await world.db.fetchval(VERSIONS, [one.frame.message_id for one in flood]))

        for is_held in (False, True):
            for size, most in ((1, 64 // 2), (10_000, 3)):
                # One statement was in flight. In the next one, senders take turns. On a busy machine, the statement of
                # long messages may run twice before the other one, so the best of three rounds counts.
                counts = [await earlier(size, is_held=is_held)]
                while counts[-1] > most + 1 and len(counts) < 3:
                    counts.append(await earlier(size, is_held=is_held))
                assert min(counts) <= most + 1, (is_held, size, counts)


async def test_calls_of_one_user_in_flight_are_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "CALL_SECONDS", 0.5)
    few = msgspec.structs.replace(settings, connections_per_user=3)
    async with World(few, workers=1) as world, http_client(world.url, timeout=SECONDS) as http:
        stage = Crowd(world)
        await stage.begin()

        async def call(who: UserSession, about: ConversationId) -> int:
            headers = {"authorization": f"Bearer {who.token}"}
            return (await http.post("/v1/call", content=encode(message(about)), headers=headers)).status_code

        async with world.db.transaction():
            await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE", stage.group)
            calls = [asyncio.create_task(call(stage.ada, stage.group)) for _ in range(5)]
            done, _ = await asyncio.wait(calls, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
            assert [one.result() for one in done] == [503] * len(done) != []
            assert in_lane(stage) == 3
            assert await call(stage.mary, stage.elsewhere) == 200
        assert sorted([await one for one in calls]) == [200, 200, 200, 503, 503]
        # Calls that wait for a short time succeed.
        assert set(await asyncio.gather(*(call(stage.ada, stage.group) for _ in range(10)))) == {200}


IN_ORDER = "SELECT id, sender_id, content FROM message WHERE NOT is_system_message ORDER BY created_at"


async def test_senders_of_scheduled_messages_take_turns(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        scheduler = world.workers[0].app.scheduler
        many = await world.users("Ada", "Charles", "Jane")
        (mary,) = await world.users("Mary")
        owner = await world.connect(mary)
        elsewhere = await world.channel(owner)
        for one in many:
            flooder = await world.connect(one)
            own = await world.channel(flooder)
            for number in range(6):
                await schedule(flooder, own, f"{number}")
        last = await schedule(owner, elsewhere, "Mary")
        async with asyncio.timeout(SECONDS):
            await scheduler.send_due()
            await all_sent(scheduler)
        said = [tuple(row) for row in await world.db.fetch(IN_ORDER)]
        # One message of each earlier sender, and those in flight.
        assert [one[0] for one in said].index(last) <= len(many) + scheduler._most
        for one in many:
            assert [content for _, sender, content in said if sender == one.id] == [f"{number}" for number in range(6)]
