"""The command `openchat` as an operator uses it: start, errors in one line, recovery and stop."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from protocol.client import CreateChannel
from protocol.errors import CloseCode
from protocol.http import LoggedIn
from protocol.ids import ConversationId, uuid7
from prove.client import Client
from server.core.config import Settings
from server.processes.supervisor import close_pipes
from tests.cluster import Cluster
from tests.conftest import Servers, scratch
from tests.world import http_client, message, until

COMMAND = [sys.executable, "-P", "-m", "server.cli.main"]
ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}


class Program:
    """One run of `openchat`."""

    command: Sequence[str] = COMMAND
    directory: Path | None = None

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._arguments = arguments
        self.folder = Path(arguments[arguments.index("--data-dir") + 1]) if "--data-dir" in arguments else Path()
        self._environment = {k: v for k, v in os.environ.items() if not k.endswith("_URL")} | environment
        self.lines: list[str] = []
        self.process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self.command, *self._arguments, env=self._environment, cwd=self.directory,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip())

    @property
    def url(self) -> str:
        (found,) = (re.search(r"http://\S+", line) for line in self.lines if line.startswith("  listening"))
        assert found is not None
        return found[0]

    async def ready(self) -> None:
        """Wait for the last line of the startup messages."""
        await until(
            lambda: self.process.returncode is not None or any("try next" in line for line in self.lines), seconds=30
        )
        assert self.process.returncode is None, self.lines

    async def ended(self) -> int:
        async with asyncio.timeout(30):
            status = await self.process.wait()
            await self._reader
        return status

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.ended()


async def test_starting_worker_ends_when_its_supervisor_is_killed(settings: Settings, tmp_path: Path) -> None:
    cluster = Cluster(settings, tmp_path, 1)
    (worker,) = cluster.workers
    worker.start()
    assert worker.process is not None
    close_pipes(worker.process)
    try:
        await until(lambda: not worker.is_running(), seconds=30)
    finally:
        cluster.stop()


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="openchat-tests-", dir=scratch()))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def program(folder: Path) -> AsyncIterator[Program]:
    program = Program("--port", "0", "--workers", "2", "--data-dir", str(folder))
    await program.start()
    await program.ready()
    yield program
    await program.kill()


async def registered(url: str) -> LoggedIn:
    async with http_client(url) as http:
        return msgspec.json.decode((await http.post("/v1/auth/register", json=ADA)).content, type=LoggedIn)


def workers_of(program: Program) -> list[int]:
    """Return the process ids of the workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == program.process.pid:
                command = (path.parent / "cmdline").read_bytes()
                found += [int(path.parent.name)] if b"server.processes.worker" in command else []
    return found


async def test_first_start_stop_and_second_start(folder: Path) -> None:
    first = Program("--port", "0", "--data-dir", str(folder))
    await first.start()
    await first.ready()
    greeting = "\n".join(first.lines)
    for part in ("OpenChat", "Ctrl-C", "http://127.0.0.1:", str(folder), "workers", "curl"):
        assert part in greeting
    logged_in = await registered(first.url)
    first.process.send_signal(signal.SIGINT)
    assert await first.ended() == 0
    assert not (folder / "postgres" / "postmaster.pid").exists()

    second = Program("--port", "0", "--data-dir", str(folder), OPENCHAT_REGISTRATION="closed")
    began = time.monotonic()
    await second.start()
    await second.ready()
    assert time.monotonic() - began < 10  # three seconds on an idle machine
    assert any(f"openchat user create Ada ada@example.org --admin --data-dir {folder}" in line for line in second.lines)
    async with Client(second.url, logged_in.token) as client:
        assert client.ready.user == logged_in.user
    second.process.send_signal(signal.SIGTERM)
    assert await second.ended() == 0


async def test_shutdown_finishes_frames_in_flight_and_closes_connections(program: Program) -> None:
    logged_in = await registered(program.url)
    idle = [Client(program.url, logged_in.token) for _ in range(5)]
    for client in idle:
        await client.__aenter__()
    async with Client(program.url, logged_in.token) as busy:
        about = ConversationId(uuid7())
        await busy.call(CreateChannel(conversation_id=about, title="Last words"))
        asking = asyncio.gather(*(busy.ask(message(about)) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0)
        program.process.send_signal(signal.SIGTERM)
        # Each frame is answered, or was not begun and can be repeated. None hangs.
        await asking
        assert {await client.closed() for client in (busy, *idle)} == {CloseCode.GOING_AWAY}
    assert await program.ended() == 0


async def test_server_recovers_from_kill_9(program: Program, folder: Path) -> None:
    logged_in = await registered(program.url)
    orphans = workers_of(program)
    program.process.kill()
    await program.ended()
    again = Program("--port", "0", "--data-dir", str(folder))
    await again.start()
    await again.ready()
    async with Client(again.url, logged_in.token):
        pass
    await until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in orphans))
    again.process.send_signal(signal.SIGINT)
    assert await again.ended() == 0


async def refused(*arguments: str, **environment: str) -> str:
    """Run a command that must fail, and return the one line that it prints."""
    program = Program(*arguments, **environment)
    await program.start()
    assert await program.ended() == 1
    (line,) = program.lines
    assert line.startswith("openchat: ")
    return line


async def test_startup_errors_are_one_line(servers: Servers, database_url: str, folder: Path) -> None:
    data = ("--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port}" in await refused("--port", port, "--data-dir", str(folder))
    assert "DATABASE_URL" in await refused(*data, DATABASE_URL="nonsense", REDIS_URL=servers.valkey.url)
    # Configured servers are checked before the data folder is created.
    await asyncio.to_thread(folder.chmod, 0o755)
    own = {"OPENCHAT_DATA_DIR": str(folder / "own")}
    assert "database cannot be reached" in await refused(*data, DATABASE_URL="postgresql://127.0.0.1:1/x", **own)
    assert "Redis cannot be reached" in await refused(*data, REDIS_URL="redis://127.0.0.1:1", **own)
    assert not (folder / "own").exists()
    half = Program(*data, DATABASE_URL=database_url, **own)
    await half.start()
    await half.ready()
    assert f"  Valkey     {folder / 'own'}  (its own; REDIS_URL names another)" in half.lines
    half.process.send_signal(signal.SIGINT)
    assert await half.ended() == 0
    assert "OPENCHAT_PORT" in await refused(OPENCHAT_PORT="many")
    (folder / "file").write_text("")
    assert "cannot be written" in await refused("--port", "0", "--data-dir", str(folder / "file" / "in"))


async def migrated(folder: Path, *options: str) -> tuple[int, list[str]]:
    """Return the status of `openchat migrate`, and the lines that it printed."""
    program = Program("migrate", *options, "--data-dir", str(folder))
    await program.start()
    return await program.ended(), program.lines


async def test_migrate_plan_then_migrate(folder: Path) -> None:
    code, (line,) = await migrated(folder, "--plan")
    assert (code, (folder / "postgres").exists()) == (1, False)
    assert "there is no database" in line
    assert await migrated(folder) == (0, ["applied  schema.sql (the database is empty)"])
    assert await migrated(folder) == (0, ["The database is up to date."])
    assert await migrated(folder, "--plan") == (0, ["The database is up to date."])


async def test_help_lists_options_and_variables() -> None:
    helping = Program("--help")
    await helping.start()
    assert await helping.ended() == 0
    text = "\n".join(helping.lines)
    for part in ("--host", "--port", "--workers", "--data-dir", "migrate", "DATABASE_URL", "REDIS_URL"):
        assert part in text


async def test_crashed_worker_and_crashed_postgres_are_restarted(program: Program, folder: Path) -> None:
    assert "another openchat" in await refused("--port", "0", "--data-dir", str(folder))
    assert (folder / "postgres").stat().st_uid != 0  # PostgreSQL refuses to run as root

    await until(lambda: len(workers_of(program)) == 2)
    before = workers_of(program)
    os.kill(before[0], signal.SIGKILL)
    await until(lambda: len(set(workers_of(program)) - set(before)) == 1)
    async with http_client() as http, asyncio.timeout(15):
        for _ in range(20):
            response = await http.get(f"{program.url}/readyz", headers={"Connection": "close"})
            assert response.status_code == 200
    assert any("worker" in line and "ended" in line for line in program.lines)

    pid = int((folder / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, signal.SIGKILL)
    await until(lambda: any("Postgres ended" in line for line in program.lines))
    async with http_client() as http, asyncio.timeout(15):
        while (await http.get(f"{program.url}/readyz")).status_code != 200:
            await asyncio.sleep(0.05)
