"""Bring a database to the schema that this program knows: schema.sql for an empty one, migrations for others."""

from pathlib import Path
from typing import NamedTuple, TypeAlias

import asyncpg

from server.errors import Fatal

LOCK_SECONDS = 60
"""Max wait of a migration for a lock on a table, in seconds."""

_HERE = Path(__file__).parent
ROOT = _HERE if (_HERE / "schema.sql").exists() else _HERE.parent
"""Where schema.sql and migrations/ are: inside the package when installed, beside it in a checkout."""

TABLE = """
CREATE TABLE schema_migration (
    number integer CONSTRAINT schema_migration_pkey PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
LOCK = "LOCK TABLE schema_migration IN SHARE ROW EXCLUSIVE MODE"
"""Lets one process migrate at a time. A reader can take an advisory lock, but not this one."""
PATIENCE = f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"
HAS_TABLE = "SELECT to_regclass('public.schema_migration') IS NOT NULL"
IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM pg_tables WHERE schemaname = 'public')"
APPLIED = "SELECT coalesce(max(number), 0) FROM schema_migration"
RECORD = "INSERT INTO schema_migration (number, name) VALUES ($1, $2)"
CLOSE = "SELECT close_to_public()"
NEW_EPOCH = "UPDATE database_epoch SET epoch = gen_random_uuid()"


Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"


class Migration(NamedTuple):
    """One step; `number` is its place, counted from 1 without holes."""

    number: int
    name: str
    path: Path


def known() -> list[Migration]:
    """Return all migrations, in order."""
    paths = sorted((ROOT / "migrations").glob("*.sql"))
    return [Migration(int(path.stem.split("_")[0]), path.stem, path) for path in paths]


async def plan(connection: Connection) -> list[str]:
    """Return what `migrate` would do, a line each; none if the database is up to date. Raises Fatal as it does."""
    if await connection.fetchval(IS_EMPTY):
        return ["schema.sql (the database is empty)"]
    applied = await _applied(connection)
    return [migration.name for migration in known() if migration.number > applied]


async def migrate(connection: Connection) -> list[str]:
    """Do what `plan` says and return it. Safe to call from many processes at once.

    Raises Fatal if the schema is newer than the program, or is not OpenChat's.
    """
    try:
        return await _migrate(connection)
    except asyncpg.LockNotAvailableError as error:
        raise Fatal(
            f"another session held a table for {LOCK_SECONDS} seconds, such as a reader's open transaction or another "
            "migration; end it (see pg_locks) and start again."
        ) from error


async def _migrate(connection: Connection) -> list[str]:
    if await connection.fetchval(IS_EMPTY):
        try:
            return await _create(connection)
        except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError):
            pass  # Another process created the tables first, and has committed.
    await _applied(connection)
    done = []
    while (name := await _step(connection)) is not None:
        done.append(name)
    return done


async def _create(connection: Connection) -> list[str]:
    """Create all tables. The first statement lets one process do so at a time; others wait, and raise."""
    async with connection.transaction():
        await connection.execute(TABLE)
        await connection.execute((ROOT / "schema.sql").read_text())
        await connection.executemany(RECORD, [(m.number, m.name) for m in known()])
        await connection.execute(CLOSE)
    return ["schema.sql (the database is empty)"]


async def _step(connection: Connection) -> str | None:
    """Apply the next migration and return its name. Return None if there is none."""
    async with connection.transaction():
        await connection.execute(PATIENCE)
        await connection.execute(LOCK)
        applied = await _applied(connection)
        for migration in known():
            if migration.number > applied:
                await connection.execute(migration.path.read_text())
                await connection.execute(RECORD, migration.number, migration.name)
                return migration.name
        # A restored dump brings grants to readers, and not what was taken from everybody.
        await connection.execute(CLOSE)
    return None


async def new_epoch(connection: Connection) -> None:
    """Tell every client, when it next resumes, to start over: after restoring a backup."""
    await connection.execute(NEW_EPOCH)


async def is_current(connection: Connection) -> bool:
    """Whether the database has exactly the schema that this program knows."""
    has_table = await connection.fetchval(HAS_TABLE)
    return bool(has_table) and int(await connection.fetchval(APPLIED)) == len(known())


async def _applied(connection: Connection) -> int:
    if not await connection.fetchval(HAS_TABLE):
        raise Fatal("the database holds tables that are not OpenChat's; give it an empty one.")
    applied = int(await connection.fetchval(APPLIED))
    if applied > len(known()):
        raise Fatal(f"the schema is newer (step {applied}) than this program (step {len(known())}): update it.")
    return applied
