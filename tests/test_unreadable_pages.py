"""Every list continues past a row that cannot be read.

The length of each page is as read by PostgreSQL, and no readable row behind an unreadable one is lost.
"""

import asyncio
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec
import pytest

from protocol import client, server
from protocol.codec import now
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.payloads import Poll
from server.routes import ROUTES
from tests.world import Room, UserSession, World, sent

BROKEN = (
    "ALTER TABLE conversation DROP CONSTRAINT conversation_type_known",
    "ALTER TABLE user_relationship DROP CONSTRAINT user_relationship_type_known",
    "ALTER TABLE conversation_participant DROP CONSTRAINT conversation_participant_role_known",
    "UPDATE conversation SET type = 'room' WHERE id = '{room}'",
    "UPDATE conversation_participant SET role = 'tsar' WHERE conversation_id = '{group}' AND user_id = '{user}'",
    "UPDATE user_relationship SET type = 'cousin' WHERE to_user_id = '{user}'",
    "UPDATE message_star SET starred_at = '20000-01-01' WHERE message_id = '{message}'",
    "UPDATE message_search SET created_at = '0044-03-15 BC' WHERE message_id = '{message}'",
    "UPDATE message_reaction SET created_at = '20000-01-01' WHERE message_id = '{message}'",
    "UPDATE message SET created_at = '20000-01-01', metadata = '[1]' WHERE id = '{message}'",
    "UPDATE message_edit SET edited_at = '20000-01-01' WHERE message_id = '{message}'",
    "UPDATE poll_vote SET options = '{{NULL}}', voted_at = '0044-03-15 BC' WHERE user_id = '{user}'",
    "UPDATE report SET message_id = gen_random_uuid() WHERE message_id = '{reported}'",
    "UPDATE audit_entry SET details = '[1]', created_at = '20000-01-01' WHERE chain = '{group}' AND number = 2",
    "UPDATE draft SET updated_at = '20000-01-01' WHERE conversation_id = '{room}'",
    "UPDATE scheduled_message SET words = '1' WHERE conversation_id = '{room}'",
    "UPDATE thread_follow SET last_read_order = -1 WHERE root_id = '{root}'",
    "UPDATE session SET expires_at = '20000-01-01' WHERE user_id = '{user}'",
)
"""Statements that make a row of each listed table unreadable, wholly or in part."""
WHOLE = {
    "get_users", "list_readers", "list_drafts", "list_scheduled", "list_invitations", "list_edits", "list_pins",
    "list_threads", "find_conversations", "search_users",
}  # fmt: skip
"""Lists with a single page."""


class Walk(NamedTuple):
    """A list, the name of its entries, and the number of readable ones."""

    frame: client.Frame
    entries: str
    readable: int


async def walked(reader: Any, frame: Any, entries: str) -> list[Any]:
    """Return all entries of a list, read in pages of one."""
    found: list[Any] = []
    for _ in range(50):
        page = await reader.call(frame)
        assert len(getattr(page, entries)) <= 1
        found += getattr(page, entries)
        if isinstance(page, server.MessagePage):
            if not page.has_before:
                return found
            place = {"before": page.messages[0].id} if isinstance(frame, client.History) else {
                "before_order": page.messages[0].thread_order}  # fmt: skip
            frame = msgspec.structs.replace(frame, **place)
        elif page.after is None:
            return found
        else:
            frame = msgspec.structs.replace(frame, after=page.after)
    raise AssertionError("the list does not end")


class Filled(NamedTuple):
    """The objects that lists are about. Each list has at least three entries."""

    rooms: list[ConversationId]
    poll: MessageId
    root: MessageId
    said: list[MessageId]
    reported: list[MessageId]
    others: list[UserSession]


async def filled(room: Room, world: World) -> Filled:
    """Fill every list of Ada."""
    ada, group = room.ada, room.group
    others = await world.users("Grace", "Mary", "Joan")
    await ada.call(client.AddParticipants(conversation_id=group, participants=[one.id for one in others]))
    rooms = [await world.group(ada, room.users[1], title=f"Room {n}") for n in range(3)]
    poll = MessageId(uuid7())
    await ada.call(client.Send(conversation_id=group, message_id=poll, content="?", payload=Poll(options=["a", "b"])))
    voters = [await world.connect(one) for one in others]
    for one, voter in zip(others, voters, strict=True):
        await ada.call(client.Follow(user_id=one.id))
        await voter.call(client.Vote(**room.at(poll), options=[0]))
        await ada.call(client.SetRole(conversation_id=group, user_id=one.id, role="moderator"))
    root = await sent(ada, group, "The root")
    said = [await sent(ada, group, f"Found {n}", parent_message_id=root, also_in_conversation=True) for n in range(3)]
    reported: list[MessageId] = []
    soon = now() + timedelta(hours=1)
    for n, message in enumerate(said):
        await ada.call(client.Star(**room.at(message)))
        await ada.call(client.Edit(**room.at(message), content=f"Found again by {n}"))
        await room.charles.call(client.React(**room.at(message), emoji="👍"))
        reported.append(await sent(room.charles, group, f"Hello @Ada, {n}"))
        await voters[n].call(client.ReportMessage(**room.at(reported[-1]), reason="Rude"))
        await ada.call(client.SetDraft(conversation_id=rooms[n], content="I thi"))
        later = MessageId(uuid7())
        await ada.call(client.Schedule(conversation_id=rooms[n], message_id=later, content="Later", send_at=soon))
    return Filled(rooms, poll, root, said, reported, others)


def walks_of(room: Room, there: Filled) -> list[Walk]:
    """Return the lists that have pages."""
    group = room.group
    return [
        Walk(client.ListConversations(limit=1), "conversations", 3),
        Walk(client.ListParticipants(conversation_id=group, limit=1), "participants", 4),
        Walk(client.ListVotes(**room.at(there.poll), limit=1), "votes", 3),
        Walk(client.ListReports(conversation_id=group, limit=1), "reports", 2),
        Walk(client.ListAudit(conversation_id=group, limit=1), "entries", 3),
        Walk(client.ListRelationships(limit=1), "relationships", 2),
        Walk(client.ListStars(limit=1), "messages", 3),
        Walk(client.ListFeed(limit=1, kinds=["reaction"]), "entries", 2),
        Walk(client.ListFeed(limit=1, kinds=["mention"]), "entries", 3),
        Walk(client.Search(text="found", limit=1), "hits", 3),
        Walk(client.Search(text="found", limit=1, order="relevance"), "hits", 3),
        Walk(client.History(conversation_id=group, limit=1), "messages", 9),
        Walk(client.ListReplies(**room.at(there.root), limit=1), "messages", 3),
    ]


def whole_of(room: Room, there: Filled) -> list[Walk]:
    """Return the lists that have one page here."""
    return [
        Walk(client.ListDrafts(), "drafts", 3), Walk(client.ListScheduled(), "scheduled", 3),
        Walk(client.ListThreads(), "threads", 1), Walk(client.ListEdits(**room.at(there.said[1])), "edits", 1),
    ]  # fmt: skip


async def test_every_list_continues_past_an_unreadable_row(
    room: Room, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    there = await filled(room, world)
    group, middle = room.group, {"user": there.others[1].id, "message": there.said[1], "room": there.rooms[1]}
    middle["reported"] = there.reported[1]
    await world.db.execute("SET session_replication_role = replica")
    for statement in BROKEN:
        done = await world.db.execute(statement.format(**middle, group=group, root=there.root))
        assert done != "UPDATE 0", statement
    walks = walks_of(room, there)
    listed = {str(frame.__struct_config__.tag) for frame in ROUTES if "limit" in frame.__struct_fields__}
    assert {str(type(one.frame).__struct_config__.tag) for one in walks} | WHOLE >= listed
    again = await world.connect(room.users[0])
    for one in walks:
        assert (one.frame, len(await walked(again, one.frame, one.entries))) == (one.frame, one.readable)
    for frame, entries, readable in whole_of(room, there):
        assert (frame, len(getattr(await again.call(frame), entries))) == (frame, readable)
    # Sessions end in a year that Python cannot represent, and roles are invalid. Others can still connect.
    fresh = await asyncio.gather(*(world.connect(one) for one in [*there.others, *room.users]))
    assert not [one for one in fresh if one.is_over]
    lines = [record.getMessage() for record in caplog.records if "unreadable" in record.getMessage()]
    assert len(lines) == len(set(lines)), "each row is logged once"
