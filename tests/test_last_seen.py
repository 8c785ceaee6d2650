"""`last_seen_at`: events and the row agree, and it is never a time at which the user was not visibly online."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from protocol import client, server
from protocol.codec import encode
from protocol.ids import UserId
from server.core.config import Settings
from server.db.database import Db
from server.domain import pending_presence, presence
from server.queries import presence as queries
from tests.world import UserSession, World, http_client, until

ROW = 'SELECT is_online, last_seen_at FROM "user" WHERE id = $1'


async def test_choosing_a_status_without_a_device_sets_no_last_seen(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    watcher = await world.connect(ada)
    await watcher.call(client.Watch(user_ids=[charles.id]), server.PresenceList)
    headers = {"authorization": f"Bearer {charles.token}"}
    async with http_client(world.url) as http:
        for frame in ("online", "online", "busy", "busy", "online"):  # every second frame repeats the status
            answer = await http.post("/v1/call", content=encode(client.SetPresence(status=frame)), headers=headers)
            assert answer.status_code == 200, answer.text
    await until(lambda: len(_times(watcher.events)) >= 3)
    await watcher.synced()
    assert _times(watcher.events) == [None] * 3
    assert await world.db.fetchval('SELECT last_seen_at FROM "user" WHERE id = $1', charles.id) is None


@pytest.mark.parametrize("is_empty", [True, False], ids=["redis-returns-empty", "redis-returns-unchanged"])
async def test_last_seen_of_a_user_who_leaves_during_a_redis_outage_is_their_departure(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, *, is_empty: bool
) -> None:
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.3)
    monkeypatch.setattr(presence, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(presence, "RECORD_SECONDS", 0.1)
    monkeypatch.setattr(pending_presence, "AGAIN_SECONDS", 0.1)
    async with World(settings, workers=1) as world:
        ada, charles = await world.users("Ada", "Charles")
        watcher, phone = await world.connect(ada), await world.connect(charles)
        await watcher.call(client.Watch(user_ids=[charles.id]), server.PresenceList)
        await watcher.synced()
        app = world.workers[0].app
        async with asyncio.timeout(5):
            while not await world.db.fetchval('SELECT is_online FROM "user" WHERE id = $1', charles.id):
                await asyncio.sleep(0.01)
        seen = len(watcher.events)
        redis = app.presence.entries._redis  # noqa: SLF001
        nowhere = Redis.from_url("redis://127.0.0.1:1")
        monkeypatch.setattr(app.presence.entries, "_redis", nowhere)
        await phone.close()
        await until(lambda: charles.id not in app.presence._devices)  # noqa: SLF001
        left_by = datetime.now(UTC)
        await until(lambda: len(_times(watcher.events[seen:])) == 1)
        if is_empty:
            await redis.delete(app.presence.entries.user_key + charles.id.hex)
        monkeypatch.setattr(app.presence.entries, "_redis", redis)
        async with asyncio.timeout(5):
            while (row := await world.db.fetchrow(ROW, charles.id)) is None or row["is_online"]:
                await asyncio.sleep(0.01)
        # A user who was announced without Redis is announced once more.
        await until(lambda: len(_times(watcher.events[seen:])) >= 2)
        await until(lambda: not app.presence._pending)  # noqa: SLF001
        await watcher.synced()
        assert row["last_seen_at"] <= left_by
        for time in _times(watcher.events[seen:]):
            assert time is not None
            assert abs((time - row["last_seen_at"]).total_seconds()) < 0.001
        await nowhere.aclose()


@pytest.mark.parametrize("worker", [0, 1], ids=["same-worker", "other-worker"])
async def test_last_seen_of_a_user_who_left_while_invisible_is_before_that(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, worker: int
) -> None:
    """The same holds if they become visible, without a device, before their departure is recorded."""
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.5)
    monkeypatch.setattr(presence, "RECORD_SECONDS", 0.1)
    async with World(settings, workers=2) as world:
        ada, charles = await world.users("Ada", "Charles")
        watcher, phone = await world.connect(ada), await world.connect(charles)
        app = world.workers[0].app
        await watcher.call(client.Watch(user_ids=[charles.id]), server.PresenceList)
        await _recorded(world, charles.id, is_online=True)
        await phone.call(client.SetPresence(status="invisible"))
        await until(lambda: len(_times(watcher.events)) == 1)
        (before,) = _times(watcher.events)
        await phone.close()
        await until(lambda: charles.id not in app.presence._devices)  # noqa: SLF001
        seen = len(watcher.events)
        async with http_client(world.workers[worker].url) as http:
            headers = {"authorization": f"Bearer {charles.token}"}
            await http.post("/v1/call", content=encode(client.SetPresence(status="online")), headers=headers)
        assert before == await _recorded(world, charles.id, is_online=False)
        await until(lambda: bool(_times(watcher.events[seen:])))
        await until(lambda: not app.presence._pending)  # noqa: SLF001
        await watcher.synced()
        assert set(_times(watcher.events[seen:])) == {before}
        if worker == 0:
            assert len(_times(watcher.events[seen:])) == len(_statuses(watcher.events[seen:])), (
                "no device was connected"
            )
        # A user who is visible when they leave was last seen then.
        phone = await world.connect(charles)
        await _recorded(world, charles.id, is_online=True)
        came_at = datetime.now(UTC)
        await phone.close()
        assert await _recorded(world, charles.id, is_online=False) >= came_at


async def departed(world: World) -> UserSession:
    """Return a user whose arrival at the first worker is recorded, and whose departure is not recorded yet."""
    (charles,) = await world.users("Charles")
    one = world.workers[0].app.presence
    phone = await world.connect(charles)
    await until(lambda: charles.id in one._transitions)  # noqa: SLF001
    await one._record()  # noqa: SLF001
    await phone.close()
    await until(lambda: charles.id in one._transitions)  # noqa: SLF001
    return charles


async def return_elsewhere(world: World, user: UserSession) -> None:
    """Connect a user to the second worker, and record the arrival."""
    other = world.workers[1].app.presence
    await world.connect(user, 1)
    await until(lambda: user.id in other._transitions)  # noqa: SLF001
    await other._record()  # noqa: SLF001


@pytest.mark.parametrize("is_back", [True, False])
async def test_departure_is_not_recorded_after_a_return_at_another_worker(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, *, is_back: bool
) -> None:
    """Two workers may record in any order."""
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.1)
    monkeypatch.setattr(presence, "RECORD_SECONDS", 3_600.0)
    async with World(settings, workers=2) as world:
        one = world.workers[0].app.presence
        charles = await departed(world)
        if is_back:
            await return_elsewhere(world, charles)
        await one._record()  # noqa: SLF001
        assert await world.db.fetchval('SELECT is_online FROM "user" WHERE id = $1', charles.id) is is_back
        assert not one._transitions  # noqa: SLF001


async def test_departure_that_overtakes_a_return_at_another_worker_is_corrected(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user returns and the other worker records that while the first one is about to write."""
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.1)
    monkeypatch.setattr(presence, "RECORD_SECONDS", 3_600.0)
    seen = queries.seen
    async with World(settings, workers=2) as world:
        one = world.workers[0].app.presence
        charles = await departed(world)

        async def late(db: Db, transitions: dict[UserId, queries.Transition]) -> dict[UserId, queries.Transition]:
            monkeypatch.setattr(queries, "seen", seen)
            await return_elsewhere(world, charles)
            return await seen(db, transitions)

        monkeypatch.setattr(queries, "seen", late)
        await one._record()  # noqa: SLF001
        await one._record()  # noqa: SLF001
        assert await world.db.fetchval('SELECT is_online FROM "user" WHERE id = $1', charles.id)
        assert not one._transitions  # noqa: SLF001


async def test_late_arrival_of_a_user_who_has_left_from_another_worker_is_corrected(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.1)
    monkeypatch.setattr(presence, "RECORD_SECONDS", 3_600.0)
    async with World(settings, workers=2) as world:
        (charles,) = await world.users("Charles")
        one, other = [worker.app.presence for worker in world.workers]
        phone = await world.connect(charles)
        await until(lambda: charles.id in one._transitions)  # noqa: SLF001
        tablet = await world.connect(charles, 1)
        await until(lambda: not other._dirty)  # noqa: SLF001
        await other._flushes.submit(None)  # noqa: SLF001
        await phone.close()
        await until(lambda: charles.id not in one._left_at)  # noqa: SLF001
        await tablet.close()
        await until(lambda: charles.id in other._transitions)  # noqa: SLF001
        await other._record()  # noqa: SLF001
        await one._record()  # noqa: SLF001
        await one._record()  # noqa: SLF001
        assert not await world.db.fetchval('SELECT is_online FROM "user" WHERE id = $1', charles.id)
        assert not one._transitions  # noqa: SLF001


async def _recorded(world: World, user_id: UserId, *, is_online: bool) -> datetime:
    """Wait until the row says that the user is online or offline, and return `last_seen_at`."""
    async with asyncio.timeout(5):
        while (row := await world.db.fetchrow(ROW, user_id)) is None or row["is_online"] is not is_online:
            await asyncio.sleep(0.01)
    return row["last_seen_at"]  # type: ignore[no-any-return]


def _statuses(events: Sequence[object]) -> list[str]:
    return [event.presence.status for event in events if isinstance(event, server.PresenceChanged)]


def _times(events: Sequence[object]) -> list[datetime | None]:
    """Return the `last_seen_at` of the events that say that the user is offline."""
    return [
        event.presence.last_seen_at
        for event in events
        if isinstance(event, server.PresenceChanged) and event.presence.status == "offline"
    ]
