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
    def poll_counts(self) -> list[int] | None:
        """The votes for each option of a poll, which are none."""
        return [0] * len(self.frame.payload.options) if isinstance(self.frame.payload, Poll) else None


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


SEND = "SELECT * FROM send_messages($1, $2, $3)"
"""Stores a batch: send_messages() in schema.sql, beside which its contract stands."""

Reason = Literal[
    "changed", "duplicate", "no_access", "inactive", "archived", "role", "unwanted", "loud", "missing_parent",
    "missing_quoted", "source_changed", "slow",
]  # fmt: skip
"""Why a message was not stored; of several reasons, the first one in the order of send_messages(). With `changed` and
`loud` it may be stored if it is tried again: the sender's right came up while it ran, or another message took the id;
or the sender may no longer mention everyone, and it has to be composed anew.
"""


class NotStored(NamedTuple):
    """A message that was not stored, and for `slow`, the milliseconds until its sender may send."""

    reason: Reason
    wait_ms: int = 0


async def send(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored]:
    """Store a batch, and return what became of each message, in order. Of several with the same id, the first one is
    stored.

    Stores none and raises UniqueViolationError if another transaction took an id while it ran, LockNotAvailableError if
    it waited under the lock of a conversation for a row that somebody else holds: `SHARED_LOCK_MS` in a batch of
    several, `ALONE_LOCK_MS` alone. In a transaction, that bounds what comes after it as well.
    """
    patience = ALONE_LOCK_MS if len(batch) == 1 else SHARED_LOCK_MS
    rows = await _fetched(db, batch, patience, passes_held=False)
    return [outcome for outcome in _outcomes(batch, rows) if not isinstance(outcome, Held)]


async def send_free(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored | Held]:
    """Do what `send` does, but wait for nothing that somebody holds: `HELD` stands for messages to conversations that
    are held, and for one that is alone and would wait longer than `SHARED_LOCK_MS` for another row. Of several, such a
    one raises LockNotAvailableError: ask for parts of them.

    Raises Slow if PostgreSQL ended the statement. It does so before the commit or not at all: nothing was stored. What
    the client gives up may have been stored (docs/decisions/0066).
    """
    try:
        try:
            rows = await _fetched(db, batch, SHARED_LOCK_MS, passes_held=True)
        except UniqueViolationError:  # an id was taken while it ran: another run sees it
            rows = await _fetched(db, batch, SHARED_LOCK_MS, passes_held=True)
    except QueryCanceledError:
        raise Slow from None
    except LockNotAvailableError:
        if len(batch) > 1:
            raise
        return [HELD]
    return _outcomes(batch, rows)


async def _fetched(db: Db, batch: Sequence[Outgoing], patience_ms: int, *, passes_held: bool) -> list[Record]:
    return await db.fetch(SEND, _encoded(batch), passes_held, f"{patience_ms}ms")


def _outcomes(batch: Sequence[Outgoing], rows: Sequence[Record]) -> list[Stored | NotStored | Held]:
    """Return the outcome of each message of a batch. One that has the id of an earlier one has no row."""
    outcomes: list[Stored | NotStored | Held] = [NotStored("changed")] * len(batch)
    for place, outcome, wait_ms, *stored in rows:
        if outcome == "stored":
            outcomes[place] = Stored(*stored)
        else:
            outcomes[place] = HELD if outcome == "held" else NotStored(outcome, wait_ms or 0)
    return outcomes


def _encoded(batch: Sequence[Outgoing]) -> str:
    """Return the messages as JSON, without those that have the id of an earlier one: the fields of the type
    `outgoing_message`.
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
            "poll_counts": item.poll_counts,
        }
        for place, item in first.values()
    ]
    return msgspec.json.encode(rows).decode()


class Earlier(NamedTuple):
    """The message that has the id of another one, and whether it is the same."""

    version: int
    created_at: datetime
    is_same: bool


# What was sent first is compared in its original words: an edit keeps them as its oldest row. A message that was
# forwarded is compared by where it came from, for that may say something else by now; of one that has expired nothing
# is left to compare.
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
    """Return the message that has the id of another one, in any conversation."""
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
    """Have slow mode count from a time at which a participant said something by another frame than `send`. Requires the
    conversation's lock.
    """
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
