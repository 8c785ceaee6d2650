"""People: the users with sockets at this worker, and looking again at what is theirs."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from protocol.errors import CloseCode
from protocol.ids import ConversationId, SessionId, UserId
from protocol.server import ServerFrame
from server.bus import Bus
from server.errors import log_failure

COMPARE_AT_ONCE = 2_000

log = logging.getLogger(__name__)


class Sight(IntEnum):
    """What a socket may see of a user whom it watches. Each includes those before it."""

    NOTHING = 0
    FACE = 1
    ALL = 2


class Socket(Protocol):
    """What the hub needs of a connection."""

    user_id: UserId
    session_id: SessionId
    attached: set[ConversationId]
    watched: dict[UserId, Sight]
    write: Callable[[bytes], None]

    def say(self, frame: ServerFrame) -> None:
        """Send a frame to it alone."""

    def refresh(self) -> None:
        """Have it compare what it follows with what its user takes part in."""

    def close(self, code: CloseCode) -> None:
        """Close it."""


class UserRecord(Protocol):
    """What is asked of the database about users."""

    async def user_versions(self, user_ids: Sequence[UserId]) -> Mapping[UserId, tuple[int, int]]:
        """Return users' own clocks, and the hidden ones, which move when others let them see less or more."""

    async def living(self, session_ids: Sequence[SessionId]) -> Collection[SessionId]:
        """Return which of the sessions are valid."""


class Person:
    """A user with sockets at this worker. `version` and `hidden` are their clocks as of the last look."""

    __slots__ = ("channel", "hidden", "is_look_due", "look", "sockets", "version")

    def __init__(self, channel: bytes) -> None:
        self.channel = channel
        self.sockets: set[Socket] = set()
        self.version = -1
        self.hidden = 0
        self.is_look_due = False
        self.look: asyncio.Task[None] | None = None


class People:
    """All of them."""

    def __init__(self, record: UserRecord, bus: Bus, *, doubt: Callable[[UserId], None]) -> None:
        """`doubt` is called with each user who may see less, or more, than before."""
        self._record = record
        self._bus = bus
        self._doubt = doubt
        self._people: dict[UserId, Person] = {}
        self._looks: set[asyncio.Task[None]] = set()
        self._turn = 0

    def sockets(self, user_id: UserId) -> list[Socket]:
        """Return a user's sockets."""
        return list(person.sockets) if (person := self._people.get(user_id)) is not None else []

    def version(self, user_id: UserId) -> int:
        """Return a user's own clock as of the last look."""
        return person.version if (person := self._people.get(user_id)) is not None else -1

    def everyone(self) -> list[Socket]:
        """Return all sockets."""
        return [socket for person in self._people.values() for socket in person.sockets]

    async def add(self, socket: Socket, version: int) -> None:
        """Let a socket in: from now on news about its user reaches it. `version` is the user's own clock as of
        when its session was found valid: what changed since then is looked at.
        """
        person = self._people.get(socket.user_id)
        if person is None:
            person = self._people[socket.user_id] = Person(channel(socket.user_id))
        person.sockets.add(socket)
        await self._bus.subscribe([person.channel])
        if person.version < 0:
            found = await self._record.user_versions([socket.user_id])
            own, person.hidden = found.get(socket.user_id, (0, 0))
            person.version = max(person.version, own)
        if person.version != version:
            self.look(socket.user_id)

    def remove(self, socket: Socket) -> None:
        """Forget a socket."""
        person = self._people.get(socket.user_id)
        if person is not None:
            person.sockets.discard(socket)
            if not person.sockets:
                del self._people[socket.user_id]
                self._bus.unsubscribe(person.channel)

    def write(self, user_id: UserId, frame: bytes) -> None:
        """Write a frame to a user's sockets."""
        if (person := self._people.get(user_id)) is not None:
            for socket in person.sockets:
                socket.write(frame)

    def look(self, user_id: UserId, *, may_watch_others: bool = False) -> None:
        """Look at a user's sessions, and have their sockets look at their conversations: something changed. With
        `may_watch_others`, that decides whom they may watch.
        """
        person = self._people.get(user_id)
        if person is None:
            return
        # Not a part of `refresh`, which a client that does not read can delay.
        if may_watch_others:
            self._doubt(user_id)
        # Serialize rechecks; always run one that starts after this call. One that waits does for all calls.
        if not person.is_look_due:
            person.is_look_due = True
            person.look = self._spawn(self._look(user_id, person, person.look))

    async def compare(self, *, parts: int) -> None:
        """Compare the users' own clocks with PostgreSQL, and look at those whose news was missed: all of them, or
        one of so many `parts`, and the next one the next time.
        """
        self._turn += 1
        user_ids = list(self._people)[self._turn % parts :: parts]
        for start in range(0, len(user_ids), COMPARE_AT_ONCE):
            versions = await self._record.user_versions(user_ids[start : start + COMPARE_AT_ONCE])
            for user_id, clocks in versions.items():
                person = self._people.get(user_id)
                if person is not None and person.version >= 0 and (person.version, person.hidden) != clocks:
                    # The news was missed, and nobody knows what it was.
                    self.look(user_id, may_watch_others=True)

    def close(self) -> None:
        """Stop looking."""
        for look in self._looks:
            look.cancel()

    async def _look(self, user_id: UserId, person: Person, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        person.is_look_due = False
        sockets = list(person.sockets)
        try:
            version, hidden = (await self._record.user_versions([user_id])).get(user_id, (0, 0))
            living = await self._record.living([socket.session_id for socket in sockets])
        except Exception as error:  # noqa: BLE001 - the database is away: the next comparison looks again
            log_failure(log, f"looking at user {user_id}", error)
            person.version = 0
            return
        person.version, person.hidden = version, hidden
        for socket in sockets:
            if socket.session_id in living:
                socket.refresh()
            else:
                socket.close(CloseCode.SESSION_ENDED)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)
        return task


def channel(user_id: UserId) -> bytes:
    """Return the bus channel of a user."""
    return b"u:" + user_id.hex.encode()
