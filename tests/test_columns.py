"""Every column of schema.sql has a statement that writes it and one that reads it, or waits for what it is for."""

import re

import asyncpg

from protocol.ids import uuid7
from server.describe.columns import FOR_READERS, WAITING, columns, granted, without_targets, written


async def test_no_column_is_dead(database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    rows = await db.fetch("""
        SELECT table_name || '.' || column_name FROM information_schema.columns
        JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_schema = 'public' AND table_type = 'BASE TABLE' AND table_name <> 'schema_migration'
    """)
    await db.close()
    known = {f"{column.table}.{column.name}": column for column in columns()}
    assert known.keys() == {row[0] for row in rows}
    assert {place for place, column in known.items() if not column.note and not column.writers} == set()
    assert {place for place, column in known.items() if not column.note and not column.readers} == set()
    assert known.keys() >= FOR_READERS
    # What waits is not in use already.
    for place in WAITING:
        if "." in place:
            column = known[place]
            writers = [name for name in column.writers if name != "its default" and not name.startswith("erasure.")]
            assert not (column.readers and writers), place


async def test_columns_that_a_reader_reads_are_listed(database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    role = f"lister_{uuid7().hex}"
    try:
        await db.execute(f"CREATE ROLE {role}; SELECT grant_reader('{role}')")
        rows = await db.fetch(
            """SELECT c.relname, a.attname, has_column_privilege($1, c.oid, a.attnum, 'SELECT') FROM pg_class c
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')""",
            role,
        )  # fmt: skip
    finally:
        await db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await db.close()
    readable = {(table, column) for table, column, is_readable in rows if is_readable}
    listed = granted()
    assert {table for table, _ in readable} == listed.keys()
    for table, column, is_readable in rows:
        assert is_readable == (table in listed and (not listed[table] or column in listed[table])), (table, column)


def test_the_test_knows_a_writer_from_a_reader() -> None:
    text = (
        "UPDATE message m SET content = $1, version = b.version FROM bumped b WHERE m.id = $2 RETURNING m.sent_version"
    )
    assert written(text) == {"message": {"content", "version"}}
    assert re.search(r"\bcontent\b", without_targets(text)) is None
    assert re.search(r"\bsent_version\b", without_targets(text))
    assert written("INSERT INTO report (id, reason) VALUES ($1, $2)") == {"report": {"id", "reason"}}
