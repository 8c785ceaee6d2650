"""JSON objects with free content, and the limits of that content."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from protocol.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES, MAX_METADATA_BYTES


class _Object(dict[str, Any]):
    """A JSON object with free content. It is a class of its own so that decoders call the hooks below."""


if TYPE_CHECKING:
    Json = dict[str, Any]
else:
    Json = Annotated[_Object, Meta(extra_json_schema={"type": "object"})]


# The closing quotation mark is optional, because matching many unterminated strings would take quadratic time.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A string in encoded JSON."""
MAX_READ_DEPTH = 64
"""Max depth of an object from a server or from storage, levels. It exceeds `MAX_JSON_DEPTH` because older
objects do.
"""
_encode = msgspec.json.Encoder().encode


def accept(kind: type, value: object) -> object:
    """Return `value` as a `kind`: the decoder's hook for frames of clients. Raises ValueError beyond the limits."""
    made = _object(kind, value)
    try:
        size = len(_encode(made))
    except RecursionError:
        raise _too_deep(MAX_JSON_DEPTH) from None
    if size <= MAX_METADATA_BYTES:
        size += _check(made)
    if size > MAX_METADATA_BYTES:
        raise ValueError(
            f"The object is longer than {MAX_METADATA_BYTES} bytes, with its numbers written out in full. Shorten it."
        )
    return made


def read(kind: type, value: object) -> object:
    """Return `value` as a `kind`: the decoder's hook for frames of servers. Raises ValueError if it is nested too
    deeply.
    """
    made = _object(kind, value)
    _require_depth(made, MAX_READ_DEPTH)
    return made


def _object(kind: type, value: object) -> _Object:
    if kind is not _Object or not isinstance(value, dict):
        raise ValueError("Give an object.")
    return _Object(value)


def _check(made: _Object) -> int:
    """Return how many more digits PostgreSQL needs for the numbers in an object, because it writes them without
    exponents. Raises ValueError if PostgreSQL or other languages cannot store the object.
    """
    digits = 0
    for one in _items(made, MAX_JSON_DEPTH, most=MAX_JSON_VALUES):
        if isinstance(one, str):
            if "\0" in one:
                raise ValueError("The character U+0000 is not allowed. Remove it.")
        elif isinstance(one, int):
            if not -(2**63) <= one < 2**64:
                raise ValueError("Integers must fit in 64 bits.")
        elif isinstance(one, float) and one:
            digits += abs(math.floor(math.log10(abs(one))))
    return digits


def _items(made: _Object, depth: int, most: int | None = None) -> list[object]:
    """Return all keys and values in an object, level by level. Raises ValueError beyond `depth` levels or
    `most` items.
    """
    found: list[object] = []
    level: list[Any] = [made]
    for _ in range(depth):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                found.extend(one)
                inner.extend(one.values())
            else:
                inner.extend(one)
        found.extend(inner)
        if most is not None and len(found) > most:
            raise ValueError(f"The object has more than {most} keys and values. Encode some of them as one string.")
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return found
    raise _too_deep(depth)


def _require_depth(made: _Object, depth: int) -> None:
    """Raise ValueError if an object nests deeper. Only containers are visited, because a page has hundreds of
    objects.
    """
    level: list[Any] = [made]
    for _ in range(depth):
        level = [
            inner
            for one in level
            for inner in (one if type(one) is list else one.values())
            if inner and (type(inner) is list or type(inner) is dict)
        ]
        if not level:
            return
    raise _too_deep(depth)


def _too_deep(depth: int) -> ValueError:
    return ValueError(f"The object is nested more than {depth} levels deep. Use fewer levels.")
