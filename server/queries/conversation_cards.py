"""Conversations as administrators see them, without an access check."""

from datetime import datetime

import msgspec

from protocol.ids import ConversationId, UserId
from protocol.values import Conversation
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded


class ConversationCard(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as administrators see it, without its content."""

    conversation: Conversation
    owner: UserId | None
    message_count: int
    version: int
    last_activity_at: datetime


_card_decoder = Reader(ConversationCard)

CARD = """
SELECT json_build_object('conversation', conversation_json(c), 'message_count', c.message_count, 'version', c.version,
    'last_activity_at', c.last_activity_at, 'owner', (
        SELECT p.user_id FROM conversation_participant p
        WHERE p.conversation_id = c.id AND p.status = 'active' AND p.role = 'owner' LIMIT 1
    ))
FROM conversation c WHERE c.id = $1
"""


async def card(db: Db, conversation_id: ConversationId) -> ConversationCard | None:
    """Return a conversation as administrators see it, deleted or not."""
    text = await db.fetchval(CARD, conversation_id)
    return None if text is None else _card_decoder.decode(text)


class ConversationEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation in a list."""

    id: ConversationId
    type: str
    title: str | None
    owner: UserId | None
    participants: int
    messages: int
    last_activity_at: datetime
    is_deleted: bool


_entry_decoder = Reader(ConversationEntry)

LIST = """
SELECT json_build_object('id', c.id, 'type', c.type, 'title', c.title, 'participants', c.participant_count,
    'messages', c.message_count, 'last_activity_at', c.last_activity_at, 'is_deleted', c.is_deleted, 'owner', (
        SELECT p.user_id FROM conversation_participant p
        WHERE p.conversation_id = c.id AND p.status = 'active' AND p.role = 'owner' LIMIT 1
    )), c.id
FROM conversation c
WHERE c.id < $1 AND ($2 = '' OR strpos(lower(c.title), lower($2)) > 0)
    AND ($3::uuid IS NULL OR EXISTS (
        SELECT FROM conversation_participant p WHERE p.conversation_id = c.id AND p.user_id = $3 AND p.status = 'active'
    ))
ORDER BY c.id DESC LIMIT $4 + 1
"""


async def listed(
    db: Db, part: str, before: ConversationId, *, user_id: UserId | None, limit: int
) -> Undecoded[Page[ConversationEntry]]:
    """Return conversations with `part` in the title that are older than the conversation `before`, newest first. With
    `user_id`, only those in which the user participates. There is no access check.
    """
    return _entry_decoder.page(await db.fetch(LIST, before, part, user_id, limit), limit)


EVERYTHING = """
SELECT json_build_object('kind', 'message', 'message', message_json(m),
    'withheld', CASE WHEN m.is_moderated THEN m.content END)::text, m.sent_version
FROM message m WHERE m.conversation_id = $1 AND m.sent_version > $2 ORDER BY m.sent_version LIMIT $3
"""


async def everything(db: Db, conversation_id: ConversationId, after: int, *, limit: int) -> list[tuple[str, int]]:
    """Return up to `limit` messages after a version, each as JSON with its version. There is no access check."""
    return [(row[0], row[1]) for row in await db.fetch(EVERYTHING, conversation_id, after, limit)]
