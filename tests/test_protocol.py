"""Encoding and decoding of frames: valid frames survive a round trip, and invalid ones are refused with an error."""

import ast
import json
import re
import time
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Opcode
from websockets.protocol import CLIENT, OPEN, Protocol

from protocol import client
from protocol.codec import decode_client, decode_server, encode, label, text_frame
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.json_object import STRING
from protocol.limits import MAX_CONTENT, MAX_EXTREME_NUMBERS, MAX_FRAME_BYTES, MAX_FRAME_VALUES, MAX_JSON_VALUES
from protocol.server import Error, MessageSent
from server.describe import handbook
from server.gateway.websocket import MAX_EARLY_BYTES, MAX_FRAGMENTS, MESSAGE_SECONDS
from server.http.asyncapi import CLIENT_FRAMES
from server.limits.strikes import ALWAYS
from server.limits.token_bucket import TokenBuckets
from tests.trees import parsed

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=50)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@given(content=TEXT, metadata=st.dictionaries(TEXT, JSON, max_size=4), quoted=st.uuids() | st.none())
def test_frame_is_unchanged_by_encoding_and_decoding(
    content: str, metadata: dict[str, object], quoted: UUID | None
) -> None:
    frame = client.Send(
        conversation_id=ConversationId(uuid7()),
        message_id=MessageId(uuid7()),
        content=content,
        metadata=metadata,
        quoted_message_id=None if quoted is None else MessageId(quoted),
    )
    assert decode_client(encode(frame)) == frame
    assert json.loads(encode(frame))["content"] == content


@given(st.binary(max_size=200) | st.text(max_size=200) | JSON.map(json.dumps))
def test_arbitrary_bytes_are_refused_or_decode_to_a_frame(data: bytes | str) -> None:
    label(data)
    try:
        frame = decode_client(data)
    except Refused as refused:
        assert refused.code in {ErrorCode.BAD_FRAME, ErrorCode.INVALID}
        assert refused.message.endswith(".")
    else:
        assert isinstance(frame, CLIENT_FRAMES)


WRONG = [rb'"content":"cut \ud83d"}', b'"metadata":' + b"[" * 2_000, b"'"]


@pytest.mark.parametrize("wrong", WRONG, ids=["lone-surrogate", "too-deep", "not-json"])
def test_refusal_of_an_undecodable_frame_has_its_id(wrong: bytes) -> None:
    for head, expected in (
        (b'{"type":"send","id":7,', 7), (b'{ "id" : "a-1" , "type":"send",', "a-1"), (b'{"id":-5,', -5),
        (b'{"id":0,', 0),
        (b'{"id":007,', None), (b'{"id":1e5,', None), (b'{"id":' + b"9" * 16 + b",", None), (b'{"id":"\\u0041",', None),
        (b'{"metadata":{"id":3},', None), (b'{"id":"' + b"x" * 65 + b'",', None), (b"", None),
    ):  # fmt: skip
        with pytest.raises(Refused):
            decode_client(head + wrong)
        assert label(head + wrong) == expected


@given(st.binary(max_size=70_000))
def test_websocket_frames_follow_the_standard(payload: bytes) -> None:
    reader = Protocol(CLIENT, state=OPEN)
    reader.receive_data(text_frame(payload))
    (frame,) = reader.events_received()
    assert (frame.opcode, frame.data, frame.fin) == (Opcode.TEXT, payload, True)  # type: ignore[union-attr]


def test_ids_are_uuid7_and_grow_with_time() -> None:
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made)), "ids grow within a millisecond"
    before, after = uuid7(), None
    while after is None or after.int >> 80 == before.int >> 80:
        after = uuid7()
    assert before < after
    assert (before.version, before.variant) == (7, "specified in RFC 4122")
    assert abs((before.int >> 80) / 1000 - time.time()) < 5


def test_server_frame_is_unchanged_by_encoding_and_decoding() -> None:
    error = Error(re="x", code=ErrorCode.CONFLICT, message="No.", path="message_id")
    assert decode_server(encode(error)) == error
    with pytest.raises(Refused):
        decode_server(b'{"type": "message_sent"}')
    assert MessageSent.__struct_config__.tag == "message_sent"


def test_close_codes_say_whether_to_reconnect() -> None:
    assert {code for code in CloseCode if not code.reconnect} == {4001, 4002, 4003, 4004}
    assert all(code.value in range(4000, 5000) or code.value in {1009, 1012} for code in CloseCode)
    closes = handbook.document().partition("## Close codes")[2].partition("\n## ")[0]
    said = {int(code): text for code, text in re.findall(r"^\| (\d+) \|(.*)", closes, re.MULTILINE)}
    assert said.keys() == set(CloseCode)
    strikes = {code for code in ErrorCode if f"`{code}`" in said[CloseCode.ABUSE]}
    assert strikes == ALWAYS
    assert f"{MAX_FRAGMENTS} fragments" in said[CloseCode.ABUSE]
    assert f"{MAX_EARLY_BYTES // 1024} KiB before `ready`" in said[CloseCode.TOO_BIG]
    assert f"{MESSAGE_SECONDS:.0f} seconds" in said[CloseCode.SILENT]


def test_temporary_refusals_have_a_retry_time() -> None:
    """A client retries only those refusals that have a `retry_after_ms`."""
    without = []
    for path in sorted(Path(handbook.__file__).parents[1].rglob("*.py")):
        for call in ast.walk(parsed(path)):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Refused") and call.args):
                continue
            is_for_now = ast.unparse(call.args[0]) in {"ErrorCode.RATE_LIMITED", "ErrorCode.UNAVAILABLE"}
            if is_for_now and "retry_after_ms" not in {keyword.arg for keyword in call.keywords}:
                without.append(path.name)
    assert without == ["http_protocol.py"], "for pipelined requests, not for frames"


def test_edit_frame_has_its_type() -> None:
    frame = client.Edit(conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7()), content="x")
    assert msgspec.json.decode(encode(frame))["type"] == "edit"


@given(
    start=st.integers(0, 10**18),
    rate=st.floats(0.05, 10_000),
    burst=st.integers(1, 200),
    waits=st.lists(st.integers(0, 10**9), max_size=20),
)
def test_token_bucket_allows_its_burst_and_refills_at_its_rate(
    start: int, rate: float, burst: int, waits: list[int]
) -> None:
    now = start
    allowance: TokenBuckets[str] = TokenBuckets("frames", rate, burst=burst, clock=lambda: now)
    assert all(allowance.take("a") == 0.0 for _ in range(burst))
    assert 0 < allowance.take("a") <= 1.001 / rate
    assert allowance.take("b") == 0.0, "each key has its own bucket"
    with pytest.raises(Refused) as refused:
        allowance.require("a")
    assert refused.value.retry_after_ms is not None
    now += refused.value.retry_after_ms * 1_000_000
    allowance.require("a")
    taken = 1
    for wait in waits:
        now += wait
        while taken < 1_000 and allowance.take("a") == 0.0:
            taken += 1
    assert taken <= 1 + (now - start) * 1e-9 * rate * 1.001


SEND = '{"type": "send", "conversation_id": "%s", "message_id": "%s", "content": %s, "metadata": %s}'


@pytest.mark.parametrize("unit", ["{},", "[],", "1,", '"",', r'"\"",', '{"":1},', "[" * 18 + "]" * 18 + ",", '"a":{},'])
def test_number_of_values_in_a_frame_is_bounded(unit: str) -> None:
    """Nested arrays take twenty times as long to decode as text of the same length."""
    for start, end in (('{"a": [', "1]}"), ("{", '"b": 1}')):
        text = SEND % (uuid7(), uuid7(), '"x"', start + unit * (MAX_FRAME_BYTES // len(unit) - 100) + end)
        with pytest.raises(Refused, match=f"more than {MAX_FRAME_VALUES} values"):
            decode_client(text)


@given(st.lists(st.sampled_from([*',[{"\\é', "x,[{"]), min_size=1, max_size=8), st.integers(1, 1_200))
def test_strings_are_not_counted_as_several_values(parts: list[str], times: int) -> None:
    content = ("".join(parts) * times)[:MAX_CONTENT]
    metadata = {"text": content[:2_000], "values": list(range(MAX_JSON_VALUES - 4))}
    read = decode_client(SEND % (uuid7(), uuid7(), json.dumps(content), json.dumps(metadata)))
    assert isinstance(read, client.Send)
    assert (read.content, read.metadata) == (content, metadata)


def test_slow_numbers_are_bounded() -> None:
    """msgspec takes 14 µs for a number near the largest double, two hundred times as long as for others."""
    text = '{"type": "send", "conversation_id": "%s", "message_id": "%s", "content": "%s", "metadata": {"a": [%s]}}'
    ids = (uuid7(), uuid7())
    for slow in ("1e308", "1E+300", "-2.5e-308", "1e0300"):
        decode_client(text % (*ids, "x", ",".join([slow] * 40)))
        with pytest.raises(Refused) as refused:
            decode_client(text % (*ids, "x", ",".join([slow] * (MAX_EXTREME_NUMBERS + 1))))
        assert refused.value.code is ErrorCode.BAD_FRAME
    decode_client(text % (*ids, "1e308 " * 1_000, r'"1e308 \"1e308",' * 200 + "0"))


def test_unterminated_strings_are_scanned_in_linear_time() -> None:
    for text in (b'"\\', rb"\"", rb'"\"e300', b'"e300'):
        assert len(STRING.sub(b"", text * 50_000)) <= 50_000 * len(text)
