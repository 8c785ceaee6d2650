"""What a server costs: memory of an idle connection, CPU of a login, a delivery, a message.

`make figures` starts a server of its own (one worker, a data folder of its own) and measures the CPU time of all
its processes, PostgreSQL and Valkey included, while a small client does four things in turn. CPU time per unit of
work can be compared between runs on a shared machine; times of the clock cannot.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, cast
from uuid import UUID

import asyncpg
import uvloop

from protocol.client import Send
from protocol.codec import encode
from protocol.ids import ConversationId, MessageId, uuid7
from server.auth.sessions import new_token, token_hash
from server.config import Settings
from server.embedded.folder import DataFolder
from server.embedded.postgres import Postgres
from server.embedded.valkey import Valkey
from server.supervisor import Worker, listen, prepare

IDLE, ROOM, TEAMS, TEAM = 2_000, 1_000, 200, 10
SECONDS = 10.0
PATIENCE = 30.0
TICKS = os.sysconf("SC_CLK_TCK")


class Account(NamedTuple):
    """A user to connect as."""

    user_id: UUID
    token: str


class Crowd:
    """Connections that count what they receive."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.frames = 0
        self.sent_at: dict[bytes, float] = {}
        self.spans: list[float] = []

    async def connect(self, account: Account) -> "Line":
        """Connect and return when the first page of conversations has come."""
        line = Line(self, account.token)
        await asyncio.get_running_loop().create_connection(lambda: line, *self.address)
        await line.ready
        return line


class Line(asyncio.Protocol):
    """One WebSocket, as little of it as counting takes."""

    def __init__(self, crowd: Crowd, token: str) -> None:
        self._crowd = crowd
        self._token = token
        self._buffer = b""
        self._is_open = False
        self.transport: asyncio.Transport
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(
            b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Authorization: Bearer " + self._token.encode() + b"\r\n\r\n"
        )

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        if not self._is_open:
            head, blank, data = data.partition(b"\r\n\r\n")
            if not blank:
                self._buffer = head
                return
            self._is_open = True
        start = 0
        while (payload := _payload(data, start)) is not None:
            first, end = payload
            if not self.ready.done() and b'"is_last":true' in data[first:end]:
                self.ready.set_result(None)
            elif data[first:end].startswith(b'{"type":"reply"'):
                self._answered(data[first:end])
            else:
                self._crowd.frames += 1
            start = end
        self._buffer = data[start:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(exc or ConnectionError("closed"))

    def send(self, frame: Send) -> None:
        """Send a message, and note when."""
        frame.id = str(frame.message_id)
        self._crowd.sent_at[frame.id.encode()] = time.perf_counter()
        payload = encode(frame)
        self.transport.write(b"\x81" + struct.pack("!BH", 0x80 | 126, len(payload)) + bytes(4) + payload)

    def _answered(self, reply: bytes) -> None:
        began = self._crowd.sent_at.pop(reply[22:58], None)
        if began is not None:
            self._crowd.spans.append(time.perf_counter() - began)


def _payload(data: bytes, start: int) -> tuple[int, int] | None:
    """Return where the payload of the frame at `start` begins and ends, if all of it is there."""
    if len(data) < start + 2:
        return None
    size, first = data[start + 1], start + 2
    if size == 126:  # noqa: PLR2004 - RFC 6455, section 5.2
        size, first = int.from_bytes(data[start + 2 : start + 4]), start + 4
    elif size == 127:  # noqa: PLR2004
        size, first = int.from_bytes(data[start + 2 : start + 10]), start + 10
    return (first, first + size) if len(data) >= first + size else None


class Server:
    """A server of our own, to be measured."""

    def __init__(self, path: Path) -> None:
        self._folder = DataFolder(path)
        self.postgres = Postgres(self._folder, max_connections=50)
        self.valkey = Valkey(self._folder)
        self.postgres.start()
        self.valkey.start()
        listener = listen("127.0.0.1", 0, 1)[0]
        self.address: tuple[str, int] = listener.getsockname()
        settings = Settings(
            database_url=self.postgres.url(),
            redis_url=self.valkey.url,
            workers=1,
            write_rate=1e6,
            heartbeat_seconds=600,
        )
        asyncio.run(prepare(settings))
        self.worker = Worker(settings, 1, listener, path)
        self.worker.start()
        self.worker.wait_ready()

    def stop(self) -> None:
        """Stop all of it."""
        self.worker.terminate()
        self.worker.kill()
        self.valkey.stop()
        self.postgres.stop()
        self._folder.release()

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds that each kind of process has used."""
        assert self.worker.process is not None  # noqa: S101 - started above
        parents = {"worker": self.worker.process.pid, "PostgreSQL": self.postgres.pid, "Valkey": self.valkey.pid}
        used = dict.fromkeys(parents, 0.0)
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                for name, pid in parents.items():
                    if pid in {int(path.parent.name), int(fields[1])}:
                        # A backend that ends adds its time to its parent's children's.
                        times = fields[11:15] if int(path.parent.name) == pid else fields[11:13]
                        used[name] += sum(int(one) for one in times) / TICKS
        return used

    def memory(self) -> int:
        """Return the worker's proportional set size, in bytes."""
        assert self.worker.process is not None  # noqa: S101 - started above
        text = Path(f"/proc/{self.worker.process.pid}/smaps_rollup").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("Pss:"))
        return int(line.split()[1]) * 1024


async def accounts(db: "asyncpg.Connection[asyncpg.Record]", count: int) -> list[Account]:
    """Make users with sessions."""
    made = [Account(uuid7(), new_token()) for _ in range(count)]
    await db.executemany(
        'INSERT INTO "user" (id, name, email) VALUES ($1, $2, $3)',
        [(one.user_id, "Somebody", f"{one.user_id.hex}@example.org") for one in made],
    )
    await db.executemany(
        "INSERT INTO session (user_id, token, expires_at) VALUES ($1, $2, now() + interval '30 days')",
        [(one.user_id, token_hash(one.token)) for one in made],
    )
    return made


async def conversation(db: "asyncpg.Connection[asyncpg.Record]", members: list[Account]) -> ConversationId:
    """Make a group of these."""
    made = await db.fetchval(
        "INSERT INTO conversation (type, title, created_by, version, participant_count, settings_version) "
        "VALUES ('group', 'Room', $1, 1, $2, 1) RETURNING id",
        members[0].user_id,
        len(members),
    )
    await db.executemany(
        "INSERT INTO conversation_participant (conversation_id, user_id, version, last_read_version) "
        "VALUES ($1, $2, 1, 1)",
        [(made, one.user_id) for one in members],
    )
    return ConversationId(made)


class Load(NamedTuple):
    """What a scenario did and what it cost."""

    messages: int
    deliveries: int
    spent: dict[str, float]
    p99: float


async def talk(server: Server, crowd: Crowd, lines: list[tuple[Line, ConversationId]], rate: float) -> Load:
    """Send at `rate` messages a second for a while, and return what that cost."""
    crowd.frames, crowd.spans = 0, []
    before = server.cpu()
    began = time.perf_counter()
    count = int(rate * SECONDS)
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        line, about = lines[number % len(lines)]
        line.send(Send(conversation_id=about, message_id=MessageId(uuid7()), content=secrets.token_urlsafe(80)))
    async with asyncio.timeout(PATIENCE):
        while len(crowd.spans) < count:  # noqa: ASYNC110 - many answers, no event
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    spent = {name: used - before[name] for name, used in server.cpu().items()}
    return Load(count, crowd.frames, spent, sorted(crowd.spans)[int(count * 0.99)])


def show(name: str, load: Load) -> None:
    """Print a line of the table."""
    total = sum(load.spent.values())
    parts = ", ".join(f"{part} {used / load.messages * 1e6:.0f}" for part, used in load.spent.items())
    say(
        f"{name:34} {total / load.deliveries * 1e6:7.1f} µs a delivery "
        f"{total / load.messages * 1e6:7.0f} µs a message "
        f"({parts})  p99 ack {load.p99 * 1e3:.1f} ms"
    )


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def measure(server: Server) -> None:
    """Do the four things."""
    db = await asyncpg.connect(server.postgres.url())
    crowd = Crowd(server.address)
    say(f"connecting {IDLE} …")
    everybody = await accounts(db, IDLE)
    # What the first connection alone brings into memory is not the next one's cost.
    lines = [await crowd.connect(one) for one in await accounts(db, 1)]
    await asyncio.sleep(1)
    memory, before = server.memory(), sum(server.cpu().values())
    for start in range(0, IDLE, 50):
        lines += await asyncio.gather(*(crowd.connect(one) for one in everybody[start : start + 50]))
    spent = sum(server.cpu().values()) - before
    say(f"{'storm: connect, ready, first page':34} {spent / IDLE * 1e3:7.2f} ms a connection")
    await asyncio.sleep(2)
    say(f"{'idle':34} {(server.memory() - memory) / IDLE / 1024:7.1f} KiB a connection (PSS of the worker)")
    for line in lines:
        line.transport.close()
    await asyncio.sleep(1)

    members = await accounts(db, ROOM)
    room = await conversation(db, members)
    await db.execute("ANALYZE")
    lines = [await crowd.connect(one) for one in members]
    show(f"room: {ROOM} listen, 20 messages/s", await talk(server, crowd, [(lines[0], room)], 20))
    for line in lines:
        line.transport.close()

    teams = []
    for _ in range(TEAMS):
        members = await accounts(db, TEAM)
        about = await conversation(db, members)
        lines = [await crowd.connect(one) for one in members]
        teams.append((lines[0], about))
    show(f"teams: {TEAMS} of {TEAM}, 200 messages/s", await talk(server, crowd, teams, 200))
    show(f"teams: {TEAMS} of {TEAM}, 1,000 messages/s", await talk(server, crowd, teams, 1_000))
    await db.close()


def main() -> None:
    """Measure and print."""
    path = Path(tempfile.mkdtemp(prefix="openchat-figures-"))
    server = Server(path)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(measure(server))
    finally:
        server.stop()
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
