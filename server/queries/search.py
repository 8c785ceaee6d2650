"""Pages of messages that match a search, in the order of time or of relevance."""

import re
from datetime import datetime
from typing import Any, NamedTuple, Self
from uuid import UUID

from protocol.client import Search
from protocol.codec import now
from protocol.ids import UserId
from protocol.server import SearchPage
from protocol.values import Message, SearchHit
from server.db.database import Db
from server.db.rows import Reader, Undecoded, fitting
from server.queries import search_matches
from server.queries.cursor import moment_of, not_a_cursor
from server.queries.moment import MOMENT
from server.queries.search_matches import LOWEST, Criteria

_message_decoder = Reader(Message)

RANKED = 1_000
"""Max newest matches that are ranked by relevance."""
EXCERPT, BEFORE = 2_000, 500
"""Max characters of a message for a snippet, and max characters of these before the first matching word. Marking all
words of a message of 10,000 characters took milliseconds per hit.
"""
_CUT = re.compile("[\x02\x03]")

# The first word is located by its spelling in the query. If the text spells it otherwise, the snippet is the beginning.
# An \x01 after each punctuation mark, which is removed again, makes words equal those of the index, and the parser's
# time linear (`unpunctuated` in schema.sql). The three control characters are removed from the text itself.
_SNIPPET = f"""CASE WHEN $2::text IS NULL THEN left(translate((found.m).content, E'\\x02\\x03', ''), 200)
ELSE replace(ts_headline(
    regexp_replace(translate(substring((found.m).content FROM greatest(1, least(
        strpos(lower((found.m).content), lower(substring($2 FROM '^[^ :]+'))) - {BEFORE},
        char_length((found.m).content) - {EXCERPT - 1}
    )) FOR {EXCERPT}), E'\\x01\\x02\\x03', ''), '[!-/:-@[-`{{-~]', E'\\\\&\\x01', 'g'), to_tsquery($2),
    E'StartSel=\\x02, StopSel=\\x03, MaxFragments=2, MaxWords=30, MinWords=10, FragmentDelimiter=" … "'
), E'\\x01', '') END"""
# $1 is the user, $2 the words as a tsquery, and $3 to $5 are the matches. Each is read by its key, which LATERAL and
# OFFSET 0 enforce. It is checked again, because it may be gone since it was found, or the user may not see it any more.
# Then its row has no message. It still counts, because otherwise a shorter page would look like the last one.
READ = f"""
SELECT CASE WHEN (found.m).id IS NOT NULL THEN message_json(found.m) END, found.rank,
    {MOMENT.format(at="found.created_at")}, found.id, {_SNIPPET}
FROM (
    SELECT i.id, i.rank, i.created_at, i.place, seen.m
    FROM unnest($3::uuid[], $4::text[]::timestamptz[], $5::float8[]) WITH ORDINALITY i (id, created_at, rank, place)
    LEFT JOIN LATERAL (
        SELECT m FROM message m
        JOIN conversation c ON c.id = m.conversation_id AND NOT c.is_deleted
        JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.user_id = $1
            AND p.status = 'active'
        WHERE m.id = i.id AND NOT m.is_deleted AND NOT m.is_moderated AND m.sent_version > visible_after(c, p)
        OFFSET 0
    ) seen ON true
) found
ORDER BY found.place
"""  # noqa: S608 - constants are put in
# A match that is gone since it was found has no words, and is last.
RANK = """
SELECT ranked.id, ranked.created_at::text, ranked.rank FROM (
    SELECT i.id, i.created_at, coalesce((
        SELECT ts_rank_cd(w.words, to_tsquery($1))::float8 FROM message_search w WHERE w.message_id = i.id
    ), 0) AS rank
    FROM unnest($2::uuid[], $3::text[]::timestamptz[]) i (id, created_at)
) ranked
WHERE $4::float8 IS NULL OR (ranked.rank, ranked.created_at, ranked.id) < ($4, $5::timestamptz, $6::uuid)
ORDER BY ranked.rank DESC, ranked.created_at DESC, ranked.id DESC LIMIT $7
"""


class SearchPosition(NamedTuple):
    """The end of a page of hits. `as_of` is the time of the first page, so that later messages do not shift the next
    page. `since` is the last activity of the oldest conversation that the search covers. `down_to` is the time of the
    oldest message that is ranked, if not all were read.
    """

    as_of: datetime
    rank: float
    at: datetime
    id: UUID
    since: datetime | None = None
    down_to: datetime | None = None

    def __str__(self) -> str:
        since = "" if self.since is None else self.since.isoformat()
        # Older workers read positions with five parts only.
        down_to = "" if self.down_to is None else f"/{self.down_to.isoformat()}"
        return f"{self.as_of.isoformat()}/{self.rank!r}/{self.at.isoformat()}/{self.id}/{since}{down_to}"

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Parse the text of a position. Return None for None. Raises Refused if it is invalid."""
        if text is None:
            return None
        try:
            as_of, rank, at, one, *rest = text.split("/")
            since, down_to = rest if len(rest) > 1 else (*rest, "")
            return cls(
                moment_of(as_of),
                float(rank),
                moment_of(at),
                UUID(one),
                moment_of(since) if since else None,
                moment_of(down_to) if down_to else None,
            )
        except ValueError:
            raise not_a_cursor() from None


class _Hits(NamedTuple):
    """Matches as columns for `READ`, and the time down to which all messages were read, if older ones may match."""

    ids: list[UUID]
    times: list[str]
    ranks: list[float]
    down_to: datetime | None


async def find(db: Db, user_id: UserId, frame: Search, words: str | None, *, limit: int) -> Undecoded[SearchPage]:
    """Return up to `limit` matching messages. `words` is a result of `search_text.query`. Requires a transaction for
    searches.
    """
    position = SearchPosition.read(frame.after)
    as_of = now() if position is None else position.as_of
    covered = await search_matches.scope(db, user_id, frame, None if position is None else position.since)
    until = as_of if frame.sent_before is None else min(as_of, frame.sent_before)
    asked = await search_matches.criteria(db, user_id, frame, words, until=until, covered=covered)
    is_ranked = frame.order == "relevance" and words is not None
    if asked is None:
        hits = _Hits([], [], [], None)
    elif is_ranked:
        hits = await _relevant(db, asked, words, position, limit + 1)
    else:
        hits = await _newest(db, asked, position, limit + 1)
    rows = await db.fetch(READ, user_id, words, hits.ids, hits.times, hits.ranks)
    count = fitting(rows[:limit])
    end: SearchPosition | None = None
    if len(rows) > count:
        _, rank, at, one, _ = rows[count - 1]
        if at is not None:
            end = SearchPosition(as_of, rank, at, one, covered.since, hits.down_to if is_ranked else None)
    elif hits.down_to is not None and not is_ranked:
        end = SearchPosition(as_of, 0.0, hits.down_to, LOWEST, covered.since)

    def of(found: list[tuple[Message, Any]]) -> SearchPage:
        return SearchPage(
            hits=[SearchHit(message=message, snippet=_CUT.split(columns[4])) for message, columns in found],
            after=None if end is None else str(end),
            is_partial=covered.since is not None or hits.down_to is not None,
            searched_to=hits.down_to,
        )

    return _message_decoder.beside(rows[:count]).then(of)


async def _newest(db: Db, asked: Criteria, position: SearchPosition | None, count: int) -> _Hits:
    """Return up to `count` matches after a position, newest first."""
    if position is not None:
        asked = asked.before_place(position.at, position.id)
    places, down_to = await search_matches.newest(db, asked, count)
    return _Hits([place.id for place in places], [place.at for place in places], [0.0] * len(places), down_to)


async def _relevant(db: Db, asked: Criteria, words: str | None, position: SearchPosition | None, count: int) -> _Hits:
    """Return up to `count` of the newest `RANKED` matches after a position, the most relevant first."""
    end: tuple[float | None, datetime | None, UUID | None] = (None, None, None)
    down_to = None
    if position is not None:
        end, down_to = (position.rank, position.at, position.id), position.down_to
    if down_to is None:
        matches = await search_matches.newest(db, asked, RANKED)
    else:
        matches = await search_matches.again(db, asked.not_before(down_to), RANKED)
    ids, times = [place.id for place in matches.places], [place.at for place in matches.places]
    rows = await db.fetch(RANK, words, ids, times, *end, count)
    return _Hits(
        [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], matches.down_to or down_to
    )
