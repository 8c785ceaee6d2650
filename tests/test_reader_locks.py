"""Readers of the database hold no locks that the server needs, and use bounded resources."""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest

from protocol import client
from protocol.ids import uuid7
from protocol.server import OneConversation
from server.core.config import Settings
from server.core.errors import Fatal
from server.db import migrate
from server.db.database import Db
from server.queries import audit, checks
from server.queries.audit import Deed
from tests.conftest import Servers
from tests.world import World, sent

MODES = [
    "ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "SHARE ROW EXCLUSIVE", "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
]  # fmt: skip
ROWS = ["KEY SHARE", "SHARE", "NO KEY UPDATE", "UPDATE"]
RELATIONS = (
    "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
)
LOCKING = """
SELECT p.oid::regprocedure::text, p.proargtypes::text FROM pg_proc p
WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname ~ 'advisory.*lock' AND p.proname !~ 'unlock'
"""
WRITING = [
    "lo_create(0)",
    "lo_creat(-1)",
    "lo_from_bytea(0, 'x')",
    "lo_put(1, 0, 'x')",
    "lowrite(0, 'x')",
    "lo_truncate(0, 1)",
    "pg_logical_emit_message(false, 'x', 'x')",
    "pg_export_snapshot()",
    "pg_current_xact_id()",
    "txid_current()",
]
CALLABLE = """
SELECT DISTINCT p.proname FROM pg_proc p
WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.provolatile = 'v' AND p.prokind = 'f'
    AND has_function_privilege($1, p.oid, 'EXECUTE') AND NOT 'internal'::regtype = ANY (p.proargtypes)
    AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
ORDER BY 1
"""
JUDGED = re.compile(
    # Values, and counters that all roles may read.
    r"array_(sample|shuffle)|clock_timestamp|current_query|gen_random_uuid|random(_normal)?|setseed|timeofday|uuidv\d"
    r"|txid_status|ts_(rewrite|stat)|amvalidate|pg_stat_(get_|clear_snapshot|force_next_flush)\w*|pg_(control|is)_\w+"
    r"|pg_current_wal_\w*lsn|pg_last_\w+|pg_get_\w+|pg_\w*collation_actual_version|pg_jit_available|pg_lock_status"
    r"|pg_(safe_snapshot_)?blocking_pids|pg_isolation_test_session_is_blocked|pg_notification_queue_usage"
    r"|pg_partition_\w+|pg_prepared_xact|pg_(\w+_)?size|pg_\w*wal_summar\w+|pg_xact_\w+|pg_available_wal_summaries"
    # No more than the caller's own statements, or settings and sessions of the role itself; see decision 0045.
    r"|\w+_to_xml\w*|set_config|pg_sleep\w*|pg_notify|pg_(cancel|terminate)_backend|pg_advisory_unlock\w*|plpgsql_\w+"
    # These require rights that a reader lacks, on sequences, large objects, indexes or statistics.
    r"|currtid2|currval|lastval|nextval|setval|pg_sequence_last_value|lo_(close|get|l?open|lseek|tell|unlink)(64)?|loread"
    r"|brin_\w+|gin_clean_pending_list|pg_(clear|restore)_\w+_stats|pg_extension_config_dump"
    # Only for replication roles, superusers, or during an upgrade of the server.
    r"|pg_\w*replication_slot\w*|pg_logical_slot_\w+|pg_nextoid|pg_import_system_collations"
    r"|pg_stop_making_pinned_objects|binary_upgrade_\w+"
)
NOISE = [
    "DO $$ BEGIN RAISE LOG 'noise'; END $$",
    "SELECT 1 / 0",
    "SELECT noise",
    "noise",
    "SELECT content::int FROM message",
    "SELECT pg_cancel_backend(pg_backend_pid())",
    "SET statement_timeout = 1; SELECT pg_sleep(1)",
    "SET debug_print_parse = on; SET debug_print_rewritten = on; SET debug_print_plan = on; SELECT 1",
    "SET trace_sort = on; SELECT i FROM generate_series(1, 9) i ORDER BY -i",
    "SET log_statement = 'all'",
    "SET log_min_duration_statement = 0",
    "SET log_min_messages = debug5",
]
LOUDER = [
    "RESET log_min_messages", "RESET ALL", "DISCARD ALL", "SET SESSION AUTHORIZATION DEFAULT",
    "ALTER ROLE {0} RESET log_min_messages", "ALTER ROLE {0} RESET ALL", "ALTER ROLE {0} SET log_min_messages = info",
]  # fmt: skip
"""Statements by which a reader tries to reset `log_min_messages`."""
OLD_KEYS = [
    "hashtextextended($1::uuid::text, 0)", "hashtextextended('00000000-0000-0000-0000-000000000000', 0)",
    str(0x6F70656E63686174),
]  # fmt: skip


class Role(NamedTuple):
    """A reader with its own login."""

    name: str
    db: Db

    async def takes(self, statement: str) -> bool:
        """Return whether a statement is allowed. Its locks are held until the reader's transaction ends."""
        try:
            async with self.db.transaction():
                await self.db.execute(statement)
        except (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError):
            return False
        return True


@pytest.fixture
async def role(world: World) -> AsyncIterator[Role]:
    name = f"reader_{uuid7().hex}"
    await world.db.execute(f"CREATE ROLE {name} LOGIN; SELECT grant_reader('{name}')")
    db = await asyncpg.connect(world.settings.database_url)
    await db.execute(f"SET ROLE {name}")
    yield Role(name, db)
    await db.close()
    await world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


Login = Callable[[str], Awaitable[Db]]


@pytest.fixture
async def login(servers: Servers, world: World, role: Role) -> AsyncIterator[Login]:
    """Let the role log in, as on an external PostgreSQL. The embedded one rejects it."""
    access = servers.postgres.log.path.parent / "postgres" / "pg_hba.conf"
    closed = access.read_text()
    made: list[asyncpg.Connection[asyncpg.Record]] = []

    async def connect(database: str) -> Db:
        made.append(await asyncpg.connect(servers.postgres.url(database), user=role.name))
        return made[-1]

    async def reload(text: str, *, is_open: bool) -> None:
        access.write_text(text)
        os.kill(servers.postgres.pid, signal.SIGHUP)
        async with asyncio.timeout(10):
            while True:
                try:
                    await connect(await world.db.fetchval("SELECT current_database()"))
                    was_open = True
                except asyncpg.InvalidAuthorizationSpecificationError:
                    was_open = False
                if was_open == is_open:
                    return
                await asyncio.sleep(0)

    await reload(f"local all all trust\n{closed}", is_open=True)
    yield connect
    await asyncio.gather(*(one.close() for one in made))
    made.clear()
    await reload(closed, is_open=False)
    await asyncio.gather(*(one.close() for one in made))


async def test_reader_that_holds_all_possible_locks_blocks_no_writer(world: World, role: Role) -> None:
    one = await world.connect(await world.user("Ada"))
    channel = await world.channel(one)
    kept = await sent(one, channel)
    # An operator may grant advisory locks to a sync engine that needs them. The server never waits for one.
    await world.db.execute(f"GRANT EXECUTE ON FUNCTION pg_advisory_xact_lock(bigint) TO {role.name}")
    held: dict[str, set[str]] = {}
    async with role.db.transaction():
        for key in OLD_KEYS:
            await role.db.execute(f"SELECT pg_advisory_xact_lock({key.replace('$1', repr(str(channel)))})")
        for (relation,) in await world.db.fetch(RELATIONS):
            held[relation] = {mode for mode in MODES if await role.takes(f"LOCK TABLE {relation} IN {mode} MODE")}
            held[relation] |= {row for row in ROWS if await role.takes(f"SELECT 1 FROM {relation} LIMIT 1 FOR {row}")}
        async with asyncio.timeout(5):
            await sent(one, channel, "Still writing")
            await world.moderate_as_owner(client.Moderate(conversation_id=channel, message_id=kept, reason="Rude"))
            await one.call(client.SetInviteCode(conversation_id=channel, is_open=True), OneConversation)
            async with world.db.transaction():
                await audit.record(world.db, audit.SERVER, Deed(None, "disable_user"))
            assert await migrate.migrate(world.settings.database_url) == []
    assert held["schema_migration"] == held["database_epoch"] == held["conversation"] == set()
    assert set.union(*held.values()) == {"ACCESS SHARE"}


async def test_every_volatile_function_that_a_reader_may_call_was_reviewed(world: World, role: Role) -> None:
    callable_ = [row[0] for row in await world.db.fetch(CALLABLE, role.name)]
    assert len(callable_) > 100
    assert [name for name in callable_ if not JUDGED.fullmatch(name)] == []


async def test_reader_cannot_take_advisory_locks_or_write_large_objects_or_wal(world: World, role: Role) -> None:
    functions = await world.db.fetch(LOCKING)
    assert len(functions) == 16
    calls = [
        f"{name.split('(')[0]}({', '.join('1' for _ in arguments.split())})" for name, arguments in functions
    ]  # fmt: skip
    assert [call for call in [*calls, *WRITING] if await role.takes(f"SELECT {call}")] == []
    assert await role.takes("SELECT 1")


async def test_reader_with_access_to_another_database_is_reported_until_it_is_revoked(
    world: World, role: Role, login: Login
) -> None:
    """All databases share one table of locks, and rights on PostgreSQL's functions are per database."""
    (check,) = (one for one in checks.CHECKS if one.name == "no reader can lock this database from another one")
    for closed in ("postgres", "template1"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied for database"):
            await login(closed)
    warned: list[str] = []
    world.db.add_log_listener(lambda _, message: warned.append(message.message or ""))
    await world.db.execute("GRANT CONNECT ON DATABASE postgres TO PUBLIC")
    try:
        elsewhere = await login("postgres")
        assert await Role(role.name, elsewhere).takes("SELECT pg_advisory_lock(1)")
        await elsewhere.close()
        await world.db.execute("SELECT grant_reader($1)", role.name)
        (warning,) = warned
        assert re.search(r"REVOKE CONNECT ON DATABASE .*\bpostgres\b.* FROM PUBLIC$", warning)
        assert "postgres" in (await checks.run_all(world.db, check)).some
    finally:
        await world.db.execute("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
    assert "postgres" not in (await checks.run_all(world.db, check)).some
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied for database"):
        await login("postgres")
    await login(await world.db.fetchval("SELECT current_database()"))


async def test_reader_cannot_write_to_the_log_of_postgresql(
    world: World, role: Role, login: Login, servers: Servers
) -> None:
    log = servers.postgres.log.path
    database = await world.db.fetchval("SELECT current_database()")
    sessions: list[str] = []
    for loud in [*LOUDER, "SELECT 1"]:
        reader = await login(database)
        sessions.append(f" [{reader.get_server_pid()}] ")
        with suppress(asyncpg.PostgresError):
            await reader.execute(loud.format(role.name))
        for noise in NOISE:
            with suppress(asyncpg.PostgresError):
                await reader.execute(noise)
    lines = log.read_text(errors="replace").splitlines()
    assert [line for line in lines if any(session in line for session in sessions)] == []


async def test_table_owner_keeps_the_language_that_is_revoked_from_public(world: World, role: Role) -> None:
    owner = f"owner_{uuid7().hex}"
    transaction = world.db.transaction()
    await transaction.start()
    await world.db.execute(f"""CREATE ROLE {owner}; ALTER TABLE "user" OWNER TO {owner}""")
    await world.db.execute("GRANT USAGE ON LANGUAGE plpgsql TO PUBLIC; SELECT close_functions_to_public()")
    may = "SELECT has_language_privilege($1, 'plpgsql', 'USAGE')"
    assert [await world.db.fetchval(may, name) for name in (owner, role.name)] == [True, False]
    await transaction.rollback()
    assert not await role.takes("DO $$ BEGIN END $$")


def test_server_takes_no_advisory_lock() -> None:
    """Every role that may run statements can take an advisory lock on a known key, and block those who wait for it."""
    files = [*Path(migrate.__file__).parents[1].rglob("*.py"), migrate.ROOT / "schema.sql"]
    files += [migration.path for migration in migrate.known()]
    assert len(files) > 100
    assert [path.name for path in files if re.search(r"advisory\w*lock\w*\s*\(\s*[^)\s]", path.read_text())] == []


async def test_bounds_of_a_reader_are_set_unless_an_operator_changed_them(world: World, role: Role) -> None:
    limit = "SELECT rolconnlimit FROM pg_roles WHERE rolname = $1"
    settings = """
        SELECT c FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) c
        WHERE r.rolname = $1 ORDER BY 1
    """
    assert await world.db.fetchval(limit, role.name) == 10
    assert [row[0] for row in await world.db.fetch(settings, role.name)] == [
        "idle_in_transaction_session_timeout=1min", "log_min_messages=fatal", "statement_timeout=5min",
        "temp_file_limit=1GB",
    ]  # fmt: skip
    await world.db.execute(f"ALTER ROLE {role.name} CONNECTION LIMIT 20")
    await world.db.execute(f"ALTER ROLE {role.name} SET statement_timeout = 0")
    await world.db.execute("SELECT grant_reader($1)", role.name)
    assert await world.db.fetchval(limit, role.name) == 20
    assert "statement_timeout=0" in [row[0] for row in await world.db.fetch(settings, role.name)]
    for louder in ("SET temp_file_limit = -1", "SET log_min_messages = info"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await role.db.execute(louder)


async def test_migration_blocked_by_a_reader_yields_to_others_and_names_the_reader(
    world: World, role: Role, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(migrate.ROOT / "migrations", tmp_path / "migrations")
    number = len(migrate.known()) + 1
    (tmp_path / "migrations" / f"{number:04}_next.sql").write_text("ALTER TABLE message ADD COLUMN next text;")
    monkeypatch.setattr(migrate, "ROOT", tmp_path)
    monkeypatch.setattr(migrate, "PATIENCE", "SET LOCAL lock_timeout = '50ms'")
    monkeypatch.setattr(migrate, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(migrate, "ATTEMPTS", 5)
    one = await world.connect(await world.user("Ada"))
    channel = await world.channel(one)
    async with role.db.transaction():
        await role.db.execute("SELECT 1 FROM message")
        migrating = asyncio.create_task(migrate.migrate(settings.database_url))
        while not migrating.done():
            await sent(one, channel)
        with pytest.raises(
            Fatal, match=f"{number:04}_next waits for a table .* Process {role.db.get_server_pid()} of "
        ):
            await migrating
    assert await migrate.migrate(settings.database_url) == [f"{number:04}_next"]
