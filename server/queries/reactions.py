"""Reactions, with a row per user and emoji. The same statement changes the counts in the message."""

from typing import NamedTuple

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_EMOJI_OF_USER
from protocol.reaction import normalized
from protocol.values import Message
from server.db.database import Db

REACT = f"""
WITH reacted AS (
    INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
    SELECT $2, $3, $4, c.id, c.version + 1, m.sender_id
    FROM conversation c, message m WHERE c.id = $1 AND m.id = $2 AND (m.conversation_id = $1) IS TRUE AND (
        SELECT count(*) FROM message_reaction o
        WHERE o.message_id = $2 AND o.user_id = $3 AND (o.conversation_id = $1) IS TRUE AND o.emoji <> $4
    ) < {MAX_EMOJI_OF_USER}
    ON CONFLICT (message_id, user_id, emoji)
        DO UPDATE SET is_removed = false, version = excluded.version, created_at = now()
        WHERE message_reaction.is_removed
    RETURNING version
), bumped AS (
    UPDATE conversation c SET version = r.version FROM reacted r WHERE c.id = $1
)
UPDATE message m SET reactions = m.reactions || jsonb_build_object($4::text, coalesce((m.reactions ->> $4)::int, 0) + 1)
FROM reacted r WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING r.version, (m.reactions ->> $4)::int
"""  # noqa: S608 - a number is put in

UNREACT = """
WITH unreacted AS (
    UPDATE message_reaction r SET is_removed = true, version = c.version + 1
    FROM conversation c
    WHERE c.id = $1 AND (r.conversation_id = $1) IS TRUE AND r.message_id = $2 AND r.user_id = $3 AND r.emoji = $4
        AND NOT r.is_removed
    RETURNING r.version
), bumped AS (
    UPDATE conversation c SET version = r.version FROM unreacted r WHERE c.id = $1
)
UPDATE message m SET reactions = CASE WHEN (m.reactions ->> $4)::int > 1
    THEN m.reactions || jsonb_build_object($4::text, (m.reactions ->> $4)::int - 1)
    ELSE m.reactions - $4 END
FROM unreacted r WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING r.version, coalesce((m.reactions ->> $4)::int, 0)
"""

AS_IT_IS = """
SELECT version FROM message_reaction
WHERE (conversation_id = $1) IS TRUE AND message_id = $2 AND user_id = $3 AND emoji = $4
"""

STORED = """
SELECT r.emoji FROM message_reaction r
WHERE (r.conversation_id = $1) IS TRUE AND r.message_id = $2 AND r.user_id = $3 AND NOT r.is_removed
    AND (r.emoji = $5 OR translate(r.emoji, '\ufe0e\ufe0f', '') = translate($4, '\ufe0e\ufe0f', ''))
ORDER BY r.emoji = $4 DESC, r.emoji = $5 DESC LIMIT 1
"""

IS_THERE = """
SELECT EXISTS (
    SELECT FROM message_reaction r
    WHERE (r.conversation_id = $1) IS TRUE AND r.message_id = $2 AND r.user_id = $3 AND r.emoji = $4
        AND NOT r.is_removed
)
"""


class ReactionChange(NamedTuple):
    """A reaction, the version of its last change, and the number of users with it, or None if nothing changed."""

    emoji: str
    version: int
    total: int | None


async def is_there(db: Db, found: Message, user_id: UserId, emoji: str) -> bool:
    """Whether a user's reaction to a message exists. Requires the conversation's lock."""
    return bool(await db.fetchval(IS_THERE, found.conversation_id, found.id, user_id, emoji))


async def stored(db: Db, found: Message, user_id: UserId, emoji: str) -> str:
    """Return a user's reaction as stored, in the spelling of `emoji`, in the normalized one, or in another one.

    Raises Refused if there is none, and `emoji` is invalid. Older versions stored any text, and imports store any name.
    """
    error = None
    try:
        now = normalized(emoji)
    except ValueError as found_out:
        now, error = emoji, found_out
    there: str | None = await db.fetchval(STORED, found.conversation_id, found.id, user_id, emoji, now)
    if there is None and error is not None:
        raise Refused(ErrorCode.INVALID, str(error), path="emoji") from error
    return there or now


async def react(db: Db, found: Message, user_id: UserId, emoji: str) -> ReactionChange:
    """Add an emoji to a message. Raises Refused if the user has used too many different ones there, because removed
    ones keep their rows. Requires the conversation's lock.
    """
    row = await db.fetchrow(REACT, found.conversation_id, found.id, user_id, emoji)
    if row is not None:
        return ReactionChange(emoji, row[0], row[1])
    version = await db.fetchval(AS_IT_IS, found.conversation_id, found.id, user_id, emoji)
    if version is None:
        sentence = (
            f"You can use at most {MAX_EMOJI_OF_USER} different emoji per message, removed ones included. Reuse one."
        )
        raise Refused(ErrorCode.CONFLICT, sentence, path="emoji")
    return ReactionChange(emoji, version, None)


async def unreact(db: Db, found: Message, user_id: UserId, emoji: str) -> ReactionChange:
    """Remove an emoji from a message. Requires the conversation's lock."""
    row = await db.fetchrow(UNREACT, found.conversation_id, found.id, user_id, emoji)
    if row is not None:
        return ReactionChange(emoji, row[0], row[1])
    version = await db.fetchval(AS_IT_IS, found.conversation_id, found.id, user_id, emoji)
    return ReactionChange(emoji, found.version if version is None else version, None)
