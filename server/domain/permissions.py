"""What a participant may do, asked in one way: protocol/roles.py has the rules."""

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.roles import Act, may, rank
from protocol.values import Message, Participant, Role
from server.core.errors import NotActive, NotFound
from server.db.database import Db
from server.queries import participants, relationships
from server.queries.conversations import SendAccess
from server.queries.messages import FoundMessage, Obstacle

OBSTACLES: dict[Obstacle, str] = {
    "archived": "The conversation is archived. Ask an admin to change `is_archived`.",
    "role": "Your role cannot send in this conversation. Ask an admin for another role.",
    "unwanted": "You cannot write to this user. Unblock them if you block them; otherwise do not retry.",
}
"""Error messages for what keeps a participant from saying anything, however long they wait."""


class OwnBlock(Refused):
    """The answer to a user who would reach somebody whom they block."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.CONFLICT, "You block this user. Unblock them first.", path="user_id")


def require(me: Participant, act: Act) -> None:
    """Raise Refused, naming the role and the permission that it takes, unless a participant may do something."""
    if not may(me, act):
        rule = act.value
        permission = "" if rule.permission is None else f" or the permission `{rule.permission}`"
        raise Refused(ErrorCode.FORBIDDEN, f"Requires the role `{rule.least}`{permission}; you are `{me.role}`.")


def require_may_send(access: FoundMessage | SendAccess) -> None:
    """Raise Refused unless a participant may say something now: one rule for messages and for everything that reaches
    others as a message does.
    """
    if access.obstacle == "inactive":
        raise NotActive
    if access.obstacle in OBSTACLES:
        raise Refused(ErrorCode.FORBIDDEN, OBSTACLES[access.obstacle], path="conversation_id")
    if access.wait_ms:
        raise slow_mode(access.wait_ms)


def slow_mode(wait_ms: int) -> Refused:
    """Return what to answer a participant whom slow mode has wait for so many milliseconds."""
    return Refused(
        ErrorCode.RATE_LIMITED,
        "The conversation is in slow mode. Retry after `retry_after_ms`.",
        path="conversation_id",
        retry_after_ms=wait_ms,
    )


async def unreachable(db: Db, me: UserId, them: UserId) -> Refused:
    """Return what to answer a user who may not reach another one. It tells of the user's own block alone."""
    if await relationships.status(db, me, them, "block") == "active":
        return OwnBlock()
    return NotFound("user_id")


def require_above(me: Participant, them: Participant) -> None:
    """Raise Refused unless a participant has a higher role than another one."""
    if rank(them.role) >= rank(me.role):
        raise Refused(ErrorCode.FORBIDDEN, "The user's role must be lower than yours.", path="user_id")


async def require_sender_not_above(db: Db, me: Participant, message: Message) -> None:
    """Raise Refused if the sender of a message has a higher role than a participant. Under the conversation's lock.

    Senders who take part no more have no role, nor have system messages.
    """
    if message.system_message_type is None:
        await require_not_above(db, me, message.sender_id, "message_id")


async def require_not_above(db: Db, me: Participant, user_id: UserId, path: str) -> None:
    """Raise Refused, for a field of the frame, if a user takes part in a higher role than a participant."""
    them = await participants.get(db, me.conversation_id, user_id)
    if them is not None and them.status == "active" and rank(them.role) > rank(me.role):
        raise Refused(
            ErrorCode.FORBIDDEN, "The sender's role is higher than yours. Ask someone with that role.", path=path
        )


def require_below(me: Participant, role: Role) -> None:
    """Raise Refused unless a role is below a participant's own. Guests and members may also give their own."""
    if rank(role) >= rank(me.role) and not role == me.role in {"guest", "member"}:
        raise Refused(ErrorCode.FORBIDDEN, "`role` must be lower than your own.", path="role")
