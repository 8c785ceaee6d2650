"""Group commit around locked rows: items whose row another transaction has locked wait in a lane, and all others
proceed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Final, Generic, NamedTuple, TypeVar

from server.core.faults import RowHeld
from server.fairness.batcher import Batcher, Slow
from server.fairness.lock_queue import Places, until_free

HEAVY_SHARE = 16
"""Min share of a run's weight, as 1 / `HEAVY_SHARE`, above which an item is heavy. Light items do not wait for heavy
ones.
"""


class Held:
    """The outcome of an item whose row is locked. The run had no effect on it."""


HELD: Final = Held()

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Result = TypeVar("Result")


class _Waiting(NamedTuple, Generic[Item]):
    """An item in a lane, and the time of the event loop at which it entered."""

    item: Item
    since: float


class Lanes(Generic[Key, Item, Outcome]):
    """A `Batcher` for light items, one for heavy items, and a lane for each key whose row is locked, while its items
    wait.

    An item enters the lane of its key if the common run reports `HELD` or is `Slow` for it alone. So do later items of
    that key. The lane repeats brief waits for the row. Items of one key without an outcome have no order. A caller that
    needs one awaits each outcome before the next item, as a connection does.
    """

    def __init__(
        self,
        *,
        key: Callable[[Item], Key],
        owner: Callable[[Item], Hashable],
        run: Callable[[list[Item]], Awaitable[list[Outcome | Held]]],
        wait: Callable[[list[Item]], Awaitable[list[Outcome | Held]]],
        places: Places,
        most: int,
        weigh: Callable[[Item], int] = lambda _: 0,
        most_weight: int = 0,
    ) -> None:
        """`run` processes items without waiting for a row; `wait` waits briefly for that of the key. Both take items of
        one `Batcher`, where owners take turns. Items that weigh more than one in `HEAVY_SHARE` of `most_weight` have a
        `Batcher` of their own. A lane holds one of `places` in `wait`, and not between two attempts. Other queues may
        share them.
        """
        self._key = key
        self._owner = owner
        self._wait = wait
        self._most = most
        self._weigh = weigh
        self._most_weight = most_weight
        self._light, self._heavy = (self.batcher(run) for _ in range(2))
        self._places = places
        self._lanes: dict[Key, Batcher[_Waiting[Item], Outcome]] = {}

    def batcher(self, run: Callable[[list[Item]], Awaitable[list[Result]]]) -> Batcher[Item, Result]:
        """Return a `Batcher` with the bounds and owners of these lanes."""
        return Batcher(run, most=self._most, owner=self._owner, weigh=self._weigh, most_weight=self._most_weight)

    def is_heavy(self, item: Item) -> bool:
        """Whether light items do not wait for this one."""
        return self._weigh(item) * HEAVY_SHARE > self._most_weight

    def is_held(self, item: Item) -> bool:
        """Whether earlier items of the same key wait for their row."""
        return self._key(item) in self._lanes

    async def submit(self, item: Item) -> Outcome:
        """Return the outcome of `item`. Raises what `run` or `wait` raised for it."""
        key = self._key(item)
        if key not in self._lanes:
            with suppress(Slow):
                outcome = await (self._heavy if self.is_heavy(item) else self._light).submit(item)
                if not isinstance(outcome, Held):
                    return outcome
        if key not in self._lanes:
            self._lanes[key] = self._lane(key)
        return await self._lanes[key].submit(_Waiting(item, asyncio.get_running_loop().time()))

    def _lane(self, key: Key) -> Batcher["_Waiting[Item]", Outcome]:
        return Batcher(
            self._until_free,
            most=self._most,
            owner=lambda waiting: self._owner(waiting.item),
            weigh=lambda waiting: self._weigh(waiting.item),
            most_weight=self._most_weight,
            # Only when idle. Items whose submitters were cancelled still wait for the row.
            on_idle=lambda: self._lanes.pop(key),
        )

    async def _until_free(self, batch: list["_Waiting[Item]"]) -> list[Outcome]:
        """Repeat brief waits for the row. All items fail when the oldest one has waited for too long."""
        since = min(one.since for one in batch)
        attempt = partial(self._attempt, [one.item for one in batch], since)
        return await until_free(attempt, since=since, patience=self._places.patience)

    async def _attempt(self, items: list[Item], since: float) -> list[Outcome]:
        async with self._places.hold(since=since):
            outcomes = await self._wait(items)
        done = [outcome for outcome in outcomes if not isinstance(outcome, Held)]
        if len(done) < len(outcomes):
            raise RowHeld(f"{self._key(items[0])} is locked")
        return done
