"""Every bound of a field, found from the types: a value at the bound is accepted, and one beyond it is refused."""

import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec import inspect

from protocol.codec import decode, decode_client
from protocol.errors import ErrorCode, Refused
from protocol.http import ChangePassword, Confirm, Login, Register
from protocol.ids import uuid7
from protocol.limits import MAX_CONTENT, MAX_PAGE, MAX_POLL_OPTIONS, MAX_RESUMED, MAX_WATCHED
from server.ops.transfer import reading
from server.routes import ROUTES
from tests.test_hostile_values import valid

BODIES = (Register, Login, Confirm, ChangePassword)
CLIENT: list[type[msgspec.Struct]] = [*ROUTES, *BODIES]
PAIR = 2
"""Number of types of an optional field."""


class Bound(NamedTuple):
    """A field with a bound, and values at the bound and beyond it."""

    frame: type[msgspec.Struct]
    way: tuple[str | int, ...]
    name: str
    bound: int | float
    last: Any
    beyond: Any

    def __str__(self) -> str:
        return f"{self.frame.__name__}.{'.'.join(map(str, self.way))} {self.name} {self.bound}"


def text(pattern: str | None, name: str, length: int) -> str:
    """Return a text of a given length that a pattern allows."""
    begin, end, fill = "", "", "x"
    if pattern is not None and "https" in pattern:
        begin = "https://example.org/"
    elif pattern is not None and "@" in pattern:
        begin = "a@"
    elif name == "mime_type":
        begin = "image/"
    elif name == "emoji":
        begin = end = ":"
    return begin + fill * (length - len(begin) - len(end)) + end


def items(kind: inspect.ListType | inspect.DictType, count: int) -> Any:
    """Return a list or object of `count` different entries."""
    if isinstance(kind, inspect.DictType):
        return {str(uuid7()): 0 for _ in range(count)}
    match kind.item_type:
        case inspect.UUIDType():
            return [str(uuid7()) for _ in range(count)]
        case inspect.LiteralType(values=values):
            return [values[place % len(values)] for place in range(count)]
        case inspect.IntType():
            # With more entries than different values, the count is beyond the bound anyway.
            return [place % MAX_POLL_OPTIONS for place in range(count)]
    return [f"entry {place}" for place in range(count)]


def ends(  # noqa: C901 - one case for each type
    kind: inspect.Type, name: str
) -> Iterator[tuple[str, int | float, Any, Any]]:
    """Return the bounds of a type, each with a value at the bound and one beyond."""
    match kind:
        case inspect.StrType():
            if kind.max_length is not None:
                most = kind.max_length
                yield "max_length", most, text(kind.pattern, name, most), text(kind.pattern, name, most + 1)
            if kind.min_length:
                least = kind.min_length
                if least == 1 and name not in {"emoji", "website", "image", "url", "poster", "endpoint"}:
                    yield "min_length", 1, "x", ""
                elif name in {"password", "new_password", "p256dh", "auth", "email"}:
                    yield "min_length", least, text(kind.pattern, name, least), text(kind.pattern, name, least - 1)
        case inspect.ListType() | inspect.DictType():
            if kind.max_length is not None:
                yield "max_length", kind.max_length, items(kind, kind.max_length), items(kind, kind.max_length + 1)
            if kind.min_length:
                yield "min_length", kind.min_length, items(kind, kind.min_length), items(kind, kind.min_length - 1)
        case inspect.IntType() | inspect.FloatType():
            step = 1 if isinstance(kind, inspect.IntType) else 0.001
            for bound, value, sign in (
                ("ge", kind.ge, -1), ("le", kind.le, 1), ("gt", kind.gt, -1), ("lt", kind.lt, 1),
            ):  # fmt: skip
                if value is not None:
                    inside = value if bound in {"ge", "le"} else value - sign * step
                    yield bound, value, inside, inside + sign * step


def places(kind: inspect.Type, name: str, way: tuple[str | int, ...]) -> Iterator[tuple[Any, ...]]:
    """Return the bounds of a type and of all types in it, each with its path."""
    for found in ends(kind, name):
        yield (way, *found)
    match kind:
        case inspect.UnionType():
            for one in kind.types:
                marked = (
                    (*way, one.cls.__name__) if isinstance(one, inspect.StructType) and len(kind.types) > 2 else way
                )
                yield from places(one, name, marked)
        case inspect.StructType():
            for field in kind.fields:
                yield from places(field.type, field.encode_name, (*way, field.encode_name))
        case inspect.ListType():
            yield from places(kind.item_type, name, (*way, 0))


def bounds() -> list[Bound]:
    found = []
    for frame in CLIENT:
        about = inspect.type_info(frame)
        assert isinstance(about, inspect.StructType)
        found += [Bound(frame, *place) for place in places(about, "", ()) if place[0] != ("id",)]
    return found


BOUNDS = bounds()


def put(kind: inspect.Type, value: Any, way: tuple[str | int, ...], leaf: Any) -> Any:
    """Return the valid value `value` with the value at a path replaced by `leaf`."""
    if not way:
        return leaf
    step, *rest = way
    match kind:
        case inspect.UnionType():
            structs = [one for one in kind.types if isinstance(one, inspect.StructType)]
            named = [one for one in structs if one.cls.__name__ == step]
            if named:
                return put(named[0], valid(named[0], "", {}), tuple(rest), leaf)
            lists = [one for one in kind.types if isinstance(one, inspect.ListType)]
            inner: inspect.Type = [*structs, *lists][0]
            return put(inner, valid(inner, "", {}), way, leaf)
        case inspect.ListType():
            return [put(kind.item_type, None, tuple(rest), leaf), *(value or [])[1:]]
        case inspect.StructType():
            (field,) = [one for one in kind.fields if one.encode_name == step]
            inner = valid(field.type, field.encode_name, {})
            return (value or {}) | {step: put(field.type, inner, tuple(rest), leaf)}
    raise TypeError(kind)


ONE_OF = {"after_order": "before_order", "invite_code": "conversation_id"}
"""Fields that exclude each other."""


def answer(bound: Bound, leaf: Any) -> Refused | None:
    """Return the refusal of a frame or body with a value in the place of the bound, or None."""
    about = inspect.type_info(bound.frame)
    frame = put(about, valid(about, "", {}), bound.way, leaf)
    frame.pop(ONE_OF.get(str(bound.way[-1])), None)
    if bound.frame.__name__ == "Search" and "text" not in frame:
        frame["text"] = "words"
    try:
        if bound.frame in BODIES:
            decode(json.dumps(frame), msgspec.json.Decoder(bound.frame))
        else:
            decode_client(json.dumps(frame))
    except Refused as refused:
        return refused
    return None


def test_every_bound_of_every_field_is_exact() -> None:
    assert len(BOUNDS) > 200
    wrong = []
    for bound in BOUNDS:
        accepted, refused = answer(bound, bound.last), answer(bound, bound.beyond)
        if accepted is not None:
            wrong.append((str(bound), "refused at the bound", accepted.message, accepted.path))
        field = [step for step in bound.way if isinstance(step, str)][-1]
        if refused is None:
            wrong.append((str(bound), "accepted beyond the bound", "", ""))
        elif refused.code is not ErrorCode.INVALID or field not in (refused.path or ""):
            wrong.append((str(bound), "refused for something else", refused.message, refused.path))
    assert wrong == []


def test_bounds_of_fields_match_the_documented_limits() -> None:
    """docs/limits.md and `ready.limits` name these numbers."""
    has = {(bound.frame.__name__, bound.way[-1], bound.name): bound.bound for bound in BOUNDS}
    assert has["Resume", "versions", "max_length"] == MAX_RESUMED == 5_000
    assert has["Send", "options", "max_length"] == has["Vote", "options", "max_length"] == MAX_POLL_OPTIONS == 20
    assert has["Send", "options", "min_length"] == 2
    assert has["Watch", "user_ids", "max_length"] == MAX_WATCHED == 500
    assert has["Send", "content", "max_length"] == MAX_CONTENT == 10_000
    assert has["History", "limit", "le"] == MAX_PAGE == 100
    assert has["UpdateConversation", "slow_mode_seconds", "le"] == 6 * 3_600


def test_every_list_and_text_from_a_client_is_bounded() -> None:
    """Exceptions are `metadata` and `settings.custom`, bounded as a whole, and times, ids and enumerations."""

    def loose(kind: inspect.Type, way: str) -> Iterator[str]:
        match kind:
            case inspect.UnionType():
                for one in kind.types:
                    yield from loose(one, way)
            case inspect.StructType():
                for field in kind.fields:
                    yield from loose(field.type, f"{way}.{field.encode_name}")
            case inspect.ListType() | inspect.DictType() | inspect.StrType():
                if kind.max_length is None:
                    yield way

    assert [place for frame in CLIENT for place in loose(inspect.type_info(frame), frame.__name__)] == []


@pytest.mark.parametrize("length", [1, 1_000])
def test_lines_of_an_import_are_bounded(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE", length)
    fits, is_longer = b"x" * (length - 1) + b"\n", b"x" * length + b"\n"
    assert list(reading.lines(io.BytesIO(fits * 2))) == [(1, fits), (2, fits)]
    with pytest.raises(ValueError, match=f"line 2: the line is longer than {length:,} bytes"):
        list(reading.lines(io.BytesIO(fits + is_longer)))


def test_nesting_in_lines_of_an_import_is_bounded() -> None:
    reading.require_shallow(b"[" * 64 + b"]" * 64)
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        reading.require_shallow(b"[" * 65 + b"]" * 65)
    assert reading.MAX_LINE == 64 * 1024**2
