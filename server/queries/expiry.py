"""Expired messages."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from protocol.ids import ConversationId, MessageId, UserId
from protocol.values import Message
from server.db.database import Db
from server.db.rows import Reader
from server.queries.edits import Deleted

MAX_DUE = 1_000
"""Max messages that `due` returns."""
PORTION = 16
PORTION_BYTES = 64 * 1024
"""Max messages that expire in one statement, and max bytes of them as stored, because other frames of their
conversations wait for it. A single message may be larger.
"""
EDITS_AT_ONCE = 100
"""Max edits that one statement deletes."""
HELD_MS = 50
"""Max time that `expire` waits for a locked row, in milliseconds."""

_message_decoder = Reader(Message)


class Due(NamedTuple):
    """An expired message, with its bytes as stored, and whether it was edited."""

    sender_id: UserId
    conversation_id: ConversationId
    id: MessageId
    size: int
    has_edits: bool


DUE = """
SELECT m.sender_id, m.conversation_id, m.id, pg_column_size(m.content) + coalesce(
        pg_column_size(m.formatted_content), 0) + coalesce(pg_column_size(m.payload), 0)
        + coalesce(pg_column_size(m.metadata), 0),
    EXISTS (SELECT FROM message_edit e WHERE e.message_id = m.id AND e.conversation_id = m.conversation_id OFFSET 0)
FROM message m
WHERE m.expires_at <= now() AND (m.conversation_id <> ALL ($2)) IS TRUE AND (m.sender_id <> ALL ($3)) IS TRUE
ORDER BY m.expires_at LIMIT $1
"""


async def due(db: Db, besides: Collection[ConversationId], served: Collection[UserId]) -> list[Due]:
    """Return expired messages, at most `MAX_DUE`, those that expired first. Those of the conversations `besides` and of
    the senders `served` are left out. Messages of one sender in one conversation are together.
    """
    found: dict[tuple[UserId, ConversationId], list[Due]] = {}
    for row in await db.fetch(DUE, MAX_DUE, list(besides), list(served)):
        one = Due(*row)
        found.setdefault((one.sender_id, one.conversation_id), []).append(one)
    return [one for group in found.values() for one in group]


EXPIRE = "SELECT held_id, message, root_reply_count, is_from_before FROM expire_messages($1, $2, $3, $4)"


class Expired(NamedTuple):
    """The remains of expired messages, in the order of their versions, and the conversations that were passed over."""

    deleted: list[Deleted]
    held: set[ConversationId]


async def expire(db: Db, portion: Sequence[Due], *, passes_held: bool) -> Expired:
    """Delete the content of expired messages and all copies of it, with the version of each deletion. Messages that
    were deleted before, or whose remains are unreadable, are not returned.

    With `passes_held`, messages of locked conversations stay as they are. Otherwise raises LockNotAvailableError if a
    lock takes longer than `HELD_MS`.
    """
    deleted, held = [], set()
    for held_id, text, *rest in await db.fetch(EXPIRE, *_ids(portion), passes_held, f"{HELD_MS}ms"):
        if held_id is not None:
            held.add(ConversationId(held_id))
        # Decoded immediately, since a job that is cancelled before it publishes would leave that to the comparison.
        elif (message := _message_decoder.read(text)) is not None:
            deleted.append(Deleted(message, *rest))
    return Expired(deleted, held)


async def plan(db: Db) -> None:
    """Make PostgreSQL plan the statements of `expire` for this connection. The first call plans them, which takes many
    times as long as a later call, and other frames of its conversations would wait for that.
    """
    await db.fetch(EXPIRE, [], [], True, f"{HELD_MS}ms")  # noqa: FBT003 - a parameter of SQL


def _ids(portion: Sequence[Due]) -> tuple[list[ConversationId], list[MessageId]]:
    return list({one.conversation_id for one in portion}), [one.id for one in portion]


# Edits are deleted before the conversation's lock. The oldest one stays until then, because it identifies a repeated
# `send`.
FORGET_EDITS = """
WITH gone AS MATERIALIZED (
    SELECT e.id FROM message m JOIN message_edit e
        ON e.message_id = m.id AND (e.conversation_id = m.conversation_id) IS TRUE AND EXISTS (
            SELECT FROM message_edit o
            WHERE o.message_id = e.message_id AND o.version < e.version
                AND (o.conversation_id = e.conversation_id) IS TRUE OFFSET 0
        )
    WHERE m.id = ANY($2) AND (m.conversation_id = ANY($1)) IS TRUE AND (m.expires_at <= now()) IS TRUE
    LIMIT $3
), deleted AS (
    DELETE FROM message_edit e
    WHERE e.id = ANY(ARRAY(SELECT id FROM gone)) AND (e.conversation_id = ANY($1)) IS TRUE RETURNING 1
)
SELECT count(*) FROM deleted
"""


async def forget_edits(db: Db, portion: Sequence[Due]) -> bool:
    """Delete some edits of expired messages. Return whether there may be more."""
    return int(await db.fetchval(FORGET_EDITS, *_ids(portion), EDITS_AT_ONCE)) >= EDITS_AT_ONCE
