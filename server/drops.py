"""Notifications that are dropped: counted by reason, and logged once a stretch."""

import logging
import time
from collections import Counter

STRETCH_SECONDS = 60.0
"""Drops for the same reason are logged again after this long without one."""

log = logging.getLogger(__name__)


class Drops:
    """Counts the notifications that are dropped, by reason, and logs the first one of each stretch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    def add(self, reason: str, count: int = 1) -> bool:
        """Count dropped notifications. Return whether they are the first of a stretch."""
        now = time.monotonic()
        is_first = now - self._last.get(reason, -STRETCH_SECONDS) >= STRETCH_SECONDS
        if is_first:
            log.warning("notifications are dropped: %s (counted in openchat_push_dropped_total)", reason)
        self._last[reason] = now
        self.counts[reason] += count
        return is_first
