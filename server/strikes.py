"""Strikes: the refused frames of one connection that add up to abuse."""

import time
from collections.abc import Hashable

from protocol.errors import ErrorCode
from protocol.server import Error
from server.limits import Bucket, Clock, Pace

PACE = Pace.of(2.0, 200.0)
"""Max strikes per second, and at once."""
ALWAYS = frozenset({ErrorCode.BAD_FRAME, ErrorCode.INVALID, ErrorCode.INTERNAL})
"""A well-written client causes none of these."""
GRACE_NS = 2_000_000
"""Timers of clients may fire early by this much."""


class Strikes:
    """The strikes of one connection. Waiting as told by `retry_after_ms` is never one; coming back sooner is."""

    __slots__ = ("_bucket", "_clock", "_until")

    def __init__(self, *, clock: Clock = time.monotonic_ns) -> None:
        self._bucket = Bucket(PACE, clock=clock)
        self._clock = clock
        # Of each limit, until when the client was told to wait.
        self._until: dict[Hashable, int] = {}

    def is_abuse(self, error: Error, limit: Hashable) -> bool:
        """Count a refusal; return whether there were too many. `limit` names what a `rate_limited` frame ran into."""
        is_strike = error.code in ALWAYS
        if error.code is ErrorCode.RATE_LIMITED and error.retry_after_ms is not None:
            now = self._clock()
            is_strike = now < self._until.get(limit, 0)
            self._until[limit] = now + error.retry_after_ms * 1_000_000 - GRACE_NS
        return is_strike and self._bucket.take() > 0
