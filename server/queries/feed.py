"""The feed: what concerns somebody, computed from the rows that say it. Nothing is kept, so nothing can drift."""

from collections.abc import Sequence
from datetime import datetime

from protocol.ids import UserId
from protocol.limits import MAX_COUNTED
from protocol.values import FeedEntry, FeedKind
from server.cursor import Cursor
from server.database import Db
from server.queries.moment import MOMENT
from server.queries.unread import SILENCES
from server.rows import Page, Reader

_entry_decoder = Reader(FeedEntry)

KINDS: tuple[FeedKind, ...] = ("mention", "reply", "reaction", "friend_request", "invitation")
THREADS = 500
"""Of how many of the threads that one follows, the newest ones, replies are in the feed."""

SEARCHED = 200
"""Max conversations that a search or the feed looks through: those that were active last. Each is named in what the
index of words is asked, and compared with each message: naming thousands took longer than a search may.
"""
LATEST = f"""
    SELECT p.conversation_id, p.role FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND NOT c.is_deleted
    WHERE p.user_id = {{user}} AND p.status = 'active' {{also}}
    ORDER BY c.last_activity_at DESC, c.id DESC LIMIT {SEARCHED}
"""  # noqa: S608 - a number is put in
"""Those conversations of a user."""
MENTIONS_ME = f"""(
    SELECT coalesce(string_agg(
        format('(''m:everyone'' | ''m:%s'') & (%s)', r.role, r.there), ' | '
    ), '''nowhere''')::tsquery || format('''m:%s''', {{user}}::uuid)::tsquery
    FROM (
        SELECT p.role, string_agg(format('''c:%s''', p.conversation_id), ' | ') AS there
        FROM ({LATEST.format(user="{user}", also="")}) p GROUP BY p.role
    ) r
)"""  # noqa: S608 - constants are put in
"""What finds messages that mention a user: by id anywhere, or with everyone, or with their role, in the latest."""

# By key, for each row: joined, all of the user's conversations would be compared with each.
_SEEN_AFTER = """
    SELECT visible_after(c, p) AS after FROM conversation c
    JOIN conversation_participant p ON p.conversation_id = {at} AND p.user_id = $1 AND p.status = 'active'
    WHERE c.id = {at} AND NOT c.is_deleted OFFSET 0
"""
# $1 is the user, $2 the kinds, $3 and $4 where the page before ended, $5 the time after which, $6 how many at most.
# Each branch goes by an index and brings at most as many as are asked for.
ROWS = f"""
    (SELECT 'mention' AS kind, s.created_at AS at, s.message_id AS key, seen.sender_id AS user_id, s.conversation_id,
        seen.message, NULL::text AS emoji
    FROM (
        SELECT s.message_id, s.conversation_id, s.created_at FROM message_search s
        WHERE 'mention' = ANY($2) AND s.words @@ {MENTIONS_ME.format(user="$1")}
            AND s.created_at > $5 AND ($3::timestamptz IS NULL OR (s.created_at, s.message_id) < ($3, $4::uuid))
        ORDER BY s.created_at DESC, s.message_id DESC
    ) s
    CROSS JOIN LATERAL (
        SELECT m.sender_id, m AS message FROM message m
        JOIN conversation c ON c.id = s.conversation_id AND NOT c.is_deleted
        JOIN conversation_participant p ON p.conversation_id = s.conversation_id AND p.user_id = $1
            AND p.status = 'active'
        WHERE m.id = s.message_id AND (m.conversation_id = s.conversation_id) IS TRUE
            AND m.sender_id <> $1 AND m.sent_version > visible_after(c, p)
            AND NOT {SILENCES.format(me="$1", them="m.sender_id")}
        OFFSET 0
    ) seen
    ORDER BY s.created_at DESC, s.message_id DESC LIMIT $6)
    UNION ALL
    (SELECT 'reply', n.created_at, n.id, n.sender_id, n.conversation_id, n.message, NULL
    FROM (
        SELECT * FROM thread_follow t WHERE t.user_id = $1 AND t.is_following ORDER BY t.root_id DESC LIMIT {THREADS}
    ) t
    CROSS JOIN LATERAL ({_SEEN_AFTER.format(at="t.conversation_id")}) there
    CROSS JOIN LATERAL (
        SELECT n.created_at, n.id, n.sender_id, n.conversation_id, n.sent_version, n AS message FROM message n
        WHERE n.thread_root_id = t.root_id AND (n.conversation_id = t.conversation_id) IS TRUE AND n.created_at > $5
            AND ($3::timestamptz IS NULL OR (n.created_at, n.id) < ($3, $4::uuid))
            AND n.sender_id <> $1 AND NOT n.is_deleted AND NOT n.is_moderated AND NOT $1 = ANY(n.mentions)
            AND NOT {SILENCES.format(me="$1", them="n.sender_id")}
        ORDER BY n.thread_order DESC LIMIT $6
    ) n
    WHERE 'reply' = ANY($2) AND n.sent_version > there.after
    ORDER BY n.created_at DESC, n.id DESC LIMIT $6)
    UNION ALL
    (SELECT 'reaction', r.created_at, r.message_id, r.user_id, r.conversation_id, seen.m, r.emoji
    FROM message_reaction r
    CROSS JOIN LATERAL ({_SEEN_AFTER.format(at="r.conversation_id")}) there
    CROSS JOIN LATERAL (
        SELECT m FROM message m WHERE m.id = r.message_id AND (m.conversation_id = r.conversation_id) IS TRUE
            AND NOT m.is_deleted AND m.sent_version > there.after OFFSET 0
    ) seen
    WHERE 'reaction' = ANY($2) AND r.author_id = $1 AND NOT r.is_removed AND r.created_at > $5
        AND ($3::timestamptz IS NULL OR (r.created_at, r.message_id) < ($3, $4::uuid))
        AND r.user_id <> $1
        AND NOT {SILENCES.format(me="$1", them="r.user_id")}
    ORDER BY r.created_at DESC, r.message_id DESC LIMIT $6)
    UNION ALL
    (SELECT 'friend_request', r.updated_at, r.id, r.from_user_id, NULL, NULL, NULL
    FROM user_relationship r
    WHERE 'friend_request' = ANY($2) AND r.to_user_id = $1 AND r.type = 'friend' AND r.status = 'pending'
        AND r.updated_at > $5 AND ($3::timestamptz IS NULL OR (r.updated_at, r.id) < ($3, $4::uuid))
        AND NOT {SILENCES.format(me="$1", them="r.from_user_id")}
    ORDER BY r.updated_at DESC, r.id DESC LIMIT $6)
    UNION ALL
    (SELECT 'invitation', p.joined_at, p.conversation_id, coalesce(p.invited_by, p.user_id), p.conversation_id,
        NULL, NULL
    FROM conversation_participant p
    JOIN conversation c ON c.id = p.conversation_id AND c.is_active AND NOT c.is_deleted
    WHERE 'invitation' = ANY($2) AND p.user_id = $1 AND p.status = 'invited'
        AND p.joined_at > $5 AND ($3::timestamptz IS NULL OR (p.joined_at, p.conversation_id) < ($3, $4::uuid))
        AND NOT {SILENCES.format(me="$1", them="p.invited_by")}
    ORDER BY p.joined_at DESC, p.conversation_id DESC LIMIT $6)
    ORDER BY at DESC, key DESC LIMIT $6
"""  # noqa: S608 - only constants are put in
_AT = MOMENT.format(at="e.at")
PAGE = f"""
SELECT json_build_object('kind', e.kind, 'at', e.at, 'user_id', e.user_id,
    'conversation_id', e.conversation_id, 'emoji', e.emoji,
    'message', CASE WHEN e.kind IN ('mention', 'reply', 'reaction') THEN message_json(e.message) END), {_AT}, e.key
FROM ({ROWS}) e ORDER BY e.at DESC, e.key DESC
"""  # noqa: S608 - as above
COUNT = f"SELECT count(*) FROM ({ROWS}) e"  # noqa: S608 - as above
SEEN_AT = """SELECT coalesce(u.feed_seen_at, '-infinity') FROM "user" u WHERE u.id = $1"""


async def page(
    db: Db, user_id: UserId, kinds: Sequence[FeedKind], before: Cursor | None, *, limit: int
) -> Page[FeedEntry]:
    """Return up to `limit` entries of these kinds, the latest first. In a transaction for searching."""
    at, key = before or (None, None)
    rows = await db.fetch(PAGE, user_id, list(kinds), at, key, _EVER, limit + 1)
    return _entry_decoder.page(rows, limit, Cursor.of)


_EVER = datetime.fromisoformat("0001-01-02T00:00:00+00:00")


async def unseen(db: Db, user_id: UserId) -> int:
    """Return how many entries are newer than what the user has seen, up to 100. In a transaction for searching."""
    since = await db.fetchval(SEEN_AT, user_id)
    return int(await db.fetchval(COUNT, user_id, list(KINDS), None, None, since or _EVER, MAX_COUNTED))


SEE = """
UPDATE "user" SET feed_seen_at = greatest(feed_seen_at, least($2::timestamptz, now())), version = version + 1,
    own_version = version + 1
WHERE id = $1 AND is_active AND coalesce(feed_seen_at < least($2, now()), true)
"""


async def see(db: Db, user_id: UserId, up_to: datetime) -> None:
    """Note that a user has seen the feed up to a time, which only moves forward."""
    await db.execute(SEE, user_id, up_to)
