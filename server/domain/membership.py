"""Changes of a conversation's participants. They happen under its lock, and are published after the commit."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from protocol.client import AddParticipants, Invite
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_INVITATIONS_SENT, MAX_SHARED_PARTICIPANTS
from protocol.roles import Act, may
from protocol.server import MessageSent
from protocol.values import Conversation, Message, Participant
from server.context import Context, Events
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.domain.permissions import require, require_below
from server.domain.publish import publish_participant
from server.queries import approaches, audit, conversations, participants, system_messages, users, welcome
from server.queries.audit import Deed
from server.queries.participants import ParticipantChange
from server.queries.system_messages import SystemMessage
from server.queries.welcome import Guest


class MembershipChange:
    """The changes of one transaction in a conversation, which `tell` publishes after the commit."""

    def __init__(self, context: Context, db: Db, conversation: Conversation) -> None:
        self._context = context
        self._db = db
        self._conversation = conversation
        self._system_messages: list[Message] = []
        self._entered: set[UserId] = set()
        self.changes: list[ParticipantChange] = []

    def enter(self, changes: list[ParticipantChange]) -> None:
        """Collect the changes of users who joined or were invited."""
        self._entered.update(change.participant.user_id for change in changes)
        self.changes += changes

    async def post_departure(self) -> None:
        """Post that the caller left, unless the conversation is large. There, such messages would hide all others."""
        if self._conversation.participant_count <= MAX_SHARED_PARTICIPANTS:
            await self.post_system_message(SystemMessage("leave", "left"))

    async def post_system_message(self, message: SystemMessage) -> None:
        """Post a system message about an action of the caller, unless the conversation's settings disable these."""
        if self._conversation.settings.system_messages:
            about = self._conversation.id
            self._system_messages.append(await system_messages.store(self._db, about, self._context.user_id, message))

    async def record(self, deed: Deed) -> None:
        """Add an action to the conversation's audit log."""
        await audit.record(self._db, self._conversation.id, deed)

    def tell(self) -> None:
        """Publish all changes. The caller has committed."""
        publish_changes(self._context.events, self.changes, self._system_messages, self._entered)


def publish_changes(
    events: Events,
    changes: Sequence[ParticipantChange],
    system_messages: Iterable[Message],
    entered: Collection[UserId],
) -> None:
    """Publish changes of participants, of whom those in `entered` joined or were invited, and messages about these
    changes. The caller has committed.
    """
    for change in changes:
        publish_participant(events, change)
    for message in system_messages:
        events.publish(MessageSent(conversation_id=message.conversation_id, version=message.version, message=message))
    for change in changes:
        who = change.participant.user_id
        # Participants of a conversation see private users among them, which ends when one of the two leaves.
        decides = who in entered or change.participant.status not in {"active", "invited"}
        events.notify([who], may_watch_others=decides)
        if decides:
            events.reconsider(who)


async def taking_part(db: Db, conversation_id: ConversationId, user_id: UserId) -> Participant:
    """Return an active participant. Raises NotFound if the user is none."""
    me = await participants.get(db, conversation_id, user_id)
    if me is None or me.status != "active":
        raise NotFound("conversation_id")
    return me


async def lock_with_member(
    db: Db, context: Context, conversation_id: ConversationId
) -> tuple[Conversation, Participant]:
    """Lock a conversation to change its participants. Return it and the caller as a participant.

    Raises NotFound if the caller is no active participant, without locking the conversation. Raises Refused if the
    participants of this conversation never change.
    """
    conversation = await conversations.lock_as(db, conversation_id, context.user_id)
    if conversation is None:
        raise NotFound("conversation_id")
    return conversation, await _changing(db, conversation, context.user_id)


async def lock_with_caller(
    db: Db, context: Context, conversation_id: ConversationId
) -> tuple[Conversation, Participant]:
    """Do the same as `lock_with_member`, and also lock the caller's account. Raises NotActive if it is not active."""
    locked = await conversations.lock_as_with_user(db, conversation_id, context.user_id)
    if locked is None:
        raise NotFound("conversation_id")
    conversation, is_active = locked
    if not is_active:
        raise NotActive
    return conversation, await _changing(db, conversation, context.user_id)


async def _changing(db: Db, conversation: Conversation, user_id: UserId) -> Participant:
    """Return an active participant of a locked conversation whose participants may change."""
    me = await taking_part(db, conversation.id, user_id)
    if is_lasting(conversation):
        raise Refused(
            ErrorCode.FORBIDDEN,
            "A direct conversation cannot be left, extended or deleted. Use `set_preferences` to hide it.",
            path="conversation_id",
        )
    return me


def is_lasting(conversation: Conversation) -> bool:
    """Whether the participants never change and nobody may delete the conversation. There is one such conversation per
    pair, for ever.
    """
    return conversation.type in {"direct", "assistant"}


async def end(db: Db, conversation_id: ConversationId) -> Conversation:
    """Delete a conversation for everyone, under its lock. Return its remains."""
    await conversations.lock_all_out(db, conversation_id)
    return await conversations.delete(db, conversation_id)


class Welcome(NamedTuple):
    """The users in a frame, grouped by how they come in, without the caller. Each group keeps the frame's order."""

    present: list[UserId]
    """Active participants."""
    waiting: list[UserId]
    """Users who are invited and may not be added."""
    added: list[UserId]
    """Users who may be added, invited or not."""
    invited: list[UserId]
    """Users who may only be invited, and are not yet."""


async def guests(
    db: Db, context: Context, conversation_id: ConversationId | None, named: Iterable[UserId]
) -> list[Guest]:
    """Return the relations of named users to the caller and to a conversation, which is None if it is new. Raises
    NotFound if one of them may not even be invited.

    Callers call this twice. The first call precedes the locks, so that a refused frame locks no stranger. The second
    one follows the locks of the caller and the named users. From then on, blocks and changes of privacy wait for the
    transaction.
    """
    others = [user_id for user_id in dict.fromkeys(named) if user_id != context.user_id]
    found = await welcome.guests(db, context.user_id, conversation_id, others)
    if not all(guest.may_be_invited for guest in found):
        raise NotFound("participants")
    return found


def welcomed(context: Context, named: list[Guest], *, only_invited: bool = False) -> Welcome:
    """Return whom of the guests the caller adds, and whom the caller invites. With `only_invited`, nobody is added.

    Raises Refused if too many invitations would be pending for the caller, or for a user who may not be added. The
    message is the same for both.
    """
    found = Welcome([], [], [], [])
    for guest in named:
        may_add = guest.may_be_added or context.services.anyone_adds
        if guest.status == "active":
            found.present.append(guest.user_id)
        elif may_add and not only_invited:
            found.added.append(guest.user_id)
        elif guest.status == "invited":
            found.waiting.append(guest.user_id)
        else:
            found.invited.append(guest.user_id)
    is_full = any(guest.is_full and not guest.may_be_added for guest in named if guest.user_id in found.invited)
    if is_full or (found.invited and named[0].sent + len(found.invited) > MAX_INVITATIONS_SENT):
        raise Refused(
            ErrorCode.CONFLICT,
            "Too many invitations are pending. Invite again when some are answered or revoked.",
            path="participants",
        )
    return found


async def welcomed_by(db: Db, context: Context, me: Participant, frame: AddParticipants | Invite) -> Welcome:
    """Lock all users that a frame adds or invites. Return how they come in. Raises Refused if the caller may not do
    that.
    """
    require(me, Act.ADD_MEMBERS)
    require_below(me, frame.role)
    # Check before the lock, so that a refused frame locks no stranger.
    await require_uncounted(db, context, await _allowed(db, context, me, frame))
    await users.lock(db, [context.user_id, *frame.participants])
    they = await _allowed(db, context, me, frame)
    await counted(db, context, they)
    return they


async def _allowed(db: Db, context: Context, me: Participant, frame: AddParticipants | Invite) -> Welcome:
    named = await guests(db, context, me.conversation_id, frame.participants)
    if any(guest.status == "banned" for guest in named):
        if may(me, Act.REMOVE_MEMBERS):
            raise Refused(
                ErrorCode.CONFLICT, "One of the users is banned. Lift the ban with `unban` first.", path="participants"
            )
        raise Refused(ErrorCode.FORBIDDEN, "Your role cannot lift a ban. Ask an admin.", path="participants")
    return welcomed(context, named, only_invited=isinstance(frame, Invite))


async def require_uncounted(db: Db, context: Context, they: Welcome) -> None:
    """Raise Refused if `counted` would. This comes before the locks."""
    await approaches.require(db, "add", context.user_id, they.added)
    await approaches.require(db, "invite", context.user_id, they.invited)


async def counted(db: Db, context: Context, they: Welcome) -> None:
    """Count the additions and invitations by the caller. Raises Refused if a user got too many of them within a day."""
    await approaches.count(db, "add", context.user_id, they.added)
    await approaches.count(db, "invite", context.user_id, they.invited)


def require_room(conversation: Conversation, more: int, path: str) -> None:
    """Raise Refused, for a field of the frame, if `more` further participants would exceed the limit."""
    limit = conversation.max_participants
    if limit is not None and conversation.participant_count + more > limit:
        raise full(limit, path)


def full(limit: int, path: str) -> Refused:
    """Return the error for a conversation with the max number of participants."""
    return Refused(ErrorCode.CONFLICT, f"The conversation is full. It takes at most {limit} participants.", path=path)
