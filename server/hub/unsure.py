"""Writes with an unknown outcome: the connection to PostgreSQL was lost during them, or their handler failed."""

from typing import Generic, TypeVar

AGES = (1, 5, 15)
"""Ages at which the rows of such a write are read, in seconds. PostgreSQL may commit some seconds after the connection
was lost.
"""
MAX_UNSURE = 10_000
"""Max keys. Beyond it, the oldest are forgotten, and the periodic comparison finds their changes."""

Key = TypeVar("Key")


class Unsure(Generic[Key]):
    """The conversations or users of such writes."""

    def __init__(self) -> None:
        self._ages: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """Add the conversation or the user of a write."""
        self._ages.pop(key, None)
        if len(self._ages) >= MAX_UNSURE:
            del self._ages[next(iter(self._ages))]
        self._ages[key] = 0

    def due(self) -> list[Key]:
        """Return the keys to recheck now. It is called once per second."""
        for key in self._ages:
            self._ages[key] += 1
        due = [key for key, age in self._ages.items() if age in AGES]
        for key in due:
            if self._ages[key] == AGES[-1]:
                del self._ages[key]
        return due
