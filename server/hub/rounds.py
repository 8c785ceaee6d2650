"""Rounds: compare what this worker has delivered with PostgreSQL, some items at a time."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

from server.core.failures import Failures

AT_ONCE = 500
"""Max items per batch."""
PAUSE_FACTOR, PAUSE_MOST_SECONDS = 2.0, 0.1
"""Pause after each batch of a fast round, as a multiple of the batch's duration, and its max in seconds. So a round
takes a bounded share of the loop and of PostgreSQL, however many items there are.
"""
FAST_SECONDS = 0.5
"""Min interval between the starts of two fast rounds, in seconds."""
RETRY_SECONDS = 1.0
"""Pause after a failed batch, in seconds."""

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Rounds(Generic[Item]):
    """Compares all items, again and again. A slow round takes `seconds`, with pauses of equal length between batches. A
    fast round follows `soon`, and then there are only fast rounds while `is_urgent`.
    """

    def __init__(
        self,
        items: Callable[[], Sequence[Item]],
        compare: Callable[[Sequence[Item]], Awaitable[None]],
        *,
        seconds: Callable[[], float],
        is_urgent: Callable[[], bool],
    ) -> None:
        """`items` returns all items at the start of a round. `compare` is called with some of them."""
        self._items = items
        self._compare = compare
        self._seconds = seconds
        self._is_urgent = is_urgent
        self._is_due = False
        self._first: dict[Item, None] = {}
        self._wake = asyncio.Event()

    def soon(self) -> None:
        """Start a fast round, after the current one if that is fast, because events may have been missed."""
        self._is_due = True
        self._wake.set()

    def first(self, items: Iterable[Item]) -> None:
        """Compare some items before all others, because events of theirs may have been missed."""
        self._first.update(dict.fromkeys(items))
        self._wake.set()

    async def run(self) -> None:
        """Run rounds until cancelled. After a failure, try again by a fast round."""
        failures = Failures(log, self._compare.__qualname__)
        await self._wait(FAST_SECONDS)  # for the bus, which calls `soon` when it is up
        while True:
            try:
                await (self._run_fast() if self._is_fast() else self._run_slow())
                failures.end()
            except Exception as error:  # noqa: BLE001 - the database is away, so compare again later
                failures.add(error)
                await asyncio.sleep(RETRY_SECONDS)
                self.soon()

    def _is_fast(self) -> bool:
        return self._is_due or self._is_urgent()

    async def _run_fast(self) -> None:
        self._is_due = False
        began = time.monotonic()
        for batch in self._batches():
            batch_began = time.monotonic()
            await self._compare_first()
            await self._compare(batch)
            await pause_after(batch_began)
        await asyncio.sleep(began + FAST_SECONDS - time.monotonic())

    async def _run_slow(self) -> None:
        """Run a round until it has to be fast."""
        batches = self._batches() or [[]]
        began = time.monotonic()
        for number, batch in enumerate(batches, start=1):
            while (pause := began + self._seconds() * number / len(batches) - time.monotonic()) > 0:
                await self._wait(pause)
                if self._is_fast():
                    return
                await self._compare_first()
            await self._compare(batch)

    async def _compare_first(self) -> None:
        """Compare the items of `first`. After a failure, the next fast round compares them with all others."""
        first, self._first = list(self._first), {}
        for start in range(0, len(first), AT_ONCE):
            await self._compare(first[start : start + AT_ONCE])

    async def _wait(self, seconds: float) -> None:
        """Return when something is to be done before the next batch, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    def _batches(self) -> list[Sequence[Item]]:
        items = self._items()
        return [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]


async def pause_after(began: float) -> None:
    """Pause after a batch that began at a time of `time.monotonic`."""
    await asyncio.sleep(min(PAUSE_FACTOR * (time.monotonic() - began), PAUSE_MOST_SECONDS))


async def follow_up(started: Iterable[asyncio.Task[None] | None], *, at_once: int) -> None:
    """Wait for the tasks that a comparison starts, which `started` yields. At most `at_once` of them run concurrently.
    None stands for one that has ended already.
    """
    running: set[asyncio.Task[None]] = set()
    for task in started:
        if task is not None:
            running.add(task)
        if len(running) == at_once:
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    if running:
        await asyncio.wait(running)
