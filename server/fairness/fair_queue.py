"""Lines of things to do, one for each client: clients take turns, and of each one thing at a time is done."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class FairQueue(Generic[Key, Item]):
    """Hands out the first of each line in turn. A client without a line takes no memory."""

    def __init__(self, *, is_over: Callable[[Item], bool] | None = None) -> None:
        """`is_over` tells whether an item is no longer to be done. Such items are left out: they cost their client no
        turn.
        """
        # A line stays, perhaps empty, while something of its client is being done, or while the client has a place.
        self._lines: dict[Key, deque[Item]] = {}
        self._next: OrderedDict[Key, None] = OrderedDict()
        self._is_over = is_over

    def __bool__(self) -> bool:
        """Whether `take` has something to return. Leaves out what is over: ask before `first` and `take`."""
        if self._is_over is not None:
            while self._next:
                key = next(iter(self._next))
                line = self._lines[key]
                while line and self._is_over(line[0]):
                    line.popleft()
                if line:
                    break
                self.leave(key)
        return bool(self._next)

    def put(self, key: Key, item: Item) -> bool:
        """Put something at the end of a client's line; True if the client had none, so that `take` has one more to
        return.
        """
        if (line := self._lines.get(key)) is not None:
            line.append(item)
            return False
        self._lines[key] = deque((item,))
        self._next[key] = None
        return True

    def drop(self, key: Key, item: Item) -> None:
        """Take what is over out of a client's line, if it is still there. The client keeps its place until its turn:
        whoever gives up and comes back before, again and again, would else never have one.
        """
        if (line := self._lines.get(key)) is not None:
            with suppress(ValueError):
                line.remove(item)

    def leave(self, key: Key) -> None:
        """Take a client's place and line away, unless something of it is being done."""
        if key in self._next:
            del self._lines[key], self._next[key]

    def to_end(self, key: Key) -> None:
        """Move a client's place, if it has one, behind those of all others."""
        if key in self._next:
            self._next.move_to_end(key)

    def first(self) -> Item:
        """Return what `take` would return."""
        return self._lines[next(iter(self._next))][0]

    def take(self) -> tuple[Key, Item]:
        """Return the first of the client whose turn it is. Nothing else of it is taken until `done`."""
        key, _ = self._next.popitem(last=False)
        return key, self._lines[key].popleft()

    def done(self, key: Key) -> bool:
        """Note that what was taken of a client is done: it goes to the end of those who wait for a turn. True if it has
        something left, so that `take` has one more to return.
        """
        if self._lines[key]:
            self._next[key] = None
            return True
        del self._lines[key]
        return False
