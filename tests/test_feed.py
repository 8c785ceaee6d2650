"""The feed has the same entries as a simple slow query, in pages of any size, and pages stay consistent."""

import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from protocol.client import ListFeed, Search
from protocol.ids import UserId
from protocol.values import FeedEntry, FeedKind
from server.db.database import SEARCHING, SESSION
from server.queries import badge, feed, latest, search

START = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1_180)
"""The newest row is some days old, so the rows are in all periods that the feed distinguishes."""
ME = 0
USERS, CONVERSATIONS, MESSAGES = 8, latest.SEARCHED + 40, 700


@pytest.fixture
async def db(database_url: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    connection = await asyncpg.connect(database_url, server_settings=SESSION)
    # Foreign keys are not checked, so that tests insert only the rows that they need.
    await connection.execute("SET session_replication_role = replica")
    async with connection.transaction():
        await connection.execute(SEARCHING)
        yield connection
    await connection.close()


def uid(kind: int, number: int) -> UUID:
    return UUID(int=kind << 64 | number)


def at(number: int) -> datetime:
    return START + number * timedelta(hours=10)


MESSAGE = """
INSERT INTO message (id, conversation_id, sender_id, content, mentions, loud_mentions, is_deleted, is_moderated,
    thread_root_id, thread_order, created_at, sent_version, version)
VALUES ($1, $2, $3, 'word', $4, $5, $6, $7, $8, $9, $10, $11, $11)
"""
INDEX = """
INSERT INTO message_search (message_id, conversation_id, created_at, words)
SELECT id, conversation_id, created_at, search_words(conversation_id, content, payload, mentions, loud_mentions, '{}')
FROM message WHERE NOT is_deleted AND NOT is_moderated
"""


async def fill(db: "asyncpg.Connection[asyncpg.Record]", chance: random.Random) -> None:
    """Insert rows that belong in the feed of a user, and rows that do not, each for one reason."""

    def often(share: float) -> bool:
        return chance.random() < share

    def others() -> UUID:
        return uid(1, chance.randrange(1, USERS))

    for number in range(USERS):
        await db.execute(
            'INSERT INTO "user" (id, name, email) VALUES ($1, $2, $2)', uid(1, number), f"u{number}@example.org"
        )
    statuses = ["active"] * 6 + ["left", "removed", "banned", "declined", "invited"]
    await db.executemany(
        """INSERT INTO conversation (id, type, title, created_by, is_deleted, is_active, settings, last_activity_at)
        VALUES ($1, 'group', 'Group', $2, $3, NOT $3, $4, $5)""",
        [(uid(2, n), uid(1, 1), n > 0 and often(0.05), '{"history": "from_joining"}' if often(0.2) else "{}", at(n))
         for n in range(CONVERSATIONS)],
    )  # fmt: skip
    await db.executemany(
        """INSERT INTO conversation_participant (conversation_id, user_id, role, status, joined_version, joined_at,
        invited_by) VALUES ($1, $2, $3, $4, $5, $6, $7)""",
        [(uid(2, n), uid(1, ME), chance.choice(["member", "moderator", "owner"]),
          "active" if n < 20 else chance.choice(statuses), chance.randrange(300), at(chance.randrange(1000)), others())
         for n in range(CONVERSATIONS)],
    )  # fmt: skip
    rows: list[Any] = []
    for n in range(MESSAGES):
        place = chance.randrange(20) if often(0.5) else chance.randrange(CONVERSATIONS)
        root = chance.randrange(n) if n and often(0.3) else None
        if root is not None and rows[root][7] is not None:
            root = None
        loud = chance.sample(["everyone", "here", "member", "moderator"], chance.choice([0, 0, 1, 2]))
        rows.append((
            uid(3, n), uid(2, place) if root is None else rows[root][1], uid(1, chance.randrange(USERS)),
            [uid(1, ME)] if often(0.2) else [], loud, often(0.05), often(0.05),
            None if root is None else uid(3, root), 0 if root is None else n, at(n), n,
        ))  # fmt: skip
    # A thread with more replies than the feed reads.
    rows += [
        (uid(3, MESSAGES + n), uid(2, 0), uid(1, 3), [], [], False, False, uid(3, MESSAGES) if n else None, n,
         at(2_000 + n), 2_000 + n)
        for n in range(feed.NEWEST + 20)
    ]  # fmt: skip
    await db.executemany(MESSAGE, rows)
    await db.execute(INDEX)
    await db.executemany(
        "INSERT INTO thread_follow (root_id, user_id, conversation_id, is_following) VALUES ($1, $2, $3, $4)",
        [(row[0], uid(1, ME), row[1], often(0.8)) for row in rows[:MESSAGES] if row[7] is None and often(0.5)]
        + [(uid(3, MESSAGES), uid(1, ME), uid(2, 0), True)],
    )
    await db.executemany(
        """INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, is_removed, version, author_id,
        created_at) VALUES ($1, $2, $3, $4, $5, 1, $6, $7)""",
        [(row[0], uid(1, chance.randrange(USERS)), "👍", row[1], often(0.1), row[2], at(2_000 + n))
         for n, row in enumerate(rows) if row[2] == uid(1, ME)],
    )  # fmt: skip
    await db.executemany(
        """INSERT INTO user_relationship (from_user_id, to_user_id, type, status, updated_at)
        VALUES ($1, $2, $3, $4, $5)""",
        [(uid(1, ME), uid(1, 1), "mute", "active", at(0)), (uid(1, ME), uid(1, 2), "block", "inactive", at(0)),
         *((uid(1, n), uid(1, ME), "friend", "pending" if n < 6 else "rejected", at(500 + n)) for n in range(1, USERS)),
        ],
    )  # fmt: skip


async def expected_entries(
    db: "asyncpg.Connection[asyncpg.Record]", kinds: Sequence[FeedKind]
) -> list[tuple[str, datetime, UUID]]:
    """Return the kind, time and id of all entries, newest first, by checking each row of the tables."""
    me = uid(1, ME)
    conversations = {row["id"]: row for row in await db.fetch("SELECT * FROM conversation")}
    mine = {
        row["conversation_id"]: row
        for row in await db.fetch("SELECT * FROM conversation_participant WHERE user_id = $1", me)
    }
    silenced = {
        row["to_user_id"]
        for row in await db.fetch("SELECT * FROM user_relationship WHERE from_user_id = $1", me)
        if row["type"] in {"block", "mute"} and row["status"] == "active"
    }
    messages = {row["id"]: row for row in await db.fetch("SELECT * FROM message")}
    takes_part = [
        one for one, part in mine.items() if part["status"] == "active" and not conversations[one]["is_deleted"]
    ]
    last = sorted(takes_part, key=lambda one: conversations[one]["last_activity_at"])[-latest.SEARCHED :]

    def is_seen(message: Any) -> bool:
        there = message["conversation_id"]
        hides = "from_joining" in conversations[there]["settings"]
        return there in takes_part and message["sent_version"] > (mine[there]["joined_version"] if hides else 0)

    followed = {row["root_id"] for row in await db.fetch("SELECT * FROM thread_follow WHERE is_following")}

    def kind_of(row: Any) -> str | None:
        if row["is_deleted"] or row["is_moderated"] or row["sender_id"] in {me, *silenced} or not is_seen(row):
            return None
        is_loud = "everyone" in row["loud_mentions"] or mine[row["conversation_id"]]["role"] in row["loud_mentions"]
        if me in row["mentions"]:
            return "mention"
        if "mention" in kinds and is_loud and row["conversation_id"] in last:
            return "mention"
        is_looked_at = sum(
            1 for one in messages.values()
            if one["thread_root_id"] == row["thread_root_id"] and one["thread_order"] > row["thread_order"]
        ) < feed.NEWEST  # fmt: skip
        return "reply" if row["thread_root_id"] in followed and is_looked_at else None

    entries = [(kind, row["created_at"], row["id"]) for row in messages.values() if (kind := kind_of(row))]
    entries += [
        ("reaction", row["created_at"], row["message_id"])
        for row in await db.fetch("SELECT * FROM message_reaction WHERE NOT is_removed")
        if row["author_id"] == me and row["user_id"] not in {me, *silenced}
        and is_seen(messages[row["message_id"]]) and not messages[row["message_id"]]["is_deleted"]
    ]  # fmt: skip
    entries += [
        ("friend_request", row["updated_at"], row["from_user_id"])
        for row in await db.fetch("SELECT * FROM user_relationship WHERE type = 'friend' AND status = 'pending'")
        if row["from_user_id"] not in silenced
    ]
    entries += [
        ("invitation", part["joined_at"], there) for there, part in mine.items()
        if part["status"] == "invited" and not conversations[there]["is_deleted"]
        and part["invited_by"] not in silenced
    ]  # fmt: skip
    return sorted((one for one in entries if one[0] in kinds), key=lambda one: (one[1], one[2].int), reverse=True)


def key_of(entry: FeedEntry) -> tuple[str, datetime, UUID]:
    key: Any = {"friend_request": entry.user_id, "invitation": entry.conversation_id}.get(entry.kind)
    if entry.message is not None:
        key = entry.message.id
    return entry.kind, entry.at, UUID(int=key.int)


async def listed(
    db: "asyncpg.Connection[asyncpg.Record]", kinds: Sequence[FeedKind], limit: int
) -> list[tuple[str, datetime, UUID]]:
    found: list[tuple[str, datetime, UUID]] = []
    after = None
    while True:
        asked = ListFeed(kinds=list(kinds), limit=limit, after=after)
        page = await (await feed.page(db, UserId(uid(1, ME)), asked)).decoded()
        found += [key_of(entry) for entry in page.entries]
        if (after := page.after) is None:
            return found


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
async def test_feed_equals_that_of_a_simple_slow_query(db: "asyncpg.Connection[asyncpg.Record]", seed: int) -> None:
    chance = random.Random(seed)
    await fill(db, chance)
    expected = []
    for kinds in (*((kind,) for kind in feed.KINDS), feed.KINDS):
        expected = await expected_entries(db, kinds)
        assert len(expected) > 2, kinds
        assert await listed(db, kinds, chance.choice([7, 20, 99])) == expected, kinds
    assert (await badge.of(db, UserId(uid(1, ME)))).feed == 100
    seen = expected[17][1]
    await db.execute('UPDATE "user" SET feed_seen_at = $2 WHERE id = $1', uid(1, ME), seen)
    assert (await badge.of(db, UserId(uid(1, ME)))).feed == sum(1 for one in expected if one[1] > seen)


MENTIONED = """
SELECT m.id FROM message m JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.user_id = $1
JOIN (
    SELECT c.* FROM conversation c JOIN conversation_participant o ON o.conversation_id = c.id
    WHERE o.user_id = $1 AND o.status = 'active' AND NOT c.is_deleted ORDER BY c.last_activity_at DESC LIMIT 200
) c ON c.id = m.conversation_id
WHERE ('everyone' = ANY(m.loud_mentions) OR p.role = ANY(m.loud_mentions) OR $1 = ANY(m.mentions))
    AND NOT m.is_deleted AND NOT m.is_moderated
    AND m.sent_version > CASE WHEN c.settings ->> 'history' IS NULL THEN 0 ELSE p.joined_version END
ORDER BY m.created_at DESC
"""


async def test_search_for_mentions_finds_those_of_everyone_and_of_the_users_role(
    db: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    await fill(db, random.Random(4))
    expected = [row[0] for row in await db.fetch(MENTIONED, uid(1, ME))]
    found: list[UUID] = []
    after = None
    while not found or after is not None:
        asked = Search(mentions_me=True, after=after)
        page = await (await search.find(db, UserId(uid(1, ME)), asked, None, limit=30)).decoded()
        found += [UUID(int=hit.message.id.int) for hit in page.hits]
        after = page.after
    assert len(expected) > 50
    assert found == expected


async def test_further_pages_use_the_conversations_of_the_first_page(db: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Conversations that become active between pages do not displace them."""
    me = uid(1, ME)
    many = latest.SEARCHED + 50
    await db.execute('INSERT INTO "user" (id, name, email) VALUES ($1, $2, $2)', me, "u@example.org")
    await db.executemany(
        "INSERT INTO conversation (id, type, title, created_by, last_activity_at) VALUES ($1, 'group', 'G', $2, $3)",
        [(uid(2, n), uid(1, 1), at(n)) for n in range(many)],
    )
    await db.executemany(
        "INSERT INTO conversation_participant (conversation_id, user_id) VALUES ($1, $2)",
        [(uid(2, n), me) for n in range(many)],
    )
    await db.executemany(
        MESSAGE,
        [(uid(3, n), uid(2, n), uid(1, 1), [], ["everyone"], False, False, None, 0, at(n), 1) for n in range(many)],
    )
    await db.execute(INDEX)
    expected = [uid(3, n) for n in reversed(range(50, many))]
    asked: list[Any] = [ListFeed(kinds=["mention"], limit=50), Search(text="word", limit=50)]
    asked += [Search(text="word", order="relevance", limit=50), Search(mentions_me=True, limit=50)]
    for frame in asked:
        await db.executemany(
            "UPDATE conversation SET last_activity_at = $2 WHERE id = $1", [(uid(2, n), at(n)) for n in range(many)]
        )
        found: list[UUID] = []
        after, pages = None, 0
        while pages == 0 or after is not None:
            again = type(frame)(**{name: getattr(frame, name) for name in frame.__struct_fields__} | {"after": after})
            page: Any
            if isinstance(frame, ListFeed):
                page = await (await feed.page(db, UserId(me), again)).decoded()
                found += [entry.message.id for entry in page.entries]
            else:
                page = await (await search.find(db, UserId(me), again, frame.text, limit=frame.limit)).decoded()
                found += [hit.message.id for hit in page.hits]
            assert page.is_partial, "on every page"
            after, pages = page.after, pages + 1
            # The oldest conversations become the most recently active.
            await db.execute(
                "UPDATE conversation SET last_activity_at = now() WHERE last_activity_at < $1", at(50 + 20 * pages)
            )
        wanted = set(expected)
        assert [UUID(int=one.int) for one in found if one in wanted] == expected, frame
        assert len(set(found)) == len(found), frame
