"""The log file of an embedded server, which only its owner may read and whose size is limited."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 8 * 1024 * 1024
"""Max bytes of a log file before it is rotated. One older file of this size is kept."""

MAX_LINE = 64 * 1024
"""Max bytes at the end of a log that are searched for its last line."""


class LogFile:
    """A log file, to which a server appends by a descriptor of its own."""

    def __init__(self, path: Path, *, uid: int | None = None, max_bytes: int = MAX_BYTES) -> None:
        """`uid` is the owner of the file, if it is not the user of this process."""
        self.path = path
        self.uid = os.geteuid() if uid is None else uid
        self.older = path.with_name(f"{path.name}.1")
        self.max_bytes = max_bytes

    def open(self) -> BinaryIO:
        """Return the file, opened for appending, for a server that starts."""
        self.rotate()
        # The folder belongs to the servers' user, who may have put a link there.
        if (file := self._opened(os.O_WRONLY | os.O_CREAT | os.O_APPEND)) is None:
            self.path.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(self.path, flags, 0o600)
            os.fchown(file, self.uid, -1)
        os.fchmod(file, 0o600)
        return os.fdopen(file, "ab")

    def rotate(self) -> None:
        """If the file is too large, copy its end to the older file, and empty it.

        The server keeps its descriptor, so the file is not renamed. Lines that are written meanwhile may be lost. No
        change to the file by others raises an error, and the next call tries again.
        """
        with contextlib.suppress(OSError):
            if (opened := self._opened(os.O_RDWR)) is None:
                return
            with os.fdopen(opened, "r+b") as file:
                if os.fstat(opened).st_size <= self.max_bytes:
                    return
                # On a full disk the lines are lost, and the file must be emptied all the same.
                with contextlib.suppress(OSError):
                    self.older.unlink(missing_ok=True)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    with os.fdopen(os.open(self.older, flags, 0o600), "wb") as older:
                        file.seek(-self.max_bytes, os.SEEK_END)
                        older.write(file.read(self.max_bytes))
                file.truncate(0)

    def last_line(self) -> str:
        """Return the last line of the log."""
        said = ""
        with contextlib.suppress(OSError):
            if (opened := self._opened(os.O_RDONLY)) is not None:
                with os.fdopen(opened, "rb") as file:
                    file.seek(max(0, os.fstat(opened).st_size - MAX_LINE))
                    said = file.read(MAX_LINE).decode(errors="replace").strip()
        return said.splitlines()[-1] if said else "its log is empty"

    def _opened(self, flags: int) -> int | None:
        """Open the file. Return None if it does not exist, is a link, has another name, or belongs to another user."""
        try:
            file = os.open(self.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOENT, errno.ENXIO, errno.EISDIR}:
                return None
            raise
        what = os.fstat(file)
        # A file with another name may be a file elsewhere, which must not be written. Names may change meanwhile, but
        # the user cannot change the owner.
        if stat.S_ISREG(what.st_mode) and what.st_nlink == 1 and what.st_uid == self.uid:
            return file
        os.close(file)
        return None
