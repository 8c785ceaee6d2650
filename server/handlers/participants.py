"""Participants: join, leave, add, remove, roles, permissions, list."""

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
from server.domain.membership import MembershipChange, lock_with_member, require_room, taking_part, welcomed_by
from server.domain.permissions import require, require_above, require_below
from server.queries import bounds, conversations, participants, users
from server.queries.audit import Deed
from server.queries.sending import Announcement


async def join(context: Context, frame: client.Join) -> OneConversation:
    """Let the caller in: a public conversation, one they have the code of, or one they were invited to."""
    path = _named_by(frame)
    async with context.transaction() as db:
        # Asked before the lock, so that whoever is refused does not lock the conversation, and again under it: the
        # conversation may have closed, or the code may have changed, in between.
        found, _ = await _welcomed(db, context, frame)
        if await conversations.lock(db, found.id) is None:
            raise NotFound(path)
        if not await users.lock(db, [context.user_id]):
            raise NotActive
        conversation, before = await _welcomed(db, context, frame)
        if conversation.id != found.id:
            raise NotFound(path)
        news = MembershipChange(context, db, conversation)
        if before is None or before.status != "active":
            news.enter(await participants.add(db, conversation.id, [context.user_id], "member", None))
            if frame.invite_code is not None:
                await conversations.use_invite_code(db, conversation.id)
            await news.announce(Announcement("join", "joined"))
            if before is not None and before.status == "invited":
                await participants.stamp(db, conversation.id, [context.user_id])
            else:
                await users.touch(db, [context.user_id])
            await bounds.require_memberships(db, [context.user_id], path)
        (view,) = await conversations.get(db, context.user_id, [conversation.id])
    news.tell()
    await sync.join(context, view)
    return OneConversation(view=view)


async def _welcomed(db: Db, context: Context, frame: client.Join) -> tuple[Conversation, Participant | None]:
    """Return the conversation that the caller may join, and their part in it so far. Raises NotFound if none is open to
    them, and Refused if they are banned, whoever invited them may add nobody any more, or it is full.
    """
    path = _named_by(frame)
    conversation = await conversations.open_to(db, context.user_id, frame.conversation_id, frame.invite_code)
    if conversation is None:
        raise NotFound(path)
    before = await participants.get(db, conversation.id, context.user_id)
    if before is not None and before.status == "banned":
        raise Refused(
            ErrorCode.FORBIDDEN,
            "You are banned from this conversation. Ask an admin to lift the ban.",
            path=path,
        )
    is_open = conversation.is_public or frame.invite_code is not None
    is_invited = before is not None and before.status == "invited" and not is_open
    # What lets in who is invited is the right of whoever invited them.
    if is_invited and await participants.invited_as(db, conversation.id, context.user_id) is None:
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
    """Let the caller out; an owner's place goes to the next in rank, then in age."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        await users.lock(db, [context.user_id])
        news = MembershipChange(context, db, conversation)
        news.changes += await participants.leave(db, me)
        if news.changes[0].participant_count:
            await news.announce(Announcement("leave", "left"))
        await users.touch(db, [context.user_id])
    news.tell()
    return Done()


async def add(context: Context, frame: client.AddParticipants) -> Added:
    """Let users in whom the caller may add, and ask the others to come."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        they = await welcomed_by(db, context, me, frame)
        news = MembershipChange(context, db, conversation)
        if they.added:
            require_room(conversation, len(they.added), "participants")
            news.enter(await participants.add(db, conversation.id, they.added, frame.role, context.user_id))
        if they.invited:
            news.changes += await participants.invite(db, conversation.id, they.invited, frame.role, context.user_id)
        if they.added:
            count = "someone" if len(they.added) == 1 else f"{len(they.added)} people"
            await news.announce(Announcement("add_member", f"added {count}", {"user_ids": they.added}))
        if news.changes:
            await participants.stamp(db, conversation.id, they.added + they.invited)
        if they.added:
            await bounds.require_memberships(db, they.added, "participants")
    news.tell()
    return Added(added=they.present + they.added, invited=they.waiting + they.invited)


async def remove(context: Context, frame: client.RemoveParticipant) -> Done:
    """Put someone of a lower role out, or take back their invitation."""
    status: ParticipantStatus = "banned" if frame.ban else "removed"
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.REMOVE_MEMBERS)
        them = await _other(db, me, frame.user_id)
        if them.status == status:
            return Done()
        if them.status not in {"active", "invited"} and not frame.ban:
            raise NotFound("user_id")
        # After the refusals, so that none of them locks a stranger. The conversation's lock keeps the status as it is.
        await users.lock(db, [frame.user_id])
        news = MembershipChange(context, db, conversation)
        news.changes.append(await participants.change(db, them, status=status))
        if them.status == "active":
            await news.announce(Announcement("remove_member", "removed someone", {"user_ids": [them.user_id]}))
        await news.record(Deed(context.user_id, "ban" if frame.ban else "remove", them.user_id))
        # Nothing is new to a user who has left already, or bans and unbans would reach them again and again.
        if them.status in {"active", "invited"}:
            await participants.stamp(db, conversation.id, [them.user_id])
    news.tell()
    return Done()


async def unban(context: Context, frame: client.Unban) -> Done:
    """Lift a ban."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.REMOVE_MEMBERS)
        them = await _other(db, me, frame.user_id)
        if them.status != "banned":
            return Done()
        news = MembershipChange(context, db, conversation)
        news.changes.append(await participants.change(db, them, status="removed"))
        await news.record(Deed(context.user_id, "unban", them.user_id))
    news.tell()
    return Done()


async def set_role(context: Context, frame: client.SetRole) -> Done:
    """Give someone of a lower role another one."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.SET_ROLES)
        them = await _active(db, me, frame.user_id)
        require_below(me, frame.role)
        if them.role == frame.role:
            return Done()
        if rank(frame.role) > rank(them.role):
            await _require_account(db, them)
        news = MembershipChange(context, db, conversation)
        news.changes.append(await participants.change(db, them, role=frame.role))
        details = {"from": them.role, "to": frame.role}
        await news.record(Deed(context.user_id, "set_role", them.user_id, details=details))
    news.tell()
    return Done()


async def set_permissions(context: Context, frame: client.SetPermissions) -> Done:
    """Give someone of a lower role permissions beyond it, or take them back."""
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
        news = MembershipChange(context, db, conversation)
        news.changes.append(changed)
        await news.record(Deed(context.user_id, "set_permissions", them.user_id, details=wanted))
    news.tell()
    return Done()


async def transfer_ownership(context: Context, frame: client.TransferOwnership) -> Done:
    """Make another participant the owner; the caller becomes an admin."""
    async with context.transaction() as db:
        conversation, me = await lock_with_member(db, context, frame.conversation_id)
        require(me, Act.TRANSFER)
        if frame.user_id == context.user_id:
            return Done()
        them = await _active(db, me, frame.user_id)
        await _require_account(db, them)
        news = MembershipChange(context, db, conversation)
        news.changes.append(await participants.change(db, them, role="owner"))
        news.changes.append(await participants.change(db, me, role="admin"))
        await news.record(Deed(context.user_id, "transfer_ownership", them.user_id))
    news.tell()
    return Done()


async def list_participants(context: Context, frame: client.ListParticipants) -> ParticipantPage:
    """Return a page of those who take part, are invited, or are banned."""
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
    """Return someone whose role is below the caller's, as is everyone's who is not there any more."""
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
    """Raise Refused unless a participant's account is active: rights of others would be used by nobody."""
    if not await users.lock(db, [them.user_id]):
        raise Refused(
            ErrorCode.CONFLICT, "The account of this user is not active. Choose another user.", path="user_id"
        )
