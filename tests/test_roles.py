"""The table of roles, cell by cell: as data, in the database, and in the answers to frames."""

from typing import Any

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.roles import ROLES, Act, may, rank
from protocol.server import Error
from protocol.values import ConversationSettings, Participant, Role
from prove.client import Client
from prove.truth import recount
from server.gateway.dispatch import Rate
from server.routes import ROUTES
from tests.world import UserSession, World, message, refused, sent

GRANTS = ("can_add_members", "can_remove_members", "can_edit_conversation", "can_delete_messages", "can_pin_messages")


def frames(about: ConversationId, said: MessageId, guest: UserId, other: UserId) -> dict[Act, list[client.Frame]]:
    """Return frames that require each right, in an order in which none prevents the next."""
    place: dict[str, Any] = {"conversation_id": about}
    return {
        Act.TAKE_PART: [message(about), client.React(**place, message_id=said, emoji="👍"), client.History(**place)],
        Act.PIN_MESSAGES: [client.Pin(**place, message_id=said), client.Unpin(**place, message_id=said)],
        Act.MODERATE: [
            client.Moderate(**place, message_id=said, reason="Rude"), client.Unmoderate(**place, message_id=said),
            client.ListReports(**place),
        ],
        Act.ADD_MEMBERS: [
            client.AddParticipants(**place, participants=[other], role="guest"),
            client.Invite(**place, participants=[other], role="guest"),
            client.SetInviteCode(**place)
        ],
        Act.EDIT_CONVERSATION: [client.UpdateConversation(**place, title=f"Title {said}")],
        Act.SET_ROLES: [
            client.SetRole(**place, user_id=guest, role="guest"),
            client.SetPermissions(**place, user_id=guest, can_pin_messages=False),
        ],
        Act.READ_AUDIT: [client.ListAudit(**place)],
        Act.REMOVE_MEMBERS: [
            client.RemoveParticipant(**place, user_id=guest, ban=True), client.Unban(**place, user_id=guest),
        ],
        Act.DELETE_MESSAGES: [client.Delete(**place, message_id=said)],
        Act.TRANSFER: [client.TransferOwnership(**place, user_id=other)],
        Act.DELETE_CONVERSATION: [client.DeleteConversation(**place)],
    }  # fmt: skip


class Room:
    """A channel with an owner, another participant, a guest, and a user who does not take part."""

    def __init__(self, world: World, owner: Client, about: ConversationId) -> None:
        self.world, self.owner, self.about = world, owner, about

    @classmethod
    async def make(cls, world: World) -> "Room":
        owner = await world.connect(await world.user("Owner"))
        return cls(world, owner, await world.channel(owner, is_public=True))

    async def enter(self, who: UserSession, role: Role = "member", **grants: bool) -> Client:
        one = await self.world.connect(who, 1)
        await one.call(client.Join(conversation_id=self.about))
        await self.owner.call(client.SetRole(conversation_id=self.about, user_id=who.id, role=role))  # type: ignore[arg-type]
        if grants:
            await self.owner.call(client.SetPermissions(conversation_id=self.about, user_id=who.id, **grants))
        return one


@pytest.mark.parametrize("role", ["guest", "member", "moderator", "admin"])
async def test_each_cell_of_the_table_of_roles(world: World, role: Role) -> None:
    for grant in (None, *GRANTS):
        await try_each_act(world, role, grant)
    assert await recount(world.db) == []


async def try_each_act(world: World, role: Role, grant: str | None) -> None:
    """Let a user with a role and a permission try every act, in a new channel."""
    room = await Room.make(world)
    guest, other, somebody = await world.users("Guest", "Other", "UserSession")
    lowest = await room.enter(guest, "guest")
    actor = await room.enter(somebody, role, **({grant: True} if grant else {}))
    said = await sent(lowest, room.about)
    got = await actor.call(client.GetConversation(conversation_id=room.about), server.OneConversation)
    for act, asked in frames(room.about, said, guest.id, other.id).items():
        for frame in asked:
            answer = await actor.ask(frame)
            code = answer.code if isinstance(answer, Error) else None
            is_allowed = may(got.view.me, act)
            # No role is below a guest, whatever permissions the guest has.
            if act is Act.REMOVE_MEMBERS and role == "guest":
                is_allowed = False
            assert code == (None if is_allowed else ErrorCode.FORBIDDEN), (grant, act, frame, answer)


async def test_database_has_the_same_table_of_roles(world: World) -> None:
    rules = {act.value.permission: act for act in Act if act.value.permission not in {None, "can_delete_messages"}}
    rules["can_delete_messages"] = Act.DELETE_MESSAGES
    assert rules.keys() == set(GRANTS)
    assert Act.MODERATE.value.least == Act.DELETE_MESSAGES.value.least
    for role in ROLES:
        for grant, act in rules.items():
            text = "SELECT (participant_json(p) -> 'permissions' ->> $2)::boolean FROM (SELECT (r).* FROM (SELECT"
            for granted in (True, False):
                has = await world.db.fetchval(
                    f"{text} jsonb_populate_record(NULL::conversation_participant,"
                    " $1::jsonb || '{\"can_add_members\": false, \"can_remove_members\": false,"
                    " \"can_edit_conversation\": false, \"can_delete_messages\": false, \"can_pin_messages\": false}'"
                    " || jsonb_build_object($2::text, $3::boolean)) AS r) r) p",
                    f'{{"role": "{role}"}}', grant, granted,
                )  # fmt: skip
                assert has is (granted or rank(role) >= rank(act.value.least)), (role, grant, granted)


async def test_no_act_on_a_participant_of_the_same_role_is_allowed(world: World) -> None:
    room = await Room.make(world)
    one, other = await world.users("One", "Other")
    actor = await room.enter(one, "admin")
    await room.enter(other, "admin")
    for frame in (
        client.SetRole(conversation_id=room.about, user_id=other.id, role="guest"),
        client.SetPermissions(conversation_id=room.about, user_id=other.id, can_pin_messages=True),
        client.RemoveParticipant(conversation_id=room.about, user_id=other.id),
        client.RemoveParticipant(conversation_id=room.about, user_id=room.owner.ready.user.id, ban=True),
    ):
        with refused(ErrorCode.FORBIDDEN, "user_id"):
            await actor.call(frame)


async def test_ownership_is_transferred_and_never_lost(world: World) -> None:
    room = await Room.make(world)
    admin, member = await world.users("Admin", "Member")
    second, third = await room.enter(admin, "admin"), await room.enter(member)
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await room.owner.call(
            client.TransferOwnership(conversation_id=room.about, user_id=(await world.user("Stranger")).id)
        )
    await room.owner.call(client.TransferOwnership(conversation_id=room.about, user_id=member.id))
    assert await role_of(third, room.about) == "owner"
    assert await role_of(room.owner, room.about) == "admin"
    await third.call(client.Leave(conversation_id=room.about))
    await second.event(server.ParticipantChanged, lambda event: event.participant.role == "owner")
    await second.call(client.Leave(conversation_id=room.about))
    await room.owner.call(client.Leave(conversation_id=room.about))
    # No participant is left to own it, so the conversation ends.
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await third.call(client.Join(conversation_id=room.about))
    assert await recount(world.db) == []


ACCOUNTS_GONE = (
    "is_active = false",
    "is_active = false, is_disabled = true",
    "is_active = false, is_deleted = true, deleted_at = now()",
)
NAMING: dict[type[client.Frame], tuple[dict[str, Any], ErrorCode | None]] = {
    # More rights are only for active accounts.
    client.TransferOwnership: ({}, ErrorCode.CONFLICT), client.SetRole: ({"role": "admin"}, ErrorCode.CONFLICT),
    client.SetPermissions: ({"can_pin_messages": True}, ErrorCode.CONFLICT),
    # Inactive accounts are not found.
    client.CreateDirect: ({}, ErrorCode.NOT_FOUND), client.CreateGroup: ({}, ErrorCode.NOT_FOUND),
    client.AddParticipants: ({}, ErrorCode.NOT_FOUND), client.Invite: ({}, ErrorCode.NOT_FOUND),
    client.RequestFriend: ({}, ErrorCode.NOT_FOUND), client.Follow: ({}, ErrorCode.NOT_FOUND),
    # These give no rights.
    client.RemoveParticipant: ({}, None), client.Unban: ({}, None), client.AnswerFriend: ({"accept": True}, None),
    client.Block: ({}, None), client.Mute: ({}, None), client.SetSwitches: ({}, None), client.Unfriend: ({}, None),
    client.Unblock: ({}, None), client.Unfollow: ({}, None), client.Unmute: ({}, None),
}  # fmt: skip
"""Every writing frame that names a user, with its fields and the error for an account that is not active."""


async def test_inactive_account_gets_no_rights_and_no_ownership(world: World) -> None:
    assert NAMING.keys() == {
        frame for frame, route in ROUTES.items()
        if route.rate is Rate.WRITE and {"user_id", "participants"} & set(frame.__struct_fields__)
    }  # fmt: skip
    room = await Room.make(world)
    gone = await world.users(*("Gone" for _ in ACCOUNTS_GONE))
    active, outsider = await world.users("Active", "Outsider")
    for one in gone:
        await room.enter(one, "moderator")
    last = await room.enter(active)
    for one, how in zip([*gone, outsider], [*ACCOUNTS_GONE, ACCOUNTS_GONE[0]], strict=True):
        await world.db.execute(f'UPDATE "user" SET {how} WHERE id = $1', one.id)
        for frame, (fields, code) in NAMING.items():
            if code is None or (one is outsider) != (frame in {client.AddParticipants, client.Invite}):
                continue
            named = {"user_id": one.id} if "user_id" in frame.__struct_fields__ else {"participants": [one.id]}
            where: dict[str, Any] = (
                {"conversation_id": room.about} if "conversation_id" in frame.__struct_fields__ else {}
            )
            if frame is client.CreateGroup:
                where = {"conversation_id": ConversationId(uuid7()), "title": "Others"}
            answer = await room.owner.ask(frame(**where, **named, **fields))
            assert isinstance(answer, Error), frame
            assert (answer.code, answer.path) == (code, next(iter(named))), frame
    # Rights can still be removed from them.
    where = {"conversation_id": room.about, "user_id": gone[2].id}
    await room.owner.call(client.SetPermissions(**where, can_pin_messages=False))
    await room.owner.call(client.SetRole(**where, role="guest"))
    await room.owner.call(client.Leave(conversation_id=room.about))
    assert await role_of(last, room.about) == "owner"
    # If no account is active, the owner remains, and may come back.
    await last.call(client.Leave(conversation_id=room.about))
    roles = "SELECT user_id, role FROM conversation_participant WHERE conversation_id = $1 AND status = 'active'"
    left = {row[0]: row[1] for row in await world.db.fetch(roles, room.about)}
    assert left == {gone[0].id: "owner", gone[1].id: "moderator", gone[2].id: "guest"}


async def role_of(one: Client, about: ConversationId) -> Role:
    return (await one.call(client.GetConversation(conversation_id=about), server.OneConversation)).view.me.role


async def test_setting_restricts_who_may_send(world: World) -> None:
    room = await Room.make(world)
    member, moderator = await world.users("Member", "Moderator")
    quiet, loud = await room.enter(member), await room.enter(moderator, "moderator")
    settings = ConversationSettings(send_role="moderator")
    await room.owner.call(client.UpdateConversation(conversation_id=room.about, settings=settings))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await quiet.call(message(room.about))
    await sent(loud, room.about, "News")
    await room.owner.call(client.UpdateConversation(conversation_id=room.about, is_archived=True))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await loud.call(message(room.about))
    await room.owner.call(client.UpdateConversation(conversation_id=room.about, is_archived=False))
    await sent(loud, room.about, "More")


async def test_guest_is_still_a_guest_after_leaving_and_rejoining(world: World) -> None:
    """A guest with the permission to add people cannot give the role of a member."""
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    owner, guest, friend = [await world.connect(one) for one in (ada, charles, mary)]
    await world.befriend(charles, mary)
    about = await world.channel(owner, is_public=True, settings=ConversationSettings(send_role="member"))
    view = (await owner.call(client.SetInviteCode(conversation_id=about), server.OneConversation)).view
    code = view.invite.code if view.invite else None
    await guest.call(client.Join(conversation_id=about))
    await owner.call(client.SetRole(conversation_id=about, user_id=charles.id, role="guest"))
    for join in (client.Join(conversation_id=about), client.Join(invite_code=code)):
        await guest.call(client.Leave(conversation_id=about))
        await guest.call(join)
        with refused(ErrorCode.FORBIDDEN, "conversation_id"):
            await sent(guest, about)
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=charles.id))
    await guest.call(client.Join(conversation_id=about))
    await owner.call(client.SetPermissions(conversation_id=about, user_id=charles.id, can_add_members=True))
    for frame in (client.AddParticipants, client.Invite):
        with refused(ErrorCode.FORBIDDEN, "role"):
            await guest.call(frame(conversation_id=about, participants=[mary.id]))
    await guest.call(client.AddParticipants(conversation_id=about, participants=[mary.id], role="guest"))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await sent(friend, about)
    await owner.call(client.AddParticipants(conversation_id=about, participants=[charles.id]))


async def test_slow_mode_limits_messages(world: World) -> None:
    room = await Room.make(world)
    member, moderator = await world.users("Member", "Moderator")
    slow, free = await room.enter(member), await room.enter(moderator, "moderator")
    settings = ConversationSettings(slow_mode_seconds=3600)
    await room.owner.call(client.UpdateConversation(conversation_id=room.about, settings=settings))
    first = message(room.about, "First")
    answer = await slow.call(first, server.Sent)
    for _ in range(3):
        await sent(free, room.about)
    refusal = await slow.ask(message(room.about, "Second"))
    assert isinstance(refusal, Error)
    assert refusal.code == ErrorCode.RATE_LIMITED
    assert 3_500_000 < (refusal.retry_after_ms or 0) <= 3_600_000
    # A repeated send gets the stored answer, even within the interval.
    assert await slow.call(first, server.Sent) == answer
    await world.db.execute("UPDATE conversation_participant SET last_sent_at = now() - interval '2 hours'")
    await sent(slow, room.about, "Second")


def test_former_participant_has_no_rights() -> None:
    fields: dict[str, Any] = {"conversation_id": None, "user_id": None, "joined_at": None, "version": 1}
    for status in ("invited", "declined", "left", "removed", "banned"):
        gone = Participant(role="owner", status=status, **fields)
        assert not any(may(gone, act) for act in Act)
