"""What is going on, told on standard error while a command runs: in place on a terminal, in lines elsewhere."""

import sys
import time

from server.core.terminal import plain, say

REFRESH_SECONDS = 0.2


def _has_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Progress:
    """Tells how far a command is."""

    def __init__(self, *, is_on: bool = True, is_terminal: bool | None = None) -> None:
        self._is_on = is_on
        self._is_terminal = _has_terminal() if is_terminal is None else is_terminal
        self._next = 0.0

    def begins(self, what: str) -> None:
        """Tell what is being done now, where that can be overwritten."""
        if self._is_on and self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{plain(what)} …")
            sys.stderr.flush()

    def counts(self, what: str, count: int) -> None:
        """Tell how many there are by now, a few times a second."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH_SECONDS
            self.begins(f"{what}: {count:,}")

    def line(self, text: str) -> None:
        """Print a line of the result."""
        if self._is_on:
            if self._is_terminal:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            say(text)

    def done(self) -> None:
        """Take away what was being done."""
        if self._is_on and self._is_terminal:
            sys.stderr.write("\r\x1b[K")
