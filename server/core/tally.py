"""How many of something each key has, and who has most: found without looking at all of them."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Tally(Generic[Key]):
    """Counts, of which those that are 0 are forgotten."""

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}
        self._keys: dict[int, dict[Key, None]] = {}
        self._most = 0

    def __getitem__(self, key: Key) -> int:
        return self._counts.get(key, 0)

    def add(self, key: Key, count: int) -> None:
        """Add `count`, which may be negative, to what a key has."""
        before = self._counts.pop(key, 0)
        if before:
            del self._keys[before][key]
            if not self._keys[before]:
                del self._keys[before]
        if after := before + count:
            self._counts[key] = after
            self._keys.setdefault(after, {})[key] = None
            self._most = max(self._most, after)

    def most(self) -> Key:
        """Return the key that has most; of several, the one that has had as many for longest. There must be one."""
        while self._most not in self._keys:
            self._most -= 1
        return next(iter(self._keys[self._most]))
