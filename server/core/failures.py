"""Consecutive failures, of which the first is logged, and then one per minute. An outage fails the same job every
second.
"""

import logging
import time
from collections.abc import Callable

from server.core.errors import is_known, log_failure
from server.core.faults import Away
from server.core.throttle import Throttle


class Failures:
    """Consecutive failures of one operation that is retried."""

    __slots__ = ("_log", "_logged", "_throttle", "_what")

    def __init__(self, log: logging.Logger, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` names the operation in the log."""
        self._log = log
        self._what = what
        self._throttle: Throttle[str] = Throttle(clock=clock)
        # Kinds of consecutive failures: names of classes, or an empty text for those that the environment explains.
        self._logged: set[str] = set()

    def add(self, error: Exception) -> None:
        """Log a failure, unless one of its kind was logged less than a minute ago. Only the first failure that the
        environment does not explain has a traceback.
        """
        if isinstance(error, Away):
            return
        kind = "" if is_known(error) else type(error).__name__
        if not self._throttle.passes(kind):
            return
        if kind and kind in self._logged:
            self._log.error("%s failed again and will be retried: %s", self._what, error)
        else:
            log_failure(self._log, self._what, error)
        self._logged.add(kind)

    def end(self) -> None:
        """Record a success, so that the next failure is a first one."""
        self._logged.clear()
        self._throttle.clear()
