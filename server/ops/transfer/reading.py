"""Reading what somebody else has written: within bounds, inside its folder, and with the place of what is wrong."""

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
"""Max bytes of one file of a Slack export."""
MAX_TOTAL = 64 * 1024**3
"""Max bytes of all files that are read from a zip file."""
MAX_FILES = 500_000
"""Max files in a zip file."""
MAX_RATIO = 200
"""Max bytes that a byte of a zip file becomes, for files of more than `RATIO_FROM` bytes."""
RATIO_FROM = 1024**2
MAX_POSTS = 5_000_000
"""Max messages of a conversation, which is in memory while it is imported: 1.4 KiB each."""
MAX_THINGS = 500_000
"""Max people of an archive, and max conversations: 1 KiB each in memory."""
MAX_VALUES = 16_000_000
"""Max commas, objects and arrays in a line or file: short ones take 25 times their bytes when they are decoded."""
MAX_DEPTH = 64
"""Max depth of objects and arrays in a line."""

MAX_KEY = 255
"""Max characters of an id or name that things are told apart by."""
MAX_AHEAD_MS = 3_600_000
"""Max time that something is later than now, as clocks differ, milliseconds."""
PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""How files may be packed. Python unpacks the other ways without a bound: 6 GiB from 2 KB."""
ENCRYPTED = 0x1

WRONG = (
    KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError,
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError,
)  # fmt: skip
"""What reading raises about something that has another form than it should."""


_LINE = re.compile(LINE)


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Have whatever is wrong be a ValueError that names its place."""
    try:
        yield
    except WRONG as error:
        raise _at(place, error) from error


def each(file: str, entries: Iterable[Any], make: Callable[[Any], Made]) -> list[Made]:
    """Return what `make` returns of each entry. Raises ValueError, with the file and the number of the entry."""
    made: list[Made] = []
    number = 0
    try:
        for number, entry in enumerate(entries, 1):  # noqa: B007 - what goes wrong is named by it
            made.append(make(entry))
    except WRONG as error:
        raise _at(f"{file}: entry {number}" if number else file, error) from error
    return made


def _at(place: str, error: Exception) -> ValueError:
    reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    return ValueError(f"{place}: {reason}")


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Return the lines of a file with their numbers, from 1. Raises ValueError if one is too long."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number}: it is longer than {MAX_LINE:,} bytes")
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
    """Raise ValueError if JSON holds too many values."""
    if text.count(b",") + text.count(b"{") + text.count(b"[") > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")


def require_shallow(line: bytes) -> None:
    """Raise ValueError if a line of JSON is nested too deeply."""
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and depth(line) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def depth(text: bytes) -> int:
    """Return how deep JSON is nested."""
    deepest = now = 0
    for character in STRING.sub(b"", text):
        if character in b"[{":
            now += 1
            deepest = max(deepest, now)
        elif character in b"]}":
            now -= 1
    return deepest


def component(name: object) -> str:
    """Return a name that stands for one file or folder. Raises ValueError if it leads anywhere else."""
    if not isinstance(name, str) or not _is_component(name):
        raise ValueError(f"{name!r:.100} is not the name of a file in it")
    return name


def _is_component(name: str) -> bool:
    return name not in {"", ".", ".."} and not any(one in name for one in "/\\\0") and name[1:2] != ":"


def moment_ms(at_ms: int) -> int:
    """Return a time in milliseconds since 1970. Raises ValueError if it is before that, or later than now: something
    made in the future counts for each day until then.
    """
    if not 0 <= at_ms <= time.time() * 1000 + MAX_AHEAD_MS:
        raise ValueError(f"{at_ms} is not a time in milliseconds between 1970 and now")
    return at_ms


def text(value: object) -> str:
    """Return a text without U+0000, which PostgreSQL does not hold. Raises TypeError if it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is not a text")
    return value.replace("\0", "")


def key(value: object, without: str = "") -> str:
    """Return what something is told apart by. Raises ValueError if it is too long, or holds characters that are
    invisible or of `without`; TypeError if it is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is not an id")
    if not 0 < len(value) <= MAX_KEY or not _LINE.match(value) or any(one in value for one in without):
        raise ValueError(f"{value!r:.100} is not an id: its length or its characters are not allowed")
    return value


def _is_plain_folder(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and os.access(place, os.R_OK | os.X_OK)


class Files:
    """The files of an export: those of a folder, or those of a zip file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if there is nothing, ValueError if the zip file is none, holds a name that leads out of it, or
        too much.
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
            raise ValueError(f"there are more than {MAX_FILES:,} files in it")
        for entry in entries:
            parts = tuple(component(part) for part in entry.orig_filename.removesuffix("/").split("/"))
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"{entry.filename!r} is a link")
            if entry.flag_bits & ENCRYPTED:
                raise ValueError(f"{entry.filename!r} is encrypted; pack it without a password")
            if entry.compress_type not in PACKED:
                raise ValueError(f"{entry.filename!r} is packed in another way than by deflate; pack it again")
            if entry.file_size > max(RATIO_FROM, entry.compress_size * MAX_RATIO):
                raise ValueError(f"{entry.filename!r} would become too large")
            if parts in self._entries:
                raise ValueError(f"{entry.filename!r} is in it twice")
            self._entries[parts] = entry
            if len(parts) == 2:  # noqa: PLR2004 - a folder and a file
                self._folders.setdefault(parts[0], []).append(parts[1])

    def json(self, *parts: object) -> Any:  # noqa: ANN401 - whatever is in it
        """Return what a file holds, or None if there is no such file."""
        place = tuple(component(part) for part in parts)
        with reading("/".join(place)):
            text = self._read(place)
            if text is None:
                return None
            require_few(text)
            return msgspec.json.decode(text)

    def names(self, folder: object) -> list[str]:
        """Return the names of the files in a folder, in order; none if there is no such folder."""
        name = component(folder)
        if self._zip is not None:
            return sorted(self._folders.get(name, []))
        place = self._inside((name,))
        return sorted(one.name for one in place.iterdir()) if place.is_dir() else []

    def folders(self) -> list[str]:
        """Return the names of the folders that files may be in, in order. Whatever else lies beside them is not of the
        export: links, and what has another name or may not be read.
        """
        if self._zip is not None:
            return sorted(self._folders)
        return sorted(one.name for one in self._root.iterdir() if _is_component(one.name) and _is_plain_folder(one))

    def _inside(self, parts: tuple[str, ...]) -> Path:
        place = self._root.joinpath(*parts)
        if place.resolve() != place:
            raise ValueError(f"{'/'.join(parts)!r} is a link")
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
        # What was read is counted: what the zip file says about itself may be wrong.
        self._left -= len(text)
        if len(text) > MAX_FILE or self._left < 0:
            raise ValueError("it is too large")
        return text
