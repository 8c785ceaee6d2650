"""Invite codes of conversations: replaced, deleted and used."""

from datetime import timedelta

from protocol.ids import ConversationId
from protocol.values import Conversation
from server.db.database import Db
from server.db.rows import Reader

_conversation_decoder = Reader(Conversation)

REPLACE = """
UPDATE conversation c SET invite_code = $2, invite_expires_at = now() + $3, invite_uses_left = $4, updated_at = now(),
    version = c.version + 1, settings_version = c.version + 1
WHERE c.id = $1
RETURNING conversation_json(c)
"""


async def replace(
    db: Db, conversation_id: ConversationId, code: str | None, lasts: timedelta | None, uses: int | None
) -> Conversation:
    """Replace or delete the invite code, and return the conversation. Requires the conversation's lock."""
    return _conversation_decoder.decode(await db.fetchval(REPLACE, conversation_id, code, lasts, uses))


FIND = "SELECT id FROM conversation WHERE invite_code = $1"


async def find(db: Db, code: str) -> ConversationId | None:
    """Return the conversation that has an invite code. Whether the code may be used is checked by the join."""
    found: ConversationId | None = await db.fetchval(FIND, code)
    return found
