"""Participants: join, leave, add, remove, ban, roles, permissions, ownership, list."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.roles import Act, may, rank
from protocol.server import Added, Done, OneConversation, ParticipantPage
from protocol.values import Conversation, Participant, ParticipantStatus
from server.context import Context
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.domain import sync
from server.domain.membership import (
    MembershipChange,
    lock_with_caller,
    lock_with_member,
    require_room,
    taking_part,
    welcomed_by,
)
from server.domain.permissions import require, require_above, require_below
from server.queries import bounds, conversation_views, conversations, invitations, invite_codes, participants, users
from server.queries.audit import Deed
from server.queries.system_messages import SystemMessage


async def join(context: Context, frame: client.Join) -> OneConversation:
    """Join a conversation that is public, has the invite code, or invited the caller."""
    path = _named_by(frame)
    async with context.transaction(checks_account=False) as db:
        # Checked before the lock, so that a refused caller does not lock the conversation. Checked again under it,
        # because the conversation may have closed, or the code may have changed.
        found, _ = await _welcomed(db, context, frame)
        is_active = await conversations.lock_with_user(db, found.id, context.user_id)
        if is_active is None:
            raise NotFound(path)
        if not is_active:
            raise NotActive
        conversation, before = await _welcomed(db, context, frame)
        if conversation.id != found.id:
            raise NotFound(path)
        membership_change = MembershipChange(context, db, conversation)
        if before is None or before.status != "active":
            membership_change.enter(await participants.add(db, conversation.id, [context.user_id], "member", None))
            if frame.invite_code is not None:
                await invite_codes.use(db, conversation.id)
            await membership_change.post_own_move(SystemMessage("join", "joined"))
            if before is not None:  # The row has another status, or lost its mark.
                await participants.stamp(db, conversation.id, [context.user_id])
                await bounds.require_memberships(db, [context.user_id], path)
            else:
                await bounds.touch_member(db, context.user_id, path)
    membership_change.tell()
    # Read after the commit, so that nobody waits for that.
    async with context.database.connection() as db:
        views = await conversation_views.get(db, context.user_id, [conversation.id])
    if not views:
        raise NotFound(path)  # removed since
    await sync.join(context, views[0])
    return OneConversation(view=views[0])


async def _welcomed(db: Db, context: Context, frame: client.Join) -> tuple[Conversation, Participant | None]:
    """Return the conversation that the caller may join, and the caller's earlier participation. Raises NotFound if no
    conversation is open to the caller. Raises Refused if the caller is banned, if the inviter may no longer add users,
    or if it is full.
    """
    path = _named_by(frame)
    found = await conversations.open_to(db, context.user_id, frame.conversation_id, frame.invite_code)
    if found is None:
        raise NotFound(path)
    conversation, before = found
    if before is not None and before.status == "banned":
        raise Refused(
            ErrorCode.FORBIDDEN,
            "You are banned from this conversation. Ask an admin to lift the ban.",
            path=path,
        )
    is_open = conversation.is_public or frame.invite_code is not None
    is_invited = before is not None and before.status == "invited" and not is_open
    # An invitation counts only while its sender may still add users.
    if is_invited and await invitations.invited_as(db, conversation.id, context.user_id) is None:
        raise Refused(
            ErrorCode.FORBIDDEN,
            "The user who invited you may no longer add anyone. Ask for another invitation.",
            path=path,
        )
    if before is None or before.status != "active":
        require_room(conversation, 1, path)
    return conversation, before


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
            await membership_change.post_own_move(SystemMessage("leave", "left"))
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
