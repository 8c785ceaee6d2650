"""A pool of databases for tests. Emptying a database takes a fraction of the time of creating one."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import asyncpg

T = TypeVar("T")

MAX_USES = 50
"""Max tests that use one database. Dead rows make it slower."""
SETTINGS = {"session_replication_role": "replica"}
"""Settings that disable foreign keys and triggers, so that all rows can be deleted in any order."""

END_SESSIONS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
# Each change of a catalog, including a grant or a setting, writes a row. Statistics are updated in place.
CATALOGS = ("pg_class", "pg_attribute", "pg_proc", "pg_constraint", "pg_trigger", "pg_policy", "pg_db_role_setting")
KEPT = ("database_epoch", "schema_migration")
"""Tables that have rows in the template."""
EMPTY = f"""
DO $$
DECLARE
    found regclass;
BEGIN
    FOR found IN
        SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
            AND relname <> ALL (ARRAY{list(KEPT)}) AND pg_relation_size(oid) > 0
    LOOP
        EXECUTE format('DELETE FROM %s', found);
    END LOOP;
END
$$
"""
IS_ALTERED = "SELECT " + " OR ".join(
    f"EXISTS (SELECT FROM {table} WHERE xmin::text::bigint > $1)"
    for table in (*CATALOGS, *KEPT, "(SELECT xmin FROM pg_database WHERE datname = current_database()) own")
)


class Database:
    """A database, and the session that empties it, opened at the first use."""

    def __init__(self, name: str, url: str, made: int, *, max_uses: int) -> None:
        """`made` is the id of the last transaction that changed the catalogs."""
        self.name = name
        self._url = url
        self._made = made
        self._uses_left = max_uses
        self._session: asyncpg.Connection[asyncpg.Record] | None = None

    async def is_as_new(self) -> bool:
        """Count a use and empty the database. Return whether it may be used again, since it equals the template."""
        self._uses_left -= 1
        if not self._uses_left:
            return False
        if self._session is None:
            self._session = await asyncpg.connect(self._url, server_settings=SETTINGS)
        await self._session.execute(END_SESSIONS)
        if await self._session.fetchval(IS_ALTERED, self._made):
            return False
        await self._session.execute(EMPTY)
        return True

    async def close(self) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()


class Databases:
    """Lends databases that equal the template. Its sessions use their own event loop, since each test has its own."""

    def __init__(self, url: Callable[[str], str], template: str) -> None:
        self._url = url
        self._template = template
        self._free: list[Database] = []
        self._made = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="databases", daemon=True)
        self._thread.start()
        self._administration = self._run(asyncpg.connect(url("postgres"))).result()

    def take(self, *, is_new: bool) -> "asyncio.Future[Database]":
        """Return an unused database. One that has to be new is used once, so it needs no session to empty it."""
        return asyncio.wrap_future(self._run(self._take(is_new=is_new)))

    def give(self, database: Database) -> "asyncio.Future[None]":
        """Return a database to the pool, or delete it."""
        return asyncio.wrap_future(self._run(self._give(database)))

    def close(self) -> None:
        """Close all sessions."""
        self._run(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _take(self, *, is_new: bool) -> Database:
        if self._free and not is_new:
            return self._free.pop()
        self._made += 1
        name = f"test_{self._made}"
        await self._administration.execute(f"CREATE DATABASE {name} TEMPLATE {self._template} STRATEGY file_copy")
        # A copy does not have the privileges of its template. Every start of a server revokes this privilege.
        await self._administration.execute(f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
        made = await self._administration.fetchval("SELECT pg_current_xact_id()::text::bigint")
        return Database(name, self._url(name), made, max_uses=1 if is_new else MAX_USES)

    async def _give(self, database: Database) -> None:
        if await database.is_as_new():
            self._free.append(database)
        else:
            await database.close()
            await self._administration.execute(f"DROP DATABASE {database.name} WITH (FORCE)")

    async def _close(self) -> None:
        for database in self._free:
            await database.close()
        await self._administration.close()
