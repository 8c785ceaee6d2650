"""A queue for work that needs locked rows. The work repeats brief attempts, and holds nothing between them that others
need.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from server.core.faults import HeldTooLong, RowHeld
from server.fairness.turns import Turns

PAUSE_DIVISOR = 4
"""A pause is the time since the first attempt, divided by this. So a row that is held for longer is tried less often,
and a free one is noticed late only in relation to the wait.
"""
MAX_PAUSE = 0.5
"""Max length of a pause, in seconds."""

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Place: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
"""Holds the place of an attempt for a block."""


async def until_free(
    attempt: Callable[[], Awaitable[Result]],
    *,
    since: float,
    patience: float,
    pausing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Return the result of `attempt`, which is repeated after each RowHeld. Raises HeldTooLong instead when `patience`
    seconds have passed since a time of the event loop. Pauses are in the context of `pausing`.
    """
    while True:
        try:
            return await attempt()
        except RowHeld as error:
            waited = asyncio.get_running_loop().time() - since
            if waited >= patience:
                raise HeldTooLong(str(error)) from None
        with pausing():
            await asyncio.sleep(min(waited / PAUSE_DIVISOR, MAX_PAUSE, patience - waited))


class Places:
    """Places for attempts that wait for locked rows, each with a connection."""

    def __init__(self, most: int, *, patience: float) -> None:
        """`patience` is the max time from the first of several attempts to the last one, in seconds."""
        self.patience = patience
        self._free = asyncio.Semaphore(most)

    @asynccontextmanager
    async def hold(self, *, since: float) -> AsyncIterator[None]:
        """Hold a place for the block. Raises HeldTooLong if none becomes free within `patience` since a time of the
        event loop.
        """
        try:
            async with asyncio.timeout_at(since + self.patience):
                await self._free.acquire()
        except TimeoutError:
            raise HeldTooLong("no place became free in time") from None
        try:
            yield
        finally:
            self._free.release()


class LockQueue(Generic[Key]):
    """Repeats attempts. At a time, those of a key have at most one place, and so do those of a client. A key without
    attempts takes no memory.
    """

    def __init__(self, places: Places, *, lock_ms: int) -> None:
        """`places` are those of all keys, which others may share. `lock_ms` is the max time that an attempt waits for a
        lock, in milliseconds.
        """
        self.lock_ms = lock_ms
        self._places = places
        self._of_key: Turns[Key] = Turns(1, patience=places.patience)
        self._of_client: Turns[Hashable] = Turns(1, patience=places.patience)
        self._waiting: Counter[Key] = Counter()

    def has(self, key: Key) -> bool:
        """Whether a frame of the key waits for a place, has one, or pauses."""
        return key in self._waiting

    async def repeat(self, key: Key, client: Hashable, attempt: Callable[[Place], Awaitable[Result]]) -> Result:
        """Return the result of `attempt`, which is repeated as by `until_free`. It holds a place for its transaction.
        Raises HeldTooLong also if no place becomes free in time.
        """
        since = asyncio.get_running_loop().time()
        place = partial(self._place, key, client, since)
        counted = partial(self._counted, key)
        return await until_free(partial(attempt, place), since=since, patience=self._places.patience, pausing=counted)

    @asynccontextmanager
    async def _place(self, key: Key, client: Hashable, since: float) -> AsyncIterator[None]:
        """Hold a place for the block. Clients of a key take turns, and so do the keys of a client."""
        async with AsyncExitStack() as held:
            held.enter_context(self._counted(key))
            try:
                async with asyncio.timeout_at(since + self._places.patience):
                    # The client is first, so that nobody waits for a client who waits for another of its keys.
                    await held.enter_async_context(self._of_client.turn(client))
                    await held.enter_async_context(self._of_key.turn(key, client))
            except TimeoutError:
                raise HeldTooLong("no turn came in time") from None
            await held.enter_async_context(self._places.hold(since=since))
            yield

    @contextmanager
    def _counted(self, key: Key) -> Iterator[None]:
        self._waiting[key] += 1
        try:
            yield
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
