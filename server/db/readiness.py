"""Whether a worker is ready: one look at the database for all who ask within a second."""

import asyncio
import time
from collections.abc import Awaitable, Callable

LOOK_SECONDS = 1.0
"""Min interval between the beginnings of two looks, in seconds. Probes need no account and no allowance."""


class Readiness:
    """Shares each look among those who ask."""

    def __init__(self, look: Callable[[], Awaitable[bool]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._clock = clock
        self._began = 0.0
        self._looking: asyncio.Task[bool] | None = None

    async def is_given(self) -> bool:
        """Return what the last look found if it began less than `LOOK_SECONDS` ago, or what a new one finds."""
        if self._looking is None or (self._looking.done() and self._clock() - self._began >= LOOK_SECONDS):
            self._began = self._clock()
            self._looking = asyncio.ensure_future(self._look())
        # One who hangs up does not end the look of the others.
        return await asyncio.shield(self._looking)
