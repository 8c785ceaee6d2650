"""The environment of most tests: workers that share a database, and helpers to create users and conversations."""

import asyncio
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import asyncpg
import httpx
import pytest

from protocol.client import CreateChannel, CreateGroup, Moderate, Send, Unmoderate
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.server import MessageSent, OneConversation, Sent
from protocol.values import Message
from prove.client import Client
from server.app.app import App
from server.auth.tokens import new_token, token_hash
from server.core.config import Settings
from server.db.database import speak
from server.http import openapi
from server.http.openapi import BEFORE_ANY_PATH
from server.hub.bus import Bus
from server.hub.comparisons import AFTER_END_SECONDS, COMPARE_USERS_SECONDS
from server.hub.redis_bus import RedisBus
from server.jobs.scheduled import Scheduler
from server.processes.worker import DrainingServer
from server.queries import accounts, search_index, sessions
from server.queries.sending import Stored

ON_LOOPBACK = ("127.0.0.1", 0)


REPAIR_SECONDS = max(*AFTER_END_SECONDS, COMPARE_USERS_SECONDS) + 15
"""Max wait for an event that was not published, in seconds. Workers find it by comparing versions."""

ADD_OWNER = """
INSERT INTO conversation_participant (conversation_id, user_id, role, version) VALUES ($1, $2, 'owner', 1)
"""
ADD_FRIENDS = """
INSERT INTO user_relationship (from_user_id, to_user_id, type, status)
VALUES ($1, $2, 'friend', 'accepted'), ($2, $1, 'friend', 'accepted')
"""


class UserSession(NamedTuple):
    """A user with a session."""

    id: UserId
    name: str
    token: str


class Worker:
    """A worker as server/processes/worker.py runs it, but in the test's own process, where it starts immediately."""

    def __init__(self, settings: Settings, folder: Path, number: int, *, is_alone: bool = False) -> None:
        self._settings = settings
        self._is_alone = is_alone
        self._folder = folder
        self._number = number
        self.app: App
        self.url: str

    async def start(self) -> None:
        listener = socket.socket()
        listener.bind(ON_LOOPBACK)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.app = await App.open(self._settings, self._folder, self._number, is_alone=self._is_alone)
        self.server = DrainingServer(self.app)
        self._serving = asyncio.create_task(self.server.serve(sockets=[listener]))
        while not self.server.started:
            await asyncio.sleep(0)

    async def stop(self) -> None:
        self.server.stop()
        await self._serving
        await self.app.close()


class World:
    """Workers (two by default), a connection to their database, and the users and clients that a test creates."""

    def __init__(self, settings: Settings, *, workers: int = 2) -> None:
        self.settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="openchat-world-"))
        self.workers = [Worker(settings, self.folder, number) for number in range(1, workers + 1)]
        self.db: asyncpg.Connection[asyncpg.Record]
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.db = await asyncpg.connect(self.settings.database_url)
        await speak(self.db, self.settings.search_language)
        await asyncio.gather(*(worker.start() for worker in self.workers))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        await self.db.close()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str:
        return self.workers[0].url

    async def user(self, name: str) -> UserSession:
        """Create a user with a session."""
        return await session_of(self.db, name)

    async def users(self, *names: str) -> list[UserSession]:
        return [await self.user(name) for name in names]

    async def befriend(self, one: UserSession, other: UserSession) -> None:
        await self.db.execute(ADD_FRIENDS, one.id, other.id)

    async def connect(self, who: UserSession, worker: int = 0, **options: Any) -> Client:
        """Connect a user to a worker. The connection is closed at the end of the test."""
        client = await self._open.enter_async_context(Client(self.workers[worker].url, who.token, **options))
        if "resume" not in options.get("query", ""):
            await client.settled()
        return client

    async def group(self, owner: Client, *others: UserSession, **fields: Any) -> ConversationId:
        """Create a group and return its id."""
        frame = CreateGroup(
            conversation_id=ConversationId(uuid7()),
            title=fields.pop("title", "Lovelace's circle"),
            participants=[one.id for one in others],
            **fields,
        )
        made = await owner.call(frame, OneConversation)
        return made.view.conversation.id

    async def indexed(self) -> None:
        """Add all messages to the search index that were sent so far."""
        while await self.db.fetchval("SELECT EXISTS (SELECT FROM search_queue)"):
            await search_index.waiting(self.db, search_index.FIRST)

    async def moderate_as_owner(self, frame: Moderate | Unmoderate) -> None:
        """Send a frame about an owner's message as a second owner, added by SQL, since no other role may send it."""
        moderator = await self.user("Moderator")
        await self.db.execute(ADD_OWNER, frame.conversation_id, moderator.id)
        one = await self.connect(moderator)
        await one.call(frame)
        await one.close()
        await self.db.execute("DELETE FROM conversation_participant WHERE user_id = $1", moderator.id)

    async def channel(self, owner: Client, **fields: Any) -> ConversationId:
        frame = CreateChannel(conversation_id=ConversationId(uuid7()), title=fields.pop("title", "News"), **fields)
        return (await owner.call(frame, OneConversation)).view.conversation.id


async def session_of(db: "asyncpg.Connection[asyncpg.Record]", name: str) -> UserSession:
    """Create a user with a session, without hashing a password."""
    user_id = await accounts.register(db, name, f"{name.lower()}.{uuid7().hex}@example.org", "no password")
    token = new_token()
    await sessions.create(db, user_id, token_hash(token), timedelta(days=30), (None, None))
    return UserSession(user_id, name, token)


def http_client(url: str = "", *, timeout: float = 5) -> httpx.AsyncClient:
    """Return an HTTP client of the server at `url`, without TLS certificates, since reading them takes 40 ms.

    It fails on a response whose status is not in the OpenAPI document.
    """
    return httpx.AsyncClient(
        base_url=url,
        timeout=timeout,
        trust_env=False,
        verify=False,  # noqa: S501 - no TLS here
        event_hooks={"response": [require_described]},
    )


async def require_described(response: httpx.Response) -> None:
    """Fail if the OpenAPI document does not list the status of a response, or its `Retry-After`, for the path."""
    request = response.request
    path = re.sub(r"^(/v1/auth/sessions/)[^/]+$", r"\1{session_id}", request.url.path)
    described = _statuses().get((request.method, path))
    status = response.status_code
    if described is not None and status not in BEFORE_ANY_PATH:
        assert status in described, (request.method, path, status)
        assert "retry-after" not in response.headers or described[status], (request.method, path, status)


@cache
def _statuses() -> dict[tuple[str, str], dict[int, bool]]:
    """Return the statuses of each operation, and whether each may have `Retry-After`."""
    return {
        (method.upper(), path): {int(status): "headers" in one for status, one in operation["responses"].items()}
        for path, operations in openapi.document()["paths"].items()
        for method, operation in operations.items()
    }


def message(conversation_id: ConversationId, content: str = "Hello", **fields: Any) -> Send:
    """Return a frame that sends a new message."""
    return Send(conversation_id=conversation_id, message_id=MessageId(uuid7()), content=content, **fields)


async def sent(client: Client, conversation_id: ConversationId, content: str = "Hello", **fields: Any) -> MessageId:
    """Send a message and return its id."""
    return (await client.call(message(conversation_id, content, **fields), Sent)).message_id


def are_stored(outcomes: Iterable[object]) -> bool:
    """Return whether `sending.send` has stored all of these messages."""
    return all(isinstance(one, Stored) for one in outcomes)


def events_of(client: Client, *kinds: type) -> list[Any]:
    """Return the events of these kinds that a client has received, those in `changes` included."""
    events = [one for event in client.events for one in getattr(event, "events", [event])]
    return [event for event in events if isinstance(event, kinds)]


def new_messages(client: Client) -> list[Message]:
    """Return the messages of all events that a client has received, those in `changes` included."""
    return [one.message for one in events_of(client, MessageSent)]


async def received_message(client: Client, message_id: MessageId) -> Message:
    """Wait for the event of a message, and return the message."""
    await until(lambda: any(one.id == message_id for one in new_messages(client)))
    return next(one for one in new_messages(client) if one.id == message_id)


async def until(condition: Callable[[], bool], *, seconds: float = 15.0) -> None:
    """Wait until a condition holds. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def until_repaired(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that needs events which a killed worker committed and did not publish."""
    await until(condition, seconds=REPAIR_SECONDS)


@asynccontextmanager
async def without_bus(bus: Bus) -> AsyncIterator[None]:
    """Interrupt the bus of a worker, and let it reconnect at the end."""
    assert isinstance(bus, RedisBus)
    assert bus._transport is not None  # noqa: SLF001
    connect = bus._connect  # noqa: SLF001
    may_connect = asyncio.Event()

    async def later() -> Any:
        await may_connect.wait()
        return await connect()

    bus._connect = later  # type: ignore[method-assign]  # noqa: SLF001
    bus._transport.abort()  # noqa: SLF001
    await until(lambda: not bus.is_up)
    yield
    may_connect.set()
    bus._connect = connect  # type: ignore[method-assign]  # noqa: SLF001
    await until(lambda: bus.is_up)


class Room:
    """A group with its owner Ada, connected to the first worker, and a member Charles, connected to the second."""

    def __init__(self, group: ConversationId, ada: Client, charles: Client, users: list[UserSession]) -> None:
        self.group = group
        self.ada = ada
        self.charles = charles
        self.users = users

    def at(self, message_id: MessageId) -> dict[str, Any]:
        """Return the fields that identify a message of the group in a frame."""
        return {"conversation_id": self.group, "message_id": message_id}


def refused(code: ErrorCode, path: str | None) -> "pytest.RaisesExc[Refused]":
    """Expect an error with this code and path."""
    return pytest.raises(Refused, check=lambda error: (error.code, error.path) == (code, path))


async def all_sent(scheduler: Scheduler) -> None:
    """Wait until a worker is not sending any scheduled message."""
    while scheduler._sending:  # noqa: SLF001
        await asyncio.wait(scheduler._sending)  # noqa: SLF001


class Reader(NamedTuple):
    """A PostgreSQL role with read access, and a connection that uses it."""

    name: str
    db: "asyncpg.Connection[asyncpg.Record]"

    async def seen(self, who: UserId | None, query: str) -> list[Any]:
        """Return the first column of a query, run with the row-level security of a user."""
        await self.db.execute("SELECT set_config('openchat.user_id', $1, false)", "" if who is None else str(who))
        return [row[0] for row in await self.db.fetch(query)]
