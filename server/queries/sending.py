"""Storing messages of users, in batches."""

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Literal, NamedTuple

import msgspec
from asyncpg import Record, UniqueViolationError

from protocol.client import Send
from protocol.ids import ConversationId, MessageId, UserId
from protocol.payloads import Poll
from protocol.values import ContentType
from server.core.faults import RowHeld
from server.db.database import Db
from server.db.lock_timeouts import WITHIN_RETRY_LOCK_MS
from server.fairness.lanes import HELD, Held
from server.queries import batches

_encode = msgspec.json.Encoder().encode


class Derived(NamedTuple):
    """The parts of a message that the server derives from its content."""

    formatted_content: str | None = None
    mentions: Sequence[UserId] = ()
    loud_mentions: Sequence[str] = ()
    hashtags: Sequence[str] = ()


class Source(NamedTuple):
    """The message that is forwarded, its original sender, and the time of its last edit."""

    conversation_id: ConversationId
    message_id: MessageId
    sender_id: UserId
    edited_at: datetime | None


class Outgoing(NamedTuple):
    """A message that is not stored yet, and its sender."""

    sender_id: UserId
    frame: Send
    derived: Derived = Derived()
    source: Source | None = None

    @property
    def content_type(self) -> ContentType:
        """The content type, which follows from the payload."""
        payload = self.frame.payload
        return "text" if payload is None else payload.__struct_config__.tag  # type: ignore[return-value]

    @property
    def poll_counts(self) -> list[int] | None:
        """Zero votes for each option of a poll; None for other messages."""
        return [0] * len(self.frame.payload.options) if isinstance(self.frame.payload, Poll) else None


def weight(out: Outgoing) -> int:
    """Return the length of a message with its payload, in characters. It determines how long storing takes."""
    payload = out.frame.payload
    return len(out.frame.content) + (0 if payload is None else len(_encode(payload)))


class Stored(NamedTuple):
    """The version and times of a stored message. For a reply, also the root of its thread, the root's reply count, and
    the position of the reply.
    """

    version: int
    created_at: datetime
    expires_at: datetime | None
    root_id: MessageId | None
    root_reply_count: int | None
    thread_order: int


def is_plain(out: Outgoing) -> bool:
    """Whether a message refers to no other one and mentions nobody."""
    frame, derived = out.frame, out.derived
    return not (
        frame.parent_message_id or frame.quoted_message_id or out.source or derived.mentions or derived.loud_mentions
    )


# The sender's rights are read before the lock, in the snapshot of the statement. Each change of participants or rights
# moves `access_version`, and `relationships.lock` updates the row of a direct conversation. PostgreSQL evaluates the
# conditions on `c` again if the row has changed since the snapshot, which `before` shows as it was. So a message of a
# user whose rights changed meanwhile is not stored (docs/decisions/0088). OFFSET 0 keeps the planner from reading all
# conversations of the sender.
SEND_PLAIN = """
WITH part AS MATERIALIZED (
    SELECT i.*, c.version AS clock,
        CASE WHEN c.settings <> '{}' THEN make_interval(secs => (c.settings ->> 'expire_after_seconds')::float8) END
            AS expires_after
    FROM json_to_recordset($1::json) i (
        place integer, message_id uuid, conversation_id uuid, sender_id uuid, content text, content_type text,
        payload jsonb, formatted_content text, hashtags text[], metadata jsonb, poll_counts integer[]
    )
    CROSS JOIN LATERAL (
        SELECT p FROM conversation_participant p
        WHERE p.conversation_id = i.conversation_id AND p.user_id = i.sender_id AND p.status = 'active' OFFSET 0
    ) sender
    JOIN "user" u ON u.id = i.sender_id
    JOIN conversation before ON before.id = i.conversation_id
    JOIN conversation c ON c.id = i.conversation_id AND NOT c.is_deleted
        AND c.access_version = before.access_version AND (c.type <> 'direct' OR c.xmin = before.xmin)
    WHERE obstacle_of(c, sender.p, u.is_active AND NOT u.is_deleted) IS NULL
        AND (SELECT true FROM message m WHERE m.id = i.message_id) IS NULL
        AND (SELECT set_config('lock_timeout', $2, true)) IS NOT NULL
    FOR NO KEY UPDATE OF c SKIP LOCKED
), made AS MATERIALIZED (
    SELECT p.*, p.clock + row_number() OVER (PARTITION BY p.conversation_id ORDER BY p.place) AS version,
        clock_timestamp() AS created_at
    FROM part p
), moved AS (
    UPDATE conversation c SET version = f.version, message_count = c.message_count + f.messages,
        last_message_at = f.created_at, last_activity_at = f.created_at
    FROM (
        SELECT m.conversation_id, max(m.version) AS version, count(*) AS messages, max(m.created_at) AS created_at
        FROM made m GROUP BY m.conversation_id
    ) f
    WHERE c.id = f.conversation_id
), queued AS (
    INSERT INTO search_queue (message_ids) SELECT array_agg(m.message_id) FROM made m HAVING count(*) > 0
)
INSERT INTO message (id, conversation_id, sender_id, content, content_type, payload, formatted_content, hashtags,
    metadata, poll_counts, expires_at, sent_version, version, created_at, updated_at)
SELECT m.message_id, m.conversation_id, m.sender_id, m.content, m.content_type, m.payload, m.formatted_content,
    m.hashtags, m.metadata, m.poll_counts, m.created_at + m.expires_after, m.version, m.version, m.created_at,
    m.created_at
FROM made m
RETURNING id, sent_version, created_at, expires_at
"""


async def send_plain(db: Db, batch: Sequence[Outgoing]) -> list[Stored | None]:
    """Store plain messages whose conversation is not locked and whose sender may send. Return None for the others,
    which `send_free` stores or refuses, and for messages with the id of an earlier one in the batch.

    Raises what `batches.passed` raises.
    """
    arguments = _encoded(batch), batches.brief()
    try:
        rows = await batches.passed(db.fetch(SEND_PLAIN, *arguments), count=len(batch))
    except UniqueViolationError:  # as in `send_free`
        rows = await batches.passed(db.fetch(SEND_PLAIN, *arguments), count=len(batch))
    stored = {row[0]: Stored(row[1], row[2], row[3], None, None, 0) for row in rows or []}
    return [stored.pop(out.frame.message_id, None) for out in batch]


SEND = f"SELECT * FROM send_messages($1, $2, $3) WHERE {WITHIN_RETRY_LOCK_MS}"  # noqa: S608 - a constant is put in
"""Stores a batch. schema.sql has the function, and beside it the contract of its steps."""

Reason = Literal[
    "changed", "duplicate", "no_access", "inactive", "archived", "role", "unwanted", "loud", "missing_parent",
    "missing_quoted", "source_changed", "slow",
]  # fmt: skip
"""Why a message was not stored. Of several reasons, it is the first one in send_messages().

Another attempt may succeed for two of them. `changed` means that the sender's rights changed while the statement ran,
or that another message took the id. It is also the reason of a message that refers to a new one of its batch. `loud`
means that the sender may not notify everyone, so the message has to be composed again.
"""


MISSING = {"missing_parent": "parent_message_id", "missing_quoted": "quoted_message_id"}
"""The field that names the missing message, by the reason."""


class NotStored(NamedTuple):
    """A message that was not stored. `wait_ms` is the time until the sender may send in slow mode, in milliseconds."""

    reason: Reason
    wait_ms: int = 0


async def send(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored | Held]:
    """Store a batch, and return the outcomes in its order. Of several messages with the same id, the first is stored.
    The outcome is `HELD` if the conversations stay locked for `RETRY_LOCK_MS`.

    Stores none of them and raises UniqueViolationError if another transaction took an id meanwhile. Also raises what
    `batches.waiting` raises.
    """
    rows = await batches.waiting(partial(db.fetch, SEND, _encoded(batch)), count=len(batch))
    return _outcomes(batch, rows)


async def send_alone(db: Db, out: Outgoing) -> Stored | NotStored:
    """Store one message in the caller's transaction. Raises RowHeld if its conversation is locked for too long."""
    (outcome,) = await send(db, [out])
    if isinstance(outcome, Held):
        raise RowHeld("the conversation is locked")
    return outcome


async def send_free(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored | Held]:
    """Do the same as `send`, but skip locked conversations. The outcome of their messages is `HELD`. So is that of a
    single message that would wait for another row. Also raises what `batches.passing` raises.
    """
    items = _encoded(batch)
    try:
        rows = await batches.passing(partial(db.fetch, SEND, items), count=len(batch))
    except UniqueViolationError:  # another transaction took an id meanwhile, and a second run sees its message
        rows = await batches.passing(partial(db.fetch, SEND, items), count=len(batch))
    return [HELD] if rows is None else _outcomes(batch, rows)


def _outcomes(batch: Sequence[Outgoing], rows: Sequence[Record]) -> list[Stored | NotStored | Held]:
    """Return the outcomes of a batch. A message with the id of an earlier one in the batch has no row. A message that
    refers to a new one in the batch has the reason `changed`.
    """
    outcomes: list[Stored | NotStored | Held] = [NotStored("changed")] * len(batch)
    new = {batch[place].frame.message_id for place, outcome, *_ in rows if outcome in {"stored", "held", "changed"}}
    for place, outcome, wait_ms, *stored in rows:
        if outcome == "stored":
            outcomes[place] = Stored(*stored)
        elif outcome in MISSING and getattr(batch[place].frame, MISSING[outcome]) in new:
            outcomes[place] = NotStored("changed")
        else:
            outcomes[place] = HELD if outcome == "held" else NotStored(outcome, wait_ms or 0)
    return outcomes


def _encoded(batch: Sequence[Outgoing]) -> str:
    """Return the messages as JSON with the fields of the type `outgoing_message`. Leaves out messages with the id of an
    earlier one in the batch.
    """
    first: dict[MessageId, tuple[int, Outgoing]] = {}
    for place, item in enumerate(batch):
        first.setdefault(item.frame.message_id, (place, item))
    rows = [
        {
            "place": place,
            "message_id": item.frame.message_id,
            "conversation_id": item.frame.conversation_id,
            "sender_id": item.sender_id,
            "content": item.frame.content,
            "content_type": item.content_type,
            "payload": item.frame.payload,
            "formatted_content": item.derived.formatted_content,
            "mentions": item.derived.mentions,
            "loud_mentions": item.derived.loud_mentions,
            "hashtags": item.derived.hashtags,
            "metadata": item.frame.metadata,
            "parent_message_id": item.frame.parent_message_id,
            "also_in_conversation": item.frame.also_in_conversation,
            "quoted_message_id": item.frame.quoted_message_id,
            "forwarded_from_id": item.source and item.source.message_id,
            "forwarded_sender_id": item.source and item.source.sender_id,
            "source_conversation_id": item.source and item.source.conversation_id,
            "source_edited_at": item.source and item.source.edited_at,
            "poll_counts": item.poll_counts,
        }
        for place, item in first.values()
    ]
    return msgspec.json.encode(rows).decode()


class Earlier(NamedTuple):
    """A stored message with the id of another one, and whether both are the same."""

    version: int
    created_at: datetime
    is_same: bool


# The original content is compared, which is in the oldest row of `message_edit` if the message was edited. A forwarded
# message is compared by its source, whose content may have changed. Of a message that has expired, no content is left.
EARLIER = """
SELECT m.sent_version, m.created_at,
    m.conversation_id = $2 AND m.sender_id = $3 AND m.forwarded_from_id IS NOT DISTINCT FROM $12
    AND m.parent_message_id IS NOT DISTINCT FROM $4 AND m.quoted_message_id IS NOT DISTINCT FROM $10
    AND m.also_in_conversation = $11
    AND (m.forwarded_from_id IS NOT NULL OR (m.is_deleted AND first.id IS NULL) OR m.content_type = $7
        AND coalesce(first.content, m.content) = $5
        AND (CASE WHEN first.id IS NULL THEN m.formatted_content ELSE first.formatted_content END IS NOT NULL) = $6
        AND (m.is_deleted OR (m.payload IS NOT DISTINCT FROM $8::jsonb AND m.metadata IS NOT DISTINCT FROM $9::jsonb)))
FROM message m
LEFT JOIN LATERAL (
    SELECT e.id, e.content, e.formatted_content FROM message_edit e
    WHERE e.message_id = m.id AND e.conversation_id = m.conversation_id ORDER BY e.version LIMIT 1
) first ON true
WHERE m.id = $1
"""


async def earlier(db: Db, outgoing: Outgoing) -> Earlier | None:
    """Return the stored message with the id of an outgoing one, in any conversation."""
    frame = outgoing.frame
    row = await db.fetchrow(
        EARLIER, frame.message_id, frame.conversation_id, outgoing.sender_id, frame.parent_message_id,
        frame.content, frame.is_markdown, outgoing.content_type, _json(frame.payload), _json(frame.metadata),
        frame.quoted_message_id, frame.also_in_conversation, outgoing.source and outgoing.source.message_id,
    )  # fmt: skip
    return None if row is None else Earlier(*row)


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


WAITED = "UPDATE conversation_participant SET last_sent_at = $3 WHERE conversation_id = $1 AND user_id = $2"


async def begin_wait(db: Db, conversation_id: ConversationId, user_id: UserId, at: datetime) -> None:
    """Start the wait of slow mode for a participant who edited a message. Requires the conversation's lock."""
    await db.execute(WAITED, conversation_id, user_id, at)
