"""Rows of a user carry the user version of their last change, by which a client finds the latest state.

A reply may be read before a change, and arrive after the event about it. An event that is missed repairs nothing then,
because none is missing.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from protocol import client, server, values
from protocol.codec import now
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.server import MessageList, OwnEvent, Result
from prove import truth
from prove.mirror import Mirror
from prove.own_rows import Row, row_of, rows_in
from server.core.config import Settings
from tests.world import World, sent

OWN_ROWS: dict[type[msgspec.Struct], str] = {
    server.Conversations: "conversations.preferences.user_version",
    server.ConversationJoined: "view.preferences.user_version",
    server.StartOver: "view.preferences.user_version",
    server.ReadUpTo: "mark_version",
    server.OneConversation: "view.preferences.user_version",
    server.ConversationPage: "conversations.preferences.user_version",
    server.MessageList: "star_versions",
    server.OneThread: "thread.follow.user_version",
    server.ThreadList: "threads.follow.user_version",
    server.OneThreadFollow: "follow.user_version",
    server.DraftList: "drafts.user_version",
    server.OneScheduled: "scheduled.user_version",
    server.ScheduledList: "scheduled.user_version",
    server.OneMe: "me.user_version",
    server.InvitationList: "invitations.user_version",
    server.OneRelationship: "relationship.user_version",
    server.RelationshipPage: "relationships.relationship.user_version",
}
"""Frames and results with own rows, and the number of these rows."""
OTHERS: dict[str, tuple[type[msgspec.Struct], ...]] = {
    "state of a conversation, by `version`, or positions and faces, by `revision`": (
        server.Changes, server.MessagePage, server.OneMessage, server.ParticipantPage, server.Resumed, server.Ready,
        server.PresenceList, server.UserList, server.OneProfile,
    ),
    "messages with their own `version`; a client shows its copy if it has one": (server.SearchPage, server.FeedPage),
    "the outcome of the frame": (
        server.Done, server.Sent, server.Changed, server.Added, server.Pong, server.Reply, server.Error,
    ),
    "about the connection": (server.ConversationLeft, server.Heartbeat, server.GoingAway),
    "no event has any of it": (
        server.EditPage, server.VotePage, server.DeliveryReport, server.Readers, server.Badge, server.PushKey,
        server.PublicConversationList, server.ReportPage, server.AuditPage,
    ),
}  # fmt: skip
"""All others, by what they have instead."""
MOST_A_DAY = 8
"""How often the test invites a user, and turns a switch off. Both are limited per day."""


def types_in(hint: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield the structs in a type hint."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for one in get_args(hint):
        yield from types_in(one)


def values_in(kind: type[msgspec.Struct]) -> set[type[msgspec.Struct]]:
    """Return the structs in a struct, at all levels."""
    found: set[type[msgspec.Struct]] = set()
    waiting = [kind]
    while waiting:
        new = {one for hint in get_type_hints(waiting.pop()).values() for one in types_in(hint)} - found
        found |= new
        waiting += new
    return found


OWN_VALUES = {one for event in get_args(OwnEvent) for hint in get_type_hints(event).values() for one in types_in(hint)}


def test_each_value_of_an_own_row_has_its_user_version() -> None:
    assert {one.__name__ for one in OWN_VALUES} >= {"Me", "Draft", "Preferences"}
    for one in OWN_VALUES:
        assert "user_version" in one.__struct_fields__, f"{one.__name__} needs the user version of its row"


def test_each_reply_and_view_with_own_rows_has_their_number() -> None:
    listed = [*OWN_ROWS, *(one for some in OTHERS.values() for one in some)]
    known = {*get_args(Result), *get_args(server.ConnectionFrame)}
    assert len(listed) == len(set(listed))
    assert known == set(listed), "list a new frame or result, with the number of the own rows in it"
    for kind, path in OWN_ROWS.items():
        at = {kind}
        for name in path.split(".")[:-1]:
            at = {found for one in at for found in types_in(get_type_hints(one)[name])}
        assert all(path.split(".")[-1] in one.__struct_fields__ for one in at), (kind, path)
    for kind in set(listed) - OWN_ROWS.keys() - {server.Reply}:
        assert not values_in(kind) & OWN_VALUES, kind


def draft(version: int, content: str) -> values.Draft:
    return values.Draft(conversation_id=PLACE, content=content, updated_at=now(), user_version=version)


PLACE = ConversationId(uuid7())


def test_client_ignores_a_reply_that_is_older_than_an_event_before_it() -> None:
    mirror = Mirror()
    mirror.receive(server.DraftChanged(user_version=7, draft=draft(7, "Dear Ada")))
    mirror.read(server.DraftList(drafts=[draft(5, "Dear")]))
    assert mirror.drafts == {PLACE: "Dear Ada"}
    mirror.read(server.DraftList(drafts=[draft(9, "Dear Charles")]))
    mirror.receive(server.DraftChanged(user_version=8, draft=draft(8, "")))
    assert mirror.drafts == {PLACE: "Dear Charles"}, "events may be older than a reply, too"
    star = values.StarredMessage(
        conversation_id=PLACE, message_id=MessageId(uuid7()), is_removed=True, starred_at=now(), user_version=10
    )
    mirror.receive(server.StarChanged(user_version=10, star=star))
    mirror.read(MessageList(messages=[], star_versions={star.message_id: 6}))
    assert mirror.stars == set(), "the numbers of deleted rows count"
    mirror.receive(server.OwnStartOver(user_version=0, reason="other_epoch"))
    mirror.read(server.DraftList(drafts=[draft(1, "Hello")]))
    assert mirror.drafts == {PLACE: "Hello"}, "another database counts from the beginning"


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    fast = msgspec.structs.replace(settings, write_rate=1e6, read_rate=1e6, ephemeral_rate=1e6, database_connections=8)
    async with World(fast) as world:
        yield world


class Watcher:
    """Keeps what a device has received. Each state of a row has one number, and each number one state."""

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.seen: dict[tuple[Row, int], OwnEvent] = {}
        self.kinds: set[str] = set()

    def receive(self, frame: server.ServerFrame) -> None:
        self.mirror.receive(frame)
        if isinstance(frame, OwnEvent):
            self._check(frame)
        else:
            self._check_rows(frame)

    def read(self, result: Result) -> None:
        self.mirror.read(result)
        self._check_rows(result)
        if isinstance(result, MessageList):
            assert result.star_versions.keys() == {one.id for one in result.messages}
            assert all(result.star_versions.values())
            for one, number in result.star_versions.items():
                event = self.seen.get((("star", one), number))
                assert event is None or not event.star.is_removed  # type: ignore[union-attr]
                self.kinds.add("star")

    def _check_rows(self, value: object) -> None:
        for event in rows_in(value):
            self._check(event)
            self.kinds.add(row_of(event)[0])

    def _check(self, event: OwnEvent) -> None:
        there = self.seen.setdefault((row_of(event), event.user_version), event)
        assert there == event, "two states of a row with one number"


@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.long)])
async def test_device_that_reads_while_others_write_ends_in_the_stored_state(world: World, rounds: int) -> None:
    ada, bob = await world.users("Ada", "Bob")
    reading, one, other = [await world.connect(ada, number) for number in (0, 1, 0)]
    friend = await world.connect(bob, 1)
    watcher = Watcher()
    reading.on_event = watcher.receive
    group = await world.group(one, bob)
    club = await world.channel(friend)
    await reading.event(server.ConversationJoined)
    message_id = await sent(one, group)
    place: dict[str, Any] = {"conversation_id": group, "message_id": message_id}
    later = MessageId(uuid7())
    await one.call(client.Mute(user_id=bob.id))
    reads: list[type[client.Frame]] = [
        client.GetMe, client.ListDrafts, client.ListScheduled, client.ListStars, client.ListRelationships,
        client.ListInvitations, client.ListConversations,
    ]  # fmt: skip
    is_over = False

    def changes(turn: int) -> list[client.Frame]:
        text = f"Text {turn}"
        return [
            client.UpdateProfile(bio=text), client.SetDraft(conversation_id=group, content=text),
            client.SetPreferences(conversation_id=group, pin_order=turn),
            (client.Unstar if turn % 2 else client.Star)(**place),
            (client.UnfollowThread if turn % 2 else client.FollowThread)(**place),
            client.Schedule(
                conversation_id=group, message_id=later, content=text, send_at=now() + timedelta(hours=turn + 1)
            ),
            client.SetSwitches(user_id=bob.id, can_see_profile=turn % 2 == 1 or turn > MOST_A_DAY),
            client.Decline(conversation_id=club),
        ]  # fmt: skip

    async def read(make: Any) -> None:
        while not is_over:
            watcher.read(await reading.call(make()))

    async with asyncio.TaskGroup() as tasks:
        for make in reads:
            tasks.create_task(read(make))
        tasks.create_task(read(lambda: client.GetThread(**place)))
        for turn in range(rounds):
            if turn < MOST_A_DAY:
                await friend.call(client.Invite(conversation_id=club, participants=[ada.id]))
            frames = changes(turn)
            random.shuffle(frames)
            await asyncio.gather(*((one, other)[number % 2].call(frame) for number, frame in enumerate(frames)))
        is_over = True
    stored = await truth.own(world.db, ada.id)
    async with asyncio.timeout(10):
        while truth.own_of(watcher.mirror) != stored:
            await asyncio.sleep(0.01)
    assert watcher.kinds == {"me", "draft", "scheduled", "star", "relationship", "participation", "follow"}
    numbered = {row for row, number in watcher.seen if number}
    assert {row[0] for row in numbered} == watcher.kinds
    assert watcher.mirror.wrong == {}


async def test_mark_that_ended_with_the_membership_has_an_older_number(world: World) -> None:
    ada, bob = await world.users("Ada", "Bob")
    one, other = await world.connect(ada), await world.connect(bob)
    channel = await world.channel(one, is_public=True)
    await other.call(client.Join(conversation_id=channel))
    message_id = await sent(one, channel)
    await other.call(client.MarkUnread(conversation_id=channel, message_id=message_id))
    marked = await other.call(client.GetConversation(conversation_id=channel), server.OneConversation)
    await other.call(client.Leave(conversation_id=channel))
    joined = await other.call(client.Join(conversation_id=channel), server.OneConversation)
    assert (marked.view.preferences.unread_from_id, joined.view.preferences.unread_from_id) == (message_id, None)
    assert marked.view.preferences.user_version < joined.view.preferences.user_version
