"""What happens again and again is logged once a minute: outages, drops and floods come thousands a second."""

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from server.core.deadlines import Deadlines

Key = TypeVar("Key", bound=Hashable)

AGAIN_SECONDS = 60.0
"""Min interval between two entries about the same, in seconds."""


class Throttle(Generic[Key]):
    """Picks what is logged: of each key the first, and the first after `AGAIN_SECONDS`."""

    __slots__ = ("_again_at", "_clock")

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._again_at: Deadlines[Key, float] = Deadlines()
        self._clock = clock

    def passes(self, key: Key) -> bool:
        """Whether to log what happens to `key` now."""
        now = self._clock()
        if self._again_at.get(key, now) > now:
            return False
        self._again_at.put(key, now + AGAIN_SECONDS, now)
        return True

    def clear(self) -> None:
        """Log whatever happens next: what went on is over."""
        self._again_at.clear()
