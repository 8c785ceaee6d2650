"""Messages whose time is over."""

from collections.abc import Sequence

from protocol.ids import ConversationId, MessageId
from protocol.values import Message
from server.database import Db
from server.rows import Reader

_message_decoder = Reader(Message)

AT_ONCE = 200

DUE = "SELECT m.conversation_id, m.id FROM message m WHERE m.expires_at <= now() ORDER BY m.expires_at LIMIT $1"


async def due(db: Db) -> dict[ConversationId, list[MessageId]]:
    """Return some of the messages whose time is over, those first that have been for longest."""
    found: dict[ConversationId, list[MessageId]] = {}
    for row in await db.fetch(DUE, AT_ONCE):
        found.setdefault(row[0], []).append(row[1])
    return found


STILL_DUE = """
SELECT message_json(m) FROM message m
WHERE m.id = ANY($2) AND (m.conversation_id = $1) IS TRUE AND m.expires_at <= now() ORDER BY m.sent_version
"""


async def still_due(db: Db, conversation_id: ConversationId, message_ids: Sequence[MessageId]) -> list[Message]:
    """Return those of the messages that no other worker has dealt with. Under the lock."""
    rows = await db.fetch(STILL_DUE, conversation_id, list(message_ids))
    return _message_decoder.each(row[0] for row in rows)
