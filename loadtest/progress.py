"""Receivers of the progress of a run."""

from typing import TYPE_CHECKING

from loadtest.counters import Tally

if TYPE_CHECKING:
    from loadtest.run import Moment


class Progress:
    """Receives the progress of a run. This one ignores it."""

    def step(self, text: str) -> None:
        """Receive a description of the current step."""

    def count(self, what: str, done: int, total: int) -> None:
        """Receive how much of a long step is done."""

    def update(self, phase: str, moment: "Moment", total: Tally) -> None:
        """Receive the figures of the last second."""
