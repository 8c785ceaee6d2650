"""Changed messages: edited, deleted, and their earlier contents."""

from typing import NamedTuple

from protocol.client import Edit
from protocol.ids import ConversationId, EditId, MessageId, UserId, uuid7
from protocol.values import Message, MessageEdit
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.messages import VISIBLE, MessageRef
from server.queries.sending import Derived

_message_decoder = Reader(Message)
_edit_decoder = Reader(MessageEdit)

EDIT = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
), kept AS (
    INSERT INTO message_edit (id, conversation_id, message_id, content, formatted_content, edited_by, version)
    SELECT $3, $1, m.id, m.content, m.formatted_content, $4, b.version
    FROM message m, bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
)
UPDATE message m SET content = $5, formatted_content = $6, mentions = $7, loud_mentions = $8, hashtags = $9,
    status = 'edited', edited_at = now(), edited_by = $4, link_preview = NULL, version = b.version, updated_at = now()
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""
# Parsing the words of a long message takes longer than everything else, so it precedes the lock.
WORDS = """
SELECT search_words(m.conversation_id, coalesce($3, m.content), m.payload, coalesce($4, m.mentions),
    coalesce($5, m.loud_mentions), coalesce($6, m.hashtags)), m.version
FROM message m WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
"""
# Runs after every change of a message's content or visibility, in the same transaction. The search index then has the
# new content, or no entry for hidden and deleted messages.
FIND_ANEW = """
MERGE INTO message_search s
USING (
    SELECT m.*, NOT m.is_deleted AND NOT m.is_moderated AND NOT m.is_system_message AS has_words
    FROM message m WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
) m ON s.message_id = m.id
WHEN MATCHED AND m.has_words THEN UPDATE SET words = coalesce(
    $3, search_words(m.conversation_id, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags))
WHEN MATCHED THEN DELETE
WHEN NOT MATCHED AND m.has_words THEN INSERT (message_id, conversation_id, created_at, words)
    VALUES (m.id, m.conversation_id, m.created_at, coalesce(
        $3, search_words(m.conversation_id, m.content, m.payload, m.mentions, m.loud_mentions, m.hashtags)))
"""


COUNT = """
SELECT count(*) FROM message_edit e WHERE e.message_id = $2 AND (e.conversation_id = $1) IS TRUE
"""


async def count(db: Db, found: Message) -> int:
    """Return the number of stored edits of a message. Requires the conversation's lock."""
    return int(await db.fetchval(COUNT, found.conversation_id, found.id))


class IndexedWords(NamedTuple):
    """The entry of the search index for a message, and the version of the message that it belongs to."""

    words: str
    version: int


async def words(
    db: Db, ref: MessageRef, content: str | None = None, derived: Derived | None = None
) -> IndexedWords | None:
    """Parse the words of an edit, or of the message as it is, before the lock. Return None if there is no such message.

    The caller has checked that the user may see the message.
    """
    said = (None, None, None) if derived is None else (derived.mentions, derived.loud_mentions, derived.hashtags)
    row = await db.fetchrow(WORDS, ref.conversation_id, ref.message_id, content, *said)
    return None if row is None else IndexedWords(*row)


async def edit(db: Db, found: Message, user_id: UserId, frame: Edit, derived: Derived, *, words: str | None) -> Message:
    """Change the content of a message, store the old one, and return the message. Requires the conversation's lock.

    `words` is the index entry of the new content, if it is known.

    Raises UniqueViolationError if the edit's id is taken.
    """
    edit_id = frame.edit_id or EditId(uuid7())
    text = await db.fetchval(EDIT, found.conversation_id, found.id, edit_id, user_id, frame.content, *derived)
    await find_anew(db, found.conversation_id, found.id, words=words)
    return _message_decoder.decode(text)


async def find_anew(
    db: Db, conversation_id: ConversationId, message_id: MessageId, *, words: str | None = None
) -> None:
    """Update a changed message in the search index. Its words are parsed here if they are not given. Requires the
    conversation's lock.
    """
    await db.execute(FIND_ANEW, conversation_id, message_id, words)


# The result of an edit is the content that the next edit replaced, or the current content.
EDITED = """
SELECT e.version, e.message_id = $2 AND e.edited_by = $3
    AND coalesce(next.content, m.content) = $4
    AND (CASE WHEN next.id IS NULL THEN m.formatted_content ELSE next.formatted_content END IS NOT NULL) = $5
FROM message_edit e
JOIN message m ON m.id = e.message_id AND (m.conversation_id = e.conversation_id) IS TRUE
LEFT JOIN LATERAL (
    SELECT n.id, n.content, n.formatted_content FROM message_edit n
    WHERE n.message_id = e.message_id AND n.conversation_id = e.conversation_id AND n.version > e.version
    ORDER BY n.version LIMIT 1
) next ON true
WHERE e.id = $1 AND e.conversation_id = $6
"""


async def edited(db: Db, frame: Edit, user_id: UserId) -> tuple[int, bool] | None:
    """Return the version of the edit with this id, and whether it is the same edit. Return None if there is none."""
    row = await db.fetchrow(
        EDITED, frame.edit_id, frame.message_id, user_id, frame.content, frame.is_markdown, frame.conversation_id
    )
    return None if row is None else (row[0], row[1])


# A message that the user $3 deletes keeps its content as an edit. `expire_messages` in schema.sql keeps nothing.
# `remains` deletes reactions and votes later, because there may be very many and senders wait for this statement. The
# message has no counts from now on, and statements that read reactions check whether it is deleted.
DELETE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1, message_count = message_count - 1 WHERE id = $1
    RETURNING version, access_version, settings
), kept AS (
    INSERT INTO message_edit (id, conversation_id, message_id, content, formatted_content, edited_by, version)
    SELECT gen_random_uuid(), $1, m.id, m.content, m.formatted_content, $3, b.version
    FROM message m, bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
), root AS (
    UPDATE message m SET reply_count = m.reply_count - 1, version = b.version
    FROM bumped b
    WHERE m.id = (SELECT d.thread_root_id FROM message d WHERE d.id = $2 AND (d.conversation_id = $1) IS TRUE)
        AND (m.conversation_id = $1) IS TRUE
    RETURNING m.reply_count
)
UPDATE message m SET content = '', formatted_content = NULL, mentions = '{}', hashtags = '{}', metadata = NULL,
    reactions = '{}', status = 'deleted', is_deleted = true, deleted_at = now(), deleted_by = $3,
    version = b.version, updated_at = now(), payload = NULL, loud_mentions = '{}', link_preview = NULL,
    is_pinned = false, pinned_at = NULL, pinned_by = NULL, poll_counts = NULL, poll_voters = 0, poll_closed_at = NULL,
    has_remains = EXISTS (
        SELECT FROM message_reaction r WHERE r.message_id = $2 AND (r.conversation_id = $1) IS TRUE
    ) OR EXISTS (SELECT FROM poll_vote v WHERE v.message_id = $2 AND (v.conversation_id = $1) IS TRUE)
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m), (SELECT reply_count FROM root),
    coalesce(b.settings ->> 'history' = 'from_joining', false) AND m.sent_version <= b.access_version
"""


class Deleted(NamedTuple):
    """The remains of a deleted message, and the root's reply count if it was a reply. `is_from_before` is that of
    `FoundMessage`.
    """

    message: Message
    root_reply_count: int | None
    is_from_before: bool


async def delete(db: Db, found: Message, user_id: UserId) -> Deleted:
    """Delete the content of a message, and return its remains. Requires the conversation's lock.

    The content stays readable for readers of the database until the message expires.
    """
    row = await db.fetchrow(DELETE, found.conversation_id, found.id, user_id)
    assert row is not None  # noqa: S101 - the caller has found it under the lock
    await find_anew(db, found.conversation_id, found.id)
    text, root_reply_count, is_from_before = row
    return Deleted(_message_decoder.decode(text), root_reply_count, is_from_before)


# With access there is a row, even without edits.
EDITS = f"""
SELECT CASE WHEN e.id IS NOT NULL THEN row_to_json(e) END, e.version
FROM (
    SELECT m.id, m.conversation_id {VISIBLE} AND NOT m.is_deleted AND shows_edits(c, p, m.sender_id)
        AND (NOT m.is_moderated OR m.sender_id = $2 OR can(p.role, 'moderator', p.can_delete_messages))
) seen
LEFT JOIN LATERAL (
    SELECT e.id, e.content, e.formatted_content, e.edited_by, e.edited_at, e.version
    FROM message_edit e
    WHERE e.message_id = seen.id AND e.conversation_id = seen.conversation_id
        AND ($5::bigint IS NULL OR e.version < $5)
    ORDER BY e.version DESC LIMIT $4
) e ON true
ORDER BY e.version DESC
"""  # noqa: S608 - VISIBLE is a constant


async def edits(
    db: Db, ref: MessageRef, user_id: UserId, before: int | None, *, limit: int
) -> Undecoded[Page[MessageEdit]] | None:
    """Return up to `limit` earlier contents of a message before a version, newest first. Return None without access, or
    if the message is deleted or hidden from the user.
    """
    rows = await db.fetch(EDITS, ref.message_id, user_id, ref.conversation_id, limit + 1, before)
    return _edit_decoder.page([row for row in rows if row[0] is not None], limit) if rows else None
