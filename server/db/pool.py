"""The pool of connections to PostgreSQL: what every statement passes through, so there is little of it.

asyncpg has a pool; at a few hundred statements a second an eighth of a worker's CPU time went into it
(docs/performance.md). Ours hands the connection itself to whoever asks, at once if one is free, and asks PostgreSQL
to forget nothing in between, because nothing that we do leaves anything behind.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from enum import Enum
from types import TracebackType
from typing import NamedTuple, TypeAlias

import asyncpg

from protocol.ids import SessionId, UserId
from server.fairness.fair_queue import FairQueue
from server.fairness.turns import Turns

USER_SHARE = 2
"""One user holds at most one in `USER_SHARE` of a worker's connections, and at least one."""


class OfSessions(NamedTuple):
    """What requests about the sessions of one user wait as: behind none of the user's frames."""

    user_id: UserId


class OfStrangers(Enum):
    """What requests of those who have no account yet wait as, all together."""

    REGISTERING = "registering"


Client: TypeAlias = UserId | OfSessions | OfStrangers
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Pool:
    """At most `most` connections, opened when they are needed; the one used last is used next."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], *, most: int, patience: float) -> None:
        """`patience` is how many seconds to wait for one to become free."""
        self._connect = connect
        self._most = most
        self._patience = patience
        self._free: list[Connection] = []
        self._taken: set[Connection] = set()
        self._opening = 0
        self._is_closed = False
        self._waiting: FairQueue[Hashable, asyncio.Future[Connection | None]] = FairQueue(is_over=asyncio.Future.done)
        self._turns: Turns[Client] = Turns(max(1, most // USER_SHARE), patience=patience)
        self._sessions_turns: Turns[Client] = Turns(1, patience=patience)

    def of(self, user_id: UserId) -> "UserPool":
        """Return the pool as one user has it."""
        return UserPool(self, self._turns, user_id)

    def of_sessions(self, user_id: UserId, asker: SessionId | None) -> "UserPool":
        """Return the pool for the sessions of one user: one further connection, which their frames cannot hold, and for
        which they do not wait behind these. Each session that asks, and logins, have it in turn.
        """
        return UserPool(self, self._sessions_turns, OfSessions(user_id), asker)

    def of_strangers(self, address: str) -> "UserPool":
        """Return the pool as all who have no account yet have it together: as one user. Addresses have it in turn."""
        return UserPool(self, self._turns, OfStrangers.REGISTERING, address)

    @asynccontextmanager
    async def turn(self) -> "AsyncIterator[Pool]":
        """The same as `UserPool.turn` of no user: nobody waits."""
        yield self

    def __len__(self) -> int:
        return len(self._free) + len(self._taken)

    async def take(self, client: Client | None = None) -> Connection:
        """Return a connection that is nobody else's until `give`. Clients that wait take turns, and nobody overtakes
        them. What is done for no user, such as a job or a look-up for many, waits as a client of its own.

        Raises TimeoutError if none becomes free in time, InterfaceError once closed, and what connecting raises.
        """
        if self._is_closed:
            raise _closed()
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed():
                self._taken.add(connection)
                return connection
        if len(self._taken) + self._opening < self._most:
            self._opening += 1
            return await self._open()
        turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        line: Hashable = turn if client is None else client
        self._waiting.put(line, turn)
        try:
            async with asyncio.timeout(self._patience):
                got = await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._hand_on(turn.result())  # it came too late
            elif client is None:
                self._waiting.leave(line)
            else:
                self._waiting.drop(line, turn)
            raise
        return await self._open() if got is None else got

    def give(self, connection: Connection, *, is_usable: bool) -> None:
        """Take a connection back; one that may be in the middle of something is ended."""
        if is_usable and not connection.is_closed() and not self._is_closed:
            self._hand_on(connection)
            return
        self._taken.discard(connection)
        connection.terminate()
        self._opening += 1
        self._hand_on(None)

    def _hand_on(self, connection: "Connection | None") -> None:
        """Give a connection that was taken, or the place to open one, to whoever waits: newcomers do not overtake."""
        if self._waiting:
            self._next_turn().set_result(connection)
        elif connection is None:
            self._opening -= 1
        else:
            self._taken.discard(connection)
            self._free.append(connection)

    def _next_turn(self) -> "asyncio.Future[Connection | None]":
        """Take whose turn it is out of the lines."""
        line, turn = self._waiting.take()
        self._waiting.done(line)
        return turn

    def close(self) -> None:
        """End all connections, without waiting for what is in flight; no others are opened."""
        self._is_closed = True
        for connection in (*self._free, *self._taken):
            connection.terminate()
        self._free.clear()
        while self._waiting:
            self._next_turn().set_exception(_closed())

    async def _open(self) -> Connection:
        """Open a connection in a place that `_opening` counts."""
        try:
            connection = await self._connect()
        except BaseException:
            self._hand_on(None)
            raise
        self._opening -= 1
        if self._is_closed:
            connection.terminate()
            raise _closed()
        self._taken.add(connection)
        return connection


def _closed() -> asyncpg.InterfaceError:
    return asyncpg.InterfaceError("the pool is closed")


class UserPool:
    """The pool as one user has it: who holds a share of the connections waits for one of their own to come back, so
    that there are others for everybody else.
    """

    __slots__ = ("_asker", "_client", "_pool", "_turns")

    def __init__(self, pool: Pool, turns: Turns[Client], client: Client, asker: SessionId | str | None = None) -> None:
        self._pool = pool
        self._turns = turns
        self._client = client
        self._asker = asker

    async def take(self) -> Connection:
        """Return a connection as the pool does. Raises TimeoutError if none of the user comes back in time, too."""
        await self._turns.take(self._client, self._asker)
        try:
            return await self._pool.take(self._client)
        except BaseException:
            self._turns.give(self._client, self._asker)
            raise

    @asynccontextmanager
    async def turn(self) -> "AsyncIterator[HeldTurn]":
        """Hold one of the user's turns, for a block that takes a connection of the pool later. A user who waits for a
        turn holds nothing else that others need, such as a part of a share.

        Raises TimeoutError if none of the user comes back in time.
        """
        await self._turns.take(self._client, self._asker)
        try:
            yield HeldTurn(self._pool, self._client)
        finally:
            self._turns.give(self._client, self._asker)

    def give(self, connection: Connection, *, is_usable: bool) -> None:
        """Take a connection back."""
        try:
            self._pool.give(connection, is_usable=is_usable)
        finally:
            self._turns.give(self._client, self._asker)


class HeldTurn:
    """The pool for a user who holds a turn already."""

    __slots__ = ("_client", "_pool")

    def __init__(self, pool: Pool, client: Client) -> None:
        self._pool = pool
        self._client = client

    async def take(self) -> Connection:
        """Return a connection as the pool does."""
        return await self._pool.take(self._client)

    def give(self, connection: Connection, *, is_usable: bool) -> None:
        """Take a connection back."""
        self._pool.give(connection, is_usable=is_usable)


class Lease:
    """A connection for the length of a block."""

    __slots__ = ("_connection", "_is_lost", "_pool")

    def __init__(self, pool: Pool | UserPool | HeldTurn, is_lost: Callable[[BaseException], bool]) -> None:
        """`is_lost` tells of an error whether the connection may still be in the middle of what failed."""
        self._pool = pool
        self._is_lost = is_lost
        self._connection: Connection

    async def __aenter__(self) -> Connection:
        self._connection = await self._pool.take()
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_usable = error is None or (isinstance(error, Exception) and not self._is_lost(error))
        self._pool.give(self._connection, is_usable=is_usable)
