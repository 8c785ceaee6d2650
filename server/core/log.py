"""The log: one line on standard error for each event that concerns an operator."""

import asyncio
import contextlib
import copy
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from server.core.errors import told
from server.core.faults import ONCE, OVER
from server.core.terminal import plain

MOST_ENTRIES = 10
WINDOW_SECONDS = 60.0
"""Max entries per place in the code, per `WINDOW_SECONDS`."""
MAX_LINE = 2_000
"""Max characters per line. Errors may quote long texts of clients and other servers."""
MAX_TRACEBACK = 20_000
"""Max characters of a traceback, per entry."""


def configure(name: str) -> None:
    """Send this process's log to standard error, each line with the time and `name`. Unhandled errors are
    logged, too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    handler.addFilter(_Bound())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # The log reports connections and errors. The metrics count requests.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("websockets").setLevel(logging.WARNING)
    # Clients' errors in the HTTP handshake do not concern the operator.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    sys.excepthook = _ended


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger(__name__).critical("unhandled error; the process exits", exc_info=error)


class _Bound(logging.Filter):
    """Passes `MOST_ENTRIES` per place in the code and `WINDOW_SECONDS`, and logs how many more there were. Of records
    with a key in `ONCE` it passes one, and another one after a record whose `OVER` is a part of the key.

    A client can repeat a logged action as fast as the network allows, and the disk is shared by all.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # The windows by key or place. Places are lines of code, and keys are of few kinds, so their number is bounded.
        self._windows: dict[_Place | str, _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged."""
        if record.levelno >= logging.CRITICAL or record.name == __name__:
            return True
        now = self._clock()
        self._conclude(now)
        if (over := getattr(record, OVER, None)) is not None:
            for state, ended in self._windows.items():
                if isinstance(state, str) and over in state and ended.most < MOST_ENTRIES:
                    # The next record is of a new state, and is logged unless states change too often.
                    ended.entries, ended.most = ended.most, ended.most + 1
        key: str | None = getattr(record, ONCE, None)
        place = _place(record) if key is None else key
        if (window := self._windows.get(place)) is None:
            most = MOST_ENTRIES if key is None else 1
            window = self._windows[place] = _Window(now + WINDOW_SECONDS, record.levelno, most)
        window.entries += 1
        if window.entries == window.most + 1:
            with contextlib.suppress(RuntimeError):  # without a loop, the next record of any place ends the window
                asyncio.get_running_loop().call_later(WINDOW_SECONDS, self._conclude, window.end)
        return window.entries <= window.most

    def _conclude(self, now: float) -> None:
        """Log how many records were left out in the windows that have ended. Another window of the same key follows if
        there were any, so that the key has one line per window.
        """
        for place, window in [(place, window) for place, window in self._windows.items() if window.end <= now]:
            del self._windows[place]
            if (more := window.entries - window.most) > 0:
                if isinstance(place, str):
                    self._windows[place] = _Window(now + WINDOW_SECONDS, window.level, 0)
                summary = "%d more entries like those of %s within %.0f seconds"
                logging.getLogger(__name__).log(window.level, summary, more, place, WINDOW_SECONDS)


class _Place(NamedTuple):
    """The origin of a record: the line that logs, and the line that raised the logged error."""

    logger: str
    path: str
    line: int
    error: str
    raised: int

    def __str__(self) -> str:
        return f"{self.logger} line {self.line}"


@dataclass(slots=True)
class _Window:
    """The entries of a place or a key since the first one, of which `most` are logged."""

    end: float
    level: int
    most: int
    entries: int = 0


def _place(record: logging.LogRecord) -> _Place:
    error = record.exc_info[1] if record.exc_info else None
    trace = None if error is None else error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised = 0 if trace is None else trace.tb_lineno
    return _Place(record.name, record.pathname, record.lineno, type(error).__name__, raised)


class _Formatter(logging.Formatter):
    """Formats each entry as one line, and tracebacks as indented lines, whatever the texts contain. `MAX_LINE` and
    `MAX_TRACEBACK` apply.

    `told` formats exceptions, in arguments and in tracebacks, so that no value of a row is logged.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple) and any(isinstance(one, BaseException) for one in record.args):
            record = copy.copy(record)
            record.args = tuple(told(one) if isinstance(one, BaseException) else one for one in record.args or ())
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        text = super().formatMessage(record)
        error = record.exc_info[1] if record.exc_info else None
        # The event loop's message about a task that nobody awaited contains the task's error.
        return _line(text if error is None else text.replace(repr(error), type(error).__name__))

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 - the library's name
        return _cut("\n".join(f"  {_line(line)}" for line in _lines(ei[1], set())), MAX_TRACEBACK, "\n  ")


def _line(text: str) -> str:
    # Cut before escaping, because escapes are longer than their characters, and again after it.
    return _cut(plain(_cut(text, MAX_LINE)), MAX_LINE)


def _cut(text: str, most: int, between: str = " ") -> str:
    """Return the beginning and the end of a text that is longer than `most` characters."""
    if len(text) <= most:
        return text
    kept = most // 2 - 40
    return f"{text[:kept]}{between}[{len(text) - 2 * kept:,} characters are left out]{between}{text[-kept:]}"


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    """Yield the traceback of an exception, after those of the exceptions that it was raised from."""
    seen.add(id(error))
    origin = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if origin is not None and id(origin) not in seen:
        yield from _lines(origin, seen)
        yield "The exception above led to this one:"
    yield "Traceback (most recent call last):"
    for entry in traceback.format_tb(error.__traceback__):
        yield from entry.rstrip("\n").split("\n")
    yield from _cut(f"{type(error).__module__}.{type(error).__qualname__}: {told(error)}", MAX_LINE).split("\n")
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if id(part) not in seen:
            yield from _lines(part, seen)
