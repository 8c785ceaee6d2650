"""Invitations: invite, decline, list, and invite codes. Accepting one is a `join`."""

from datetime import timedelta

from protocol import client
from protocol.roles import Act
from protocol.server import Done, InvitationList, OneConversation
from server.context import Context
from server.core.errors import NotFound
from server.domain.invite_code import new_code
from server.domain.membership import MembershipChange, lock_with_member, welcomed_by
from server.domain.permissions import require
from server.domain.publish import publish_updated
from server.queries import audit, conversation_views, conversations, invitations, invite_codes, participants, users
from server.queries.audit import Deed


async def invite(context: Context, frame: client.Invite) -> Done:
    """Invite users to a conversation."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        they = await welcomed_by(db, context, me, frame)
        membership_change = MembershipChange(context, db, conversation)
        if they.invited:
            membership_change.changes += await invitations.invite(
                db, conversation.id, they.invited, frame.role, context.user_id
            )
            await participants.stamp(db, conversation.id, they.invited)
    membership_change.tell()
    return Done()


async def decline(context: Context, frame: client.Decline) -> Done:
    """Decline an invitation."""
    async with context.transaction() as db:
        conversation = await conversations.lock_as(db, frame.conversation_id, context.user_id, "invited")
        if conversation is not None:
            await users.lock(db, [context.user_id])
        me = await participants.get(db, frame.conversation_id, context.user_id)
        if me is not None and me.status == "declined":
            return Done()
        if conversation is None or me is None or me.status != "invited":
            raise NotFound("conversation_id")
        membership_change = MembershipChange(context, db, conversation)
        membership_change.changes.append(await participants.change(db, me, status="declined"))
        await participants.stamp(db, conversation.id, [context.user_id])
    membership_change.tell()
    return Done()


async def list_invitations(context: Context, frame: client.ListInvitations) -> InvitationList:  # noqa: ARG001
    """Return the caller's pending invitations."""
    async with context.database.connection() as db:
        return InvitationList(invitations=await invitations.listed(db, context.user_id))


async def set_invite_code(context: Context, frame: client.SetInviteCode) -> OneConversation:
    """Set a new invite code, or delete it."""
    lasts = None if frame.expires_in_seconds is None else timedelta(seconds=frame.expires_in_seconds)
    code = new_code() if frame.is_open else None
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.ADD_MEMBERS)
        conversation = await invite_codes.replace(db, conversation.id, code, lasts, frame.max_uses)
        details = {"is_open": frame.is_open, "max_uses": frame.max_uses, "seconds": frame.expires_in_seconds}
        await audit.record(db, conversation.id, Deed(context.user_id, "set_invite_code", details=details))
        (view,) = await conversation_views.get(db, context.user_id, [conversation.id])
    publish_updated(context.events, conversation)
    return OneConversation(view=view)
