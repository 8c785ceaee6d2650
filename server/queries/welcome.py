"""The relations of users to a caller who adds or invites them, read for all of them before and after a lock."""

from collections.abc import Sequence
from typing import NamedTuple

from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_INVITATIONS, MAX_INVITATIONS_OF_PAIR, MAX_INVITATIONS_SENT
from protocol.values import ParticipantStatus
from server.db.database import Db


class Guest(NamedTuple):
    """A user who is named to be added or invited."""

    user_id: UserId
    may_be_invited: bool
    may_be_added: bool
    status: ParticipantStatus | None
    """The user's status in the conversation. None without any."""
    is_full: bool
    """Whether `MAX_INVITATIONS` invitations of the user are pending, or `MAX_INVITATIONS_OF_PAIR` from the caller."""
    sent: int
    """The number of the caller's pending invitations, up to `MAX_INVITATIONS_SENT`."""


# An invitation to an ended conversation can be neither answered nor revoked, so it does not count.
_WAITING = """(SELECT count(*) FROM (
    SELECT FROM conversation_participant w JOIN conversation c ON c.id = w.conversation_id AND c.is_active
    WHERE {whose} AND w.status = 'invited' LIMIT {most}
) waiting)"""

GUESTS = f"""
SELECT named.user_id, may('invite', $1, named.user_id), may('add', $1, named.user_id), p.status,
    $4 = {_WAITING.format(whose="w.user_id = named.user_id", most="$4")}
        OR $6 = {_WAITING.format(whose="w.user_id = named.user_id AND w.invited_by = $1", most="$6")},
    {_WAITING.format(whose="w.invited_by = $1", most="$5")}
FROM unnest($3::uuid[]) WITH ORDINALITY AS named (user_id, place)
LEFT JOIN LATERAL (
    SELECT CASE WHEN o.status = 'invited' AND invited_as(o) IS NULL THEN 'left' ELSE o.status END AS status
    FROM conversation_participant o
    WHERE o.conversation_id = $2 AND o.user_id = named.user_id OFFSET 0
) p ON true
ORDER BY named.place
"""  # noqa: S608 - only constants are put in


async def guests(
    db: Db, caller: UserId, conversation_id: ConversationId | None, user_ids: Sequence[UserId]
) -> list[Guest]:
    """Return the relations of users to the caller and to a conversation, which is None if it is new. They keep the
    order of `user_ids`.
    """
    bounds = (MAX_INVITATIONS, MAX_INVITATIONS_SENT, MAX_INVITATIONS_OF_PAIR)
    rows = await db.fetch(GUESTS, caller, conversation_id, list(user_ids), *bounds)
    return [Guest(*row) for row in rows]
