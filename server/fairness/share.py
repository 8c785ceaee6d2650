"""A share of a scarce resource, with a max number of holders, a max number of waiters and a max wait."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import TypeVar

from protocol.errors import ErrorCode, Refused

HELD_SECONDS: ContextVar[float] = ContextVar("held", default=0.0)
"""Seconds for which the current task has held the resource. The time that it waited for it does not count."""


Scarce = TypeVar("Scarce")


class Share:
    """Admits `most` holders; up to `waiting` others wait for up to `patience` seconds."""

    def __init__(
        self, most: int, *, waiting: int, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._turns = asyncio.Semaphore(most)
        self._waiting = 0
        self._most_waiting = waiting
        self._patience = patience
        self._clock = clock

    @asynccontextmanager
    async def hold(self, scarce: AbstractAsyncContextManager[Scarce]) -> AsyncIterator[Scarce]:
        """Hold a part of the share, and then `scarce`. Raises Refused if too many wait, or if no part becomes free in
        time. Adds the time for which `scarce` is held to `HELD_SECONDS`, without the time until it is free.
        """
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
            async with scarce as one:
                began = self._clock()
                try:
                    yield one
                finally:
                    HELD_SECONDS.set(HELD_SECONDS.get() + self._clock() - began)
        finally:
            self._turns.release()

    def _busy(self) -> Refused:
        return Refused(
            ErrorCode.UNAVAILABLE,
            "The server is busy. Retry the same frame after `retry_after_ms`.",
            retry_after_ms=int(self._patience * 1_000),
        )
