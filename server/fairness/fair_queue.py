"""A queue per client. Clients take turns, and each has at most one item in progress."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class FairQueue(Generic[Key, Item]):
    """Returns the first item of each client in turn. A client without items takes no memory."""

    def __init__(self, *, is_over: Callable[[Item], bool] | None = None) -> None:
        """`is_over` tells whether an item is obsolete. Obsolete items are skipped and cost their client no turn."""
        # A queue stays while an item of its client is in progress, or while the client has a place, even if it is
        # empty.
        self._lines: dict[Key, deque[Item]] = {}
        self._next: OrderedDict[Key, None] = OrderedDict()
        self._is_over = is_over

    def __bool__(self) -> bool:
        """Whether `take` has an item to return. This skips obsolete items, so call it before `first` and `take`."""
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
        """Append an item to a client's queue. Return whether the client had none, so that `take` has one more to
        return.
        """
        if (line := self._lines.get(key)) is not None:
            line.append(item)
            return False
        self._lines[key] = deque((item,))
        self._next[key] = None
        return True

    def drop(self, key: Key, item: Item) -> None:
        """Remove an obsolete item from a client's queue, if it is still there. The client keeps its place until its
        turn. Otherwise a client that gives up and returns again and again would never get one.
        """
        if (line := self._lines.get(key)) is not None:
            with suppress(ValueError):
                line.remove(item)

    def leave(self, key: Key) -> None:
        """Delete a client's place and queue, unless an item of it is in progress."""
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
        """Return the first item of the client whose turn it is. No other item of this client is returned until
        `done`.
        """
        key, _ = self._next.popitem(last=False)
        return key, self._lines[key].popleft()

    def done(self, key: Key) -> bool:
        """Mark the item in progress of a client as done, and move the client behind the others. Return whether it has
        more items, so that `take` has one more to return.
        """
        if self._lines[key]:
            self._next[key] = None
            return True
        del self._lines[key]
        return False
