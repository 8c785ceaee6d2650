"""The pool of connections to PostgreSQL. Every statement passes through it, so it does little.

asyncpg has a pool, which took an eighth of a worker's CPU time at a few hundred statements per second
(docs/performance.md). This one lends the connection itself, immediately if one is free. It does not reset connections,
because no statement of this program leaves a state behind.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from enum import Enum
from types import TracebackType
from typing import NamedTuple, TypeAlias

import asyncpg

from protocol.ids import SessionId, UserId
from server.core.faults import Away, Exhausted, Fault
from server.fairness.fair_queue import FairQueue
from server.fairness.turns import Turns

USER_SHARE = 2
"""Max share of a worker's connections per user, as 1 / `USER_SHARE`, but at least one."""


class OfSessions(NamedTuple):
    """The client for requests about one user's sessions. They do not wait behind the user's frames."""

    user_id: UserId


class OfStrangers(Enum):
    """The client for all requests without an account."""

    REGISTERING = "registering"


Client: TypeAlias = UserId | OfSessions | OfStrangers
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Pool:
    """Max `most` connections, which are opened when needed. The connection that was used last is used next."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], *, most: int, patience: float) -> None:
        """`patience` is the max wait for a free connection, in seconds."""
        self._connect = connect
        self._most = most
        self._patience = patience
        self._free: list[Connection] = []
        self._taken: set[Connection] = set()
        self._opening = 0
        self.waiting = 0
        """The number of callers that wait for a connection."""
        self._is_closed = False
        self._waiting: FairQueue[Hashable, asyncio.Future[Connection | None]] = FairQueue(is_over=asyncio.Future.done)
        self._turns: Turns[Client] = Turns(max(1, most // USER_SHARE), patience=patience)
        self._sessions_turns: Turns[Client] = Turns(1, patience=patience)

    def of(self, user_id: UserId) -> "UserPool":
        """Return the pool for one user."""
        return UserPool(self, self._turns, user_id)

    def of_sessions(self, user_id: UserId, asker: SessionId | None) -> "UserPool":
        """Return the pool for requests about one user's sessions. They have a connection that the user's frames cannot
        hold, and do not wait behind those frames. Each session that asks, and all logins together, take turns.
        """
        return UserPool(self, self._sessions_turns, OfSessions(user_id), asker)

    def of_strangers(self, address: str) -> "UserPool":
        """Return the pool for all requests without an account, which together count as one user. Addresses
        take turns.
        """
        return UserPool(self, self._turns, OfStrangers.REGISTERING, address)

    @asynccontextmanager
    async def turn(self) -> "AsyncIterator[Pool]":
        """Do nothing, where `UserPool.turn` waits. Without a user, nothing limits the turns."""
        yield self

    def __len__(self) -> int:
        return len(self._free) + len(self._taken)

    async def take(self, client: Client | None = None) -> Connection:
        """Return a connection, which is the caller's until `give`. Waiting clients take turns, and no later call
        overtakes them. A call without a client, such as that of a job, waits as a client of its own.

        Raises Exhausted if none becomes free in time, InterfaceError if the pool is closed, and the errors of
        connecting. If PostgreSQL accepts no more connections, the call waits for those of the pool, unless it has none.
        """
        if self._is_closed:
            raise _closed()
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed():
                self._taken.add(connection)
                return connection
        may_open = len(self._taken) + self._opening < self._most
        self._opening += may_open
        while True:
            if not may_open and (given := await self._wait(client)) is not None:
                return given
            try:
                return await self._open()
            except Away as away:
                if not self._is_enough(away):
                    raise
            may_open = False

    async def _wait(self, client: Client | None) -> "Connection | None":
        """Return the next connection that is returned, or None for the right to open one. Raises Exhausted."""
        turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        line: Hashable = turn if client is None else client
        self._waiting.put(line, turn)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._hand_on(turn.result())  # the connection came too late
            elif client is None:
                self._waiting.leave(line)
            else:
                self._waiting.drop(line, turn)
            if isinstance(error, TimeoutError):
                raise Exhausted("no connection became free in time") from None
            raise
        finally:
            self.waiting -= 1

    def give(self, connection: Connection, *, is_usable: bool) -> None:
        """Return a connection to the pool. It is closed if a statement may still be in progress on it."""
        if is_usable and not connection.is_closed() and not self._is_closed:
            self._hand_on(connection)
            return
        self._taken.discard(connection)
        connection.terminate()
        self._opening += 1
        self._hand_on(None)

    def _hand_on(self, connection: "Connection | None") -> None:
        """Pass on a connection that was taken, or the right to open one if `connection` is None. Waiting clients come
        first.
        """
        if self._waiting:
            self._next_turn().set_result(connection)
        elif connection is None:
            self._opening -= 1
        else:
            self._taken.discard(connection)
            self._free.append(connection)

    def _next_turn(self) -> "asyncio.Future[Connection | None]":
        """Remove the next waiting call from the queue, and return its future."""
        line, turn = self._waiting.take()
        self._waiting.done(line)
        return turn

    def renew(self) -> None:
        """Close the free connections. The next call opens a new one."""
        for connection in self._free:
            connection.terminate()
        self._free.clear()

    def close(self) -> None:
        """Close all connections, without waiting for statements in flight. No others are opened."""
        self._is_closed = True
        for connection in (*self._free, *self._taken):
            connection.terminate()
        self._free.clear()
        while self._waiting:
            self._next_turn().set_exception(_closed())

    def _is_enough(self, error: BaseException) -> bool:
        """Whether PostgreSQL accepts no more connections, and others of the pool will be returned."""
        return isinstance(error, Away) and error.fault is Fault.BUSY and bool(self._taken)

    async def _open(self) -> Connection:
        """Open a connection that `_opening` counts already."""
        try:
            connection = await self._connect()
        except BaseException as error:
            if self._is_enough(error):
                self._opening -= 1
            else:
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
    """The pool for one user. A user who holds the max share waits for one of their own connections, so that others stay
    free for other users.
    """

    __slots__ = ("_asker", "_client", "_pool", "_turns")

    def __init__(self, pool: Pool, turns: Turns[Client], client: Client, asker: SessionId | str | None = None) -> None:
        self._pool = pool
        self._turns = turns
        self._client = client
        self._asker = asker

    async def take(self) -> Connection:
        """Return a connection as `Pool.take` does. Raises Exhausted also if the user's other connections are not
        returned in time.
        """
        await self._turns.take(self._client, self._asker)
        try:
            return await self._pool.take(self._client)
        except BaseException:
            self._turns.give(self._client, self._asker)
            raise

    @asynccontextmanager
    async def turn(self) -> "AsyncIterator[HeldTurn]":
        """Hold one of the user's turns, for a block that takes a connection later. A user who waits for a turn holds
        nothing that others need, such as a part of a share.

        Raises Exhausted if no turn of the user is returned in time.
        """
        await self._turns.take(self._client, self._asker)
        try:
            yield HeldTurn(self._pool, self._client)
        finally:
            self._turns.give(self._client, self._asker)

    def give(self, connection: Connection, *, is_usable: bool) -> None:
        """Return a connection to the pool."""
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
        """Return a connection as `Pool.take` does."""
        return await self._pool.take(self._client)

    def give(self, connection: Connection, *, is_usable: bool) -> None:
        """Return a connection to the pool."""
        self._pool.give(connection, is_usable=is_usable)


class Lease:
    """A connection for the duration of a block."""

    __slots__ = ("_connection", "_is_lost", "_pool")

    def __init__(self, pool: Pool | UserPool | HeldTurn, is_lost: Callable[[Exception], bool]) -> None:
        """`is_lost` gets each error of the block, and each error because of which there was no connection. It returns
        whether the connection may still be busy after it.
        """
        self._pool = pool
        self._is_lost = is_lost
        self._connection: Connection

    async def __aenter__(self) -> Connection:
        try:
            self._connection = await self._pool.take()
        except Exception as error:
            self._is_lost(error)
            raise
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_usable = error is None or (isinstance(error, Exception) and not self._is_lost(error))
        self._pool.give(self._connection, is_usable=is_usable)
