"""What the page behind a message's link says of itself, put beside the message."""

import msgspec

from protocol.values import LinkPreview, Message
from server.db.database import Db
from server.db.rows import Reader
from server.queries import messages
from server.queries.messages import At, FoundMessage

_message_decoder = Reader(Message)


async def lock(db: Db, message: Message) -> FoundMessage | None:
    """Lock the conversation of a message, and return the message; None if it says something else by now."""
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
    """Keep what was found beside a message; return that as it is now. Under the lock."""
    text = await db.fetchval(PUT, message.conversation_id, message.id, msgspec.json.encode(preview).decode())
    return _message_decoder.decode(text)
