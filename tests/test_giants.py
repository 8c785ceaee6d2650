"""Cost of every statement in a database of many small conversations and a giant one, which the planner takes for one
of average size.
"""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_COUNTED_PARTICIPANTS, MAX_TRACED_PARTICIPANTS
from server.db.database import SESSION
from tests.test_cost import MAKE_POLL, READS_ALL, Place, Plan, explained, hot, prepare

pytestmark = pytest.mark.new_database
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

SMALL, GIANT = 2_000, 20_000
"""The number of small conversations, and of participants and messages of the giant one."""
FILL = f"""
INSERT INTO "user" (id, name, email)
SELECT lpad(n::text, 32, '0')::uuid, 'User ' || n, n || '@example.org' FROM generate_series(1, {GIANT + 100}) n;
INSERT INTO session (user_id, token, expires_at) SELECT id, id::text, now() + interval '1 day' FROM "user";
INSERT INTO conversation (id, type, title, created_by, version, participant_count, message_count)
SELECT lpad(n::text, 32, '0')::uuid, 'group', 'Room', lpad(n::text, 32, '0')::uuid, 100000,
    CASE WHEN n <= {SMALL} THEN 5 ELSE {GIANT} END, CASE WHEN n <= {SMALL} THEN 5 ELSE {GIANT} END
FROM generate_series(1, {SMALL + 1}) n;
INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version, role)
SELECT lpad(n::text, 32, '0')::uuid, lpad((n + k * 7)::text, 32, '0')::uuid, 1 + k, 1 + k,
    CASE k WHEN 0 THEN 'owner' ELSE 'member' END
FROM generate_series(1, {SMALL}) n, generate_series(0, 4) k;
INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version, role)
SELECT lpad({SMALL + 1}::text, 32, '0')::uuid, lpad(n::text, 32, '0')::uuid, n, n,
    CASE n WHEN 1 THEN 'owner' ELSE 'member' END
FROM generate_series(1, {GIANT}) n;
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT lpad(n::text, 32, '0')::uuid, lpad(n::text, 32, '0')::uuid, 'Words', 50000 + k, 50000 + k
FROM generate_series(1, {SMALL}) n, generate_series(1, 5) k UNION ALL
SELECT lpad({SMALL + 1}::text, 32, '0')::uuid, lpad(n::text, 32, '0')::uuid, 'Words', 50000 + n, 50000 + n
FROM generate_series(1, {GIANT}) n
"""
FEW_ROWS = """
INSERT INTO "user" (name, email) SELECT 'Early ' || n, 'early' || n || '@example.org' FROM generate_series(1, 8) n;
INSERT INTO session (user_id, token, expires_at) SELECT id, 'early' || name, now() + interval '1 day' FROM "user";
INSERT INTO conversation (type, title, created_by, participant_count) SELECT 'group', 'Early', id, 8 FROM "user";
INSERT INTO conversation_participant (conversation_id, user_id, version) SELECT c.id, u.id, 1
FROM conversation c, "user" u;
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT c.id, c.created_by, 'Words', k, k FROM conversation c, generate_series(2, 6) k;
VACUUM ANALYZE
"""
MIDDLE = "SELECT id FROM message WHERE conversation_id = $1 ORDER BY sent_version OFFSET $2 LIMIT 1"
JOIN_ALL = """
INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version)
SELECT c.id, $1, 2, 2 FROM conversation c ON CONFLICT DO NOTHING
"""
INDEXES = """
SELECT c.relname, pg_get_indexdef(c.oid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE c.relnamespace = 'public'::regnamespace
    AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)
ORDER BY c.relname
"""
FEW = 300
"""Rows of a page, of its messages and of counts of unread messages, which the small conversation does not have."""
MOST = 1_000
"""Max rows that a statement reads in a small conversation."""
COUNTS = {
    "resume, all missed": 5_000,
    "get": 5 * MAX_COUNTED_PARTICIPANTS + FEW,
    "readers": 10 * MAX_COUNTED_PARTICIPANTS + FEW,
    "why": 9 * MAX_TRACED_PARTICIPANTS + 2 * FEW,
}
"""Statements that read more rows in a large conversation, up to a bound. A row counts in each node of the plan."""


class Spot(NamedTuple):
    """A participant of a conversation, and a message in its middle."""

    place: Place
    message_id: MessageId

    def statements(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Return all statements that clients can trigger."""
        return hot(self.place, {"new": uuid4(), "middle": self.message_id})


@pytest.fixture
async def filler(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url, server_settings={"session_replication_role": "replica"})
    yield connection
    await connection.close()


async def planning(url: str, spot: Spot) -> Connection:
    """Return a connection that has planned all statements."""
    db = await asyncpg.connect(url, server_settings=SESSION | {"statement_timeout": "5s"})
    await prepare(db, spot.statements())
    return db


async def restore_indexes(filler: Connection) -> None:
    """Create the indexes again in the order of their names, as a restored dump does. Of indexes with the same cost,
    the planner takes the newest.
    """
    for name, definition in await filler.fetch(INDEXES):
        await filler.execute(f"DROP INDEX {name}; {definition}")


async def fill(filler: Connection) -> tuple[Spot, Spot]:
    """Fill the tables. Return participants of a small conversation and of the giant one."""
    await filler.execute(FILL)
    spots = []
    for number, size in ((17, 5), (SMALL + 1, GIANT)):
        conversation_id = ConversationId(UUID(f"{number:032}"))
        message_id = await filler.fetchval(MIDDLE, conversation_id, size // 2)
        await filler.execute(MAKE_POLL, message_id)
        user_id = UserId(UUID(f"{17 if size == 5 else GIANT // 2:032}"))
        spots.append(Spot(Place(conversation_id, user_id, 50_000 + size), message_id))
    return spots[0], spots[1]


async def measured(db: Connection, spot: Spot) -> dict[str, Plan]:
    statements = spot.statements()
    # After ANALYZE, the first call plans the statements of a function, and reads pages for that.
    for name in ("send", "react", "vote", "expire"):
        await explained(db, name, statements[name][1])
    return {name: await explained(db, name, arguments) for name, (_, arguments) in statements.items()}


def excess(small: dict[str, Plan], giant: dict[str, Plan]) -> dict[str, Any]:
    """Return the plans of statements that read too much in the giant conversation."""
    return {
        name: (small[name][:3], plan[:3])
        for name, plan in giant.items()
        if plan.rows > small[name].rows + COUNTS.get(name, FEW)
        or plan.pages > small[name].pages + COUNTS.get(name, FEW)
        or plan.scanned
    }


@pytest.mark.timeout(90)
@pytest.mark.parametrize("is_restored", [pytest.param(False, marks=pytest.mark.more), True])
@pytest.mark.parametrize(
    "state",
    [
        pytest.param("new", marks=pytest.mark.long),
        pytest.param("small", marks=pytest.mark.long),
        pytest.param("filled", marks=pytest.mark.more),
        "analyzed",
    ],
)
async def test_statements_read_few_rows_of_a_giant_conversation(
    database_url: str, filler: Connection, state: str, *, is_restored: bool
) -> None:
    """Statements are planned with empty tables, with small analyzed ones, or with full ones, analyzed or never."""
    if is_restored:
        await restore_indexes(filler)
    if state == "small":
        for statement in FEW_ROWS.split(";"):
            await filler.execute(statement)
    if state in {"new", "small"}:
        nowhere = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
        db = await planning(database_url, Spot(nowhere, MessageId(uuid4())))
        small, giant = await fill(filler)
    else:
        small, giant = await fill(filler)
        if state == "analyzed":
            await filler.execute("VACUUM ANALYZE")
        db = await planning(database_url, small)
    of_small, of_giant = await measured(db, small), await measured(db, giant)
    assert {name: plan.rows for name, plan in of_small.items() if plan.rows > MOST} == {}
    assert excess(of_small, of_giant) == {}
    await filler.execute(JOIN_ALL, giant.place.user_id)
    of_busy = await measured(db, giant)
    await db.close()
    assert excess(of_giant, of_busy).keys() <= READS_ALL, "the user is in all conversations"


async def test_an_index_on_the_column_would_read_all_participants(database_url: str, filler: Connection) -> None:
    await filler.execute("CREATE INDEX again_idx ON conversation_participant (conversation_id, version)")
    nowhere = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
    db = await planning(database_url, Spot(nowhere, MessageId(uuid4())))
    small, giant = await fill(filler)
    of_small, of_giant = await measured(db, small), await measured(db, giant)
    await db.close()
    assert {"read", "send", "react", "typing"} <= excess(of_small, of_giant).keys()
