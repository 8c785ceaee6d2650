"""Dropped notifications, counted by reason and logged once a minute."""

import logging
from collections import Counter

from server.core.throttle import Throttle

log = logging.getLogger(__name__)


class Drops:
    """Counts dropped notifications by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._throttle: Throttle[str] = Throttle()

    def add(self, reason: str, count: int = 1) -> bool:
        """Count dropped notifications. Return whether that was logged."""
        self.counts[reason] += count
        if not self._throttle.passes(reason):
            return False
        log.warning("dropping notifications: %s (counted in openchat_push_dropped_total)", reason)
        return True
