"""Rows that PostgreSQL returns as JSON. One unreadable part never fails a page, a connection or a batch.

Rows may be older than a limit, restored, imported, or written by a newer server. Unreadable parts are left out. Their
messages get `is_unreadable`, and the log names each part once.
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
from uuid import UUID

import msgspec

from protocol import json_object
from protocol.codec import located
from protocol.limits import MAX_PAGE_BYTES, visible

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Value = TypeVar("Value")
Made = TypeVar("Made")

FIRST = UUID(int=0)
"""The id before all others. A first page begins after it, since `$1 IS NULL OR id > $1` cannot be found in an index."""
PORTION = 16 * 1024
"""Characters of rows that are decoded before other callbacks of the event loop run. Decoding them takes up to 0.4 ms
(docs/performance.md).
"""
MAX_DEPTH = 200
"""Max depth of a row. It is far above what `json_object.read` accepts, and far below what raises RecursionError."""
MAX_MENDED = 1_000
"""Max parts that are left out, per row."""
MAX_TOLD = 1_000
"""Max unreadable parts that are remembered, so that the log names each once."""
MAX_DIGITS = 300
STAND_INS: dict[str, object] = {"words": {"content": ""}, "content": ""}
"""Substitutes for fields without a default that clients have written."""
LONG_AGO = "1970-01-01T00:00:00Z"
"""Substitute for a time without a default. Such a field's name ends with `_at`."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]|[^"\[\]{}]+')
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<place>\d+)\]|\[\.\.\.\]")
_FIELD = re.compile(r"(?P<problem>missing required|contains unknown) field `(?P<name>\w+)`")
_told: set[tuple[str, str]] = set()


def fitting(found: Iterable[Iterable[Any]], most: int = MAX_PAGE_BYTES) -> int:
    """Return how many of these rows fit into a page of `most` bytes, by the size of all texts in them. The first row
    always fits.
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
    """The result of a query before decoding. It is decoded after the connection is returned to the pool. Others wait
    for a connection, and decoding takes one turn of the loop per portion.
    """

    __slots__ = ("_decode",)

    def __init__(self, decode: Callable[[], Awaitable[Value]]) -> None:
        self._decode = decode

    async def decoded(self) -> Value:
        """Return the decoded rows. Other callbacks of the event loop run between portions."""
        return await self._decode()

    def then(self, make: Callable[[Value], Made]) -> "Undecoded[Made]":
        """Return the result of `make` on the decoded rows, also undecoded."""

        async def decode() -> Made:
            return make(await self._decode())

        return Undecoded(decode)


class Page(NamedTuple, Generic[Row]):
    """Readable rows, and the key after which the next page begins. `after` is None if no rows follow,
    readable or not.
    """

    rows: list[Row]
    after: Any


class Reader(Generic[Row]):
    """Decodes rows of one type."""

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
        """Return a row without its unreadable parts. Raises ValidationError if the rest is not a row."""
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
        """Return a row. Return None and log it if too little is readable."""
        try:
            return self.decode(text)
        except msgspec.ValidationError as error:
            _tell(_name([_parsed(text)]), f"{error}: the row was left out")
            return None

    def few(self, texts: Iterable[str]) -> list[Row]:
        """Return rows without the unreadable ones, immediately, because a transaction may wait for them."""
        return [row for text in texts if (row := self.read(text)) is not None]

    def each(self, texts: Iterable[str]) -> Undecoded[list[Row]]:
        """Return rows without the unreadable ones."""
        return self.beside([(text,) for text in texts]).then(_first)

    def every(self, text: str) -> list[Row]:
        """Return the rows of a JSON array without the unreadable ones."""
        try:
            return self._list_decoder.decode(text)
        except (RecursionError, msgspec.ValidationError):
            return self.few(msgspec.json.encode(one).decode() for one in _parsed(text))

    def beside(self, found: Sequence[Any]) -> Undecoded[list[tuple[Row, Any]]]:
        """Return pairs of a decoded row and all its columns. The first column is the row's JSON. Rows that `read`
        leaves out are left out. So are rows whose first column is NULL, because the reader may not see them.
        """
        return Undecoded(partial(self._in_portions, found))

    def page(self, found: Sequence[Any], limit: int, key: Callable[[Any], Any] = itemgetter(1)) -> Undecoded[Page[Row]]:
        """Return the first `limit` rows of a query that asked for `limit` + 1, or as many as fit into a page. `found`
        is as in `beside`.

        `key` returns the sort key of a row's columns. It does not read the decoded row, because the last one of a page
        may be unreadable.
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

    def _mended(self, value: Any) -> Row:  # noqa: ANN401 - any JSON value
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
    """Remove the smallest part of a row that explains a decoder's error. Return False if only the whole row does."""
    what, path = located(problem)
    steps: list[str | int] = []
    for one in _STEP.finditer(path):
        if one["name"] is None and one["place"] is None:
            break  # msgspec does not name the keys of this object, so remove the object
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
    """Mark the message around a removed part as unreadable."""
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
    """Return an older text without the characters that names and links may not contain today."""
    if not isinstance(text, str):
        return text
    kept = visible(text)
    return quote(kept, safe="%:/?#[]@!$&'()*+,;=~-._") if kept.startswith(("http://", "https://")) else kept


def _shallow(text: str) -> str:
    """Return JSON with null in place of values below `MAX_DEPTH`. The depth of `text` may be unlimited."""
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
    """Return an integer. Return None if it has more digits than a decoder accepts."""
    return int(digits) if len(digits) <= MAX_DIGITS else None
