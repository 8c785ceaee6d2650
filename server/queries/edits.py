"""Messages changed: edited, deleted, and what they said before."""

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
# Finding the words of a long message takes longer than all the rest, so it comes before the lock.
WORDS = """
SELECT search_words(m.conversation_id, coalesce($3, m.content), m.payload, coalesce($4, m.mentions),
    coalesce($5, m.loud_mentions), coalesce($6, m.hashtags)), m.version
FROM message m WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
"""
# After whatever changed a message's words, or hid them, in the same transaction: from then on it is found by what it
# says now; without words, not at all.
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
    """Return how many versions of a message are kept. Under the lock."""
    return int(await db.fetchval(COUNT, found.conversation_id, found.id))


class IndexedWords(NamedTuple):
    """What a message is found by, and the version of the message that they were found in."""

    words: str
    version: int


async def words(
    db: Db, place: MessageRef, content: str | None = None, made: Derived | None = None
) -> IndexedWords | None:
    """Find the words of an edit, or of a message as it is, before the lock; None if there is no such message.

    The caller has checked that the user may see it.
    """
    said = (None, None, None) if made is None else (made.mentions, made.loud_mentions, made.hashtags)
    row = await db.fetchrow(WORDS, place.conversation_id, place.message_id, content, *said)
    return None if row is None else IndexedWords(*row)


async def edit(db: Db, found: Message, user_id: UserId, frame: Edit, made: Derived, *, words: str | None) -> Message:
    """Change what a message says, keep what it said, and return it as it is now. Under the lock.

    `words` are those of the edit, if they are known.

    Raises UniqueViolationError if the edit's id is taken.
    """
    edit_id = frame.edit_id or EditId(uuid7())
    text = await db.fetchval(EDIT, found.conversation_id, found.id, edit_id, user_id, frame.content, *made)
    await find_anew(db, found.conversation_id, found.id, words=words)
    return _message_decoder.decode(text)


async def find_anew(
    db: Db, conversation_id: ConversationId, message_id: MessageId, *, words: str | None = None
) -> None:
    """Have a message that was changed be found by what it says now, whose words are found here if they are not given.
    Under the lock.
    """
    await db.execute(FIND_ANEW, conversation_id, message_id, words)


# What an edit made of the message is what the next edit kept, or what the message says now.
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
    """Return the version of the edit with this id, and whether it is the same edit; None if there is none."""
    row = await db.fetchrow(
        EDITED, frame.edit_id, frame.message_id, user_id, frame.content, frame.is_markdown, frame.conversation_id
    )
    return None if row is None else (row[0], row[1])


# By a user ($3), what a message said is kept; without one, its time is over, and nothing is. Reactions and votes
# are left to `remains`: a crowd adds any number of them, and whoever sends waits for this statement. The message counts
# none from now on, and what reads them asks whether the message is deleted.
DELETE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1, message_count = message_count - 1 WHERE id = $1
    RETURNING version, access_version, settings
), kept AS (
    INSERT INTO message_edit (id, conversation_id, message_id, content, formatted_content, edited_by, version)
    SELECT gen_random_uuid(), $1, m.id, m.content, m.formatted_content, $3, b.version
    FROM message m, bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE AND $3::uuid IS NOT NULL
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
    expires_at = CASE WHEN $3::uuid IS NOT NULL THEN m.expires_at END, has_remains = EXISTS (
        SELECT FROM message_reaction r WHERE r.message_id = $2 AND (r.conversation_id = $1) IS TRUE
    ) OR EXISTS (SELECT FROM poll_vote v WHERE v.message_id = $2 AND (v.conversation_id = $1) IS TRUE)
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m), (SELECT reply_count FROM root),
    coalesce(b.settings ->> 'history' = 'from_joining', false) AND m.sent_version <= b.access_version
"""


class Deleted(NamedTuple):
    """What is left of a deleted message; its root's count if it was a reply; `is_from_before` as in `Found`."""

    message: Message
    root_reply_count: int | None
    is_from_before: bool


async def delete(db: Db, found: Message, user_id: UserId) -> Deleted:
    """Delete a message's words; return what is left. Under the lock.

    What it said is kept for those who read the database, until the time is over that the message had.
    """
    text, root_reply_count, is_from_before = await _delete(db, found.conversation_id, found.id, user_id)
    return Deleted(_message_decoder.decode(text), root_reply_count, is_from_before)


# All copies of a message's words but that in `message` itself, and in forwards, which are messages of their own. The
# row of a scheduled message stays, since a repeated frame is known by it. A message that is deleted already loses its
# time here; any other, by `DELETE`.
FORGET = """
WITH edits AS (
    DELETE FROM message_edit e WHERE e.message_id = $2 AND e.conversation_id = $1
), scheduled AS (
    UPDATE scheduled_message s SET words = '{"content": ""}' WHERE s.id = $2 AND s.conversation_id = $1
)
UPDATE message m SET expires_at = NULL WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE AND m.is_deleted
RETURNING true
"""


async def expire(db: Db, conversation_id: ConversationId, message_id: MessageId) -> Deleted | None:
    """Take the words away of a message whose time is over, and keep none; return as `delete`. Under the lock.

    Return None if it was deleted before, or if what is left cannot be read: its words are gone all the same.
    """
    if await db.fetchval(FORGET, conversation_id, message_id):
        return None
    text, root_reply_count, is_from_before = await _delete(db, conversation_id, message_id, None)
    left = _message_decoder.read(text)
    return None if left is None else Deleted(left, root_reply_count, is_from_before)


async def _delete(
    db: Db, conversation_id: ConversationId, message_id: MessageId, user_id: UserId | None
) -> tuple[str, int | None, bool]:
    row = await db.fetchrow(DELETE, conversation_id, message_id, user_id)
    assert row is not None  # noqa: S101 - the caller found it under the lock
    await find_anew(db, conversation_id, message_id)
    return row[0], row[1], row[2]


# Whoever may see them gets a row, whether or not there are any.
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
    db: Db, place: MessageRef, user_id: UserId, before: int | None, *, limit: int
) -> Undecoded[Page[MessageEdit]] | None:
    """Return up to `limit` of what a message said before a version, newest first; None without access, when it is
    deleted or hidden from them.
    """
    rows = await db.fetch(EDITS, place.message_id, user_id, place.conversation_id, limit + 1, before)
    return _edit_decoder.page([row for row in rows if row[0] is not None], limit) if rows else None
