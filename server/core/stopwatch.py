"""How long others take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds since it was started, without those for which it was stopped."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop for as long as the context lasts: that time is ours, not theirs."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - began
