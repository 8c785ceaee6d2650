"""Who may come in now: a bounded number at once, and the others are told when, by how fast it really goes."""

import random
import time
from collections.abc import Callable

from protocol.errors import ErrorCode, Refused

AT_ONCE = 256
"""How many connections may be on their way in: from the handshake to their first page, or the end of their resume."""
WINDOW_SECONDS = 1.0
FIRST_GUESS = 200.0
"""How many a second come in, before that is known."""
SOONEST_SECONDS, LATEST_SECONDS = 0.25, 30.0


class Admission:
    """Counts who is on the way in, who was told to come later, and how many get in within a second."""

    def __init__(self, *, at_once: int = AT_ONCE, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once = at_once
        self._clock = clock
        self._inside = 0
        self._rate = FIRST_GUESS
        self._entered = 0
        self._since = clock()
        # When everyone who was told to come later will have had their turn.
        self._booked_until = 0.0
        self.refused = 0

    def begin(self) -> None:
        """Let one more begin to come in. Raises Refused, with a time to come back, if too many are on their way."""
        if self._inside >= self._at_once:
            self.refused += 1
            now = self._clock()
            self._booked_until = max(self._booked_until, now + self._at_once / self._rate) + 1 / self._rate
            # Nobody is told the same moment, and nobody who comes when told finds the ones before still waiting.
            wait = (self._booked_until - now) * random.uniform(0.9, 1.3)  # noqa: S311 - it need not be secret
            wait = min(max(wait, SOONEST_SECONDS), LATEST_SECONDS)
            raise Refused(
                ErrorCode.UNAVAILABLE,
                "Too many clients are connecting. Reconnect after `retry_after_ms`.",
                retry_after_ms=int(wait * 1000),
            )
        if not self._inside:
            self._since, self._entered = self._clock(), 0  # what comes now and then says nothing about how fast it goes
        self._inside += 1

    def end(self) -> None:
        """One is in, or has given up."""
        self._inside -= 1
        self._entered += 1
        elapsed = self._clock() - self._since
        if elapsed >= WINDOW_SECONDS:
            self._rate = max(1.0, self._entered / elapsed)
            self._since, self._entered = self._clock(), 0
