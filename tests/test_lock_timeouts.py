"""No statement of a frame waits for a lock for long, because it has a connection meanwhile, and may hold other rows."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.errors import Refused
from protocol.ids import EditId, UserId, uuid7
from protocol.values import User
from prove.client import Client
from prove.truth import recount
from server.app.app import WAITING_SHARE
from server.context import Context
from server.core.config import Settings
from server.core.faults import HeldTooLong, RowHeld
from server.db.lock_timeouts import RETRY_LOCK_MS
from server.fairness.lanes import HELD, Held, Lanes
from server.fairness.lock_queue import MAX_PAUSE, PAUSE_DIVISOR, LockQueue, Place, Places, until_free
from server.routes import ROUTES
from tests.test_lock_order import ConflictingWrites
from tests.test_tried_again import TABLES, dispatch_of
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
        dispatch = dispatch_of(app)
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
        assert longest < 2 * RETRY_LOCK_MS
        async with asyncio.timeout(SECONDS):
            answers = await asyncio.gather(*asked.values(), return_exceptions=True)
        assert not [one for one in answers if isinstance(one, BaseException) and not isinstance(one, Refused)]
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
                await until(lambda: queue.has(group) or queue.has(charles))  # a join waits for its user only
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
        async with asyncio.timeout(3):
            await asyncio.gather(*mine)
        assert not any(task.done() for task in others)
    await other.close()
    assert await recount(world.db) == []


def clock() -> float:
    return asyncio.get_running_loop().time()


async def test_pause_between_attempts_is_a_part_of_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses, attempts = clock(), [], 0
    began = now

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append((now - began, seconds))
        now += seconds

    async def attempt() -> str:
        nonlocal now, attempts
        now += 0.05
        attempts += 1
        if now - began < free_after:
            raise RowHeld
        return "done"

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    free_after = 8.0
    assert await until_free(attempt, since=began, patience=9) == "done"
    assert now - began < free_after + MAX_PAUSE + 0.1
    assert attempts < 40
    assert all(seconds == pytest.approx(min(waited / PAUSE_DIVISOR, MAX_PAUSE)) for waited, seconds in pauses)
    now, free_after = began, 20.0
    with pytest.raises(HeldTooLong):
        await until_free(attempt, since=began, patience=9)
    assert 9 <= now - began < 9.1


async def failed_after(work: Awaitable[object]) -> float:
    """Return the time after which work fails because rows are locked, in seconds."""
    began = clock()
    with pytest.raises(HeldTooLong):
        await work
    return clock() - began


async def test_all_work_that_waits_for_a_locked_row_fails_after_the_same_time() -> None:
    """It waits for a row, for the turn of its key or client, for a place, or in a batch behind others."""
    places = Places(1, patience=0.5)
    queue: LockQueue[int] = LockQueue(places, lock_ms=0)

    async def attempt(place: Place) -> None:
        async with place():
            await asyncio.sleep(0.05)
            raise RowHeld

    async def run(items: list[int]) -> list[int | Held]:
        return [HELD] * len(items)

    async def wait(items: list[int]) -> list[int | Held]:
        await asyncio.sleep(0.05)
        return [HELD] * len(items)

    lanes = Lanes[int, int, int](
        key=lambda item: item % 2, owner=lambda item: item, run=run, wait=wait, places=places, most=4
    )
    ways = [queue.repeat(number % 3, number % 4, attempt) for number in range(24)]
    times = await asyncio.gather(*map(failed_after, [*ways, *(lanes.submit(number) for number in range(40))]))
    assert max(times) < 2 * places.patience, times
