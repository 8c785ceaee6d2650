"""The server under load. Creates the people and conversations that a run needs, by the wire protocol only."""

import asyncio
import contextlib
import itertools
import secrets
import socket
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
import platformdirs

from loadtest.connection import User
from loadtest.machine import Machine, behind, is_here
from loadtest.progress import Progress
from loadtest.scenario import Layout
from protocol import client
from protocol.codec import decode_server, encode
from protocol.http import LoggedIn, Register
from protocol.ids import ConversationId, UserId, uuid7
from protocol.limits import MAX_PARTICIPANTS_NAMED
from protocol.server import Added, Error, OneConversation, Reply
from server.core.atomic_file import aside, require_folder

PER_ADDRESS = 80
"""Max accounts registered from each loopback address. By default a server allows 100 in five minutes."""
MAX_REQUESTS = 8
SECONDS = 30.0
TOO_MANY_REQUESTS = 429


Outcome = TypeVar("Outcome")


class Unusable(Exception):  # noqa: N818 - the message for the user
    """The run is impossible, with the reason."""


class Person(msgspec.Struct):
    """An account."""

    user_id: UserId
    token: str


class Cache(msgspec.Struct):
    """The data kept between runs. It has the accounts, because each registration costs the server tens of milliseconds.
    It has the long conversation of `history`, because writing it takes minutes.
    """

    people: list[Person] = []
    history: ConversationId | None = None
    readers: int = 0
    """Number of people in `history`."""
    written: int = 0


class Target(Protocol):
    """A server under load."""

    connection: str
    """The class of its connections, as `module:class`."""
    host: str
    port: int
    address: str
    machine: Machine

    async def prepare(self, layout: Layout, progress: Progress) -> tuple[list[User], dict[str, list[str]]]:
        """Return the users to connect, and the users of each conversation."""

    async def leave(self) -> None:
        """Remove what `prepare` created."""


class OpenChat:
    """An OpenChat server at a URL. Raises Unusable if the URL is invalid or its host is unknown."""

    connection = "loadtest.connection:Connection"

    def __init__(self, url: str, *, is_kept: bool = True) -> None:
        """`is_kept` is whether the accounts are kept for later runs at the same address."""
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        if parts.scheme != "http" or not parts.hostname:
            raise Unusable(f"{url} is not supported. Use a URL such as http://127.0.0.1:8000, without TLS.")
        self.host, self.port = parts.hostname, parts.port or 80
        try:
            self.address = str(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise Unusable(f"cannot resolve {self.host}: {error.strerror}.") from None
        self.machine = behind(self.port) if is_here(self.address) else Machine([])
        self._url = f"http://{self.host}:{self.port}"
        self._is_loopback = self.address.startswith("127.")
        folder = Path(platformdirs.user_cache_dir("openchat", appauthor=False))
        self._path = folder / "load" / f"{self.host}_{self.port}.json"
        self._is_kept = is_kept
        self._made: list[tuple[ConversationId, list[Person]]] = []
        self.cache = Cache()

    @property
    def conversations(self) -> list[ConversationId]:
        """The conversations of the run."""
        return [one for one, _ in self._made]

    async def prepare(self, layout: Layout, progress: Progress) -> tuple[list[User], dict[str, list[str]]]:
        """Create the missing people, and the conversations."""
        await self._open()
        people = await self._people(layout.people, progress)
        users = [
            User(token=one.token, user_id=str(one.user_id), source=self._source(number), conversations=[], talks=False)
            for number, one in enumerate(people)
        ]
        async with self._client() as http:
            made = await some_at_once(
                (self._conversation(http, [people[one] for one in group], layout) for group in layout.groups),
                lambda count: progress.count("creating conversations", count, len(layout.groups)),
            )
        return users, layout.fill(users, [str(one) for one in made])

    async def leave(self) -> None:
        """Make everyone leave the conversations of this run, so that the next one starts without them."""
        async with self._client() as http:
            await some_at_once(self._leave(http, one, about) for about, group in self._made for one in group)
        self._made.clear()

    async def _leave(self, http: httpx.AsyncClient, one: Person, about: ConversationId) -> None:
        with contextlib.suppress(Unusable):  # a person who has left during the run
            await self.call(http, one, client.Leave(conversation_id=about))

    async def call(self, http: httpx.AsyncClient, person: Person, frame: client.Frame) -> Reply:
        """Send one frame as a person, and retry when the server asks to wait. Raises Unusable if it is refused."""
        while True:
            answer = decode_server(
                (
                    await http.post(
                        "/v1/call", content=encode(frame), headers={"authorization": f"Bearer {person.token}"}
                    )
                ).content
            )
            if isinstance(answer, Reply):
                return answer
            if not isinstance(answer, Error) or answer.retry_after_ms is None:
                raise Unusable(f"the server refused: {answer}")
            await asyncio.sleep(answer.retry_after_ms / 1000)

    def save(self) -> None:
        """Write the kept data to its file."""
        if not self._is_kept:
            return
        require_folder(self._path.parent)
        with aside(self._path, replaces=True) as write:
            write(msgspec.json.encode(self.cache))

    async def _open(self) -> None:
        """Read the accounts of earlier runs, if the server still accepts them."""
        if self._is_kept and self._path.exists() and not self.cache.people:
            self.cache = msgspec.json.decode(self._path.read_bytes(), type=Cache)
        async with self._client() as http:
            try:
                await http.get("/healthz")
                if self.cache.people:
                    await self.call(http, self.cache.people[0], client.Ping())
            except httpx.HTTPError:
                raise Unusable(
                    f"cannot connect to {self._url}. Start a server with `openchat`, or name another one with --url."
                ) from None
            except Unusable:
                self.cache = Cache()

    async def _people(self, count: int, progress: Progress) -> list[Person]:
        known = self.cache.people
        for start in range(len(known), count, PER_ADDRESS):
            async with self._client(self._source(start)) as http:
                known += await some_at_once(self._register(http) for _ in range(start, min(start + PER_ADDRESS, count)))
            progress.count("creating accounts", len(known), count)
            self.save()
        return known[:count]

    async def _register(self, http: httpx.AsyncClient) -> Person:
        name = secrets.token_hex(6)
        body = Register(name=f"Crowd {name}", email=f"{name}@crowd.example", password=secrets.token_urlsafe(12))
        answer = await http.post("/v1/auth/register", content=encode(body))
        if answer.status_code == TOO_MANY_REQUESTS:
            raise Unusable(
                "the server limits accounts per address. Start it with OPENCHAT_LOGIN_ATTEMPTS_PER_ADDRESS=100000 for "
                "load tests, or reduce --people."
            )
        if not answer.is_success:
            raise Unusable(f"the server refused to create an account: {answer.text}")
        made = msgspec.json.decode(answer.content, type=LoggedIn)
        return Person(made.user.id, made.token)

    async def _conversation(self, http: httpx.AsyncClient, people: list[Person], layout: Layout) -> ConversationId:
        first, *others = people
        if layout.is_kept and self.cache.history is not None and self.cache.readers == len(people):
            return self.cache.history
        if layout.is_direct:
            reply = await self.call(http, first, client.CreateDirect(user_id=others[0].user_id))
            assert isinstance(reply.result, OneConversation)  # noqa: S101 - the protocol guarantees it
            return reply.result.view.conversation.id
        made = ConversationId(uuid7())
        if layout.is_public:
            await self.call(http, first, client.CreateChannel(conversation_id=made, title="Crowd", is_public=True))
            for one in others:
                await self.call(http, one, client.Join(conversation_id=made))
            self._made.append((made, people))
            return made
        ids = [one.user_id for one in others]
        create = client.CreateGroup(conversation_id=made, title="Crowd", participants=ids[:MAX_PARTICIPANTS_NAMED])
        await self._follow(http, made, await self.call(http, first, create), others)
        for start in range(MAX_PARTICIPANTS_NAMED, len(ids), MAX_PARTICIPANTS_NAMED):
            some = ids[start : start + MAX_PARTICIPANTS_NAMED]
            added = client.AddParticipants(conversation_id=made, participants=some)
            await self._follow(http, made, await self.call(http, first, added), others)
        if layout.is_kept:
            self.cache.history, self.cache.readers, self.cache.written = made, len(people), 0
        else:
            self._made.append((made, people))
        return made

    async def _follow(self, http: httpx.AsyncClient, about: ConversationId, reply: Reply, people: list[Person]) -> None:
        """Make the invited people join. With the default of OPENCHAT_ADD_PEOPLE, a server invites strangers instead of
        adding them.
        """
        assert isinstance(reply.result, Added | OneConversation)  # noqa: S101 - the protocol guarantees it
        invited = set(reply.result.invited)
        for one in people:
            if one.user_id in invited:
                await self.call(http, one, client.Join(conversation_id=about))

    def _source(self, number: int) -> str:
        """Return the source address of a person. Loopback has many, elsewhere the system chooses."""
        place = number // PER_ADDRESS
        return f"127.1.{place // 250 % 250}.{place % 250 + 1}" if self._is_loopback else ""

    def _client(self, source: str = "") -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(
            local_address=source or None, limits=httpx.Limits(max_connections=MAX_REQUESTS)
        )
        return httpx.AsyncClient(base_url=self._url, transport=transport, timeout=SECONDS)


async def some_at_once(
    work: Iterable[Coroutine[None, None, Outcome]], on_count: Callable[[int], None] = lambda _: None
) -> list[Outcome]:
    """Run coroutines, max `MAX_REQUESTS` concurrently, and return their results in order. `on_count` receives how many
    have ended.
    """
    turn = asyncio.Semaphore(MAX_REQUESTS)
    ended = itertools.count(1)

    async def one(coroutine: Coroutine[None, None, Outcome]) -> Outcome:
        async with turn:
            outcome = await coroutine
        on_count(next(ended))
        return outcome

    return await asyncio.gather(*(one(coroutine) for coroutine in work))
