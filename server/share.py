"""A share of something scarce: at most so many hold it, at most so many wait for it, and nobody waits for long."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from protocol.errors import ErrorCode, Refused

HELD: ContextVar[float] = ContextVar("held", default=0.0)
"""Seconds for which the current task has used what is shared. The time that it waited for that does not count."""


class Share:
    """Admits `most` at a time; up to `waiting` others wait for up to `patience` seconds."""

    def __init__(
        self, most: int, *, waiting: int, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._turns = asyncio.Semaphore(most)
        self._waiting = 0
        self._most_waiting = waiting
        self._patience = patience
        self._clock = clock

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold a part of the share. Raises Refused if too many wait, or if no part becomes free in time."""
        if self._turns.locked() and self._waiting >= self._most_waiting:
            raise self._busy()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._turns.acquire()
        except TimeoutError:
            raise self._busy() from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Count the time in `HELD`: who holds a part of the share may have to wait for something else before."""
        began = self._clock()
        try:
            yield
        finally:
            HELD.set(HELD.get() + self._clock() - began)

    def _busy(self) -> Refused:
        return Refused(
            ErrorCode.UNAVAILABLE,
            "The server is busy. Retry the same frame after `retry_after_ms`.",
            retry_after_ms=int(self._patience * 1_000),
        )
