"""Retry times of refused frames. Those of one user follow one another at the rate of their class."""

import random
import time
from collections.abc import Hashable
from typing import Generic, TypeVar

from server.core.deadlines import Deadlines
from server.limits.token_bucket import Clock, Pace

Key = TypeVar("Key", bound=Hashable)

LATEST_NS = 30_000_000_000
"""Max delay of a frame behind earlier refused frames of its user, in nanoseconds."""


class Retries(Generic[Key]):
    """The latest retry times of users.

    A client with many frames in flight retries each at its own time. With equal times, the retries alone would exceed
    the rate of the connection.
    """

    def __init__(self, pace: Pace, *, clock: Clock = time.monotonic_ns) -> None:
        self._pace = pace
        self._clock = clock
        self._told: Deadlines[Key, int] = Deadlines()

    def after(self, key: Key, wait_ms: int, tokens: int) -> int:
        """Return after how many milliseconds, at least `wait_ms`, to retry a frame that takes `tokens` tokens."""
        now = self._clock()
        told = self._told.get(key, now)
        at = told + min(tokens, self._pace.most) * self._pace.interval
        if at > now + LATEST_NS:
            # With that many waiting frames their order does not matter, so random times spread them.
            at = now + round(LATEST_NS * random.uniform(0.5, 1.0))  # noqa: S311 - it need not be secret
        self._told.put(key, max(at, told), now)
        return max(wait_ms, -((now - at) // 1_000_000))
