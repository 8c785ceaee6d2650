"""Expired messages."""

from collections.abc import Collection, Sequence

from protocol.ids import ConversationId, MessageId, UserId
from server.db.database import Db

MAX_DUE = 200
"""Max messages that `due` returns."""
PORTION = 8
"""Max messages that expire in one transaction, because other frames of the conversation wait for it."""
EDITS_AT_ONCE = 12
"""Max edits of a message that one statement deletes."""

DUE = """
SELECT m.sender_id, m.conversation_id, m.id FROM message m
WHERE m.expires_at <= now() AND (m.conversation_id <> ALL ($2)) IS TRUE AND (m.sender_id <> ALL ($3)) IS TRUE
ORDER BY m.expires_at LIMIT $1
"""


async def due(
    db: Db, besides: Collection[ConversationId], served: Collection[UserId]
) -> dict[tuple[UserId, ConversationId], list[MessageId]]:
    """Return expired messages by sender and conversation, at most `MAX_DUE`, those that expired first. Those of the
    conversations `besides` and of the senders `served` are left out.
    """
    found: dict[tuple[UserId, ConversationId], list[MessageId]] = {}
    for sender_id, conversation_id, message_id in await db.fetch(DUE, MAX_DUE, list(besides), list(served)):
        found.setdefault((sender_id, conversation_id), []).append(message_id)
    return found


STILL_DUE = """
SELECT m.id FROM message m
WHERE m.id = ANY($2) AND (m.conversation_id = $1) IS TRUE AND m.expires_at <= now() ORDER BY m.sent_version
"""


async def still_due(db: Db, conversation_id: ConversationId, message_ids: Sequence[MessageId]) -> list[MessageId]:
    """Return those of the messages that no other worker has deleted. Requires the conversation's lock."""
    return [MessageId(row[0]) for row in await db.fetch(STILL_DUE, conversation_id, list(message_ids))]


# Edits are deleted before the conversation's lock. The oldest one stays until then, because it identifies a repeated
# `send`.
FORGET_EDITS = """
WITH gone AS MATERIALIZED (
    SELECT kept.id FROM message m CROSS JOIN LATERAL (
        SELECT e.id FROM message_edit e
        WHERE e.message_id = m.id AND (e.conversation_id = $1) IS TRUE AND EXISTS (
            SELECT FROM message_edit o WHERE o.message_id = m.id AND o.version < e.version OFFSET 0
        )
        ORDER BY e.version DESC LIMIT $3
    ) kept
    WHERE m.id = ANY($2) AND (m.conversation_id = $1) IS TRUE AND m.expires_at <= now()
), deleted AS (
    DELETE FROM message_edit e WHERE e.id = ANY(ARRAY(SELECT id FROM gone)) RETURNING 1
)
SELECT count(*) FROM deleted
"""


async def forget_edits(db: Db, conversation_id: ConversationId, message_ids: Sequence[MessageId]) -> bool:
    """Delete some edits of expired messages. Return whether there may be more."""
    deleted = await db.fetchval(FORGET_EDITS, conversation_id, list(message_ids), EDITS_AT_ONCE)
    return int(deleted) >= EDITS_AT_ONCE
