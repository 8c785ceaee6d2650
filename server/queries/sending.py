"""Messages on their way in: sent in batches by one statement, and the server's own announcements."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import msgspec
from asyncpg import LockNotAvailableError, QueryCanceledError, Record, UniqueViolationError

from protocol.client import Send
from protocol.ids import ConversationId, MessageId, UserId
from protocol.json_object import Json
from protocol.payloads import Poll
from protocol.values import ContentType, Message, SystemMessageType
from server.db.database import Db
from server.db.rows import Reader
from server.fairness.batcher import Slow
from server.fairness.lanes import HELD, Held
from server.queries.locks import LOCK_PART
from server.queries.messages import Obstacle

SHARED_LOCK_MS, ALONE_LOCK_MS = 10, 200
"""Max time that messages wait for a row other than their conversation's, in milliseconds: several that share a
statement, and one that has its own and only holds up its conversation.
"""

_message_decoder = Reader(Message)
_encode = msgspec.json.Encoder().encode


class Derived(NamedTuple):
    """What the server makes of what is said."""

    formatted_content: str | None = None
    mentions: Sequence[UserId] = ()
    loud_mentions: Sequence[str] = ()
    hashtags: Sequence[str] = ()


class Source(NamedTuple):
    """What was forwarded, who had said it, and since when it says that, if it was edited."""

    conversation_id: ConversationId
    message_id: MessageId
    sender_id: UserId
    edited_at: datetime | None


class Outgoing(NamedTuple):
    """A message on its way in: who sends what."""

    sender_id: UserId
    frame: Send
    made: Derived = Derived()
    source: Source | None = None

    @property
    def content_type(self) -> ContentType:
        """What kind of message it is: its payload says so."""
        payload = self.frame.payload
        return "text" if payload is None else payload.__struct_config__.tag  # type: ignore[return-value]

    @property
    def options(self) -> int | None:
        """How many options there are, in a poll."""
        return len(self.frame.payload.options) if isinstance(self.frame.payload, Poll) else None


def weight(out: Outgoing) -> int:
    """Return how many characters a message says, also in its payload: the words of them take most of the time."""
    payload = out.frame.payload
    return len(out.frame.content) + (0 if payload is None else len(_encode(payload)))


class Stored(NamedTuple):
    """The version and times of a stored message. For a reply, also its thread: the root, its reply count, and the
    reply's place.
    """

    version: int
    created_at: datetime
    expires_at: datetime | None
    root_id: MessageId | None
    root_reply_count: int | None
    thread_order: int


# `(conversation_id = …) IS TRUE` is a filter that no index serves, so rows are always found by their id. A generic plan
# made while a table is nearly empty would otherwise scan the conversation, and be kept (docs/decisions/0008).
# OFFSET 0 and ARRAY(…) are optimization fences for the same reason.
#
# One statement sends the whole batch. `wanted` selects the messages that may be sent, before any lock, and finds their
# words, which takes long for large ones. `locked` then locks the conversations. `fresh` drops each message whose
# sender's access changed in between, by `access_version`; the handler then finds out why. The functions named `…_now`
# read under the lock what changes without `access_version`: accounts, blocks and privacy, the message that is replied
# to or quoted, and what is forwarded. The CASE needs `l`, so PostgreSQL cannot call them before the lock. `roots` is
# updated under the lock, too, and numbers the replies of each thread.
#
# `patience` bounds what all that follows may wait for: not everybody who writes to a thread, a follower's row or a
# message's id holds the conversation (docs/decisions/0062). It counts `locked`, so that it comes after the lock.
#
# No message makes the statement fail for all others: ids that are taken are looked for in all conversations, as
# message_pkey does (docs/decisions/0066).
SEND = """
WITH input AS (
    SELECT * FROM json_to_recordset($1) AS i (
        place integer, sender_id uuid, message_id uuid, conversation_id uuid, content text, content_type text,
        payload jsonb, formatted_content text, mentions uuid[], loud_mentions text[], hashtags text[], metadata jsonb,
        parent_message_id uuid, also_in_conversation boolean, quoted_message_id uuid, forwarded_from_id uuid,
        forwarded_sender_id uuid, source_conversation_id uuid, source_edited_at timestamptz, options integer,
        has_waited boolean
    )
), wanted AS MATERIALIZED (
    SELECT i.*, allowed.access_version, allowed.expires_after, coalesce(parent.thread_root_id, parent.id) AS root_id,
        search_words(i.conversation_id, i.content, i.payload, i.mentions, i.loud_mentions, i.hashtags) AS words
    FROM input i
    CROSS JOIN LATERAL (
        SELECT c.access_version, visible_after(c, p) AS visible_after, CASE WHEN c.settings <> '{}' THEN
            make_interval(secs => (c.settings ->> 'expire_after_seconds')::float8) END AS expires_after
        FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        JOIN "user" u ON u.id = p.user_id AND u.is_active AND NOT u.is_deleted
        WHERE p.conversation_id = i.conversation_id AND p.user_id = i.sender_id AND p.status = 'active'
            AND may_send(c, p.role, i.has_waited)
            AND (i.loud_mentions = '{}' OR (c.type <> 'direct' AND can(p.role, 'moderator', false)))
        OFFSET 0
    ) allowed
    LEFT JOIN LATERAL (
        SELECT m.id, m.thread_root_id FROM message m
        WHERE m.id = i.parent_message_id AND (m.conversation_id = i.conversation_id) IS TRUE AND NOT m.is_deleted
            AND m.sent_version > allowed.visible_after
        OFFSET 0
    ) parent ON true
    WHERE (i.parent_message_id IS NULL OR parent.id IS NOT NULL) AND NOT EXISTS (
        SELECT FROM message m WHERE m.id = i.message_id OFFSET 0
    ) AND (i.quoted_message_id IS NULL OR EXISTS (
        SELECT FROM message m
        WHERE m.id = i.quoted_message_id AND (m.conversation_id = i.conversation_id) IS TRUE AND NOT m.is_deleted
            AND m.sent_version > allowed.visible_after
        OFFSET 0
    ))
), locked AS MATERIALIZED (
    SELECT c.id, c.version, c.access_version, c.direct_low, c.direct_high
    FROM conversation c WHERE c.id = ANY(ARRAY(SELECT conversation_id FROM wanted))
    ORDER BY c.id
    FOR NO KEY UPDATE
), patience AS MATERIALIZED (
    SELECT set_config('lock_timeout', $2, true) FROM (SELECT count(*) FROM locked) counted
), fresh AS MATERIALIZED (
    SELECT w.*, l.version + row_number() OVER (PARTITION BY w.conversation_id ORDER BY w.place) AS version,
        row_number() OVER (PARTITION BY w.root_id ORDER BY w.place DESC) AS from_last,
        clock_timestamp() AS created_at
    FROM patience, wanted w
    JOIN locked l ON l.id = w.conversation_id AND CASE WHEN l.access_version = w.access_version THEN
        may_now('write', w.sender_id, CASE WHEN l.direct_low = w.sender_id THEN l.direct_high ELSE l.direct_low END)
        AND (w.parent_message_id IS NULL OR is_there_now(w.parent_message_id, w.conversation_id))
        AND (w.quoted_message_id IS NULL OR is_there_now(w.quoted_message_id, w.conversation_id))
        AND (w.forwarded_from_id IS NULL OR may_forward_now(w.sender_id, w.forwarded_from_id, w.source_conversation_id,
            w.source_edited_at))
        ELSE false END
), bumped AS (
    UPDATE conversation c SET version = f.version, message_count = c.message_count + f.messages,
        last_message_at = f.created_at, last_activity_at = f.created_at
    FROM (
        SELECT conversation_id, max(version) AS version, count(*) AS messages, max(created_at) AS created_at
        FROM fresh GROUP BY conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(ARRAY(SELECT conversation_id FROM fresh))
), roots AS (
    UPDATE message m SET reply_count = m.reply_count + f.replies, thread_order = m.thread_order + f.replies,
        version = f.version
    FROM (
        SELECT root_id, max(version) AS version, count(*) AS replies FROM fresh GROUP BY root_id
    ) f
    WHERE m.id = f.root_id AND m.id = ANY(ARRAY(SELECT root_id FROM fresh))
        AND (m.conversation_id = ANY(ARRAY(SELECT conversation_id FROM fresh))) IS TRUE
    RETURNING m.id, m.conversation_id, m.sender_id, m.reply_count, m.thread_order
), placed AS MATERIALIZED (
    SELECT f.*, f.created_at + f.expires_after AS expires_at, r.reply_count,
        coalesce(r.thread_order - f.from_last + 1, 0)::integer AS thread_order
    FROM fresh f LEFT JOIN roots r ON r.id = f.root_id
), inserted AS (
    INSERT INTO message (id, conversation_id, sender_id, content, content_type, payload, formatted_content, mentions,
        loud_mentions, hashtags, metadata, parent_message_id, thread_root_id, thread_order, also_in_conversation,
        quoted_message_id, forwarded_from_id, forwarded_sender_id, poll_counts, expires_at, sent_version, version,
        created_at, updated_at)
    SELECT message_id, conversation_id, sender_id, content, content_type, payload, formatted_content, mentions,
        loud_mentions, hashtags, metadata, parent_message_id, root_id, thread_order, also_in_conversation,
        quoted_message_id, forwarded_from_id, forwarded_sender_id,
        CASE WHEN options > 0 THEN array_fill(0, ARRAY[options]) END, expires_at, version, version, created_at,
        created_at
    FROM placed
), followed AS (
    INSERT INTO thread_follow AS t (root_id, user_id, conversation_id, has_replied, last_read_order)
    SELECT f.root_id, f.user_id, f.conversation_id, bool_or(f.has_replied), max(f.thread_order) FROM (
        SELECT root_id, sender_id AS user_id, conversation_id, true AS has_replied, thread_order
        FROM placed WHERE root_id IS NOT NULL
        UNION ALL
        SELECT r.id, r.sender_id, r.conversation_id, false, 0 FROM roots r WHERE is_unerased_now(r.sender_id)
    ) f
    GROUP BY f.root_id, f.user_id, f.conversation_id
    ON CONFLICT (root_id, user_id) DO UPDATE SET has_replied = t.has_replied OR excluded.has_replied,
        last_read_order = greatest(t.last_read_order, excluded.last_read_order)
), findable AS (
    INSERT INTO message_search (message_id, conversation_id, created_at, words)
    SELECT message_id, conversation_id, created_at, words FROM placed
)
SELECT place, version, created_at, expires_at, root_id, reply_count, thread_order FROM placed
"""
# The same without waiting: messages to conversations that somebody holds are not stored, and have no version.
SEND_FREE = f"""
{SEND.replace("FOR NO KEY UPDATE", "FOR NO KEY UPDATE SKIP LOCKED")}
UNION ALL
SELECT w.place, NULL, NULL, NULL, NULL, NULL, NULL FROM wanted w
WHERE w.conversation_id <> ALL (ARRAY(SELECT id FROM locked))
"""  # noqa: S608 - a constant is put in


async def send(db: Db, batch: Sequence[Outgoing], *, has_waited: bool = False) -> list[Stored | None]:
    """Store a batch, in order; None stands for each that was not stored: ask `existing` why. In slow mode that is
    everyone's for whom `has_waited` is not said. Of several with the same id the first one is stored.

    Stores none and raises UniqueViolationError if an id in it was taken while it ran, LockNotAvailableError if it
    waited under the lock of a conversation for a row that somebody else holds: `SHARED_LOCK_MS` in a batch of several,
    `ALONE_LOCK_MS` alone. In a transaction, that bounds what comes after it as well.
    """
    stored: list[Stored | None] = [None] * len(batch)
    patience = ALONE_LOCK_MS if len(batch) == 1 else SHARED_LOCK_MS
    for place, *where in await db.fetch(SEND, _encoded(batch, has_waited=has_waited), f"{patience}ms"):
        stored[place] = Stored(*where)
    return stored


async def send_free(db: Db, batch: Sequence[Outgoing]) -> list[Stored | Held | None]:
    """Do what `send` does, but wait for nothing that somebody holds: `HELD` stands for messages to conversations that
    are held, and for one that is alone and would wait longer than `SHARED_LOCK_MS` for another row. Of several, such a
    one raises LockNotAvailableError: ask for parts of them.

    Raises Slow if PostgreSQL ended the statement. It does so before the commit or not at all: nothing was stored. What
    the client gives up may have been stored (docs/decisions/0066).
    """
    stored: list[Stored | Held | None] = [None] * len(batch)
    try:
        rows = await _fetched(db, batch)
    except QueryCanceledError:
        raise Slow from None
    except LockNotAvailableError:
        if len(batch) > 1:
            raise
        return [HELD]
    for place, *where in rows:
        stored[place] = HELD if where[0] is None else Stored(*where)
    return stored


async def _fetched(db: Db, batch: Sequence[Outgoing]) -> list[Record]:
    """Run `SEND_FREE`, and once more if an id was taken while it ran: then the statement sees it."""
    arguments = _encoded(batch), f"{SHARED_LOCK_MS}ms"
    try:
        return await db.fetch(SEND_FREE, *arguments)
    except UniqueViolationError:
        return await db.fetch(SEND_FREE, *arguments)


def _encoded(batch: Sequence[Outgoing], *, has_waited: bool = False) -> str:
    """Return the messages, without those that have the id of an earlier one."""
    first: dict[MessageId, tuple[int, Outgoing]] = {}
    for place, item in enumerate(batch):
        first.setdefault(item.frame.message_id, (place, item))
    rows = [
        {
            "place": place,
            "sender_id": item.sender_id,
            "message_id": item.frame.message_id,
            "conversation_id": item.frame.conversation_id,
            "content": item.frame.content,
            "content_type": item.content_type,
            "payload": item.frame.payload,
            "formatted_content": item.made.formatted_content,
            "mentions": item.made.mentions,
            "loud_mentions": item.made.loud_mentions,
            "hashtags": item.made.hashtags,
            "metadata": item.frame.metadata,
            "parent_message_id": item.frame.parent_message_id,
            "also_in_conversation": item.frame.also_in_conversation,
            "quoted_message_id": item.frame.quoted_message_id,
            "forwarded_from_id": item.source and item.source.message_id,
            "forwarded_sender_id": item.source and item.source.sender_id,
            "source_conversation_id": item.source and item.source.conversation_id,
            "source_edited_at": item.source and item.source.edited_at,
            "options": item.options,
            "has_waited": has_waited,
        }
        for place, item in first.values()
    ]
    return msgspec.json.encode(rows).decode()


class Existing(NamedTuple):
    """Why a message was not stored, as far as the sender may know: `obstacle` is the first of those below that is in
    its way, `missing` what it refers to that is not there. With `is_source_changed`, what it forwards has to be read
    again.
    """

    obstacle: Literal["access"] | Obstacle | None
    missing: Literal["parent_message_id", "quoted_message_id"] | None
    version: int | None
    created_at: datetime | None
    is_same: bool
    is_source_changed: bool


# What was sent first is compared in its original words: an edit keeps them as its oldest row. A message that was
# forwarded is compared by where it came from, for that may say something else by now; of one that has expired nothing
# is left to compare.
EXISTING = """
SELECT
    CASE WHEN p.id IS NULL THEN 'access' ELSE obstacle(c, p) END,
    (SELECT asked.field
        FROM (VALUES ('parent_message_id', $4::uuid), ('quoted_message_id', $10::uuid)) asked (field, id)
        WHERE asked.id IS NOT NULL AND NOT EXISTS (
            SELECT FROM message r WHERE r.id = asked.id AND (r.conversation_id = $2) IS TRUE AND NOT r.is_deleted
                AND r.sent_version > visible_after(c, p) OFFSET 0
        ) LIMIT 1),
    m.sent_version,
    m.created_at,
    coalesce(m.conversation_id = $2 AND m.sender_id = $3 AND m.forwarded_from_id IS NOT DISTINCT FROM $12
        AND m.parent_message_id IS NOT DISTINCT FROM $4 AND m.quoted_message_id IS NOT DISTINCT FROM $10
        AND m.also_in_conversation = $11
        AND (m.forwarded_from_id IS NOT NULL OR (m.is_deleted AND first.id IS NULL) OR m.content_type = $7
            AND coalesce(first.content, m.content) = $5
            AND (CASE WHEN first.id IS NULL THEN m.formatted_content ELSE first.formatted_content END IS NOT NULL) = $6
            AND (m.is_deleted
                OR (m.payload IS NOT DISTINCT FROM $8::jsonb AND m.metadata IS NOT DISTINCT FROM $9::jsonb))
        ), false),
    $12::uuid IS NOT NULL AND NOT may_forward_now($3, $12, $13, $14)
FROM (SELECT) AS always
LEFT JOIN (
    conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
) ON p.conversation_id = $2 AND p.user_id = $3 AND p.status = 'active'
LEFT JOIN message m ON m.id = $1
LEFT JOIN LATERAL (
    SELECT e.id, e.content, e.formatted_content FROM message_edit e
    WHERE e.message_id = m.id AND e.conversation_id = m.conversation_id ORDER BY e.version LIMIT 1
) first ON true
"""


async def existing(db: Db, outgoing: Outgoing) -> Existing:
    """Return what is there under the id of a message that was not stored."""
    frame = outgoing.frame
    source = outgoing.source
    row = await db.fetchrow(
        EXISTING, frame.message_id, frame.conversation_id, outgoing.sender_id, frame.parent_message_id,
        frame.content, frame.is_markdown, outgoing.content_type, _json(frame.payload), _json(frame.metadata),
        frame.quoted_message_id, frame.also_in_conversation, source and source.message_id,
        source and source.conversation_id, source and source.edited_at,
    )  # fmt: skip
    assert row is not None  # noqa: S101 - the query always has one row
    return Existing(*row)


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


# In slow mode a participant's row is written for each message and edit of theirs, and nowhere else.
WAIT = """
SELECT slow_mode_wait(c, p)
FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
WHERE p.conversation_id = $1 AND p.user_id = $2
"""
WAITED = "UPDATE conversation_participant SET last_sent_at = $3 WHERE conversation_id = $1 AND user_id = $2"


async def send_slowly(db: Db, outgoing: Outgoing) -> Stored | int | None:
    """Store a message in slow mode; return the milliseconds that its sender has to wait instead, or None as `send`
    does. In a transaction.
    """
    about = outgoing.frame.conversation_id
    if not await db.fetchval(LOCK_PART, about, outgoing.sender_id):
        return None
    if wait := await db.fetchval(WAIT, about, outgoing.sender_id):
        return int(wait)
    (stored,) = await send(db, [outgoing], has_waited=True)
    if stored is not None:
        await begin_wait(db, about, outgoing.sender_id, stored.created_at)
    return stored


async def begin_wait(db: Db, conversation_id: ConversationId, user_id: UserId, at: datetime) -> None:
    """Record when a participant last said something: slow mode counts from there. Under the lock."""
    await db.execute(WAITED, conversation_id, user_id, at)


ANNOUNCE = """
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


class Announcement(NamedTuple):
    """What a system message says its sender did: for programs, and in English. No name is in it: people change theirs,
    and may want it forgotten.
    """

    kind: SystemMessageType
    content: str
    metadata: Json = {}  # noqa: RUF012 - nobody writes to it


async def announce(db: Db, conversation_id: ConversationId, user_id: UserId, said: Announcement) -> Message:
    """Store what a user did as a system message, and return it. Under the lock."""
    metadata = msgspec.json.encode(said.metadata).decode()
    return _message_decoder.decode(
        await db.fetchval(ANNOUNCE, conversation_id, user_id, said.content, metadata, said.kind)
    )
