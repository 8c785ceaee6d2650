"""Group commit for whatever is asked one at a time: what arrives while a batch is in flight is the next batch."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from server.errors import is_lost
from server.lines import Lines

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Slow(Exception):  # noqa: N818 - one of them may be slow, the others are not
    """Raised by the work on several items that takes too long, and was given up."""


class Gather(Generic[Item, Outcome]):
    """Runs `work` on the items that gathered while the previous run was in flight, one of each owner in turn.

    1. Nothing waits when nothing is in flight: whoever comes then runs their own item at once.
    2. One run at a time, so the items of one owner keep their order.
    3. A run that fails for another reason than a lost database is repeated in halves, and one by one after `Slow`: one
       bad item does not take its neighbours with it. `work` must be all or nothing.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[list[Outcome]]],
        *,
        most: int,
        owner: Callable[[Item], Hashable] = lambda _: None,
        weigh: Callable[[Item], int] = lambda _: 0,
        most_weight: int = 0,
    ) -> None:
        """`work` takes 1 to `most` items and returns as many outcomes, in the same order. Together they weigh at most
        `most_weight`, unless one alone weighs more. However many items an owner has, the first one of another owner is
        in the next run, if each owner's next one fits into that.
        """
        self._work = work
        self._most = most
        self._owner = owner
        self._weigh = weigh
        self._most_weight = most_weight
        self._waiting: Lines[Hashable, tuple[Item, asyncio.Future[Outcome]]] = Lines()
        self._is_running = False
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Outcome:
        """Return the outcome of `item`. Raises what `work` raised for it."""
        if self._is_running:
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            self._waiting.put(self._owner(item), (item, future))
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
        batch = [self._take()]
        weight = self._weigh(batch[0][0])
        while self._waiting and len(batch) < self._most:
            weight += self._weigh(self._waiting.first()[0])
            if weight > self._most_weight:
                break
            batch.append(self._take())
        return batch

    def _take(self) -> tuple[Item, asyncio.Future[Outcome]]:
        owner, one = self._waiting.take()
        self._waiting.done(owner)
        return one

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Outcome]]]) -> None:
        try:
            outcomes = await self._work([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            if len(batch) == 1 or is_lost(error):
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                size = 1 if isinstance(error, Slow) else (len(batch) + 1) // 2
                for start in range(0, len(batch), size):
                    await self._run_batch(batch[start : start + size])
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)
