"""Presence: who is online, the chosen status, and what happens when a worker dies."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, UserId, uuid7
from protocol.values import PresenceStatus
from prove.client import Client
from server.core.config import Settings
from server.db.database import Db
from server.queries import presence
from server.queries.presence import Sightings, Transition
from tests.cluster import Cluster
from tests.test_may_send import waiting
from tests.world import UserSession, World, message, refused, until


class Pair:
    """Ada watches Charles, who is connected to the other worker."""

    def __init__(self, ada: Client, charles: UserSession) -> None:
        self.ada = ada
        self.charles = charles

    async def becomes(self, status: PresenceStatus) -> server.PresenceChanged:
        """Return the next event that shows Charles with this status, or the last one."""
        await until(lambda: bool(self.seen) and self.seen[-1].presence.status == status)
        return self.seen[-1]

    @property
    def seen(self) -> list[server.PresenceChanged]:
        return [event for event in self.ada.events if isinstance(event, server.PresenceChanged)]


@pytest.fixture
async def pair(world: World) -> Pair:
    ada = await world.connect(await world.user("Ada"))
    charles = await world.user("Charles")
    await ada.call(client.Watch(user_ids=[charles.id]), server.PresenceList)
    return Pair(ada, charles)


async def test_status_of_several_devices_is_combined(pair: Pair, world: World) -> None:
    phone, laptop = await world.connect(pair.charles, 0), await world.connect(pair.charles, 1)
    await pair.becomes("online")
    await phone.call(client.SetPresence(status="away"))
    await laptop.call(client.SetPresence(status="away"))
    await pair.becomes("away")
    await phone.call(client.SetPresence(status="online"))
    await pair.becomes("online")
    await laptop.call(client.SetPresence(status="busy", custom_status="Computing"))
    assert (await pair.becomes("busy")).presence.custom_status == "Computing"
    await phone.call(client.SetPresence(status="online"))
    assert (await pair.becomes("online")).presence.custom_status == "Computing"
    await phone.call(client.SetPresence(status="online", custom_status=None))
    await until(lambda: pair.seen[-1].presence.custom_status is None)


async def test_invisible_user_appears_offline_to_others(pair: Pair, world: World) -> None:
    phone = await world.connect(pair.charles, 1)
    await pair.becomes("online")
    await phone.call(client.SetPresence(status="invisible"))
    await pair.becomes("offline")
    listed = await pair.ada.call(client.Watch(user_ids=[pair.charles.id]), server.PresenceList)
    assert listed.presences[0].status == "offline"


async def test_quick_reconnect_is_not_shown_as_offline(pair: Pair, world: World) -> None:
    phone = await world.connect(pair.charles, 1)
    await pair.becomes("online")
    seen = len(pair.seen)
    left_at = time.monotonic()
    await phone.close()
    again = await world.connect(pair.charles, 0)
    await again.synced()
    await pair.ada.synced()
    assert {event.presence.status for event in pair.seen[seen:]} <= {"online"}
    await again.close()
    gone = await pair.becomes("offline")
    assert time.monotonic() - left_at >= 5
    assert gone.presence.last_seen_at is not None
    while await world.db.fetchval('SELECT is_online FROM "user" WHERE id = $1', pair.charles.id):
        await asyncio.sleep(0.05)


async def test_user_who_hides_their_status_appears_offline(pair: Pair, world: World) -> None:
    await world.db.execute('UPDATE "user" SET show_online_status = false WHERE id = $1', pair.charles.id)
    await world.connect(pair.charles, 1)
    listed = await pair.ada.call(client.Watch(user_ids=[pair.charles.id]), server.PresenceList)
    assert (listed.presences[0].status, listed.presences[0].last_seen_at) == ("offline", None)
    assert all(event.presence.status == "offline" for event in pair.seen)


async def test_user_who_may_not_be_seen_cannot_be_watched(pair: Pair, world: World) -> None:
    private = await world.user("Private")
    await world.db.execute('UPDATE "user" SET is_private = true WHERE id = $1', private.id)
    asked = client.Watch(user_ids=[private.id, UserId(uuid7()), pair.charles.id])
    listed = await pair.ada.call(asked, server.PresenceList)
    assert [one.user_id for one in listed.presences] == [pair.charles.id]
    await world.connect(private, 1)
    await world.connect(pair.charles, 1)
    await pair.becomes("online")
    assert {event.presence.user_id for event in pair.seen} == {pair.charles.id}


async def strangers(world: World) -> tuple[list[UserSession], list[Client]]:
    """Return Ada, Charles and Mary, who are strangers, and their clients.

    Charles is on the other worker. His arrival has been announced, which may take longer than the next frames.
    """
    people = await world.users("Ada", "Charles", "Mary")
    ada, mary = await world.connect(people[0]), await world.connect(people[2])
    await mary.call(client.Watch(user_ids=[people[1].id]))
    charles = await world.connect(people[1], 1)
    await mary.event(server.PresenceChanged, lambda event: event.presence.status == "online")
    await mary.call(client.Unwatch(user_ids=[people[1].id]))
    return people, [ada, charles, mary]


async def blocks(charles: Client, ada: UserId) -> None:
    await charles.call(client.Block(user_id=ada))


async def switches_off(charles: Client, ada: UserId) -> None:
    await charles.call(client.SetSwitches(user_id=ada, can_see_online_status=False, can_see_profile=False))


async def unfriends(charles: Client, ada: UserId) -> None:
    await charles.call(client.Unfriend(user_id=ada))


@pytest.mark.parametrize("act", [blocks, switches_off, unfriends])
async def test_busy_connection_gets_no_presence_that_it_may_no_longer_see(
    world: World, act: Callable[[Client, UserId], Awaitable[None]]
) -> None:
    """A client can delay the comparison of its watches, by not reading or by frames that wait for a lock."""
    people, (ada, charles, mary) = await strangers(world)
    for friend in (people[0], people[2]):
        await world.befriend(people[1], friend)
    if act is unfriends:
        await charles.call(client.UpdateProfile(is_private=True))
    group = await world.group(ada, people[2])
    watch = client.Watch(user_ids=[people[1].id])
    for one in (ada, mary):
        await one.call(watch)
        await one.synced()
    seen = len(ada.events)
    async with world.db.transaction():
        await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", group)
        asked = asyncio.create_task(ada.ask(message(group, "This waits for the lock")))
        await waiting(world, 1)
        await act(charles, people[0].id)
        await charles.call(client.UpdateProfile(display_name="Charles Babbage"))
        await charles.call(client.SetPresence(status="busy"))
        await charles.call(client.SetPresence(status="away"))
        await mary.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    await asked
    await ada.synced()
    told = [event for event in ada.events[seen:] if isinstance(event, server.PresenceChanged | server.UserUpdated)]
    assert [event.presence.status for event in told if isinstance(event, server.PresenceChanged)] == ["offline"]
    # Switching presence off hides only presence.
    assert any(isinstance(event, server.UserUpdated) for event in told) == (act is switches_off)


async def test_name_set_together_with_privacy_is_not_shown_to_strangers(world: World) -> None:
    people, (ada, charles, mary) = await strangers(world)
    await world.befriend(people[1], people[2])
    for one in (ada, mary):
        await one.call(client.Watch(user_ids=[people[1].id]))
        await one.synced()
    seen = len(ada.events)
    await charles.call(client.UpdateProfile(is_private=True, display_name="Charles the Secret"))
    await mary.event(server.UserUpdated, lambda event: event.user.display_name == "Charles the Secret")
    await ada.event(server.PresenceChanged, lambda event: event.presence.status == "offline", start=seen)
    await ada.synced()
    assert not any(isinstance(event, server.UserUpdated) for event in ada.events[seen:])


async def leaves(group: ConversationId, charles: Client, _: UserId, __: Client) -> None:
    await charles.call(client.Leave(conversation_id=group))


async def is_removed(group: ConversationId, _: Client, them: UserId, owner: Client) -> None:
    await owner.call(client.RemoveParticipant(conversation_id=group, user_id=them))


async def loses_the_group(group: ConversationId, _: Client, __: UserId, owner: Client) -> None:
    await owner.call(client.DeleteConversation(conversation_id=group))


@pytest.mark.parametrize("act", [leaves, is_removed, loses_the_group])
async def test_private_user_is_no_longer_seen_after_leaving_the_shared_conversation(
    world: World, act: Callable[[ConversationId, Client, UserId, Client], Awaitable[None]]
) -> None:
    people, (ada, charles, mary) = await strangers(world)
    for other in (people[0], people[2]):
        await world.befriend(people[1], other)
    await world.befriend(people[0], people[2])
    group = await world.group(mary, *people[:2])
    await charles.call(client.Unfriend(user_id=people[0].id))
    await charles.call(client.UpdateProfile(is_private=True))
    for one in (ada, mary):
        listed = await one.call(client.Watch(user_ids=[people[1].id]), server.PresenceList)
        assert [presence.status for presence in listed.presences] == ["online"]
        await one.synced()
    seen = len(ada.events)
    await act(group, charles, people[1].id, mary)
    await ada.event(server.PresenceChanged, lambda event: event.presence.status == "offline", start=seen)
    await charles.call(client.SetPresence(status="busy"))
    await mary.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    await ada.synced()
    told = [event.presence.status for event in ada.events[seen:] if isinstance(event, server.PresenceChanged)]
    assert told == ["offline"]


async def test_changes_during_the_comparison_are_sent_after_it(world: World) -> None:
    people = await world.users("Ada", "Charles", "Mary")
    ada, charles = [await world.connect(one, number) for number, one in enumerate(people[:2])]
    await world.befriend(*people[:2])
    group = await world.group(ada, people[2])
    await ada.call(client.Watch(user_ids=[people[1].id]))
    seen = len(ada.events)
    async with world.db.transaction():
        await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", group)
        asked = asyncio.create_task(ada.ask(message(group, "This waits for the lock")))
        await waiting(world, 1)
        await charles.call(client.SetSwitches(user_id=people[0].id, can_send_messages=False))
        await charles.call(client.UpdateProfile(display_name="Charles Babbage"))
        await charles.call(client.SetPresence(status="busy"))
    await asked
    busy = await ada.event(server.PresenceChanged, lambda event: event.presence.status == "busy", start=seen)
    named = await ada.event(server.UserUpdated, lambda event: event.user.display_name == "Charles Babbage", start=seen)
    assert busy.presence.user_id == named.user.id == people[1].id


@pytest.mark.parametrize("is_new", [True, False], ids=["new-watch", "comparison"])
async def test_permission_read_before_a_block_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch, *, is_new: bool
) -> None:
    people, (ada, charles, mary) = await strangers(world)
    await world.befriend(*people[:2])
    watch = client.Watch(user_ids=[people[1].id])
    for one in (mary,) if is_new else (mary, ada):
        await one.call(watch)
    await until(lambda: not world.workers[0].app.hub.watchers.are_in_doubt)
    was_read, may_go_on, watchable = asyncio.Event(), asyncio.Event(), presence.watchable

    async def held(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
        found = await watchable(db, pairs)
        if not was_read.is_set():
            was_read.set()
            await may_go_on.wait()
        return found

    monkeypatch.setattr(presence, "watchable", held)
    seen = len(ada.events)
    change = client.SetSwitches(user_id=people[0].id, can_send_messages=False)
    asked: asyncio.Task[object] = asyncio.create_task(ada.call(watch) if is_new else charles.call(change))
    await was_read.wait()
    await charles.call(client.Block(user_id=people[0].id))
    await charles.call(client.SetPresence(status="busy"))
    await mary.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    may_go_on.set()
    answer = await asked
    assert not is_new or answer == server.PresenceList(presences=[])
    await until(lambda: not world.workers[0].app.hub.watchers.are_in_doubt)
    start = len(mary.events)
    await charles.call(client.UpdateProfile(display_name="Charles Babbage"))
    await mary.event(server.UserUpdated, start=start)
    await ada.synced()
    told = [event for event in ada.events[seen:] if isinstance(event, server.PresenceChanged | server.UserUpdated)]
    assert [event for event in told if isinstance(event, server.UserUpdated)] == []
    statuses = [event.presence.status for event in told if isinstance(event, server.PresenceChanged)]
    # A change that Ada has not received yet is not ended for her either.
    assert statuses == ([] if is_new else ["offline"])


class HeldReads:
    """Holds queries of watch permissions until the test releases them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[set[tuple[UserId, UserId]]] = []
        self._may_go_on: list[asyncio.Event] = []
        self._is_over = False
        self._watchable = presence.watchable
        monkeypatch.setattr(presence, "watchable", self._held)

    async def number(self, count: int) -> None:
        """Wait until `count` queries are held."""
        await until(lambda: len(self._may_go_on) >= count)

    def go_on(self, *numbers: int) -> None:
        """Release these queries."""
        for number in numbers:
            self._may_go_on[number].set()

    def end(self) -> None:
        """Release all queries, and hold no more."""
        self._is_over = True
        self.go_on(*range(len(self._may_go_on)))

    async def _held(self, db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
        self.asked.append(set(pairs))
        found = await self._watchable(db, pairs)
        may_go_on = asyncio.Event()
        self._may_go_on.append(may_go_on)
        if not self._is_over:
            await may_go_on.wait()
        return found


async def test_no_event_newer_than_the_reply_to_watch_comes_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, (ada, charles, mary) = await strangers(world)
    ada_, charles_, mary_ = (one.id for one in people)
    await world.befriend(people[0], people[2])
    group = await world.group(mary, people[0])
    await ada.event(server.ConversationJoined)
    await mary.call(client.Watch(user_ids=[charles_]))
    reads = HeldReads(monkeypatch)
    seen = len(ada.events)
    asked = asyncio.create_task(ada.call(client.Watch(user_ids=[charles_, mary_]), server.PresenceList))
    await reads.number(1)
    await mary.call(client.UpdateProfile(show_online_status=False))
    await reads.number(2)
    reads.go_on(0)
    await reads.number(3)
    assert reads.asked[2] == {(ada_, mary_)}, "only the changed user is queried again"
    await charles.call(client.SetPresence(status="busy"))
    await mary.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    # Ada's connection receives this after all earlier events.
    await mary.call(client.Typing(conversation_id=group))
    await ada.event(server.TypingStarted, start=seen)
    assert not [event for event in ada.events[seen:] if isinstance(event, server.PresenceChanged)]
    reads.go_on(1, 2)
    listed = await asked
    assert [(one.user_id, one.status) for one in listed.presences] == [(charles_, "online"), (mary_, "offline")]
    await ada.event(server.PresenceChanged, lambda event: event.presence.status == "busy", start=seen)


@pytest.mark.parametrize("is_blocked", [False, True], ids=["no-change", "block-in-between"])
async def test_watches_of_one_user_do_not_cause_repeated_queries(
    world: World, monkeypatch: pytest.MonkeyPatch, *, is_blocked: bool
) -> None:
    people, (ada, charles, mary) = await strangers(world)
    again = await world.connect(people[0])
    await mary.call(client.Watch(user_ids=[people[1].id]))
    watchers = world.workers[0].app.hub.watchers
    await until(lambda: not watchers.are_in_doubt)
    reads = HeldReads(monkeypatch)
    watch = client.Watch(user_ids=[people[1].id])
    first = asyncio.create_task(ada.call(watch, server.PresenceList))
    await reads.number(1)
    if is_blocked:
        await charles.call(client.Block(user_id=people[0].id))
        await reads.number(2)
        reads.go_on(1)
    count = len(reads.asked)
    second = asyncio.create_task(again.call(client.Watch(user_ids=[people[1].id]), server.PresenceList))
    await reads.number(count + 1)
    reads.go_on(count)
    expected = [] if is_blocked else [people[1].id]
    assert [one.user_id for one in (await second).presences] == expected
    await charles.call(client.SetPresence(status="busy"))
    await mary.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    reads.end()
    assert [one.user_id for one in (await first).presences] == expected
    assert len(reads.asked) == count + 1 + is_blocked
    await until(lambda: not watchers.are_in_doubt)
    for one in (ada, again):
        if not is_blocked:
            await one.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
        await one.synced()
        assert is_blocked != any(isinstance(event, server.PresenceChanged) for event in one.events)


async def test_change_of_privacy_takes_one_statement_for_all_watchers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def counted(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
        asked.append(len(pairs))
        return await watchable(db, pairs)

    watchable = presence.watchable
    charles = await world.user("Charles")
    one = await world.connect(charles)
    watching = [await world.connect(await world.user(f"Watcher {number}")) for number in range(10)]
    for watcher in watching:
        await watcher.call(client.Watch(user_ids=[charles.id]))
    await until(lambda: not world.workers[0].app.hub.watchers.are_in_doubt)
    monkeypatch.setattr(presence, "watchable", counted)
    for is_shown in (False, True, False):
        await one.call(client.UpdateProfile(show_online_status=is_shown))
    for watcher in watching:
        await watcher.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
    await until(lambda: not world.workers[0].app.hub.watchers.are_in_doubt)
    assert len(asked) <= 3
    assert sum(asked) >= len(watching)


async def test_unwatch_ends_events(pair: Pair, world: World) -> None:
    await pair.ada.call(client.Unwatch(user_ids=[pair.charles.id]))
    other = await world.connect(await world.user("Mary"))
    await other.call(client.Watch(user_ids=[pair.charles.id]))
    await world.connect(pair.charles, 1)
    await other.event(server.PresenceChanged)
    await pair.ada.synced()
    assert pair.seen == []


async def test_number_of_watched_users_is_bounded(pair: Pair, world: World) -> None:
    await world.db.execute(
        """INSERT INTO "user" (name, email) SELECT 'n' || n, n || '@example.org' FROM generate_series(1, 501) n"""
    )
    ids = [row[0] for row in await world.db.fetch("""SELECT id FROM "user" WHERE name LIKE 'n%'""")]
    await pair.ada.call(client.Watch(user_ids=ids[:499]))
    with refused(ErrorCode.CONFLICT, "user_ids"):
        await pair.ada.call(client.Watch(user_ids=ids[499:]))


async def test_presence_is_correct_soon_after_a_worker_is_killed(settings: Settings, cluster: Cluster) -> None:
    world = World(settings, workers=0)
    world.db = await asyncpg.connect(settings.database_url)
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    urls = cluster.urls()
    async with Client(urls[0], ada.token) as watcher:
        await watcher.settled()
        await watcher.call(client.Watch(user_ids=[charles.id, mary.id]))
        doomed = [Client(urls[1], one.token) for one in (charles, mary)]
        for one in doomed:
            await one.open()
        for who in (charles, mary):
            await watcher.event(server.PresenceChanged, lambda event: event.presence.user_id == who.id)  # noqa: B023
        cluster.workers[1].kill()
        killed_at = time.monotonic()
        async with Client(urls[0], mary.token) as back:
            await back.settled()
            await until(lambda: any(
                isinstance(event, server.PresenceChanged)
                and (event.presence.user_id, event.presence.status) == (charles.id, "offline")
                for event in watcher.events
            ))  # fmt: skip
            assert time.monotonic() - killed_at < 15
            listed = await watcher.call(client.Watch(user_ids=[charles.id, mary.id]), server.PresenceList)
            assert [one.status for one in listed.presences] == ["offline", "online"]
        for one in doomed:
            await one.close()
    await world.db.close()


async def test_draining_worker_keeps_users_with_devices_elsewhere_online(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    for who, worker in ((ada, 0), (ada, 1), (charles, 0)):
        await world.connect(who, worker)

    async def online() -> set[UserId]:
        return {row[0] for row in await world.db.fetch('SELECT id FROM "user" WHERE is_online')}

    async with asyncio.timeout(10):
        while await online() != {ada.id, charles.id}:
            await asyncio.sleep(0.05)
    await world.workers[0].app.drain()
    await world.workers[0].app.presence.close()
    assert await online() == {ada.id}


async def test_presence_of_unknown_users_is_discarded(world: World) -> None:
    (ada,) = await world.users("Ada")
    there = {one: Transition(is_online=True) for one in (ada.id, UserId(uuid7()))}
    async with asyncio.timeout(5):
        while there := await presence.seen(world.db, there):
            await asyncio.sleep(0.01)
