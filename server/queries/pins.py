"""Pins, which all participants of a conversation see, and stars, which only their user sees."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from msgspec.structs import replace

from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_PINS
from protocol.server import MessageList, StarChanged
from protocol.values import Message, StarredMessage
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.cursor import Cursor
from server.queries.messages import VISIBLE, WITHHELD, At, MessageRef
from server.queries.moment import MOMENT
from server.queries.users import MOVE_OWN

_message_decoder = Reader(Message)

PIN = """
WITH bumped AS (
    UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING version
)
UPDATE message m SET is_pinned = $4, version = b.version, updated_at = now(),
    pinned_at = CASE WHEN $4 THEN now() END, pinned_by = CASE WHEN $4 THEN $3::uuid END
FROM bumped b WHERE m.id = $2 AND (m.conversation_id = $1) IS TRUE
RETURNING message_json(m)
"""
PINNED = "SELECT count(*) FROM message m WHERE m.conversation_id = $1 AND m.is_pinned"


async def pin(db: Db, found: Message, user_id: UserId, *, is_on: bool) -> Message:
    """Pin or unpin a message, and return it. Requires the conversation's lock."""
    return _message_decoder.decode(await db.fetchval(PIN, found.conversation_id, found.id, user_id, is_on))


async def count(db: Db, conversation_id: ConversationId) -> int:
    """Return the number of pinned messages in a conversation. Requires the conversation's lock."""
    return int(await db.fetchval(PINNED, conversation_id))


# A participant gets a row even without pins. The redundant conditions leave the planner only the index of pins, even
# while it is empty (docs/decisions/0008).
LIST = f"""
SELECT CASE WHEN (pinned.m).id IS NOT NULL THEN message_json(pinned.m) END,
    {MOMENT.format(at="(pinned.m).pinned_at")}, (pinned.m).id,
    {WITHHELD.format(message="(pinned.m)")}, c.version
FROM conversation_participant p
JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
LEFT JOIN LATERAL (
    SELECT m FROM message m
    WHERE m.conversation_id = $1 AND m.is_pinned AND m.pinned_at > '-infinity'
        AND (m.sent_version > visible_after(c, p)) IS TRUE
        AND ($3::timestamptz IS NULL OR (m.pinned_at, m.id) < ($3, $4::uuid))
    ORDER BY m.pinned_at DESC, m.id DESC LIMIT {MAX_PINS + 1}
) pinned ON true
WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.status = 'active'
ORDER BY (pinned.m).pinned_at DESC, (pinned.m).id DESC
"""  # noqa: S608 - only column references and a number are put in


async def page(
    db: Db, conversation_id: ConversationId, user_id: UserId, before: Cursor | None
) -> Undecoded[MessageList] | None:
    """Return a page of pinned messages, latest first. Return None without access."""
    rows = await db.fetch(LIST, conversation_id, user_id, *(before or (None, None)))
    if not rows:
        return None
    found = _list([row for row in rows if row[0] is not None], MAX_PINS)
    return found.then(lambda page: replace(page, version=rows[0][4]))


def _list(rows: Sequence[Any], limit: int) -> Undecoded[MessageList]:
    """Return a page from the rows of `LIST` or `STARS`."""

    def of(page: Page[Message]) -> MessageList:
        shown = {message.id for message in page.rows}
        return MessageList(
            messages=page.rows,
            withheld={one: withheld for _, _, one, withheld, _ in rows if withheld and one in shown},
            after=page.after,
        )

    return _message_decoder.page(rows, limit, Cursor.of).then(of)


# The user is locked before the user's rows, as everywhere. Removing a star needs no access to the message.
STAR = f"""
WITH seen AS (SELECT m.id, m.conversation_id {VISIBLE} AND NOT m.is_deleted),
touched AS (
    {MOVE_OWN} AND EXISTS (SELECT FROM seen) AND NOT EXISTS (
        SELECT FROM message_star s WHERE s.user_id = $2 AND s.message_id = $1 AND NOT s.is_removed
    ) RETURNING version
), starred AS (
    INSERT INTO message_star AS s (user_id, message_id, conversation_id, user_version)
    SELECT $2, seen.id, seen.conversation_id, t.version FROM seen, touched t
    ON CONFLICT (user_id, message_id) DO UPDATE SET is_removed = false, user_version = excluded.user_version,
        starred_at = now()
    RETURNING s.user_version, s.starred_at
)
SELECT starred.* FROM seen LEFT JOIN starred ON true
"""  # noqa: S608 - constants are put in
UNSTAR = f"""
WITH touched AS (
    {MOVE_OWN} AND EXISTS (
        SELECT FROM message_star s WHERE s.user_id = $2 AND s.message_id = $1 AND NOT s.is_removed
    ) RETURNING version
)
UPDATE message_star s SET is_removed = true, user_version = t.version FROM touched t
WHERE s.user_id = $2 AND s.message_id = $1
RETURNING s.user_version, s.starred_at, s.conversation_id
"""  # noqa: S608 - MOVE_OWN is a constant


class Starred(NamedTuple):
    """The event of a change of a star, or None if nothing changed."""

    event: StarChanged | None


async def star(db: Db, ref: MessageRef, user_id: UserId) -> Starred | None:
    """Star a message. Return None, without an effect, without access."""
    row = await db.fetchrow(STAR, ref.message_id, user_id, ref.conversation_id)
    return None if row is None else Starred(None if row[0] is None else _changed(ref, *row, is_removed=False))


async def unstar(db: Db, ref: MessageRef, user_id: UserId) -> Starred:
    """Remove a star, if there is one."""
    row = await db.fetchrow(UNSTAR, ref.message_id, user_id)
    if row is None:
        return Starred(None)
    version, starred_at, conversation_id = row
    return Starred(_changed(At(conversation_id, ref.message_id), version, starred_at, is_removed=True))


def _changed(ref: MessageRef, version: int, starred_at: datetime, *, is_removed: bool) -> StarChanged:
    star = StarredMessage(
        conversation_id=ref.conversation_id, message_id=ref.message_id, is_removed=is_removed, starred_at=starred_at,
        user_version=version,
    )  # fmt: skip
    return StarChanged(user_version=version, star=star)


STARS = f"""
SELECT message_json(seen.m), {MOMENT.format(at="s.starred_at")}, s.message_id, seen.withheld, s.user_version
FROM message_star s
CROSS JOIN LATERAL (
    SELECT m, {WITHHELD.format(message="m")} AS withheld FROM message m
    JOIN conversation c ON c.id = s.conversation_id AND NOT c.is_deleted
    JOIN conversation_participant p ON p.conversation_id = s.conversation_id AND p.user_id = $2 AND p.status = 'active'
    WHERE m.id = s.message_id AND (m.conversation_id = s.conversation_id) IS TRUE AND NOT m.is_deleted
        AND m.sent_version > visible_after(c, p)
    OFFSET 0
) seen
WHERE s.user_id = $2 AND NOT s.is_removed
    AND ($1::timestamptz IS NULL OR (s.starred_at, s.message_id) < ($1, $4::uuid))
ORDER BY s.starred_at DESC, s.message_id DESC LIMIT $3
"""  # noqa: S608 - only column references are put in


async def stars(db: Db, user_id: UserId, before: Cursor | None, *, limit: int) -> Undecoded[MessageList]:
    """Return up to `limit` starred messages that a user may see, latest first."""
    rows = await db.fetch(STARS, before and before.at, user_id, limit + 1, before and before.id)
    versions = {row[2]: row[4] for row in rows}
    found = _list(rows, limit)
    return found.then(lambda page: replace(page, star_versions={one.id: versions[one.id] for one in page.messages}))
