"""Group commit with a shortcut: a statement that costs little and handles the common case only."""

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from server.fairness.batcher import Slow
from server.fairness.lanes import Lanes

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Shortcut(Generic[Key, Item, Outcome]):
    """A `Batcher` for common items, in front of the `Lanes` for all others.

    The lanes also take what the shortcut leaves: items whose row is locked or was changed meanwhile, and those that
    have to be refused. So the shortcut needs no reasons.
    """

    def __init__(
        self,
        lanes: Lanes[Key, Item, Outcome],
        *,
        takes: Callable[[Item], bool],
        run: Callable[[list[Item]], Awaitable[list[Outcome | None]]],
    ) -> None:
        """`takes` tells whether an item is common, unless it is heavy in the lanes. `run` waits for no row, and has no
        effect on items without an outcome.
        """
        self.lanes = lanes
        self._takes = takes
        self._common = lanes.batcher(run)

    async def submit(self, item: Item) -> Outcome:
        """Return the outcome of `item`. Raises what `run` or the lanes raised for it, except Slow."""
        if self._takes(item) and not (self.lanes.is_heavy(item) or self.lanes.is_held(item)):
            try:
                outcome = await self._common.submit(item)
            except Slow:
                outcome = None
            if outcome is not None:
                return outcome
        return await self.lanes.submit(item)
