"""The installation under test: a cluster that is started with `openchat`, or an existing one, given by its URLs."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import asyncpg
import httpx
import msgspec
from redis.asyncio import Redis

from loadtest.installation import Installation
from loadtest.target import Unusable

START_SECONDS = 60.0
POLL_SECONDS = 0.05
CONNECT_SECONDS = 5.0
SETTINGS = {
    # All accounts are registered from one address, within a minute.
    "OPENCHAT_LOGIN_ATTEMPTS_PER_ADDRESS": "100000",
    # High, because the devices of a busy account read what the others of them create.
    "OPENCHAT_READ_RATE": "2000",
    # Low, so that silent and slow clients are detected within a phase.
    "OPENCHAT_HEARTBEAT_SECONDS": "2",
    "OPENCHAT_OUTBOX_BYTES": "65536",
    # The actors are not friends of each other.
    "OPENCHAT_ADD_PEOPLE": "anyone",
}


class Checked(msgspec.Struct):
    """One line of the output of `openchat check`."""

    check: str
    is_good: bool
    some: list[str] | None


class Cluster:
    """An installation of OpenChat, with the URLs of the server, of PostgreSQL and of Redis or Valkey."""

    def __init__(self, url: str, database_url: str, redis_url: str) -> None:
        self.url = url
        self.database_url = database_url
        self.redis_url = redis_url

    @property
    def address(self) -> tuple[str, int]:
        """The server's host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def database(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Connect to PostgreSQL, and retry until it accepts connections."""
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    return await asyncpg.connect(self.database_url, timeout=CONNECT_SECONDS)
                except (OSError, TimeoutError, asyncpg.PostgresError):
                    await asyncio.sleep(POLL_SECONDS)

    async def end_database_sessions(self) -> None:
        """Terminate all connections to PostgreSQL except this one."""
        db = await self.database()
        try:
            await db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        finally:
            await db.close()

    async def flush_redis(self) -> None:
        """Delete all keys of Redis."""
        redis = Redis.from_url(self.redis_url)
        await redis.flushall()
        await redis.aclose()

    async def check(self) -> list[Checked]:
        """Run `openchat check`, and return its results. Raises Unusable if it fails to run."""
        checking = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "server.cli.main", "check", "--json",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"DATABASE_URL": self.database_url},
        )  # fmt: skip
        said, problem = await checking.communicate()
        try:
            return msgspec.json.decode(said, type=list[Checked])
        except msgspec.MsgspecError:
            raise Unusable(f"openchat check failed: {problem.decode().strip()}") from None

    async def ready(self) -> None:
        """Wait until /readyz reports success. Raises TimeoutError."""
        async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(trust_env=False) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(f"{self.url}/readyz", timeout=CONNECT_SECONDS)).is_success:
                        return
                await asyncio.sleep(POLL_SECONDS)


class OwnCluster(Cluster):
    """A cluster that is started for a run and deleted after it. Faults may act on its processes."""

    def __init__(self, workers: int, **settings: str) -> None:
        """`settings` are further environment variables."""
        self.installation = Installation(workers, SETTINGS | settings)
        super().__init__("", self.installation.database_url, self.installation.redis_url)

    async def __aenter__(self) -> Self:
        """Start the cluster. Raises Unusable, with its log, if it does not start."""
        self.url = (await self.installation.__aenter__()).url
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.installation.__aexit__()

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        return [pid for pid in self._children() if b"server.processes.worker" in _read(pid, "cmdline")]

    def postgres(self) -> int:
        """Return the process id of PostgreSQL."""
        return self._child(b"postgres")

    def valkey(self) -> int:
        """Return the process id of Valkey."""
        return self._child(b"valkey-server")

    def roll(self) -> None:
        """Replace the workers one after the other."""
        os.kill(self.installation.pid, signal.SIGHUP)

    def _child(self, program: bytes) -> int:
        return next(pid for pid in self._children() if _read(pid, "comm").strip() == program)

    def _children(self) -> list[int]:
        tasks = Path(f"/proc/{self.installation.pid}/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
