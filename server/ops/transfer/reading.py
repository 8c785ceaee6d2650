"""Reads untrusted files: within limits, inside their folder, and with the place of each error."""

import os
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from protocol.json_object import STRING
from protocol.limits import LINE

Made = TypeVar("Made")

MAX_LINE = 64 * 1024**2
"""Max bytes of a line."""
MAX_FILE = 256 * 1024**2
"""Max bytes of one file in a Slack export."""
MAX_TOTAL = 64 * 1024**3
"""Max bytes of all files that are read from a zip file."""
MAX_FILES = 500_000
"""Max files in a zip file."""
MAX_RATIO = 200
"""Max compression ratio of files above `RATIO_FROM` bytes in a zip file."""
RATIO_FROM = 1024**2
MAX_POSTS = 5_000_000
"""Max messages of a conversation, which is in memory during its import. Each takes 1.4 KiB."""
MAX_THINGS = 500_000
"""Max people, and max conversations, of an archive. Each takes 1 KiB of memory."""
MAX_VALUES = 16_000_000
"""Max commas, objects and arrays in a line or file. Short ones take 25 times their size when they are decoded."""
MAX_DEPTH = 64
"""Max depth of objects and arrays in a line."""

MAX_KEY = 255
"""Max characters of an id or name that serves as a key."""
MAX_AHEAD_MS = 3_600_000
"""Max milliseconds by which a time may be later than now, because clocks differ."""
PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Supported compression methods. Python unpacks the others without a limit: 6 GiB from 2 KB."""
ENCRYPTED = 0x1

WRONG = (
    KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError,
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError,
)  # fmt: skip
"""Raised by reading data of an unexpected form."""


_LINE = re.compile(LINE)


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn errors about the data into a ValueError with its place."""
    try:
        yield
    except WRONG as error:
        raise _at(place, error) from error


def each(file: str, entries: Iterable[Any], make: Callable[[Any], Made]) -> list[Made]:
    """Return the result of `make` for each entry. Raises ValueError, with the file and the number of the entry."""
    made: list[Made] = []
    number = 0
    try:
        for number, entry in enumerate(entries, 1):  # noqa: B007 - errors include the number
            made.append(make(entry))
    except WRONG as error:
        raise _at(f"{file}: entry {number}" if number else file, error) from error
    return made


def _at(place: str, error: Exception) -> ValueError:
    reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    return ValueError(f"{place}: {reason}")


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1. Raises ValueError if one is too long."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number}: the line is longer than {MAX_LINE:,} bytes")
        yield number, line


def require_few_posts(count: int, conversation: str) -> None:
    """Raise ValueError if a conversation has too many messages."""
    if count > MAX_POSTS:
        raise ValueError(f"there are more than {MAX_POSTS:,} messages in {conversation} up to here")


def require_few_things(count: int, what: str) -> None:
    """Raise ValueError if there are too many people or conversations."""
    if count > MAX_THINGS:
        raise ValueError(f"there are more than {MAX_THINGS:,} {what} up to here")


def require_few(text: bytes) -> None:
    """Raise ValueError if JSON has too many values."""
    if text.count(b",") + text.count(b"{") + text.count(b"[") > MAX_VALUES:
        raise ValueError(f"the JSON has more than {MAX_VALUES:,} values")


def require_shallow(line: bytes) -> None:
    """Raise ValueError if a line of JSON is too deep."""
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and depth(line) > MAX_DEPTH:
        raise ValueError(f"the JSON is nested more than {MAX_DEPTH} levels deep")


def depth(text: bytes) -> int:
    """Return the depth of JSON."""
    deepest = now = 0
    for character in STRING.sub(b"", text):
        if character in b"[{":
            now += 1
            deepest = max(deepest, now)
        elif character in b"]}":
            now -= 1
    return deepest


def component(name: object) -> str:
    """Return the name of one file or folder. Raises ValueError if it leads elsewhere."""
    if not isinstance(name, str) or not _is_component(name):
        raise ValueError(f"{name!r:.100} is not a valid file name")
    return name


def _is_component(name: str) -> bool:
    return name not in {"", ".", ".."} and not any(one in name for one in "/\\\0") and name[1:2] != ":"


def moment_ms(at_ms: int) -> int:
    """Return a time in milliseconds since 1970. Raises ValueError if it is earlier, or later than now. A message from
    the future would count as new until then.
    """
    if not 0 <= at_ms <= time.time() * 1000 + MAX_AHEAD_MS:
        raise ValueError(f"{at_ms} is not a time in milliseconds between 1970 and now")
    return at_ms


def text(value: object) -> str:
    """Return a text without U+0000, which PostgreSQL cannot store. Raises TypeError if `value` is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is not a text")
    return value.replace("\0", "")


def key(value: object, without: str = "") -> str:
    """Return a key. Raises ValueError if it is too long, or contains invisible characters or some of `without`. Raises
    TypeError if it is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is not an id")
    if not 0 < len(value) <= MAX_KEY or not _LINE.match(value) or any(one in value for one in without):
        raise ValueError(f"{value!r:.100} is not an id: its length or its characters are not allowed")
    return value


def _is_plain_folder(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and os.access(place, os.R_OK | os.X_OK)


class Files:
    """The files of an export, in a folder or a zip file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if `path` does not exist. Raises ValueError if the zip file is invalid, is too large, or
        contains a name that leads out of it.
        """
        path.stat()
        self._root = path.resolve()
        self._zip: zipfile.ZipFile | None = None
        self._entries: dict[tuple[str, ...], zipfile.ZipInfo] = {}
        self._folders: dict[str, list[str]] = {}
        self._left = MAX_TOTAL
        if path.is_file():
            with reading(path.name):
                self._zip = zipfile.ZipFile(path)
            self._check(self._zip.infolist())

    def _check(self, entries: list[zipfile.ZipInfo]) -> None:
        if len(entries) > MAX_FILES:
            raise ValueError(f"the zip file has more than {MAX_FILES:,} files")
        for entry in entries:
            parts = tuple(component(part) for part in entry.orig_filename.removesuffix("/").split("/"))
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"{entry.filename!r} is a symbolic link")
            if entry.flag_bits & ENCRYPTED:
                raise ValueError(f"{entry.filename!r} is encrypted. Create the zip file without a password")
            if entry.compress_type not in PACKED:
                raise ValueError(f"{entry.filename!r} is not compressed with deflate. Create the zip file again")
            if entry.file_size > max(RATIO_FROM, entry.compress_size * MAX_RATIO):
                raise ValueError(f"{entry.filename!r} is too large when unpacked")
            if parts in self._entries:
                raise ValueError(f"the zip file has {entry.filename!r} twice")
            self._entries[parts] = entry
            if len(parts) == 2:  # noqa: PLR2004 - a folder and a file
                self._folders.setdefault(parts[0], []).append(parts[1])

    def json(self, *parts: object) -> Any:  # noqa: ANN401 - any JSON value
        """Return the content of a file, or None if it does not exist."""
        place = tuple(component(part) for part in parts)
        with reading("/".join(place)):
            text = self._read(place)
            if text is None:
                return None
            require_few(text)
            return msgspec.json.decode(text)

    def names(self, folder: object) -> list[str]:
        """Return the sorted names of the files in a folder, or none if it does not exist."""
        name = component(folder)
        if self._zip is not None:
            return sorted(self._folders.get(name, []))
        place = self._inside((name,))
        return sorted(one.name for one in place.iterdir()) if place.is_dir() else []

    def folders(self) -> list[str]:
        """Return the sorted names of all folders. Links, unreadable folders and unusual names do not belong to the
        export.
        """
        if self._zip is not None:
            return sorted(self._folders)
        return sorted(one.name for one in self._root.iterdir() if _is_component(one.name) and _is_plain_folder(one))

    def _inside(self, parts: tuple[str, ...]) -> Path:
        place = self._root.joinpath(*parts)
        if place.resolve() != place:
            raise ValueError(f"{'/'.join(parts)!r} is a symbolic link")
        return place

    def _read(self, parts: tuple[str, ...]) -> bytes | None:
        if self._zip is None:
            place = self._inside(parts)
            if not place.is_file():
                return None
            with place.open("rb") as file:
                return self._bounded(file.read(MAX_FILE + 1))
        entry = self._entries.get(parts)
        if entry is None:
            return None
        with self._zip.open(entry) as file:
            return self._bounded(file.read(MAX_FILE + 1))

    def _bounded(self, text: bytes) -> bytes:
        # Counts the bytes that were read, because the sizes in the zip file may be wrong.
        self._left -= len(text)
        if len(text) > MAX_FILE or self._left < 0:
            raise ValueError("the file is too large")
        return text
