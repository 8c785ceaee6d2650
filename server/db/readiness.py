"""Whether a worker is ready. Requests within a second share one check of the database."""

import asyncio
import time
from collections.abc import Awaitable, Callable

CHECK_SECONDS = 1.0
"""Min interval between the starts of two checks, in seconds. Probes need no account and have no rate limit."""


class Readiness:
    """Shares each check among concurrent callers."""

    def __init__(self, check: Callable[[], Awaitable[bool]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self._began = 0.0
        self._checking: asyncio.Task[bool] | None = None

    async def is_given(self) -> bool:
        """Return the result of the last check if it began less than `CHECK_SECONDS` ago. Otherwise return that of a new
        one.
        """
        if self._checking is None or (self._checking.done() and self._clock() - self._began >= CHECK_SECONDS):
            self._began = self._clock()
            self._checking = asyncio.ensure_future(self._check())
        # A caller that disconnects must not cancel the check of the others.
        return await asyncio.shield(self._checking)
