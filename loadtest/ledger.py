"""What one process of the crowd counted: what it sent, what came, how long that took, what is wrong."""

from collections import Counter

import msgspec

from loadtest.histogram import Histogram


class Tally(msgspec.Struct):
    """Counts since the last one; two of them add up."""

    sent: int = 0
    """Frames that ask for an answer."""
    answered: int = 0
    delivered: int = 0
    """Durable events, once for each socket that they came to."""
    ephemeral: int = 0
    """Typing, presence, receipts."""
    connected: int = 0
    resumed: int = 0
    turned_away: int = 0
    """Times that the server said to connect later."""
    duplicated: int = 0
    """Events that came to a socket that was there or further already."""
    skipped: int = 0
    """Events that a socket should have had before the one that came: lost, or out of order."""
    lost: int = 0
    """Events that had not come when all had been given time."""
    errors: dict[str, int] = {}
    """Refusals by code, and connections that ended by close code."""
    answers: dict[int, int] = {}
    """How long answers took, from the moment the frame was due."""
    deliveries: dict[int, int] = {}
    """How long events took to reach each socket, from the moment the message was due."""
    opened: dict[int, int] = {}
    """How long it took to connect, authenticate and read the first page; or to resume."""

    def add(self, other: "Tally") -> "Tally":
        """Take another one in."""
        for field in self.__struct_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            setattr(self, field, dict(Counter(mine) + Counter(theirs)) if isinstance(mine, dict) else mine + theirs)
        return self

    @property
    def wrong(self) -> int:
        """How many events did not come once and in order."""
        return self.duplicated + self.skipped + self.lost


class Ledger:
    """A tally that is being kept."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.sent = self.answered = self.delivered = self.ephemeral = 0
        self.connected = self.resumed = self.turned_away = 0
        self.duplicated = self.skipped = self.lost = 0
        self.errors: Counter[str] = Counter()
        self.answers, self.deliveries, self.opened = Histogram(), Histogram(), Histogram()

    def take(self) -> Tally:
        """Return what was counted, and begin again."""
        counted = {k: one.counts if isinstance(one, Histogram) else one for k, one in vars(self).items()}
        self._begin()
        return msgspec.convert(counted, Tally)
