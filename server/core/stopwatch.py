"""Measures how long other parties take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds since the start, without the time for which it was stopped."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The measured time, in seconds."""
        return time.monotonic() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the watch during the context, because that time is spent by this program."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - began
