"""The audit log. Each conversation has a chain of entries, and so has the server. Each entry is sealed by a hash."""

from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

import msgspec

from protocol.ids import ConversationId, MessageId, UserId
from protocol.json_object import Json
from protocol.values import AuditEntry
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.locks import LOCK_ROW

SERVER = ConversationId(UUID(int=0))
"""The chain of actions on the server, outside conversations."""

MAX_DELETED = 500
"""Approximate max entries that one statement deletes."""

_entry_decoder = Reader(AuditEntry)


class Deed(NamedTuple):
    """An entry to record: the actor, the action, the affected user and message, and details."""

    actor_id: UserId | None
    action: str
    user_id: UserId | None = None
    message_id: MessageId | None = None
    details: Json = {}  # noqa: RUF012 - it is never changed


# Transactions append to a chain one at a time. An entry is built without its hash first, because the hash covers the
# row's values. The lock is a row lock, because roles that may only read can take advisory locks, but no row locks.
LOCK_SERVER = "SELECT FROM database_epoch FOR NO KEY UPDATE"
RECORD = """
WITH before AS (
    SELECT number, hash FROM (
        (SELECT number, hash FROM audit_entry WHERE chain = $1 ORDER BY number DESC LIMIT 1)
        UNION ALL SELECT c.audit_number, c.audit_hash FROM conversation c WHERE c.id = $1
    ) known ORDER BY number DESC LIMIT 1
), entry AS (
    SELECT $1::uuid AS chain, coalesce((SELECT number FROM before), 0) + 1 AS number, $2::uuid AS actor_id,
        $3::text AS action, $4::uuid AS user_id, $5::uuid AS message_id, $6::jsonb AS details,
        clock_timestamp() AS created_at, coalesce((SELECT hash FROM before), '') AS previous_hash
)
INSERT INTO audit_entry
SELECT e.*, audit_hash(ROW(e.*, ''::bytea)::audit_entry) FROM entry e
"""


async def record(db: Db, chain: ConversationId, deed: Deed) -> None:
    """Append an entry to a chain, in the transaction of the action."""
    if chain == SERVER:
        await db.execute(LOCK_SERVER)
    else:
        await db.execute(LOCK_ROW, chain)
    details = msgspec.json.encode(deed.details).decode()
    await db.execute(RECORD, chain, deed.actor_id, deed.action, deed.user_id, deed.message_id, details)


# Entries about messages from before the reader's visible history are left out. So is the dismissal of a report about
# the reader's own message, as in `moderation.REPORTS`. `is_action_shown` in schema.sql has the same rule.
PAGE = """
SELECT CASE WHEN $4::uuid IS NULL OR e.message_id IS NULL OR (visible_after(c, me) < coalesce(m.sent_version, 1)
        AND NOT (e.action = 'dismiss_report' AND m.sender_id IS NOT DISTINCT FROM $4))
    THEN json_build_object(
        'number', e.number, 'actor_id', e.actor_id, 'action', e.action, 'user_id', e.user_id,
        'message_id', e.message_id, 'details', e.details, 'created_at', e.created_at,
        'previous_hash', encode(e.previous_hash, 'hex'), 'hash', encode(e.hash, 'hex')
    ) END, e.number
FROM (SELECT * FROM audit_entry WHERE chain = $1 AND number > $2 ORDER BY number LIMIT $3) e
LEFT JOIN conversation c ON c.id = e.chain
LEFT JOIN conversation_participant me ON me.conversation_id = e.chain AND me.user_id = $4
LEFT JOIN message m ON m.id = e.message_id AND (m.conversation_id = e.chain) IS TRUE
ORDER BY e.number
"""


async def page(
    db: Db, chain: ConversationId, after: int, *, limit: int, reader: UserId | None = None
) -> Undecoded[Page[AuditEntry]]:
    """Return up to `limit` entries of a chain after a number: all of them, or those that a reader may see. There is no
    access check.
    """
    return _entry_decoder.page(await db.fetch(PAGE, chain, after, limit + 1, reader), limit)


COUNT = """
SELECT greatest(
    (SELECT max(number) FROM audit_entry WHERE chain = $1), (SELECT audit_number FROM conversation WHERE id = $1), 0
)
"""


async def count(db: Db, chain: ConversationId) -> int:
    """Return the number of the last entry of a chain."""
    return int(await db.fetchval(COUNT, chain))


# If an entry was changed, moved or removed, the entries after it do not match. The first entry continues from the last
# one that was deleted for its age.
BROKEN = """
SELECT number FROM (
    SELECT e.number, coalesce(c.audit_number, 0) + row_number() OVER w AS place, e.hash = audit_hash(e) AS is_itself,
        e.previous_hash = coalesce(lag(e.hash) OVER w, c.audit_hash, '') AS is_next
    FROM audit_entry e LEFT JOIN conversation c ON c.id = $1 WHERE e.chain = $1 WINDOW w AS (ORDER BY e.number)
) e WHERE NOT is_itself OR NOT is_next OR number <> place
ORDER BY number LIMIT 1
"""


async def broken(db: Db, chain: ConversationId) -> int | None:
    """Return the number of the first entry that was changed, moved or follows a gap. Return None if there is none."""
    number = await db.fetchval(BROKEN, chain)
    return None if number is None else int(number)


# Conversations that another transaction has locked are left to a later call.
FORGET = """
WITH due AS MATERIALIZED (
    SELECT e.chain, e.number FROM audit_entry e
    WHERE e.chain <> '00000000-0000-0000-0000-000000000000' AND e.created_at < now() - $1::interval
    ORDER BY e.created_at LIMIT $2
), held AS MATERIALIZED (
    SELECT c.id FROM conversation c WHERE c.id IN (SELECT chain FROM due) ORDER BY c.id FOR NO KEY UPDATE SKIP LOCKED
), ends AS MATERIALIZED (
    SELECT held.id, max(due.number) AS number FROM held JOIN due ON due.chain = held.id GROUP BY held.id
), gone AS (
    DELETE FROM audit_entry e USING ends WHERE e.chain = ends.id AND e.number <= ends.number
    RETURNING e.chain, e.number, e.hash
), moved AS (
    UPDATE conversation c SET audit_number = g.number, audit_hash = g.hash
    FROM gone g JOIN ends ON ends.id = g.chain AND ends.number = g.number WHERE c.id = g.chain
)
SELECT count(*) FROM gone
"""


async def forget(db: Db, kept: timedelta) -> bool:
    """Delete entries of conversations that are older than `kept`, about `MAX_DELETED`. Return whether there may be
    more.
    """
    return int(await db.fetchval(FORGET, kept, MAX_DELETED)) >= MAX_DELETED
