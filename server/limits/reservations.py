"""A token bucket that keeps a token for each refused frame until the time that its client was told."""

import time
from collections import deque

from server.limits.token_bucket import Clock, Pace

GRACE_NS = 2_000_000
"""Timers of clients may fire early by this much."""


class ReservingBucket:
    """A token bucket of one connection.

    Each refusal reserves the next token that flows in, so refused frames are told different times, and a client that
    repeats each of them when told is not refused again, however many wait.
    """

    __slots__ = ("_clock", "_full_at", "_pace", "_reserved")

    def __init__(self, pace: Pace, *, clock: Clock = time.monotonic_ns) -> None:
        self._pace = pace
        self._full_at = 0
        self._clock = clock
        # The times that refused frames were told, ascending. None while there are none: most connections have none.
        self._reserved: deque[int] | None = None

    def take(self) -> float:
        """Take one token, or one that was reserved until now; return 0, or in how many seconds to try again."""
        now = self._clock()
        if self._reserved is not None:
            if self._full_at <= now:
                self._reserved = None  # the bucket is full: these clients did not come back
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
