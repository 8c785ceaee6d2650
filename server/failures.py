"""Failures in a row: the first is logged, and again once a minute, for an outage fails the same job every second."""

import logging
import time
from collections.abc import Callable

from server.errors import Away, is_known, log_failure

AGAIN_SECONDS = 60.0
"""Min interval between two entries about failures of one kind in a row, in seconds."""


class Failures:
    """Those of one thing that is tried again and again."""

    __slots__ = ("_again_at", "_clock", "_log", "_what")

    def __init__(self, log: logging.Logger, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` names the thing in the log."""
        self._log = log
        self._what = what
        self._clock = clock
        self._again_at: dict[str, float] = {}

    def add(self, error: Exception) -> None:
        """Log a failure, unless one of its kind was logged less than `AGAIN_SECONDS` ago. Only the first failure that
        the environment does not explain has a traceback.
        """
        if isinstance(error, Away):
            return
        kind = "" if is_known(error) else type(error).__name__
        again_at, now = self._again_at.get(kind), self._clock()
        if again_at is not None and now < again_at:
            return
        self._again_at[kind] = now + AGAIN_SECONDS
        if again_at is not None and kind:
            self._log.error("%s failed again, and is tried again: %s", self._what, error)
        else:
            log_failure(self._log, self._what, error)

    def end(self) -> bool:
        """Note a success. Return whether it ends failures in a row."""
        was_failing = bool(self._again_at)
        self._again_at.clear()
        return was_failing
