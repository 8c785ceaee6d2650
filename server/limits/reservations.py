"""A token bucket that reserves a token for each refused frame, for the time at which the client may retry it."""

import time
from collections import deque

from server.limits.token_bucket import Clock, Pace

GRACE_NS = 2_000_000
"""Max time by which clients' timers may fire early, in nanoseconds."""


class ReservingBucket:
    """The token bucket of one connection.

    Each refusal reserves the next token that flows in, so refused frames get different retry times. A client that
    retries each frame at its time is not refused again, however many frames wait.
    """

    __slots__ = ("_clock", "_full_at", "_pace", "_reserved")

    def __init__(self, pace: Pace, *, clock: Clock = time.monotonic_ns) -> None:
        self._pace = pace
        self._full_at = 0
        self._clock = clock
        # The retry times of refused frames, ascending. None without any, which saves memory in most connections.
        self._reserved: deque[int] | None = None

    def take(self) -> float:
        """Take a free token, or one that was reserved for now. Return 0, or after how many seconds to retry."""
        now = self._clock()
        if self._reserved is not None:
            if self._full_at <= now:
                self._reserved = None  # the bucket is full, so the clients did not retry
            elif self._reserved and self._reserved[0] - GRACE_NS <= now:
                self._reserved.popleft()
                return 0.0
        full_at = self._pace.take(self._full_at, now)
        if full_at >= 0:
            self._full_at = full_at
            return 0.0
        self._full_at += self._pace.interval
        self._reserved = deque() if self._reserved is None else self._reserved
        self._reserved.append(now - full_at)
        return -full_at / 1e9
