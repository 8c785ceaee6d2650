"""Changes of who takes part in a conversation: made under its lock, told after the commit."""

from protocol.client import AddParticipants, Invite
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId
from protocol.roles import Act, may
from protocol.server import MessageSent
from protocol.values import Conversation, Message, Participant
from server.context import Context
from server.database import Db
from server.errors import NotFound
from server.permissions import require, require_below
from server.queries import audit, conversations, participants, sending, users
from server.queries.audit import Deed
from server.queries.participants import Change
from server.queries.sending import Announcement
from server.telling import tell_participant


class News:
    """What one transaction changes in a conversation, collected to be told when it is over."""

    def __init__(self, context: Context, db: Db, conversation: Conversation) -> None:
        self._context = context
        self._db = db
        self._conversation = conversation
        self._announced: list[Message] = []
        self.changes: list[Change] = []

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
            tell_participant(self._context.events, change)
        for message in self._announced:
            self._context.events.publish(
                MessageSent(conversation_id=message.conversation_id, version=message.version, message=message)
            )
        self._context.events.poke([change.participant.user_id for change in self.changes])


async def taking_part(db: Db, conversation_id: ConversationId, user_id: UserId) -> Participant:
    """Return a user's part in a conversation. Raises NotFound unless they take part."""
    me = await participants.get(db, conversation_id, user_id)
    if me is None or me.status != "active":
        raise NotFound("conversation_id")
    return me


async def entered(db: Db, context: Context, conversation_id: ConversationId) -> tuple[Conversation, Participant]:
    """Lock a conversation whose participants change, and return it with the caller's part in it.

    Raises NotFound for everyone who has none, and Refused where participants stay as they are.
    """
    conversation = await conversations.lock(db, conversation_id)
    me = await taking_part(db, conversation_id, context.user_id)
    if conversation is None:
        raise NotFound("conversation_id")
    if conversation.type in {"direct", "assistant"}:
        raise Refused(ErrorCode.FORBIDDEN, "Who takes part in this kind of conversation does not change.")
    return conversation, me


async def require_welcome(db: Db, me: Participant, frame: AddParticipants | Invite) -> None:
    """Raise Refused unless a participant may add or invite all whom a frame names, as what it says. Locks them, so that
    none of them is deactivated or erased before the transaction ends.
    """
    require(me, Act.ADD_MEMBERS)
    require_below(me, frame.role)
    await users.lock(db, frame.participants)
    if not await users.all_may(db, "invite", me.user_id, frame.participants):
        raise NotFound("participants")
    if not may(me, Act.REMOVE_MEMBERS) and await participants.any_banned(db, me.conversation_id, frame.participants):
        raise Refused(ErrorCode.FORBIDDEN, "Your role cannot lift a ban.", path="participants")


def require_room(conversation: Conversation, more: int) -> None:
    """Raise Refused unless so many more people may come."""
    limit = conversation.max_participants
    if limit is not None and conversation.participant_count + more > limit:
        raise Refused(ErrorCode.CONFLICT, f"The conversation is full: it takes {limit} participants.")
