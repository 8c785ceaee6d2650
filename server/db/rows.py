"""Rows that PostgreSQL writes as JSON, decoded so that one unreadable part never ends a page, a connection or a batch.

Rows may be older than a bound, restored, imported, or written by a newer server. A part that cannot be read is left
out, its message says `is_unreadable`, and the log names it once.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar, overload
from urllib.parse import quote

import msgspec

from protocol import json_object
from protocol.codec import located
from protocol.limits import MAX_PAGE_BYTES, visible

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Value = TypeVar("Value")
Made = TypeVar("Made")

PORTION = 16 * 1024
"""Characters of rows that are read before whatever waits for the loop has a turn: 0.4 ms of metadata at its bounds
(docs/performance.md).
"""
MAX_DEPTH = 200
"""Max depth of a row: far beyond what `json_object.read` lets through, far below what ends in RecursionError."""
MAX_MENDED = 1_000
"""Max parts that are left out of one row."""
MAX_TOLD = 1_000
"""Max unreadable parts that are remembered, so that the log names each once."""
MAX_DIGITS = 300
STAND_INS: dict[str, object] = {"words": {"content": ""}, "content": ""}
"""Values for fields that have no default and that clients have written."""
LONG_AGO = "1970-01-01T00:00:00Z"
"""Stands in for a time that has no default, whose field ends in `_at`."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]|[^"\[\]{}]+')
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<place>\d+)\]|\[\.\.\.\]")
_FIELD = re.compile(r"(?P<problem>missing required|contains unknown) field `(?P<name>\w+)`")
_told: set[tuple[str, str]] = set()


def fitting(found: Iterable[Iterable[Any]], most: int = MAX_PAGE_BYTES) -> int:
    """Return how many of these rows fit into a page of `most` bytes, by all texts in them: one at least, if there is
    one.
    """
    count = total = 0
    for columns in found:
        for text in columns:
            if isinstance(text, str):
                total += len(text) if text.isascii() else len(text.encode())
        if count and total > most:
            break
        count += 1
    return count


class Undecoded(Generic[Value]):
    """What a query found. It is decoded once the connection is given back: others wait for one, and decoding takes a
    turn of the loop for each portion.
    """

    __slots__ = ("_decode",)

    def __init__(self, decode: Callable[[], Awaitable[Value]]) -> None:
        self._decode = decode

    async def decoded(self) -> Value:
        """Return it. Whatever waits for the loop has a turn between portions of its rows."""
        return await self._decode()

    def then(self, make: Callable[[Value], Made]) -> "Undecoded[Made]":
        """Return what `make` will make of it."""

        async def decode() -> Made:
            return make(await self._decode())

        return Undecoded(decode)


class Page(NamedTuple, Generic[Row]):
    """Rows that can be read, and where the next page begins: None if there are no more, readable or not."""

    rows: list[Row]
    after: Any


class Reader(Generic[Row]):
    """Decodes rows of one kind."""

    @overload
    def __init__(self, kind: type[Row]) -> None: ...

    @overload
    def __init__(self: "Reader[Any]", kind: Any) -> None: ...  # noqa: ANN401 - a union has no other type

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.json.Decoder[Row] = msgspec.json.Decoder(kind, dec_hook=json_object.read)
        self._list_decoder: msgspec.json.Decoder[list[Row]] = msgspec.json.Decoder(
            list[kind], dec_hook=json_object.read
        )

    def decode(self, text: str) -> Row:
        """Return a row. Raises ValidationError if what is left without its unreadable parts is not one."""
        try:
            return self._decoder.decode(text)
        except RecursionError:
            return self._mended(_parsed(text))
        except msgspec.ValidationError as error:
            value = _parsed(text)
            if not _mend(value, str(error)):
                raise
            return self._mended(value)

    def read(self, text: str) -> Row | None:
        """Return a row; None, which is logged, if too little of it can be read."""
        try:
            return self.decode(text)
        except msgspec.ValidationError as error:
            _tell(_name([_parsed(text)]), f"{error}: the row was left out")
            return None

    def few(self, texts: Iterable[str]) -> list[Row]:
        """Return rows, without those of which too little can be read, at once: a transaction may wait for them."""
        return [row for text in texts if (row := self.read(text)) is not None]

    def each(self, texts: Iterable[str]) -> Undecoded[list[Row]]:
        """Return rows, without those of which too little can be read."""
        return self.beside([(text,) for text in texts]).then(_first)

    def every(self, text: str) -> list[Row]:
        """Return the rows of a JSON array, without those of which too little can be read."""
        try:
            return self._list_decoder.decode(text)
        except (RecursionError, msgspec.ValidationError):
            return self.few(msgspec.json.encode(one).decode() for one in _parsed(text))

    def beside(self, found: Sequence[Any]) -> Undecoded[list[tuple[Row, Any]]]:
        """Return pairs: the row that `read` makes of the first column, which is JSON, and all columns. Rows that `read`
        leaves out, or whose first column is NULL since the reader may not see them, are left out.
        """
        return Undecoded(partial(self._in_portions, found))

    def page(self, found: Sequence[Any], limit: int, key: Callable[[Any], Any] = itemgetter(1)) -> Undecoded[Page[Row]]:
        """Return the first `limit` of the rows that a query found, which asked for one more, as `beside` takes them, or
        as many as fit into a page.

        `key` tells where a row stands. It reads columns, not the row: the last one of a page may be unreadable.
        """
        count = fitting(found[:limit])
        after = key(found[count - 1]) if len(found) > count else None
        return self.beside(found[:count]).then(lambda read: Page(_first(read), after))

    async def _in_portions(self, found: Sequence[Any]) -> list[tuple[Row, Any]]:
        read: list[tuple[Row, Any]] = []
        portion = 0
        for columns in found:
            if columns[0] is None:
                continue
            if portion > PORTION:
                portion = 0
                await asyncio.sleep(0)
            portion += len(columns[0])
            if (row := self.read(columns[0])) is not None:
                read.append((row, columns))
        return read

    def _mended(self, value: Any) -> Row:  # noqa: ANN401 - whatever JSON holds
        for _ in range(MAX_MENDED):
            try:
                return self._decoder.decode(msgspec.json.encode(value))
            except msgspec.ValidationError as error:
                if not _mend(value, str(error)):
                    raise
        raise msgspec.ValidationError("Too much of a row is unreadable.")


def _first(read: list[tuple[Row, Any]]) -> list[Row]:
    return [row for row, _ in read]


def _mend(value: Any, problem: str) -> bool:  # noqa: ANN401 - as above
    """Leave out the smallest part of a row that explains a decoder's problem; False if that is all of it."""
    what, path = located(problem)
    steps: list[str | int] = []
    for one in _STEP.finditer(path):
        if one["name"] is None and one["place"] is None:
            break  # a value in an object whose keys msgspec does not name: the object goes
        steps.append(one["name"] if one["place"] is None else int(one["place"]))
    around = [value]
    for at in steps:
        around.append(around[-1][at])
    if field := _FIELD.search(what):
        name = field["name"]
        if field["problem"] == "contains unknown":
            del around[-1][name]
            return True
        if (stand_in := LONG_AGO if name.endswith("_at") else STAND_INS.get(name)) is not None:
            around[-1][name] = stand_in
            return True
    if not steps:
        return False
    owner, step = around[-2], steps[-1]
    shown = _shown(owner[step]) if "matching regex" in what else owner[step]
    if shown != owner[step]:
        owner[step] = shown
        return True
    del owner[step]
    _mark(around[:-1])
    _tell(f"{path} of {_name(around)}", what)
    return True


def _mark(around: list[Any]) -> None:
    """Have the message that lost a part say so."""
    for one in reversed(around):
        if isinstance(one, dict) and "sent_version" in one:
            one["is_unreadable"] = True
            return


def _name(around: list[Any]) -> str:
    """Return the innermost id around a part."""
    for one in reversed(around):
        if isinstance(one, dict):
            for name in ("id", "message_id", "conversation_id"):
                if isinstance(one.get(name), str):
                    return str(one[name])
    return "a row without an id"


def _tell(part: str, what: str) -> None:
    if (part, what) not in _told and len(_told) < MAX_TOLD:
        _told.add((part, what))
        log.warning("unreadable %s: %s", part, what)


def _shown(text: object) -> object:
    """Return a text from before a rule about its characters, without those that names and links may not have."""
    if not isinstance(text, str):
        return text
    kept = visible(text)
    return quote(kept, safe="%:/?#[]@!$&'()*+,;=~-._") if kept.startswith(("http://", "https://")) else kept


def _shallow(text: str) -> str:
    """Return JSON without what is nested beyond `MAX_DEPTH`, for which null stands. It may be nested without end."""
    kept: list[str] = []
    depth = 0
    for token in _TOKEN.findall(text):
        if token in {"]", "}"}:
            depth -= 1
            if depth < MAX_DEPTH:
                kept.append(token)
        elif token in {"[", "{"}:
            depth += 1
            if depth <= MAX_DEPTH:
                kept.append(token)
            elif depth == MAX_DEPTH + 1:
                kept.append("null")
        elif depth <= MAX_DEPTH:
            kept.append(token)
    return "".join(kept)


def _parsed(text: str) -> Any:  # noqa: ANN401 - as above
    return json.loads(_shallow(text), parse_int=_number)


def _number(digits: str) -> int | None:
    """Return an integer; None if it has more digits than any decoder takes."""
    return int(digits) if len(digits) <= MAX_DIGITS else None
