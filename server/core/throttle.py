"""Limits log entries about repeated events to one per minute. Outages, drops and floods happen thousands of times a
second.
"""

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from server.core.deadlines import Deadlines

Key = TypeVar("Key", bound=Hashable)

AGAIN_SECONDS = 60.0
"""Min interval between two log entries, per key, in seconds."""


class Throttle(Generic[Key]):
    """Selects events to log: the first one of each key, and the first after `AGAIN_SECONDS`."""

    __slots__ = ("_again_at", "_clock")

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._again_at: Deadlines[Key, float] = Deadlines()
        self._clock = clock

    def passes(self, key: Key) -> bool:
        """Whether to log an event of `key` now."""
        now = self._clock()
        if self._again_at.get(key, now) > now:
            return False
        self._again_at.put(key, now + AGAIN_SECONDS, now)
        return True

    def clear(self) -> None:
        """Log the next event of each key, because the previous ones are over."""
        self._again_at.clear()
