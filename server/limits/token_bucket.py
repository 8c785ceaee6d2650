"""Token buckets in this worker's memory."""

import time
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

from protocol.errors import ErrorCode, Refused
from server.core.deadlines import Deadlines

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], int]
"""Returns a time in nanoseconds."""

BURST_SECONDS = 4.0
"""The size of a bucket, as the number of seconds in which it fills."""


class Pace(NamedTuple):
    """The rate and size of a token bucket, in nanoseconds. With seconds as floats, rounding refused the last token."""

    interval: int
    """Interval between two tokens."""
    ahead: int
    """Time by which a bucket's tokens may be taken in advance."""
    most: int
    """Max tokens per frame. This is the burst in `ready.limits`, which a client that waits always has."""

    @classmethod
    def of(cls, rate: float, burst: float | None = None) -> "Pace":
        """Return the pace of `rate` tokens per second and a bucket of `burst` tokens, at least one."""
        interval = round(1e9 / rate)
        ahead = round((max(1.0, rate * BURST_SECONDS if burst is None else burst) - 1) * interval)
        return cls(interval, ahead, max(1, int(rate * (BURST_SECONDS - 1) if burst is None else burst)))

    def take(self, full_at: int, now: int, count: int = 1, *, taken: int = 0, to_come: int = 0) -> int:
        """Take `count` tokens from a bucket that is full at `full_at`. Their frame has taken `taken` tokens before, and
        will take up to `to_come` more. A frame takes at most `most` tokens.

        Return the time at which the bucket is full again. With too few tokens, return the negative time until there are
        enough for the whole frame, because a retry takes all of them again.
        """
        full_at = max(full_at, now)
        full_after = full_at + (min(taken + count, self.most) - min(taken, self.most)) * self.interval
        full_at_most = now + self.ahead + self.interval
        if full_after > full_at_most:
            return full_at_most - full_at - min(taken + count + to_come, self.most) * self.interval
        return full_after


class TokenBucket:
    """A token bucket of one owner, such as a connection."""

    __slots__ = ("_clock", "_full_at", "_pace")

    def __init__(self, pace: Pace, *, clock: Clock = time.monotonic_ns) -> None:
        self._pace = pace
        self._full_at = 0
        self._clock = clock

    def take(self) -> float:
        """Take one token. Return 0, or the seconds until there is one."""
        full_at = self._pace.take(self._full_at, self._clock())
        if full_at < 0:
            return -full_at / 1e9
        self._full_at = full_at
        return 0.0


class TokenBuckets(Generic[Key]):
    """Token buckets by key. A key must not be reused for another owner, as the `id` of an object is."""

    def __init__(self, what: str, rate: float, *, burst: float | None = None, clock: Clock = time.monotonic_ns) -> None:
        """`what` names the rate limit in refusals."""
        self._what = what
        self._pace = Pace.of(rate, burst)
        # The time at which each bucket is full again.
        self._full_at: Deadlines[Key, int] = Deadlines()
        self._clock = clock

    def take(self, key: Key, count: int = 1, *, taken: int = 0, to_come: int = 0) -> float:
        """Take tokens as `Pace.take` does. Return 0, or the seconds until there are enough."""
        now = self._clock()
        full_at = self._pace.take(self._full_at.get(key, now), now, count, taken=taken, to_come=to_come)
        if full_at < 0:
            return -full_at / 1e9
        self._full_at.put(key, full_at, now)
        return 0.0

    def charge(self, key: Key, count: int) -> None:
        """Take tokens that were used elsewhere. If there are too few, up to one more bucket is owed."""
        now = self._clock()
        before = self._full_at.get(key, now)
        owed = min(before + count * self._pace.interval, now + 2 * (self._pace.ahead + self._pace.interval))
        self._full_at.put(key, max(before, owed), now)

    def require(self, key: Key, count: int = 1, *, taken: int = 0, to_come: int = 0, path: str | None = None) -> None:
        """Take tokens as `Pace.take` does. Raises Refused if there are too few. `path` names the field whose limit it
        is; without it, the limit is that of all frames of a user, connection or address.
        """
        if (wait := self.take(key, count, taken=taken, to_come=to_come)) > 0:
            raise too_many(self._what, wait, path=path)


def too_many(what: str, wait: float, *, path: str | None = None) -> Refused:
    """Return the refusal for an exceeded rate limit. `wait` is the time until a retry, in seconds."""
    return Refused(
        ErrorCode.RATE_LIMITED,
        f"The rate limit of {what} is exceeded. Retry after `retry_after_ms`.",
        path=path,
        retry_after_ms=int(wait * 1000) + 1,
    )
