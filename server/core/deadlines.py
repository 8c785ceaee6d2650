"""A time per key, such as when a bucket is full again. Times in the past have no meaning."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Time = TypeVar("Time", int, float)
"""A time of the caller's clock, in its unit."""

SWEEP_AT = 1_000
"""Min number of times at which the past ones are deleted. Later sweeps start at twice the number that remained."""


class Deadlines(Generic[Key, Time]):
    """Times by key. Past times are deleted whenever there are twice as many times as after the last sweep."""

    __slots__ = ("_at", "_sweep_at")

    def __init__(self) -> None:
        self._at: dict[Key, Time] = {}
        self._sweep_at = SWEEP_AT

    def __len__(self) -> int:
        return len(self._at)

    def get(self, key: Key, now: Time) -> Time:
        """Return the time of a key, or `now` if it has none or a past one."""
        return max(self._at.get(key, now), now)

    def put(self, key: Key, at: Time, now: Time) -> None:
        """Set the time of a key."""
        self._at[key] = at
        if len(self._at) > self._sweep_at:
            self._at = {kept: until for kept, until in self._at.items() if until > now}
            self._sweep_at = max(SWEEP_AT, 2 * len(self._at))

    def clear(self) -> None:
        """Delete all times."""
        self._at.clear()
