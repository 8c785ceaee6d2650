"""The feed of a user, computed from other rows. Nothing is stored, so nothing can become inconsistent."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Self
from uuid import UUID

from protocol.client import ListFeed
from protocol.ids import UserId
from protocol.limits import MAX_COUNTED
from protocol.server import FeedPage, MeChanged
from protocol.values import FeedEntry, FeedKind
from server.db.database import IN_ORDER, Db
from server.db.lock_timeouts import BRIEFLY
from server.db.rows import Reader, Undecoded
from server.queries import latest
from server.queries.cursor import moment_of, not_a_cursor
from server.queries.latest import Latest
from server.queries.moment import MOMENT
from server.queries.unread import SILENCES
from server.queries.users import decoded_me

_entry_decoder = Reader(FeedEntry)

KINDS: tuple[FeedKind, ...] = ("mention", "reply", "reaction", "friend_request", "invitation")
THREADS = 500
"""Max threads whose replies are in the feed. They are those with the newest roots among the threads that the user
follows.
"""
NEWEST = 100
"""Max mentions of everyone per conversation, and max replies per thread, that a page considers, the newest first."""
PROBED = 20
"""Max of these among which a page looks for one that the user sees, before it considers the others. Otherwise silenced
users could make each page read `NEWEST` messages of each conversation.
"""
CONSIDERED = 500
"""Max reactions, friend requests and invitations that a page considers, the newest first."""

# Read by key for each row. A join would compare all of the user's conversations with each row.
_SEEN_AFTER = """
    SELECT visible_after(c, p) AS after FROM conversation c
    JOIN conversation_participant p ON p.conversation_id = {at} AND p.user_id = $1 AND p.status = 'active'
    WHERE c.id = {at} AND NOT c.is_deleted OFFSET 0
"""
_BEFORE = """{at} > $5 AND ({at}, {key}) < (coalesce($3::timestamptz, 'infinity'),
        coalesce($4, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid))"""
"""After the time $5 and before the end of the previous page, by an index on both columns."""
_FOR_ME = f"""n.sender_id <> $1 AND NOT $1 = ANY(n.mentions) AND NOT n.is_deleted AND NOT n.is_moderated
            AND n.sent_version > l.after AND NOT {SILENCES.format(me="$1", them="n.sender_id")}"""
# Up to `depth` messages of a place `l` are read, and those for the user returned, latest first.
_LOUD = f"""
        SELECT n.created_at, n.id, n.sender_id FROM (
            SELECT * FROM message n
            WHERE n.conversation_id = l.conversation_id AND n.loud_mentions <> '{{{{}}}}'
                AND {_BEFORE.format(at="n.created_at", key="n.id")}
            ORDER BY n.created_at DESC, n.id DESC LIMIT {{depth}}
        ) n
        WHERE ('everyone' = ANY(n.loud_mentions) OR l.role = ANY(n.loud_mentions)) AND {_FOR_ME}
        ORDER BY n.created_at DESC, n.id DESC
"""  # noqa: S608 - constants are put in
_REPLIES = f"""
        SELECT n.created_at, n.id, n.sender_id FROM (
            SELECT * FROM (
                SELECT * FROM message n
                WHERE n.thread_root_id = l.root_id AND (n.conversation_id = l.conversation_id) IS TRUE
                ORDER BY n.thread_order DESC LIMIT {NEWEST}
            ) n
            WHERE {_BEFORE.format(at="n.created_at", key="n.id")} ORDER BY n.thread_order DESC LIMIT {{depth}}
        ) n
        WHERE {_FOR_ME} ORDER BY n.thread_order DESC
"""  # noqa: S608 - constants are put in
_MENTIONS_AT = """
        SELECT * FROM unnest($7::uuid[], $8::text[], $9::bigint[]) AS l (conversation_id, role, after)
        WHERE 'mention' = ANY($2)
"""
# A thread whose newest reply is too old is not read further.
_THREADS = f"""
        SELECT t.root_id, t.conversation_id, there.after FROM (
            SELECT t.root_id, t.conversation_id FROM thread_follow t
            WHERE 'reply' = ANY($2) AND t.user_id = $1 AND t.is_following ORDER BY t.root_id DESC LIMIT {THREADS}
        ) t CROSS JOIN LATERAL (
            SELECT FROM (
                SELECT n.created_at FROM message n
                WHERE n.thread_root_id = t.root_id AND (n.conversation_id = t.conversation_id) IS TRUE
                ORDER BY n.thread_order DESC LIMIT 1
            ) n WHERE n.created_at > $5 OFFSET 0
        ) recent CROSS JOIN LATERAL ({_SEEN_AFTER.format(at="t.conversation_id")}) there
"""  # noqa: S608 - constants are put in
# The latest message of each place decides which places are read further, at most as many as the page has entries.
_LISTED = """
    (SELECT {kind}, n.created_at, n.id, n.sender_id, l.conversation_id, NULL::text
    FROM (
        SELECT l.* FROM ({places}) l CROSS JOIN LATERAL ({probed} LIMIT 1) n
        ORDER BY n.created_at DESC, n.id DESC LIMIT $6
    ) l CROSS JOIN LATERAL ({newest} LIMIT $6) n
    ORDER BY n.created_at DESC, n.id DESC LIMIT $6)
"""
# A count needs no order, so it ends when there are enough.
_COUNTED = """
    (SELECT {kind}, n.created_at, n.id, n.sender_id, l.conversation_id, NULL::text
    FROM (
        SELECT l.* FROM ({places}) l CROSS JOIN LATERAL ({probed} LIMIT 1) n OFFSET 0
    ) l CROSS JOIN LATERAL ({newest} LIMIT $6) n
    LIMIT $6)
"""


def _of_places(query: str, kind: FeedKind, places: str, messages: str) -> str:
    """Return a branch of `_entries`, about messages of conversations or threads."""
    probed, newest = messages.format(depth=PROBED), messages.format(depth=NEWEST)
    return query.format(kind=f"'{kind}'", places=places, probed=probed, newest=newest)


# Parts in which mentions by name are looked for: from the first to the last day, counted back, by periods of days.
_PARTS = (
    ("-1", "0", 1), ("1", "1", 1), ("2", "2", 1), ("3", "3", 1), ("4", "5", 1), ("6", "7", 1), ("8", "11", 1),
    ("12", "15", 1), ("16", "23", 1), ("24", "31", 1), ("32", "63", 32), ("64", "127", 32), ("128", "255", 32),
    ("256", "511", 32), ("512", "1023", 32), ("1024", "day.top", 1_024),
)  # fmt: skip
_PART = f"""
    (SELECT s.message_id, s.conversation_id, s.created_at FROM message_search s
    WHERE has_mentions(s.words) AND mention_days(s.words, s.created_at) && ARRAY(
        SELECT $1::uuid || '/{{days}}/' || period FROM generate_series(
            greatest(day.top - {{last}}, day.bottom) / {{days}}, (day.top - {{first}}) / {{days}}
        ) period
    ) AND (
        s.created_at >= to_timestamp((day.top - {{last}}) * 86400)
        AND s.created_at < to_timestamp((day.top - {{first}} + 1) * 86400)
        AND {_BEFORE.format(at="s.created_at", key="s.message_id")}
    ) IS TRUE ORDER BY s.created_at DESC, s.message_id DESC)
"""  # noqa: S608 - constants are put in
# Mentions of the user $1 by name, latest first. Only this uses the search index, which has no order. So it reads the
# mentions of a few days, and of more if these do not suffice. PostgreSQL reads the parts one after the other. `IS TRUE`
# keeps the planner from another index, which it would read whole.
NAMED = f"""
SELECT s.created_at, s.message_id, seen.sender_id, s.conversation_id
FROM (
    SELECT day_number(least(now(), $3::timestamptz)) AS top,
        day_number(greatest($5::timestamptz, '1970-01-01')) AS bottom
) day CROSS JOIN LATERAL (
    {" UNION ALL ".join(_PART.format(first=first, last=last, days=days) for first, last, days in _PARTS)}
) s
CROSS JOIN LATERAL (
    SELECT m.sender_id FROM message m
    JOIN conversation c ON c.id = s.conversation_id AND NOT c.is_deleted
    JOIN conversation_participant p ON p.conversation_id = s.conversation_id AND p.user_id = $1
        AND p.status = 'active'
    WHERE m.id = s.message_id AND (m.conversation_id = s.conversation_id) IS TRUE
        AND m.sender_id <> $1 AND m.sent_version > visible_after(c, p)
        AND NOT {SILENCES.format(me="$1", them="m.sender_id")}
    OFFSET 0
) seen
WHERE 'mention' = ANY($2) LIMIT $6
"""  # noqa: S608 - constants are put in


# $1 is the user, and $2 the kinds. The previous page ended at $3 and $4. The min time is $5, and the limit is $6. The
# conversations whose mentions of everyone count are in $7 to $9. The result of NAMED is in $10 to $13. Each branch
# reads an index, latest first, and stops at the limit. A branch without its kind in $2 reads nothing. A message that
# mentions the user is not also a reply. The end of a page could not distinguish two entries with equal time and id.
def _entries(of_places: str) -> str:
    """Return a query for entries of all kinds, of which two may be equal. `of_places` is for `_of_places`."""
    return f"""
    (SELECT 'mention' AS kind, n.at, n.key, n.user_id, n.conversation_id, NULL::text AS emoji
    FROM unnest($10::timestamptz[], $11::uuid[], $12::uuid[], $13::uuid[]) AS n (at, key, user_id, conversation_id)
    WHERE n.at > $5)
    UNION ALL
    {_of_places(of_places, "mention", _MENTIONS_AT, _LOUD)}
    UNION ALL
    {_of_places(of_places, "reply", _THREADS, _REPLIES)}
    UNION ALL
    (SELECT 'reaction', r.created_at, r.message_id, r.user_id, r.conversation_id, r.emoji
    FROM (
        SELECT r.created_at, r.message_id, r.user_id, r.conversation_id, r.emoji FROM message_reaction r
        WHERE 'reaction' = ANY($2) AND r.author_id = $1 AND NOT r.is_removed AND r.user_id <> $1
            AND {_BEFORE.format(at="r.created_at", key="r.message_id")}
        ORDER BY r.created_at DESC, r.message_id DESC LIMIT {CONSIDERED}
    ) r
    CROSS JOIN LATERAL ({_SEEN_AFTER.format(at="r.conversation_id")}) there
    CROSS JOIN LATERAL (
        SELECT FROM message m WHERE m.id = r.message_id AND (m.conversation_id = r.conversation_id) IS TRUE
            AND NOT m.is_deleted AND m.sent_version > there.after OFFSET 0
    ) seen
    WHERE NOT {SILENCES.format(me="$1", them="r.user_id")}
    ORDER BY r.created_at DESC, r.message_id DESC LIMIT $6)
    UNION ALL
    (SELECT 'friend_request', r.updated_at, r.id, r.from_user_id, NULL, NULL
    FROM (
        SELECT r.updated_at, r.id, r.from_user_id FROM user_relationship r
        WHERE 'friend_request' = ANY($2) AND r.to_user_id = $1 AND r.type = 'friend' AND r.status = 'pending'
            AND {_BEFORE.format(at="r.updated_at", key="r.id")}
        ORDER BY r.updated_at DESC, r.id DESC LIMIT {CONSIDERED}
    ) r
    WHERE NOT {SILENCES.format(me="$1", them="r.from_user_id")}
    ORDER BY r.updated_at DESC, r.id DESC LIMIT $6)
    UNION ALL
    (SELECT 'invitation', p.joined_at, p.conversation_id, coalesce(p.invited_by, p.user_id), p.conversation_id, NULL
    FROM (
        SELECT p.conversation_id, p.user_id, p.invited_by, p.joined_at FROM conversation_participant p
        WHERE 'invitation' = ANY($2) AND p.user_id = $1 AND p.status = 'invited'
            AND {_BEFORE.format(at="p.joined_at", key="p.conversation_id")}
        ORDER BY p.joined_at DESC, p.conversation_id DESC LIMIT {CONSIDERED}
    ) p
    CROSS JOIN LATERAL (
        SELECT FROM conversation c WHERE c.id = p.conversation_id AND c.is_active AND NOT c.is_deleted OFFSET 0
    ) there
    WHERE NOT {SILENCES.format(me="$1", them="p.invited_by")}
    ORDER BY p.joined_at DESC, p.conversation_id DESC LIMIT $6)
    """  # noqa: S608 - only constants are put in


ROWS = f"""
SELECT DISTINCT ON (at, key, user_id, emoji) * FROM ({_entries(_LISTED)}) every_kind
ORDER BY at DESC, key DESC, user_id, emoji, kind LIMIT $6
"""  # noqa: S608 - as above
COUNT = f"""
SELECT count(*) FROM (
    SELECT DISTINCT at, key, user_id, emoji FROM ({_entries(_COUNTED)}) every_kind LIMIT $6
) e
"""  # noqa: S608 - as above
_AT = MOMENT.format(at="e.at")
PAGE = f"""
SELECT json_build_object('kind', e.kind, 'at', e.at, 'user_id', e.user_id,
    'conversation_id', e.conversation_id, 'emoji', e.emoji,
    'message', (
        SELECT message_json(m) FROM message m
        WHERE e.kind IN ('mention', 'reply', 'reaction') AND m.id = e.key
            AND (m.conversation_id = e.conversation_id) IS TRUE
    )), {_AT}, e.key
FROM ({ROWS}) e ORDER BY e.at DESC, e.key DESC
"""  # noqa: S608 - as above
SEEN_AT = """SELECT coalesce(u.feed_seen_at, '-infinity') FROM "user" u WHERE u.id = $1"""


class FeedPosition(NamedTuple):
    """The end of a page of the feed, and the last activity of the oldest conversation that the feed covers."""

    at: datetime
    id: UUID
    since: datetime | None

    def __str__(self) -> str:
        return f"{self.at.isoformat()}/{self.id}/{'' if self.since is None else self.since.isoformat()}"

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Parse the text of a position. Return None for None. Raises Refused if it is invalid."""
        if text is None:
            return None
        try:
            at, one, since = text.split("/")
            return cls(moment_of(at), UUID(one), moment_of(since) if since else None)
        except ValueError:
            raise not_a_cursor() from None


class FeedQuery(NamedTuple):
    """Selects entries of a user: by kind, before a place, after a time, up to a limit."""

    user_id: UserId
    kinds: Sequence[FeedKind]
    at: datetime | None
    key: UUID | None
    after: datetime
    limit: int


async def _named(db: Db, asked: FeedQuery) -> list[list[Any]]:
    """Return mentions by name, as columns. The transaction must allow the search index."""
    rows = await db.fetch(NAMED, *asked)
    return [[row[column] for row in rows] for column in range(4)]


async def page(db: Db, user_id: UserId, frame: ListFeed) -> Undecoded[FeedPage]:
    """Return a page of entries, latest first, and the number of unseen ones. Requires a transaction for searches."""
    kinds, before = frame.kinds or KINDS, FeedPosition.read(frame.after)
    is_first = before is None and "mention" in kinds
    at, key, since = before or (None, None, None)
    asked = FeedQuery(user_id, list(kinds), at, key, _EVER, frame.limit + 1)
    unseen = await _unseen(db, user_id)
    # The newest mentions by name include those of the first page and the unseen ones.
    named = await _named(db, asked._replace(limit=max(asked.limit, unseen.limit)) if is_first else asked)
    named_unseen = named if is_first else await _named(db, unseen)
    await db.execute(IN_ORDER)
    newest = covered = await latest.newest(db, user_id)
    if is_first:
        since = newest.since
    elif since is not None:
        covered = await latest.again(db, user_id, since)
    rows = await db.fetch(PAGE, *asked, *covered.columns, *named)

    def after(columns: Any) -> str | None:  # noqa: ANN401 - a row has no type
        return None if columns[1] is None else str(FeedPosition(columns[1], UUID(int=columns[2].int), since))

    unread_count = await count(db, Unseen(unseen, named_unseen), newest)
    return _entry_decoder.page(rows, frame.limit, after).then(
        lambda page: FeedPage(
            entries=page.rows, unread_count=unread_count, after=page.after, is_partial=since is not None
        )
    )


class Unseen(NamedTuple):
    """Selects the entries that a user has not seen. `named` are the mentions by name, as columns."""

    asked: FeedQuery
    named: Sequence[Sequence[Any]]


async def unseen(db: Db, user_id: UserId) -> Unseen:
    """Return what `count` needs. Requires a transaction for searches, whose further statements may not search."""
    asked = await _unseen(db, user_id)
    found = Unseen(asked, await _named(db, asked))
    await db.execute(IN_ORDER)
    return found


async def count(db: Db, unseen: Unseen, newest: Latest) -> int:
    """Return the number of entries that a user has not seen, up to 100."""
    return int(await db.fetchval(COUNT, *unseen.asked, *newest.columns, *unseen.named))


_EVER = datetime.fromisoformat("0001-01-02T00:00:00+00:00")


async def _unseen(db: Db, user_id: UserId) -> FeedQuery:
    since = await db.fetchval(SEEN_AT, user_id)
    return FeedQuery(user_id, list(KINDS), None, None, since or _EVER, MAX_COUNTED)


SEE = f"""
UPDATE "user" SET feed_seen_at = greatest(feed_seen_at, least($2::timestamptz, now())), version = version + 1,
    own_version = version + 1, own_moves = own_moves + 1
WHERE id = $1 AND is_active AND coalesce(feed_seen_at < least($2, now()), true) AND {BRIEFLY}
RETURNING version, me_json("user")
"""  # noqa: S608 - a constant is put in


async def see(db: Db, user_id: UserId, up_to: datetime) -> MeChanged | None:
    """Mark the feed as seen up to a time, which never moves back. Return None if nothing changed."""
    row = await db.fetchrow(SEE, user_id, up_to)
    return None if row is None else decoded_me(*row)
