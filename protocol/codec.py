"""The codec: frames to JSON and back by msgspec, and WebSocket frame headers."""

import difflib
import re
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar, get_args

import msgspec

from protocol import json_object
from protocol.choices import choices
from protocol.client import ClientFrame, FrameId
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_EXTREME_NUMBERS, MAX_FRAME_VALUES, RULES
from protocol.server import ServerFrame

Decoded = TypeVar("Decoded")

_encoder = msgspec.json.Encoder()
_client_decoder: msgspec.json.Decoder[ClientFrame] = msgspec.json.Decoder(ClientFrame, dec_hook=json_object.accept)
_server_decoder: msgspec.json.Decoder[ServerFrame] = msgspec.json.Decoder(ServerFrame, dec_hook=json_object.read)

PROTOCOL = "docs/protocol.md"

_AT = re.compile(r"(?P<what>.*) - at (?:`key` in )?`\$(?P<path>[^`]*)`\Z", re.DOTALL)
_UNKNOWN = re.compile(r"Invalid (?:enum )?value ")
_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*)`\Z", re.DOTALL)
_NAMED = re.compile(r"`([a-z_0-9]+)`")
_MISMATCH = re.compile(r"Expected `(?P<wanted>[^`]*)`(?:, got `(?P<given>[^`]*)`)?\.?\Z")
_MAX_QUOTED, _QUOTED = 200, 80
"""Max characters of msgspec's text, which may quote a value or name of any length. Longer texts are shortened."""
_RULES = {f"Expected `str` matching regex {pattern!r}": sentence for pattern, sentence in RULES.items()}

_ADVICE = tuple(
    (re.compile(rf"{pattern}\.?\Z"), sentence)
    for pattern, sentence in (
        (r"Expected `str` of length >= 1", "Give at least 1 character."),
        (r"Expected `str` of length >= (\d+)", r"Give at least \1 characters."),
        (r"Expected `str` of length <= (\d+)", r"Give at most \1 characters."),
        (r"Expected `array` of length >= 1", "Give at least 1 element."),
        (r"Expected `array` of length >= (\d+)", r"Give at least \1 elements."),
        (r"Expected `array` of length <= (\d+)", r"Give at most \1 elements."),
        (r"Expected `object` of length <= (\d+)", r"Give at most \1 entries."),
        (r"Expected `(int|float)` >= (\S+)", r"Give a number of at least \2."),
        (r"Expected `(int|float)` <= (\S+)", r"Give a number of at most \2."),
        (r"Expected `(int|float)` < (\S+)", r"Give a number less than \2."),
        (r"Expected `datetime` with a timezone component", "Give a time with its zone, such as 2027-01-31T12:00:00Z."),
        (r"Expected `time` with no timezone component", "Give a time of day without a zone, such as 22:00:00."),
        (r"Number out of range", "Give a smaller number."),
        (r"Integer value out of range", "Give an integer that fits in 64 bits."),
        (r"Invalid RFC3339 encoded datetime", "Give a time such as 2027-01-31T12:00:00Z."),
        (r"Invalid RFC3339 encoded time", "Give a time of day such as 22:00:00."),
        (r"Invalid UUID", "Give a UUID such as 01a20000-0000-7000-8000-000000000001."),
        (r"(Invalid (?:enum )?value .*)", rf"\1. Give one of those in {PROTOCOL}."),
        (r"Object missing required field (`.*`)", r"Give \1."),
        (r"Object contains unknown field (`.*`)", r"Remove \1: there is no such field."),
    )
)
"""Sentences that replace msgspec's texts and say what to do."""
_WORDS = {
    "str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", "array": "a list",
    "object": "an object", "null": "null", "uuid": "a UUID", "datetime": "a time", "time": "a time of day",
}  # fmt: skip
"""The words of docs/protocol.md for msgspec's types."""
_TYPES = [str(frame.__struct_config__.tag) for frame in get_args(ClientFrame)]
_MAX_GUESSED = 24
"""Max characters of an unknown type that is compared with the known types."""
_ABOUT = 2
"""Max difference in length of the types that are compared."""

_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{3}")

_SHORT, _MEDIUM = 126, 1 << 16


_HEAD = re.compile(
    rb"""\s*\{\s*(?:"type"\s*:\s*"\w*"\s*,\s*)?"id"\s*:\s*(-?(?:0|[1-9][0-9]{0,14})|"[ !#-\[\]-~]{0,64}")\s*[,}]"""
)
"""The beginning of a frame as client libraries write it. Its `id` can be read even if the rest is invalid."""


class _Label(msgspec.Struct):
    id: FrameId | None = None


class _Kind(msgspec.Struct):
    type: str


_label_decoder = msgspec.json.Decoder(_Label)
_id_decoder: msgspec.json.Decoder[FrameId] = msgspec.json.Decoder(FrameId)
_kind_decoder = msgspec.json.Decoder(_Kind)


def encode(value: object) -> bytes:
    """Return `value` as JSON."""
    return _encoder.encode(value)


def decode_client(data: bytes | str) -> ClientFrame:
    """Return the frame that a client sent. Raises Refused, with the path of the bad field, if it is invalid."""
    raw = data.encode() if isinstance(data, str) else data
    if _are_too_many(raw):
        raise Refused(ErrorCode.BAD_FRAME, f"The frame has more than {MAX_FRAME_VALUES} values. Split it.")
    if _are_extreme(raw) and _are_extreme(json_object.STRING.sub(b"", raw)):
        raise Refused(
            ErrorCode.BAD_FRAME,
            f"The frame has more than {MAX_EXTREME_NUMBERS} numbers with three-digit exponents. Split it.",
        )
    return decode(raw, _client_decoder)


def decode_server(data: bytes | str) -> ServerFrame:
    """Return the frame that a server sent, for clients. Raises Refused if it is invalid."""
    return decode(data, _server_decoder)


def decode(data: bytes | str, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """Return `data` decoded. Raises Refused with a sentence that a person can act on."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), decoder.type, kind(data)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refused(
            ErrorCode.BAD_FRAME,
            "The text is not valid JSON. Send one JSON object in UTF-8, without unpaired surrogates.",
        ) from None
    except RecursionError:
        raise Refused(ErrorCode.BAD_FRAME, "The JSON is nested too deeply. Use fewer levels.") from None


def label(data: bytes | str) -> FrameId | None:
    """Return the `id` of a frame that could not be decoded, or None if it cannot be read."""
    try:
        return _label_decoder.decode(data).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = _HEAD.match(data.encode() if isinstance(data, str) else data)
        return None if head is None else _id_decoder.decode(head[1])


def kind(data: bytes | str) -> str | None:
    """Return the type of a frame, or None if it cannot be read."""
    try:
        return _kind_decoder.decode(data).type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def tag(frame: type[msgspec.Struct]) -> str:
    """Return the `type` of a frame."""
    return str(frame.__struct_config__.tag)


def text_frame(payload: bytes, *, is_compressed: bool = False) -> bytes:
    """Return `payload` as one unmasked, final WebSocket text frame (RFC 6455, section 5.2). With `is_compressed`, mark
    it as compressed (RFC 7692, section 6).
    """
    header = _header(len(payload))
    return (b"\xc1" + header[1:] if is_compressed else header) + payload


def is_text_frame(data: bytes) -> bool:
    """Whether `data` is a payload with the header of `text_frame`."""
    size = 2 if len(data) < _SHORT + 2 else 4 if len(data) < _MEDIUM + 4 else 10
    return len(data) >= size and data[:size] == _header(len(data) - size)


def payload(frame: bytes) -> bytes:
    """Return the payload of a frame that `text_frame` made."""
    return frame[2 if frame[1] < _SHORT else 4 if frame[1] == _SHORT else 10 :]


def _header(size: int) -> bytes:
    if size < _SHORT:
        return bytes((0x81, size))
    if size < _MEDIUM:
        return b"\x81\x7e" + size.to_bytes(2)
    return b"\x81\x7f" + size.to_bytes(8)


def now() -> datetime:
    """Return the current time, in UTC."""
    return datetime.now(UTC)


def _count(data: bytes) -> int:
    # Each value but the outermost follows one of these, or the name of its field.
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _are_too_many(data: bytes) -> bool:
    """Return whether a frame has more than `MAX_FRAME_VALUES` values outside its strings. Nested arrays take the
    decoder twenty times as long as text of the same length.
    """
    if len(data) <= MAX_FRAME_VALUES or _count(data) <= MAX_FRAME_VALUES:
        return False
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")
    # Strings are values, too. Few frames have that many commas, so few are split.
    return bare.count(b'"') > 2 * MAX_FRAME_VALUES or _count(b"".join(bare.split(b'"')[::2])) > MAX_FRAME_VALUES


def _are_extreme(data: bytes) -> bool:
    # Such a number takes at least five bytes, as `1e300`, and a comma. Few frames are long enough to be scanned.
    if len(data) < 6 * MAX_EXTREME_NUMBERS:
        return False
    found = islice(_EXPONENT.finditer(data), MAX_EXTREME_NUMBERS + 1)
    return sum(1 for _ in found) > MAX_EXTREME_NUMBERS


def located(problem: str) -> tuple[str, str]:
    """Split msgspec's text of a bad field into problem and path: "… - at `$.mentions[3]`" gives `.mentions[3]`."""
    found = _AT.match(problem)
    return (found["what"], found["path"]) if found else (problem, "")


def _refusal(problem: str, kind_of_all: object, tag: str | None) -> Refused:
    what, path = located(problem)
    if len(what) > _MAX_QUOTED and not what.startswith("Expected"):
        what = f"{what[:_QUOTED]}…{what[-_QUOTED:]}"
    known = choices(kind_of_all, path, tag=tag) if _UNKNOWN.match(what) else []
    path = path.removeprefix(".")
    if path == "type" or (not path and "required field `type`" in what):
        return Refused(ErrorCode.BAD_FRAME, _known_types(what), path="type")
    named = _FIELD.match(what)
    if named is None and not what.startswith(("Expected", "Invalid")):
        named = _NAMED.search(what)  # a sentence from protocol/
    if named is not None:
        path = f"{path}.{named[1]}" if path else named[1]
    sentence = f"{what}. Give {_any_of(known)}." if known else advice(what)
    return Refused(ErrorCode.INVALID, sentence, path=path or None)


def _any_of(known: list[str]) -> str:
    quoted = [f"`{one}`" for one in known]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def advice(what: str) -> str:
    """Return a sentence to act on for msgspec's text about a value."""
    what = what.replace(" | null`", "`")
    if (rule := _RULES.get(what)) is not None:
        return rule
    if (found := _MISMATCH.match(what)) is not None:
        wanted = " or ".join(_WORDS.get(one, one) for one in found["wanted"].split(" | "))
        given = found["given"]
        return f"Give {wanted}." if given is None else f"Give {wanted}, not {_WORDS.get(given, given)}."
    for pattern, sentence in _ADVICE:
        if (found := pattern.match(what)) is not None:
            return found.expand(sentence)
    return what if what.endswith(".") else f"{what}."


def _known_types(what: str) -> str:
    named = what.partition("'")[2].rpartition("'")[0]
    if named in _TYPES:
        return f"Give `type` only once; the second is `{named}`."
    alike = [one for one in _TYPES if abs(len(one) - len(named)) <= _ABOUT]
    near = difflib.get_close_matches(named, alike, n=1) if 0 < len(named) <= _MAX_GUESSED else []
    known = f"one of the frame types in {PROTOCOL}"
    return f"`type` must be {f'`{near[0]}`, or another ' if near else ''}{known}."
