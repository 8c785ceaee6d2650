"""Allowances: how much of something a user may do, as token buckets in this worker's memory."""

import time
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

from protocol.errors import ErrorCode, Refused
from server.core.deadlines import Deadlines

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], int]
"""Counts nanoseconds."""

BURST_SECONDS = 4.0
"""A bucket holds this many seconds' worth."""


class Pace(NamedTuple):
    """The rate and size of a token bucket, in nanoseconds: with seconds as floats, rounding refused the last token."""

    interval: int
    """Until the next token flows in."""
    ahead: int
    """Intervals' worth of tokens that may be taken before they have flowed in."""
    most: int
    """Max tokens that one frame takes: the burst that clients are told, which a client that waits always has."""

    @classmethod
    def of(cls, rate: float, burst: float | None = None) -> "Pace":
        """Return the pace of `rate` tokens a second, at most `burst` of them at once (at least one)."""
        interval = round(1e9 / rate)
        ahead = round((max(1.0, rate * BURST_SECONDS if burst is None else burst) - 1) * interval)
        return cls(interval, ahead, max(1, int(rate * (BURST_SECONDS - 1) if burst is None else burst)))

    def take(self, full_at: int, now: int, count: int = 1, *, taken: int = 0, to_come: int = 0) -> int:
        """Take `count` tokens from a bucket that is full at `full_at`, for a frame that has `taken` some before and
        will take up to `to_come` after these: together at most `most`.

        Return when the bucket is full again; if there are too few tokens, minus the time until there are enough for
        the whole frame, since a retry takes all of them again.
        """
        full_at = max(full_at, now)
        full_after = full_at + (min(taken + count, self.most) - min(taken, self.most)) * self.interval
        full_at_most = now + self.ahead + self.interval
        if full_after > full_at_most:
            return full_at_most - full_at - min(taken + count + to_come, self.most) * self.interval
        return full_after


class TokenBucket:
    """A token bucket that belongs to one thing, such as a connection, and ends with it."""

    __slots__ = ("_clock", "_full_at", "_pace")

    def __init__(self, pace: Pace, *, clock: Clock = time.monotonic_ns) -> None:
        self._pace = pace
        self._full_at = 0
        self._clock = clock

    def take(self) -> float:
        """Take one token; return 0, or, if there is none, in how many seconds there will be."""
        full_at = self._pace.take(self._full_at, self._clock())
        if full_at < 0:
            return -full_at / 1e9
        self._full_at = full_at
        return 0.0


class TokenBuckets(Generic[Key]):
    """A token bucket for each key, which has to outlive what it stands for: never the `id` of an object."""

    def __init__(self, what: str, rate: float, *, burst: float | None = None, clock: Clock = time.monotonic_ns) -> None:
        """`what` names the allowance in refusals."""
        self._what = what
        self._pace = Pace.of(rate, burst)
        # When each bucket would be full again: one number says it all.
        self._full_at: Deadlines[Key, int] = Deadlines()
        self._clock = clock

    def take(self, key: Key, count: int = 1, *, taken: int = 0, to_come: int = 0) -> float:
        """Take tokens as `Pace.take` does; return 0, or, if there are too few, in how many seconds there will be."""
        now = self._clock()
        full_at = self._pace.take(self._full_at.get(key, now), now, count, taken=taken, to_come=to_come)
        if full_at < 0:
            return -full_at / 1e9
        self._full_at.put(key, full_at, now)
        return 0.0

    def charge(self, key: Key, count: int) -> None:
        """Take tokens that were given out elsewhere, whether they are there or not; at most one bucket is owed."""
        now = self._clock()
        before = self._full_at.get(key, now)
        owed = min(before + count * self._pace.interval, now + 2 * (self._pace.ahead + self._pace.interval))
        self._full_at.put(key, max(before, owed), now)

    def require(self, key: Key, count: int = 1, *, taken: int = 0, to_come: int = 0, path: str | None = None) -> None:
        """Take tokens as `Pace.take` does. Raises Refused if there are too few, with a `path` if the allowance is not
        that of everything its user, connection or address sends.
        """
        if (wait := self.take(key, count, taken=taken, to_come=to_come)) > 0:
            raise too_many(self._what, wait, path=path)


def too_many(what: str, wait: float, *, path: str | None = None) -> Refused:
    """Return what to tell whoever has nothing left of an allowance and should wait, in seconds."""
    return Refused(
        ErrorCode.RATE_LIMITED,
        f"The rate limit of {what} is exceeded. Retry after `retry_after_ms`.",
        path=path,
        retry_after_ms=int(wait * 1000) + 1,
    )
