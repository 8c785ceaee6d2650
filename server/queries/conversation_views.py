"""Conversations as one participant sees them, by id or in pages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from protocol.ids import ConversationId, UserId
from protocol.values import ConversationType, ConversationView
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded, fitting
from server.queries.cursor import Cursor
from server.queries.unread import COUNT_UNREAD

_view_decoder = Reader(ConversationView)

VIEW = f"""json_build_object(
    'conversation', conversation_json(c),
    'version', c.version,
    'me', participant_json(me),
    'peer_id', CASE WHEN c.direct_low = me.user_id THEN c.direct_high ELSE c.direct_low END,
    'last_message', (
        SELECT message_json(l) FROM message l
        WHERE l.conversation_id = c.id AND l.sent_version > visible_after(c, me)
            AND (l.thread_root_id IS NULL OR l.also_in_conversation)
        ORDER BY l.sent_version DESC LIMIT 1
    ),
    'unread_count', CASE WHEN c.version <= coalesce(me.unread_from_version - 1, me.last_read_version) THEN 0 ELSE (
        {COUNT_UNREAD.format(me="me")}
    ) END,
    'last_read_message_id', me.last_read_message_id,
    'last_read_revision', me.last_read_version,
    'last_activity_at', c.last_activity_at,
    'preferences', preferences_json(me),
    'invite', CASE WHEN c.invite_code IS NOT NULL AND can(me.role, 'admin', me.can_add_members) THEN json_build_object(
        'code', c.invite_code, 'expires_at', c.invite_expires_at, 'uses_left', c.invite_uses_left
    ) END
)"""  # noqa: S608 - only column references are put in
"""A `ConversationView` of protocol/values.py, for the conversation `c` and the participant `me`."""

# Each conversation is looked up by its own keys. By `conversation_id = ANY($2)`, PostgreSQL 15 reads all of the user's
# rows in each statement, if its plan is from a time when there were few.
GET = f"""
SELECT found.view FROM unnest($2::uuid[]) WITH ORDINALITY AS wanted (id, place)
CROSS JOIN LATERAL (
    SELECT {VIEW} AS view
    FROM conversation_participant me JOIN conversation c ON c.id = me.conversation_id AND NOT c.is_deleted
    WHERE me.user_id = $1 AND me.conversation_id = wanted.id AND me.status = 'active' OFFSET 0
) found
ORDER BY wanted.place
"""  # noqa: S608 - VIEW is a constant


async def get(db: Db, user_id: UserId, conversation_ids: Sequence[ConversationId]) -> list[ConversationView]:
    """Return the given conversations in which the user participates. The caller gives a few."""
    return _view_decoder.few(row[0] for row in await db.fetch(GET, user_id, list(conversation_ids)))


async def parts(
    db: Db, user_id: UserId, conversation_ids: Sequence[ConversationId]
) -> Undecoded[list[list[ConversationView]]]:
    """Return the given conversations in which the user participates, in their order, in parts that fit a page."""
    rows = await db.fetch(GET, user_id, list(conversation_ids))

    def of(read: list[tuple[ConversationView, Any]]) -> list[list[ConversationView]]:
        kept = []
        while read:
            count = fitting(columns for _, columns in read)
            kept.append([view for view, _ in read[:count]])
            del read[:count]
        return kept

    return _view_decoder.beside(rows).then(of)


class Filter(NamedTuple):
    """Selects conversations of a user. `before` is the last activity and the id of the previous page's last one."""

    type: ConversationType | None = None
    is_archived: bool | None = None
    is_hidden: bool | None = None
    before: Cursor | None = None


# The participant's row is passed along, because a join might search all of the user's rows for it. OFFSET 0 makes the
# planner start from the user's rows. It would begin with all conversations of the server where the tables are analyzed.
ACTIVE_AT = "greatest(least(c.last_activity_at, '9999-12-30'), '0001-01-02')"
"""When a conversation was last active, within the range of a page. A restored row may have any time."""
PAGE = f"""
SELECT {VIEW}, {ACTIVE_AT}, c.id
FROM (
    SELECT c.c, p FROM conversation_participant p
    CROSS JOIN LATERAL (
        SELECT c, {ACTIVE_AT} AS active_at FROM conversation c WHERE c.id = p.conversation_id AND NOT c.is_deleted
            AND ($3::text IS NULL OR c.type = $3) AND ($4::boolean IS NULL OR c.is_archived = $4)
            AND ($6::timestamptz IS NULL OR ({ACTIVE_AT}, c.id) < ($6, $7::uuid)) OFFSET 0
    ) c
    WHERE p.user_id = $1 AND p.status = 'active' AND ($5::boolean IS NULL OR p.is_hidden = $5)
    ORDER BY c.active_at DESC, p.conversation_id DESC
    LIMIT $2
) listed
CROSS JOIN LATERAL (SELECT (listed.c).*) c
CROSS JOIN LATERAL (SELECT (listed.p).*) me
ORDER BY {ACTIVE_AT} DESC, c.id DESC
"""  # noqa: S608 - VIEW is a constant


async def page(db: Db, user_id: UserId, which: Filter, *, limit: int) -> Undecoded[Page[ConversationView]]:
    """Return up to `limit` of the user's conversations, most recently active first."""
    before = which.before or (None, None)
    rows = await db.fetch(PAGE, user_id, limit + 1, which.type, which.is_archived, which.is_hidden, *before)
    return _view_decoder.page(rows, limit, Cursor.of)


ORDER = """
SELECT p.conversation_id FROM conversation_participant p CROSS JOIN LATERAL (
    SELECT c.last_activity_at FROM conversation c WHERE c.id = p.conversation_id AND NOT c.is_deleted OFFSET 0
) c
WHERE p.user_id = $1 AND p.status = 'active' ORDER BY c.last_activity_at DESC, p.conversation_id DESC
"""


async def order(db: Db, user_id: UserId) -> list[ConversationId]:
    """Return all of a user's conversations, most recently active first."""
    return [ConversationId(row[0]) for row in await db.fetch(ORDER, user_id)]
