"""Allowances: how much of something a user may do, as token buckets in this worker's memory."""

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from protocol.errors import ErrorCode, Refused

Key = TypeVar("Key", bound=Hashable)

BURST_SECONDS = 4.0
"""A bucket holds this many seconds' worth."""
SWEEP_AT = 10_000
"""How many buckets there may be before the full ones are forgotten."""


class Allowance(Generic[Key]):
    """A bucket for each key: `rate` tokens a second flow in, up to `burst`; `clock` counts nanoseconds.

    Counted in whole nanoseconds: with seconds as floats, rounding refused the last token of a burst.
    """

    def __init__(
        self, rate: float, *, burst: float | None = None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        burst = rate * BURST_SECONDS if burst is None else burst
        self._interval = round(1e9 / rate)
        self._ahead = round((burst - 1) * self._interval)
        # When each bucket would be full again: one number says it all.
        self._full_at: dict[Key, int] = {}
        self._sweep_at = SWEEP_AT
        self._clock = clock

    def take(self, key: Key) -> float:
        """Take one token; return 0, or, if there is none, in how many seconds there will be."""
        now = self._clock()
        full_at = max(self._full_at.get(key, now), now)
        if (wait := full_at - now - self._ahead) > 0:
            return wait / 1e9
        self._full_at[key] = full_at + self._interval
        if len(self._full_at) > self._sweep_at:
            self._full_at = {kept: at for kept, at in self._full_at.items() if at > now}
            self._sweep_at = max(SWEEP_AT, 2 * len(self._full_at))
        return 0.0

    def charge(self, key: Key, count: int) -> None:
        """Take tokens that were given out elsewhere, whether they are there or not; at most one bucket is owed."""
        now = self._clock()
        full_at = max(self._full_at.get(key, now), now) + count * self._interval
        self._full_at[key] = min(full_at, now + 2 * self._ahead)

    def require(self, key: Key) -> None:
        """Take one token. Raises Refused if there is none."""
        if (wait := self.take(key)) > 0:
            raise too_many(wait)


def too_many(wait: float) -> Refused:
    """Return what to tell whoever has nothing left and should wait, in seconds."""
    return Refused(
        ErrorCode.RATE_LIMITED, "That is too much at once; wait a moment.", retry_after_ms=int(wait * 1000) + 1
    )
