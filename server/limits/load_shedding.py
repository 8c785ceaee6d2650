"""Load shedding: a worker that falls behind refuses frames that can wait, in a fixed order. It refuses no messages."""

import asyncio
import time
from enum import IntEnum

from protocol.errors import ErrorCode, Refused

INTERVAL_SECONDS = 1.0
"""Interval of measurements, in seconds."""
LATE_SECONDS = (0.05, 0.1, 0.2)
"""Delays of the event loop, in seconds, from which the first, second and third kind of frame is refused."""


class Shed(IntEnum):
    """Kinds of frames that are refused under load. The lowest number is refused first."""

    TYPING = 1
    PRESENCE = 2
    RECEIPTS = 3


class LoadShedding:
    """Measures the delay of the event loop, which is how long a callback that is due waits for its turn."""

    def __init__(self) -> None:
        self.late = 0.0
        """The delay in seconds. After a peak it is halved each second."""
        self.refused = 0

    async def watch(self) -> None:
        """Measure the delay once a second, until cancelled."""
        while True:
            due = time.monotonic() + INTERVAL_SECONDS
            await asyncio.sleep(INTERVAL_SECONDS)
            self.late = max(time.monotonic() - due, self.late / 2)

    @property
    def level(self) -> int:
        """The number of kinds that are refused now."""
        return sum(self.late >= late for late in LATE_SECONDS)

    def require(self, kind: Shed) -> None:
        """Raise Refused if frames of this kind are refused now."""
        if self.late >= LATE_SECONDS[kind - 1]:
            self.refused += 1
            raise Refused(
                ErrorCode.UNAVAILABLE,
                "The server is busy. Retry the same frame after `retry_after_ms`.",
                retry_after_ms=int(INTERVAL_SECONDS * 1000),
            )
