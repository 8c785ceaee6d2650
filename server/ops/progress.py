"""The progress of a command on standard error. On a terminal, the line of the current step is overwritten."""

import sys
import time

from server.core.terminal import plain, say

REFRESH_SECONDS = 0.2
"""Min interval between two counts, in seconds."""


def _has_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Progress:
    """Prints the progress of a command."""

    def __init__(self, *, is_on: bool = True, is_terminal: bool | None = None) -> None:
        self._is_on = is_on
        self._is_terminal = _has_terminal() if is_terminal is None else is_terminal
        self._next = 0.0

    def begins(self, what: str) -> None:
        """Show the current step on a terminal."""
        if self._is_on and self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{plain(what)} …")
            sys.stderr.flush()

    def counts(self, what: str, count: int) -> None:
        """Show a count, at most every `REFRESH_SECONDS`."""
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
        """Clear the line of the current step."""
        if self._is_on and self._is_terminal:
            sys.stderr.write("\r\x1b[K")
