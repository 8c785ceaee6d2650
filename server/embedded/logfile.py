"""The log file of an embedded server: readable by its owner alone, and bounded."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 8 * 1024 * 1024
"""Max bytes of a log file before it is rotated; one older file of this size is kept."""


class LogFile:
    """A file that a server writes to by a descriptor of its own, opened for appending."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.older = path.with_name(f"{path.name}.1")
        self.max_bytes = max_bytes

    def open(self) -> BinaryIO:
        """Return the file, opened for appending, for a server that starts."""
        self.rotate()
        # The folder belongs to the servers' user, who may not be ours: a link could lead anywhere.
        if self.path.is_symlink():
            self.path.unlink()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(file, 0o600)
        return os.fdopen(file, "ab")

    def rotate(self) -> None:
        """Move the end of a file that is too large to the older file, and empty it.

        The server keeps its descriptor, so the file is not renamed. Lines written meanwhile may be lost.
        """
        if self.path.is_symlink() or not self.path.exists() or self.path.stat().st_size <= self.max_bytes:
            return
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as file:
            # On a full disk the lines are lost, and the file is emptied all the more.
            with contextlib.suppress(OSError):
                self.older.unlink(missing_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with os.fdopen(os.open(self.older, flags, 0o600), "wb") as older:
                    file.seek(-self.max_bytes, os.SEEK_END)
                    older.write(file.read(self.max_bytes))
            file.truncate(0)

    def last_line(self) -> str:
        """Return what the server said last."""
        lines = self.path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"
