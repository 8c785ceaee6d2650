"""Files that are either complete or absent: written beside their place, and moved there when they are complete."""

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.core.errors import Fatal
from server.core.terminal import complain


@contextmanager
def aside(path: Path, *, replaces: bool = False) -> Iterator[Callable[[bytes], None]]:
    """Return a function that writes to a new file, readable by its owner only. The file becomes `path` when the block
    ends, and is deleted if the block fails.

    Raises Fatal if `path` cannot be written. Without `replaces`, also raises it if `path` exists at the beginning or
    end. Names the files that a killed process left beside `path`.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    with _about(path):
        if not replaces and os.path.lexists(path):
            raise FileExistsError
        for left in _left(path):
            complain(f"{left} is from a command that still runs or was killed. If none runs, delete it.")
        file = os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")

    def write(piece: bytes) -> None:
        with _about(path):
            file.write(piece)

    try:
        yield write
        with _about(path):
            file.flush()
            os.fsync(file.fileno())
            (Path.replace if replaces else _place)(unfinished, path)
            _keep(path.parent)
    finally:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            unfinished.unlink()


def require_folder(path: Path) -> None:
    """Create a folder for files. Raises Fatal if it cannot be created or written."""
    with _about(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, "Permission denied")


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Raise Fatal for an error of the block, which must use only this file."""
    try:
        yield
    except FileExistsError:
        raise Fatal(f"{path} already exists. Choose another file.") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise Fatal(f"{path} cannot be written: {reason}. No partial file remains.") from None


def _place(unfinished: Path, path: Path) -> None:
    """Rename a file to `path`, which must not exist. Raises FileExistsError if it was created meanwhile."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no hard links. An empty file reserves the name, and the rename replaces it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            unfinished.replace(path)
        except BaseException:
            path.unlink()
            raise


def _keep(folder: Path) -> None:
    """Synchronise the folder, so that the name survives a power failure. Some systems cannot do this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _left(path: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.unfinished")
    return sorted(one for one in path.parent.iterdir() if pattern.fullmatch(one.name))
