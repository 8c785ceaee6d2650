"""Waiting that ends when a signal arrives, such as that of a child that has ended."""

import contextlib
import selectors
import signal
import socket
from collections.abc import Iterator

ENOUGH = 4096
"""Max bytes of signals that are read at a time. Each signal writes one."""


class WakeUp:
    """Wakes the main thread when a signal arrives. A thread that sleeps would only notice it at its next turn."""

    def __init__(self, arrived: socket.socket) -> None:
        self._arrived = arrived
        self._selector = selectors.DefaultSelector()
        self._selector.register(arrived, selectors.EVENT_READ)

    @classmethod
    @contextlib.contextmanager
    def by_signals(cls) -> Iterator["WakeUp"]:
        """Be woken by all signals, including those of children, while the context is entered by the main thread."""
        arrived, written = socket.socketpair()
        with arrived, written:
            arrived.setblocking(False)  # noqa: FBT003 - the name of the method says what it sets
            written.setblocking(False)  # noqa: FBT003 - as above
            one = cls(arrived)
            before = signal.signal(signal.SIGCHLD, lambda *_: None)  # a signal that is ignored wakes nobody
            signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
            try:
                yield one
            finally:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, before)
                one._selector.close()

    def wait(self, seconds: float) -> None:
        """Return when a signal has arrived since the last call, or after `seconds`."""
        self._selector.select(seconds)
        with contextlib.suppress(BlockingIOError):
            while self._arrived.recv(ENOUGH):
                pass
