"""The database of a worker: pools of connections, transactions and retries."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeAlias, TypeVar

import asyncpg

from protocol.errors import ErrorCode, Refused
from protocol.ids import SessionId, UserId
from server.core.config import Settings
from server.core.errors import Fatal
from server.core.faults import FULL_STATES, OVER, ROLLED_BACK, Fault, RowHeld, fault_of
from server.db.epoch import Epoch
from server.db.hosts import CONNECT_SECONDS, REFUSED, Hosts
from server.db.lock_timeouts import ATTEMPTS_SECONDS, FIRST_LOCK_MS, JOB_LOCK_MS, RETRY_LOCK_MS, begin, row_held
from server.db.migrate import is_current
from server.db.pool import Connection, Lease, Pool, UserPool
from server.db.readiness import is_writable, write_nothing
from server.db.reconnecting import Reconnecting
from server.fairness.lock_queue import until_free
from server.fairness.share import Share
from server.limits.token_bucket import BURST_SECONDS

OLDEST_MAJOR = 15
ENCODING = "UTF8"
"""The only encoding of a database that has all characters of messages."""
STATEMENT_SECONDS = 10.0
"""Max wait for the result of a statement, in seconds. Then the database counts as lost."""
CANCEL_SECONDS = 9.0
"""Max time of a statement, in seconds. PostgreSQL cancels it earlier than the wait ends, so that a slow statement does
not count as a lost database.
"""
SENDING_SECONDS = 2.0
"""Max time of a statement that stores messages, reactions or votes of many users, in seconds. PostgreSQL cancels it
before the commit or not at all, so a cancelled statement stored nothing (docs/decisions/0066).
"""
SENDING_CONNECTIONS = 4
"""Connections for statements of many users, per worker, in addition to `OPENCHAT_DATABASE_CONNECTIONS`. They store
messages, reactions, votes and joins. Each kind has one statement at a time, and rarely all run together.
"""
OWN_CONNECTIONS = SENDING_CONNECTIONS + 1
"""Connections per worker in addition to `OPENCHAT_DATABASE_CONNECTIONS`: those for statements of many users, and one
for `/readyz`. Without it, frames that wait for locks could make a worker unready.
"""
READY_MS = 2_000
"""Max time of a statement for `/readyz`, in milliseconds."""
WRITE_SECONDS = 5.0
"""Min interval between two attempts to write while PostgreSQL cannot store anything, in seconds."""
SEARCH_SHARE = 4
"""Max share of a worker's connections that searches hold, as 1 / `SEARCH_SHARE`, but at least one."""
SEARCHES_WAITING = 8
"""Max searches that wait for a connection, per worker."""
SEARCH_PATIENCE = 1.0
"""Max time that a search waits for a connection, in seconds."""
COUNTS_WAITING = 256
"""Max `get_badge` frames that wait for a connection, per worker. Every client sends one when it starts."""
COUNT_PATIENCE = 5.0
"""Max time that a `get_badge` waits for a connection, in seconds."""
CATCHING_UP_SHARE = 4
"""Max share of connections that clients hold while they catch up on more than a page, as 1 / `CATCHING_UP_SHARE`, but
at least one.
"""
CATCHING_UP_WAITING = 1_024
CATCHING_UP_PATIENCE = 10.0
"""Max clients that wait for their next page, and max wait of each, in seconds."""
UNREACHABLE = (*REFUSED, ValueError)
"""Raised by connecting. ValueError stands for an invalid URL."""

ATTEMPTS = (RowHeld, asyncpg.LockNotAvailableError)
"""Raised by an attempt that others may follow. The last one is counted where it is refused."""

log = logging.getLogger(__name__)

Db: TypeAlias = Connection
"""The first parameter of a query: a connection."""
Result = TypeVar("Result")

APPLICATION = "openchat"
"""Application name of a worker's connections. It is followed by a space and the worker's id, as hexadecimal digits."""
SESSION = {
    "application_name": APPLICATION,
    # Every query is meant to read one indexed row after the other and to stop early. PostgreSQL keeps plans. A plan
    # that was made for a small table would scan or hash a large one until the next ANALYZE. So plans that only pay for
    # a few rows are disabled (docs/decisions/0008).
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "timezone": "UTC",
    "statement_timeout": f"{CANCEL_SECONDS:.0f}s",
    "idle_in_transaction_session_timeout": "30s",
}

SEARCHING = "SET LOCAL enable_bitmapscan = on; SET LOCAL work_mem = '32MB'; SET LOCAL statement_timeout = '2s'"
"""Settings of a transaction that uses the search index. A search that takes longer than `SEARCH_MS` is refused."""
SEARCH_MS = 2_000
IN_ORDER = "SET LOCAL enable_bitmapscan = off"
"""Setting for statements of such a transaction that read in the order of an index and stop. A bitmap has no order."""


class PoolState:
    """The state that all users of a pool share."""

    def __init__(self, pool: Pool, sending: Pool, ready: Pool, epoch: Epoch, *, most: int) -> None:
        """`most` is the max number of connections of `pool`. `sending` is for statements of many users, and `ready`
        for `/readyz`.
        """
        self.pool = pool
        self.sending = sending
        self.ready = ready
        self.epoch = epoch
        self.searches = Share(max(1, most // SEARCH_SHARE), waiting=SEARCHES_WAITING, patience=SEARCH_PATIENCE)
        self.counts = Share(max(1, most // SEARCH_SHARE), waiting=COUNTS_WAITING, patience=COUNT_PATIENCE)
        self.catching_up = Share(
            max(1, most // CATCHING_UP_SHARE), waiting=CATCHING_UP_WAITING, patience=CATCHING_UP_PATIENCE
        )
        self.deadlocks = 0
        self.faults: Counter[str] = Counter()
        self.is_full = False
        """Whether PostgreSQL could not store something, and no attempt to write has succeeded since."""
        self.next_write = 0.0

    def count(self, error: Exception) -> bool:
        """Count an error that is a fault. Return whether its connection may still be busy, or leads to a host that is
        not the primary any more.
        """
        if (fault := fault_of(error)) is not None and not isinstance(error, ATTEMPTS):
            self.faults[fault] += 1
            self.is_full |= fault is Fault.FULL
        return fault is Fault.LOST or isinstance(error, asyncpg.ReadOnlySQLTransactionError)


class Database:
    """A pool of connections. Lost connections are replaced when the next statement needs one."""

    __slots__ = ("_lock_ms", "_patience", "_pool", "_state")

    def __init__(self, pool: Pool | UserPool, state: PoolState, *, lock_ms: int, patience: float = 0.0) -> None:
        """Transactions raise RowHeld if they wait for a lock longer than `lock_ms`. `atomically` repeats them for
        `patience` seconds.
        """
        self._pool = pool
        self._state = state
        self._lock_ms = lock_ms
        self._patience = patience

    def of(self, user_id: UserId, *, lock_ms: int = FIRST_LOCK_MS) -> "Database":
        """Return the database for one user, who holds at most a share of the connections."""
        return Database(self._state.pool.of(user_id), self._state, lock_ms=lock_ms)

    def of_sessions(self, user_id: UserId, asker: SessionId | None) -> "Database":
        """Return the database for requests about one user's sessions. They have a connection that the user's frames
        cannot hold. `asker` is the session that asks, or None for a login.
        """
        pool = self._state.pool.of_sessions(user_id, asker)
        return Database(pool, self._state, lock_ms=RETRY_LOCK_MS, patience=ATTEMPTS_SECONDS)

    def of_strangers(self, address: str) -> "Database":
        """Return the database for requests without an account. Together they hold at most a share of the connections.
        None waits longer than `JOB_LOCK_MS` for a lock, because an import locks the e-mail addresses of its users until
        it commits. A registration of such an address would wait for the import.
        """
        return Database(self._state.pool.of_strangers(address), self._state, lock_ms=JOB_LOCK_MS)

    @property
    def deadlocks(self) -> int:
        """The number of transactions that PostgreSQL ended to break a deadlock, and that were retried."""
        return self._state.deadlocks

    @property
    def faults(self) -> Counter[str]:
        """The number of faults, by kind."""
        return self._state.faults

    @classmethod
    async def open(cls, settings: Settings, *, worker: bytes = b"") -> "Database":
        """Return a pool for `settings.database_url`, whose connections all belong to one epoch. `worker` is the id of
        this worker. Raises Fatal if the database cannot be reached.
        """
        session = SESSION | {
            "application_name": f"{APPLICATION} {worker.hex()}".strip(),
            "default_text_search_config": settings.search_language,
        }

        epoch = Epoch()

        most = max(2, settings.database_connections)
        try:
            hosts = Hosts(settings.database_url, epoch.enter, command_timeout=STATEMENT_SECONDS)
        except ValueError as error:
            raise _unreachable(error) from error
        again = Reconnecting(hosts.connect)
        pool = Pool(partial(again.connect, session), most=most, patience=CONNECT_SECONDS)
        shorter = session | {"statement_timeout": f"{SENDING_SECONDS * 1_000:.0f}ms"}
        sending = Pool(partial(again.connect, shorter), most=SENDING_CONNECTIONS, patience=CONNECT_SECONDS)
        ready = Pool(
            partial(again.connect, session | {"statement_timeout": f"{READY_MS}ms"}), most=1, patience=CONNECT_SECONDS
        )
        try:
            pool.give(await hosts.connect(session), is_usable=True)
        except UNREACHABLE as error:
            raise _unreachable(error) from error
        return cls(pool, PoolState(pool, sending, ready, epoch, most=most), lock_ms=JOB_LOCK_MS)

    async def close(self) -> None:
        """Close all connections, without waiting for statements in flight."""
        self._state.pool.close()
        self._state.sending.close()
        self._state.ready.close()

    def connection(self) -> Lease:
        """Borrow a connection. Each statement commits on its own."""
        return Lease(self._pool, self._state.count)

    def sending(self) -> Lease:
        """Borrow a connection on which PostgreSQL cancels statements after `SENDING_SECONDS`."""
        return Lease(self._state.sending, self._state.count)

    @asynccontextmanager
    async def catching_up(self) -> AsyncIterator[Db]:
        """Borrow a connection for one or two statements of a client that catches up on much. Such clients share a part
        of the connections, in turns. Raises Refused if too many wait, or if no turn comes in time.
        """
        async with self._of_share(self._state.catching_up) as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Db]:
        """Borrow a connection inside a transaction, which commits when the block ends. Raises RowHeld if it waits for a
        lock too long.
        """
        async with self.connection() as connection:
            with row_held():
                await connection.execute(begin(self._lock_ms))
                try:
                    yield connection
                except BaseException:
                    await connection.execute("ROLLBACK")
                    raise
                await connection.execute("COMMIT")

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Db]:
        """Borrow a connection for one statement that contains `BRIEFLY`. Raises RowHeld as `transaction` does."""
        async with self.connection() as connection:
            with row_held():
                yield connection

    async def atomically(self, what: str, work: Callable[[Db], Awaitable[Result]]) -> Result:
        """Return the result of `work` in a transaction. It is retried once if PostgreSQL ends it to break a deadlock.
        Requests about sessions repeat it while a row is locked that it needs. So `work` must not publish anything.
        `what` names it in the log.
        """

        async def once() -> Result:
            async with self.transaction() as db:
                return await work(db)

        since = asyncio.get_running_loop().time()
        return await until_free(partial(self.again, what, once), since=since, patience=self._patience)

    async def again(self, what: str, work: Callable[[], Awaitable[Result]]) -> Result:
        """Return the result of `work`, which is retried once if PostgreSQL ends its transaction to break a deadlock."""
        return await twice(work, partial(self.rolled_back, what))

    def rolled_back(self, what: str, error: Exception) -> None:
        """Count and log a transaction that PostgreSQL ended and that is retried now."""
        self._state.deadlocks += 1
        log.warning("%s was rolled back by PostgreSQL and is retried once: %s", what, error)

    def searching(self) -> AbstractAsyncContextManager[Db]:
        """Borrow a connection of the share of searches, inside a transaction that may use the search index by bitmaps.
        Raises Refused if no connection becomes free in time, or if the search takes too long.
        """
        return self._with_words(
            self._state.searches,
            "This search takes too long. Use longer or rarer words, or name a conversation.",
            retry_after_ms=int(BURST_SECONDS * 1_000),  # the max time until the rate limit has a token again
        )

    def counting(self) -> AbstractAsyncContextManager[Db]:
        """The same with the share of badges, so that searches of other users refuse no badge."""
        return self._with_words(
            self._state.counts, "Counting takes too long. Retry after `retry_after_ms`.", retry_after_ms=SEARCH_MS
        )

    @asynccontextmanager
    async def _of_share(self, share: Share) -> AsyncIterator[Db]:
        """Borrow a connection of a share. The user's turn comes first, because a user who waits for it must not hold a
        part of the share.
        """
        async with self._pool.turn() as pool, share.hold(Lease(pool, self._state.count)) as connection:
            yield connection

    @asynccontextmanager
    async def _with_words(self, share: Share, too_long: str, *, retry_after_ms: int) -> AsyncIterator[Db]:
        async with self._of_share(share) as connection, connection.transaction():
            await connection.execute(SEARCHING)
            try:
                yield connection
            except asyncpg.QueryCanceledError:
                raise Refused(ErrorCode.UNAVAILABLE, too_long, retry_after_ms=retry_after_ms) from None

    @property
    def size(self) -> int:
        """The number of open connections."""
        return len(self._state.pool) + len(self._state.sending) + len(self._state.ready)

    @property
    def waiting(self) -> int:
        """The number of statements and transactions that wait for a connection."""
        return self._state.pool.waiting + self._state.sending.waiting + self._state.ready.waiting

    async def is_ready(self) -> bool:
        """Whether the database answers, has exactly the schema of this program, and can be written.

        As long as PostgreSQL stores everything, this only reads. After a `full` fault it tries to write. If that fails,
        it returns False, and tries again at most once per `WRITE_SECONDS`.
        """
        state = self._state
        if is_in_doubt := state.is_full:
            if (now := time.monotonic()) < state.next_write:
                return False
            state.next_write = now + WRITE_SECONDS
            state.ready.renew()  # a session may have older settings than those that fail
        async with Lease(state.ready, state.count) as db:
            if not (await is_current(db) and await is_writable(db)):
                return False
            if is_in_doubt:
                await write_nothing(db)
                state.is_full, state.next_write = False, 0.0
                log.info("PostgreSQL can store again", extra={OVER: FULL_STATES})
        return True

    async def check_storage(self) -> None:
        """Check whether PostgreSQL can store again after a `full` fault, because nobody may ask for `/readyz`."""
        if self._state.is_full:
            await self.is_ready()

    @property
    def epoch(self) -> Epoch:
        """The epoch of all connections."""
        return self._state.epoch

    async def check_epoch(self) -> None:
        """Check the epoch of an open connection. `openchat new-epoch` closes none, so opening alone would not notice
        it.
        """
        async with self.connection() as db:
            await self.epoch.check(db)


class Single:
    """One connection with the transactions of `Database`, for the command line."""

    def __init__(self, connection: Db) -> None:
        self._connection = connection

    async def atomically(self, what: str, work: Callable[[Db], Awaitable[Result]]) -> Result:
        """Return the result of `work` in a transaction, which is retried as in `Database`."""

        async def once() -> Result:
            async with self._connection.transaction():
                return await work(self._connection)

        return await twice(once, lambda error: log.warning("%s is retried once: %s", what, error))


async def twice(work: Callable[[], Awaitable[Result]], told: Callable[[Exception], None]) -> Result:
    """Return the result of `work`, which is retried once if PostgreSQL ends its transaction to break a deadlock. `told`
    is called with the error before the retry.
    """
    try:
        return await work()
    except ROLLED_BACK as error:
        told(error)
    return await work()


async def connect(url: str) -> "asyncpg.Connection[asyncpg.Record]":
    """Return one connection to the database at `url`, outside any pool.

    Raises Fatal if the database cannot be reached, is older than PostgreSQL 15, or cannot store all characters.
    """
    try:
        connection = await Hosts(url).connect()
    except UNREACHABLE as error:
        raise _unreachable(error) from error
    version, encoding = connection.get_server_version(), connection.get_settings().server_encoding
    if version.major < OLDEST_MAJOR:
        await connection.close()
        raise Fatal(f"PostgreSQL {version.major} is too old. Use {OLDEST_MAJOR} or later.")
    if encoding != ENCODING:
        await connection.close()
        raise Fatal(f"the database has the encoding {encoding}. Create it with `createdb --encoding={ENCODING}`.")
    return connection


LANGUAGES = "SELECT cfgname FROM pg_ts_config WHERE pg_ts_config_is_visible(oid) ORDER BY cfgname"
LANGUAGE = "SELECT set_config('default_text_search_config', $1, false)"


async def speak(connection: Connection, language: str) -> None:
    """Set the text search configuration of a connection. Raises Fatal if PostgreSQL does not have it."""
    try:
        await connection.execute(LANGUAGE, language)
    except asyncpg.PostgresError:
        known = ", ".join([row[0] for row in await connection.fetch(LANGUAGES)])
        raise Fatal(
            f"OPENCHAT_SEARCH_LANGUAGE must be a text search configuration of PostgreSQL, not '{language}'. "
            f"This one has {known}."
        ) from None


def _unreachable(error: Exception) -> Fatal:
    if isinstance(error, ValueError):  # an error about the URL may quote it, with its password
        return Fatal("DATABASE_URL is invalid. Check its host, port and options.")
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return Fatal(f"the database cannot be reached: {reason}. Check DATABASE_URL.")
