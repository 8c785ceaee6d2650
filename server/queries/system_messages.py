"""System messages, which say what a user did to a conversation."""

from typing import NamedTuple

import msgspec

from protocol.ids import ConversationId, UserId
from protocol.json_object import Json
from protocol.values import Message, SystemMessageType
from server.db.database import Db
from server.db.rows import Reader

_message_decoder = Reader(Message)

STORE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1, message_count = message_count + 1,
        last_message_at = now(), last_activity_at = now()
    WHERE id = $1 RETURNING version
)
INSERT INTO message AS m (conversation_id, sender_id, content, content_type, metadata, is_system_message,
    system_message_type, sent_version, version)
SELECT $1, $2, $3, 'system', $4, true, $5, b.version, b.version FROM bumped b
RETURNING message_json(m)
"""


class SystemMessage(NamedTuple):
    """A system message: its type and metadata for programs, and an English predicate whose subject is the sender. It
    contains no names, because users may change or erase them.
    """

    kind: SystemMessageType
    content: str
    metadata: Json = {}  # noqa: RUF012 - never modified


async def store(db: Db, conversation_id: ConversationId, user_id: UserId, message: SystemMessage) -> Message:
    """Store a system message of a user, and return it. Requires the conversation's lock."""
    metadata = msgspec.json.encode(message.metadata).decode()
    return _message_decoder.decode(
        await db.fetchval(STORE, conversation_id, user_id, message.content, metadata, message.kind)
    )
