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
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import quote

import asyncpg

from loadtest.connection import User
from loadtest.distance import DistantDatabase
from loadtest.machine import Machine
from loadtest.progress import Progress
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
POLL_SECONDS = 0.05


class Environment:
    """One PostgreSQL with a database per server, one Valkey, and a folder for OpenChat, which starts its own."""

    def __init__(self, path: Path, *, database_delay: float = 0.0) -> None:
        """`database_delay` is the round trip that is added between each server and its database, in seconds."""
        self.path = path
        self.database_delay = database_delay
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


class Server:
    """A server to compare. It runs while this context manager is entered."""

    name: ClassVar[str]
    is_stored: ClassVar[bool] = True
    starts_database: ClassVar[bool] = False
    """Whether it starts its own PostgreSQL, instead of using that of the environment."""
    connection: str = "benchmarks.connections:PlainConnection"
    host, address = "127.0.0.1", "127.0.0.1"

    def __init__(self, environment: Environment, *, workers: int = 1) -> None:
        self.environment = environment
        self.workers = workers
        self.port = 0
        self.machine = Machine([])
        self._process: subprocess.Popen[bytes] | None = None
        self._distance = contextlib.AsyncExitStack()

    @classmethod
    def is_there(cls) -> bool:
        """Whether its requirements are installed."""
        return True

    def command(self) -> list[str]:
        """Return the command that starts the server on `self.port`."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """Return its environment variables."""
        return {"DATABASE_URL": self.database(), "REDIS_URL": self.environment.valkey.url}

    def processes(self) -> list[int]:
        """Return the processes that the server uses but does not start."""
        return [self.environment.postgres.pid, self.environment.valkey.pid]

    def database(self) -> str:
        """Return the URL of its database."""
        return self.environment.postgres.url(type(self).__name__.lower())

    @property
    def run(self) -> Path:
        """The folder with the socket of its PostgreSQL."""
        return self.environment.folder.run

    async def _move_database(self) -> None:
        """Add the round trip of the environment."""
        if delay := self.environment.database_delay:
            database = await self._distance.enter_async_context(DistantDatabase(self.run))
            await database.set_round_trip(delay)

    async def __aenter__(self) -> Self:
        await self.create()
        if not self.starts_database:
            await self._move_database()
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
        self.machine = Machine([self._process.pid, *self.processes()])
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                # Any response, or the end of the connection, shows that the server runs.
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                await reader.read(1)
                writer.close()
                if self.starts_database:
                    await self._move_database()
                return self
            await asyncio.sleep(POLL_SECONDS)
        await self.__aexit__()
        raise Unusable("the server does not start")

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None  # noqa: S101 - entered
        await self._distance.aclose()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(START_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    async def create(self) -> None:
        """Create its database if it does not exist."""
        admin = await asyncpg.connect(self.environment.postgres.url())
        name = type(self).__name__.lower()
        if not await admin.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
            await admin.execute(f'CREATE DATABASE "{name}"')
            db = await asyncpg.connect(self.database())
            await db.execute((HERE / "peers" / "schema.sql").read_text())
            await db.close()
        await admin.close()

    async def prepare(self, layout: Layout, progress: Progress) -> tuple[list[User], dict[str, list[str]]]:
        """Insert the people and conversations of a scenario into the database."""
        progress.step(f"{self.name}: {layout.people:,} people …")
        users = [
            User(token=new_token(), user_id=str(uuid7()), source="", conversations=[], talks=False)
            for _ in range(layout.people)
        ]
        members = layout.fill(users, [str(uuid7()) for _ in layout.groups])
        if self.is_stored:
            db = await asyncpg.connect(self.database())
            await self.store(db, users, members)
            await db.execute("ANALYZE")
            await db.execute("CHECKPOINT")
            await db.close()
        return users, members

    async def store(
        self, db: "asyncpg.Connection[asyncpg.Record]", users: list[User], members: dict[str, list[str]]
    ) -> None:
        """Insert sessions and participants."""
        await db.executemany(
            "INSERT INTO session VALUES ($1, $2, now() + interval '1 day')", [(one.token, one.user_id) for one in users]
        )
        await db.executemany(
            "INSERT INTO participant VALUES ($1, $2)",
            [(user, about) for about, ids in members.items() for user in ids],
        )

    async def leave(self) -> None:
        """Do nothing. The rows do not affect later runs."""


class OpenChat(Server):
    """OpenChat, with the PostgreSQL and the Valkey that it starts itself."""

    name = "OpenChat"
    starts_database = True
    connection = "loadtest.connection:Connection"

    @property
    def folder(self) -> Path:
        """The data folder, which is kept between turns."""
        return self.environment.path / type(self).__name__.lower()

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

    def processes(self) -> list[int]:
        """Return none, because all of them are child processes."""
        return []

    def database(self) -> str:
        """Return the URL of its database."""
        return f"postgresql://openchat@/openchat?host={quote(str(self.run))}"

    @property
    def run(self) -> Path:
        """The folder with the socket of its PostgreSQL."""
        return self.folder / "run"

    async def create(self) -> None:
        """Do nothing. The server creates its database."""

    async def store(
        self, db: "asyncpg.Connection[asyncpg.Record]", users: list[User], members: dict[str, list[str]]
    ) -> None:
        """Insert users, sessions, conversations and participants."""
        await db.executemany(
            'INSERT INTO "user" (id, name, email) VALUES ($1, $2, $3)',
            [(one.user_id, "Somebody", f"{one.user_id}@crowd.example") for one in users],
        )
        await db.executemany(
            "INSERT INTO session (user_id, token, expires_at) VALUES ($1, $2, now() + interval '30 days')",
            [(one.user_id, token_hash(one.token)) for one in users],
        )
        await db.executemany(
            "INSERT INTO conversation (id, type, title, created_by, version, participant_count, settings_version) "
            "VALUES ($1, 'group', 'Room', $2, 1, $3, 1)",
            [(about, ids[0], len(ids)) for about, ids in members.items()],
        )
        await db.executemany(
            "INSERT INTO conversation_participant (conversation_id, user_id, version, last_read_version) "
            "VALUES ($1, $2, 1, 1)",
            [(about, user) for about, ids in members.items() for user in ids],
        )


class Obvious(Server):
    """The same chat with the same libraries, in a straightforward implementation."""

    name = "the obvious way"

    def command(self) -> list[str]:
        """Return how it is started."""
        return [
            sys.executable, "-m", "uvicorn", "benchmarks.peers.obvious:app", "--port", str(self.port),
            "--workers", str(self.workers), "--log-level", "warning", "--no-access-log",
            "--ws-per-message-deflate", "false",
        ]  # fmt: skip


class OnNode(Server):
    """A server on Node.js."""

    @classmethod
    def is_there(cls) -> bool:
        """Whether Node.js and the packages are installed."""
        return shutil.which("node") is not None and (NODE / "node_modules").exists()


class SocketIo(OnNode):
    """socket.io with its Redis adapter."""

    name = "socket.io"
    connection = "benchmarks.connections:SocketIoConnection"

    def command(self) -> list[str]:
        """Return how it is started."""
        script = str(NODE / "socketio.js")
        return ["node", script, str(self.port), self.database(), self.environment.valkey.url, str(self.workers)]


class UnansweredSocketIo(SocketIo):
    """The same, but senders ask for no acknowledgement. So they do not know whether a message was stored."""

    name = "socket.io without acknowledgements"
    connection = "benchmarks.connections:UnansweredSocketIoConnection"


class Uws(OnNode):
    """A broadcast without storage in C++, the upper bound of WebSocket throughput."""

    name = "raw uWebSockets.js"
    is_stored = False
    connection = "benchmarks.connections:RawConnection"

    def command(self) -> list[str]:
        """Return how it is started."""
        return ["node", str(NODE / "uws.js"), str(self.port)]


class Picows(Server):
    """A broadcast without storage in Python, the upper bound of WebSocket throughput there."""

    name = "raw picows"
    is_stored = False
    connection = "benchmarks.connections:RawConnection"

    def command(self) -> list[str]:
        """Return how it is started."""
        return [sys.executable, "-m", "benchmarks.peers.raw_picows", str(self.port)]
