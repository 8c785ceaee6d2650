"""The embedded servers: what their logs hold, how large they grow, and who reaches them."""

import contextlib
import stat
from pathlib import Path

import asyncpg

from server.embedded import logfile
from server.embedded.logfile import LogFile
from tests.conftest import Servers
from tests.test_command import Program, folder, program
from tests.world import until

__all__ = ("folder", "program")
ADDRESS = "only-in-this-test@example.org"


async def provoke(url: str) -> None:
    """Break a constraint in several ways, each with an address in its parameters, its detail or its statement."""
    connection = await asyncpg.connect(url)
    try:
        insert = "INSERT INTO \"user\" (id, name, email) VALUES (gen_random_uuid(), 'Ada', $1)"
        await connection.execute("CREATE TEMP TABLE unique_text (word TEXT UNIQUE)")
        for statement, *arguments in (
            ("INSERT INTO unique_text SELECT $1::text FROM generate_series(1, 2)", ADDRESS),
            (f"INSERT INTO unique_text SELECT '{ADDRESS}' FROM generate_series(1, 2)",),
            (insert, ADDRESS),
            (insert, ADDRESS),
        ):
            with contextlib.suppress(asyncpg.PostgresError):
                await connection.execute(statement, *arguments)
    finally:
        await connection.close()


async def test_an_error_is_logged_without_the_statement_its_parameters_and_the_row(
    servers: Servers, database_url: str
) -> None:
    await provoke(database_url)
    text = servers.postgres.log.path.read_text()
    assert "duplicate key value violates unique constraint" in text
    assert ADDRESS not in text
    assert not [line for line in text.splitlines() if "STATEMENT:" in line or "DETAIL:" in line or "CONTEXT:" in line]


def test_only_their_owner_reads_the_logs_and_enters_the_data_folder(servers: Servers) -> None:
    for log in (servers.postgres.log, servers.valkey.log):
        assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


async def test_a_log_that_is_too_large_is_rotated_under_a_server_that_goes_on_writing(
    servers: Servers, database_url: str
) -> None:
    log = LogFile(servers.postgres.log.path, max_bytes=500)
    for _ in range(3):
        while log.path.stat().st_size <= log.max_bytes:
            await provoke(database_url)
        log.rotate()
        assert log.path.stat().st_size <= log.max_bytes
        assert 0 < log.older.stat().st_size <= log.max_bytes
        assert stat.S_IMODE(log.older.stat().st_mode) == 0o600
        await provoke(database_url)
        assert b"\0" not in log.path.read_bytes(), "the server goes on where the file ends"


async def test_the_supervisor_rotates_the_logs_of_its_servers(program: Program) -> None:
    for name in ("postgres.log", "valkey.log"):
        path = program.folder / name
        with path.open("r+b") as file:
            file.truncate(logfile.MAX_BYTES + 1)
        await until(lambda path=path: path.stat().st_size <= logfile.MAX_BYTES)  # type: ignore[misc]


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "postgres.log").symlink_to(tmp_path / "theirs")
    log = LogFile(tmp_path / "postgres.log")
    with log.open() as file:
        file.write(b"ours")
    assert (tmp_path / "theirs").read_text() == "kept"
    assert log.last_line() == "ours"
