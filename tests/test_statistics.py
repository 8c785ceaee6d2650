"""EXPLAIN estimates reveal nothing about hidden rows to a reader of the database."""

import json
from collections.abc import AsyncIterator
from typing import NamedTuple

import asyncpg
import pytest

from protocol.ids import uuid7
from server.db.database import Db

pytestmark = pytest.mark.new_database

KEPT = """
SELECT count(*) FROM pg_attribute a
WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attstattarget IS DISTINCT FROM 0
    AND a.attrelid IN (SELECT p.polrelid FROM pg_policy p)
"""
"""Counts columns of tables with policies for which ANALYZE collects statistics."""


class OwnerAndReader(NamedTuple):
    """A connection of the owner, and one of a reader with its name."""

    owner: Db
    reader: Db
    name: str


@pytest.fixture
async def both(database_url: str) -> AsyncIterator[OwnerAndReader]:
    owner, reader = [await asyncpg.connect(database_url) for _ in range(2)]
    name = f"reader_{uuid7().hex}"
    assert not await owner.fetchval(KEPT), "without a reader, there are no statistics either"
    await owner.execute(f"CREATE ROLE {name}; ALTER TABLE draft ALTER COLUMN content SET STATISTICS 100")
    await owner.execute("SELECT grant_reader($1)", name)
    await reader.execute(f"SET ROLE {name}")
    yield OwnerAndReader(owner, reader, name)
    await reader.close()
    await owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
    await owner.close()


READABLE = """
SELECT c.relname AS table, a.attname AS column, format_type(a.atttypid, NULL) AS type
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
    AND has_column_privilege($1, c.oid, a.attnum, 'SELECT')
ORDER BY 1, a.attnum
"""
# Rows that our constraints would reject, with the same value in nine of ten.
UNBOUND = """
DO $$
DECLARE
    found record;
BEGIN
    FOR found IN SELECT conrelid::regclass AS place, conname FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u') ORDER BY contype = 'p'
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I CASCADE', found.place, found.conname);
    END LOOP;
    FOR found IN SELECT indexrelid::regclass AS name FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE c.relnamespace = 'public'::regnamespace AND i.indisunique
    LOOP
        EXECUTE format('DROP INDEX %s', found.name);
    END LOOP;
END $$
"""
VALUES = {
    "text": ("'frequent'", "md5(n::text)", "'nowhere'"),
    "uuid": ("'00000000-0000-0000-0000-000000000001'::uuid", "md5(n::text)::uuid", f"'{uuid7()}'"),
    "timestamp with time zone": ("'2020-01-01'::timestamptz", "now() - n * interval '1 day'", "'1990-01-01'"),
    "bigint": ("7::bigint", "n + 100", "9"),
    "integer": ("7", "n::integer + 100", "9"),
    "boolean": ("true", "false", "false"),
    "jsonb": ("'{\"a\": 7}'::jsonb", "jsonb_build_object('b', n)", "'{\"c\": 7}'"),
    "bytea": ("'frequent'::bytea", "sha256(n::text::bytea)", "'nowhere'"),
    "uuid[]": ("'{00000000-0000-0000-0000-000000000001}'::uuid[]", "ARRAY[md5(n::text)::uuid]", f"'{{{uuid7()}}}'"),
    "text[]": ("'{frequent}'::text[]", "ARRAY[md5(n::text)]", "'{nowhere}'"),
    "integer[]": ("'{7}'::integer[]", "ARRAY[n::integer + 100]", "'{9}'"),
}
"""For each type: the value of most rows, an expression for the other rows, and a value that no row has."""
TEXTS = {
    "to_tsvector('simple', name || ' ' || coalesce(display_name, '')) @@": '"user"',
    "to_tsvector('simple', coalesce(title, '') || ' ' || coalesce(description, '')) @@": "conversation",
}
"""Expressions of indexes, which have their own statistics."""


async def estimated(db: Db, table: str, condition: str) -> int:
    """Return the number of rows that PostgreSQL expects, times 10^9, so that rounding hides no difference."""
    plan = await db.fetchval(
        f"EXPLAIN (FORMAT JSON) SELECT FROM {table} t, generate_series(1, 1000000000) WHERE {condition}"
    )
    return int(json.loads(plan)[0]["Plan"]["Plan Rows"])


async def test_estimates_do_not_reveal_frequent_values(both: OwnerAndReader) -> None:
    """Statistics cover all rows, including hidden ones, and PostgreSQL estimates leakproof comparisons by them."""
    columns = await both.owner.fetch(READABLE, both.name)
    await both.owner.execute(UNBOUND)
    await both.owner.execute("SET session_replication_role = replica")
    kept = """SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
        WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped"""
    for table in {f'"{row["table"]}"' for row in columns} - {'"user_profile"'}:
        made = {f'"{name}"': VALUES[kind] for name, kind in await both.owner.fetch(kept, table) if kind in VALUES}
        values = ", ".join(f"CASE WHEN n % 10 > 0 THEN {often} ELSE {once} END" for often, once, _ in made.values())
        await both.owner.execute(
            f"INSERT INTO {table} ({', '.join(made)}) SELECT {values} FROM generate_series(1, 500) n"
        )
    await both.owner.execute("ANALYZE")
    told = set()
    for table, column, kind in columns:
        often, _, nowhere = VALUES[kind]
        at = f't."{column}"'
        pairs = [(f"{at} = {often}", f"{at} = {nowhere}"), (f"{at} IN ({often}, NULL)", f"{at} IN ({nowhere}, NULL)")]
        if kind not in {"boolean", "jsonb"}:
            pairs += [(f"{at} < {often}", f"{at} < {nowhere}"), (f"{at} > {often}", f"{at} > {nowhere}")]
        if kind == "boolean":
            pairs += [(at, f"NOT {at}"), (f"{at} IS TRUE", f"{at} IS FALSE")]
        if kind.endswith("[]"):
            pairs += [(f"{at} @> {often}", f"{at} @> {nowhere}")]
        for one, other in pairs:
            if await estimated(both.reader, f'"{table}"', one) != await estimated(both.reader, f'"{table}"', other):
                told.add(f"{table}.{column}: {one}")
    for expression, table in TEXTS.items():
        found = [await estimated(both.reader, table, f"{expression} '{word}'") for word in ("frequent", "nowhere")]
        if found[0] != found[1]:
            told.add(expression)
    assert told == set()
    assert {"message", "user", "session", "report", "user_profile", "attachment"} <= {row["table"] for row in columns}
    # Statistics of nulls, lengths and combinations are not readable either.
    readable = sorted({row["table"] for row in columns})
    assert await both.owner.fetch("SELECT tablename, attname FROM pg_stats WHERE tablename = ANY($1)", readable) == []
    assert await both.owner.fetchval("SELECT count(*) FROM pg_statistic_ext") == 0
