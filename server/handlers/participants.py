"""Participants: join, leave, add, remove, ban, roles, permissions, ownership, list."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.roles import Act, may, rank
from protocol.server import Added, Done, OneConversation, ParticipantPage
from protocol.values import Participant, ParticipantStatus
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.core.faults import may_have_committed
from server.db.database import Db
from server.domain import batched_changes, sync
from server.domain.membership import (
    MembershipChange,
    full,
    lock_with_caller,
    lock_with_member,
    publish_changes,
    require_room,
    taking_part,
    welcomed_by,
)
from server.domain.permissions import require, require_above, require_below
from server.queries import bounds, invitations, invite_codes, participants, users
from server.queries.audit import Deed
from server.queries.joins import JoinRequest
from server.queries.system_messages import SystemMessage


async def join(context: Context, frame: client.Join) -> OneConversation:
    """Join a conversation that is public, has the invite code, or invited the caller."""
    path = _named_by(frame)
    about = frame.conversation_id
    if frame.invite_code is not None:
        async with context.database.connection() as db:
            about = await invite_codes.find(db, frame.invite_code)
    if about is None:
        raise NotFound(path)
    request = JoinRequest(about, context.user_id, frame.invite_code)
    try:
        joined = await batched_changes.change(context.services.joins, request, REFUSALS[path])
    except BaseException as error:
        if may_have_committed(error):  # dispatch does the same, but does not know the conversation of a code
            context.events.recheck(context.user_id, about)
        raise
    if joined.change is not None:
        messages = [] if joined.message is None else [joined.message]
        publish_changes(context.events, [joined.change], messages, {context.user_id})
    view = await sync.enter(context, about)
    if view is None:
        raise NotFound(path)  # removed since
    return OneConversation(view=view)


def _refusals(path: str) -> batched_changes.Refusals:
    """Return the errors of a join that named its conversation by the field `path`."""
    return {
        "missing": lambda _: NotFound(path),
        "banned": lambda _: Refused(
            ErrorCode.FORBIDDEN,
            "You are banned from this conversation. Ask an admin to lift the ban.",
            path=path,
        ),
        "uninvited": lambda _: Refused(
            ErrorCode.FORBIDDEN,
            "The user who invited you may no longer add anyone. Ask for another invitation.",
            path=path,
        ),
        "full": lambda outcome: full(outcome.max_participants, path),
        "inactive": lambda _: NotActive(),
        "too_many": lambda _: bounds.too_many_memberships(path),
    }


REFUSALS = {path: _refusals(path) for path in ("conversation_id", "invite_code")}
"""Errors of joins, by the field that names the conversation."""


def _named_by(frame: client.Join) -> str:
    return "invite_code" if frame.conversation_id is None else "conversation_id"


async def leave(context: Context, frame: client.Leave) -> Done:
    """Leave a conversation. The highest in role, and then the oldest participant, becomes owner in place of one who
    leaves.
    """
    async with context.transaction(checks_account=False) as db:
        conversation, me = await lock_with_caller(db, context, frame.conversation_id)
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes += await participants.leave(db, me)
        if membership_change.changes[0].participant_count:
            await membership_change.post_departure()
    membership_change.tell()
    return Done()


async def add(context: Context, frame: client.AddParticipants) -> Added:
    """Add users whom the caller may add, and invite the others."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        they = await welcomed_by(db, context, me, frame)
        membership_change = MembershipChange(context, db, conversation)
        if they.added:
            require_room(conversation, len(they.added), "participants")
            membership_change.enter(
                await participants.add(db, conversation.id, they.added, frame.role, context.user_id)
            )
        if they.invited:
            membership_change.changes += await invitations.invite(
                db, conversation.id, they.invited, frame.role, context.user_id
            )
        if they.added:
            count = "someone" if len(they.added) == 1 else f"{len(they.added)} people"
            await membership_change.post_system_message(
                SystemMessage("add_member", f"added {count}", {"user_ids": they.added})
            )
        if membership_change.changes:
            await participants.stamp(db, conversation.id, they.added + they.invited)
        if they.added:
            await bounds.require_memberships(db, they.added, "participants")
    membership_change.tell()
    return Added(added=they.present + they.added, invited=they.waiting + they.invited)


async def remove(context: Context, frame: client.RemoveParticipant) -> Done:
    """Remove or ban a user of a lower role, or revoke the user's invitation."""
    status: ParticipantStatus = "banned" if frame.ban else "removed"
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.REMOVE_MEMBERS)
        them = await _other(db, me, frame.user_id)
        if them.status == status:
            return Done()
        if them.status not in {"active", "invited"} and not frame.ban:
            raise NotFound("user_id")
        # The lock follows the refusals, so that none of them locks a stranger. The conversation's lock keeps the status
        # until then.
        await users.lock(db, [frame.user_id])
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes.append(await participants.change(db, them, status=status))
        if them.status == "active":
            await membership_change.post_system_message(
                SystemMessage("remove_member", "removed someone", {"user_ids": [them.user_id]})
            )
        await membership_change.record(Deed(context.user_id, "ban" if frame.ban else "remove", them.user_id))
        # A user who has left receives nothing. Otherwise bans and unbans could reach the user again and again.
        if them.status in {"active", "invited"}:
            await participants.stamp(db, conversation.id, [them.user_id])
    membership_change.tell()
    return Done()


async def unban(context: Context, frame: client.Unban) -> Done:
    """Lift a ban."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.REMOVE_MEMBERS)
        them = await _other(db, me, frame.user_id)
        if them.status != "banned":
            return Done()
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes.append(await participants.change(db, them, status="removed"))
        await membership_change.record(Deed(context.user_id, "unban", them.user_id))
    membership_change.tell()
    return Done()


async def set_role(context: Context, frame: client.SetRole) -> Done:
    """Change the role of a user of a lower role."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.SET_ROLES)
        them = await _active(db, me, frame.user_id)
        require_below(me, frame.role)
        if them.role == frame.role:
            return Done()
        if rank(frame.role) > rank(them.role):
            await _require_account(db, them)
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes.append(await participants.change(db, them, role=frame.role))
        details = {"from": them.role, "to": frame.role}
        await membership_change.record(Deed(context.user_id, "set_role", them.user_id, details=details))
    membership_change.tell()
    return Done()


async def set_permissions(context: Context, frame: client.SetPermissions) -> Done:
    """Grant permissions beyond the role to a user of a lower role, or revoke them."""
    wanted = client.given(frame)
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.SET_ROLES)
        them = await _active(db, me, frame.user_id)
        if not wanted:
            return Done()
        if any(wanted.values()):
            await _require_account(db, them)
        changed = await participants.permit(db, them, wanted)
        if changed is None:
            return Done()
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes.append(changed)
        await membership_change.record(Deed(context.user_id, "set_permissions", them.user_id, details=wanted))
    membership_change.tell()
    return Done()


async def transfer_ownership(context: Context, frame: client.TransferOwnership) -> Done:
    """Make another participant the owner. The caller becomes an admin."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.TRANSFER)
        if frame.user_id == context.user_id:
            return Done()
        them = await _active(db, me, frame.user_id)
        await _require_account(db, them)
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes.append(await participants.change(db, them, role="owner"))
        membership_change.changes.append(await participants.change(db, me, role="admin"))
        await membership_change.record(Deed(context.user_id, "transfer_ownership", them.user_id))
    membership_change.tell()
    return Done()


async def list_participants(context: Context, frame: client.ListParticipants) -> ParticipantPage:
    """Return a page of active, invited or banned participants."""
    async with context.database.connection() as db:
        found = await participants.page(db, context.user_id, frame, limit=frame.limit)
        if found is None:
            me = await taking_part(db, frame.conversation_id, context.user_id)
            if frame.status != "active" and not may(me, Act.ADD_MEMBERS):
                require(me, Act.REMOVE_MEMBERS)
            return ParticipantPage(participants=[])
    page = await found.decoded()
    return ParticipantPage(participants=page.rows, after=page.after)


async def _other(db: Db, me: Participant, user_id: UserId) -> Participant:
    """Return a participant whose role is below the caller's. A former participant has none. Raises NotFound or Refused
    otherwise.
    """
    them = await participants.get(db, me.conversation_id, user_id)
    if them is None:
        raise NotFound("user_id")
    if them.status in {"active", "invited"}:
        require_above(me, them)
    return them


async def _active(db: Db, me: Participant, user_id: UserId) -> Participant:
    them = await _other(db, me, user_id)
    if them.status != "active":
        raise NotFound("user_id")
    return them


async def _require_account(db: Db, them: Participant) -> None:
    """Raise Refused unless a participant's account is active, because nobody else could use the rights."""
    if not await users.lock(db, [them.user_id]):
        raise Refused(
            ErrorCode.CONFLICT, "The account of this user is not active. Choose another user.", path="user_id"
        )
