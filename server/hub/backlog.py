"""What is delivered in a conversation while a socket reads what came before it."""

from typing import NamedTuple

MAX_BACKLOG = 256
"""Max events of a backlog. A socket that is behind by more reads again."""
MAX_BACKLOG_BYTES = 256 * 1024
"""Max bytes of them."""


class _Event(NamedTuple):
    since: int
    version: int
    frame: bytes


class Backlog:
    """Durable events in the order of their conversation's clock, without a gap."""

    __slots__ = ("_bytes", "_events")

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self._bytes = 0

    def add(self, since: int, version: int, frame: bytes) -> None:
        """Add the event, framed, that leads from one version to another. Beyond the bounds nothing is kept."""
        self._bytes += len(frame)
        if len(self._events) < MAX_BACKLOG and self._bytes <= MAX_BACKLOG_BYTES:
            self._events.append(_Event(since, version, frame))
        else:
            self._events.clear()
            self._bytes = MAX_BACKLOG_BYTES

    def after(self, version: int) -> list[bytes] | None:
        """Return the events after a version; None if they are not all here, or one of them began before it."""
        later = [event for event in self._events if event.version > version]
        return [event.frame for event in later] if later and later[0].since == version else None
