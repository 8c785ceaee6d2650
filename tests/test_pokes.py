"""Notifications between workers: what a worker reads when a user's data changed, how often, and for whom."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from protocol import client, server
from protocol.codec import now
from protocol.errors import CloseCode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from prove.client import Client
from server.core.config import Settings
from server.db.database import Db
from server.db.rows import Undecoded
from server.domain import sync
from server.gateway.connection import Connection
from server.hub import online_users as people_module
from server.hub.online_users import OnlineUsers
from server.queries import drafts, memberships, own_news
from server.queries.memberships import Membership
from server.queries.own_news import OwnNews
from tests.world import UserSession, World, sent, until

MANY = """
WITH made AS (
    INSERT INTO conversation (id, type, title, created_by, is_public, participant_count, version)
    SELECT gen_random_uuid(), 'channel', 'Channel ' || n, $1, true, 1, 1 FROM generate_series(1, 120) n RETURNING id
)
INSERT INTO conversation_participant (conversation_id, user_id, role, version, joined_version)
SELECT id, $1, 'member', 1, 1 FROM made
"""


class QueryCounter:
    """Counts queries of a user's memberships and of their own changes."""

    def __init__(self) -> None:
        self.memberships = 0
        self.news = 0
        self.who: UserId | None = None

    def taken(self) -> tuple[int, int]:
        """Return both counts since the last call."""
        counts, self.memberships, self.news = (self.memberships, self.news), 0, 0
        return counts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> QueryCounter:
    counts = QueryCounter()
    read_memberships, read_news = memberships.read, own_news.read

    async def read(db: Db, user_ids: Sequence[UserId]) -> list[dict[ConversationId, Membership]]:
        counts.memberships += list(user_ids).count(counts.who)  # type: ignore[arg-type]
        return await read_memberships(db, user_ids)

    async def news(db: Db, user_id: UserId, since: int, *, limit: int) -> Undecoded[OwnNews]:
        counts.news += user_id == counts.who
        return await read_news(db, user_id, since, limit=limit)

    monkeypatch.setattr(memberships, "read", read)
    monkeypatch.setattr(own_news, "read", news)
    return counts


@pytest.fixture
async def one_worker(settings: Settings) -> AsyncIterator[World]:
    async with World(settings, workers=1) as world:
        yield world


async def settled(world: World, *who: UserSession) -> None:
    """Wait until all sockets of the users have received all events, and no recheck is running."""
    for one in who:
        version = await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', one.id)
        for online_users in [worker.app.hub.online_users for worker in world.workers]:
            await until(partial(_knows, online_users, one.id, version))


def _knows(online_users: OnlineUsers, user_id: UserId, version: int) -> bool:
    sockets = online_users.sockets(user_id)
    return not online_users._rechecks and all(  # noqa: SLF001
        known == version
        for known in [online_users.version(user_id), *(socket.user_version for socket in sockets)]
        if sockets
    )


async def test_own_change_travels_as_an_event_that_no_worker_reads(world: World, asked: QueryCounter) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(MANY, ada.id)
    sockets = [await world.connect(ada, number % 2) for number in range(8)]
    await world.befriend(ada, charles)
    friend = await world.connect(charles)
    group = await world.channel(sockets[0])
    message = await sent(sockets[0], group)
    at: dict[str, Any] = {"conversation_id": group, "message_id": message}
    later = MessageId(uuid7())
    await settled(world, ada)
    asked.who = ada.id
    asked.taken()

    own: list[client.Frame] = [
        client.SetDraft(conversation_id=group, content="Dear"),
        client.SetDraft(conversation_id=group, content="Dear Charles"),
        client.Star(**at),
        client.Unstar(**at),
        client.FollowThread(**at),
        client.ReadThread(**at, thread_order=0),
        client.UnfollowThread(**at),
        client.MarkUnread(**at),
        client.SetPreferences(conversation_id=group, is_muted=True),
        client.UpdateProfile(bio="Countess"),
        client.SetPresence(status="busy"),
        client.SeeFeed(),
        client.Schedule(conversation_id=group, message_id=later, content="Soon", send_at=now() + timedelta(hours=1)),
        client.CancelScheduled(conversation_id=group, message_id=later),
    ]
    for frame in own:
        await sockets[0].call(frame)
        await settled(world, ada)
        assert asked.taken() == (0, 0), frame
    for socket in sockets:
        await socket.event(server.DraftChanged, lambda event: event.draft.content == "Dear Charles")

    # A change of memberships is also read once by each worker, and every socket receives it.
    other = await world.group(friend, ada)
    for socket in sockets:
        await socket.event(server.ConversationJoined, lambda event: event.view.conversation.id == other)
    await settled(world, ada)
    assert asked.taken() == (2, 2)
    await friend.call(client.RemoveParticipant(conversation_id=other, user_id=ada.id))
    for socket in sockets:
        await socket.event(server.ConversationLeft, lambda event: event.conversation_id == other)
    await settled(world, ada)
    assert asked.taken() == (2, 2)


async def _set_draft_unpublished(world: World, ada: UserSession, group: ConversationId, content: str) -> None:
    assert await drafts.put(world.db, client.SetDraft(conversation_id=group, content=content), ada.id)


async def _joins(world: World, ada: UserSession, group: ConversationId) -> None:
    await world.db.execute(
        """INSERT INTO conversation_participant (conversation_id, user_id, role, version, joined_version)
        SELECT id, $1, 'member', version, version FROM conversation WHERE id = $2""",
        ada.id,
        group,
    )


async def _removed(world: World, ada: UserSession, group: ConversationId) -> None:
    await world.db.execute(
        "UPDATE conversation_participant SET status = 'removed' WHERE user_id = $1 AND conversation_id = $2",
        ada.id,
        group,
    )


@pytest.mark.parametrize("change", [_joins, _removed])
async def test_own_change_does_not_hide_a_missed_change(
    one_worker: World, change: Callable[[World, UserSession, ConversationId], Awaitable[None]]
) -> None:
    ada, charles = await one_worker.users("Ada", "Charles")
    friend = await one_worker.connect(charles)
    other = await one_worker.user("Grace")
    for one in (ada, other):
        await one_worker.befriend(one, charles)
    group = await one_worker.group(friend, other, *([ada] if change is _removed else []))
    sockets = [await one_worker.connect(ada) for _ in range(2)]
    mine = await one_worker.channel(sockets[0])
    # Only the user version announces the change.
    await change(one_worker, ada, group)
    await one_worker.db.execute('UPDATE "user" SET version = version + 1 WHERE id = $1', ada.id)
    await sockets[0].call(client.SetDraft(conversation_id=mine, content="Dear"))
    for socket in sockets:
        if change is _joins:
            await socket.event(server.ConversationJoined, lambda event: event.view.conversation.id == group)
        else:
            await socket.event(server.ConversationLeft, lambda event: event.conversation_id == group)
    # A session that ended is not hidden either.
    await one_worker.db.execute("DELETE FROM session")
    await one_worker.db.execute('UPDATE "user" SET version = version + 1 WHERE id = $1', ada.id)
    one_worker.workers[0].app.hub.notify([ada.id])
    assert [await socket.closed() for socket in sockets] == [CloseCode.SESSION_ENDED] * 2


async def test_memberships_read_before_a_socket_connected_detach_nothing(one_worker: World) -> None:
    ada = await one_worker.user("Ada")
    socket = await one_worker.connect(ada)
    app = one_worker.workers[0].app
    user_news = app.hub.online_users.fresh(ada.id)
    assert not await user_news.memberships()
    group = await one_worker.channel(socket)
    await settled(one_worker, ada)
    (held,) = app.hub.online_users.sockets(ada.id)
    assert isinstance(held, Connection)
    await sync.refresh(held.context, user_news, user_news)
    assert held.attached == {group}
    assert not [event for event in socket.events if isinstance(event, server.ConversationLeft)]


async def test_changes_during_a_pause_are_read_in_one_recheck_and_other_users_do_not_wait(
    one_worker: World, asked: QueryCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, charles = await one_worker.users("Ada", "Charles")
    sockets: list[Client] = [await one_worker.connect(ada) for _ in range(2)]
    group = await one_worker.channel(sockets[0])
    other = [await one_worker.connect(charles) for _ in range(2)]
    theirs = await one_worker.channel(other[0])
    await settled(one_worker, ada, charles)
    asked.who = ada.id
    asked.taken()
    monkeypatch.setattr(people_module, "RECHECK_PAUSE_FACTOR", 1_000_000)
    monkeypatch.setattr(people_module, "RECHECK_PAUSE_MOST_SECONDS", 3_600.0)
    for number in range(10):
        await _set_draft_unpublished(one_worker, ada, group, str(number))
        one_worker.workers[0].app.hub.notify([ada.id])
    await sockets[1].event(server.DraftChanged)
    await other[0].call(client.SetDraft(conversation_id=theirs, content="Dear"))
    await other[1].event(server.DraftChanged)
    assert asked.taken() == (0, 1)
    assert len(one_worker.workers[0].app.hub.online_users._rechecks) <= 3  # noqa: SLF001 - two sockets of Ada, one of Charles


async def test_revoked_session_ends_while_own_changes_cannot_be_read(
    one_worker: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await one_worker.user("Ada")
    socket = await one_worker.connect(ada)
    group = await one_worker.channel(socket)
    await settled(one_worker, ada)
    monkeypatch.setattr(people_module, "RECHECK_PAUSE_MOST_SECONDS", 0.1)
    read_news, may_read = own_news.read, asyncio.Event()

    async def news(*given: Any, **options: Any) -> Undecoded[OwnNews]:
        await may_read.wait()  # as if other frames of the user held all turns of the user
        return await read_news(*given, **options)

    monkeypatch.setattr(own_news, "read", news)
    await _set_draft_unpublished(one_worker, ada, group, "Dear")
    one_worker.workers[0].app.hub.notify([ada.id])
    await one_worker.db.execute("DELETE FROM session")
    await one_worker.db.execute('UPDATE "user" SET version = version + 1 WHERE id = $1', ada.id)
    one_worker.workers[0].app.hub.notify([ada.id])
    assert await socket.closed() == CloseCode.SESSION_ENDED
    may_read.set()


@pytest.mark.parametrize("moved", ["hidden_version = hidden_version + 1", "version = version + 1"])
async def test_recheck_hides_no_lost_change_of_watch_permissions(
    one_worker: World, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await one_worker.user("Ada")
    socket = await one_worker.connect(ada)
    group = await one_worker.channel(socket)
    await settled(one_worker, ada)
    online_users = one_worker.workers[0].app.hub.online_users
    await online_users.compare(online_users.ids())
    doubted: list[UserId] = []
    monkeypatch.setattr(online_users, "_doubt", doubted.append)
    await one_worker.db.execute(f'UPDATE "user" SET {moved} WHERE id = $1', ada.id)
    await socket.call(client.SetDraft(conversation_id=group, content="Dear"))
    await settled(one_worker, ada)
    await online_users.compare(online_users.ids())
    assert doubted == [ada.id]
    await online_users.compare(online_users.ids())
    assert doubted == [ada.id], "the comparison is requested once"


async def test_changes_that_a_killed_worker_did_not_publish_arrive_with_the_next_comparison(one_worker: World) -> None:
    ada = await one_worker.user("Ada")
    socket = await one_worker.connect(ada)
    group = await one_worker.channel(socket)
    await settled(one_worker, ada)
    await _set_draft_unpublished(one_worker, ada, group, "Dear")
    one_worker.workers[0].app.hub.comparisons.soon()
    event = await socket.event(server.DraftChanged)
    assert event.draft.content == "Dear"


async def test_events_of_a_user_are_delivered_in_order_and_each_once(world: World) -> None:
    """Devices on two workers change different drafts concurrently. A gap is read from the database."""
    ada = await world.user("Ada")
    devices = [await world.connect(ada, number % 2) for number in range(4)]
    groups = [await world.channel(devices[0]) for _ in range(4)]
    await settled(world, ada)
    starts = [len(device.events) for device in devices]
    for number in range(25):
        frames = [client.SetDraft(conversation_id=group, content=str(number)) for group in groups]
        await asyncio.gather(*(device.call(frame) for device, frame in zip(devices, frames, strict=True)))
    await settled(world, ada)
    version = await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', ada.id)
    for device, start in zip(devices, starts, strict=True):
        events = [event for event in device.events[start:] if isinstance(event, server.DraftChanged)]
        numbers = [event.user_version for event in events]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == version
        assert {event.draft.conversation_id: event.draft.content for event in events} == dict.fromkeys(groups, "24")


async def test_lost_event_is_read_when_the_next_one_arrives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await world.user("Ada")
    one, other = await world.connect(ada), await world.connect(ada, 1)
    groups = [await world.channel(one) for _ in range(2)]
    await settled(world, ada)
    there = world.workers[1].app.hub.online_users
    with monkeypatch.context() as patch:
        patch.setattr(there, "accept", lambda *_: None)
        patch.setattr(there, "expect", lambda *_: None)
        await one.call(client.SetDraft(conversation_id=groups[0], content="Lost"))
        await one.call(client.SetPreferences(conversation_id=groups[0], is_muted=True))
        await one.event(server.PreferencesChanged)
    await one.call(client.SetDraft(conversation_id=groups[1], content="Next"))
    await other.event(server.DraftChanged, lambda event: event.draft.content == "Next")
    assert [type(event) for event in other.events[-3:]] == [
        server.DraftChanged, server.PreferencesChanged, server.DraftChanged,
    ]  # fmt: skip


@pytest.mark.parametrize("is_older", ["receiver", "publisher"])
async def test_own_changes_reach_workers_of_the_previous_release(
    world: World, monkeypatch: pytest.MonkeyPatch, is_older: str
) -> None:
    """Such a worker takes an entry without a frame for a notification, and knows no channel of own events."""
    ada = await world.user("Ada")
    one, other = await world.connect(ada), await world.connect(ada, 1)
    group = await world.channel(one)
    await settled(world, ada)
    if is_older == "receiver":
        there = world.workers[1].app.hub.online_users
        monkeypatch.setattr(there, "accept", lambda *_: None)
        monkeypatch.setattr(there, "expect", lambda user_id, _: there.recheck(user_id))
        await one.call(client.SetDraft(conversation_id=group, content="Dear"))
    else:
        await _set_draft_unpublished(world, ada, group, "Dear")
        world.workers[0].app.hub.notify([ada.id])
    for device in (one, other):
        await device.event(server.DraftChanged, lambda event: event.draft.content == "Dear")
