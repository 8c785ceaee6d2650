"""The compared servers. Each class starts a server, and creates its users and conversations."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import quote

import asyncpg

from loadtest.line import Seat
from loadtest.machine import Machine
from loadtest.scenario import Layout
from loadtest.target import Unusable
from protocol.ids import uuid7
from server.auth.tokens import new_token, token_hash
from server.processes.embedded.folder import DataFolder
from server.processes.embedded.postgres import Postgres
from server.processes.embedded.valkey import Valkey

HERE = Path(__file__).parent
NODE = HERE / "peers" / "node"
START_SECONDS = 20.0
LOOK_SECONDS = 0.05


class Ground:
    """One PostgreSQL with a database per server, one Valkey, and a folder for OpenChat, which starts its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = DataFolder(path / "others")
        self.postgres = Postgres(self.folder, max_connections=100)
        self.valkey = Valkey(self.folder)

    def __enter__(self) -> Self:
        self.postgres.start()
        self.valkey.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.valkey.stop()
        self.postgres.stop()
        self.folder.release()


class Contestant:
    """A server to compare. It runs while this context manager is entered."""

    name: ClassVar[str]
    is_stored: ClassVar[bool] = True
    line: str = "benchmarks.lines:PlainLine"
    host, address = "127.0.0.1", "127.0.0.1"

    def __init__(self, ground: Ground, *, workers: int = 1) -> None:
        self.ground = ground
        self.workers = workers
        self.port = 0
        self.machine = Machine([])
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def is_there(cls) -> bool:
        """Whether its requirements are installed."""
        return True

    def command(self) -> list[str]:
        """Return the command that starts the server on `self.port`."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """Return its environment variables."""
        return {"DATABASE_URL": self.database(), "REDIS_URL": self.ground.valkey.url}

    def servers(self) -> list[int]:
        """Return the processes that the server uses but does not start."""
        return [self.ground.postgres.pid, self.ground.valkey.pid]

    def database(self) -> str:
        """Return the URL of its database."""
        return self.ground.postgres.url(type(self).__name__.lower())

    async def __aenter__(self) -> Self:
        await self.create()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process = subprocess.Popen(  # noqa: ASYNC220 - no other task runs meanwhile
            self.command(),
            env=os.environ | self.settings(),
            stdout=subprocess.DEVNULL,
            process_group=0,
            cwd=HERE.parent,
        )
        self.machine = Machine([self._process.pid, *self.servers()])
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                # Any response, or the end of the connection, shows that the server runs.
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                await reader.read(1)
                writer.close()
                return self
            await asyncio.sleep(LOOK_SECONDS)
        await self.__aexit__()
        raise Unusable("the server does not start")

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None  # noqa: S101 - entered
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(START_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    async def create(self) -> None:
        """Create its database if it does not exist."""
        admin = await asyncpg.connect(self.ground.postgres.url())
        name = type(self).__name__.lower()
        if not await admin.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
            await admin.execute(f'CREATE DATABASE "{name}"')
            db = await asyncpg.connect(self.database())
            await db.execute((HERE / "peers" / "schema.sql").read_text())
            await db.close()
        await admin.close()

    async def prepare(self, layout: Layout, tell: Callable[[str], None]) -> tuple[list[Seat], dict[str, list[str]]]:
        """Insert the people and conversations of a scenario into the database."""
        tell(f"{self.name}: {layout.people:,} people …")
        seats = [
            Seat(token=new_token(), user_id=str(uuid7()), source="", conversations=[], talks=False)
            for _ in range(layout.people)
        ]
        members = layout.fill(seats, [str(uuid7()) for _ in layout.groups])
        if self.is_stored:
            db = await asyncpg.connect(self.database())
            await self.store(db, seats, members)
            await db.execute("ANALYZE")
            await db.execute("CHECKPOINT")
            await db.close()
        return seats, members

    async def store(
        self, db: "asyncpg.Connection[asyncpg.Record]", seats: list[Seat], members: dict[str, list[str]]
    ) -> None:
        """Insert sessions and participants."""
        await db.executemany(
            "INSERT INTO session VALUES ($1, $2, now() + interval '1 day')", [(one.token, one.user_id) for one in seats]
        )
        await db.executemany(
            "INSERT INTO participant VALUES ($1, $2)",
            [(user, about) for about, users in members.items() for user in users],
        )

    async def leave(self) -> None:
        """Do nothing. The rows do not affect later runs."""


class OpenChat(Contestant):
    """OpenChat, with the PostgreSQL and the Valkey that it starts itself."""

    name = "OpenChat"
    line = "loadtest.line:Line"

    @property
    def folder(self) -> Path:
        """The data folder, which is kept between turns."""
        return self.ground.path / type(self).__name__.lower()

    def command(self) -> list[str]:
        """Return how it is started."""
        return [sys.executable, "-m", "server.cli.main", "--port", str(self.port), "--workers", str(self.workers)]

    def settings(self) -> dict[str, str]:
        """Return its environment variables. They disable rate limits, because the other servers have none."""
        return {
            "OPENCHAT_DATA_DIR": str(self.folder),
            "OPENCHAT_WRITE_RATE": "1000000",
            "OPENCHAT_FRAME_RATE": "1000000",
            "OPENCHAT_ADDRESS_RATE": "1000000",
            "OPENCHAT_READ_RATE": "1000000",
            "OPENCHAT_CONNECTIONS_PER_USER": "1000",
        }

    def servers(self) -> list[int]:
        """Return none, because all of them are child processes."""
        return []

    def database(self) -> str:
        """Return the URL of its database."""
        return f"postgresql://openchat@/openchat?host={quote(str(self.folder / 'run'))}"

    async def create(self) -> None:
        """Do nothing. The server creates its database."""

    async def store(
        self, db: "asyncpg.Connection[asyncpg.Record]", seats: list[Seat], members: dict[str, list[str]]
    ) -> None:
        """Insert users, sessions, conversations and participants."""
        await db.executemany(
            'INSERT INTO "user" (id, name, email) VALUES ($1, $2, $3)',
            [(one.user_id, "Somebody", f"{one.user_id}@crowd.example") for one in seats],
        )
        await db.executemany(
            "INSERT INTO session (user_id, token, expires_at) VALUES ($1, $2, now() + interval '30 days')",
            [(one.user_id, token_hash(one.token)) for one in seats],
        )
        await db.executemany(
            "INSERT INTO conversation (id, type, title, created_by, version, participant_count, settings_version) "
            "VALUES ($1, 'group', 'Room', $2, 1, $3, 1)",
            [(about, users[0], len(users)) for about, users in members.items()],
        )
        await db.executemany(
            "INSERT INTO conversation_participant (conversation_id, user_id, version, last_read_version) "
            "VALUES ($1, $2, 1, 1)",
            [(about, user) for about, users in members.items() for user in users],
        )


class Obvious(Contestant):
    """The same chat with the same libraries, in a straightforward implementation."""

    name = "the obvious way"

    def command(self) -> list[str]:
        """Return how it is started."""
        return [
            sys.executable, "-m", "uvicorn", "benchmarks.peers.obvious:app", "--port", str(self.port),
            "--workers", str(self.workers), "--log-level", "warning", "--no-access-log",
            "--ws-per-message-deflate", "false",
        ]  # fmt: skip


class OnNode(Contestant):
    """A server on Node.js."""

    @classmethod
    def is_there(cls) -> bool:
        """Whether Node.js and the packages are installed."""
        return shutil.which("node") is not None and (NODE / "node_modules").exists()


class SocketIo(OnNode):
    """socket.io with its Redis adapter."""

    name = "socket.io"
    line = "benchmarks.lines:SocketIoLine"

    def command(self) -> list[str]:
        """Return how it is started."""
        script = str(NODE / "socketio.js")
        return ["node", script, str(self.port), self.database(), self.ground.valkey.url, str(self.workers)]


class Uws(OnNode):
    """A broadcast without storage in C++, the upper bound of WebSocket throughput."""

    name = "raw uWebSockets.js"
    is_stored = False
    line = "benchmarks.lines:RawLine"

    def command(self) -> list[str]:
        """Return how it is started."""
        return ["node", str(NODE / "uws.js"), str(self.port)]


class Picows(Contestant):
    """A broadcast without storage in Python, the upper bound of WebSocket throughput there."""

    name = "raw picows"
    is_stored = False
    line = "benchmarks.lines:RawLine"

    def command(self) -> list[str]:
        """Return how it is started."""
        return [sys.executable, "-m", "benchmarks.peers.raw_picows", str(self.port)]
