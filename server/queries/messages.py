"""Messages: sent in batches, edited, deleted, read in pages."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

import msgspec

from protocol.client import Edit, Send
from protocol.ids import ConversationId, EditId, MessageId, UserId
from protocol.server import MessagePage, OneMessage
from protocol.values import Json, Message, MessageEdit, Participant, SystemMessageType
from server.database import Db

_page_decoder = msgspec.json.Decoder(MessagePage)
_one_decoder = msgspec.json.Decoder(OneMessage)
_message_decoder = msgspec.json.Decoder(Message)
_participant_decoder = msgspec.json.Decoder(Participant)
_edits_decoder = msgspec.json.Decoder(list[MessageEdit])

NEWEST = 2**62
"""An anchor after every message."""


class Outgoing(msgspec.Struct, frozen=True):
    """A message on its way in: who sends what."""

    sender_id: UserId
    frame: Send


class Stored(NamedTuple):
    """Where and when a message was stored; the root and its count when it is a reply."""

    version: int
    created_at: datetime
    root_id: MessageId | None
    root_reply_count: int | None


# `(… = …) IS TRUE` says which conversation a row named by its id belongs to without offering that to the planner as
# a way to find it: while a table is nearly empty, walking through a conversation looks as cheap as going by the id,
# and the plan is kept (docs/decisions/0008). OFFSET 0 and ARRAY(…) keep the order of steps for the same reason.
#
# One statement for the whole batch. `wanted` are those that may be sent; the conversation's row is locked after
# that check, so whoever's access changed in between is left out (access_version) and asked about again.
SEND = """
WITH input AS (
    SELECT * FROM json_to_recordset($1) AS i (
        place integer, sender_id uuid, message_id uuid, conversation_id uuid, content text, content_type text,
        formatted_content text, mentions uuid[], metadata jsonb, parent_message_id uuid, has_waited boolean
    )
), wanted AS MATERIALIZED (
    SELECT i.*, allowed.access_version, coalesce(parent.thread_root_id, parent.id) AS root_id
    FROM input i
    CROSS JOIN LATERAL (
        SELECT c.access_version, visible_after(c, p) AS visible_after
        FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
        WHERE p.conversation_id = i.conversation_id AND p.user_id = i.sender_id AND p.status = 'active'
            AND may_send(c, p.role, i.has_waited)
            AND (c.type <> 'direct' OR may('write', i.sender_id,
                CASE WHEN c.direct_low = i.sender_id THEN c.direct_high ELSE c.direct_low END))
        OFFSET 0
    ) allowed
    LEFT JOIN LATERAL (
        SELECT m.id, m.thread_root_id FROM message m
        WHERE m.id = i.parent_message_id AND (m.conversation_id = i.conversation_id) IS TRUE AND NOT m.is_deleted
            AND m.sent_version > allowed.visible_after
        OFFSET 0
    ) parent ON true
    WHERE (i.parent_message_id IS NULL OR parent.id IS NOT NULL) AND NOT EXISTS (
        SELECT FROM message m
        WHERE m.id = i.message_id AND (m.conversation_id = i.conversation_id) IS TRUE OFFSET 0
    )
), locked AS MATERIALIZED (
    SELECT c.id, c.version, c.access_version
    FROM conversation c WHERE c.id = ANY(ARRAY(SELECT conversation_id FROM wanted))
    ORDER BY c.id
    FOR NO KEY UPDATE
), fresh AS MATERIALIZED (
    SELECT w.*, l.version + row_number() OVER (PARTITION BY w.conversation_id ORDER BY w.place) AS version,
        clock_timestamp() AS created_at
    FROM wanted w JOIN locked l ON l.id = w.conversation_id AND l.access_version = w.access_version
), bumped AS (
    UPDATE conversation c SET version = f.version, message_count = c.message_count + f.messages,
        last_message_at = f.created_at, last_activity_at = f.created_at
    FROM (
        SELECT conversation_id, max(version) AS version, count(*) AS messages, max(created_at) AS created_at
        FROM fresh GROUP BY conversation_id
    ) f
    WHERE c.id = f.conversation_id AND c.id = ANY(ARRAY(SELECT conversation_id FROM fresh))
), roots AS (
    UPDATE message m SET reply_count = m.reply_count + f.replies, version = f.version
    FROM (
        SELECT root_id, max(version) AS version, count(*) AS replies FROM fresh GROUP BY root_id
    ) f
    WHERE m.id = f.root_id AND m.id = ANY(ARRAY(SELECT root_id FROM fresh))
        AND (m.conversation_id = ANY(ARRAY(SELECT conversation_id FROM fresh))) IS TRUE
    RETURNING m.id, m.reply_count
), inserted AS (
    INSERT INTO message (id, conversation_id, sender_id, content, content_type, formatted_content, mentions,
        metadata, parent_message_id, thread_root_id, sent_version, version, created_at, updated_at)
    SELECT message_id, conversation_id, sender_id, content, content_type, formatted_content, mentions,
        metadata, parent_message_id, root_id, version, version, created_at, created_at
    FROM fresh
)
SELECT f.place, f.version, f.created_at, f.root_id, r.reply_count FROM fresh f LEFT JOIN roots r ON r.id = f.root_id
"""


async def send(db: Db, batch: Sequence[Outgoing], *, has_waited: bool = False) -> list[Stored | None]:
    """Store a batch, in order; None stands for each that was not stored: ask `existing` why. In slow mode that is
    everyone's for whom `has_waited` is not said.

    Raises UniqueViolationError, and stores none, if an id in it was taken while it ran.
    """
    rows = [
        {
            "place": place,
            "sender_id": item.sender_id,
            "message_id": item.frame.message_id,
            "conversation_id": item.frame.conversation_id,
            "content": item.frame.content,
            "content_type": item.frame.content_type,
            "formatted_content": item.frame.formatted_content,
            "mentions": item.frame.mentions,
            "metadata": item.frame.metadata,
            "parent_message_id": item.frame.parent_message_id,
            "has_waited": has_waited,
        }
        for place, item in enumerate(batch)
    ]
    stored: list[Stored | None] = [None] * len(batch)
    for place, version, created_at, root_id, replies in await db.fetch(SEND, msgspec.json.encode(rows).decode()):
        stored[place] = Stored(version, created_at, root_id, replies)
    return stored


class Existing(NamedTuple):
    """Why a message was not stored, as far as the sender may know: `obstacle` is the first of those below that is in
    its way.
    """

    obstacle: Literal["access", "archived", "role", "unwanted", "slow"] | None
    has_parent: bool
    version: int | None
    created_at: datetime | None
    is_same: bool


# What was sent first is compared in its original words: an edit keeps them as its oldest row.
EXISTING = """
SELECT
    CASE WHEN p.id IS NULL THEN 'access'
        WHEN c.is_archived THEN 'archived'
        WHEN NOT may_send(c, p.role, true) THEN 'role'
        WHEN c.type = 'direct' AND NOT may('write', $3,
            CASE WHEN c.direct_low = $3 THEN c.direct_high ELSE c.direct_low END) THEN 'unwanted'
        WHEN NOT may_send(c, p.role, false) THEN 'slow' END,
    $4::uuid IS NULL OR EXISTS (
        SELECT FROM message r WHERE r.id = $4 AND r.conversation_id = $2 AND NOT r.is_deleted
            AND r.sent_version > visible_after(c, p)
    ),
    m.sent_version,
    m.created_at,
    coalesce(m.conversation_id = $2 AND m.sender_id = $3
        AND coalesce(first.content, m.content) = $5
        AND (CASE WHEN first.id IS NULL THEN m.formatted_content ELSE first.formatted_content END)
            IS NOT DISTINCT FROM $6
        AND m.content_type = $7
        AND m.parent_message_id IS NOT DISTINCT FROM $4
        AND (m.is_deleted OR (m.mentions = $8 AND m.metadata IS NOT DISTINCT FROM $9::jsonb)), false)
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
    metadata = None if frame.metadata is None else msgspec.json.encode(frame.metadata).decode()
    row = await db.fetchrow(
        EXISTING, frame.message_id, frame.conversation_id, outgoing.sender_id, frame.parent_message_id,
        frame.content, frame.formatted_content, frame.content_type, frame.mentions, metadata,
    )  # fmt: skip
    assert row is not None  # noqa: S101 - the query always has one row
    return Existing(*row)


# In slow mode a participant's row is written for each message of theirs, and nowhere else.
WAIT = """
SELECT greatest(0, 1000 * ((c.settings ->> 'slow_mode_seconds')::int
    - extract(epoch FROM clock_timestamp() - p.last_sent_at)))::int
FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id
WHERE p.conversation_id = $1 AND p.user_id = $2
"""
WAITED = "UPDATE conversation_participant SET last_sent_at = $3 WHERE conversation_id = $1 AND user_id = $2"


async def send_slowly(db: Db, outgoing: Outgoing) -> Stored | int | None:
    """Store a message in slow mode; return the milliseconds that its sender has to wait instead, or None as `send`
    does. In a transaction.
    """
    about = outgoing.frame.conversation_id
    await db.execute(LOCK, about)
    if wait := await db.fetchval(WAIT, about, outgoing.sender_id):
        return int(wait)
    (stored,) = await send(db, [outgoing], has_waited=True)
    if stored is not None:
        await db.execute(WAITED, about, outgoing.sender_id, stored.created_at)
    return stored


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


VISIBLE = """FROM message m
JOIN conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.user_id = $2 AND p.status = 'active'
WHERE m.id = $1 AND (m.conversation_id = $3) IS TRUE AND m.sent_version > visible_after(c, p)"""
"""The message $1 of the conversation $3, if the user $2 takes part in it and may see that far back."""
WITHHELD = """CASE WHEN {message}.is_moderated AND ({message}.sender_id = $2
    OR can(p.role, 'moderator', p.can_delete_messages)) THEN {message}.content END"""
"""What a moderator has hidden, for the participant `p`, who is the user $2."""


class Place(Protocol):
    """What names a message: every frame about one does."""

    conversation_id: ConversationId
    message_id: MessageId


class Found(NamedTuple):
    """A message, the caller's part in its conversation, and whether there are people there who may not see it because
    they joined later, so that its words are not for everyone.
    """

    message: Message
    me: Participant
    is_from_before: bool


LOCK = "SELECT FROM conversation c WHERE c.id = $1 AND NOT c.is_deleted FOR NO KEY UPDATE"
FIND = f"""
SELECT message_json(m), participant_json(p),
    coalesce(c.settings ->> 'history' = 'from_joining', false) AND m.sent_version <= c.access_version
{VISIBLE}
"""


async def lock(db: Db, place: Place, user_id: UserId) -> Found | None:
    """Lock the conversation of a message, and then return the message as it is, deleted or not; None without access."""
    await db.execute(LOCK, place.conversation_id)
    row = await db.fetchrow(FIND, place.message_id, user_id, place.conversation_id)
    if row is None:
        return None
    return Found(_message_decoder.decode(row[0]), _participant_decoder.decode(row[1]), row[2])


GET = f"""
SELECT json_build_object(
    'type', 'message',
    'message', message_json(m),
    'withheld', {WITHHELD.format(message="m")},
    'mine', ARRAY(
        SELECT r.emoji FROM message_reaction r
        WHERE r.message_id = m.id AND (r.conversation_id = m.conversation_id) IS TRUE
            AND r.user_id = $2 AND NOT r.is_removed
        ORDER BY r.emoji
    ),
    'read_by', (
        SELECT count(*) FROM (
            SELECT FROM conversation_participant o
            WHERE o.conversation_id = m.conversation_id AND o.status = 'active'
                AND o.user_id <> m.sender_id AND o.last_read_version >= m.sent_version
            LIMIT 1000
        ) o
    )
)
{VISIBLE}
"""  # noqa: S608 - VISIBLE is a constant


async def get(db: Db, place: Place, user_id: UserId) -> OneMessage | None:
    """Return a message with the caller's reactions and how many have read it (at most 1,000 are counted)."""
    text = await db.fetchval(GET, place.message_id, user_id, place.conversation_id)
    return None if text is None else _one_decoder.decode(text)


# $3 is the anchor, whose place ($4 past it, or $4 itself when there is none) divides what is older from what
# is not. A participant gets at least one row, empty if need be: no row means no access.
PAGE = f"""
SELECT c.version, anchor.place, page.is_older, message_json(page.m), {WITHHELD.format(message="(page.m)")}, ARRAY(
    SELECT r.emoji FROM message_reaction r
    WHERE (page.m).reactions <> '{{}}' AND r.message_id = (page.m).id AND (r.conversation_id = $1) IS TRUE
        AND r.user_id = $2 AND NOT r.is_removed
    ORDER BY r.emoji
)
FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
CROSS JOIN LATERAL (
    SELECT $4::bigint + CASE WHEN $3::uuid IS NULL THEN 0
        ELSE (
            SELECT a.sent_version FROM message a
            WHERE a.id = $3 AND (a.conversation_id = $1) IS TRUE AND a.sent_version > visible_after(c, p)
        ) END AS place
) anchor
LEFT JOIN LATERAL (
    (SELECT m, true AS is_older FROM message m
        WHERE m.conversation_id = $1 AND m.sent_version < anchor.place AND m.sent_version > visible_after(c, p)
        ORDER BY m.sent_version DESC LIMIT $5)
    UNION ALL
    (SELECT m, false FROM message m
        WHERE m.conversation_id = $1 AND m.sent_version >= anchor.place AND m.sent_version > visible_after(c, p)
        ORDER BY m.sent_version LIMIT $6)
) page ON true
WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.status = 'active'
"""  # noqa: S608 - only column references are put in


class Span(NamedTuple):
    """Which messages: up to `older` before the anchor, and up to `newer` from it on (after it, if `is_after`)."""

    anchor: MessageId | None
    older: int
    newer: int
    is_after: bool = False


async def page(db: Db, conversation_id: ConversationId, user_id: UserId, span: Span) -> MessagePage | None:
    """Return the messages of `span`, oldest first; None without access.

    Raises LookupError if the anchor is not a message of the conversation.
    """
    offset = NEWEST if span.anchor is None else int(span.is_after)
    # One more than asked, on each side asked for, tells whether there is more.
    limits = [count and count + 1 for count in (span.older, span.newer)]
    rows = await db.fetch(PAGE, conversation_id, user_id, span.anchor, offset, *limits)
    if not rows:
        return None
    version, place = rows[0][:2]
    if place is None:
        raise LookupError
    older = [tuple(beside) for _, _, is_older, *beside in rows if is_older]
    newer = [tuple(beside) for _, _, is_older, *beside in rows if is_older is False]
    kept = older[: span.older][::-1] + newer[: span.newer]
    messages = [_message_decoder.decode(text) for text, _, _ in kept]
    return MessagePage(
        version=version,
        messages=messages,
        has_before=len(older) > span.older if span.older else span.anchor is not None,
        has_after=len(newer) > span.newer if span.newer else span.anchor is not None,
        mine={message.id: mine for message, (_, _, mine) in zip(messages, kept, strict=True) if mine},
        withheld={
            message.id: withheld
            for message, (_, withheld, _) in zip(messages, kept, strict=True)
            if withheld is not None
        },
    )


EDIT = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
), kept AS (
    INSERT INTO message_edit (id, conversation_id, message_id, content, formatted_content, edited_by, version)
    SELECT $3, $1, m.id, m.content, m.formatted_content, $4, b.version
    FROM message m, bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
)
UPDATE message m SET content = $5, formatted_content = $6, status = 'edited', edited_at = now(), edited_by = $4,
    version = b.version, updated_at = now()
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""


async def edit(db: Db, found: Message, user_id: UserId, frame: Edit, edit_id: EditId) -> Message:
    """Change what a message says, keep what it said, and return it as it is now. Under the lock.

    Raises UniqueViolationError if the edit's id is taken.
    """
    text = await db.fetchval(
        EDIT, found.conversation_id, found.id, edit_id, user_id, frame.content, frame.formatted_content
    )
    return _message_decoder.decode(text)


# What an edit made of the message is what the next edit kept, or what the message says now.
EDITED = """
SELECT e.version, e.message_id = $2 AND e.edited_by = $3
    AND coalesce(next.content, m.content) = $4
    AND (CASE WHEN next.id IS NULL THEN m.formatted_content ELSE next.formatted_content END) IS NOT DISTINCT FROM $5
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
        EDITED, frame.edit_id, frame.message_id, user_id, frame.content, frame.formatted_content, frame.conversation_id
    )
    return None if row is None else (row[0], row[1])


DELETE = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1, message_count = message_count - 1 WHERE id = $1 RETURNING version
), kept AS (
    INSERT INTO message_edit (id, conversation_id, message_id, content, formatted_content, edited_by, version)
    SELECT gen_random_uuid(), $1, m.id, m.content, m.formatted_content, $3, b.version
    FROM message m, bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
), unreacted AS (
    UPDATE message_reaction r SET is_removed = true, version = b.version
    FROM bumped b WHERE r.message_id = $2 AND (r.conversation_id = $1) IS TRUE AND NOT r.is_removed
), root AS (
    UPDATE message m SET reply_count = m.reply_count - 1, version = b.version
    FROM bumped b
    WHERE m.id = (SELECT d.thread_root_id FROM message d WHERE d.id = $2 AND (d.conversation_id = $1) IS TRUE)
        AND (m.conversation_id = $1) IS TRUE
    RETURNING m.reply_count
)
UPDATE message m SET content = '', formatted_content = NULL, mentions = '{}', hashtags = '{}', metadata = NULL,
    reactions = '{}', status = 'deleted', is_deleted = true, deleted_at = now(), deleted_by = $3,
    version = b.version, updated_at = now()
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m), (SELECT reply_count FROM root)
"""


async def delete(db: Db, found: Message, user_id: UserId) -> tuple[Message, int | None]:
    """Take a message's words away; return what is left, and the root's count if it was a reply. Under the lock."""
    row = await db.fetchrow(DELETE, found.conversation_id, found.id, user_id)
    assert row is not None  # noqa: S101 - the caller found it under the lock
    return _message_decoder.decode(row[0]), row[1]


EDITS = f"""
SELECT coalesce((
    SELECT json_agg(e ORDER BY e.version DESC) FROM (
        SELECT e.id, e.content, e.formatted_content, e.edited_by, e.edited_at, e.version
        FROM message_edit e
        WHERE e.message_id = m.id AND e.conversation_id = m.conversation_id ORDER BY e.version DESC LIMIT $4
    ) e
), '[]')
{VISIBLE} AND NOT m.is_deleted
    AND (NOT m.is_moderated OR m.sender_id = $2 OR can(p.role, 'moderator', p.can_delete_messages))
"""  # noqa: S608 - VISIBLE is a constant


async def edits(db: Db, place: Place, user_id: UserId, *, limit: int) -> list[MessageEdit] | None:
    """Return what a message said before, newest first; None without access, when it is deleted or hidden from them."""
    text = await db.fetchval(EDITS, place.message_id, user_id, place.conversation_id, limit)
    return None if text is None else _edits_decoder.decode(text)


COUNT_UNREAD = """
SELECT count(*) FILTER (WHERE NOT is_deleted AND NOT is_system_message AND sender_id <> {user}) FROM (
    SELECT n.is_deleted, n.is_system_message, n.sender_id FROM message n
    WHERE n.conversation_id = {conversation} AND n.sent_version > {read} ORDER BY n.sent_version DESC LIMIT 100
) newest
"""
"""Of the newest 100 messages past the read position, those that others wrote: bounded, however long one was away.
The names in braces are column references of the queries that embed it, never values."""
