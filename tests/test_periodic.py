"""Periodic jobs: when they run, what they log, and that they finish."""

import asyncio
import logging
import random
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest
import redis

from protocol import client
from protocol.codec import now
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.values import ConversationSettings
from server.app import background
from server.core import periodic
from server.core.config import Settings
from server.core.failures import Failures
from server.core.faults import Away
from server.core.metrics import Metrics
from server.core.periodic import end, every
from server.core.throttle import AGAIN_SECONDS, Throttle
from server.db import database
from server.queries import (
    approaches,
    audit,
    erasure,
    expiry,
    presence,
    relationships,
    remains,
    scheduled,
    search_index,
    sessions,
)
from tests.world import World, message

SERVER = Path(__file__).parent.parent / "server"


async def test_failing_job_continues(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()
    tries = iter((ValueError("once"), None))

    async def job() -> None:
        if (error := next(tries, None)) is not None:
            raise error
        done.set()

    task = asyncio.create_task(every(0, job))
    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(done.wait(), 5)
    await end([task])
    assert "failed" in caplog.text
    assert task.cancelled()


OUTAGES = (
    TimeoutError(),
    ConnectionRefusedError(111, "Connect call failed"),
    asyncpg.CannotConnectNowError("the database system is starting up"),
    asyncpg.AdminShutdownError("terminating connection due to administrator command"),
    asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    asyncpg.InterfaceError("connection is closed"),
    asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
    asyncpg.QueryCanceledError("canceling statement due to statement timeout"),
    redis.exceptions.ConnectionError("Error 111 connecting to localhost:6379. Connection refused."),
)
DEFECTS = (
    ValueError("of ours"),
    asyncpg.UndefinedColumnError("column x does not exist"),
    asyncpg.InterfaceError("the server expects 1 argument for this query, 2 were passed"),
)


def test_repeated_failures_are_logged_once_a_minute_per_key() -> None:
    at = 0.0
    throttle: Throttle[str] = Throttle(clock=lambda: at)
    for minute in range(3):
        at = minute * AGAIN_SECONDS
        for key in ("a", "b"):
            assert [throttle.passes(key) for _ in range(50)] == [True] + [False] * 49
        at += AGAIN_SECONDS - 1
        assert not throttle.passes("a")
    throttle.clear()
    assert throttle.passes("a")


def test_alternating_failures_are_logged_as_often_as_one_kind(caplog: pytest.LogCaptureFixture) -> None:
    at = 0.0
    failures = Failures(logging.getLogger("test"), "the job", clock=lambda: at)
    for _ in range(50):
        failures.add(OUTAGES[0])
        failures.add(DEFECTS[0])
    assert [bool(record.exc_info) for record in caplog.records] == [False, True]
    at = AGAIN_SECONDS
    for _ in range(50):
        failures.add(OUTAGES[0])
        failures.add(DEFECTS[0])
    assert [bool(record.exc_info) for record in caplog.records] == [False, True, False, False]
    failures.end()
    failures.add(DEFECTS[0])
    assert caplog.records[-1].exc_info, "a first failure again"


@pytest.mark.parametrize(
    ("error", "is_defect"), [*((one, False) for one in OUTAGES), *((one, True) for one in DEFECTS)]
)
def test_outage_is_logged_in_one_line_and_defect_with_one_traceback(
    caplog: pytest.LogCaptureFixture, error: Exception, *, is_defect: bool
) -> None:
    at = 0.0
    failures = Failures(logging.getLogger("test"), "the job", clock=lambda: at)
    for _ in range(50):
        failures.add(error)
        failures.add(Away("logged where it was raised"))
    assert [bool(record.exc_info) for record in caplog.records] == [is_defect]
    assert caplog.records[0].levelno == (logging.ERROR if is_defect else logging.WARNING)
    at = AGAIN_SECONDS
    failures.add(error)
    failures.add(error)
    assert [bool(record.exc_info) for record in caplog.records] == [is_defect, False]
    failures.end()
    failures.add(error)
    assert [bool(record.exc_info) for record in caplog.records] == [is_defect, False, is_defect]
    for record in caplog.records:
        assert record.exc_info or "will be retried" in record.message or "database" in record.message


async def test_job_cancelled_by_the_database_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()
    tries: Iterator[Exception | None] = iter((TimeoutError(), asyncpg.QueryCanceledError("statement timeout"), None))

    async def job() -> None:
        if (error := next(tries, None)) is not None:
            raise error
        done.set()

    task = asyncio.create_task(every(0, job))
    await asyncio.wait_for(done.wait(), 5)
    await end([task])
    records = [record for record in caplog.records if "job failed" in record.message]
    assert [record.exc_info for record in records] == [None]


INTERVAL = 0.01


async def test_runs_longer_than_their_interval_are_counted_until_no_work_is_due(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    ran = asyncio.Event()
    portions = iter((True, True, False))

    async def slow() -> bool:
        """Do one of three batches, each of which takes less than the interval."""
        if (is_more_due := next(portions, None)) is None:
            ran.set()
            await asyncio.Event().wait()
        until = time.monotonic() + 0.4 * INTERVAL
        while time.monotonic() < until:
            await asyncio.sleep(0)
        return bool(is_more_due)

    async def quick() -> None:
        pass

    jobs = ((INTERVAL, slow), (60.0, quick))
    tasks = [asyncio.create_task(every(seconds, job, overruns=metrics.job_overruns)) for seconds, job in jobs]
    await asyncio.wait_for(ran.wait(), 5)
    await end(tasks)
    assert metrics.job_overruns == {"slow": 1}
    assert 'openchat_job_overruns_total{job="slow",worker="0"} 1.0' in metrics.page().decode()


async def test_search_index_is_tidied_by_one_worker_at_a_time(world: World) -> None:
    jobs = [worker.app.background.tidy for worker in world.workers]
    async with world.db.transaction():
        await world.db.execute(search_index.TIDY)
        # A second run would wait for the end of this transaction.
        await asyncio.wait_for(asyncio.gather(*(job() for job in jobs)), 5)
    await asyncio.gather(*(job() for job in jobs))


async def test_workers_that_start_together_run_their_jobs_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    done = asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def job() -> None:
        done.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(random, "random", lambda: 0.25)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    for is_spread, expected in ((True, [15.0]), (False, [])):
        slept.clear()
        done.clear()
        task = asyncio.create_task(every(60, job, is_spread=is_spread))
        await done.wait()
        await end([task])
        assert slept == expected


async def test_job_that_swallows_its_cancellation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "SWALLOWED_SECONDS", 0.01)
    swallowed = 0
    begun = asyncio.Event()

    async def job() -> None:
        nonlocal swallowed
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed += 1
            if swallowed == 3:
                raise

    task = asyncio.create_task(every(0, job))
    await begun.wait()
    await asyncio.wait_for(end([task]), 5)
    assert (task.cancelled(), swallowed) == (True, 3)


BATCH = 2
DUE = 5
"""More than two batches."""
STUCK = 3
"""More than a batch of rows that always fail and are due before all others."""
FAIL = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'never'; END $$
"""


class Backlog:
    """Rows that are due for each job of a worker, and the number that is left."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.db = world.db

    async def begin(self) -> None:
        ada, charles = await self.world.users("Ada", "Charles")
        self.ada, self.charles = ada.id, charles.id
        self.owner, self.member = await self.world.connect(ada), await self.world.connect(charles)
        await self.db.execute(FAIL)

    async def clear_expired(self) -> str:
        await self.db.execute(
            """INSERT INTO session (user_id, token, expires_at)
            SELECT $1, n::text, now() - interval '2 days' FROM generate_series(1, $2) n""",
            self.ada, DUE,
        )  # fmt: skip
        await self.db.execute(
            """INSERT INTO approach (from_user_id, to_user_id, kind, began_at)
            SELECT f, t, kind, now() - interval '2 days' FROM (VALUES ($1::uuid, $2::uuid), ($2, $1)) AS pair (f, t),
            unnest('{add,invite,friend}'::text[]) kind""",
            self.ada, self.charles,
        )  # fmt: skip
        return "SELECT (SELECT count(*) FROM session WHERE expires_at < now()) + (SELECT count(*) FROM approach)"

    async def expire_statuses(self) -> str:
        await self.db.execute(
            """INSERT INTO "user" (name, email, custom_status, custom_status_until)
            SELECT 's' || n, 's' || n || '@example.org', 'Busy', now() FROM generate_series(1, $1) n""",
            DUE,
        )  # fmt: skip
        return """SELECT count(*) FROM "user" WHERE custom_status IS NOT NULL"""

    async def erase_due(self) -> str:
        await self.db.execute(
            """INSERT INTO "user" (name, email, is_deleted, is_active, deleted_at)
            SELECT 'e' || n, 'e' || n || '@example.org', true, false, now() - interval '1 year' + n * interval '1 day'
            FROM generate_series(1, $1) n""",
            STUCK + DUE,
        )  # fmt: skip
        await self._fail_at("user", "name", [f"e{number + 1}" for number in range(STUCK)])
        return """SELECT count(*) FROM "user" WHERE name LIKE 'e%' AND erased_at IS NULL"""

    async def send_due(self) -> str:
        slow = await self._messages("slow", 1, ConversationSettings(slow_mode_seconds=3600))
        other = await self._messages("other", 1, ConversationSettings())
        for number in range(STUCK + DUE):
            await self.member.call(
                client.Schedule(
                    conversation_id=slow if number < STUCK else other,
                    message_id=MessageId(uuid7()),
                    content="Due",
                    send_at=now() + timedelta(hours=1),
                )
            )
        await self.db.execute(
            """UPDATE scheduled_message
            SET send_at = now() - interval '1 hour' * (1 + (conversation_id = $1)::integer)""",
            slow,
        )  # fmt: skip
        return "SELECT count(*) FROM scheduled_message WHERE status = 'waiting'"

    async def expire_due(self) -> str:
        settings = ConversationSettings(expire_after_seconds=3600)
        stuck = await self._messages("stuck", STUCK, settings)
        await self._messages("expiring", DUE, settings)
        await self.db.execute(
            """UPDATE message SET expires_at = now() - interval '1 hour' * (1 + (conversation_id = $1)::integer)
            WHERE expires_at IS NOT NULL""",
            stuck,
        )  # fmt: skip
        await self._fail_at("message", "conversation_id", [str(stuck)])
        return "SELECT count(*) FROM message WHERE expires_at IS NOT NULL"

    async def clear_remains(self) -> str:
        about = await self._messages("deleted", DUE, ConversationSettings())
        await self.db.execute(
            """WITH reacted AS (
                INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
                SELECT m.id, who, '👍', m.conversation_id, m.version, m.sender_id
                FROM message m, unnest(ARRAY[$2, $3]::uuid[]) who WHERE m.conversation_id = $1
            ), voted AS (
                INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version)
                SELECT m.id, $2, m.conversation_id, '{0}', m.version FROM message m WHERE m.conversation_id = $1
            )
            UPDATE message SET is_deleted = true, has_remains = true WHERE conversation_id = $1""",
            about, self.ada, self.charles,
        )  # fmt: skip
        return "SELECT (SELECT count(*) FROM message_reaction) + (SELECT count(*) FROM poll_vote)"

    async def mark_remains(self) -> str:
        """As a worker leaves them that clears `has_remains` although invitations remain."""
        for number in range(DUE):
            about = await self._messages(f"invited {number}", 0, ConversationSettings())
            invited = [(await self.world.user("Mary")).id for _ in range(1 + number % 2)]
            await self.owner.call(client.Invite(conversation_id=about, participants=invited))
        await self.db.execute("UPDATE conversation SET is_active = false WHERE title LIKE 'invited%'")
        return "SELECT count(*) FROM conversation WHERE title LIKE 'invited%' AND NOT has_remains"

    async def forget_scheduled(self) -> str:
        about = await self._messages("over", 1, ConversationSettings())
        await self.db.execute(
            """INSERT INTO scheduled_message (id, sender_id, conversation_id, words, send_at, status, user_version)
            SELECT gen_random_uuid(), who, $3, '{"content": "Over"}', now() - $4 * interval '2 days', status, 1
            FROM unnest(ARRAY[$1, $2]::uuid[]) who, unnest('{sent,failed,cancelled}'::text[]) status""",
            self.ada, self.charles, about, scheduled.KEPT.days,
        )  # fmt: skip
        return "SELECT count(*) FROM scheduled_message WHERE send_at < now() - interval '400 days'"

    async def forget_audit(self) -> str:
        for number in range(DUE):
            about = await self._messages(f"noted {number}", 0, ConversationSettings())
            await self.owner.call(client.UpdateConversation(conversation_id=about, title=f"Title {number}"))
        await self.db.execute("UPDATE audit_entry SET created_at = now() - interval '2 years'")
        return "SELECT count(*) FROM audit_entry"

    async def forget_relationships(self) -> str:
        await self.db.execute(
            """WITH made AS (
                INSERT INTO "user" (name, email) SELECT 'r' || n, 'r' || n || '@example.org'
                FROM generate_series(1, $3) n RETURNING id
            )
            INSERT INTO user_relationship (from_user_id, to_user_id, type, status, updated_at)
            SELECT $1, id, 'mute', 'inactive', now() - $2 * interval '2 days' FROM made""",
            self.ada, relationships.KEPT.days, DUE,
        )  # fmt: skip
        return "SELECT count(*) FROM user_relationship WHERE status = 'inactive'"

    async def _messages(self, title: str, count: int, settings: ConversationSettings) -> ConversationId:
        """Make a conversation with `count` messages of Charles, a member."""
        about = await self.world.channel(self.owner, title=title, is_public=True, settings=settings)
        await self.member.call(client.Join(conversation_id=about))
        for number in range(count):
            await self.member.call(message(about, f"{title} {number}"))
        return about

    async def _fail_at(self, table: str, column: str, values: list[str]) -> None:
        listed = ", ".join(f"'{value}'" for value in values)
        await self.db.execute(
            f"""CREATE TRIGGER fail BEFORE UPDATE ON "{table}" FOR EACH ROW
            WHEN (old.{column}::text IN ({listed})) EXECUTE FUNCTION fail()"""
        )


AGED = {
    "approach": "clear_expired",
    "scheduled_message": "forget_scheduled",
    "user_relationship": "forget_relationships",
    "audit_entry": "forget_audit",
}
"""Tables whose rows expire by age, and the job that deletes them."""
NO_QUEUE = {"push_due", "tidy", "check_epoch", "check_storage"}
"""Jobs without a queue of rows.

`push_due` empties a list in memory, `tidy` sorts new entries into an index, `check_epoch` compares epochs, and
`check_storage` writes nothing.
"""


async def test_each_job_handles_all_due_rows_despite_rows_that_always_fail(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLEAR_SECONDS", "EXPIRE_SECONDS", "DUE_SECONDS"):
        monkeypatch.setattr(background, name, 36_000.0)
    for module in (approaches, audit, presence, relationships, scheduled, sessions):
        monkeypatch.setattr(module, "MAX_DELETED", BATCH)
    for module in (erasure, expiry):
        monkeypatch.setattr(module, "MAX_DUE", BATCH)
    monkeypatch.setattr(remains, "MAX_ROWS", BATCH)
    monkeypatch.setattr(search_index, "MAX_MESSAGES", BATCH)
    async with World(settings, workers=1) as world:
        backlog = Backlog(world)
        await backlog.begin()
        for _, job in world.workers[0].app.background.jobs:
            name = job.__name__
            if name in NO_QUEUE:
                continue
            left = await getattr(backlog, name)()
            stuck = STUCK if name in {"erase_due", "send_due", "expire_due"} else 0
            assert await world.db.fetchval(left) >= stuck + DUE
            task = asyncio.create_task(every(36_000, job))
            async with asyncio.timeout(20):
                while await world.db.fetchval(left) > stuck:
                    await asyncio.sleep(0.01)
            await end([task])
            assert await world.db.fetchval(left) == stuck, name
        assert await world.db.fetchval("SELECT count(*) FROM message WHERE content = 'Due'") == DUE
        # A message in slow mode is postponed for its interval, and not retried meanwhile.
        waits = "SELECT min(not_before) > now() + interval '30 minutes' FROM scheduled_message WHERE status = 'waiting'"
        assert await world.db.fetchval(waits)


HELD = {
    "clear_expired": ("SELECT FROM session WHERE token = '1' FOR UPDATE", 1),
    "expire_statuses": ("SELECT FROM \"user\" WHERE name = 's1' FOR NO KEY UPDATE", 1),
    "forget_scheduled": ("SELECT FROM \"user\" WHERE name = 'Ada' FOR NO KEY UPDATE", 3),
    "forget_relationships": ("SELECT FROM \"user\" WHERE name = 'r1' FOR NO KEY UPDATE", 1),
    "forget_audit": ("SELECT FROM conversation WHERE title = 'Title 0' FOR NO KEY UPDATE", 1),
    "clear_remains": ("SELECT FROM poll_vote LIMIT 1 FOR UPDATE", 1),
    "mark_remains": ("SELECT FROM conversation WHERE title = 'invited 0' FOR NO KEY UPDATE", 1),
    "erase_due": ("SELECT FROM \"user\" WHERE name = 'e1' FOR NO KEY UPDATE", STUCK),
    "expire_due": ("SELECT FROM conversation WHERE title = 'stuck' FOR NO KEY UPDATE", STUCK),
}
"""For each job, a statement that locks rows, and how many rows are left until they are unlocked."""
ELSEWHERE = {"send_due"}
"""Jobs that tests/test_held_rows.py tests."""


async def test_locked_row_does_not_keep_a_job_from_the_other_due_rows(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLEAR_SECONDS", "EXPIRE_SECONDS", "DUE_SECONDS"):
        monkeypatch.setattr(background, name, 36_000.0)
    monkeypatch.setattr(database, "JOB_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        backlog = Backlog(world)
        await backlog.begin()
        jobs = {job.run.__name__: job.run for job in world.workers[0].app.background.jobs}
        assert set(jobs) == HELD.keys() | NO_QUEUE | ELSEWHERE
        for name, (lock, stuck) in HELD.items():
            left = await getattr(backlog, name)()
            async with world.db.transaction():
                await world.db.execute(lock)
                async with asyncio.timeout(5):
                    await jobs[name]()
                assert (name, await world.db.fetchval(left)) == (name, stuck)


def test_no_task_is_awaited_after_one_cancellation() -> None:
    once = re.compile(
        r"\.cancel\(\)\n\s+(with contextlib\.suppress\(asyncio\.CancelledError\):\n\s+)?await (?!asyncio)"
    )
    for path in SERVER.rglob("*.py"):
        assert not once.search(path.read_text()), f"{path.name}: use server.periodic.end"
