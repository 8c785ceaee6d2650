"""A user who leaves a conversation and returns keeps personal settings, but no permissions and no advantage."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from uuid import UUID

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId
from protocol.values import ConversationSettings
from prove.client import Client
from tests.world import UserSession, World, message, refused, sent

Way: TypeAlias = Callable[[Client, Client, UserSession, ConversationId], Awaitable[object]]

COLUMNS = {
    "the key": {"id", "conversation_id", "user_id"},
    "as for a user who joins for the first time": {
        "role", "status", "can_add_members", "can_remove_members", "can_edit_conversation", "can_delete_messages",
        "can_pin_messages", "invited_by", "left_at", "left_version", "unread_from_id", "unread_from_version",
    },
    "set again": {"joined_at", "version", "joined_version"},
    "never decreased, since messages in between count as read": {"last_read_version", "user_version"},
    "kept: personal settings and delivery": {
        "notifications_enabled", "muted_until", "is_muted", "pin_order", "is_hidden", "notification_level",
        "last_read_message_id", "last_read_at", "delivered_message_id", "delivered_version", "delivered_at",
    },
    "kept, or leaving would end the wait of slow mode": {"last_sent_at"},
}  # fmt: skip
"""All columns of conversation_participant, by their change on leaving and returning."""

CHANGE_ALL = """
UPDATE conversation_participant SET role = 'admin', can_add_members = true, can_remove_members = true,
    can_edit_conversation = true, can_delete_messages = true, can_pin_messages = true, notifications_enabled = false,
    muted_until = now(), is_muted = true, last_read_message_id = $3, last_read_version = 4, last_read_at = now(),
    joined_at = '2020-01-01', invited_by = $2, pin_order = 3, is_hidden = true, notification_level = 'none',
    last_sent_at = now(), delivered_message_id = $3, delivered_version = 4, delivered_at = now(), unread_from_id = $3,
    unread_from_version = 4, user_version = 1
WHERE conversation_id = $1 AND user_id = $2
"""
ROW = "SELECT * FROM conversation_participant WHERE conversation_id = $1 AND user_id = $2"


async def leave(them: Client, _: Client, __: UserSession, about: ConversationId) -> None:
    await them.call(client.Leave(conversation_id=about))


async def be_removed(_: Client, owner: Client, who: UserSession, about: ConversationId) -> None:
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=who.id))


async def be_banned(_: Client, owner: Client, who: UserSession, about: ConversationId) -> None:
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=who.id, ban=True))
    await owner.call(client.Unban(conversation_id=about, user_id=who.id))


async def decline(them: Client, owner: Client, who: UserSession, about: ConversationId) -> None:
    await leave(them, owner, who, about)
    await owner.call(client.Invite(conversation_id=about, participants=[who.id], role="admin"))
    await them.call(client.Decline(conversation_id=about))


async def join(them: Client, _: Client, __: UserSession, about: ConversationId) -> None:
    await them.call(client.Join(conversation_id=about))


async def follow_an_invitation(them: Client, owner: Client, who: UserSession, about: ConversationId) -> None:
    await owner.call(client.Invite(conversation_id=about, participants=[who.id]))
    await them.call(client.Join(conversation_id=about))


async def be_added(_: Client, owner: Client, who: UserSession, about: ConversationId) -> None:
    await owner.call(client.AddParticipants(conversation_id=about, participants=[who.id]))


WAYS: list[tuple[Way, Way]] = [
    (leave, join), (be_removed, follow_an_invitation), (be_banned, be_added), (decline, join), (leave, be_added),
]  # fmt: skip
"""Ways to leave, each with a way to return."""


async def test_returning_user_has_no_more_rights_than_a_new_participant(world: World) -> None:
    people = await world.users("Ada", "Charles", "Mary")
    ada, charles, mary = people
    owner, them, hers = [await world.connect(one) for one in people]
    await world.befriend(ada, charles)
    await world.befriend(ada, mary)
    settings = ConversationSettings(slow_mode_seconds=3600, history="from_joining")
    for out, back in WAYS:
        about = await world.channel(owner, is_public=True, settings=settings)
        way = f"{out.__name__}, {back.__name__}"
        await join(them, owner, charles, about)
        await world.db.execute(CHANGE_ALL, about, charles.id, await sent(owner, about))
        before = await row(world, about, charles.id)
        await out(them, owner, charles, about)
        meanwhile = await sent(owner, about, "While they are away")
        await back(hers, owner, mary, about)
        await back(them, owner, charles, about)
        assert_kept(before, await row(world, about, charles.id), await row(world, about, mary.id), way)
        got = await them.call(client.GetConversation(conversation_id=about), server.OneConversation)
        assert (got.view.unread_count, got.view.invite) == (0, None), way
        read = await owner.call(client.ListReaders(conversation_id=about, message_id=meanwhile), server.Readers)
        assert (read.read_by, read.delivered_to, read.readers) == (0, 0, []), way
        with refused(ErrorCode.RATE_LIMITED, "conversation_id"):
            await them.call(message(about))
        with refused(ErrorCode.FORBIDDEN, None):
            await them.call(client.Pin(conversation_id=about, message_id=await sent(owner, about)))


async def row(world: World, about: ConversationId, who: UUID) -> dict[str, Any]:
    found = await world.db.fetchrow(ROW, about, who)
    assert found is not None
    return dict(found)


def assert_kept(before: dict[str, Any], after: dict[str, Any], first: dict[str, Any], way: str) -> None:
    key, as_first, set_again, forward, own, slow = COLUMNS.values()
    assert set().union(*COLUMNS.values()) == before.keys(), "add the new column to COLUMNS"
    assert key | own | slow <= {name for name in before if before[name] == after[name]}, way
    assert {name: after[name] for name in as_first} == {name: first[name] for name in as_first}, way
    assert not {name for name in set_again if after[name] <= before[name]}, way
    assert not {name for name in forward if after[name] < before[name]}, way
    assert after["last_read_version"] >= first["joined_version"] - 1, way
    assert [name for name in as_first - {"left_at", "left_version"} if before[name] == after[name]] == ["status"], way
