"""Group commit: items that are submitted while a batch is in flight form the next batch."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from server.core.faults import OF_SOME, Exhausted, fault_of
from server.fairness.fair_queue import FairQueue

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Slow(Exception):  # noqa: N818 - one item may be slow, and others are not
    """Raised by work that took too long and was ended without any effect."""


class WrongCount(Exception):  # noqa: N818 - a defect of `run`
    """The work returned more or fewer outcomes than it received items."""


SLOW_PARTS = 8
"""Number of parts in which a `Slow` batch is repeated. One slow item among 64 makes two further runs slow."""
MAX_SLOW = 2
"""Max consecutive single items whose work is `Slow`, per batch. Beyond it, everything is slow, and the batch fails."""


class Batcher(Generic[Item, Outcome]):
    """Runs `work` on the items that arrived while the previous run was in flight, one of each owner in turn.

    1. If nothing is in flight, an item runs immediately. 2. Runs do not overlap, so the items of one owner keep their
    order. 3. A failed run is repeated in halves, so that one bad item does not fail its neighbours. After `Slow`, which
    costs more time, it is repeated in more and smaller parts. `work` must be all or nothing. 4. The rest of the batch
    fails if too many single items are slow, or after any fault of the database but a deadlock.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[list[Outcome]]],
        *,
        most: int,
        owner: Callable[[Item], Hashable] = lambda _: None,
        weigh: Callable[[Item], int] = lambda _: 0,
        most_weight: int = 0,
        on_idle: Callable[[], object] = lambda: None,
    ) -> None:
        """`work` takes 1 to `most` items and returns as many outcomes, in the same order. Together they weigh at most
        `most_weight`, unless a single one weighs more.

        The first item of each owner is in the next run, if those of all owners fit, however many items another owner
        has. `on_idle` is called whenever nothing is in flight and nothing waits.
        """
        self._work = work
        self._most = most
        self._owner = owner
        self._weigh = weigh
        self._most_weight = most_weight
        self._on_idle = on_idle
        # An item whose submitter is cancelled before its run is dropped.
        self._waiting: FairQueue[Hashable, tuple[Item, asyncio.Future[Outcome]]] = FairQueue(
            is_over=lambda one: one[1].done()
        )
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
            return (await self._outcomes([item]))[0]
        finally:
            self._go_on()

    def _go_on(self) -> None:
        self._is_running = bool(self._waiting)
        if self._is_running:
            self._runner = asyncio.create_task(self._run())
        else:
            self._on_idle()

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._run_batch(self._next())
        finally:
            self._go_on()

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

    async def _outcomes(self, items: list[Item]) -> list[Outcome]:
        outcomes = await self._work(items)
        if len(outcomes) != len(items):
            raise WrongCount(f"{len(items)} items have {len(outcomes)} outcomes")
        return outcomes

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Outcome]]]) -> None:
        """Run the work on a batch, and on parts of it after a failure. All futures of the batch are done afterwards."""
        todo, slow = [batch], 0
        try:
            while todo:
                part = todo.pop()
                try:
                    outcomes = await self._outcomes([item for item, _ in part])
                except Exception as error:
                    if _is_of_all(error):
                        raise
                    if isinstance(error, Slow) and len(part) == 1 and (slow := slow + 1) == MAX_SLOW:
                        raise Exhausted("single items are slow") from error
                    if len(part) == 1:
                        _fail(part, error)
                        continue
                    size = -(-len(part) // (SLOW_PARTS if isinstance(error, Slow) else 2))
                    todo += [part[start : start + size] for start in range(0, len(part), size)][::-1]
                    continue
                slow = 0
                for (_, future), outcome in zip(part, outcomes, strict=True):
                    if not future.done():
                        future.set_result(outcome)
        except Exception as error:  # noqa: BLE001 - the submitters raise it
            _fail(batch, error)
        except BaseException:
            # Submitters must not take a cancellation inside the run as their own.
            _fail(batch, ConnectionError("the work was cancelled"))
            raise


def _is_of_all(error: Exception) -> bool:
    """Whether the rest of a batch would fail, too."""
    return isinstance(error, WrongCount) or (fault_of(error) is not None and not isinstance(error, OF_SOME))


def _fail(batch: list[tuple[Item, asyncio.Future[Outcome]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
