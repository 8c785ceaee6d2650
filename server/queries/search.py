"""Search for messages by words and other criteria, among the messages that a user may see.

The search index also contains the conversation of each message and its mentions (search_words() in schema.sql). So it
applies all of these together, and only the remaining messages are checked one by one.
"""

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
from server.queries import latest
from server.queries.cursor import moment_of, not_a_cursor
from server.queries.latest import LATEST
from server.queries.moment import MOMENT

_message_decoder = Reader(Message)

RANKED = 1_000
"""Max newest matches that are ranked by relevance."""
EXCERPT, BEFORE = 2_000, 500
"""Max characters of a message for a snippet, and max characters of these before the first matching word. Marking all
words of a message of 10,000 characters took milliseconds per hit.
"""
_CUT = re.compile("[\x02\x03]")

# $1 is the user, $2 the words as a tsquery, $3 a conversation, $4 a hashtag, $5 whether the user is mentioned. Stop
# words of the language, such as "the" in English, match nothing. Mentions of roles that are not the user's are left out
# later. `since` stands for the parameter that selects the latest conversations.
_THERE = "AND ($3::uuid IS NULL OR p.conversation_id = $3)"
_QUERY = f"""(
    SELECT CASE WHEN $2::text IS NULL THEN w.filters
        WHEN numnode(to_tsquery($2)) = 0 THEN '''nowhere'''::tsquery
        ELSE to_tsquery($2) && w.filters END
    FROM (
        SELECT concat_ws(' & ',
            coalesce('(' || string_agg('''c:' || p.conversation_id || '''', '|') || ')', '''nowhere'''),
            '''h:' || $4::text || '''',
            CASE WHEN $5 THEN format('(''m:everyone'' | ''m:%s''', $1::uuid)
                || string_agg(DISTINCT format(' | ''m:%s''', p.role), '') || ')' END
        )::tsquery AS filters
        FROM ({LATEST.format(user="$1", also=_THERE, since="{since}")}) p
    ) w
)"""  # noqa: S608 - only a constant is put in
# Matches are checked one by one, newest first, until there are enough. LATERAL and OFFSET 0 enforce that.
_FOUND = f"""
    FROM (
        SELECT s.message_id, s.conversation_id, s.created_at FROM message_search s
        WHERE s.words @@ {_QUERY} AND s.created_at < $6 AND ($7::timestamptz IS NULL OR s.created_at > $7) {{cursor}}
        ORDER BY s.created_at DESC, s.message_id DESC
    ) s
    CROSS JOIN LATERAL (
        SELECT m FROM message m
        JOIN conversation c ON c.id = s.conversation_id AND NOT c.is_deleted
        JOIN conversation_participant p ON p.conversation_id = s.conversation_id AND p.user_id = $1
            AND p.status = 'active'
        WHERE m.id = s.message_id AND (m.conversation_id = s.conversation_id) IS TRUE
            AND m.sent_version > visible_after(c, p) AND ($8::uuid IS NULL OR m.sender_id = $8)
            AND ($9::text IS NULL OR m.content_type = $9)
            AND (NOT $10 OR m.content_type IN ('image', 'file', 'audio', 'video'))
            AND (NOT $5 OR $1 = ANY(m.mentions) OR m.loud_mentions && ARRAY['everyone', p.role])
            AND ($11::uuid IS NULL OR m.thread_root_id = $11 OR m.id = $11) AND (NOT $12 OR m.is_pinned)
        OFFSET 0
    ) seen
    ORDER BY s.created_at DESC, s.message_id DESC LIMIT $13
"""  # noqa: S608 - as above
# The first word is located by its spelling in the query. If the text spells it otherwise, the snippet is the beginning.
# An \x01 after each punctuation mark, which is removed again, makes words equal those of the index, and the parser's
# time linear (`unpunctuated` in schema.sql). The three control characters are removed from the text itself.
_SNIPPET = f"""CASE WHEN $2 IS NULL THEN left(translate((found.m).content, E'\\x02\\x03', ''), 200)
ELSE replace(ts_headline(
    regexp_replace(translate(substring((found.m).content FROM greatest(1, least(
        strpos(lower((found.m).content), lower(substring($2 FROM '^[^ :]+'))) - {BEFORE},
        char_length((found.m).content) - {EXCERPT - 1}
    )) FOR {EXCERPT}), E'\\x01\\x02\\x03', ''), '[!-/:-@[-`{{-~]', E'\\\\&\\x01', 'g'), to_tsquery($2),
    E'StartSel=\\x02, StopSel=\\x03, MaxFragments=2, MaxWords=30, MinWords=10, FragmentDelimiter=" … "'
), E'\\x01', '') END"""
_AFTER = "AND ($14::timestamptz IS NULL OR (s.created_at, s.message_id) < ($14, $15::uuid))"
NEWEST = f"""
SELECT message_json(found.m), 0::float8, {MOMENT.format(at="found.created_at")}, (found.m).id, {_SNIPPET}
FROM (SELECT s.created_at, seen.m {_FOUND.format(cursor=_AFTER, since="$16")}) found
"""  # noqa: S608 - as above
RELEVANT = f"""
SELECT message_json(found.m), found.rank, {MOMENT.format(at="found.created_at")}, (found.m).id, {_SNIPPET}
FROM (
    SELECT * FROM (
        SELECT newest.created_at, newest.m, (
            SELECT ts_rank_cd(w.words, to_tsquery($2))::float8 FROM message_search w
            WHERE w.message_id = newest.message_id
        ) AS rank
        FROM (SELECT s.created_at, s.message_id, seen.m {_FOUND.format(cursor="", since="$18")}) newest
    ) ranked
    WHERE $14::float8 IS NULL OR (ranked.rank, ranked.created_at, (ranked.m).id) < ($14, $15::timestamptz, $16::uuid)
    ORDER BY ranked.rank DESC, ranked.created_at DESC, (ranked.m).id DESC LIMIT $17
) found
"""  # noqa: S608 - as above


class SearchPosition(NamedTuple):
    """The end of a page of hits. `as_of` is the time of the first page, so that later messages do not shift the next
    page. `since` is the last activity of the oldest conversation that the search covers.
    """

    as_of: datetime
    rank: float
    at: datetime
    id: UUID
    since: datetime | None

    def __str__(self) -> str:
        since = "" if self.since is None else self.since.isoformat()
        return f"{self.as_of.isoformat()}/{self.rank!r}/{self.at.isoformat()}/{self.id}/{since}"

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Parse the text of a position. Return None for None. Raises Refused if it is invalid."""
        if text is None:
            return None
        try:
            as_of, rank, at, one, since = text.split("/")
            return cls(moment_of(as_of), float(rank), moment_of(at), UUID(one), moment_of(since) if since else None)
        except ValueError:
            raise not_a_cursor() from None


async def find(db: Db, user_id: UserId, frame: Search, words: str | None, *, limit: int) -> Undecoded[SearchPage]:
    """Return up to `limit` matching messages. `words` is a result of `search_text.query`. Requires a transaction for
    searches.
    """
    after = SearchPosition.read(frame.after)
    as_of = now() if after is None else after.as_of
    until = as_of if frame.sent_before is None else min(as_of, frame.sent_before)
    hashtag = None if frame.hashtag is None else frame.hashtag.lower()
    asked = [
        user_id, words, frame.conversation_id, hashtag, frame.mentions_me, until, frame.sent_after, frame.sender_id,
        frame.content_type, frame.has_file, frame.in_thread, frame.is_pinned,
    ]  # fmt: skip
    since = None if after is None else after.since
    if after is None and frame.conversation_id is None:
        since = await latest.since(db, user_id)
    if frame.order == "relevance" and words is not None:
        ranked = (None, None, None) if after is None else (after.rank, after.at, after.id)
        rows = await db.fetch(RELEVANT, *asked, RANKED, *ranked, limit + 1, since)
    else:
        place = (None, None) if after is None else (after.at, after.id)
        rows = await db.fetch(NEWEST, *asked, limit + 1, *place, since)
    count = fitting(rows[:limit])
    end = _after(as_of, rows[count - 1], since) if len(rows) > count else None

    def of(hits: list[tuple[Message, Any]]) -> SearchPage:
        return SearchPage(
            hits=[SearchHit(message=message, snippet=_CUT.split(columns[4])) for message, columns in hits],
            after=end,
            is_partial=since is not None,
        )

    return _message_decoder.beside(rows[:count]).then(of)


def _after(as_of: datetime, columns: Any, since: datetime | None) -> str | None:  # noqa: ANN401 - a row has no type
    _, rank, at, one, _ = columns
    return None if at is None else str(SearchPosition(as_of, rank, at, one, since))
