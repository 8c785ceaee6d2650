"""Resolves the users that a message mentions."""

from typing import NamedTuple

from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_MENTIONS, MAX_NAMED_PARTICIPANTS
from server.db.database import Db


class Meant(NamedTuple):
    """The mentioned users, and whether the sender may mention several users by a word such as `everyone`."""

    user_ids: list[UserId]
    may_be_loud: bool


# A mention is ignored if the user is no participant, inactive or blocked by the sender, or if two users have the name.
# A user who blocks the sender is mentioned as others are, because a failed mention would reveal the block. Such a user
# gets no notification. Spaces in a name are written as dots or underscores, or left out.
RESOLVE = f"""
SELECT c.type <> 'direct' AND can(me.role, 'moderator', false), ARRAY(
    SELECT found.id FROM (
        SELECT p.user_id AS id FROM conversation_participant p
        WHERE p.conversation_id = c.id AND p.user_id = ANY($3) AND p.status = 'active'
        UNION
        SELECT min(named.id::text)::uuid FROM (
            SELECT DISTINCT u.id, spelled.name
            FROM (SELECT array_agg(lower(n.name)) AS names FROM unnest($4::text[]) AS n (name) OFFSET 0) wanted
            JOIN conversation_participant p ON p.conversation_id = c.id AND p.status = 'active'
            JOIN "user" u ON u.id = p.user_id
            CROSS JOIN LATERAL (
                SELECT lower(u.name) AS name UNION SELECT lower(u.display_name) OFFSET 0
            ) called
            CROSS JOIN LATERAL (
                SELECT called.name UNION ALL
                SELECT replace(called.name, ' ', put.instead) FROM unnest('{{.,_,""}}'::text[]) AS put (instead)
                WHERE strpos(called.name, ' ') > 0
                OFFSET 0
            ) spelled
            WHERE cardinality($4::text[]) > 0 AND c.participant_count <= {MAX_NAMED_PARTICIPANTS}
                AND spelled.name = ANY (wanted.names)
        ) named GROUP BY named.name HAVING count(*) = 1
    ) found
    WHERE EXISTS (SELECT FROM "user" u WHERE u.id = found.id AND u.is_active AND NOT u.is_deleted OFFSET 0)
        AND NOT EXISTS (
            SELECT FROM user_relationship r
            WHERE r.type = 'block' AND r.status = 'active' AND r.from_user_id = $2 AND r.to_user_id = found.id OFFSET 0
        )
    ORDER BY found.id LIMIT {MAX_MENTIONS}
)
FROM conversation_participant me JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
WHERE me.conversation_id = $1 AND me.user_id = $2 AND me.status = 'active'
"""  # noqa: S608 - only numbers are put in


async def resolve(
    db: Db, conversation_id: ConversationId, sender_id: UserId, ids: list[UserId], names: list[str]
) -> Meant:
    """Return the mentioned users in a conversation. Return none if the sender does not participate."""
    row = await db.fetchrow(RESOLVE, conversation_id, sender_id, ids, names)
    return Meant([], may_be_loud=False) if row is None else Meant(row[1], row[0])
