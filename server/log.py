"""One line for each thing an operator may want to know, on standard error."""

import logging
import sys
from typing import Any

from server.terminal import plain


def configure(name: str) -> None:
    """Send this process's log to standard error, each line with the time and `name`."""
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


class _Formatter(logging.Formatter):
    """Makes one line of each entry, and indented lines of a traceback, whatever the texts in them hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 - the library's name
        return "\n".join(f"  {plain(line)}" for line in super().formatException(ei).split("\n"))
