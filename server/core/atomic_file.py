"""A file that is there whole or not at all: written beside its place, and moved there when it is complete."""

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
    """Return a function that writes to a new file, readable by its owner alone. The file becomes `path` when the block
    ends, and is deleted if the block fails.

    Raises Fatal if `path` cannot be written, or, without `replaces`, if it is there at the beginning or at the end.
    Names what a killed process left beside `path`.
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
    """Make a folder that files are to be written into. Raises Fatal if that cannot be done."""
    with _about(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, "Permission denied")


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Raise Fatal for an error of the block, in which nothing but this file is used."""
    try:
        yield
    except FileExistsError:
        raise Fatal(f"{path} already exists. Choose another file.") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise Fatal(f"{path} cannot be written: {reason}. No partial file remains.") from None


def _place(unfinished: Path, path: Path) -> None:
    """Name a file `path`, in place of nothing. Raises FileExistsError if something has come there meanwhile."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no hard links. An empty file holds the name, which the rename takes over.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            unfinished.replace(path)
        except BaseException:
            path.unlink()
            raise


def _keep(folder: Path) -> None:
    """Have the name outlast a power failure, where a folder can be synchronised."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _left(path: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.unfinished")
    return sorted(one for one in path.parent.iterdir() if pattern.fullmatch(one.name))
