"""Two PostgreSQL servers: a primary, and a standby that confirms each commit. Faults let the standby take over."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import asyncpg

from loadtest.target import Unusable
from server.processes.embedded import postgres, process
from server.processes.embedded.folder import DataFolder, installed
from server.processes.embedded.logfile import LogFile

MAX_CONNECTIONS = 60
SECONDS = 30.0
"""Max time until a server accepts connections, and until a standby streams, in seconds."""
POLL_SECONDS = 0.02
STANDBY = "standby"
"""The standby's name in `synchronous_standby_names`, and the name of its replication slot."""
OPTIONS = postgres.OPTIONS | {
    "max_connections": str(MAX_CONNECTIONS),
    # A commit returns when the standby has applied it.
    "synchronous_commit": "remote_apply",
    # By default, a standby that has lost its primary may notice its promotion five seconds late.
    "wal_retrieve_retry_interval": "200ms",
}
CONFIRMS = (
    "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming' AND sync_state IN ('sync', 'quorum'))"
)
PROMOTED = "SELECT NOT pg_is_in_recovery()"

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Server:
    """One PostgreSQL server in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self._folder = DataFolder(path)
        self.run = self._folder.run
        self._data = postgres.data(path)
        self._log = LogFile(path / "postgres.log", uid=self._folder.uid)
        self._binaries = self._folder.reachable(installed(postgres.PACKAGE)) / "pginstall" / "bin"
        self._process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        """Create an empty database."""
        made = postgres.Postgres(self._folder, max_connections=MAX_CONNECTIONS)
        made.start()
        made.stop()

    async def copy(self, primary: "Server") -> None:
        """Replace the database with a copy of the primary's, as a standby of it."""
        owner = self._folder.owner
        shutil.rmtree(self._data, ignore_errors=True)
        command: list[str | Path] = [
            self._binaries / "pg_basebackup", "--checkpoint=fast", f"--pgdata={self._data}", "--write-recovery-conf",
            "--create-slot", f"--slot={STANDBY}",
            f"--dbname=host={primary.run} user={postgres.NAME} application_name={STANDBY}",
        ]  # fmt: skip

        def copy() -> "subprocess.CompletedProcess[str]":
            return subprocess.run(  # noqa: S603 - no outside input
                command, capture_output=True, text=True, check=False, cwd=self._folder.path,
                user=owner and owner.uid, group=owner and owner.gid, extra_groups=[] if owner else None,
            )  # fmt: skip

        copied = await asyncio.to_thread(copy)
        if copied.returncode:
            raise Unusable(f"pg_basebackup failed: {copied.stderr.strip()}")
        with (self._data / "postgresql.auto.conf").open("a") as settings:
            settings.write("synchronous_standby_names = ''\n")

    async def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        settings = [f"--{key}={value}" for key, value in OPTIONS.items()]
        self._process = process.start(
            [self._binaries / "postgres", "-D", self._data, "-k", self.run, *settings],
            folder=self._folder,
            log=self._log,
            last_signal=signal.SIGINT,
        )
        connection = await self.connect()
        await connection.close()

    async def connect(self) -> Connection:
        """Connect to the server, and retry until it accepts connections. Raises Unusable if it has ended."""
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    return await asyncpg.connect(postgres.url(self.run))
                except (OSError, asyncpg.PostgresError):
                    if self._process is None or self._process.poll() is not None:
                        raise Unusable(f"PostgreSQL does not start: {self._log.last_line()}") from None
                    await asyncio.sleep(POLL_SECONDS)

    async def demand(self, standbys: str) -> None:
        """Set the standbys that have to confirm each commit."""
        connection = await self.connect()
        try:
            await connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")
            await connection.execute("SELECT pg_reload_conf()")
            if standbys:
                await _until(connection, CONFIRMS)
        finally:
            await connection.close()

    async def promote(self) -> None:
        """Make the standby the primary. Return when it accepts writes."""
        connection = await self.connect()
        try:
            await connection.execute("SELECT pg_promote(false)")
            await _until(connection, PROMOTED)
        finally:
            await connection.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the server."""
        assert self._process is not None  # noqa: S101 - used after start
        for pid in [self._process.pid, *_children(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End all processes of the server immediately."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Stop the server, and unlock its folder."""
        self.kill()
        self._folder.release()


class ServerPair:
    """A primary and its synchronous standby."""

    def __init__(self, folder: Path) -> None:
        self._servers = [Server(folder / name) for name in ("first", "second")]

    @property
    def url(self) -> str:
        """The URL that lists both servers."""
        hosts = quote(",".join(str(server.run) for server in self._servers), safe="/,")
        return f"postgresql://{postgres.NAME}@/{postgres.NAME}?host={hosts}&target_session_attrs=read-write"

    @property
    def primary(self) -> Server:
        """The primary."""
        return self._servers[self._of_primary]

    @property
    def standby(self) -> Server:
        """The other server."""
        return self._servers[1 - self._of_primary]

    async def start(self) -> None:
        """Create and start both servers."""
        self._of_primary = 0
        await asyncio.to_thread(self.primary.make)
        await self.primary.start()
        await self.rebuild()

    async def rebuild(self) -> None:
        """Make the other server a standby that confirms each commit of the primary."""
        self.standby.kill()
        await self.standby.copy(self.primary)
        await self.standby.start()
        await self.primary.demand(STANDBY)

    async def promote(self) -> None:
        """Let the standby take over."""
        await self.standby.promote()
        self._of_primary = 1 - self._of_primary

    def stop(self) -> None:
        """Stop both servers."""
        for server in self._servers:
            server.stop()


async def _until(connection: Connection, query: str) -> None:
    async with asyncio.timeout(SECONDS):
        while not await connection.fetchval(query):  # noqa: ASYNC110 - another process
            await asyncio.sleep(POLL_SECONDS)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
