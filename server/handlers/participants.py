"""Participants: join, leave, add, remove, give another role, list."""

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId
from protocol.server import Done, OneConversation, ParticipantChanged, ParticipantPage
from protocol.values import Conversation, Participant, ParticipantStatus, Role
from server import sync
from server.context import Context
from server.database import Db
from server.errors import NotFound
from server.queries import conversations, participants, users
from server.queries.participants import Change

RANKS: tuple[Role, ...] = ("guest", "member", "moderator", "admin", "owner")


async def join(context: Context, frame: client.Join) -> OneConversation:
    """Let the caller in: a public conversation, one they have the code of, or one they were invited to."""
    path = "invite_code" if frame.conversation_id is None else "conversation_id"
    async with context.database.transaction() as db:
        found = await conversations.open_to(db, context.user_id, frame.conversation_id, frame.invite_code)
        conversation = None if found is None else await conversations.lock(db, found)
        # Asked again under the lock: it may have closed, or the code may have changed, in between.
        if conversation is None or found != await conversations.open_to(
            db, context.user_id, frame.conversation_id, frame.invite_code
        ):
            raise NotFound(path)
        before = await participants.get(db, conversation.id, context.user_id)
        if before is not None and before.status == "banned":
            raise Refused(ErrorCode.FORBIDDEN, "You are banned from this conversation.", path=path)
        changes: list[Change] = []
        if before is None or before.status != "active":
            _require_room(conversation, 1)
            changes = await participants.add(db, conversation.id, [context.user_id], "member", None)
            await users.touch(db, [context.user_id])
        (view,) = await conversations.get(db, context.user_id, [conversation.id])
    _tell(context, changes)
    await sync.join(context, view)
    return OneConversation(view=view)


async def leave(context: Context, frame: client.Leave) -> Done:
    """Let the caller out; an owner's place goes to the next in rank, then in age."""
    async with context.database.transaction() as db:
        _, me = await _enter(db, context, frame.conversation_id)
        changes = [await participants.change(db, me, status="left")]
        if me.role == "owner" and (heir := await participants.heir(db, me)) is not None and heir.role != "owner":
            changes.append(await participants.change(db, heir, role="owner"))
        await users.touch(db, [change.participant.user_id for change in changes])
    _tell(context, changes)
    return Done()


async def add(context: Context, frame: client.AddParticipants) -> Done:
    """Let users in."""
    async with context.database.transaction() as db:
        conversation, me = await _enter(db, context, frame.conversation_id)
        if not me.permissions.can_add_members:
            raise Refused(ErrorCode.FORBIDDEN, "Your role cannot add participants.")
        if RANKS.index(frame.role) >= RANKS.index(me.role) and frame.role != "member":
            raise Refused(ErrorCode.FORBIDDEN, "You can only give a role below your own.", path="role")
        if not await users.are_there(db, frame.participants):
            raise NotFound("participants")
        if not me.permissions.can_remove_members and await participants.any_banned(
            db, conversation.id, frame.participants
        ):
            raise Refused(ErrorCode.FORBIDDEN, "Your role cannot lift a ban.", path="participants")
        changes = await participants.add(db, conversation.id, frame.participants, frame.role, context.user_id)
        if changes:
            _require_room(conversation, len(changes))
            await users.touch(db, [change.participant.user_id for change in changes])
    _tell(context, changes)
    return Done()


async def remove(context: Context, frame: client.RemoveParticipant) -> Done:
    """Put someone of a lower role out."""
    status: ParticipantStatus = "banned" if frame.ban else "removed"
    async with context.database.transaction() as db:
        _, me = await _enter(db, context, frame.conversation_id)
        if not me.permissions.can_remove_members:
            raise Refused(ErrorCode.FORBIDDEN, "Your role cannot remove participants.")
        them = await _other(db, me, frame.user_id)
        if them.status == status:
            return Done()
        if them.status != "active":
            raise NotFound("user_id")
        changes = [await participants.change(db, them, status=status)]
        await users.touch(db, [them.user_id])
    _tell(context, changes)
    return Done()


async def set_role(context: Context, frame: client.SetRole) -> Done:
    """Give someone of a lower role another one."""
    async with context.database.transaction() as db:
        _, me = await _enter(db, context, frame.conversation_id)
        if RANKS.index(me.role) < RANKS.index("admin"):
            raise Refused(ErrorCode.FORBIDDEN, "Your role cannot change roles.")
        them = await _other(db, me, frame.user_id)
        if them.status != "active":
            raise NotFound("user_id")
        if RANKS.index(frame.role) >= RANKS.index(me.role):
            raise Refused(ErrorCode.FORBIDDEN, "You can only give a role below your own.", path="role")
        if them.role == frame.role:
            return Done()
        changes = [await participants.change(db, them, role=frame.role)]
    _tell(context, changes)
    return Done()


async def list_participants(context: Context, frame: client.ListParticipants) -> ParticipantPage:
    """Return a page of those who take part."""
    async with context.database.connection() as db:
        entries = await participants.page(
            db, frame.conversation_id, context.user_id, frame.after, limit=frame.limit + 1
        )
        if not entries and not await participants.is_active(db, frame.conversation_id, context.user_id):
            raise NotFound("conversation_id")
    page = entries[: frame.limit]
    after = page[-1].participant.user_id if len(entries) > frame.limit else None
    return ParticipantPage(participants=page, after=after)


def _tell(context: Context, changes: list[Change]) -> None:
    for now, count in changes:
        context.events.publish(
            ParticipantChanged(
                conversation_id=now.conversation_id, version=now.version, participant=now, participant_count=count
            ),
            gone=None if now.status == "active" else now.user_id,
        )
    context.events.poke([change.participant.user_id for change in changes])


async def _enter(db: Db, context: Context, conversation_id: ConversationId) -> tuple[Conversation, Participant]:
    """Lock a conversation whose participants change, and return it with the caller's part in it.

    Raises NotFound for everyone who has none, and Refused where participants stay as they are.
    """
    conversation = await conversations.lock(db, conversation_id)
    me = await participants.get(db, conversation_id, context.user_id)
    if conversation is None or me is None or me.status != "active":
        raise NotFound("conversation_id")
    if conversation.type in {"direct", "assistant"}:
        raise Refused(ErrorCode.FORBIDDEN, "Who takes part in this kind of conversation does not change.")
    return conversation, me


async def _other(db: Db, me: Participant, user_id: UserId) -> Participant:
    """Return someone whose role is below the caller's."""
    them = await participants.get(db, me.conversation_id, user_id)
    if them is None:
        raise NotFound("user_id")
    if RANKS.index(them.role) >= RANKS.index(me.role):
        raise Refused(ErrorCode.FORBIDDEN, "Their role is not below your own.", path="user_id")
    return them


def _require_room(conversation: Conversation, more: int) -> None:
    limit = conversation.max_participants
    if limit is not None and conversation.participant_count + more > limit:
        raise Refused(ErrorCode.CONFLICT, f"The conversation is full: it takes {limit} participants.")
