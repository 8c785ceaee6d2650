"""The counts of one process of the crowd: frames sent and received, durations and errors."""

from collections import Counter

import msgspec

from loadtest.histogram import Histogram


class Tally(msgspec.Struct):
    """Counts since the last tally. Tallies can be added."""

    sent: int = 0
    """Frames that expect an answer."""
    answered: int = 0
    delivered: int = 0
    """Durable events, once per socket that received them."""
    ephemeral: int = 0
    """Typing, presence and receipts."""
    connected: int = 0
    resumed: int = 0
    deferred: int = 0
    """Connection attempts that the server asked to repeat later."""
    duplicated: int = 0
    """Events with a version that the socket already had."""
    skipped: int = 0
    """Versions missing before a received event: lost or out of order."""
    lost: int = 0
    """Events that had not arrived at the end of the wait after a phase."""
    errors: dict[str, int] = {}
    """Refusals by code, and connections that ended by close code."""
    answers: dict[int, int] = {}
    """Histogram of the time from a frame's due time to its answer."""
    pages: dict[int, int] = {}
    """Histogram of the time from a frame's due time to its answer, for pages of history that are not in `answers`."""
    deliveries: dict[int, int] = {}
    """Histogram of the time from a message's due time to each delivery."""
    opened: dict[int, int] = {}
    """Histogram of the time to connect, authenticate and read the first page, or to resume."""

    def add(self, other: "Tally") -> "Tally":
        """Add another tally to this one."""
        for field in self.__struct_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            setattr(self, field, dict(Counter(mine) + Counter(theirs)) if isinstance(mine, dict) else mine + theirs)
        return self

    @property
    def wrong(self) -> int:
        """The number of events that did not arrive once and in order."""
        return self.duplicated + self.skipped + self.lost


class Counters:
    """The counters of a running process."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.sent = self.answered = self.delivered = self.ephemeral = 0
        self.connected = self.resumed = self.deferred = 0
        self.duplicated = self.skipped = self.lost = 0
        self.errors: Counter[str] = Counter()
        self.answers, self.pages, self.deliveries, self.opened = (Histogram() for _ in range(4))

    def take(self) -> Tally:
        """Return the counts, and reset them."""
        counted = {k: one.counts if isinstance(one, Histogram) else one for k, one in vars(self).items()}
        self._begin()
        return msgspec.convert(counted, Tally)
