"""Invitations of users to conversations. All changes require the conversation's lock, except `end`."""

from collections.abc import Sequence

from protocol.ids import ConversationId, UserId
from protocol.server import OutsidersChanged
from protocol.values import Invitation, Role
from server.db.database import Db
from server.db.rows import Reader
from server.queries.participants import OUTSIDER, ParticipantChange, decoded

_invitations_decoder = Reader(Invitation)

# An invited user has left before, if ever, so `invite` knows the event without participant_event().
INVITE = """
WITH asked AS (
    SELECT a.user_id, row_number() OVER (ORDER BY a.user_id) AS place
    FROM (SELECT DISTINCT user_id FROM unnest($2::uuid[]) AS named (user_id)) a
    WHERE NOT EXISTS (
        SELECT FROM conversation_participant p
        WHERE p.conversation_id = $1 AND p.user_id = a.user_id
            AND (p.status = 'active' OR (p.status = 'invited' AND invited_as(p) IS NOT NULL)) OFFSET 0
    )
), bumped AS (
    UPDATE conversation c SET version = c.version + n.asked
    FROM (SELECT count(*) AS asked FROM asked) n
    WHERE c.id = $1 AND n.asked > 0
    RETURNING c.version - n.asked AS base, c.participant_count
)
INSERT INTO conversation_participant AS p (conversation_id, user_id, role, status, invited_by, version)
SELECT $1, a.user_id, $3, 'invited', $4, b.base + a.place FROM asked a, bumped b
ON CONFLICT (conversation_id, user_id) DO UPDATE SET
    role = excluded.role, status = 'invited', invited_by = excluded.invited_by, version = excluded.version,
    joined_at = now(), left_version = gone_version(p)
RETURNING participant_json(p), (SELECT participant_count FROM bumped)
"""


async def invite(
    db: Db, conversation_id: ConversationId, user_ids: Sequence[UserId], role: Role, invited_by: UserId
) -> list[ParticipantChange]:
    """Invite users who are not active and have no invitation of a user who may still add users. Return them in the
    order of their versions.
    """
    changes = []
    for text, count in await db.fetch(INVITE, conversation_id, list(user_ids), role, invited_by):
        asked = decoded(text)
        event = OutsidersChanged(conversation_id=conversation_id, version=asked.version)
        changes.append(ParticipantChange(asked, count, event))
    return sorted(changes, key=lambda change: change.participant.version)


LIST = """
SELECT coalesce(json_agg(invitation_json(p, c) ORDER BY p.user_version DESC), '[]') FROM (
    SELECT p.* FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND c.is_active AND NOT c.is_deleted
    WHERE p.user_id = $1 AND p.status = 'invited' ORDER BY p.user_version DESC LIMIT 100
) p JOIN conversation c ON c.id = p.conversation_id
"""


async def listed(db: Db, user_id: UserId) -> list[Invitation]:
    """Return up to 100 invitations of a user, newest first."""
    return _invitations_decoder.every(await db.fetchval(LIST, user_id))


# Very many users may be invited. So `remains` calls this after the conversation has ended, with the users' locks only.
END = f"""
WITH free AS MATERIALIZED (
    SELECT o.id FROM conversation_participant p JOIN "user" o ON o.id = p.user_id
    WHERE {OUTSIDER} = 'invited' AND p.conversation_id = $1
    LIMIT $2 FOR NO KEY UPDATE OF o SKIP LOCKED
), touched AS (
    UPDATE "user" u SET version = u.version + 1, own_moves = u.own_moves + 1
    FROM free WHERE u.id = free.id RETURNING u.id, u.version
)
UPDATE conversation_participant p SET status = 'removed', left_version = gone_version(p), user_version = t.version
FROM touched t WHERE p.user_id = t.id AND p.conversation_id = $1 AND (p.status = 'invited') IS TRUE
RETURNING p.user_id
"""  # noqa: S608 - OUTSIDER is a constant


async def end(db: Db, conversation_id: ConversationId, *, limit: int) -> list[UserId]:
    """End up to `limit` invitations to an ended conversation. Return their users. Locked users are skipped."""
    return [UserId(row[0]) for row in await db.fetch(END, conversation_id, limit)]
