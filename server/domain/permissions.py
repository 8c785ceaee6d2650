"""Permissions of participants. protocol/roles.py defines the rules."""

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
"""Error messages for obstacles that do not pass with time."""


class OwnBlock(Refused):
    """The refusal for a user who contacts someone whom they block."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.CONFLICT, "You block this user. Unblock them first.", path="user_id")


def require(me: Participant, act: Act) -> None:
    """Raise Refused unless a participant may do something. It names the required role and permission."""
    if not may(me, act):
        rule = act.value
        permission = "" if rule.permission is None else f" or the permission `{rule.permission}`"
        raise Refused(ErrorCode.FORBIDDEN, f"Requires the role `{rule.least}`{permission}; you are `{me.role}`.")


def require_may_send(access: FoundMessage | SendAccess) -> None:
    """Raise Refused unless a participant may send now. The rule is the same for messages and for all frames that reach
    others as messages do.
    """
    if access.obstacle == "inactive":
        raise NotActive
    if access.obstacle in OBSTACLES:
        raise Refused(ErrorCode.FORBIDDEN, OBSTACLES[access.obstacle], path="conversation_id")
    if access.wait_ms:
        raise slow_mode(access.wait_ms)


def slow_mode(wait_ms: int) -> Refused:
    """Return the refusal for a participant in slow mode. `wait_ms` is the time until the next message, in
    milliseconds.
    """
    return Refused(
        ErrorCode.RATE_LIMITED,
        "The conversation is in slow mode. Retry after `retry_after_ms`.",
        path="conversation_id",
        retry_after_ms=wait_ms,
    )


async def unreachable(db: Db, me: UserId, them: UserId) -> Refused:
    """Return the refusal for a user who may not contact another one. It reveals only the user's own block."""
    if await relationships.status(db, me, them, "block") == "active":
        return OwnBlock()
    return NotFound("user_id")


def require_above(me: Participant, them: Participant) -> None:
    """Raise Refused unless a participant has a higher role than another one."""
    if rank(them.role) >= rank(me.role):
        raise Refused(ErrorCode.FORBIDDEN, "The user's role must be lower than yours.", path="user_id")


async def require_sender_not_above(db: Db, me: Participant, message: Message) -> None:
    """Raise Refused if the sender of a message has a higher role than a participant. Requires the conversation's lock.

    Former participants and system messages have no role.
    """
    if message.system_message_type is None:
        await require_not_above(db, me, message.sender_id, "message_id")


async def require_not_above(db: Db, me: Participant, user_id: UserId, path: str) -> None:
    """Raise Refused, for a field of the frame, if a user is a participant with a higher role."""
    them = await participants.get(db, me.conversation_id, user_id)
    if them is not None and them.status == "active" and rank(them.role) > rank(me.role):
        raise Refused(
            ErrorCode.FORBIDDEN, "The sender's role is higher than yours. Ask someone with that role.", path=path
        )


def require_below(me: Participant, role: Role) -> None:
    """Raise Refused unless a role is lower than a participant's own. Guests and members may also assign their own."""
    if rank(role) >= rank(me.role) and not role == me.role in {"guest", "member"}:
        raise Refused(ErrorCode.FORBIDDEN, "`role` must be lower than your own.", path="role")
