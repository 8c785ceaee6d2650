"""When the last versions of a conversation were delivered, in a bounded number of bytes."""

from array import array
from bisect import bisect_left

REMEMBERED = 80
"""Max delivery times that are remembered, per conversation."""
RESOLUTION = 1.0
"""Versions that are delivered in the same second share one time, that of the last of them. So a busy conversation is
remembered for more than a minute, however many events it has. In seconds.
"""


class DeliveryTimes:
    """The delivery times of versions in ascending order."""

    __slots__ = ("_forgotten", "_times", "_versions")

    def __init__(self, since: int) -> None:
        """`since` is the version before the first one that is added."""
        self._forgotten = since
        self._versions = array("q")
        self._times = array("d")

    def add(self, version: int, now: float) -> None:
        """Add the delivery of all versions after the previous one, up to `version`. `now` is in Unix seconds."""
        if self._times and self._times[-1] // RESOLUTION == now // RESOLUTION:
            self._versions[-1], self._times[-1] = version, now
            return
        if len(self._times) == REMEMBERED:
            self._forgotten = self._versions.pop(0)
            del self._times[0]
        self._versions.append(version)
        self._times.append(now)

    def of(self, version: int) -> float | None:
        """Return when a version was delivered, in Unix seconds, at most `RESOLUTION` too late. Return None if it was
        not, or is no longer remembered.
        """
        if version <= self._forgotten:
            return None
        place = bisect_left(self._versions, version)
        return self._times[place] if place < len(self._times) else None
