"""Link previews, which are stored with their message."""

import msgspec

from protocol.values import LinkPreview, Message
from server.db.database import Db
from server.db.rows import Reader
from server.queries import messages
from server.queries.messages import At, FoundMessage

_message_decoder = Reader(Message)


async def lock(db: Db, message: Message) -> FoundMessage | None:
    """Lock the conversation of a message, and return the message. Return None if its content has changed."""
    found = await messages.lock(db, At(message.conversation_id, message.id), message.sender_id)
    return None if found is None or found.message.content != message.content else found


PUT = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
)
UPDATE message m SET link_preview = $3, version = b.version
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""


async def put(db: Db, message: Message, preview: LinkPreview) -> Message:
    """Store a preview with a message, and return the message. Requires the conversation's lock."""
    text = await db.fetchval(PUT, message.conversation_id, message.id, msgspec.json.encode(preview).decode())
    return _message_decoder.decode(text)
