"""One line for each thing an operator may want to know, on standard error."""

import logging
import sys


def configure(name: str) -> None:
    """Send this process's log to standard error, each line with the time and `name`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # Connections and errors are worth a line, requests are not; the metrics count them.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("websockets").setLevel(logging.WARNING)
    # A browser's or client's mistake in the HTTP handshake is not ours to report.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
