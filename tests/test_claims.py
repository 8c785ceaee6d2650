"""Claims of scheduled messages: a worker with a lapsed claim changes nothing, and acknowledged changes are kept."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import MessageId, uuid7
from protocol.payloads import Poll
from server.context import Services
from server.jobs.scheduled import Scheduler, _put_off
from server.queries import scheduled
from server.queries.scheduled import DueScheduled
from tests.world import Room, World, all_sent, refused

WAITS = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"
ROW = "SELECT status, words ->> 'content', problem, claimed_at, not_before FROM scheduled_message WHERE id = $1"
CONTENT = "SELECT content FROM message WHERE id = $1"
CLOSES = """
UPDATE scheduled_message SET words = jsonb_set(words, '{payload,closes_at}', '"2026-01-01T00:00:00Z"') WHERE id = $1
"""


class Turns:
    """A room whose scheduled messages are sent only by calls of the test."""

    def __init__(self, room: Room, world: World) -> None:
        self.charles = room.charles
        self._sender_id = room.users[1].id
        self.group = room.group
        self.db = world.db
        self.services: Services = world.workers[0].app._services  # noqa: SLF001
        self.scheduler = Scheduler(self.services, most=1)
        self._next: dict[asyncio.Task[object] | None, DueScheduled] = {}

    async def claim(self) -> DueScheduled | None:
        """Replace `Scheduler._claim`, so that jobs claim nothing."""
        return self._next.pop(asyncio.current_task(), None)

    async def schedule(self, **fields: Any) -> client.Schedule:
        """Schedule a message of Charles that is due."""
        frame = client.Schedule(
            conversation_id=self.group, message_id=MessageId(uuid7()), content="First", send_at=datetime.now(UTC),
            **fields,
        )  # fmt: skip
        await self.charles.call(frame)
        return frame

    async def take(self) -> DueScheduled:
        """Claim the due message, as a worker does after another claim has lapsed."""
        await self.db.execute("UPDATE scheduled_message SET claimed_at = claimed_at - interval '1 minute'")
        due = await scheduled.claim(self.db, self._sender_id)
        assert due is not None
        return due

    async def send(self, due: DueScheduled) -> None:
        """Send a claimed message as its worker does."""
        self._next[asyncio.current_task()] = due
        await self.scheduler.send_due()
        await all_sent(self.scheduler)

    async def put_off(self, due: DueScheduled) -> None:
        """Postpone a message as a worker does when the database is busy."""
        await _put_off(self.services, due, 0)

    async def fail(self, due: DueScheduled) -> None:
        """Fail a message, as a worker does when the sender has left."""
        await self.send(due._replace(sender=None))

    async def row(self, frame: client.Schedule) -> tuple[object, ...]:
        """Return the row of a scheduled message, and the content of the message that was sent."""
        row = await self.db.fetchrow(ROW, frame.message_id)
        assert row is not None
        return (*row, await self.db.fetchval(CONTENT, frame.message_id))

    async def cancels(self, frame: client.Schedule, other: DueScheduled) -> str:
        await self.put_off(other)
        cancel = client.CancelScheduled(conversation_id=self.group, message_id=frame.message_id)
        return (await self.charles.call(cancel, server.OneScheduled)).scheduled.status

    async def changes(self, frame: client.Schedule, other: DueScheduled) -> str:
        await self.put_off(other)
        frame.content, frame.send_at = "Second", datetime.now(UTC) + timedelta(hours=1)
        return (await self.charles.call(frame, server.OneScheduled)).scheduled.words.content

    async def waits(self, _: client.Schedule, other: DueScheduled) -> str:
        await self.put_off(other)
        return "put off"

    async def claims(self, _: client.Schedule, __: DueScheduled) -> str:
        return "claimed"


@pytest.fixture
async def turns(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> Turns:
    made = Turns(room, world)
    monkeypatch.setattr(Scheduler, "_claim", lambda _: made.claim())
    return made


async def test_worker_with_a_lapsed_claim_changes_nothing(turns: Turns) -> None:
    """This holds for each next step, and for each change since the claim."""
    wrong = []
    for act in (turns.send, turns.put_off, turns.fail):
        for meanwhile in (turns.cancels, turns.changes, turns.waits, turns.claims):
            frame = await turns.schedule()
            slow, other = await turns.take(), await turns.take()
            told = await meanwhile(frame, other)
            before = await turns.row(frame)
            await act(slow)
            if (after := await turns.row(frame)) != before:
                wrong.append((act.__name__, told, before, after))
            if meanwhile == turns.claims:  # the current claim sends the message once
                await turns.send(other)
                assert (await turns.row(frame))[::5] == ("sent", "First")
            await turns.db.execute("UPDATE scheduled_message SET status = 'cancelled'")
    assert wrong == []


async def test_lapsed_claim_that_no_worker_took_is_continued(turns: Turns) -> None:
    for act, status in ((turns.send, "sent"), (turns.fail, "failed"), (turns.put_off, "waiting")):
        frame = await turns.schedule()
        due = await turns.take()
        await turns.db.execute("UPDATE scheduled_message SET claimed_at = claimed_at - interval '1 minute'")
        (due,) = [due._replace(claimed_at=await turns.db.fetchval("SELECT max(claimed_at) FROM scheduled_message"))]
        await act(due)
        assert (await turns.row(frame))[0] == status


async def test_cancel_before_the_commit_prevents_the_message(turns: Turns) -> None:
    """The message and its status `sent` are committed together."""
    frame = await turns.schedule()
    slow = await turns.take()
    await turns.put_off(await turns.take())
    async with turns.db.transaction():
        await turns.db.execute('SELECT FROM "user" WHERE id = $1 FOR NO KEY UPDATE', slow.sender_id)
        sending = asyncio.create_task(turns.send(slow))
        async with asyncio.timeout(5):
            while not await turns.db.fetchval(WAITS):
                await turns.db.execute("SELECT pg_stat_clear_snapshot()")
                await asyncio.sleep(0.01)
        cancelled = await scheduled.cancel(turns.db, frame.message_id, slow.sender_id, turns.group)
        assert cancelled is not None
    await sending
    assert (await turns.row(frame))[::5] == ("cancelled", None)


async def test_poll_postponed_until_after_its_closing_time_fails(turns: Turns) -> None:
    open_until = datetime.now(UTC) + timedelta(hours=1)
    for is_over, status in ((False, "sent"), (True, "failed")):
        frame = await turns.schedule(payload=Poll(options=["Yes", "No"], closes_at=open_until))
        await turns.put_off(await turns.take())
        await turns.db.execute("UPDATE scheduled_message SET not_before = now() WHERE id = $1", frame.message_id)
        if is_over:
            await turns.db.execute(CLOSES, frame.message_id)
        await turns.send(await turns.take())
        row = await turns.row(frame)
        assert (row[0], row[5]) == (status, None if is_over else "First")
        assert (row[2] is not None and "closed" in str(row[2])) is is_over


async def test_sent_failed_or_cancelled_message_has_no_next_attempt(turns: Turns) -> None:
    for act in (turns.send, turns.fail, None):
        frame = await turns.schedule()
        await turns.put_off(await turns.take())
        assert (await turns.row(frame))[4] is not None
        if act is None:
            await turns.charles.call(client.CancelScheduled(conversation_id=turns.group, message_id=frame.message_id))
        else:
            await turns.db.execute("UPDATE scheduled_message SET not_before = now() - interval '1 minute'")
            await act(await turns.take())
        status, _, _, _, not_before, _ = await turns.row(frame)
        assert (status != "waiting", not_before) == (True, None), act


async def test_schedule_repeated_while_it_is_sent_gets_the_same_reply(turns: Turns) -> None:
    """So does a repeat after it was sent. Other content is refused, with a time to retry."""
    frame = await turns.schedule()
    due = await turns.take()
    other = client.Schedule(
        conversation_id=turns.group, message_id=frame.message_id, content="Second", send_at=frame.send_at
    )
    again = await turns.charles.call(frame, server.OneScheduled)
    assert (again.scheduled.status, again.scheduled.words.content) == ("waiting", "First")
    with refused(ErrorCode.CONFLICT, "message_id") as refusal:
        await turns.charles.call(other)
    assert (refusal.value.retry_after_ms or 0) > 0
    await turns.send(due)
    assert (await turns.charles.call(frame, server.OneScheduled)).scheduled.status == "sent"
    with refused(ErrorCode.CONFLICT, "message_id") as refusal:
        await turns.charles.call(other)
    assert refusal.value.retry_after_ms is None
