"""Bytes to frames and back: JSON by msgspec, and the few bytes of WebSocket framing around it."""

import re
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

import msgspec

from protocol import json_object
from protocol.client import ClientFrame, FrameId
from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_EXTREME_NUMBERS, MAX_FRAME_VALUES, RULES
from protocol.server import ServerFrame

Decoded = TypeVar("Decoded")

_encoder = msgspec.json.Encoder()
_client_decoder: msgspec.json.Decoder[ClientFrame] = msgspec.json.Decoder(ClientFrame, dec_hook=json_object.accept)
_server_decoder: msgspec.json.Decoder[ServerFrame] = msgspec.json.Decoder(ServerFrame, dec_hook=json_object.read)

_AT = re.compile(r"(?P<what>.*) - at (?:`key` in )?`\$(?P<path>[^`]*)`\Z", re.DOTALL)
_NAMED = re.compile(r"`([a-z_]+)`")
_RULES = {f"Expected `str` matching regex {pattern!r}": sentence for pattern, sentence in RULES.items()}

_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{3}")

_SHORT, _MEDIUM = 126, 1 << 16


class _Label(msgspec.Struct):
    id: FrameId | None = None


class _Kind(msgspec.Struct):
    type: str


_label_decoder = msgspec.json.Decoder(_Label)
_kind_decoder = msgspec.json.Decoder(_Kind)


def encode(value: object) -> bytes:
    """Return `value` as JSON."""
    return _encoder.encode(value)


def decode_client(data: bytes | str) -> ClientFrame:
    """Return the frame a client sent. Raises Refused, with the bad field's path, if it is not one."""
    raw = data.encode() if isinstance(data, str) else data
    if _are_too_many(raw):
        raise Refused(ErrorCode.BAD_FRAME, f"A frame holds at most {MAX_FRAME_VALUES} values. Send several frames.")
    if _are_extreme(raw) and _are_extreme(json_object.STRING.sub(b"", raw)):
        raise Refused(
            ErrorCode.BAD_FRAME, f"A frame holds at most {MAX_EXTREME_NUMBERS} numbers with exponents of three digits."
        )
    return decode(raw, _client_decoder)


def decode_server(data: bytes | str) -> ServerFrame:
    """Return the frame a server sent: for clients. Raises Refused if it is not one."""
    return decode(data, _server_decoder)


def decode(data: bytes | str, decoder: msgspec.json.Decoder[Decoded]) -> Decoded:
    """Return `data` decoded. Raises Refused with a sentence that a person can act on."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refused(ErrorCode.BAD_FRAME, "This is not valid JSON in UTF-8.") from None
    except RecursionError:
        raise Refused(ErrorCode.BAD_FRAME, "The JSON is nested too deeply.") from None


def label(data: bytes | str) -> FrameId | None:
    """Return the id of a frame that could not be decoded, as far as it can be read."""
    try:
        return _label_decoder.decode(data).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def kind(data: bytes | str) -> str | None:
    """Return the type of a frame, as far as it can be read."""
    try:
        return _kind_decoder.decode(data).type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def text_frame(payload: bytes) -> bytes:
    """Return `payload` as one unmasked, final WebSocket text frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < _SHORT:
        return bytes((0x81, size)) + payload
    if size < _MEDIUM:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def _count(data: bytes) -> int:
    # Each value but the first of all follows one of these, or the name of its field.
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _are_too_many(data: bytes) -> bool:
    """Return whether a frame has more than `MAX_FRAME_VALUES` values outside its texts: arrays of arrays cost the
    decoder twenty times what text of the same length does.
    """
    if len(data) <= MAX_FRAME_VALUES or _count(data) <= MAX_FRAME_VALUES:
        return False
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")
    # Texts are values, too. Few frames have that many commas, and of those that do, few are split.
    return bare.count(b'"') > 2 * MAX_FRAME_VALUES or _count(b"".join(bare.split(b'"')[::2])) > MAX_FRAME_VALUES


def _are_extreme(data: bytes) -> bool:
    # Such a number takes five bytes at least, as `1e300`, and a comma: few frames are long enough to be looked through.
    if len(data) < 6 * MAX_EXTREME_NUMBERS:
        return False
    found = islice(_EXPONENT.finditer(data), MAX_EXTREME_NUMBERS + 1)
    return sum(1 for _ in found) > MAX_EXTREME_NUMBERS


def located(problem: str) -> tuple[str, str]:
    """Return what msgspec says of a bad field, and where, as in "… - at `$.mentions[3]`": here `.mentions[3]`."""
    found = _AT.match(problem)
    return (found["what"], found["path"]) if found else (problem, "")


def _refusal(problem: str) -> Refused:
    what, path = located(problem)
    path = path.removeprefix(".")
    if path == "type" or (not path and "required field `type`" in what):
        return Refused(ErrorCode.BAD_FRAME, "`type` must be one of the known frame types.", path="type")
    if (named := _NAMED.search(what)) and not what.startswith("Expected"):
        path = f"{path}.{named[1]}" if path else named[1]
    what = _RULES.get(what.replace("`str | null`", "`str`"), what)
    return Refused(ErrorCode.INVALID, what + ("" if what.endswith(".") else "."), path=path or None)
