"""Participants: who is in a conversation, as what, and how that changes. All changes are made under the lock."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from protocol.ids import ConversationId, UserId
from protocol.server import ParticipantEntry
from protocol.values import Participant, ParticipantStatus, Role
from server.database import Db
from server.queries.users import FACE

_participant_decoder = msgspec.json.Decoder(Participant)
_entry_decoder = msgspec.json.Decoder(ParticipantEntry)


class Change(NamedTuple):
    """A participant as they are now, and how many there are."""

    participant: Participant
    participant_count: int


GET = """
SELECT participant_json(p) FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
WHERE p.conversation_id = $1 AND p.user_id = $2
"""


async def get(db: Db, conversation_id: ConversationId, user_id: UserId) -> Participant | None:
    """Return a user's part in a conversation, whatever its status."""
    text = await db.fetchval(GET, conversation_id, user_id)
    return None if text is None else _participant_decoder.decode(text)


PAGE = f"""
SELECT json_build_object(
    'participant', participant_json(p), 'last_read_message_id', p.last_read_message_id, 'user', {FACE}
)
FROM conversation_participant me
JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
JOIN conversation_participant p ON p.conversation_id = me.conversation_id AND p.status = 'active'
JOIN "user" u ON u.id = p.user_id
WHERE me.conversation_id = $1 AND me.user_id = $2 AND me.status = 'active' AND ($3::uuid IS NULL OR p.user_id > $3)
ORDER BY p.user_id
LIMIT $4
"""  # noqa: S608 - FACE is a constant


async def page(
    db: Db, conversation_id: ConversationId, user_id: UserId, after: UserId | None, *, limit: int
) -> list[ParticipantEntry]:
    """Return up to `limit` participants in the order of their ids; none without access."""
    rows = await db.fetch(PAGE, conversation_id, user_id, after, limit)
    return [_entry_decoder.decode(row[0]) for row in rows]


# Whoever enters has nothing unread: what was said before is history to them.
ADD = """
WITH entering AS (
    SELECT a.user_id, row_number() OVER (ORDER BY a.user_id) AS place
    FROM (SELECT DISTINCT user_id FROM unnest($2::uuid[]) AS named (user_id)) a
    WHERE NOT EXISTS (
        SELECT FROM conversation_participant p
        WHERE p.conversation_id = $1 AND p.user_id = a.user_id AND p.status = 'active'
    )
), bumped AS (
    UPDATE conversation c SET version = c.version + n.entering, access_version = c.version + n.entering,
        participant_count = c.participant_count + n.entering, last_activity_at = now()
    FROM (SELECT count(*) AS entering FROM entering) n
    WHERE c.id = $1 AND n.entering > 0
    RETURNING c.version - n.entering AS base, c.participant_count
)
INSERT INTO conversation_participant AS p (conversation_id, user_id, role, invited_by, version, last_read_version)
SELECT $1, e.user_id, $3, $4, b.base + e.place, b.base FROM entering e, bumped b
ON CONFLICT (conversation_id, user_id) DO UPDATE SET
    role = excluded.role, status = 'active', joined_at = now(), left_at = NULL, invited_by = excluded.invited_by,
    version = excluded.version, last_read_version = greatest(p.last_read_version, excluded.last_read_version),
    can_add_members = false, can_remove_members = false, can_edit_conversation = false,
    can_delete_messages = false, can_pin_messages = false
RETURNING participant_json(p), (SELECT participant_count FROM bumped)
"""


async def add(
    db: Db, conversation_id: ConversationId, user_ids: Sequence[UserId], role: Role, invited_by: UserId | None
) -> list[Change]:
    """Let users in who are not; return those, in the order of their versions."""
    rows = await db.fetch(ADD, conversation_id, list(user_ids), role, invited_by)
    changes = [Change(_participant_decoder.decode(text), count) for text, count in rows]
    return sorted(changes, key=lambda change: change.participant.version)


CHANGE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1, access_version = version + 1,
        participant_count = participant_count - CASE WHEN $4 = 'active' THEN 0 ELSE 1 END
    WHERE id = $1 RETURNING version, participant_count
)
UPDATE conversation_participant p SET role = $3, status = $4, version = b.version,
    left_at = CASE WHEN $4 = 'active' THEN NULL ELSE now() END
FROM bumped b WHERE p.conversation_id = $1 AND p.user_id = $2
RETURNING participant_json(p), b.participant_count
"""


async def change(db: Db, now: Participant, *, role: Role | None = None, status: ParticipantStatus = "active") -> Change:
    """Give an active participant another role, or another status, which ends their part."""
    row = await db.fetchrow(CHANGE, now.conversation_id, now.user_id, role or now.role, status)
    assert row is not None  # noqa: S101 - the caller read it under the lock
    return Change(_participant_decoder.decode(row[0]), row[1])


HEIR = """
SELECT participant_json(p) FROM conversation_participant p
WHERE p.conversation_id = $1 AND p.user_id <> $2 AND p.status = 'active'
ORDER BY role_rank(p.role) DESC, p.joined_at, p.user_id
LIMIT 1
"""


async def heir(db: Db, leaving: Participant) -> Participant | None:
    """Return who follows an owner: the highest in rank, then the longest there."""
    text = await db.fetchval(HEIR, leaving.conversation_id, leaving.user_id)
    return None if text is None else _participant_decoder.decode(text)


BANNED = """
SELECT count(*) FROM conversation_participant
WHERE conversation_id = $1 AND user_id = ANY($2) AND status = 'banned'
"""


async def any_banned(db: Db, conversation_id: ConversationId, user_ids: Sequence[UserId]) -> bool:
    """Whether one of the users is banned from the conversation."""
    return bool(await db.fetchval(BANNED, conversation_id, list(user_ids)))


IS_ACTIVE = """
SELECT EXISTS (
    SELECT FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.status = 'active'
)
"""


async def is_active(db: Db, conversation_id: ConversationId, user_id: UserId) -> bool:
    """Whether a user takes part in a conversation."""
    return bool(await db.fetchval(IS_ACTIVE, conversation_id, user_id))
