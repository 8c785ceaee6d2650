"""Events of a conversation that are delivered while a socket reads earlier ones."""

from typing import NamedTuple

MAX_BACKLOG = 256
"""Max events of a backlog. A socket that misses more reads again."""
MAX_BACKLOG_BYTES = 256 * 1024
"""Max bytes of a backlog."""


class _Event(NamedTuple):
    since: int
    version: int
    frame: bytes


class Backlog:
    """Durable events in the order of their versions, without a gap."""

    __slots__ = ("_bytes", "_events")

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self._bytes = 0

    def add(self, since: int, version: int, frame: bytes) -> None:
        """Add a WebSocket frame with the event that leads from the version `since` to `version`. A full backlog is
        emptied and stays empty.
        """
        self._bytes += len(frame)
        if len(self._events) < MAX_BACKLOG and self._bytes <= MAX_BACKLOG_BYTES:
            self._events.append(_Event(since, version, frame))
        else:
            self._events.clear()
            self._bytes = MAX_BACKLOG_BYTES

    def after(self, version: int) -> list[bytes] | None:
        """Return the frames after a version. Return None if some are missing, or if one contains changes before that
        version.
        """
        later = [event for event in self._events if event.version > version]
        return [event.frame for event in later] if later and later[0].since == version else None
