"""One line for each thing an operator may want to know, on standard error."""

import copy
import logging
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from server.errors import told
from server.terminal import plain


def configure(name: str) -> None:
    """Send this process's log to standard error, each line with the time and `name`; also what ends the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # Connections and errors are worth a line, requests are not; the metrics count them.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("websockets").setLevel(logging.WARNING)
    # A browser's or client's mistake in the HTTP handshake is not ours to report.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    sys.excepthook = _ended


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger(__name__).critical("the process ends", exc_info=error)


class _Formatter(logging.Formatter):
    """Makes one line of each entry, and indented lines of a traceback, whatever the texts in them hold.

    Exceptions are formatted by `told`, in arguments and in tracebacks, so that no value of a row is logged.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple) and any(isinstance(one, BaseException) for one in record.args):
            record = copy.copy(record)
            record.args = tuple(told(one) if isinstance(one, BaseException) else one for one in record.args or ())
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        text = super().formatMessage(record)
        error = record.exc_info[1] if record.exc_info else None
        # The loop names a task that nobody awaited with the error that it ended with.
        return plain(text if error is None else text.replace(repr(error), type(error).__name__))

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 - the library's name
        return "\n".join(f"  {plain(line)}" for line in _lines(ei[1], set()))


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
    yield from f"{type(error).__module__}.{type(error).__qualname__}: {told(error)}".split("\n")
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if id(part) not in seen:
            yield from _lines(part, seen)
