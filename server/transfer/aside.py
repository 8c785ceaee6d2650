"""A file that is there whole or not at all: written beside its place, and moved there when it is complete."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from server.errors import Fatal


@contextmanager
def aside(path: Path) -> Iterator[BinaryIO]:
    """Return a new file, readable by its owner alone, that becomes `path` when the block ends, and is gone if it fails.

    Raises Fatal if `path` is there already, at the beginning or at the end, or cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        if os.path.lexists(path):
            raise FileExistsError
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, replaces nothing that came meanwhile.
        os.link(unfinished, path)
    except FileExistsError:
        raise Fatal(f"{path} is there already; name another file.") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise Fatal(f"{path} cannot be written: {reason}. Nothing of it is left.") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            unfinished.unlink()
