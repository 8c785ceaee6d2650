"""Bring a database to the schema that this program knows: schema.sql for an empty one, migrations for others."""

from pathlib import Path
from typing import NamedTuple, TypeAlias

import asyncpg

from server.errors import Fatal

LOCK = 0x6F70656E63686174
"""The advisory lock that lets one process migrate at a time: "openchat" in ASCII."""

_HERE = Path(__file__).parent
ROOT = _HERE if (_HERE / "schema.sql").exists() else _HERE.parent
"""Where schema.sql and migrations/ are: inside the package when installed, beside it in a checkout."""

TABLE = """
CREATE TABLE IF NOT EXISTS schema_migration (
    number integer CONSTRAINT schema_migration_pkey PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
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
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
    try:
        todo = await plan(connection)
        if todo and await connection.fetchval(IS_EMPTY):
            async with connection.transaction():
                await connection.execute((ROOT / "schema.sql").read_text())
                await connection.execute(TABLE)
                await connection.executemany(RECORD, [(m.number, m.name) for m in known()])
        else:
            for migration in known():
                if migration.name in todo:
                    async with connection.transaction():
                        await connection.execute(migration.path.read_text())
                        await connection.execute(RECORD, migration.number, migration.name)
        # A restored dump brings grants to readers, and not what was taken from everybody.
        await connection.execute(CLOSE)
        return todo
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)


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
