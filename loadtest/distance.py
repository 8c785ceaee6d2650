"""A database at a distance: a process between PostgreSQL's Unix socket and its clients, which delays all data.

`python -m loadtest.distance UPSTREAM LISTEN` carries connections from one Unix socket to another. It reads delays in
seconds from standard input, one a line, writes an empty line after each, and ends when the input closes.
"""

import asyncio
import contextlib
import selectors
import sys
from pathlib import Path
from typing import Self
from urllib.parse import quote

import asyncpg

from loadtest.proxy import Proxy

SOCKET, DIRECT, NEW = ".s.PGSQL.5432", ".s.PGSQL.5433", ".s.PGSQL.5434"
"""PostgreSQL's socket, its second name while the process listens in its place, and the first name of the process's."""
OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


class DistantDatabase:
    """Delays all connections to the embedded PostgreSQL in a folder of sockets while it is entered.

    The process takes over the name of PostgreSQL's socket, so its clients need no other URL. `url` bypasses it. Open
    connections are ended, and the clients open them again.
    """

    def __init__(self, run: Path) -> None:
        """`run` is the folder of sockets of an embedded PostgreSQL."""
        self._run = run
        self._process: asyncio.subprocess.Process
        self._read: asyncio.StreamReader
        self._write: asyncio.StreamWriter

    def url(self, database: str) -> str:
        """Return the URL of a database without the delay."""
        return f"postgresql://openchat@/{database}?host={quote(str(self._run))}&port=5433"

    async def __aenter__(self) -> Self:
        direct = self._run / DIRECT
        # Hard links and renames are atomic, so a client can connect at any moment.
        direct.hardlink_to(self._run / SOCKET)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "loadtest.distance", str(direct), str(self._run / NEW),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101, PT018 - asked for
        self._write, self._read = self._process.stdin, self._process.stdout
        await self.set_round_trip(0.0)
        (self._run / NEW).replace(self._run / SOCKET)
        await self._end_sessions()
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):  # PostgreSQL has ended
            (self._run / DIRECT).replace(self._run / SOCKET)
        self._write.close()
        await self._process.wait()

    async def set_round_trip(self, seconds: float) -> None:
        """Change the round trip time that the process adds, in seconds. Open connections keep the order of data."""
        self._write.write(f"{seconds / 2}\n".encode())
        if not await self._read.readline():
            raise ConnectionError("the delaying process has ended")

    async def _end_sessions(self) -> None:
        db = await asyncpg.connect(self.url("postgres"))
        try:
            await db.execute(OTHERS)
        finally:
            await db.close()


async def main(upstream: str, listen: str) -> None:
    """Carry connections until standard input ends."""
    delays = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(delays), sys.stdin)
    async with Proxy(Path(upstream), listen=Path(listen)) as proxy:
        while text := await delays.readline():
            proxy.delay = float(text)
            sys.stdout.write("\n")
            sys.stdout.flush()


if __name__ == "__main__":
    # select() waits with microseconds, epoll only with milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main(*sys.argv[1:]))
