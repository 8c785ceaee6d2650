"""Brings a database to the schema of this program. An empty one gets schema.sql, and others get migrations."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import asyncpg

from server.core.errors import Fatal
from server.db.hosts import Hosts

LOCK_SECONDS = 1
"""Max wait of a migration for each lock, in seconds. Other statements on the table wait behind it."""
ATTEMPTS = 30
"""Max attempts at a migration that locks of other sessions stop."""
PAUSE_SECONDS = 1.0
"""Pause between two attempts, in seconds. Waiting statements proceed meanwhile."""
TURN_SECONDS = 0.1
"""Interval at which a process checks whether another one still migrates or builds an index, in seconds."""
BUILD_SECONDS = 600
"""Max wait of an index build for older transactions, in seconds. No statement waits behind it."""

_HERE = Path(__file__).parents[1]
ROOT = _HERE if (_HERE / "schema.sql").exists() else _HERE.parent
"""The folder of schema.sql and migrations/. It is the package when installed, and its parent in a checkout."""

TABLE = """
CREATE TABLE schema_migration (
    number integer CONSTRAINT schema_migration_pkey PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
LOCK = "LOCK TABLE schema_migration IN SHARE UPDATE EXCLUSIVE MODE NOWAIT"
"""Lets one process migrate at a time. Other readers of the database could take an advisory lock, but not this one."""
PATIENCE = f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"
PATIENCE_OF_STEPS = f"SET lock_timeout = '{LOCK_SECONDS}s'"
UNTIL_BUILT = f"SET lock_timeout = '{BUILD_SECONDS}s'"
BUILD = re.compile(
    r'CREATE (?:UNIQUE )?INDEX CONCURRENTLY (?P<index>\w+) ON (?P<table>\w+|"\w+")\s+(?:USING \w+ )?'
    r"\((?P<key>[^;]+?)\)(?P<where>\s+WHERE [^;]+)?;"
)
"""The only kind of statement in a migration whose text contains `CONCURRENTLY`."""
COMMITS = re.compile(r"^\s*COMMIT;", re.MULTILINE)
"""Identifies a migration that is one block, which changes rows in small transactions. A second run changes the
remaining rows.
"""
IS_BUILDING = (
    "SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE relid = to_regclass('public.' || $1::text))"
)
ALIKE = "SELECT string_agg(id::text, ', ' ORDER BY id) FROM {table} {where} GROUP BY {key} HAVING count(*) > 1 LIMIT 1"
"""Rows that prevent a unique index. Every table that gets an index this way has an `id`."""
DELETE_ONE = "DELETE FROM {table} WHERE id = '<its id>'"
IS_VALID = "SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass(format('public.%I', $1::text))"
UNHURRIED = """
SELECT set_config(name, '0', false) FROM pg_settings
WHERE name IN ('lock_timeout', 'statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')
"""
OLDEST = """
SELECT format(' Process %s of role %s has a transaction open since %s.', pid, usename, date_trunc('second', xact_start))
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> ALL($1::int[]) AND backend_type = 'client backend'
    AND xact_start IS NOT NULL
ORDER BY xact_start LIMIT 1
"""
HAS_TABLE = "SELECT to_regclass('public.schema_migration') IS NOT NULL"
IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM pg_tables WHERE schemaname = 'public')"
APPLIED = "SELECT coalesce(max(number), 0) FROM schema_migration"
RECORD = "INSERT INTO schema_migration (number, name) VALUES ($1, $2)"
CLOSE = "SELECT close_to_public()"
OLDER = "the database does not have this program's schema. Run `openchat migrate`."


log = logging.getLogger(__name__)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"


STOPPED = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
"""Errors about locks of other sessions, after which a migration is retried."""


class Migration(NamedTuple):
    """A migration. `number` is its place in the order: 1, 2, 3 and so on."""

    number: int
    name: str
    path: Path


def known() -> list[Migration]:
    """Return all migrations of this program, in order."""
    return _steps(ROOT / "migrations")


@cache
def _steps(folder: Path) -> list[Migration]:
    """Read a folder once per process. An update of the package may add a newer program's migrations while this one
    runs.
    """
    paths = sorted(folder.glob("*.sql"))
    return [Migration(int(path.stem.split("_")[0]), path.stem, path) for path in paths]


async def plan(connection: Connection) -> list[str]:
    """Return the names of the steps that `migrate` would apply. The list is empty if the schema is current. Raises
    Fatal as `migrate` does.
    """
    if await connection.fetchval(IS_EMPTY):
        return ["schema.sql (the database is empty)"]
    applied = await _applied(connection)
    return [migration.name for migration in known() if migration.number > applied]


async def migrate(url: str) -> list[str]:
    """Apply the steps of `plan` to the database at `url`, and return their names. Processes may call it concurrently.

    Raises Fatal if the schema is newer than this program, or is not OpenChat's. Also raises Fatal if another session
    holds its tables.
    """
    async with _connected(url) as connection:
        if await connection.fetchval(IS_EMPTY):
            try:
                return await _create(connection)
            except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError):
                # Another process has created the tables and committed.
                if not await connection.fetchval(HAS_TABLE):
                    raise
        await _applied(connection)
        async with _alone(url) as keeper:
            return await _migrate(connection, keeper)


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Connection]:
    connection = await Hosts(url).connect()
    connection.add_log_listener(_Warnings())
    try:
        await connection.execute(UNHURRIED)
        yield connection
    finally:
        await connection.close()


class _Warnings:
    """Logs warnings and notices of PostgreSQL and of our functions. Each message is logged once per connection."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.severity_en in {"WARNING", "NOTICE"} and message.message not in self._seen:
            self._seen.add(message.message)
            log.warning("PostgreSQL: %s", message.message)


@asynccontextmanager
async def _alone(url: str) -> AsyncIterator[Connection]:
    """Let one process migrate at a time. The lock has a connection of its own, because no index is built concurrently
    inside a transaction.

    A statement that waits for a lock has a snapshot, and an index build would wait for that snapshot. So this polls.
    """
    async with _connected(url) as keeper:
        while True:
            transaction = keeper.transaction()
            await transaction.start()
            try:
                await keeper.execute(LOCK)
                break
            except asyncpg.LockNotAvailableError:
                await transaction.rollback()
                await asyncio.sleep(TURN_SECONDS)
        # Closing the connection ends the transaction.
        yield keeper


async def _create(connection: Connection) -> list[str]:
    """Create all tables. Of concurrent processes, one succeeds. The others wait at the first statement, and raise."""
    async with connection.transaction():
        await connection.execute(TABLE)
        await connection.execute((ROOT / "schema.sql").read_text())
        await connection.executemany(RECORD, [(m.number, m.name) for m in known()])
        await connection.execute(CLOSE)
    return ["schema.sql (the database is empty)"]


async def _migrate(connection: Connection, keeper: Connection) -> list[str]:
    todo = await plan(connection)
    for migration in known():
        if migration.name in todo:
            try:
                await _apply(connection, migration)
            except STOPPED as error:
                ours = [connection.get_server_pid(), keeper.get_server_pid()]
                oldest = await connection.fetchval(OLDEST, ours) or ""
                raise Fatal(
                    f"the migration {migration.name} waits for a table that another session has locked, such as an "
                    f"open transaction.{oldest} End that session, and start again."
                ) from error
            except asyncpg.IntegrityConstraintViolationError as error:
                raise Fatal(
                    f"the migration {migration.name} found rows of the table {error.table_name} that violate "
                    f"{error.constraint_name or 'a constraint'}. Change or delete these rows, and start again."
                ) from error
    # A restored dump has the grants of the original, but not its revocations.
    await connection.execute(CLOSE)
    return todo


async def _apply(connection: Connection, migration: Migration) -> None:
    text = migration.path.read_text()
    if "CONCURRENTLY" in text:
        await connection.execute(UNTIL_BUILT)
        for statement in BUILD.finditer(text):
            await _build(connection, statement)
        await connection.execute(RECORD, migration.number, migration.name)
        return
    for attempt in range(ATTEMPTS):
        try:
            if COMMITS.search(text):
                await connection.execute(PATIENCE_OF_STEPS)
                await connection.execute(text)
                await connection.execute(RECORD, migration.number, migration.name)
                return
            async with connection.transaction():
                await connection.execute(PATIENCE)
                await connection.execute(text)
                await connection.execute(RECORD, migration.number, migration.name)
                return
        except STOPPED:
            if attempt == ATTEMPTS - 1:
                raise
            await asyncio.sleep(PAUSE_SECONDS)


async def _build(connection: Connection, statement: re.Match[str]) -> None:
    """Build an index without blocking writes. An invalid index that a failed build left behind is dropped first."""
    index = statement["index"]
    # PostgreSQL continues a build whose client was killed.
    while await connection.fetchval(IS_BUILDING, statement["table"]):  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(TURN_SECONDS)
    is_valid = await connection.fetchval(IS_VALID, index)
    if is_valid is False:
        await connection.execute(f"DROP INDEX CONCURRENTLY {index}")
    if not is_valid:
        try:
            await connection.execute(statement[0])
        except asyncpg.UniqueViolationError as error:
            table, key = statement["table"], statement["key"]
            alike = await connection.fetchval(ALIKE.format(table=table, key=key, where=statement["where"] or ""))
            if alike is None:
                raise
            raise Fatal(
                f"the unique index {index} cannot be built: rows of the table {table} have the same {key}. Their ids "
                f"are {alike}. Back up the database. Keep one of these rows, and delete the others in psql with "
                f"`{DELETE_ONE.format(table=table)}`. Then start again."
            ) from error


async def is_current(connection: Connection) -> bool:
    """Return whether the database has exactly the schema of this program."""
    has_table = await connection.fetchval(HAS_TABLE)
    return bool(has_table) and await _step(connection) == len(known())


async def require_steps(connection: Connection) -> None:
    """Raise Fatal if the database lacks migrations of this program. It may have those of a newer program that is
    replacing this one.
    """
    if not await connection.fetchval(HAS_TABLE) or await _step(connection) < len(known()):
        raise Fatal(OLDER)


async def require_current(connection: Connection) -> None:
    """Raise Fatal unless the database has exactly the schema of this program."""
    if not await is_current(connection):
        raise Fatal(OLDER)


async def _applied(connection: Connection) -> int:
    if not await connection.fetchval(HAS_TABLE):
        raise Fatal("the database contains tables of another application. Use an empty database.")
    applied = await _step(connection)
    if applied > len(known()):
        raise Fatal(
            f"the schema (step {applied}) is newer than this program (step {len(known())}). Update the program."
        )
    return applied


async def _step(connection: Connection) -> int:
    """Return the last step that was applied."""
    return int(await connection.fetchval(APPLIED))
