"""Each index of schema.sql is used by a statement, or a constraint or a feature needs it."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeAlias

import asyncpg
import pytest

from server.describe import columns
from server.queries import presence, users
from server.queries.presence import Transition
from tests.test_reads import CROWD
from tests.world import World

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

NEEDED_BY = {
    "account_user_idx": "accounts.CHANGE",
    "approach_began_idx": "approaches.EXPIRE",
    "approach_to_idx": "erasure.FORGET_APPROACHED",
    "audit_entry_actor_idx": "export.DEEDS",
    "audit_entry_created_idx": "audit.FORGET",
    "conversation_created_by_idx": "bounds.MADE",
    "conversation_remains_idx": "remains.DELETED",
    "conversation_words_idx": "conversations.FIND",
    "draft_conversation_idx": "drafts.EMPTY_SOME",
    "draft_version_idx": "own_news.READ",
    "message_conversation_created_idx": "messages.PAGE",
    "message_conversation_version_idx": "changes.SINCE",
    "message_edit_message_idx": "edits.EDITS",
    "message_expires_idx": "expiry.DUE",
    "message_loud_idx": "feed.PAGE",
    "message_pinned_idx": "pins.LIST",
    "message_reaction_author_idx": "feed.PAGE",
    "message_reaction_user_idx": "export.REACTIONS",
    "message_reaction_version_idx": "changes.SINCE",
    "message_remains_idx": "remains.DUE",
    "message_search_mentions_idx": "feed.NAMED",
    "message_search_words_idx": "search_matches.INDEXED_IN_FEW",
    "message_sender_idx": "erasure.FORGET_EDITS",
    "message_star_removed_idx": "bounds.FORGET_STARS",
    "message_star_user_idx": "pins.STARS",
    "message_star_version_idx": "bounds.STARS",
    "message_thread_root_idx": "feed.PAGE",
    "message_timeline_idx": "conversation_views.PAGE",
    "participant_changed_idx": "changes.SINCE",
    "participant_role_idx": "participants.HEIR",
    "participant_invited_by_idx": "welcome.GUESTS",
    "participant_invited_idx": "feed.PAGE",
    "participant_left_version_idx": "changes.SINCE",
    "participant_outsider_idx": "participants.OUTSIDERS",
    "participant_user_idx": "bounds.MEMBERSHIPS",
    "participant_user_version_idx": "own_news.READ",
    "poll_vote_user_idx": "export.VOTES",
    "poll_vote_version_idx": "changes.SINCE",
    "push_endpoint_user_idx": "erasure.IS_ERASED",
    "report_conversation_idx": "moderation.REPORTS",
    "report_open_idx": "moderation.DISMISS",
    "report_reporter_idx": "erasure.CLEAR_REPORTS",
    "search_queue_idx": "search_index.WAITING",
    "scheduled_message_over_idx": "scheduled.FORGET",
    "scheduled_message_sender_idx": "erasure.FORGET_SCHEDULED",
    "scheduled_message_turn_idx": "scheduled.WALK",
    "scheduled_message_version_idx": "own_news.READ",
    "scheduled_message_waiting_idx": "scheduled.SENDER",
    "session_expires_idx": "sessions.EXPIRED",
    "session_user_idx": "accounts.LEAVE",
    "thread_follow_user_idx": "threads.LIST",
    "thread_follow_version_idx": "bounds.THREADS",
    "user_custom_status_until_idx": "presence.EXPIRE",
    "user_relationship_from_version_idx": "own_news.READ",
    "user_relationship_hiding_idx": "receipts.READERS",
    "user_relationship_over_idx": "relationships.FORGET",
    "user_relationship_pending_idx": "bounds.REQUESTS",
    "user_relationship_to_idx": "conversation_views.PAGE",
    "user_relationship_to_version_idx": "own_news.READ",
    "user_to_erase_idx": "erasure.DUE",
    "user_words_idx": "users.SEARCH",
}
"""For each index, a statement whose plan uses it."""
KEPT_FOR = {
    "message_search_newest_idx": "newest_matches()",
    "message_special_idx": "newest_matches()",
    "conversation_id_hash_key": "two ids with one hash are refused (docs/decisions/0050)",
    "push_endpoint_session_idx": "push_endpoint_session_fkey, when a session is deleted",
    "attachment_message_idx": "files (issue 20)",
    "attachment_uploaded_by_idx": "files (issue 20)",
    "verification_identifier_idx": "accounts that people and companies can rely on (issue 19)",
}
"""Indexes that no plan of a statement uses, and the reason to keep them."""
INDEXES = """
SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE c.relnamespace = 'public'::regnamespace
    AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)
"""
PLANNING = "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan"
"""Settings under which plans do not scan small tables."""
UPDATED = """
SELECT pg_stat_get_xact_tuples_updated('"user"'::regclass), pg_stat_get_xact_tuples_hot_updated('"user"'::regclass)
"""


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def indexes(node: dict[str, Any]) -> Iterator[str]:
    """Return the indexes that a plan finds rows by, and the partial indexes that it scans whole."""
    if "Index Name" in node:
        yield node["Index Name"]
    for child in node.get("Plans", []):
        yield from indexes(child)


async def used_by(db: Connection, text: str) -> set[str]:
    """Return the indexes in the generic plan of a statement."""
    await db.execute(f"PREPARE it AS {text}")
    count = await db.fetchval("SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'it'")
    given = f"({', '.join(['NULL'] * count)})" if count else ""
    plan = json.loads(await db.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE it{given}"))
    await db.execute("DEALLOCATE it")
    return set(indexes(plan[0]["Plan"]))


@pytest.mark.new_database  # pages that earlier tests have used change the costs of plans
async def test_each_index_is_needed_by_a_statement_or_a_constraint(db: Connection) -> None:
    assert {row[0] for row in await db.fetch(INDEXES)} == NEEDED_BY.keys() | KEPT_FOR.keys()
    await db.execute(CROWD)
    await db.execute("ANALYZE")
    await db.execute(PLANNING)
    texts = columns.statements()
    plans = {name: await used_by(db, texts[name]) for name in set(NEEDED_BY.values())}
    assert {index: name for index, name in NEEDED_BY.items() if index not in plans[name]} == {}


async def test_unused_index_is_detected(db: Connection) -> None:
    await db.execute('CREATE INDEX needless_idx ON "user" (location)')
    assert "needless_idx" in {row[0] for row in await db.fetch(INDEXES)} - NEEDED_BY.keys() - KEPT_FOR.keys()
    await db.execute(PLANNING)
    assert "needless_idx" not in await used_by(db, users.SEARCH)
    await db.execute("DROP INDEX needless_idx")


async def test_presence_update_changes_no_index(world: World) -> None:
    them = await world.users("Ada", "Charles")
    ids = [one.id for one in them]
    async with world.db.transaction():
        for is_online in (True, False) * 5:
            await presence.seen(world.db, dict.fromkeys(ids, Transition(is_online)))
        assert tuple(await world.db.fetchrow(UPDATED) or ()) == (20, 20)
        # An index on a column that the update changes would prevent this.
        await world.db.execute('CREATE INDEX user_last_seen_idx ON "user" (is_online)')
        await presence.seen(world.db, dict.fromkeys(ids, Transition(is_online=True)))
        assert tuple(await world.db.fetchrow(UPDATED) or ()) == (22, 20)
        await world.db.execute("DROP INDEX user_last_seen_idx")


FILL = """
WITH them AS (
    INSERT INTO "user" (name, email, bio) SELECT 'User ' || n, 'u' || n || '@example.org', repeat('b', 40)
    FROM generate_series(1, 2000) n RETURNING id
), made AS (
    INSERT INTO conversation (type, title, created_by) SELECT 'group', 'Group', min(id::text)::uuid FROM them
    RETURNING id, created_by
)
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT id, created_by, repeat('m', 60), n, n FROM made, generate_series(1, 2000) n
"""
ALL_CONNECT = 'UPDATE "user" SET is_online = true, last_seen_at = now()'
SOME_REACT = """UPDATE message SET reactions = '{"x": 1}' WHERE sent_version % 30 = 0"""


@pytest.mark.parametrize(("table", "change"), [('"user"', ALL_CONNECT), ("message", SOME_REACT)])
async def test_pages_have_room_for_bursts_of_updates(db: Connection, table: str, change: str) -> None:
    """Updates of one transaction cannot reuse the space of earlier versions."""

    async def share_that_changes_no_index() -> float:
        transaction = db.transaction()
        await transaction.start()
        await db.execute(FILL)
        await db.execute(change)
        updated, hot = await db.fetchrow(UPDATED.replace('"user"', table)) or (0, 0)
        await transaction.rollback()
        return float(hot / updated)

    assert await share_that_changes_no_index() > 0.9
    await db.execute(f"ALTER TABLE {table} SET (fillfactor = 100)")
    assert await share_that_changes_no_index() < 0.7, "full pages"
    await db.execute(f"ALTER TABLE {table} RESET (fillfactor)")
