"""Changes of who takes part in a conversation: made under its lock, told after the commit."""

from collections.abc import Iterable
from typing import NamedTuple

from protocol.client import AddParticipants, Invite
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_INVITATIONS_SENT
from protocol.roles import Act, may
from protocol.server import MessageSent
from protocol.values import Conversation, Message, Participant
from server.context import Context
from server.core.errors import NotFound
from server.db.database import Db
from server.domain.permissions import require, require_below
from server.domain.publish import publish_participant
from server.queries import approaches, audit, conversations, participants, sending, users, welcome
from server.queries.audit import Deed
from server.queries.participants import ParticipantChange
from server.queries.sending import Announcement
from server.queries.welcome import Guest


class MembershipChange:
    """What one transaction changes in a conversation, collected to be told when it is over."""

    def __init__(self, context: Context, db: Db, conversation: Conversation) -> None:
        self._context = context
        self._db = db
        self._conversation = conversation
        self._announced: list[Message] = []
        self._entered: set[UserId] = set()
        self.changes: list[ParticipantChange] = []

    def enter(self, changes: list[ParticipantChange]) -> None:
        """Collect those who came in."""
        self._entered.update(change.participant.user_id for change in changes)
        self.changes += changes

    async def announce(self, said: Announcement) -> None:
        """Have it said in the conversation what the caller did, unless its settings are against that."""
        if self._conversation.settings.system_messages:
            about = self._conversation.id
            self._announced.append(await sending.announce(self._db, about, self._context.user_id, said))

    async def record(self, deed: Deed) -> None:
        """Note it in the conversation's audit log."""
        await audit.record(self._db, self._conversation.id, deed)

    def tell(self) -> None:
        """Tell everyone. After the commit."""
        for change in self.changes:
            publish_participant(self._context.events, change)
        for message in self._announced:
            self._context.events.publish(
                MessageSent(conversation_id=message.conversation_id, version=message.version, message=message)
            )
        for change in self.changes:
            who = change.participant.user_id
            # Participants see somebody private among them, and not any more when one of the two has left.
            decides = who in self._entered or change.participant.status not in {"active", "invited"}
            self._context.events.notify([who], may_watch_others=decides)
            if decides:
                self._context.events.reconsider(who)


async def taking_part(db: Db, conversation_id: ConversationId, user_id: UserId) -> Participant:
    """Return a user's part in a conversation. Raises NotFound unless they take part."""
    me = await participants.get(db, conversation_id, user_id)
    if me is None or me.status != "active":
        raise NotFound("conversation_id")
    return me


async def lock_with_member(
    db: Db, context: Context, conversation_id: ConversationId
) -> tuple[Conversation, Participant]:
    """Lock a conversation whose participants change, and return it with the caller's part in it.

    Raises NotFound for everyone who has none, and locks nothing for them. Raises Refused where participants stay as
    they are.
    """
    conversation = await conversations.lock_as(db, conversation_id, context.user_id)
    if conversation is None:
        raise NotFound("conversation_id")
    me = await taking_part(db, conversation_id, context.user_id)
    if is_lasting(conversation):
        raise Refused(
            ErrorCode.FORBIDDEN,
            "A direct conversation cannot be left, extended or deleted. Use `set_preferences` to hide it.",
            path="conversation_id",
        )
    return conversation, me


def is_lasting(conversation: Conversation) -> bool:
    """Whether participants stay as they are and nobody deletes the conversation: there is one for each pair, ever."""
    return conversation.type in {"direct", "assistant"}


async def end(db: Db, conversation_id: ConversationId) -> Conversation:
    """Delete a conversation for everyone. Return what is left of it. Under the conversation's lock."""
    await conversations.lock_all_out(db, conversation_id)
    return await conversations.delete(db, conversation_id)


class Welcome(NamedTuple):
    """How those whom a frame names come in, in its order. The caller is none of them."""

    present: list[UserId]
    """They take part already."""
    waiting: list[UserId]
    """They may only be invited, and are."""
    added: list[UserId]
    """They may be added, invited or not."""
    invited: list[UserId]
    """They may only be invited, and are not yet."""


async def guests(
    db: Db, context: Context, conversation_id: ConversationId | None, named: Iterable[UserId]
) -> list[Guest]:
    """Return how the users named stand to the caller and to a conversation, None if it is new. Raises NotFound if one
    of them may not even be invited.

    Called twice: before the users are locked, so that a refused frame locks no stranger, and under the locks of all of
    them and the caller. A block, or a change of privacy, then waits until the transaction ends.
    """
    others = [user_id for user_id in dict.fromkeys(named) if user_id != context.user_id]
    found = await welcome.guests(db, context.user_id, conversation_id, others)
    if not all(guest.may_be_invited for guest in found):
        raise NotFound("participants")
    return found


def welcomed(context: Context, named: list[Guest], *, only_invited: bool = False) -> Welcome:
    """Return whom of the guests the caller adds, and whom they invite; with `only_invited`, nobody is added.

    Raises Refused if too many invitations would wait for an answer: the caller's, or those of somebody invited by a
    person who may not add them. The words are the same for both.
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
    """Lock all whom a frame adds or invites, and return how they come in. Raises Refused unless the caller may do that,
    as what the frame says.
    """
    require(me, Act.ADD_MEMBERS)
    require_below(me, frame.role)
    # A refused frame does not lock strangers.
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
    """Raise Refused if `counted` would. Before the locks."""
    await approaches.require(db, "add", context.user_id, they.added)
    await approaches.require(db, "invite", context.user_id, they.invited)


async def counted(db: Db, context: Context, they: Welcome) -> None:
    """Count that the caller adds and invites them. Raises Refused if one of them was, too often within a day."""
    await approaches.count(db, "add", context.user_id, they.added)
    await approaches.count(db, "invite", context.user_id, they.invited)


def require_room(conversation: Conversation, more: int, path: str) -> None:
    """Raise Refused, for a field of the frame, unless so many more people may come."""
    limit = conversation.max_participants
    if limit is not None and conversation.participant_count + more > limit:
        raise Refused(
            ErrorCode.CONFLICT,
            f"The conversation is full. It takes at most {limit} participants.",
            path=path,
        )
