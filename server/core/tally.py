"""Counts per key, and the key with the highest count without a scan."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Tally(Generic[Key]):
    """Counts by key. Keys whose count is 0 take no memory."""

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}
        self._keys: dict[int, dict[Key, None]] = {}
        self._most = 0

    def __getitem__(self, key: Key) -> int:
        return self._counts.get(key, 0)

    def add(self, key: Key, count: int) -> None:
        """Add `count`, which may be negative, to the count of a key."""
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
        """Return the key with the highest count. Of several, it is the one that reached it first. There must be
        a key.
        """
        while self._most not in self._keys:
            self._most -= 1
        return next(iter(self._keys[self._most]))
