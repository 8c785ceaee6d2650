"""Crowds: in a large conversation, changes of participants, reactions and votes are delivered together."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from protocol import client, server
from protocol.codec import encode
from protocol.ids import ConversationId, MessageId
from protocol.limits import MAX_MEMBERSHIPS
from protocol.payloads import Poll
from prove.client import Client
from prove.mirror import Mirror
from prove.truth import assert_same, read_conversation, recount
from server.core import crowds
from server.core.crowds import SAMPLED_PARTICIPANTS, Change, Crowd
from server.domain import membership
from server.hub import paced, topics, watchers
from server.queries import joins
from tests.world import UserSession, World, events_of, message, sent, until, without_bus

LONG = 3_600.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make each conversation with more than two connected users per worker a crowd, which gathers nothing yet."""
    monkeypatch.setattr(topics, "MAX_SHARED_PARTICIPANTS", 2)
    monkeypatch.setattr(membership, "MAX_SHARED_PARTICIPANTS", 2)
    monkeypatch.setattr(topics, "CROWD_SECONDS", 0.0)
    monkeypatch.setattr(joins.FUNCTION, "_limits", (2, MAX_MEMBERSHIPS))
    return monkeypatch


class Device:
    """A connection, and a mirror of what it received."""

    def __init__(self, connection: Client) -> None:
        self.connection = connection
        self.mirror = Mirror()
        self.received = 0
        for event in connection.events:
            self.mirror.receive(event)
        connection.on_event = self.receive

    def receive(self, frame: server.ServerFrame) -> None:
        self.mirror.receive(frame)
        if isinstance(frame, server.Changes | server.DurableEvent):
            self.received += 1

    async def load(self, one: ConversationId) -> None:
        """Request the messages and participants, as a client does that shows them."""
        while one in self.mirror.unloaded:
            page = await self.connection.call(client.History(conversation_id=one, limit=100), server.MessagePage)
            self.mirror.load(one, page)
            found = await self.connection.call(
                client.ListParticipants(conversation_id=one, limit=100), server.ParticipantPage
            )
            self.mirror.load_participants(one, found.participants)
            self.mirror.loaded(one)

    def changes(self, one: ConversationId) -> list[server.Changes]:
        return [
            event
            for event in self.connection.events
            if isinstance(event, server.Changes) and event.conversation_id == one
        ]


class Channel:
    """A public channel with five participants, all connected, at two workers or at one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.users: list[UserSession] = []
        self.devices: list[Device] = []
        self.id: ConversationId

    async def add(self, count: int, *, workers: int = 2) -> None:
        """Connect further users, who do not take part."""
        for _ in range(count):
            self.users.append(await self.world.user(f"Person{len(self.users)}"))
            self.devices.append(Device(await self.world.connect(self.users[-1], len(self.users) % workers)))

    async def join(self, devices: Sequence[Device]) -> None:
        await asyncio.gather(*(one.connection.call(client.Join(conversation_id=self.id)) for one in devices))

    async def settled(self) -> None:
        """Wait until all participants have the version of the database, and compare their copies with its rows."""
        truth = await read_conversation(self.world.db, self.id)
        inside = [one for one in self.devices if one.connection.ready.user.id in truth.participants]
        await until(lambda: all(one.mirror.copies[self.id].version >= truth.version for one in inside))
        for one in inside:
            await one.load(self.id)
            assert_same(one.mirror.copies[self.id], truth)
            assert one.mirror.wrong == {}
        assert await recount(self.world.db) == []


async def channel_of(world: World, count: int = 5, *, workers: int = 2) -> Channel:
    channel = Channel(world)
    await channel.add(count, workers=workers)
    channel.id = await world.channel(channel.devices[0].connection, is_public=True)
    await channel.join(channel.devices[1:])
    await channel.settled()
    return channel


async def test_joins_into_a_crowd_reach_each_participant_a_few_times(world: World, small: pytest.MonkeyPatch) -> None:
    """The number of events and bytes depends on the time, not on the number of joins. No join is refused."""
    channel = await channel_of(world, 8)
    small.setattr(topics, "CROWD_SECONDS", 0.2)
    inside, count = list(channel.devices), 40
    await channel.add(count)
    for one in inside:
        one.connection.events.clear()
        one.received = 0
    began = time.monotonic()
    await channel.join(channel.devices[len(inside) :])
    await channel.settled()
    periods = int((time.monotonic() - began) / 0.2) + 2
    for one in inside:
        # Each worker publishes the joins of its own users, so a gap may divide a period.
        assert one.received <= 2 * periods < count
        partial = [changes for changes in one.changes(channel.id) if changes.is_partial]
        assert partial
        assert all(len(changes.events) <= SAMPLED_PARTICIPANTS for changes in partial)
        assert len(encode(partial[-1])) < 500 * SAMPLED_PARTICIPANTS
        assert one.mirror.copies[channel.id].conversation.participant_count == len(inside) + count
    assert events_of(inside[0].connection, server.MessageSent) == []


@pytest.mark.usefixtures("small")
async def test_joins_and_departures_post_system_messages_in_small_conversations_alone(world: World) -> None:
    channel = Channel(world)
    await channel.add(4)
    channel.id = await world.channel(channel.devices[0].connection, is_public=True)
    for one in channel.devices[1:]:
        await one.connection.call(client.Join(conversation_id=channel.id))
    for one in channel.devices[1:]:
        await one.connection.call(client.Leave(conversation_id=channel.id))
    rows = await world.db.fetch(
        "SELECT sender_id, system_message_type FROM message WHERE conversation_id = $1 ORDER BY sent_version",
        channel.id,
    )
    first, _, last = (one.id for one in channel.users[1:])
    assert [tuple(row) for row in rows] == [(first, "join"), (last, "leave")]


async def test_reactions_in_a_crowd_are_counted_and_own_ones_reach_every_device(
    world: World, small: pytest.MonkeyPatch
) -> None:
    channel = await channel_of(world, 12, workers=1)
    small.setattr(topics, "CROWD_SECONDS", LONG)
    tablet = Device(await world.connect(channel.users[1]))
    about = await sent(channel.devices[0].connection, channel.id)
    place: dict[str, Any] = {"conversation_id": channel.id, "message_id": about}
    await asyncio.gather(
        *(one.connection.call(client.React(**place, emoji=emoji)) for one in channel.devices for emoji in "👍🎉")
    )
    await channel.devices[1].connection.call(client.Unreact(**place, emoji="🎉"))
    await sent(channel.devices[0].connection, channel.id)  # does not wait
    await channel.settled()
    own = channel.users[1].id
    for one in (*channel.devices, tablet):
        found = events_of(one.connection, server.MessageReacted, server.MessageUnreacted)
        assert {event.emoji: event.count for event in found} == {"👍": 12, "🎉": 11}
        mine = [type(event) for event in found if event.user_id == own]
        if one in (channel.devices[1], tablet):
            assert len(mine) == 3
            assert found == sorted(found, key=lambda event: event.version)
        # The first one did not wait for others.
        assert len(found) <= 1 + 2 + 3
    assert not any(changes.is_partial for one in channel.devices for changes in one.changes(channel.id)[-1:])


async def test_message_does_not_wait_and_arrives_after_the_changes_before_it(
    world: World, small: pytest.MonkeyPatch
) -> None:
    channel = await channel_of(world, workers=1)
    small.setattr(topics, "CROWD_SECONDS", LONG)
    first = await sent(channel.devices[0].connection, channel.id)
    await channel.settled()
    for one in channel.devices:
        one.connection.events.clear()
    for one in channel.devices:
        await one.connection.call(client.React(conversation_id=channel.id, message_id=first, emoji="👍"))
    assert len(events_of(channel.devices[4].connection, server.MessageReacted)) == 1
    await sent(channel.devices[0].connection, channel.id)
    await channel.settled()
    kinds = [type(event) for event in channel.devices[4].connection.events]
    assert [kind for kind in kinds if kind is not server.Heartbeat] == [
        server.MessageReacted,
        server.Changes,
        server.MessageSent,
    ]


async def test_device_that_attaches_meanwhile_receives_only_later_changes(
    world: World, small: pytest.MonkeyPatch
) -> None:
    channel = await channel_of(world, workers=1)
    small.setattr(topics, "CROWD_SECONDS", LONG)
    first = await sent(channel.devices[0].connection, channel.id)
    versions = []
    late = channel.devices[0]
    for one in list(channel.devices):
        frame = client.React(conversation_id=channel.id, message_id=first, emoji="👍")
        versions.append((await one.connection.call(frame, server.Changed)).version)
        if len(versions) == 2:
            channel.devices.append(late := Device(await world.connect(channel.users[1])))
    assert late.mirror.copies[channel.id].version == versions[1]
    await sent(channel.devices[0].connection, channel.id)
    await channel.settled()
    (changes,) = late.changes(channel.id)
    assert (changes.since, changes.version) == (versions[1], versions[4])
    assert [event.version for event in changes.events] == [versions[4]]


async def test_heartbeat_does_not_report_gathered_changes_as_lost(world: World, small: pytest.MonkeyPatch) -> None:
    channel = await channel_of(world, workers=1)
    small.setattr(topics, "CROWD_SECONDS", LONG)
    first = await sent(channel.devices[0].connection, channel.id)
    reply = [
        await one.connection.call(
            client.React(conversation_id=channel.id, message_id=first, emoji="👍"), server.Changed
        )
        for one in channel.devices
    ]
    there = world.workers[0].app.hub.topics
    mine = channel.devices[3].mirror.copies[channel.id].version
    assert there.recent([channel.id], since=0) == {channel.id: mine}
    assert mine < reply[-1].version


async def test_conversation_that_shrinks_receives_each_change_again(world: World, small: pytest.MonkeyPatch) -> None:
    channel = await channel_of(world, workers=1)
    small.setattr(topics, "CROWD_SECONDS", 0.1)
    await channel.join(channel.devices)
    for one in channel.devices[:1:-1]:
        await one.connection.call(client.Leave(conversation_id=channel.id))
    await channel.settled()
    kept = channel.devices[:2]
    first = await sent(kept[0].connection, channel.id)
    for one in kept:
        one.connection.events.clear()
    for emoji in "👍🎉😂":
        await kept[0].connection.call(client.React(conversation_id=channel.id, message_id=first, emoji=emoji))
    await channel.settled()
    for one in kept:
        assert one.changes(channel.id) == []
        assert len(events_of(one.connection, server.MessageReacted)) == 3


async def test_changes_that_the_bus_lost_are_left_out_alike(world: World, small: pytest.MonkeyPatch) -> None:
    channel = await channel_of(world, 8)
    small.setattr(topics, "CROWD_SECONDS", 0.1)
    first = await sent(channel.devices[0].connection, channel.id)
    await channel.settled()
    there = channel.devices[::2]  # at the second worker
    for one in there:
        one.connection.events.clear()
    async with without_bus(world.workers[1].app.hub.bus):
        for one in channel.devices[1::2]:  # at the first worker
            await one.connection.call(client.React(conversation_id=channel.id, message_id=first, emoji="👍"))
    await channel.settled()
    for one in there:
        assert len(events_of(one.connection, server.MessageReacted)) < 4


@pytest.mark.parametrize("is_crowd", [True, False])
async def test_resume_leaves_out_the_changes_of_others_in_a_crowd(
    world: World, small: pytest.MonkeyPatch, *, is_crowd: bool
) -> None:
    small.setattr(crowds, "SAMPLED_PARTICIPANTS", 2)
    channel = await channel_of(world, 6, workers=1)
    if not is_crowd:
        small.setattr(topics, "MAX_SHARED_PARTICIPANTS", 100)
    first = await sent(channel.devices[0].connection, channel.id)
    await channel.settled()
    gone, channel.devices = channel.devices[-1], channel.devices[:-1]
    own = gone.connection.ready.user.id
    await gone.connection.close()
    place: dict[str, Any] = {"conversation_id": channel.id, "message_id": first}
    other = await world.connect(channel.users[5], 1)
    for connection in (*(one.connection for one in channel.devices), other):
        await connection.call(client.React(**place, emoji="👍"))
    for one in channel.devices[2:]:
        await one.connection.call(client.Leave(conversation_id=channel.id))
        await one.connection.call(client.Join(conversation_id=channel.id))
    back = await world.connect(channel.users[5], 0, query="?resume=1")
    channel.devices.append(device := Device(back))
    device.mirror = gone.mirror
    await back.call(client.Resume(epoch=back.ready.epoch, versions=gone.mirror.versions), server.Resumed)
    await channel.settled()
    (changes,) = device.changes(channel.id)
    assert changes.is_partial is is_crowd
    reactions = [event for event in changes.events if isinstance(event, server.MessageReacted)]
    assert len(reactions) == (1 if is_crowd else 6)
    assert own in {event.user_id for event in reactions}
    others = [event for event in changes.events if isinstance(event, server.ParticipantChanged)]
    assert len(others) == (2 if is_crowd else 3)


async def test_presence_of_a_user_with_many_watchers_is_delivered_at_intervals(
    world: World, small: pytest.MonkeyPatch
) -> None:
    """A single watcher at another worker receives each change. All end with the last one."""
    small.setattr(paced, "CROWD_SECONDS", 0.2)
    small.setattr(watchers, "MAX_SHARED_PARTICIPANTS", 2)
    celebrity, *people = await world.users("Ada", "Bob", "Charles", "Mary", "Jane")
    ada = await world.connect(celebrity)
    fans = [await world.connect(who, number == 3) for number, who in enumerate(people)]
    for one in fans:
        await one.call(client.Watch(user_ids=[celebrity.id]))
    await asyncio.sleep(0.25)  # the arrival
    for one in fans:
        one.events.clear()
    began = time.monotonic()
    for number in range(20):
        await ada.call(client.SetPresence(status="online", custom_status=f"Number {number}"))
        await ada.call(client.UpdateProfile(name=f"Ada {number}"))
    shown = [[event.presence.custom_status for event in events_of(one, server.PresenceChanged)] for one in fans]
    periods = int((time.monotonic() - began) / 0.2) + 2
    assert all(len(each) <= periods for each in shown[:3])
    for one in fans:
        await until(lambda one=one: events_of(one, server.PresenceChanged)[-1].presence.custom_status == "Number 19")  # type: ignore[misc]
        await until(lambda one=one: events_of(one, server.UserUpdated)[-1].user.name == "Ada 19")  # type: ignore[misc]
    assert len(events_of(fans[3], server.UserUpdated)) == 20


async def test_presence_that_waits_is_not_overtaken_when_watchers_leave(
    world: World, small: pytest.MonkeyPatch
) -> None:
    small.setattr(paced, "CROWD_SECONDS", 0.2)
    small.setattr(watchers, "MAX_SHARED_PARTICIPANTS", 2)
    celebrity, *people = await world.users("Ada", "Bob", "Charles", "Mary")
    ada = await world.connect(celebrity)
    fans = [await world.connect(who) for who in people]
    for one in fans:
        await one.call(client.Watch(user_ids=[celebrity.id]))
    for status in ("First", "Second"):
        await ada.call(client.SetPresence(status="online", custom_status=status))
    await fans[2].call(client.Unwatch(user_ids=[celebrity.id]))
    await ada.call(client.SetPresence(status="online", custom_status="Third"))
    await until(lambda: events_of(fans[0], server.PresenceChanged)[-1].presence.custom_status == "Third")
    hub = world.workers[0].app.hub
    await until(lambda: not hub.watchers._paced.is_waiting(celebrity.id))  # noqa: SLF001
    await fans[0].call(client.Ping())
    revisions = [event.presence.revision for event in events_of(fans[0], server.PresenceChanged)]
    assert revisions == sorted(revisions)


def test_the_latest_change_of_each_object_is_kept() -> None:
    """Unknown events and messages are all kept."""
    events = [
        b'{"type":"message_reacted","version":1,"message_id":"m","emoji":"a","user_id":"00000000-0000-7000-8000-000000000001"}',
        b'{"type":"message_unreacted","version":2,"message_id":"m","emoji":"a","user_id":"00000000-0000-7000-8000-000000000002"}',
        b'{"type":"message_reacted","version":3,"message_id":"m","emoji":"b","user_id":"00000000-0000-7000-8000-000000000002"}',
        b'{"type":"message_sent","version":4,"message":{"id":"m"}}',
        b'{"type":"not_known_yet","version":5}',
        b'{"type":"not_known_yet","version":6}',
    ]
    changes = [Change.of(event) for event in events]
    crowd = Crowd(changes)
    assert crowd.delivered() == ([1, 2, 3, 4, 5], False)
    first, second = changes[0].user_id, changes[1].user_id
    assert first is not None
    assert second is not None
    assert crowd.has_own(first)
    assert not crowd.has_own(second), "what everyone receives includes all changes of this user"
    assert crowd.delivered(first).places == [0, 1, 2, 3, 4, 5]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["join", "leave", "send", "react", "unreact", "vote", "edit", "delete", "rename", "drop", "wait"]
        ),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture
async def crowd(world: World, small: pytest.MonkeyPatch) -> Channel:
    small.setattr(topics, "CROWD_SECONDS", 0.02)
    small.setattr(crowds, "SAMPLED_PARTICIPANTS", 1)
    channel = Channel(world)
    await channel.add(6, workers=1)
    return channel


@examples(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
async def test_old_state_plus_events_equals_new_state_in_a_crowd(
    crowd: Channel, actions: list[tuple[str, int, int]]
) -> None:
    """Users act concurrently, two at a time, join and leave around the limit, and lose their connections."""
    crowd.id = await crowd.world.channel(crowd.devices[0].connection, is_public=True)
    await crowd.join(crowd.devices[1:4])
    ids: list[MessageId] = [await sent(crowd.devices[0].connection, crowd.id)]
    running: list[asyncio.Task[object]] = []
    for action, who, number in actions:
        device = crowd.devices[who]
        if action == "drop":
            await asyncio.gather(*running)
            await device.connection.drop()
            back = await crowd.world.connect(crowd.users[who], query="?resume=1")
            crowd.devices[who] = again = Device(back)
            again.mirror = device.mirror
            device.mirror.begin_resume()
            await back.call(client.Resume(epoch=back.ready.epoch, versions=again.mirror.versions), server.Resumed)
        elif action == "wait":
            await asyncio.gather(*running)
            await asyncio.sleep(0.02)
        elif action != "leave" or who:  # the owner stays
            frame = _frame(action, crowd.id, ids[number % len(ids)])
            if isinstance(frame, client.Send):
                ids.append(frame.message_id)
            running.append(asyncio.ensure_future(device.connection.ask(frame)))
            if len(running) % 2:
                await asyncio.gather(*running)
    await asyncio.gather(*running)
    await crowd.settled()


def _frame(action: str, about: ConversationId, message_id: MessageId) -> client.Frame:
    place: dict[str, Any] = {"conversation_id": about, "message_id": message_id}
    frames: dict[str, client.Frame] = {
        "join": client.Join(conversation_id=about),
        "leave": client.Leave(conversation_id=about),
        "send": message(about, payload=Poll(options=["Yes", "No"])),
        "react": client.React(**place, emoji="👍"),
        "unreact": client.Unreact(**place, emoji="👍"),
        "vote": client.Vote(**place, options=[message_id.int % 2]),
        "edit": client.Edit(**place, content="Edited"),
        "delete": client.Delete(**place),
        "rename": client.UpdateConversation(conversation_id=about, title="Another title"),
    }
    return frames[action]
