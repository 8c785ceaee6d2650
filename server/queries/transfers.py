"""Exports and imports rows as JSON, for whole installations and for archives of other chats."""

from collections.abc import AsyncIterator
from typing import NamedTuple
from uuid import UUID

from protocol.ids import ConversationId, MessageId, UserId
from server.db.database import Db

TABLES = {
    "user": 'SELECT row_to_json(t)::text FROM "user" t ORDER BY t.id',
    "account": "SELECT row_to_json(t)::text FROM account t ORDER BY t.id",
    "session": "SELECT row_to_json(t)::text FROM session t ORDER BY t.id",
    "verification": "SELECT row_to_json(t)::text FROM verification t ORDER BY t.id",
    "server_key": "SELECT row_to_json(t)::text FROM server_key t ORDER BY t.name",
    "conversation": "SELECT row_to_json(t)::text FROM conversation t ORDER BY t.id",
    "conversation_participant": "SELECT row_to_json(t)::text FROM conversation_participant t ORDER BY t.id",
    "message": "SELECT row_to_json(t)::text FROM message t ORDER BY t.conversation_id, t.sent_version",
    "message_reaction": "SELECT row_to_json(t)::text FROM message_reaction t ORDER BY t.message_id, t.user_id, t.emoji",
    "message_edit": "SELECT row_to_json(t)::text FROM message_edit t ORDER BY t.id",
    "poll_vote": "SELECT row_to_json(t)::text FROM poll_vote t ORDER BY t.message_id, t.user_id",
    "thread_follow": "SELECT row_to_json(t)::text FROM thread_follow t ORDER BY t.root_id, t.user_id",
    "message_star": "SELECT row_to_json(t)::text FROM message_star t ORDER BY t.user_id, t.message_id",
    "draft": "SELECT row_to_json(t)::text FROM draft t ORDER BY t.user_id, t.conversation_id",
    "scheduled_message": "SELECT row_to_json(t)::text FROM scheduled_message t ORDER BY t.id",
    "push_endpoint": "SELECT row_to_json(t)::text FROM push_endpoint t ORDER BY t.id",
    "attachment": "SELECT row_to_json(t)::text FROM attachment t ORDER BY t.id",
    "user_relationship": "SELECT row_to_json(t)::text FROM user_relationship t ORDER BY t.id",
    "approach": "SELECT row_to_json(t)::text FROM approach t ORDER BY t.from_user_id, t.to_user_id, t.kind",
    "report": "SELECT row_to_json(t)::text FROM report t ORDER BY t.id",
    "audit_entry": "SELECT row_to_json(t)::text FROM audit_entry t ORDER BY t.chain, t.number",
}
"""All tables with data that is not derived. Each table follows those that it refers to."""

SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
NO_TIMEOUT = "SET LOCAL statement_timeout = 0"
PREFETCHED_ROWS = 500
"""Rows that are fetched together."""


async def rows(db: Db, table: str) -> AsyncIterator[str]:
    """Yield all rows of a table as JSON, in the order of their keys. Requires a transaction."""
    STATEMENT = TABLES[table]  # noqa: N806 - a constant, as all SQL
    async for row in db.cursor(STATEMENT, prefetch=PREFETCHED_ROWS):
        yield row[0]


async def begin(db: Db, *, is_snapshot: bool) -> None:
    """Remove the time-out of a transaction. With `is_snapshot`, make it read the database as of now."""
    if is_snapshot:
        await db.execute(SNAPSHOT)
    await db.execute(NO_TIMEOUT)


LOAD = "SELECT load_rows($1, $2)"


async def load(db: Db, table: str, rows: str) -> int:
    """Insert rows, a JSON array, into a table. Return how many were new. Requires a transaction."""
    return int(await db.fetchval(LOAD, table, rows))


IS_EMPTY = 'SELECT NOT EXISTS (SELECT FROM "user") AND NOT EXISTS (SELECT FROM conversation)'
DISCARD_KEYS = "DELETE FROM server_key"


async def is_empty(db: Db) -> bool:
    """Whether there are neither users nor conversations."""
    return bool(await db.fetchval(IS_EMPTY))


async def discard_keys(db: Db) -> None:
    """Delete the keys of this installation, because the import brings those of the other one."""
    await db.execute(DISCARD_KEYS)


# Users who were added to a conversation in this transaction.
TOUCH = """
UPDATE "user" u SET version = u.version + 1
FROM (
    SELECT o.id FROM "user" o
    WHERE o.id IN (SELECT p.user_id FROM conversation_participant p WHERE p.joined_at = now())
    ORDER BY o.id FOR NO KEY UPDATE
) t
WHERE u.id = t.id
"""


async def touch(db: Db) -> None:
    """Move the user versions of users who were added to conversations, so that running servers notify them. Runs in the
    transaction that added them.
    """
    await db.execute(TOUCH)


OVERFULL = """
SELECT u.name FROM "user" u
WHERE u.id IN (SELECT p.user_id FROM conversation_participant p WHERE p.joined_at = now() AND p.status = 'active')
    AND (
        SELECT count(*) FROM conversation_participant p
        JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.user_id = u.id AND p.status = 'active'
    ) > $1
ORDER BY u.id LIMIT 1
"""
IS_ERASED_IN = """
SELECT EXISTS (
    SELECT FROM conversation_participant p JOIN "user" u ON u.id = p.user_id
    WHERE p.joined_at = now() AND p.status = 'active' AND u.erased_at IS NOT NULL
)
"""


async def overfull(db: Db, most: int) -> str | None:
    """Return the name of a user who was added to conversations and participates in more than `most`. Runs in the
    transaction that added them.
    """
    name: str | None = await db.fetchval(OVERFULL, most)
    return name


async def is_erased_in(db: Db) -> bool:
    """Whether an erased user was added to a conversation. Runs in the transaction that added them, after `touch`, which
    locks the users. A later erasure makes the user leave.
    """
    return bool(await db.fetchval(IS_ERASED_IN))


BY_EMAIL = 'SELECT u.email, u.id, u.name, u.email_verified FROM "user" u WHERE u.email = ANY($1) ORDER BY u.email'
PARTS = "SELECT p.id, p.user_id FROM conversation_participant p WHERE p.id = ANY($1)"
PRESENT = 'SELECT u.id, u.erased_at IS NOT NULL FROM "user" u WHERE u.id = ANY($1)'
ACTIVE = 'SELECT u.id, u.is_active AND NOT u.is_deleted FROM "user" u WHERE u.id = ANY($1)'
THERE = "SELECT c.id FROM conversation c WHERE c.id = ANY($1)"
IS_ANY_MESSAGE = "SELECT EXISTS (SELECT FROM message m WHERE m.id = ANY($1))"
ABSENT_MESSAGES = """
SELECT count(*) FROM unnest($1::uuid[]) wanted (id) WHERE NOT EXISTS (SELECT FROM message m WHERE m.id = wanted.id)
"""
PAIRS = "SELECT c.direct_low, c.direct_high FROM conversation c WHERE c.type = 'direct' AND c.direct_low = ANY($1)"


class Account(NamedTuple):
    """An account with an e-mail address. A verified address certainly belongs to the user."""

    email: str
    id: UserId
    name: str
    is_verified: bool


async def by_email(db: Db, emails: list[str]) -> dict[str, Account]:
    """Return the accounts with these e-mail addresses."""
    return {row[0]: Account(*row) for row in await db.fetch(BY_EMAIL, emails)}


async def parts(db: Db, ids: list[UUID]) -> dict[UUID, UserId]:
    """Return the users of existing participants' rows."""
    return {row[0]: row[1] for row in await db.fetch(PARTS, ids)}


async def present(db: Db, user_ids: list[UserId]) -> dict[UserId, bool]:
    """Return the existing ones of these users, and whether each is erased."""
    return {row[0]: row[1] for row in await db.fetch(PRESENT, user_ids)}


async def is_any_message(db: Db, message_ids: list[MessageId]) -> bool:
    """Whether any of the messages exists."""
    return bool(await db.fetchval(IS_ANY_MESSAGE, message_ids))


async def absent_messages(db: Db, message_ids: list[MessageId]) -> int:
    """Return how many of the messages do not exist."""
    found: int = await db.fetchval(ABSENT_MESSAGES, message_ids)
    return found


async def active(db: Db, user_ids: list[UserId]) -> dict[UserId, bool]:
    """Return the existing ones of these users, and whether each account is active."""
    return {row[0]: row[1] for row in await db.fetch(ACTIVE, user_ids)}


async def there(db: Db, conversation_ids: list[ConversationId]) -> set[ConversationId]:
    """Return the existing ones of these conversations."""
    return {row[0] for row in await db.fetch(THERE, conversation_ids)}


async def pairs(db: Db, lows: list[UserId]) -> set[tuple[UserId, UserId]]:
    """Return the pairs of users with a direct conversation, by the lower id of the two."""
    return {(row[0], row[1]) for row in await db.fetch(PAIRS, lows)}


COLUMNS = """
SELECT c.relname, array_agg(a.attname::text) FROM pg_class c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relname = ANY($1) GROUP BY c.relname
"""


async def columns(db: Db) -> dict[str, frozenset[str]]:
    """Return the columns of each table in `TABLES`."""
    return {row[0]: frozenset(row[1]) for row in await db.fetch(COLUMNS, list(TABLES))}
