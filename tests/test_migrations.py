"""Migrations run beside older workers, do not lock a table for long, and can be resumed."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from protocol.ids import uuid7
from server.cli import main
from server.core.errors import Fatal
from server.db import migrate
from server.db.database import Db
from tests.test_hostile_values import sharing
from tests.test_may_send import WAITING

MOST = 100
"""Max rows that a migration changes before it commits."""
STOPPED = 8
"""Steps up to this one rewrite tables or drop columns, so servers are stopped before them (docs/operations.md)."""
NEXT = f"{len(migrate.known()) + 1:04}_next"
HAZARDS = {
    "an index that is not built CONCURRENTLY": r"CREATE (UNIQUE )?INDEX (?!CONCURRENTLY)",
    "a constraint without NOT VALID or USING INDEX": r"ADD CONSTRAINT (?!.*(NOT VALID|USING INDEX))",
    "a column with a constraint": r"ADD (COLUMN )?(?!CONSTRAINT)\S+ \S.*"
    "(CHECK|REFERENCES|UNIQUE|PRIMARY KEY|GENERATED|SERIAL)",
    "a column with a default that differs per row": r"ADD (COLUMN )?\S+ \S.*DEFAULT (?!now\(\))\S*\w\(",
    "a column whose type changes": r"ALTER (COLUMN )?\S+ (SET DATA )?TYPE ",
    "a column that is scanned for nulls": r"SET NOT NULL",
    "an object that older workers use": r"ALTER TABLE .*(DROP (?!CONSTRAINT|NOT NULL|DEFAULT)|RENAME )"
    r"|(DROP|ALTER (?=.* RENAME )) ?(TABLE|VIEW|FUNCTION|TYPE)",
    "a table that is rewritten": r"\bCLUSTER\b|VACUUM FULL|SET (UN)?LOGGED|TABLESPACE|REINDEX (?!.*CONCURRENTLY)",
}
SAMPLES = [
    "CREATE UNIQUE INDEX one ON message (id);", "ALTER TABLE message ADD CONSTRAINT one CHECK (true);",
    'ALTER TABLE "user" ADD one uuid REFERENCES message (id);',
    "ALTER TABLE message ADD COLUMN one uuid DEFAULT gen_random_uuid();",
    "ALTER TABLE message ALTER COLUMN content TYPE varchar;", "ALTER TABLE message ALTER content SET NOT NULL;",
    "ALTER TABLE message DROP content;", "ALTER TABLE message SET UNLOGGED;",
    "ALTER TABLE message RENAME content TO text;", "DROP FUNCTION me_json;", "ALTER FUNCTION me_json RENAME TO i_json;",
]  # fmt: skip
HARMLESS = """
    CREATE TABLE one (id uuid PRIMARY KEY); CREATE INDEX one_idx ON one (id);
    ALTER TABLE one ADD CONSTRAINT a CHECK (true);
    ALTER TABLE message ADD COLUMN one timestamptz NOT NULL DEFAULT now(); DROP INDEX message_one_idx;
    ALTER TABLE message ADD CONSTRAINT one CHECK (true) NOT VALID; CREATE INDEX CONCURRENTLY one_idx ON message (id);
"""


def hazards(text: str) -> list[str]:
    """Return the statements of a migration that lock an existing table for as long as it takes to scan it."""
    text = re.sub(r"--.*", "", text)
    text = re.sub(r"\$(\w*)\$.*?\$\1\$", "", text, flags=re.DOTALL)
    made = set(re.findall(r"CREATE TABLE (\w+)", text))
    found = []
    for statement in (" ".join(part.split()) for part in text.split(";")):
        about = re.search(r'(?:ALTER TABLE|CREATE (?:UNIQUE )?INDEX \w+ ON) "?(\w+)', statement)
        if about is None or about[1] not in made:
            found += [f"{name}: {statement}" for name, pattern in HAZARDS.items() if re.search(pattern, statement)]
    return found


def test_no_migration_locks_a_table_while_it_scans_it() -> None:
    assert all(hazards(sample) for sample in SAMPLES)
    assert hazards(HARMLESS) == []
    texts = {step.name: step.path.read_text() for step in migrate.known() if step.number > STOPPED}
    assert {name: found for name, text in texts.items() if (found := hazards(text))} == {}


def test_migration_that_builds_an_index_concurrently_does_only_that() -> None:
    texts = [step.path.read_text() for step in migrate.known()]
    building = [re.sub(r"--.*", "", text) for text in texts if "CONCURRENTLY" in text]
    assert building
    assert [left for text in building if (left := migrate.BUILD.sub("", text).strip())] == []


def test_migration_that_changes_rows_is_one_block_that_commits() -> None:
    """Such a block runs alone, and runs again if it was interrupted.

    Other migrations would keep their locks to the end.
    """
    for step in migrate.known():
        text = re.sub(r"--.*", "", step.path.read_text()).strip()
        outside = re.sub(r"CREATE (?:OR REPLACE )?FUNCTION.*?(\$\w*\$).*?\1;", "", text, flags=re.DOTALL)
        if migrate.COMMITS.search(text):
            assert re.fullmatch(r"DO \$\$(?:(?!\$\$).)*\$\$;", text, re.DOTALL), step.name
            assert all(int(most) <= MOST for most in re.findall(r"\bLIMIT (\d+)", text)), step.name
        elif step.number > STOPPED:
            assert not re.search(r"\bUPDATE (?!ON\b)|\bDELETE FROM|\bINSERT INTO", outside), step.name


@pytest.fixture
async def db(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Db]:
    """A connection to a database that the next migration adds an index to."""
    shutil.copytree(migrate.ROOT / "migrations", tmp_path / "migrations")
    text = 'CREATE INDEX CONCURRENTLY user_next_idx ON "user" (location);'
    (tmp_path / "migrations" / f"{NEXT}.sql").write_text(text)
    monkeypatch.setattr(migrate, "ROOT", tmp_path)
    connection = await asyncpg.connect(database_url)
    for name in ("Ada", "Bo"):
        await connection.execute('INSERT INTO "user" (name, email) VALUES ($1, lower($1))', name)
    yield connection
    await connection.close()


async def test_invalid_index_of_a_failed_build_is_rebuilt(db: Db, database_url: str) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await db.execute('CREATE UNIQUE INDEX CONCURRENTLY user_next_idx ON "user" (status)')
    assert await db.fetchval(migrate.IS_VALID, "user_next_idx") is False
    done = await asyncio.gather(*(migrate.migrate(database_url) for _ in range(3)))
    assert sorted(done) == [[], [], [NEXT]]
    assert await db.fetchval(migrate.IS_VALID, "user_next_idx")
    assert "(location)" in await db.fetchval("SELECT pg_get_indexdef('user_next_idx'::regclass)")
    assert await migrate.is_current(db)


MEETS_ROWS = {
    ("0003", "SET NOT NULL"): "the foreign key to the message gives each row a value",
    ("0003", "ADD CONSTRAINT"): "the value is that of another foreign key",
    ("0004", "ADD CONSTRAINT"): "the previous constraint allowed fewer values",
    ("0005", "SET NOT NULL"): "the foreign key to the message gives each row a value",
    ("0005", "INSERT INTO"): "the tables are new, and the rows are grouped by their keys, or have the ids of messages",
    ("0073", "ADD CONSTRAINT"): "the constraint is not valid yet",
    ("0074", "VALIDATE CONSTRAINT"): "the previous constraint allowed fewer values",
    ("0025", "CREATE UNIQUE INDEX"): "test_error_about_a_unique_index_names_the_conflicting_rows",
}
"""Statements that rows of an older database could violate, with the reason why they do not or the test of the error."""


def test_every_statement_that_rows_may_violate_is_listed() -> None:
    found: set[tuple[str, str]] = set()
    for migration in migrate.known()[1:]:
        # The definitions of functions and blocks store no rows. Blocks continue after each conflict (0019).
        text = re.sub(
            r"\$(\w*)\$.*?\$\1\$|--[^\n]*|CREATE TABLE[^;]+;", "", migration.path.read_text(), flags=re.DOTALL
        )
        for kind in ("SET NOT NULL", "ADD CONSTRAINT", "INSERT INTO", "CREATE UNIQUE INDEX", "VALIDATE CONSTRAINT"):
            if kind in text:
                found.add((migration.name[:4], kind))
    assert found == MEETS_ROWS.keys()


async def test_error_about_a_unique_index_names_the_conflicting_rows(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "migrations").mkdir()
    for one in migrate.known()[:25]:
        shutil.copy(one.path, tmp_path / "migrations")
    monkeypatch.setattr(migrate, "ROOT", tmp_path)
    async with connected(database_url) as db:
        await db.execute("DROP INDEX conversation_id_hash_key; DELETE FROM schema_migration WHERE number > 24")
        ada = await db.fetchval("INSERT INTO \"user\" (name, email) VALUES ('Ada', 'ada@example.org') RETURNING id")
        alike = sharing(uuid7(), 2)
        for shared in alike:
            await db.execute(
                "INSERT INTO conversation (id, type, title, created_by) VALUES ($1, 'channel', 'One', $2)", shared, ada
            )
        for _ in range(2):  # the first build leaves an invalid index
            with pytest.raises(Fatal) as told:
                await migrate.migrate(database_url)
            assert all(str(shared) in str(told.value) for shared in alike)
            assert "DELETE FROM conversation WHERE id" in str(told.value)
        await db.execute("DELETE FROM conversation WHERE id = $1", alike[0])
        assert await migrate.migrate(database_url) == ["0025_conversations_by_hash"]
        assert await db.fetchval(migrate.IS_VALID, "conversation_id_hash_key")


@pytest.mark.usefixtures("db")
async def test_error_about_a_forbidden_row_names_the_constraint(database_url: str) -> None:
    path = migrate.ROOT / "migrations" / f"{NEXT}.sql"
    path.write_text("ALTER TABLE \"user\" ADD CONSTRAINT user_next_name CHECK (name <> 'Bo');")
    with pytest.raises(Fatal, match="rows of the table user that violate user_next_name"):
        await migrate.migrate(database_url)
    path.write_text("ALTER TABLE \"user\" ADD CONSTRAINT user_next_name CHECK (name <> 'Cy');")
    assert await migrate.migrate(database_url) == [NEXT]


async def test_writes_continue_while_an_index_build_waits(db: Db, database_url: str) -> None:
    writer = await asyncpg.connect(database_url)
    async with db.transaction():
        await db.execute("UPDATE \"user\" SET bio = 'Begun before' WHERE name = 'Ada'")
        migrating = asyncio.create_task(migrate.migrate(database_url))
        async with asyncio.timeout(10):
            while not await writer.fetchval("SELECT count(*) FROM pg_stat_progress_create_index"):
                await asyncio.sleep(0.01)
        await writer.execute("SET lock_timeout = '2s'; UPDATE \"user\" SET bio = 'Written' WHERE name = 'Bo'")
        assert not migrating.done()
    assert await migrating == [NEXT]
    await writer.close()


async def test_existing_index_is_kept(db: Db, database_url: str) -> None:
    await db.execute('CREATE INDEX user_next_idx ON "user" (location)')
    before = await db.fetchval("SELECT 'user_next_idx'::regclass::oid")
    assert await migrate.migrate(database_url) == [NEXT]
    assert await db.fetchval("SELECT 'user_next_idx'::regclass::oid") == before


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Db]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


SPEAK = """
WITH a AS (INSERT INTO "user" (name, email) VALUES ($1, $1) RETURNING id),
    c AS (
        INSERT INTO conversation (id, type, title, created_by, version)
        SELECT $2, 'group', 'G', id, 1 FROM a RETURNING id
    ),
    m AS (
        INSERT INTO message (id, conversation_id, sender_id, content, reactions, sent_version, version)
        SELECT gen_random_uuid(), c.id, a.id, 'Hello', $3, 1, 1 FROM a, c RETURNING id, conversation_id, sender_id
    )
INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
SELECT m.id, m.sender_id, jsonb_object_keys($3), m.conversation_id, 1, m.sender_id FROM m
"""


async def test_migration_of_many_rows_locks_one_conversation_at_a_time(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(migrate.ROOT / "migrations", tmp_path / "migrations")
    (step,) = (step for step in migrate.known() if step.name.endswith("spelling_of_reactions"))
    shutil.copy(step.path, tmp_path / "migrations" / f"{NEXT}.sql")
    monkeypatch.setattr(migrate, "ROOT", tmp_path)
    one, other = sorted((uuid7(), uuid7()))
    reactions = "SELECT reactions::text FROM message WHERE conversation_id = $1"
    async with connected(database_url) as holder, connected(database_url) as db:
        for about in (one, other):
            await db.execute(SPEAK, about.hex, about, '{"\u2764": 1, ":TADA:": 1}')
        async with holder.transaction():
            await holder.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", other)
            migrating = asyncio.create_task(migrate.migrate(database_url))
            async with asyncio.timeout(10):
                while not await db.fetchval(WAITING):
                    await asyncio.sleep(0.01)
            async with db.transaction():
                await db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE NOWAIT", one)
            assert "tada" in await db.fetchval(reactions, one)
            assert "TADA" in await db.fetchval(reactions, other)
            # The migration gives up the wait after `LOCK_SECONDS`, keeps its progress, and continues from there.
            version = await db.fetchval("SELECT version FROM conversation WHERE id = $1", one)
            assert version == 5
        assert await migrating == [NEXT]
        for about in (one, other):
            assert await db.fetchval(reactions, about) == '{":tada:": 1, "\u2764\ufe0f": 1}'
            assert await db.fetchval("SELECT version FROM conversation WHERE id = $1", about) == version


async def test_warning_of_a_migration_is_logged_once(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(migrate.ROOT / "migrations", tmp_path / "migrations")
    speaks = "RAISE WARNING E'keep\\n%', 'me'; RAISE WARNING E'keep\\nme'; RAISE NOTICE 'note'; RAISE LOG 'no';"
    text = f"DO $$ BEGIN {speaks} END $$;"
    (tmp_path / "migrations" / f"{NEXT}.sql").write_text(text)
    monkeypatch.setattr(migrate, "ROOT", tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)
    await asyncio.to_thread(main._run, ["migrate"])  # noqa: SLF001
    printed = capsys.readouterr()
    assert printed.out == f"applied  {NEXT}\n"
    lines = printed.err.splitlines()
    assert [line.split(" openchat ")[1] for line in lines] == [
        r"WARNING PostgreSQL: keep\nme",
        "WARNING PostgreSQL: note",
    ]
