"""How far behind a worker is, and what it does not do while it is: what can wait, in a stated order; never messages."""

import asyncio
import time
from enum import IntEnum

from protocol.errors import ErrorCode, Refused

LOOK_SECONDS = 1.0
LATE_SECONDS = (0.05, 0.1, 0.2)
"""How late the loop is when the first, the second and the third kind of frames are shed."""


class Shed(IntEnum):
    """What is refused first, second and third."""

    TYPING = 1
    PRESENCE = 2
    RECEIPTS = 3


class LoadShedding:
    """Measures how late the loop is: how long something that is due now has to wait for its turn."""

    def __init__(self) -> None:
        self.late = 0.0
        """Seconds; after a peak it is halved each second."""
        self.refused = 0

    async def watch(self) -> None:
        """Measure, until cancelled."""
        while True:
            due = time.monotonic() + LOOK_SECONDS
            await asyncio.sleep(LOOK_SECONDS)
            self.late = max(time.monotonic() - due, self.late / 2)

    @property
    def level(self) -> int:
        """How many kinds of frames are shed."""
        return sum(self.late >= late for late in LATE_SECONDS)

    def require(self, kind: Shed) -> None:
        """Raises Refused if this kind of frame has to wait."""
        if self.late >= LATE_SECONDS[kind - 1]:
            self.refused += 1
            raise Refused(
                ErrorCode.UNAVAILABLE,
                "The server is busy. Retry the same frame after `retry_after_ms`.",
                retry_after_ms=int(LOOK_SECONDS * 1000),
            )
