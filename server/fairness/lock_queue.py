"""A queue for work that needs locked rows. The work repeats brief attempts, and holds nothing between them that others
need.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Generic, TypeVar

from server.core.faults import Exhausted, HeldTooLong, RowHeld
from server.fairness.turns import Turns

PAUSE_SHARE = 4
"""Length of a pause, as a part of the time since the first attempt: 1 / `PAUSE_SHARE`. So the wait for a lock ends at
most that much later than the lock does.
"""
MAX_PAUSE = 0.5
"""Max length of a pause, in seconds."""

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


async def until_free(
    attempt: Callable[[], Awaitable[Result]],
    *,
    patience: float,
    pausing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Return the result of `attempt`, which is repeated after each RowHeld. Raises HeldTooLong at the first one
    after `patience` seconds. Pauses are in the context of `pausing`.
    """
    began = time.monotonic()
    while True:
        try:
            return await attempt()
        except RowHeld as error:
            waited = time.monotonic() - began
            if waited > patience:
                raise HeldTooLong(str(error)) from None
        with pausing():
            await asyncio.sleep(min(waited / PAUSE_SHARE, MAX_PAUSE))


class Places:
    """Places for attempts that wait for locked rows, each with a connection."""

    def __init__(self, most: int, *, patience: float) -> None:
        """`patience` is the max time from the first of several attempts to the last one, in seconds, and the max wait
        for a place.
        """
        self.patience = patience
        self._free = asyncio.Semaphore(most)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Hold a place for the block. Raises Exhausted if none becomes free in time."""
        try:
            async with asyncio.timeout(self.patience):
                await self._free.acquire()
        except TimeoutError:
            raise Exhausted("no place became free in time") from None
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
        lock, in milliseconds, while it has one.
        """
        self.lock_ms = lock_ms
        self._places = places
        self._of_key: Turns[Key] = Turns(1, patience=places.patience)
        self._of_client: Turns[Hashable] = Turns(1, patience=places.patience)
        self._pausing: Counter[Key] = Counter()

    def has(self, key: Key) -> bool:
        """Whether an attempt of the key has failed and is not repeated successfully yet."""
        return self._of_key.is_taken(key) or key in self._pausing

    async def repeat(self, key: Key, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Return the result of `attempt`, which takes a `place` for its transaction, and is repeated after each
        RowHeld. Raises HeldTooLong as `until_free` does.
        """
        return await until_free(attempt, patience=self._places.patience, pausing=lambda: self._pause(key))

    @asynccontextmanager
    async def place(self, key: Key, client: Hashable) -> AsyncIterator[None]:
        """Hold a place for the block. Clients of a key take turns, and so do the keys of a client. Raises Exhausted if
        none becomes free in time.
        """
        # The client is first, so that nobody waits for a client who waits for another of its keys.
        async with self._of_client.turn(client), self._of_key.turn(key, client), self._places.hold():
            yield

    @contextmanager
    def _pause(self, key: Key) -> Iterator[None]:
        self._pausing[key] += 1
        try:
            yield
        finally:
            self._pausing[key] -= 1
            if not self._pausing[key]:
                del self._pausing[key]
