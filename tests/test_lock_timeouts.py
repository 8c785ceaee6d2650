"""No statement of a frame waits for a lock for long, because it has a connection meanwhile, and may hold other rows."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.ids import EditId, UserId, uuid7
from protocol.values import User
from prove.client import Client
from prove.truth import recount
from server.app.app import WAITING_SHARE
from server.context import Context
from server.core.config import Settings
from server.core.faults import HeldTooLong, RowHeld
from server.db.lock_timeouts import LOCK_MS
from server.fairness.lock_queue import MAX_PAUSE, PAUSE_SHARE, until_free
from server.gateway.dispatch import Dispatch
from server.routes import ROUTES
from tests.test_lock_order import ConflictingWrites
from tests.test_tried_again import TABLES
from tests.world import World, http_client, message, sent, until

LONGEST_WAIT = """
SELECT coalesce(1_000 * max(extract(epoch FROM clock_timestamp() - l.waitstart)), 0)
FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND a.datname = current_database()
"""
"""The longest wait for a lock in progress, in milliseconds."""
SECONDS = 20


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, database_connections=8)) as world:
        yield world


class Frames(ConflictingWrites):
    """Runs frames as dispatch does, without rate limits."""

    def ask(self, who: UserId, frame: Frame, *, worker: int = 0) -> "asyncio.Task[Any]":
        """Run a frame. Its result may be a refusal."""
        app = self.world.workers[worker].app
        dispatch = Dispatch(
            ROUTES, app._rate_limits, metrics=app.metrics, load_shedding=app.load_shedding,  # noqa: SLF001
            lock_queue=app._lock_queue,  # noqa: SLF001
        )  # fmt: skip
        context = Context(
            services=app._services,  # noqa: SLF001
            user=User(id=who, name="User"),
            session_id=self.sessions[who],
        )
        return asyncio.create_task(dispatch._handle(ROUTES[type(frame)], context, frame))  # noqa: SLF001


async def test_no_frame_waits_with_a_connection_for_long(world: World) -> None:
    """All rows are locked, in ways that each frame needs."""
    async with http_client(world.url) as http:
        frames = Frames(world, http)
        await frames.begin()
        mary = await world.connect(await world.user("Mary"))
        longest = 0.0
        async with world.db.transaction(), asyncio.timeout(SECONDS):
            for (table,) in await world.db.fetch(TABLES):
                await world.db.execute(f'SELECT FROM "{table}" FOR UPDATE')
            asked = {
                (who, type(frame).__name__): frames.ask(who, frame)
                for who in (frames.ada, frames.charles)
                for frame in frames.frames()
            }
            for _ in range(75):
                longest = max(longest, float(await world.db.fetchval(LONGEST_WAIT)))
                await mary.call(client.GetMe())
                await asyncio.sleep(0.02)
            waiting = {name for (_, name), task in asked.items() if not task.done()}
        assert len(waiting) > 40, waiting
        assert longest < 4 * LOCK_MS
        async with asyncio.timeout(SECONDS):
            answers = dict(zip(asked, await asyncio.gather(*asked.values(), return_exceptions=True), strict=True))
        failed = {key: answer for key, answer in answers.items() if isinstance(answer, HeldTooLong)}
        assert not failed
        assert await recount(world.db) == []


async def test_frames_that_wait_for_a_user_hold_no_conversation_meanwhile(world: World) -> None:
    """The row of Charles is locked. Ada writes in their group, at the other worker."""
    async with http_client(world.url) as http:
        frames = Frames(world, http)
        await frames.begin()
        ada, charles, group = frames.ada, frames.charles, frames.group
        that_lock_both = (
            (charles, client.Schedule), (charles, client.ReportMessage), (ada, client.SetRole),
            (ada, client.RemoveParticipant), (charles, client.Join),
        )  # fmt: skip
        queue = world.workers[0].app._lock_queue  # noqa: SLF001
        for who, kind in that_lock_both:
            (frame,) = (one for one in frames.frames() if isinstance(one, kind))
            async with world.db.transaction(), asyncio.timeout(SECONDS):
                await world.db.execute("""SELECT FROM "user" WHERE id = $1 FOR UPDATE""", charles)
                asked = frames.ask(who, frame)
                await until(lambda: queue.has(group))
                for _ in range(3):
                    assert isinstance(await frames.ask(ada, message(group), worker=1), server.Sent)
                assert not asked.done(), frame
            await asyncio.gather(asked, return_exceptions=True)


async def test_locked_conversations_do_not_delay_one_that_is_locked_briefly(world: World) -> None:
    """More users wait than there are places, each with an edit, a message and a reaction."""
    count = 2 * 8 // WAITING_SHARE
    mary, *people = await world.users("Mary", *(f"User {number}" for number in range(count)))
    asked: list[tuple[Client, Frame]] = []
    rooms = []
    for who in (mary, *people):
        devices = [await world.connect(who) for _ in range(3)]
        about = await world.channel(devices[0])
        here: Any = {"conversation_id": about, "message_id": await sent(devices[0], about)}
        edit = client.Edit(**here, content="Edited", edit_id=EditId(uuid7()))
        asked += zip(devices, (edit, message(about), client.React(**here, emoji="👍")), strict=True)
        rooms.append(about)
    hold = "SELECT FROM conversation WHERE id = ANY($1) FOR NO KEY UPDATE"
    other = await asyncpg.connect(world.settings.database_url)
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group, world.db.transaction():
        await world.db.execute(hold, rooms[1:])
        others: list[asyncio.Task[Any]] = [group.create_task(one.call(frame)) for one, frame in asked[3:]]
        async with other.transaction():
            await other.execute(hold, rooms[:1])
            mine: list[asyncio.Task[Any]] = [group.create_task(one.call(frame)) for one, frame in asked[:3]]
            queue = world.workers[0].app._lock_queue  # noqa: SLF001
            await until(lambda: all(queue.has(about) for about in rooms))
        await asyncio.gather(*mine)
        assert not any(task.done() for task in others)
    await other.close()
    assert await recount(world.db) == []


async def test_pause_between_attempts_is_a_part_of_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pauses, attempts = 0.0, [], 0

    async def sleep(seconds: float) -> None:
        nonlocal clock
        pauses.append((clock, seconds))
        clock += seconds

    async def attempt() -> str:
        nonlocal clock, attempts
        clock += 0.05
        attempts += 1
        if clock < free_at:
            raise RowHeld
        return "done"

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    free_at = 8.0
    assert await until_free(attempt, patience=9) == "done"
    assert clock < free_at + MAX_PAUSE + 0.1
    assert attempts < 40
    assert all(seconds == min(waited / PAUSE_SHARE, MAX_PAUSE) for waited, seconds in pauses)
    clock, free_at = 0.0, 20.0
    with pytest.raises(HeldTooLong):
        await until_free(attempt, patience=9)
    assert 9 < clock < 9 + 2 * MAX_PAUSE
