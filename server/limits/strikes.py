"""Strikes: refused frames of a connection. A connection with too many strikes is closed for abuse."""

import time

from protocol.errors import ErrorCode
from protocol.server import Error
from server.limits.reservations import GRACE_NS
from server.limits.token_bucket import Clock, Pace, TokenBucket

PACE = Pace.of(2.0, 200.0)
"""Max strikes, per second and as a burst."""
ALWAYS = frozenset({ErrorCode.BAD_FRAME, ErrorCode.INVALID, ErrorCode.INTERNAL})
"""Errors that are always strikes. A correct client causes none of them."""


class Strikes:
    """The strikes of one connection.

    A frame beyond the rates of its user is no strike. A refusal is cheap, and a client with many frames in flight
    cannot know which of them will be refused.

    A frame beyond the rate of its connection is a strike if it arrives before the `retry_after_ms` of the previous such
    refusal. A frame that is retried at its time is never beyond that rate, because its token was reserved.
    """

    __slots__ = ("_bucket", "_clock", "_until")

    def __init__(self, *, clock: Clock = time.monotonic_ns) -> None:
        self._bucket = TokenBucket(PACE, clock=clock)
        self._clock = clock
        # The time before which a frame beyond the connection's rate is a strike.
        self._until = 0

    def is_abuse(self, error: Error, *, is_flood: bool = False) -> bool:
        """Count a refusal. Return whether the connection has too many strikes.

        `is_flood` is true if the frame was beyond the rate of the connection.
        """
        is_strike = error.code in ALWAYS
        if is_flood and error.retry_after_ms is not None:
            now = self._clock()
            is_strike = now < self._until
            self._until = now + error.retry_after_ms * 1_000_000 - GRACE_NS
        return is_strike and self._bucket.take() > 0
