"""Membership: invitations, invite codes, public conversations, removal, history for newcomers, and system messages."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, UserId
from protocol.server import Error
from protocol.values import ConversationSettings, ConversationView
from prove.client import Client
from prove.mirror import Mirror
from prove.truth import recount
from server.jobs.expiry import expire_due
from server.queries.checks import CHECKS
from server.queries.checks import run_all as ask
from tests.world import World, refused, sent, until


async def view(one: Client, about: ConversationId) -> ConversationView:
    return (await one.call(client.GetConversation(conversation_id=about), server.OneConversation)).view


async def test_invitation_reaches_every_device_and_can_be_accepted_or_declined(world: World) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    owner, phone, desk = await world.connect(ada), await world.connect(charles), await world.connect(charles, 1)
    hers = await world.connect(mary, 1)
    about = await world.channel(owner, title="Engines")
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await phone.call(client.Join(conversation_id=about))
    invite = client.Invite(conversation_id=about, participants=[charles.id, mary.id], role="moderator")
    await owner.call(invite)
    await owner.call(invite)
    for device in (phone, desk, hers):
        invitation = (await device.event(server.Invited)).invitation
        assert (invitation.title, invitation.role, invitation.invited_by) == ("Engines", "moderator", ada.id)
    # An invited user is not a participant yet.
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await phone.call(client.History(conversation_id=about))
    assert (await view(owner, about)).conversation.participant_count == 1

    joined = await phone.call(client.Join(conversation_id=about), server.OneConversation)
    assert (joined.view.me.role, joined.view.me.invited_by) == ("moderator", ada.id)
    await desk.event(server.ConversationJoined)
    await hers.call(client.Decline(conversation_id=about))
    await hers.event(server.InvitationEnded)
    # Others learn only that the list changed. Those who may invite fetch it.
    seen = (await owner.event(server.OutsidersChanged)).version
    await owner.event(server.OutsidersChanged, lambda event: event.version > seen + 1)
    answer = await owner.call(client.ListParticipants(conversation_id=about, status="declined"), server.ParticipantPage)
    assert [entry.participant.user_id for entry in answer.participants] == [mary.id]
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await hers.call(client.Join(conversation_id=about))
    assert (await hers.call(client.ListInvitations(), server.InvitationList)).invitations == []
    await owner.call(invite)
    assert len((await hers.call(client.ListInvitations(), server.InvitationList)).invitations) == 1
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=mary.id))
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await hers.call(client.Decline(conversation_id=about))
    assert await recount(world.db) == []


@pytest.mark.long
async def test_invitation_events_add_up_to_the_list_of_invitations(world: World) -> None:
    """An invitation may end on another device or while the client is away."""
    ada, charles = await world.users("Ada", "Charles")
    owner, phone, desk = await world.connect(ada), await world.connect(charles), await world.connect(charles, 1)

    def drop(about: ConversationId, user_id: UserId, *, ban: bool) -> Awaitable[object]:
        return owner.call(client.RemoveParticipant(conversation_id=about, user_id=user_id, ban=ban))

    ends: dict[str, Callable[[ConversationId], Awaitable[object]]] = {
        "joined": lambda about: phone.call(client.Join(conversation_id=about)),
        "declined": lambda about: phone.call(client.Decline(conversation_id=about)),
        "taken back": lambda about: drop(about, charles.id, ban=False),
        "banned": lambda about: drop(about, charles.id, ban=True),
        "deleted": lambda about: owner.call(client.DeleteConversation(conversation_id=about)),
        "left by all": lambda about: owner.call(client.Leave(conversation_id=about)),
        "none": lambda _: owner.call(client.Ping()),
    }
    places = {name: await world.channel(owner, title=name) for name in ends}
    names = {about: name for name, about in places.items()}

    def told(*events: server.ServerFrame) -> set[str]:
        mirror = Mirror()
        for event in events:
            mirror.receive(event)
        return {names[about] for about in mirror.invitations}

    for name, end in reversed(ends.items()):
        await owner.call(client.Invite(conversation_id=places[name], participants=[charles.id]))
        await until(lambda: told(*desk.events) == {"none", name})  # noqa: B023 - awaited here
        before = list(desk.events)
        version = max(event.user_version for event in before if isinstance(event, server.Invited))
        await end(places[name])
        there = (await phone.call(client.ListInvitations(), server.InvitationList)).invitations
        assert {names[one.conversation_id] for one in there} == {"none"}, name
        # A job ends the invitations to a deleted conversation. Devices receive an event, and a resume reports it.
        await until(lambda: told(*desk.events) == {"none"})
        async with Client(world.url, charles.token, query="?resume=1") as back:
            await back.call(client.Resume(epoch=desk.ready.epoch, versions={}, user_version=version), server.Resumed)
            assert told(*before, *back.events) == {"none"}, name
        if name in {"deleted", "left by all"}:
            with refused(ErrorCode.NOT_FOUND, "conversation_id"):
                await phone.call(client.Join(conversation_id=places[name]))
    assert await world.db.fetchval("SELECT count(*) FROM conversation WHERE has_remains") == 0
    # A client that resumes before the job runs receives the event from the job.
    about = await world.channel(owner, title="Held")
    names[about] = "held"
    await owner.call(client.Invite(conversation_id=about, participants=[charles.id]))
    await until(lambda: told(*desk.events) == {"none", "held"})
    version = max(event.user_version for event in desk.events if isinstance(event, server.Invited))
    async with world.db.transaction():
        await world.db.execute("""SELECT FROM "user" WHERE id = $1 FOR NO KEY UPDATE""", charles.id)
        await owner.call(client.DeleteConversation(conversation_id=about))
        before = list(desk.events)
        assert len((await phone.call(client.ListInvitations(), server.InvitationList)).invitations) == 1
    async with Client(world.url, charles.token, query="?resume=1") as back:
        await back.call(client.Resume(epoch=desk.ready.epoch, versions={}, user_version=version), server.Resumed)
        await until(lambda: told(*before, *back.events) == {"none"})
    await until(lambda: told(*desk.events) == {"none"})
    assert await recount(world.db) == []


async def test_invitation_to_a_conversation_deleted_before_an_upgrade_ends(world: World) -> None:
    """A worker of an older release beside a new one clears `has_remains`."""
    ada, charles = await world.users("Ada", "Charles")
    owner, desk = await world.connect(ada), await world.connect(charles, 1)
    over, lasting = [await world.channel(owner, title=title) for title in ("Over", "Lasting")]
    for about in (over, lasting):
        await owner.call(client.Invite(conversation_id=about, participants=[charles.id]))
    await world.db.execute("UPDATE conversation SET is_deleted = true, is_active = false WHERE id = $1", over)
    check = next(one for one in CHECKS if one.name == "invitations to ended conversations are marked to end")
    assert (await ask(world.db, check)).number == 1
    await world.workers[0].app.background.mark_remains()
    assert (await ask(world.db, check)).number == 0
    assert (await desk.event(server.InvitationEnded)).conversation_id == over
    there = (await desk.call(client.ListInvitations(), server.InvitationList)).invitations
    assert [one.conversation_id for one in there] == [lasting]


async def test_accepted_invitation_gives_no_more_than_the_inviter_may_give_then(world: World) -> None:
    """Each change of the inviter is tested in private and in public conversations."""
    owner, inviter, guest = await world.users("Owner", "Inviter", "Guest")
    o, g = await world.connect(owner), await world.connect(guest)
    await world.befriend(owner, inviter)
    for becomes, alone, in_public in BECAME:
        for is_public, role in ((False, alone), (True, in_public)):
            await world.db.execute("DELETE FROM approach")
            i = await world.connect(inviter)
            about = await world.group(o, inviter)
            at: Any = {"conversation_id": about, "user_id": inviter.id}
            await o.call(client.SetRole(**at, role="admin"))
            await i.call(client.Invite(conversation_id=about, participants=[guest.id], role="moderator"))
            await o.call(client.UpdateConversation(conversation_id=about, is_public=is_public))
            if becomes == "banned":
                await o.call(client.RemoveParticipant(**at, ban=True))
            elif becomes == "gone":
                await i.call(client.Leave(conversation_id=about))
            elif becomes == "disabled":
                await world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', inviter.id)
            elif becomes == "member who may add":
                await o.call(client.SetRole(**at, role="member"))
                await o.call(client.SetPermissions(**at, can_add_members=True))
            else:
                await o.call(client.SetRole(**at, role=becomes))  # type: ignore[arg-type]
            listed = (await g.call(client.ListInvitations(), server.InvitationList)).invitations
            told = {one.conversation_id: one.role for one in listed}
            assert (becomes, told[about]) == (becomes, alone or "moderator")
            answer: Any = await g.ask(client.Join(conversation_id=about))
            given = None if isinstance(answer, Error) else answer.result.view.me.role
            assert given is not None or (answer.code, answer.path) == (ErrorCode.FORBIDDEN, "conversation_id")
            assert (becomes, is_public, given) == (becomes, is_public, role)
            if role is None:
                # A user with the permission can invite them again.
                await o.call(client.Invite(conversation_id=about, participants=[guest.id], role="moderator"))
                joined = await g.call(client.Join(conversation_id=about), server.OneConversation)
                assert (joined.view.me.role, joined.view.me.invited_by) == ("moderator", owner.id)
            await world.db.execute('UPDATE "user" SET is_active = true WHERE id = $1', inviter.id)
            await i.close()
    assert await recount(world.db) == []


BECAME = [
    ("admin", "moderator", "moderator"),
    ("member who may add", "member", "member"),
    ("moderator", None, "member"),
    ("guest", None, "member"),
    ("banned", None, "member"),
    ("gone", None, "member"),
    ("disabled", None, "member"),
]
"""Changes of an inviter who invited a moderator, and the role that the invitation then gives: private, then public."""


async def test_resume_reports_the_users_own_changes(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner = await world.connect(ada)
    about = await world.channel(owner, is_public=True)
    phone = await world.connect(charles)
    await phone.call(client.Join(conversation_id=about))
    epoch = phone.ready.epoch
    clock = await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', charles.id)
    await phone.close()
    desk = await world.connect(charles, 1)
    await desk.call(client.SetPreferences(conversation_id=about, pin_order=1))
    await desk.call(client.UpdateProfile(bio="Engines"))
    await owner.call(client.RequestFriend(user_id=charles.id))
    closed = await world.channel(owner)
    await owner.call(client.Invite(conversation_id=closed, participants=[charles.id]))
    again = await world.connect(charles, query="?resume=1")
    await again.call(client.Resume(epoch=epoch, versions={}, user_version=clock))
    kinds = [type(event) for event in again.events if hasattr(event, "user_version")]
    assert kinds.count(server.PreferencesChanged) == 1
    assert {server.MeChanged, server.RelationshipChanged, server.Invited} <= set(kinds)


async def test_invite_code_expires_and_has_a_maximum_number_of_uses(world: World) -> None:
    ada, one, two, three = await world.users("Ada", "One", "Two", "Three")
    owner = await world.connect(ada)
    about = await world.channel(owner)
    made = await owner.call(client.SetInviteCode(conversation_id=about, max_uses=2), server.OneConversation)
    assert made.view.invite is not None
    assert made.view.invite.uses_left == 2
    code = made.view.invite.code
    first = await world.connect(one)
    await first.call(client.Join(invite_code=code))
    await first.call(client.Join(invite_code=code))  # a join by a participant is not counted
    second = await world.connect(two, 1)
    joined = await second.call(client.Join(invite_code=code), server.OneConversation)
    repeated = await second.call(client.Join(invite_code=code), server.OneConversation)  # the reply may have been lost
    assert repeated.view.conversation == joined.view.conversation
    third = await world.connect(three)
    with refused(ErrorCode.NOT_FOUND, "invite_code"):
        await third.call(client.Join(invite_code=code))
    timed = await owner.call(client.SetInviteCode(conversation_id=about, expires_in_seconds=60), server.OneConversation)
    assert timed.view.invite is not None
    assert timed.view.invite.expires_at is not None
    await world.db.execute("UPDATE conversation SET invite_expires_at = now() - interval '1 second'")
    await first.call(client.Join(invite_code=timed.view.invite.code))
    with refused(ErrorCode.NOT_FOUND, "invite_code"):
        await third.call(client.Join(invite_code=timed.view.invite.code))
    await second.call(client.Leave(conversation_id=about))
    with refused(ErrorCode.NOT_FOUND, "invite_code"):
        await second.call(client.Join(invite_code=timed.view.invite.code))


async def test_a_hundred_concurrent_joins_do_not_exceed_the_maximum(world: World) -> None:
    owner = await world.connect(await world.user("Ada"))
    about = await world.channel(owner, is_public=True, max_participants=40)
    people = [await world.user(f"Person {number}") for number in range(100)]
    clients = await asyncio.gather(*(world.connect(who, number % 2) for number, who in enumerate(people)))
    answers = await asyncio.gather(*(one.ask(client.Join(conversation_id=about)) for one in clients))
    codes = [answer.code if isinstance(answer, Error) else None for answer in answers]
    assert (codes.count(None), codes.count(ErrorCode.CONFLICT)) == (39, 61)
    assert (await view(owner, about)).conversation.participant_count == 40
    assert await recount(world.db) == []


async def test_public_conversations_are_searchable(world: World) -> None:
    owner = await world.connect(await world.user("Ada"))
    made = await world.channel(owner, title="Analytical engines", is_public=True, description="Brass and steam")
    await world.channel(owner, title="Analytical secrets")
    other = await world.connect(await world.user("Charles"), 1)
    for text in ("engine", "ANALYT eng", "steam"):
        found = await other.call(client.FindConversations(text=text), server.PublicConversationList)
        assert [one.conversation_id for one in found.conversations] == [made]
    with refused(ErrorCode.INVALID, "text"):
        await other.call(client.FindConversations(text="!?"))
    await owner.call(client.UpdateConversation(conversation_id=made, is_archived=True))
    assert (await other.call(client.FindConversations(text="eng"), server.PublicConversationList)).conversations == []


async def test_removed_participant_receives_no_more_events_on_any_worker(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner, phone, desk = await world.connect(ada), await world.connect(charles), await world.connect(charles, 1)
    about = await world.group(owner, charles)
    for device in (phone, desk):
        await device.event(server.ConversationJoined)
    clock = (await view(owner, about)).version
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=charles.id))
    for device in (phone, desk):
        await device.event(server.ConversationLeft, lambda event: event.conversation_id == about)
    await sent(owner, about, "Behind their back")
    back = await world.connect(charles, 1, query="?resume=1")
    await back.call(client.Resume(epoch=back.ready.epoch, versions={about: clock}))
    assert (await back.event(server.ConversationLeft)).conversation_id == about
    for device in (phone, desk, back):
        await device.call(client.Ping())
        said = [event for event in device.events if isinstance(event, server.MessageSent)]
        assert [event for event in said if event.message.content == "Behind their back"] == []


async def test_newcomers_see_earlier_messages_only_if_the_settings_allow_it(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner = await world.connect(ada)
    about = await world.channel(owner, is_public=True, settings=ConversationSettings(history="from_joining"))
    before, hidden, fading = [await sent(owner, about, text) for text in ("Before", "Hidden", "Fading")]
    newcomer = await world.connect(charles, 1)
    joined = await newcomer.call(client.Join(conversation_id=about), server.OneConversation)
    assert joined.view.last_message is not None
    assert joined.view.last_message.system_message_type == "join"
    page = await newcomer.call(client.History(conversation_id=about), server.MessagePage)
    assert [one.content for one in page.messages] == ["joined"]
    place: dict[str, Any] = {"conversation_id": about, "message_id": before}
    for frame in (
        client.GetMessage(**place), client.React(**place, emoji="👍"), client.Read(**place), client.ListEdits(**place),
        client.ReportMessage(**place, reason="Unseen"),
    ):  # fmt: skip
        with refused(ErrorCode.NOT_FOUND, "message_id"):
            await newcomer.call(frame)
    # No event has its text, live or fetched later, nor the ids of those who sent, hid or deleted earlier messages.
    await owner.call(client.Edit(**place, content="Before, edited"))
    changed = await newcomer.event(server.MessageChanged)
    assert changed.message_id == before
    await world.moderate_as_owner(client.Moderate(conversation_id=about, message_id=hidden, reason="Unseen"))
    await owner.call(client.Delete(conversation_id=about, message_id=hidden))
    await world.db.execute("UPDATE message SET expires_at = now() WHERE id = $1", fading)
    await expire_due(world.workers[0].app._database, world.workers[0].app.hub)  # noqa: SLF001 - due now
    await newcomer.event(server.MessageChanged, lambda event: event.message_id == fading)
    told = [event for event in newcomer.events if isinstance(event, server.MessageChanged)]
    assert [event.message_id for event in told] == [before, hidden, hidden, fading]
    # The owner, who took part before, can read it.
    left = await owner.call(client.GetMessage(conversation_id=about, message_id=hidden), server.OneMessage)
    assert (left.message.is_deleted, left.message.deleted_by) == (True, ada.id)
    again = await world.connect(charles, query="?resume=1")
    await again.call(client.Resume(epoch=again.ready.epoch, versions={about: 0}))
    missed = await again.event(server.Changes)
    said = [event.message.content for event in missed.events if isinstance(event, server.MessageSent)]
    assert said == ["joined"]
    older = {event.message_id for event in missed.events if isinstance(event, server.MessageChanged)}
    assert older == {before, hidden, fading}
    assert not any(isinstance(event, server.MessageDeleted) for event in missed.events)
    after = await sent(owner, about, "After")
    assert (
        await newcomer.event(server.MessageSent, lambda event: event.message.id == after)
    ).message.content == "After"
    await owner.call(client.UpdateConversation(conversation_id=about, settings=ConversationSettings()))
    assert (await newcomer.call(client.GetMessage(**place), server.OneMessage)).message.content == "Before, edited"


async def test_system_messages_report_joins_departures_and_changes(world: World) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    owner, other = await world.connect(ada), await world.connect(charles, 1)
    about = await world.channel(owner, is_public=True)
    await other.call(client.Join(conversation_id=about))
    await owner.call(client.AddParticipants(conversation_id=about, participants=[mary.id]))
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=mary.id))
    await owner.call(client.UpdateConversation(conversation_id=about, title="Engines", description="Of brass"))
    await other.call(client.Leave(conversation_id=about))
    page = await owner.call(client.History(conversation_id=about), server.MessagePage)
    said = [(one.system_message_type, one.sender_id, one.metadata) for one in page.messages]
    assert said == [
        ("join", charles.id, {}),
        ("add_member", ada.id, {"user_ids": [str(mary.id)]}),
        ("remove_member", ada.id, {"user_ids": [str(mary.id)]}),
        ("title_change", ada.id, {"title": "Engines"}),
        ("settings_change", ada.id, {"fields": ["description"]}),
        ("leave", charles.id, {}),
    ]
    assert (await view(owner, about)).unread_count == 0
    place: dict[str, Any] = {"conversation_id": about, "message_id": page.messages[3].id}
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await owner.call(client.Edit(**place, content="Never"))
    quiet = ConversationSettings(system_messages=False)
    await owner.call(client.UpdateConversation(conversation_id=about, settings=quiet))
    await other.call(client.Join(conversation_id=about))
    assert (await view(owner, about)).last_message == page.messages[-1]


async def test_deleted_conversation_ends_for_all_participants(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner, other = await world.connect(ada), await world.connect(charles, 1)
    about = await world.channel(owner, is_public=True)
    await other.call(client.Join(conversation_id=about))
    with refused(ErrorCode.FORBIDDEN, None):
        await other.call(client.DeleteConversation(conversation_id=about))
    await owner.call(client.DeleteConversation(conversation_id=about))
    for one in (owner, other):
        ended = await one.event(server.ConversationUpdated, lambda event: event.conversation.is_deleted)
        assert ended.conversation_id == about
        await one.event(server.ConversationLeft)
        with refused(ErrorCode.NOT_FOUND, "conversation_id"):
            await one.call(client.GetConversation(conversation_id=about))
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await other.call(client.Join(conversation_id=about))


async def test_preferences_are_private_and_shared_by_all_devices(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner, phone, desk = await world.connect(ada), await world.connect(charles), await world.connect(charles, 1)
    about = await world.group(owner, charles)
    await desk.event(server.ConversationJoined)
    await phone.call(
        client.SetPreferences(conversation_id=about, pin_order=3, is_hidden=True, notification_level="mentions")
    )
    told = await desk.event(server.PreferencesChanged, lambda event: event.preferences.pin_order == 3)
    assert (told.preferences.is_hidden, told.preferences.notification_level) == (True, "mentions")
    await phone.call(client.SetPreferences(conversation_id=about, pin_order=None))
    now = (await view(phone, about)).preferences
    assert (now.pin_order, now.is_hidden) == (None, True)
    shown = await phone.call(client.ListConversations(hidden=False), server.ConversationPage)
    assert shown.conversations == []
    assert (await view(owner, about)).preferences.is_hidden is False


async def test_only_permitted_roles_list_the_invited_and_the_banned(world: World) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    owner, other = await world.connect(ada), await world.connect(charles, 1)
    about = await world.channel(owner, is_public=True)
    await other.call(client.Join(conversation_id=about))
    await owner.call(client.Invite(conversation_id=about, participants=[mary.id]))
    listed = client.ListParticipants(conversation_id=about, status="invited")
    assert [one.user and one.user.name for one in (await owner.call(listed, server.ParticipantPage)).participants] == [
        "Mary"
    ]
    with refused(ErrorCode.FORBIDDEN, None):
        await other.call(listed)
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=charles.id, ban=True))
    banned = client.ListParticipants(conversation_id=about, status="banned")
    assert [one.user and one.user.name for one in (await owner.call(banned, server.ParticipantPage)).participants] == [
        "Charles"
    ]
    await owner.call(client.Unban(conversation_id=about, user_id=charles.id))
    await other.call(client.Join(conversation_id=about))
