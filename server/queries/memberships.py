"""Memberships: the conversations of each user, with their versions."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from protocol.ids import ConversationId, MessageId, UserId
from server.db.database import Db

MAX_READ = 2_000
"""Max memberships that one statement reads."""

_FIRST = ConversationId(UUID(int=0))


class Membership(NamedTuple):
    """The version of a user's conversation, and the user's read position in it with its revision."""

    version: int
    last_read: MessageId | None
    revision: int


# For each of the users $1, at most $3 conversations after the one in $2.
READ = """
SELECT who.user_id, part.* FROM unnest($1::uuid[], $2::uuid[]) AS who (user_id, after)
CROSS JOIN LATERAL (
    SELECT c.id, c.version, p.last_read_message_id, p.last_read_version FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = who.user_id AND p.status = 'active' AND p.conversation_id > who.after
    ORDER BY p.conversation_id LIMIT $3
) part
"""


async def read(db: Db, user_ids: Sequence[UserId]) -> list[dict[ConversationId, Membership]]:
    """Return the conversations of each user, in the order of `user_ids`. A user version moves when the user joins or
    leaves meanwhile, and then these are read again.
    """
    found: dict[UserId, dict[ConversationId, Membership]] = {user_id: {} for user_id in user_ids}
    after = dict.fromkeys(found, _FIRST)
    while after:
        limit = MAX_READ // len(after)
        counts: Counter[UserId] = Counter()
        for user_id, one, *rest in await db.fetch(READ, list(after), list(after.values()), limit):
            found[user_id][one] = Membership(*rest)
            counts[user_id] += 1
            after[user_id] = one
        after = {user_id: one for user_id, one in after.items() if counts[user_id] == limit}
    return [found[user_id] for user_id in user_ids]
