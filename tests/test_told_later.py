"""Events are published even if the database fails when their turn comes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
from redis.asyncio import Redis

from protocol import client, server
from protocol.errors import CloseCode
from protocol.ids import ConversationId, UserId
from protocol.values import PresenceStatus
from server.app.app import App
from server.core.config import Settings
from server.db.database import Db
from server.domain import pending_presence, presence
from server.domain.presence_entries import USER, WORKER, WORKERS
from server.gateway import connection
from server.hub import comparisons, online_users
from server.queries import changes, conversations, memberships, own_news, sessions, users
from server.queries import presence as stored_presence
from server.queries.presence import Visibility
from tests.world import World, until

ONLINE = 'SELECT is_online FROM "user" WHERE id = $1'


class Stage:
    """Ada watches Charles and is in a group of his."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world = world
        self.settings = settings
        self.app: App = world.workers[0].app

    async def begin(self) -> None:
        self.charles, self.them = await self.world.users("Charles", "Ada")
        self.ada = await self.world.connect(self.them)
        self.phone = await self.world.connect(self.charles)
        self.group: ConversationId = await self.world.group(self.phone, self.them)
        await self.ada.event(server.ConversationJoined)
        await self.ada.call(client.Watch(user_ids=[self.charles.id]))
        await until(lambda: not self.app.presence._pending and not self.app.presence._dirty)  # noqa: SLF001
        self.start = len(self.ada.events)

    async def is_online(self) -> None:
        """Return when the database says that Charles is online."""
        async with asyncio.timeout(5):
            while not await self.world.db.fetchval(ONLINE, self.charles.id):
                await asyncio.sleep(0.01)

    async def seen(self, status: PresenceStatus) -> server.PresenceChanged:
        """Return the next event that shows Charles with this status."""
        return await self.ada.event(
            server.PresenceChanged, lambda event: event.presence.status == status, start=self.start
        )


class FirstCallFails:
    """Makes the first call of a query fail as if no connection became free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
        self.calls = 0
        self._query = getattr(module, name)
        monkeypatch.setattr(module, name, self._call)

    async def _call(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise TimeoutError
        return await self._query(*args, **named)


async def leaves(on: Stage) -> None:
    await on.phone.close()
    assert (await on.seen("offline")).presence.last_seen_at is not None


async def chooses(on: Stage) -> None:
    await on.phone.call(client.SetPresence(status="busy"))
    await on.seen("busy")


async def ends_a_status(on: Stage) -> None:
    await on.world.db.execute(
        """UPDATE "user" SET status = 'busy', custom_status = 'Tea', custom_status_until = now() WHERE id = $1""",
        on.charles.id,
    )
    await on.app.presence.expire_statuses()
    await on.seen("busy")


async def dies_with_a_worker(on: Stage) -> None:
    """Mary was connected to a worker that no longer responds."""
    mary = await on.world.user("Mary")
    await on.ada.call(client.Watch(user_ids=[mary.id]))
    epoch = on.app.epoch.id
    redis = Redis.from_url(on.settings.redis_url)
    await redis.hset(f"{USER}{epoch}:{mary.id.hex}", "dead", "online")
    await redis.sadd(f"{WORKER}{epoch}:dead:users", mary.id.hex)
    await redis.sadd(f"{WORKERS}{epoch}", "dead")
    await on.ada.event(server.PresenceChanged, lambda event: event.presence.user_id == mary.id, start=on.start)
    async with asyncio.timeout(5):
        while await redis.exists(f"{WORKER}{epoch}:dead:users"):
            await asyncio.sleep(0.01)
    await redis.aclose()


async def blocks(on: Stage) -> None:
    await on.phone.call(client.Block(user_id=on.them.id))
    await on.seen("offline")


async def is_recorded(on: Stage) -> None:
    await on.phone.close()
    async with asyncio.timeout(5):
        while await on.world.db.fetchval(ONLINE, on.charles.id):
            await asyncio.sleep(0.01)


async def mutes(on: Stage) -> None:
    laptop = await on.world.connect(on.charles)
    await on.phone.call(client.Mute(user_id=on.them.id))
    await laptop.event(server.RelationshipChanged)


async def is_added(on: Stage) -> None:
    about = await on.world.group(on.phone, on.them, title="Another")
    await on.ada.event(server.ConversationJoined, lambda event: event.view.conversation.id == about, start=on.start)


async def loses_the_session(on: Stage) -> None:
    await on.world.db.execute("DELETE FROM session WHERE user_id = $1", on.them.id)
    await on.world.db.execute('UPDATE "user" SET version = version + 1 WHERE id = $1', on.them.id)
    on.app.hub.notify([on.them.id])
    assert await on.ada.closed() == CloseCode.SESSION_ENDED


async def moves_a_clock(on: Stage) -> None:
    await on.world.db.execute(
        "UPDATE conversation SET version = version + 1, settings_version = version + 1 WHERE id = $1", on.group
    )
    await on.ada.event(server.Changes, start=on.start)


CASES: tuple[tuple[ModuleType, str, Callable[[Stage], Awaitable[None]]], ...] = (
    (stored_presence, "choices", leaves),
    (stored_presence, "choices", chooses),
    (stored_presence, "choices", ends_a_status),
    (stored_presence, "choices", dies_with_a_worker),
    (stored_presence, "watchable", blocks),
    (stored_presence, "seen", is_recorded),
    (users, "versions", mutes),
    (own_news, "read", mutes),
    (users, "versions", is_added),
    (memberships, "read", is_added),
    (sessions, "living", loses_the_session),
    (conversations, "versions", moves_a_clock),
    (changes, "since", moves_a_clock),
)


@pytest.mark.parametrize(("module", "name", "act"), CASES, ids=[f"{name}-{act.__name__}" for _, name, act in CASES])
async def test_event_is_published_after_a_failed_first_attempt(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    act: Callable[[Stage], Awaitable[None]],
) -> None:
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.1)
    monkeypatch.setattr(presence, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(pending_presence, "AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(presence, "RECORD_SECONDS", 0.1)
    monkeypatch.setattr(connection, "REFRESH_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(online_users, "RECHECK_PAUSE_MOST_SECONDS", 0.1)
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 0.1)
    monkeypatch.setattr(comparisons, "COMPARE_USERS_SECONDS", 0.1)
    async with World(settings, workers=1) as world:
        on = Stage(world, settings)
        await on.begin()
        if act is is_recorded:
            await on.is_online()
        first = FirstCallFails(monkeypatch, module, name)
        await act(on)
        assert first.calls > 1


async def test_older_presence_is_not_announced_last(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two announcements of one user: the first one's data is outdated when it is published."""
    read: list[dict[UserId, Visibility]] = []
    asked: list[UserId | None] = []
    may_go_on, choices = asyncio.Event(), stored_presence.choices

    async def held(db: Db, user_ids: Sequence[UserId]) -> dict[UserId, Visibility]:
        read.append(found := await choices(db, user_ids))
        if len(read) == 1:
            await may_go_on.wait()
        return found

    async def counted(user_id: UserId | None = None) -> bool:
        asked.append(user_id)
        return await tell(user_id)

    async with World(settings, workers=1) as world:
        on = Stage(world, settings)
        await on.begin()
        pending_presence, tell = on.app.presence._pending, on.app.presence._pending.tell  # noqa: SLF001
        monkeypatch.setattr(pending_presence, "tell", counted)
        monkeypatch.setattr(stored_presence, "choices", held)
        laptop = await world.connect(on.charles)
        first = asyncio.create_task(on.phone.ask(client.SetPresence(status="online", custom_status="At tea")))
        await until(lambda: len(read) == 1)
        second = asyncio.create_task(laptop.ask(client.SetPresence(status="busy")))
        # The second announcement waits for the first. It would not if announcements ran concurrently.
        await until(lambda: asked.count(on.charles.id) >= 2 and bool(pending_presence._tells._waiting))  # noqa: SLF001
        assert len(read) == 1
        may_go_on.set()
        assert not [one for one in await asyncio.gather(first, second) if isinstance(one, server.Error)]
        await on.seen("busy")
        await on.ada.synced()
        told = [event for event in on.ada.events[on.start :] if isinstance(event, server.PresenceChanged)]
        assert told[-1].presence.status == "busy"
