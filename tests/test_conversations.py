"""Conversations and their participants: permitted frames, and those that are refused."""

from collections.abc import Awaitable, Callable

import pytest

from protocol import client, server
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId, uuid7
from protocol.values import ConversationSettings, ConversationView
from prove.client import Client
from tests.world import World, refused, sent

Make = Callable[[str], Awaitable[tuple[UserId, Client]]]


@pytest.fixture
async def person(world: World) -> Make:
    async def make(name: str) -> tuple[UserId, Client]:
        who = await world.user(name)
        return who.id, await world.connect(who)

    return make


async def view(one: Client, conversation_id: ConversationId) -> ConversationView:
    return (await one.call(client.GetConversation(conversation_id=conversation_id), server.OneConversation)).view


async def test_repeated_create_group_creates_one_group(person: Make) -> None:
    (_, ada), (charles, _) = await person("Ada"), await person("Charles")
    frame = client.CreateGroup(
        conversation_id=ConversationId(uuid7()), title="Engines", description="Of both kinds",
        participants=[charles], settings=ConversationSettings(custom={"colour": "brass"}),
    )  # fmt: skip
    first = await ada.call(frame, server.OneConversation)
    assert first.view.me.role == "owner"
    assert first.view.conversation.participant_count == 2
    assert first.view.conversation.settings.custom == {"colour": "brass"}
    assert await ada.call(frame, server.OneConversation) == first
    frame.title = "Other"
    with refused(ErrorCode.CONFLICT, "conversation_id"):
        await ada.call(frame)


async def test_a_group_needs_users_that_exist(person: Make, world: World) -> None:
    _, ada = await person("Ada")
    frame = client.CreateGroup(conversation_id=ConversationId(uuid7()), title="Nobody", participants=[UserId(uuid7())])
    with refused(ErrorCode.NOT_FOUND, "participants"):
        await ada.call(frame)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


async def test_direct_conversation_needs_another_user_who_does_not_block(person: Make, world: World) -> None:
    (ada_id, ada), (charles_id, _) = await person("Ada"), await person("Charles")
    with refused(ErrorCode.INVALID, "user_id"):
        await ada.call(client.CreateDirect(user_id=ada_id))
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await ada.call(client.CreateDirect(user_id=UserId(uuid7())))
    await world.db.execute(
        "INSERT INTO user_relationship (from_user_id, to_user_id, type, status) VALUES ($1, $2, 'block', 'active')",
        charles_id, ada_id,
    )  # fmt: skip
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await ada.call(client.CreateDirect(user_id=charles_id))


async def test_direct_conversation_cannot_be_changed(person: Make) -> None:
    (_, ada), (charles_id, _), (mary_id, _) = await person("Ada"), await person("Charles"), await person("Mary")
    made = await ada.call(client.CreateDirect(user_id=charles_id), server.OneConversation)
    about = made.view.conversation.id
    for frame in (
        client.Leave(conversation_id=about),
        client.AddParticipants(conversation_id=about, participants=[mary_id]),
        client.UpdateConversation(conversation_id=about, title="Ours"),
        client.DeleteConversation(conversation_id=about),
    ):
        with pytest.raises(Refused, match=r"A direct conversation .* `set_preferences`") as error:
            await ada.call(frame)
        assert (error.value.code, error.value.path) == (ErrorCode.FORBIDDEN, "conversation_id")


async def test_conversations_are_listed_in_pages(person: Make, world: World) -> None:
    (_, ada), (charles_id, _) = await person("Ada"), await person("Charles")
    made = [await world.channel(ada, title=f"Channel {number}") for number in range(5)]
    direct = (await ada.call(client.CreateDirect(user_id=charles_id), server.OneConversation)).view.conversation.id
    await sent(ada, made[1], "Now the most recent")
    listed: list[ConversationId] = []
    after = None
    while True:
        page = await ada.call(client.ListConversations(limit=2, after=after), server.ConversationPage)
        listed += [one.conversation.id for one in page.conversations]
        if (after := page.after) is None:
            break
    assert listed == [made[1], direct, made[4], made[3], made[2], made[0]]
    only = await ada.call(client.ListConversations(conversation_type="direct"), server.ConversationPage)
    assert [one.conversation.id for one in only.conversations] == [direct]
    await ada.call(client.UpdateConversation(conversation_id=made[0], is_archived=True))
    archived = await ada.call(client.ListConversations(archived=True), server.ConversationPage)
    assert [one.conversation.id for one in archived.conversations] == [made[0]]


async def test_conversations_are_sent_in_pages_after_connecting(world: World) -> None:
    who = await world.user("Ada")
    ada = await world.connect(who)
    made = {await world.channel(ada) for _ in range(120)}
    again = await world.connect(who, 1)
    pages = [event for event in again.events if isinstance(event, server.Conversations)]
    assert [(len(page.conversations), page.is_last) for page in pages] == [(50, False), (50, False), (20, True)]
    assert {one.conversation.id for page in pages for one in page.conversations} == made


async def test_update_changes_only_given_fields(person: Make, world: World) -> None:
    (_, ada), (_, charles) = await person("Ada"), await person("Charles")
    channel = await world.channel(ada, description="Old", is_public=True)
    await charles.call(client.Join(conversation_id=channel))
    updated = await ada.call(
        client.UpdateConversation(
            conversation_id=channel, description=None, settings=ConversationSettings(custom={"a": 1})
        ),
        server.OneConversation,
    )
    now = updated.view.conversation
    assert (now.title, now.description, now.settings.custom, now.is_public) == ("News", None, {"a": 1}, True)
    again = await ada.call(client.UpdateConversation(conversation_id=channel, description=None), server.OneConversation)
    assert again.view.version == updated.view.version
    with refused(ErrorCode.FORBIDDEN, None):
        await charles.call(client.UpdateConversation(conversation_id=channel, title="Mine"))


async def test_invite_code_admits_users_until_it_ends(person: Make, world: World) -> None:
    (_, ada), (_, charles), (_, mary) = await person("Ada"), await person("Charles"), await person("Mary")
    channel = await world.channel(ada)
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await charles.call(client.Join(conversation_id=channel))
    first = (await view(ada, channel)).invite
    assert first is not None
    await charles.call(client.Join(invite_code=first.code))
    assert (await view(charles, channel)).invite is None
    await ada.call(client.SetInviteCode(conversation_id=channel))
    with refused(ErrorCode.NOT_FOUND, "invite_code"):
        await mary.call(client.Join(invite_code=first.code))
    await ada.call(client.SetInviteCode(conversation_id=channel, is_open=False))
    assert (await view(ada, channel)).invite is None


async def test_full_conversation_refuses_new_participants(person: Make, world: World) -> None:
    (_, ada), (_, charles), (mary_id, mary) = await person("Ada"), await person("Charles"), await person("Mary")
    channel = await world.channel(ada, is_public=True, max_participants=2)
    await charles.call(client.Join(conversation_id=channel))
    with refused(ErrorCode.CONFLICT, "conversation_id"):
        await mary.call(client.Join(conversation_id=channel))
    with refused(ErrorCode.CONFLICT, "participants"):
        await ada.call(client.AddParticipants(conversation_id=channel, participants=[mary_id]))
    assert (await view(ada, channel)).conversation.participant_count == 2
    assert (await charles.call(client.Join(conversation_id=channel), server.OneConversation)).view.me.role == "member"


async def test_ban_lasts_until_it_is_lifted(person: Make, world: World) -> None:
    (_, ada), (charles_id, charles) = await person("Ada"), await person("Charles")
    channel = await world.channel(ada, is_public=True)
    await charles.call(client.Join(conversation_id=channel))
    await ada.call(client.RemoveParticipant(conversation_id=channel, user_id=charles_id, ban=True))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await charles.call(client.Join(conversation_id=channel))
    # Neither frame lifts the ban, since the audit log would not show it and an invitation can be declined.
    for lifting in (client.AddParticipants, client.Invite):
        with refused(ErrorCode.CONFLICT, "participants"):
            await ada.call(lifting(conversation_id=channel, participants=[charles_id]))
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await charles.call(client.Decline(conversation_id=channel))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await charles.call(client.Join(conversation_id=channel))
    await ada.call(client.Unban(conversation_id=channel, user_id=charles_id))
    await ada.call(client.AddParticipants(conversation_id=channel, participants=[charles_id]))
    assert (await view(charles, channel)).me.status == "active"
    noted = (await ada.call(client.ListAudit(conversation_id=channel), server.AuditPage)).entries
    assert [entry.action for entry in noted] == ["ban", "unban"]


async def test_roles_restrict_changes_of_other_participants(person: Make, world: World) -> None:
    (ada_id, ada), (charles_id, charles) = await person("Ada"), await person("Charles")
    mary_id, mary = await person("Mary")
    channel = await world.channel(ada, is_public=True)
    for one in (charles, mary):
        await one.call(client.Join(conversation_id=channel))
    with refused(ErrorCode.FORBIDDEN, None):
        await mary.call(client.SetRole(conversation_id=channel, user_id=charles_id, role="guest"))
    with refused(ErrorCode.FORBIDDEN, None):
        await mary.call(client.AddParticipants(conversation_id=channel, participants=[charles_id]))
    with refused(ErrorCode.FORBIDDEN, None):
        await mary.call(client.RemoveParticipant(conversation_id=channel, user_id=charles_id))
    await ada.call(client.SetRole(conversation_id=channel, user_id=charles_id, role="admin"))
    for frame, path in (
        (client.SetRole(conversation_id=channel, user_id=ada_id, role="member"), "user_id"),
        (client.RemoveParticipant(conversation_id=channel, user_id=ada_id), "user_id"),
        (client.SetRole(conversation_id=channel, user_id=mary_id, role="admin"), "role"),
        (client.AddParticipants(conversation_id=channel, participants=[mary_id], role="admin"), "role"),
    ):
        with refused(ErrorCode.FORBIDDEN, path):
            await charles.call(frame)
    await charles.call(client.SetRole(conversation_id=channel, user_id=mary_id, role="moderator"))
    await charles.call(client.RemoveParticipant(conversation_id=channel, user_id=mary_id))
    assert (await view(ada, channel)).conversation.participant_count == 2


async def test_participants_are_listed_in_pages(person: Make, world: World) -> None:
    _, ada = await person("Ada")
    others = [await world.user(f"Person{number}") for number in range(5)]
    group = await world.group(ada, *others)
    found: list[UserId] = []
    after = None
    while True:
        page = await ada.call(
            client.ListParticipants(conversation_id=group, limit=2, after=after), server.ParticipantPage
        )
        found += [one.participant.user_id for one in page.participants]
        if (after := page.after) is None:
            break
    assert found == sorted([ada.ready.user.id, *(one.id for one in others)])


async def test_messages_sent_before_joining_are_not_unread(person: Make, world: World) -> None:
    (_, ada), (_, charles) = await person("Ada"), await person("Charles")
    channel = await world.channel(ada, is_public=True)
    await sent(ada, channel, "Before")
    joined = await charles.call(client.Join(conversation_id=channel), server.OneConversation)
    assert joined.view.unread_count == 0
    await sent(ada, channel, "After")
    assert (await view(charles, channel)).unread_count == 1
