"""The log file of an embedded server: readable by its owner alone, and bounded."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 8 * 1024 * 1024
"""Max bytes of a log file before it is rotated; one older file of this size is kept."""

MAX_LINE = 64 * 1024
"""Max bytes of the end of a log that are looked through for its last line."""


class LogFile:
    """A file that a server writes to by a descriptor of its own, opened for appending."""

    def __init__(self, path: Path, *, uid: int | None = None, max_bytes: int = MAX_BYTES) -> None:
        """`uid` is the user whom the file belongs to, if that is not the one that runs this."""
        self.path = path
        self.uid = os.geteuid() if uid is None else uid
        self.older = path.with_name(f"{path.name}.1")
        self.max_bytes = max_bytes

    def open(self) -> BinaryIO:
        """Return the file, opened for appending, for a server that starts."""
        self.rotate()
        # The folder belongs to the servers' user, who may not be ours: a link could lead anywhere.
        if (file := self._opened(os.O_WRONLY | os.O_CREAT | os.O_APPEND)) is None:
            self.path.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(self.path, flags, 0o600)
            os.fchown(file, self.uid, -1)
        os.fchmod(file, 0o600)
        return os.fdopen(file, "ab")

    def rotate(self) -> None:
        """Move the end of a file that is too large to the older file, and empty it.

        The server keeps its descriptor, so the file is not renamed. Lines written meanwhile may be lost. Whatever
        somebody does to the file meanwhile, nothing is raised: the next turn tries again.
        """
        with contextlib.suppress(OSError):
            if (opened := self._opened(os.O_RDWR)) is None:
                return
            with os.fdopen(opened, "r+b") as file:
                if os.fstat(opened).st_size <= self.max_bytes:
                    return
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
        said = ""
        with contextlib.suppress(OSError):
            if (opened := self._opened(os.O_RDONLY)) is not None:
                with os.fdopen(opened, "rb") as file:
                    file.seek(max(0, os.fstat(opened).st_size - MAX_LINE))
                    said = file.read(MAX_LINE).decode(errors="replace").strip()
        return said.splitlines()[-1] if said else "it says nothing"

    def _opened(self, flags: int) -> int | None:
        """Open the file; None if it is a link, is not a file of its own and of its user, or is not there."""
        try:
            file = os.open(self.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOENT, errno.ENXIO, errno.EISDIR}:
                return None
            raise
        what = os.fstat(file)
        # Another name of it may be a file elsewhere, which is not ours to write. Names come and go, also while this is
        # asked; whom a file belongs to, its user cannot change.
        if stat.S_ISREG(what.st_mode) and what.st_nlink == 1 and what.st_uid == self.uid:
            return file
        os.close(file)
        return None
