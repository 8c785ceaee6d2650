"""Group commit for whatever is asked one at a time: what arrives while a batch is in flight is the next batch."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from server.errors import is_lost

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Gather(Generic[Item, Outcome]):
    """Runs `work` on the items that gathered while the previous run was in flight, in order.

    1. Nothing waits when nothing is in flight: whoever comes then runs their own item at once.
    2. One run at a time, so items keep their order.
    3. A run that fails for another reason than a lost database is repeated in halves: one bad item does not take its
       neighbours with it. `work` must be all or nothing.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[list[Outcome]]],
        *,
        most: int,
        weigh: Callable[[Item], int] = lambda _: 0,
        most_weight: int = 0,
    ) -> None:
        """`work` takes 1 to `most` items and returns as many outcomes, in the same order. Together they weigh at most
        `most_weight`, unless one alone weighs more.
        """
        self._work = work
        self._most = most
        self._weigh = weigh
        self._most_weight = most_weight
        self._waiting: deque[tuple[Item, asyncio.Future[Outcome]]] = deque()
        self._is_running = False
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Outcome:
        """Return the outcome of `item`. Raises what `work` raised for it."""
        if self._is_running:
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            self._waiting.append((item, future))
            return await future
        self._is_running = True
        try:
            return (await self._work([item]))[0]
        finally:
            if self._waiting:
                self._runner = asyncio.create_task(self._run())
            else:
                self._is_running = False

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._run_batch(self._next())
        finally:
            self._is_running = False

    def _next(self) -> list[tuple[Item, asyncio.Future[Outcome]]]:
        batch = [self._waiting.popleft()]
        weight = self._weigh(batch[0][0])
        while self._waiting and len(batch) < self._most:
            weight += self._weigh(self._waiting[0][0])
            if weight > self._most_weight:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Outcome]]]) -> None:
        try:
            outcomes = await self._work([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            if len(batch) == 1 or is_lost(error):
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                middle = len(batch) // 2
                await self._run_batch(batch[:middle])
                await self._run_batch(batch[middle:])
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)
