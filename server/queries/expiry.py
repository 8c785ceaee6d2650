"""Messages whose time is over."""

from collections.abc import Collection, Sequence

from protocol.ids import ConversationId, MessageId
from server.database import Db

AT_ONCE = 200

DUE = """
SELECT m.conversation_id, m.id FROM message m
WHERE m.expires_at <= now() AND (m.conversation_id <> ALL ($2)) IS TRUE ORDER BY m.expires_at LIMIT $1
"""


async def due(db: Db, besides: Collection[ConversationId]) -> dict[ConversationId, list[MessageId]]:
    """Return the messages whose time has been over for longest, at most `AT_ONCE`, but for those of `besides`."""
    found: dict[ConversationId, list[MessageId]] = {}
    for row in await db.fetch(DUE, AT_ONCE, list(besides)):
        found.setdefault(row[0], []).append(row[1])
    return found


STILL_DUE = """
SELECT m.id FROM message m
WHERE m.id = ANY($2) AND (m.conversation_id = $1) IS TRUE AND m.expires_at <= now() ORDER BY m.sent_version
"""


async def still_due(db: Db, conversation_id: ConversationId, message_ids: Sequence[MessageId]) -> list[MessageId]:
    """Return those of the messages that no other worker has dealt with. Under the lock."""
    return [MessageId(row[0]) for row in await db.fetch(STILL_DUE, conversation_id, list(message_ids))]
