"""Two users on two workers: every kind of event reaches the other worker, and the sender gets the same event."""

import pytest

from protocol import client, server
from protocol.ids import ConversationId, MessageId, uuid7
from prove.client import Client
from tests.world import UserSession, World, message, sent


class Pair:
    """Ada on one worker and Charles on the other, in a group."""

    def __init__(self, ada: Client, charles: Client, conversation_id: ConversationId, them: list[UserSession]) -> None:
        self.ada = ada
        self.charles = charles
        self.group = conversation_id
        self.them = them


@pytest.fixture
async def pair(world: World) -> Pair:
    them = await world.users("Ada", "Charles", "Mary")
    ada, charles = await world.connect(them[0], 0), await world.connect(them[1], 1)
    group = await world.group(ada, them[1])
    await ada.event(server.ConversationJoined)
    await charles.event(server.ConversationJoined)
    return Pair(ada, charles, group, them)


async def test_sent_message_arrives(pair: Pair) -> None:
    reply = await pair.ada.call(message(pair.group, "The engine weaves"), server.Sent)
    for one in (pair.ada, pair.charles):
        event = await one.event(server.MessageSent)
        assert event.message.content == "The engine weaves"
        assert event.message.sender_id == pair.them[0].id
        assert (event.version, event.message.created_at) == (reply.version, reply.created_at)
    assert pair.ada.events[-1] == pair.charles.events[-1]


async def test_edited_message_arrives(pair: Pair) -> None:
    message_id = await sent(pair.ada, pair.group, "Helo")
    await pair.ada.call(client.Edit(conversation_id=pair.group, message_id=message_id, content="Hello"), server.Changed)
    for one in (pair.ada, pair.charles):
        event = await one.event(server.MessageEdited)
        assert event.message.content == "Hello"
        assert event.message.edited_at is not None


async def test_deletion_arrives(pair: Pair) -> None:
    message_id = await sent(pair.ada, pair.group)
    await pair.ada.call(client.Delete(conversation_id=pair.group, message_id=message_id), server.Changed)
    for one in (pair.ada, pair.charles):
        event = await one.event(server.MessageDeleted)
        assert event.message.is_deleted
        assert event.message.content == ""


async def test_reactions_arrive(pair: Pair) -> None:
    message_id = await sent(pair.ada, pair.group)
    await pair.charles.call(client.React(conversation_id=pair.group, message_id=message_id, emoji="👍"), server.Changed)
    await pair.ada.call(client.React(conversation_id=pair.group, message_id=message_id, emoji="👍"), server.Changed)
    await pair.ada.call(client.Unreact(conversation_id=pair.group, message_id=message_id, emoji="👍"), server.Changed)
    for one in (pair.ada, pair.charles):
        assert (await one.event(server.MessageReacted, lambda event: event.count == 2)).emoji == "👍"
        assert (await one.event(server.MessageUnreacted)).count == 1


async def test_reply_increases_the_count_of_its_root(pair: Pair) -> None:
    root = await sent(pair.ada, pair.group, "Question")
    answer = await sent(pair.charles, pair.group, "Answer", parent_message_id=root)
    deeper = await sent(pair.ada, pair.group, "Thanks", parent_message_id=answer)
    for one in (pair.ada, pair.charles):
        event = await one.event(server.MessageSent, lambda event: event.message.id == deeper)
        assert (event.message.thread_root_id, event.root_reply_count) == (root, 2)
    await pair.charles.call(client.Delete(conversation_id=pair.group, message_id=answer), server.Changed)
    assert (await pair.ada.event(server.MessageDeleted)).root_reply_count == 1


async def test_conversation_update_arrives(pair: Pair) -> None:
    await pair.ada.call(client.UpdateConversation(conversation_id=pair.group, title="Engines"))
    for one in (pair.ada, pair.charles):
        event = await one.event(server.ConversationUpdated)
        assert event.conversation.title == "Engines"


async def test_changes_of_participants_arrive(pair: Pair, world: World) -> None:
    mary = await world.connect(pair.them[2], 1)
    await pair.ada.call(client.AddParticipants(conversation_id=pair.group, participants=[pair.them[2].id]))
    view = (await mary.event(server.ConversationJoined)).view
    assert view.conversation.id == pair.group
    await pair.ada.call(
        client.SetRole(conversation_id=pair.group, user_id=pair.them[2].id, role="moderator"), server.Done
    )
    for one in (pair.ada, pair.charles, mary):
        event = await one.event(server.ParticipantChanged, lambda event: event.participant.role == "moderator")
        assert event.participant.permissions.can_delete_messages
    await pair.ada.call(client.RemoveParticipant(conversation_id=pair.group, user_id=pair.them[2].id), server.Done)
    for one in (pair.ada, pair.charles, mary):
        await one.event(server.ParticipantLeft, lambda event: event.user_id == pair.them[2].id)
    await mary.event(server.ConversationLeft)
    await sent(pair.ada, pair.group, "Between us")
    await pair.charles.event(server.MessageSent)
    await mary.synced()
    assert not [event for event in mary.events if isinstance(event, server.MessageSent)]


async def test_ownership_passes_to_the_next_participant(pair: Pair) -> None:
    await pair.ada.call(client.Leave(conversation_id=pair.group), server.Done)
    event = await pair.charles.event(
        server.ParticipantChanged,
        lambda event: event.participant.role == "owner" and event.participant.user_id == pair.them[1].id,
    )
    assert event.participant_count == 1
    assert (await pair.ada.event(server.ConversationLeft)).conversation_id == pair.group


async def test_typing_and_receipts_arrive(pair: Pair) -> None:
    await pair.charles.call(client.Typing(conversation_id=pair.group), server.Done)
    assert (await pair.ada.event(server.TypingStarted)).user_id == pair.them[1].id
    await pair.charles.call(client.Typing(conversation_id=pair.group, active=False), server.Done)
    await pair.ada.event(server.TypingStopped)
    first = await sent(pair.ada, pair.group, "One")
    second = await sent(pair.ada, pair.group, "Two")
    answer = await pair.charles.call(client.Read(conversation_id=pair.group, message_id=first), server.ReadUpTo)
    assert answer.unread_count == 1
    assert (await pair.ada.event(server.MessageRead)).message_id == first
    await pair.charles.call(client.Read(conversation_id=pair.group, message_id=second), server.ReadUpTo)
    back = await pair.charles.call(client.Read(conversation_id=pair.group, message_id=first), server.ReadUpTo)
    assert (back.message_id, back.unread_count) == (second, 0)


async def test_two_users_have_one_direct_conversation(pair: Pair, world: World) -> None:
    mary = await world.connect(pair.them[2], 1)
    made = await pair.ada.call(client.CreateDirect(user_id=pair.them[2].id), server.OneConversation)
    again = await mary.call(client.CreateDirect(user_id=pair.them[0].id), server.OneConversation)
    assert made.view.conversation.id == again.view.conversation.id
    assert (made.view.peer_id, again.view.peer_id) == (pair.them[2].id, pair.them[0].id)
    await sent(mary, made.view.conversation.id, "Dear Ada")
    await pair.ada.event(server.MessageSent, lambda event: event.message.content == "Dear Ada")


async def test_all_devices_of_a_user_receive_all_events(pair: Pair, world: World) -> None:
    phone = await world.connect(pair.them[0], 1)
    channel = await world.channel(pair.ada, is_public=True)
    joined = await phone.event(server.ConversationJoined, lambda event: event.view.conversation.id == channel)
    assert joined.view.me.role == "owner"
    await sent(pair.ada, channel)
    await phone.event(server.MessageSent)


async def test_user_joins_a_public_conversation_and_by_invite_code(pair: Pair, world: World) -> None:
    public = await world.channel(pair.ada, is_public=True)
    await pair.charles.call(client.Join(conversation_id=public), server.OneConversation)
    await pair.ada.event(server.ParticipantChanged, lambda event: event.conversation_id == public)
    closed = await pair.ada.call(
        client.CreateChannel(conversation_id=ConversationId(uuid7()), title="Closed"), server.OneConversation
    )
    invite = closed.view.invite
    assert invite is not None
    joined = await pair.charles.call(client.Join(invite_code=invite.code), server.OneConversation)
    assert joined.view.conversation.id == closed.view.conversation.id
    assert joined.view.invite is None
    await sent(pair.charles, joined.view.conversation.id, "In")
    await pair.ada.event(server.MessageSent, lambda event: event.message.content == "In")


async def test_presence_arrives(pair: Pair, world: World) -> None:
    mary = pair.them[2]
    charles = pair.them[1]
    seen = await pair.ada.call(client.Watch(user_ids=[mary.id, charles.id]), server.PresenceList)
    assert [one.user_id for one in seen.presences] == [mary.id, charles.id]
    assert seen.presences[0].status == "offline"
    if seen.presences[1].status != "online":
        await pair.ada.event(server.PresenceChanged, lambda event: event.presence.user_id == charles.id)
    phone = await world.connect(mary, 1)
    await pair.ada.event(server.PresenceChanged, lambda event: event.presence.user_id == mary.id)
    await phone.call(client.SetPresence(status="busy", custom_status="Computing"), server.Done)
    busy = await pair.ada.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    assert busy.presence.custom_status == "Computing"
    await phone.call(client.SetPresence(status="invisible"), server.Done)
    await pair.ada.event(server.PresenceChanged, lambda event: event.presence.status == "offline")


async def test_messages_with_the_same_id_are_stored_once(pair: Pair) -> None:
    frame = message(pair.group, "Once", metadata={"n": [1, 2]})
    first = await pair.ada.call(frame, server.Sent)
    again = await pair.ada.call(frame, server.Sent)
    assert first == again
    page = await pair.charles.call(client.History(conversation_id=pair.group), server.MessagePage)
    assert [one.id for one in page.messages] == [MessageId(frame.message_id)]
