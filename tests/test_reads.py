"""Each statement reads a bounded number of rows, or is listed here with its bound.

PostgreSQL plans every statement of `server.queries` without running it. A plan is bounded where a LIMIT stops it, or
where all columns of a unique key select the rows. A sort, an aggregate or a lock reads all of its input first, so a
LIMIT above it bounds nothing. This test does not see rows that a filter removes, which tests/test_cost.py covers. An
EXISTS that depends on no other row stops at the first one, but its plan does not show that, so it is listed, too.
"""

import importlib
import inspect
import json
import pkgutil
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import asyncpg
import pytest

import server.queries
from server.db.database import SESSION

pytestmark = pytest.mark.new_database

FRAGMENTS = {
    "unread.COUNT_REPLIES", "unread.COUNT_UNREAD", "users.MOVE_OWN", "presence.UNSEEN",
}  # fmt: skip
"""Parts of other statements, which are planned with those."""
FEED = "conversation_participant(user_id) cut 3"
"""Open invitations."""
WHY = {
    "one row, the two rows of a pair, or the first row": {
        "audit.LOCK_SERVER": "database_epoch()",
        "push.ANY": "push_endpoint()",
        "relationships.SET": "user()",
        "relationships.BETWEEN": "user_relationship(from_user_id, to_user_id)",
        "relationships.SWITCH": "user_relationship(from_user_id, to_user_id)",
    },
    "rows of one user or conversation, whose number is limited (docs/limits.md)": {
        "accounts.HASH": "account(provider_id, user_id)",
        "accounts.CHANGE": "account(provider_id, user_id); session(user_id)",
        "accounts.NEW_HASH": "account(provider_id, user_id)",
        "accounts.GIVE": "account(provider_id, user_id)",
        "bounds.MADE": "conversation()",
        "drafts.LIST": "draft(user_id) cut 1",
        "bounds.MEMBERSHIPS": "2 x conversation_participant(user_id)",
        "bounds.STARS": "message_star(user_id)",
        "bounds.RELATIONSHIPS": "user_relationship(from_user_id)",
        "bounds.REQUESTS": "user_relationship(from_user_id); user_relationship(to_user_id)",
        "bounds.REPORTS": "report(reporter_id)",
        "delivery_report.OF": (
            "3 x user_relationship(from_user_id); user_relationship(from_user_id) cut 1; "
            "user_relationship(to_user_id); user_relationship(to_user_id) cut 1"
        ),
        "bounds.THREADS": "thread_follow(user_id)",
        "pins.PINNED": "message(conversation_id)",
        "push.DUE": "push_endpoint(user_id)",
        "push.REGISTER": "push_endpoint(user_id) cut 1",
        "relationships.PAGE": "user_relationship(from_user_id) cut 1; user_relationship(to_user_id) cut 1",
        "scheduled.WAITING": "scheduled_message(sender_id)",
        "scheduled.SENDER": "scheduled_message(sender_id)",
        "scheduled.CLAIM": "scheduled_message(sender_id) cut 1",
        "sessions.CREATE": "account(provider_id); session(user_id) cut 1",
        "sessions.IS_THERE": "session(user_id)",
        "sessions.LIST": "session(user_id) cut 1",
        "sessions.REVOKE": "session(user_id)",
    },
    "5,000 conversations of a user, sorted for pages, or compared with each": {
        "conversation_views.PAGE": "conversation_participant(user_id) cut 1",
        "conversation_views.ORDER": "conversation_participant(user_id)",
        "badge.READ": "conversation_participant(user_id)",
        "latest.AGAIN": "conversation_participant(user_id) cut 1",
        "latest.NEWEST": "conversation_participant(user_id) cut 1",
        "invitations.LIST": "conversation_participant(user_id) cut 1",
        "unread.BADGES": "conversation_participant(user_id) cut 2",
    },
    "matches of words, pins, conversations and invitations of a user: rate and share of searches, 2 s": {
        "conversations.FIND": "conversation() cut 1",
        "feed.NAMED": "16 x message_search() cut 1",
        "feed.ROWS": FEED,
        "feed.PAGE": FEED,
        "feed.COUNT": FEED,
        "search_matches.INDEXED_IN_FEW": "message_search() cut 1",
        "search_matches.INDEXED_IN_MANY": "message_search() cut 1",
        "search_matches.PINNED": "message(conversation_id) cut 1",
        "users.SEARCH": "user() cut 2",
    },
    "participants of a conversation of up to 100 or 1,000, and users who hide from one user": {
        "changes.MISSED": (
            "conversation_participant(conversation_id); user_relationship(from_user_id); user_relationship(to_user_id)"
        ),
        "mentions.RESOLVE": "conversation_participant(conversation_id) cut 1",
        "receipts.DELIVERED": (
            "conversation_participant(conversation_id); 2 x user_relationship(from_user_id); "
            "2 x user_relationship(to_user_id)"
        ),
        "receipts.MOVED": (
            "conversation_participant(conversation_id); user_relationship(from_user_id); user_relationship(to_user_id)"
        ),
        "receipts.READERS": (
            "conversation_participant(conversation_id); user_relationship(from_user_id); user_relationship(to_user_id)"
        ),
    },
    "parts of one message: 1,000 edits, emoji, votes and reports of its participants": {
        "edits.COUNT": "message_edit(message_id)",
        "edits.DELETE": "message_reaction(message_id); poll_vote(message_id)",
        "messages.GET": "message_reaction(message_id, user_id)",
        "messages.PAGE": "message_reaction(message_id, user_id)",
        "messages.TIMELINE": "message_reaction(message_id, user_id)",
        "messages.REPLIES": "message_reaction(message_id, user_id)",
    },
    "a job, page by page": {
        "search_index.WAITING": "search_queue()",
        "invitations.END": "conversation_participant(conversation_id)",
        "erasure.TAKES_PART": "conversation_participant(user_id)",
        "audit.FORGET": "audit_entry(chain)",
        "erasure.LEAVE_DELETED": "conversation_participant(user_id)",
        "erasure.UNRELATE": "user_relationship(from_user_id, to_user_id)",
        "erasure.IS_ERASED": (
            "account(user_id); approach(); conversation_participant(user_id); draft(user_id); "
            "message_star(user_id); push_endpoint(user_id); scheduled_message(sender_id); session(user_id); "
            "thread_follow(user_id); user_relationship()"
        ),
    },
    "a command, or an export: one per minute and worker": {
        "accounts.CARD": "conversation_participant(user_id); session(user_id); user()",
        "audit.BROKEN": "audit_entry(chain) cut 1",
        "conversation_cards.LIST": "conversation_participant(user_id) cut 1",
        "checks.ENDS_OF_CONVERSATIONS": "conversation()",
        "checks.SOMEBODY": "conversation() cut 2; conversation_participant() cut 1; user() cut 2",
        "export.HEAD": (
            "account(user_id); conversation_participant(user_id); message_star(user_id); push_endpoint(user_id); "
            "report(reporter_id); session(user_id); thread_follow(user_id); user_relationship(from_user_id)"
        ),
        "export.SCHEDULED": "scheduled_message(sender_id) cut 1",
        "moderation.ALL_REPORTS": "report() cut 2",
        "transfers.IS_EMPTY": "conversation(); user()",
        "transfers.DISCARD_KEYS": "server_key()",
        "transfers.TOUCH": "conversation_participant()",
        "transfers.OVERFULL": "conversation_participant() cut 1; conversation_participant(user_id) cut 1",
        "transfers.IS_ERASED_IN": "conversation_participant()",
        "transfers.PAIRS": "conversation()",
        "transfers.COLUMNS": "pg_attribute()",
    },
}
"""Reads that neither a LIMIT nor a unique key bounds, by their bound.

For each statement, the tables and the ids that select their rows. For those with `cut`, all rows are read, and that
many LIMITs above bound the result.
"""
BOUNDED = {name: reads for statements in WHY.values() for name, reads in statements.items()}
LIMITS = {
    "search.RANK": 1,
    "audit.RECORD": 2,
    "badge.READ": 5,
    "bounds.FORGET_STARS": 1,
    "changes.SINCE": 7,
    "changes.MISSED": 9,
    "conversation_views.GET": 3,
    "conversation_views.PAGE": 4,
    "erasure.CLEAR_REPORTS": 2,
    "erasure.RELATED": 3,
    "export.MESSAGES": 2,
    "feed.NAMED": 2,
    "feed.ROWS": 30,
    "feed.PAGE": 30,
    "feed.COUNT": 28,
    "messages.GET": 2,
    "moderation.ALL_REPORTS": 2,
    "moderation.REPORTS": 2,
    "participants.HEIR": 3,
    "push.DUE": 5,
    "push.NOTICES": 2,
    "receipts.READ": 2,
    "receipts.READERS": 4,
    "receipts.MARK_UNREAD": 2,
    "scheduled.SENDER": 1,
    "sending.EARLIER": 1,
    "threads.GET": 4,
    "threads.LIST": 9,
    "unread.BADGES": 4,
    "users.SEARCH": 2,
    "own_news.READ": 8,
}
"""The number of LIMITs in statements that have more than the plan shows.

A LIMIT may stop a read inside another one, or select two rows of a unique key.
"""
STATEMENT = re.compile(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE|MERGE|\(SELECT)")
LIMIT = re.compile(r"\bLIMIT (CASE .*? END|\$?\w+( \+ \d+)?)")
STOPPING = {"Sort", "Aggregate", "Hash", "WindowAgg", "SetOp", "ModifyTable", "Memoize", "Recursive Union"}
"""Nodes of a plan that read all of their input, even below a LIMIT."""

CONDITIONS = ("Index Cond", "Recheck Cond", "Filter", "Join Filter")
Node = dict[str, Any]
Uniques = dict[str, list[set[str]]]


def statements() -> Iterator[tuple[str, str]]:
    """Return the name and text of each statement."""
    for module in pkgutil.iter_modules(server.queries.__path__):
        queries = importlib.import_module(f"server.queries.{module.name}")
        source = inspect.getsource(queries)
        for name, text in vars(queries).items():
            is_own = not name.startswith("_") and f"\n{name} = " in source
            if is_own and isinstance(text, str) and STATEMENT.match(text):
                yield f"{module.name}.{name}", text


class Above(NamedTuple):
    """The state above a node: conditions, the number of LIMITs, and whether one of them stops the node itself."""

    conditions: str
    limits: int
    is_limited: bool


class Planner:
    """Asks PostgreSQL for the plans of statements."""

    def __init__(self, db: "asyncpg.Connection[asyncpg.Record]", uniques: Uniques) -> None:
        self._db = db
        self._uniques = uniques

    async def fill(self, text: str) -> None:
        """Insert rows, since plans for empty tables differ from those for full ones."""
        await self._db.execute(text)

    async def types(self, text: str) -> str:
        """Return the types of the parameters of a statement."""
        await self._db.execute(f"PREPARE it AS {text}")
        types = await self._db.fetchval("SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'it'")
        await self._db.execute("DEALLOCATE it")
        return f"({', '.join(types)})" if types else ""

    async def reads(self, text: str, types: str = "") -> str:
        """Return the unbounded reads of a statement, sorted. Raises `PostgresError` if it is invalid.

        `types` are the types of its parameters, if they cannot be inferred.
        """
        plan = await self.plan(text, types)
        top = json.loads(plan)[0]["Plan"]
        existing = set(re.findall(r"EXISTS\(((?:Sub|Init)Plan \d+)\)", plan))
        counted = Counter(self._unbounded(top, Above("", 0, is_limited=False), existing))
        return "; ".join(f"{count} x {read}" if count > 1 else read for read, count in sorted(counted.items()))

    async def plan(self, text: str, types: str = "") -> str:
        """Return the generic plan of a statement, as JSON. Raises `PostgresError` if it is invalid."""
        await self._db.execute(f"PREPARE it {types} AS {text}")
        try:
            count = await self._db.fetchval(
                "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'it'"
            )
            given = f"({', '.join(['NULL'] * count)})" if count else ""
            return str(await self._db.fetchval(f"EXPLAIN (FORMAT JSON, VERBOSE, COSTS OFF) EXECUTE it{given}"))
        finally:
            await self._db.execute("DEALLOCATE it")

    def _unbounded(self, node: Node, above: Above, existing: set[str]) -> Iterator[str]:
        kind, table = node["Node Type"], node.get("Relation Name")
        conditions = " AND ".join(node[name] for name in CONDITIONS if name in node)
        if table is not None and "Scan" in kind:
            named = equated(node["Alias"], f"{conditions} AND {above.conditions}")
            is_stopped = above.is_limited and not kind.startswith("Bitmap")
            if not is_stopped and not any(key <= named for key in self._uniques[table]):
                ids = sorted(one for one in named if one.endswith("_id") or one in {"id", "chain"})
                yield f"{table}({', '.join(ids)})" + (f" cut {above.limits}" if above.limits else "")
        # A filter above a query may remove all of its rows.
        is_filtered = kind == "Subquery Scan" and "Filter" in node
        for child in node.get("Plans", []):
            relation, limits = child.get("Parent Relationship"), above.limits + (kind == "Limit")
            if relation in {"SubPlan", "InitPlan"}:
                limited = child.get("Subplan Name") in existing
            elif kind == "Limit" or (relation == "Inner" and node.get("Join Type") in {"Semi", "Anti"}):
                limited = True
            else:
                limited = above.is_limited and kind not in STOPPING and not is_filtered
            joined = node.get("Join Filter", "") if relation == "Inner" else ""
            below = Above(
                f"{above.conditions} AND {joined}" if joined else above.conditions, limits, is_limited=limited
            )
            yield from self._unbounded(child, below, existing)


def conjuncts(condition: str) -> Iterator[str]:
    """Return the parts of a condition of a plan that are joined by AND."""
    depth, start, parts = 0, 0, []
    for place, letter in enumerate(condition):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and condition.startswith(" AND ", place):
            parts.append(condition[start:place])
            start = place + len(" AND ")
    parts.append(condition[start:])
    for part in parts:
        if part.startswith("(") and part.endswith(")"):
            yield from conjuncts(part[1:-1])
        else:
            yield part


def equated(alias: str, conditions: str) -> set[str]:
    """Return the columns of a table that conditions of a plan compare for equality."""
    name = rf'"?{re.escape(alias)}"?\.(\w+)'
    parts = [part for part in conjuncts(conditions) if " OR " not in part]
    return {found[1] for part in parts if (found := re.match(f"{name} = ", part) or re.search(f" = {name}$", part))}


UNIQUES = """
SELECT c.relname, array_agg(a.attname::text) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey::int2[])
WHERE i.indisunique GROUP BY i.indexrelid, c.relname
"""


@pytest.fixture
async def planner(database_url: str) -> AsyncIterator[Planner]:
    db = await asyncpg.connect(database_url, server_settings=SESSION)
    uniques: Uniques = defaultdict(list)
    for table, columns in await db.fetch(UNIQUES):
        uniques[table].append(set(columns))
    yield Planner(db, uniques)
    await db.close()


async def test_every_read_is_bounded_or_listed(planner: Planner) -> None:
    found, fragments, limits = {}, set(), {}
    for name, text in statements():
        limits[name] = len(LIMIT.findall(uncommented(text)))
        try:
            reads = await planner.reads(text)
        except asyncpg.PostgresError:
            fragments.add(name)
            continue
        if reads:
            found[name] = reads
    assert fragments == FRAGMENTS
    new = {name: reads for name, reads in found.items() if BOUNDED.get(name) != reads}
    assert new == {}, "add a LIMIT, or list the bound"
    assert BOUNDED.keys() - found.keys() == set(), "remove these from the list, since they are bounded"
    assert {name: limits[name] for name in LIMITS} == LIMITS


CROWD = """
WITH them AS (
    INSERT INTO "user" (name, email) SELECT 'u' || n, 'u' || n || '@example.org' FROM generate_series(1, 5000) n
    RETURNING id
), one AS (SELECT min(id::text)::uuid AS id FROM them), made AS (
    INSERT INTO conversation (type, title, created_by, settings_version)
    SELECT 'channel', 'c' || n, one.id, 1 FROM generate_series(1, 1000) n, one RETURNING id
), about AS (SELECT min(id::text)::uuid AS id FROM made), said AS (
    INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
    SELECT about.id, one.id, 'Message', n, n FROM about, one, generate_series(1, 3000) n
), follows AS (
    INSERT INTO user_relationship (from_user_id, to_user_id, type, status)
    SELECT them.id, one.id, 'follow', 'active' FROM them, one WHERE them.id <> one.id
)
INSERT INTO conversation_participant (conversation_id, user_id, role, version, joined_version)
SELECT about.id, them.id, 'member', 2, 2 FROM about, them
"""
MATERIALIZED_PER_ROW = {"audit.BROKEN": "conversation"}
"""Statements that materialize rows of a table for each row of another one. The only one has a single outer row."""


def materialized_per_row(node: Node, *, is_kept: bool = False) -> Iterator[str]:
    """Return the tables whose rows a plan materializes and scans for each row of another table."""
    if is_kept and "Relation Name" in node:
        yield str(node["Relation Name"])
    is_below = node["Node Type"] == "Materialize" or (is_kept and node["Node Type"] in {"Limit", "Subquery Scan"})
    for child in node.get("Plans", []):
        yield from materialized_per_row(child, is_kept=is_below)


async def test_no_statement_scans_all_participants_for_each_given_user(planner: Planner) -> None:
    """The same holds for other tables. A hundred users times 5,000 participants took a second under a lock."""
    await planner.fill(CROWD)
    found = {}
    for name, text in statements():
        if name not in FRAGMENTS and (
            tables := set(materialized_per_row(json.loads(await planner.plan(text))[0]["Plan"]))
        ):
            found[name] = ", ".join(sorted(tables))
    assert found == MATERIALIZED_PER_ROW


async def test_every_removed_limit_is_detected(planner: Planner) -> None:
    """The reads of the statement change, or the number of its LIMITs if another one still bounds them."""
    unnoticed = set()
    for name, text in statements():
        if name in FRAGMENTS or name in LIMITS:
            continue
        plain, types = uncommented(text), await planner.types(text)
        for limit in LIMIT.finditer(plain):
            reads = await planner.reads(plain[: limit.start()] + plain[limit.end() :], types)
            if reads == BOUNDED.get(name, ""):
                unnoticed.add(f"{name}: {limit[0]}")
    assert unnoticed == set()


def uncommented(text: str) -> str:
    return re.sub(r"--[^\n]*", "", text)


EXAMPLES = {
    "SELECT id FROM message WHERE sender_id = $1": "message(sender_id)",
    "SELECT id FROM message WHERE sender_id = $1 LIMIT 5": "",
    "SELECT id FROM message WHERE sender_id = $1 ORDER BY created_at LIMIT 5": "message(sender_id) cut 1",
    "SELECT count(*) FROM message WHERE sender_id = $1 LIMIT 5": "message(sender_id) cut 1",
    "SELECT count(*) FROM (SELECT FROM message WHERE sender_id = $1 LIMIT 5) m": "",
    "SELECT ARRAY(SELECT id FROM message WHERE sender_id = $1)": "message(sender_id)",
    "SELECT EXISTS (SELECT FROM message o WHERE o.sender_id = m.sender_id) FROM message m WHERE m.id = $1": "",
    "SELECT id FROM message WHERE id = $1 OR sender_id = $2": "message()",
    "SELECT id FROM message WHERE id = ANY($1)": "",
    "UPDATE message SET content = '' WHERE sender_id = $1": "message(sender_id)",
}


async def test_examples_of_bounded_and_unbounded_reads(planner: Planner) -> None:
    for text, reads in EXAMPLES.items():
        assert await planner.reads(text) == reads, text


def parts(text: str) -> Iterator[tuple[str, str]]:
    """Return each parenthesis of a statement and the text before it, except for MATERIALIZED queries."""
    depth, begins = 0, 0
    for at, one in enumerate(text):
        if one == "(":
            depth += 1
            begins = at if depth == 1 else begins
        elif one == ")":
            depth -= 1
            if depth == 0:
                before, inner = text[:begins].rstrip(), text[begins + 1 : at]
                if not before.endswith("AS MATERIALIZED"):
                    yield before, inner
                    yield from parts(inner)


LOCKS = re.compile(r"\bFOR (?:NO KEY )?UPDATE\b")


def test_rows_of_a_batch_are_selected_once() -> None:
    """A plan may run a subquery for each row of another table. With SKIP LOCKED, each run then selects other rows.

    A batch of 100 became one of 166, and the next had 35, which looked like the last.
    """
    writes = re.compile(r"\b(?:UPDATE \S+ \w+ SET|UPDATE \S+ SET|DELETE FROM)\b")
    found = []
    for name, text in statements():
        for before, inner in parts(uncommented(text)) if writes.search(text) else ():
            alone = re.sub(r"\([^()]*\)", "", inner)
            while "(" in alone:
                alone = re.sub(r"\([^()]*\)", "", alone)
            if LIMIT.search(alone) and (LOCKS.search(alone) or re.search(r"\b(?:USING|IN)\Z", before)):
                found.append(name)
    assert found == []
