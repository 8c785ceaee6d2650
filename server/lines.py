"""Lines of things to do, one for each client: clients take turns, and of each one thing at a time is done."""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class Lines(Generic[Key, Item]):
    """Hands out the first of each line in turn. A client without a line takes no memory."""

    def __init__(self) -> None:
        # A line stays while its first is being done.
        self._lines: dict[Key, deque[Item]] = {}
        self._next: deque[Key] = deque()

    def __bool__(self) -> bool:
        """Whether `take` has something to return."""
        return bool(self._next)

    def put(self, key: Key, item: Item) -> bool:
        """Put something at the end of a client's line; True if `take` has one more to return."""
        if (line := self._lines.get(key)) is not None:
            line.append(item)
            return False
        self._lines[key] = deque((item,))
        self._next.append(key)
        return True

    def first(self) -> Item:
        """Return what `take` would return."""
        return self._lines[self._next[0]][0]

    def take(self) -> tuple[Key, Item]:
        """Return the first of the client whose turn it is. Nothing else of it is taken until `done`."""
        key = self._next.popleft()
        return key, self._lines[key][0]

    def done(self, key: Key) -> bool:
        """Note that what was taken of a client is done: it goes to the end of those who wait for a turn. True if it has
        something left, so that `take` has one more to return.
        """
        line = self._lines[key]
        line.popleft()
        if line:
            self._next.append(key)
        else:
            del self._lines[key]
        return bool(line)
