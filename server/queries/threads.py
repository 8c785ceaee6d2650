"""Threads: their followers, read positions, and unread counts."""

from typing import NamedTuple

from protocol.ids import UserId
from protocol.server import ThreadFollowChanged
from protocol.values import ThreadFollow, ThreadView
from server.db.database import Db
from server.db.rows import Page, Reader, Undecoded
from server.queries.cursor import Cursor
from server.queries.messages import VISIBLE, MessageRef
from server.queries.moment import MOMENT
from server.queries.unread import COUNT_REPLIES, HAS_UNREAD_REPLY
from server.queries.users import MOVE_OWN

_view_decoder = Reader(ThreadView)
_follow_decoder = Reader(ThreadFollow)

MOST_LISTED, MOST_LOOKED_AT, MOST_PARTICIPANTS = 100, 1_000, 100
"""Max threads per page, max followed threads that a page considers, and max participants per thread."""

# `t` is the follower's row, or a substitute if there is none. `m` is the root. The rows of followers also record who
# has replied, so that a thread of 10,000 replies need not be read for that.
_VIEW = f"""json_build_object(
    'root', message_json(m),
    'follow', json_build_object('conversation_id', m.conversation_id, 'root_id', m.id,
        'is_following', t.is_following, 'last_read_order', t.last_read_order, 'user_version', t.user_version),
    'participants', ARRAY(
        SELECT o.user_id FROM thread_follow o
        WHERE o.root_id = m.id AND (o.conversation_id = m.conversation_id) IS TRUE AND o.has_replied
        ORDER BY o.user_id LIMIT {MOST_PARTICIPANTS}
    ),
    'unread_count', counted.unread,
    'last_reply', (
        SELECT message_json(n) FROM message n
        WHERE n.thread_root_id = m.id AND (n.conversation_id = m.conversation_id) IS TRUE AND NOT n.is_deleted
        ORDER BY n.thread_order DESC LIMIT 1
    )
)"""  # noqa: S608 - only column references and numbers are put in
GET = f"""
SELECT {_VIEW} FROM (
    SELECT m {VISIBLE}
) found (m)
CROSS JOIN LATERAL (SELECT (found.m).*) m
CROSS JOIN LATERAL (
    SELECT m.id AS root_id, m.conversation_id, $2::uuid AS user_id,
        coalesce(bool_or(f.is_following), false) AS is_following,
        coalesce(max(f.last_read_order), 0) AS last_read_order, coalesce(max(f.user_version), 0) AS user_version
    FROM thread_follow f WHERE f.root_id = m.id AND f.user_id = $2 AND (f.conversation_id = m.conversation_id) IS TRUE
) t
CROSS JOIN LATERAL ({COUNT_REPLIES.format(me="t")}) counted (unread)
"""  # noqa: S608 - as above


async def get(db: Db, ref: MessageRef, user_id: UserId) -> ThreadView | None:
    """Return the thread of a root. Return None without access to the root."""
    text = await db.fetchval(GET, ref.message_id, user_id, ref.conversation_id)
    return None if text is None else _view_decoder.decode(text)


# The threads of the page are selected first, so that replies are counted in these only.
LIST = f"""
SELECT {_VIEW}, {MOMENT.format(at="found.at")}, m.id FROM (
    SELECT t, m, newest.at
    FROM (
        SELECT * FROM thread_follow t WHERE t.user_id = $1 AND t.is_following
        ORDER BY t.root_id DESC LIMIT {MOST_LOOKED_AT}
    ) t
    JOIN message m ON m.id = t.root_id AND (m.conversation_id = t.conversation_id) IS TRUE
    CROSS JOIN LATERAL (
        SELECT visible_after(c, p) AS after FROM conversation c
        JOIN conversation_participant p ON p.conversation_id = t.conversation_id AND p.user_id = $1
            AND p.status = 'active'
        WHERE c.id = t.conversation_id AND NOT c.is_deleted OFFSET 0
    ) there
    CROSS JOIN LATERAL (
        SELECT n.created_at AS at FROM message n
        WHERE n.thread_root_id = m.id AND (n.conversation_id = m.conversation_id) IS TRUE
        ORDER BY n.thread_order DESC LIMIT 1
    ) newest
    WHERE m.sent_version > there.after AND m.thread_order > CASE WHEN $2 THEN t.last_read_order ELSE 0 END
        AND (NOT $2 OR {HAS_UNREAD_REPLY.format(me="t")})
        AND ($3::timestamptz IS NULL OR (newest.at, m.id) < ($3, $4::uuid))
    ORDER BY newest.at DESC, m.id DESC LIMIT {MOST_LISTED + 1}
) found
CROSS JOIN LATERAL (SELECT (found.m).*) m
CROSS JOIN LATERAL (SELECT (found.t).*) t
CROSS JOIN LATERAL ({COUNT_REPLIES.format(me="t")}) counted (unread)
ORDER BY found.at DESC, m.id DESC
"""  # noqa: S608 - as above


async def page(db: Db, user_id: UserId, before: Cursor | None, *, is_unread: bool) -> Undecoded[Page[ThreadView]]:
    """Return a page of the followed threads with replies, or with `is_unread` with unread ones, latest first. It covers
    the 1,000 threads with the newest roots.
    """
    rows = await db.fetch(LIST, user_id, is_unread, *(before or (None, None)))
    return _view_decoder.page(rows, MOST_LISTED, Cursor.of)


class FollowChange(NamedTuple):
    """A change of a follower's row. None leaves a column unchanged."""

    is_following: bool | None = None
    last_read_order: int | None = None


# The user is locked before the user's rows, as everywhere. A root is in no thread itself. By IS NULL, a plan for an
# empty table would read message_timeline_idx instead of finding the message by its id.
CHANGE = f"""
WITH root AS (
    SELECT m.id, m.conversation_id, m.thread_order {VISIBLE} AND coalesce(m.thread_root_id, m.id) = m.id
), touched AS (
    {MOVE_OWN} AND EXISTS (SELECT FROM root) RETURNING version
)
INSERT INTO thread_follow AS t (root_id, user_id, conversation_id, is_following, last_read_order, user_version)
SELECT root.id, $2, root.conversation_id, coalesce($4, false),
    least(coalesce($5, CASE WHEN $4 THEN root.thread_order END, 0), root.thread_order), touched.version
FROM root, touched
ON CONFLICT (root_id, user_id) DO UPDATE SET is_following = coalesce($4, t.is_following),
    last_read_order = greatest(t.last_read_order, CASE WHEN $5::integer IS NOT NULL THEN excluded.last_read_order END),
    user_version = excluded.user_version
RETURNING thread_json(t), t.user_version, xmax = 0
"""  # noqa: S608 - constants are put in


class FollowChanged(NamedTuple):
    """The event with the follower's row, and whether the row is new."""

    event: ThreadFollowChanged
    is_new: bool


async def change(db: Db, ref: MessageRef, user_id: UserId, change: FollowChange) -> FollowChanged | None:
    """Follow or unfollow a thread, or move the read position in it. Return None without access to the root."""
    row = await db.fetchrow(CHANGE, ref.message_id, user_id, ref.conversation_id, *change)
    if row is None:
        return None
    return FollowChanged(ThreadFollowChanged(user_version=row[1], follow=_follow_decoder.decode(row[0])), row[2])
