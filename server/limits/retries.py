"""When to repeat refused frames: those of one user one after another, no faster than the rate of their class."""

import random
import time
from collections.abc import Hashable
from typing import Generic, TypeVar

from server.core.deadlines import Deadlines
from server.limits.token_bucket import Clock, Pace

Key = TypeVar("Key", bound=Hashable)

LATEST_NS = 30_000_000_000
"""Max time that a frame waits for others of its user that were refused before."""


class Retries(Generic[Key]):
    """The times that clients were told.

    A client with many frames in flight repeats each of them at its own time. If all were told the same one, their
    repetitions alone would be beyond the rate of the connection.
    """

    def __init__(self, pace: Pace, *, clock: Clock = time.monotonic_ns) -> None:
        self._pace = pace
        self._clock = clock
        # The latest time told to each user.
        self._told: Deadlines[Key, int] = Deadlines()

    def after(self, key: Key, wait_ms: int, tokens: int) -> int:
        """Return after how many milliseconds to repeat a frame of so many tokens: at least `wait_ms`."""
        now = self._clock()
        told = self._told.get(key, now)
        at = told + min(tokens, self._pace.most) * self._pace.interval
        if at > now + LATEST_NS:
            # So many wait that their order means nothing.
            at = now + round(LATEST_NS * random.uniform(0.5, 1.0))  # noqa: S311 - it need not be secret
        self._told.put(key, max(at, told), now)
        return max(wait_ms, -((now - at) // 1_000_000))
