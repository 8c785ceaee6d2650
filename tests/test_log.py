"""The application's log says what failed and where, and contains no value of a row or a frame."""

import ast
import asyncio
import contextlib
import gc
import logging
import socket
import struct
import sys
import time
from pathlib import Path

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from server.core import log
from server.core.config import Settings
from server.core.errors import told
from tests.conftest import Lines
from tests.test_hostile import idle
from tests.trees import parsed
from tests.world import Room, World, http_client, message, until

ADDRESS = "ada@secret.example.org"
WORDS = "Meet me at the old mill"
ROOT = Path(__file__).parent.parent
WAYS_OF_LOGGING = {"debug", "info", "warning", "error", "exception", "critical"}
REFUSING = """
ALTER TABLE message ADD CONSTRAINT message_unknown CHECK (content NOT LIKE 'Meet me%');
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'refused' USING DETAIL = NEW.content, HINT = NEW.content; END $$;
CREATE TRIGGER tell BEFORE INSERT ON draft FOR EACH ROW EXECUTE FUNCTION tell()
"""
"""A constraint and a trigger that the server does not know, so that their errors count as defects."""


async def test_rejected_row_is_not_in_the_log(room: Room, world: World, lines: Lines) -> None:
    await world.db.execute(REFUSING)
    answer = await room.ada.ask(message(room.group, WORDS))
    assert isinstance(answer, server.Error)
    assert answer.code is ErrorCode.INTERNAL
    answer = await room.ada.ask(client.SetDraft(conversation_id=room.group, content=WORDS))
    assert isinstance(answer, server.Error)
    assert lines.text.count("message_unknown") >= 1, "the constraint is named"
    assert lines.text.count("Traceback") >= 2
    assert WORDS not in lines.text
    assert "DETAIL" not in lines.text


async def test_rejected_address_is_not_in_the_log(world: World, lines: Lines) -> None:
    await world.db.execute('ALTER TABLE "user" ADD CONSTRAINT user_unknown CHECK (email NOT LIKE $$%secret%$$)')
    async with http_client(world.url) as http:
        fields = {"name": "Ada", "email": ADDRESS, "password": "correct horse battery"}
        response = await http.post("/v1/auth/register", json=fields)
    assert response.status_code == 500
    assert "user_unknown" in lines.text
    assert ADDRESS not in lines.text


async def values(db: "asyncpg.Connection[asyncpg.Record]") -> list[Exception]:
    """Return the errors about a value that PostgreSQL and its client raise."""
    raised: list[Exception] = []
    await db.execute("CREATE TEMP TABLE thing (words text PRIMARY KEY, CHECK (length(words) < 30))")
    await db.execute("INSERT INTO thing VALUES ($1)", ADDRESS)
    for query, value in (
        ("INSERT INTO thing VALUES ($1)", ADDRESS),
        ("INSERT INTO thing VALUES ($1)", ADDRESS * 2),
        ("SELECT $1::text::uuid", ADDRESS),
        ("SELECT $1::text::jsonb", ADDRESS),
        ("SELECT $1::integer", ADDRESS),
    ):
        try:
            await db.fetchval(query, value)
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raised.append(error)
    assert len(raised) == 5
    return raised


async def test_no_log_call_quotes_a_value_of_an_error(database_url: str, lines: Lines) -> None:
    db = await asyncpg.connect(database_url)
    raised = await values(db)
    await db.close()
    logger = logging.getLogger("test")
    for error in raised:
        logger.warning("it failed: %s", error)
        logger.error("it failed", exc_info=error)
        try:
            raise RuntimeError("first") from error
        except RuntimeError:
            logger.exception("it failed, and something was made of it")
        try:
            raise ExceptionGroup("several", [error])
        except ExceptionGroup:
            logger.exception("a group failed")
        try:
            try:
                raise error
            finally:
                raise ValueError("second")
        except ValueError:
            logger.exception("it failed while something else was done")
        sys.excepthook(type(error), error, error.__traceback__)
    text = lines.text
    assert ADDRESS not in text
    assert "DETAIL" not in text
    assert text.count("UniqueViolationError") >= 5
    assert text.count("it failed: ") == len(raised)


async def test_log_entry_of_the_loop_about_a_failed_task_quotes_no_value(database_url: str, lines: Lines) -> None:
    db = await asyncpg.connect(database_url)
    raised = await values(db)
    await db.close()

    async def fail(error: Exception) -> None:
        raise error

    for error in raised:
        task = asyncio.ensure_future(fail(error))
        await asyncio.wait([task])
        del task
    raised.clear()
    del error
    await until(lambda: lines.text.count("never retrieved") >= 1)
    assert ADDRESS not in lines.text


def test_log_calls_pass_exceptions_and_not_their_texts() -> None:
    """`told` renders exceptions without values. A text made from an exception beforehand would bypass it."""
    found = [
        f"{path.name}:{call.lineno}"
        for path in sorted((ROOT / "server").rglob("*.py"))
        for call in ast.walk(parsed(path))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in WAYS_OF_LOGGING
        if ast.unparse(call.func.value) != "self"  # a method of a parser
        if any(is_made_into_text(argument) for argument in call.args)
    ]
    assert found == []


def test_every_caught_exception_is_logged_with_its_traceback() -> None:
    """A handler of `Exception` also catches defects, whose text alone does not say where they are."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted(ROOT.glob("server/**/*.py"))
        for handler in ast.walk(parsed(path))
        if isinstance(handler, ast.ExceptHandler) and handler.type and ast.unparse(handler.type) == "Exception"
        for call in ast.walk(handler)
        if isinstance(call, ast.Call) and is_text_alone(call, handler.name)
    ]
    assert found == []


def is_text_alone(call: ast.Call, error: str | None) -> bool:
    is_logged = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "log"
    has_traceback = (
        "exc_info" in {keyword.arg for keyword in call.keywords} or ast.unparse(call.func) == "log.exception"
    )
    return is_logged and not has_traceback and error in {one.id for one in call.args if isinstance(one, ast.Name)}


def is_made_into_text(argument: ast.expr) -> bool:
    is_made = (
        isinstance(argument, ast.Call) and isinstance(argument.func, ast.Name) and argument.func.id in {"str", "repr"}
    )
    return is_made or isinstance(argument, ast.JoinedStr)


def test_long_texts_from_others_are_truncated_by_every_log_call(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of 60 KB that is not HTTP was one line of 60 KB, and each line feed in it began a new line."""
    monkeypatch.setattr(log, "MOST_ENTRIES", 1_000)
    logger = logging.getLogger("test")
    longest = len("2026-01-01 00:00:00,000 worker 1 ERROR ") + log.MAX_LINE + log.MAX_TRACEBACK
    before = 0
    for said in ("x" * 60_000, "\n" * 60_000, "\x1b" * 60_000, "\U000e0001" * 60_000, "x\n" * 30_000):
        for error in (ValueError(said), ExceptionGroup(said, [ValueError(said)] * 100), asyncpg.PostgresError(said)):
            logger.warning("it failed: %s; tell the operator", error)
            logger.error("it failed", exc_info=error)
            try:
                raise RuntimeError(said) from error
            except RuntimeError:
                logger.exception("it failed: %s", said)
            entries, before = lines.text[before:], len(lines.text)
            assert len(entries) <= 3 * longest
            assert max(map(len, entries.splitlines())) <= log.MAX_LINE + 2
            assert "characters are left out" in entries
            assert entries.splitlines()[0].endswith("; tell the operator")
            assert "\n  builtins.RuntimeError: " in entries
    logger.warning("it failed: %s", "x" * 1_000)
    assert lines.text.endswith("x" * 1_000 + "\n")


def test_error_without_a_message_is_logged_by_its_type() -> None:
    assert told(asyncpg.PostgresError()) == "PostgresError"


def http(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: here", *headers, "", ""]).encode("latin-1") + body


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
KEY = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
LOGIN = http("POST /v1/auth/login", "Content-Type: application/json", "Content-Length: 90", body=b"{")
ACTS = {
    "pipelined requests": http("GET /readyz") * 6,
    "too many pipelined requests": http("GET /readyz") * 12,
    "pipelined requests that are refused": http("GET /v1/auth/sessions", "Authorization: Bearer TOKEN") * 12,
    "requests, then garbage": http("GET /readyz") * 3 + b"\x00\xff\r\n\r\n",
    "large answers": http("GET /v1/openapi.json", "Accept-Encoding: identity") * 8,
    "half a header": b"GET /readyz HTTP/1.1\r\nHost:",
    "half a body": LOGIN,
    "half a body behind requests": http("GET /readyz") * 3 + LOGIN,
    "bad chunk": http("POST /v1/auth/login", "Transfer-Encoding: chunked", body=b"zz\r\n"),
    "garbage": b"\x16\x03\x01\x02\x00\x01" + bytes(200),
    "unknown upgrade": http("GET /readyz", "Connection: Upgrade", "Upgrade: h2c"),
    "handshake without a key": http("GET /v1/ws", *UPGRADE),
    "handshake with a bad key": http("GET /v1/ws", *UPGRADE, "Sec-WebSocket-Key: x"),
    "handshake of an old version": http("GET /v1/ws", *UPGRADE[:2], "Sec-WebSocket-Version: 7", KEY),
    "handshake with a long line": http("GET /v1/ws", *UPGRADE, KEY, "X: " + "x" * 9_000),
    "handshake with a body": http("GET /v1/ws", *UPGRADE, KEY, "Content-Length: 3", body=b"xyz"),
    "handshake behind requests": http("GET /readyz") * 3 + http("GET /v1/ws", *UPGRADE, KEY),
    "handshake of another path": http("GET /nowhere", *UPGRADE, KEY),
    "handshake": http("GET /v1/ws", *UPGRADE, KEY),
    "handshake at no address": http("GET /v1/ws\xff", *UPGRADE, KEY),
    "handshake with a query that is not text": http("GET /v1/ws?\xff=%ff%00", *UPGRADE, KEY),
    "handshake with headers that are not text": http(
        "GET /v1/ws", *UPGRADE, KEY, "Sec-WebSocket-Protocol: \xff\xfe", "Cookie: \xff=\xff", "Origin: \xff"
    ),
    "handshake with two keys": http("GET /v1/ws", *UPGRADE, KEY, KEY),
    "handshake with extensions": http("GET /v1/ws", *UPGRADE, KEY, "Sec-WebSocket-Extensions: permessage-deflate; x="),
    "handshake with a bad method": http("BREW /v1/ws", *UPGRADE, KEY),
    "address of every byte": http("GET /" + "".join(map(chr, range(0x80, 0x100))) + "%00%ff"),
    "headers that are not text": http("GET /v1/auth/sessions", "Authorization: Bearer \xff", "Cookie: session=\xff"),
    "many headers": http("GET /readyz", *["a:b"] * 500),
    "many chunks": http("POST /v1/auth/login", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n" * 9_000),
    "frame before the answer": http("GET /v1/ws", *UPGRADE, KEY) + b"\x81\x85",
    "handshake with a bad token": http("GET /v1/ws?token=x", *UPGRADE, KEY),
    "handshake with a token": http("GET /v1/ws", *UPGRADE, KEY, "Authorization: Bearer TOKEN"),
}
"""Bytes that a client sends, complete or not, before it resets the connection."""
FRAMES = {
    "half a frame": b"\x81\xfe\x10\x00\x00\x00\x00\x00{",
    "fragments": b"\x01\x81\x00\x00\x00\x00{" + b"\x00\x81\x00\x00\x00\x00x" * 200,
    "a frame without a mask": b"\x81\x02{}",
    "a frame of an unknown kind": b"\x83\x80\x00\x00\x00\x00",
    "a text frame with invalid UTF-8": b"\x81\x82\x00\x00\x00\x00\xff\xfe",
    "fragments with invalid UTF-8": b"\x01\x81\x00\x00\x00\x00\xff\x80\x81\x00\x00\x00\x00\xfe",
    "a binary frame": b"\x82\x82\x00\x00\x00\x00\xff\xfe",
    "text of control characters": b"\x81\x85\x00\x00\x00\x00\x1b[2J\n",
    "a long text": b"\x81\xfe\x0f\xa0\x00\x00\x00\x00" + b"\xff" * 4_000,
    "a continuation without a start": b"\x80\x81\x00\x00\x00\x00x",
    "a text within a text": b"\x01\x81\x00\x00\x00\x00x\x81\x81\x00\x00\x00\x00y",
    "a long ping": b"\x89\xfe\x00\x7e\x00\x00\x00\x00" + b"x" * 126,
    "a ping in fragments": b"\x09\x81\x00\x00\x00\x00x",
    "a reserved bit": b"\xc1\x85\x00\x00\x00\x00hello",
    "a length of 63 bits": b"\x81\xff" + b"\xff" * 12,
    "a close with invalid UTF-8": b"\x88\x84\x00\x00\x00\x00\x03\xe8\xff\xff",
    "a close with a reserved code": b"\x88\x82\x00\x00\x00\x00\x03\xed",
    "two closes": b"\x88\x80\x00\x00\x00\x00" * 2,
    "not JSON": b"\x81\x82\x00\x00\x00\x00{{",
    "a bad close": b"\x88\x81\x00\x00\x00\x00\x00",
    "pings": b"\x89\x80\x00\x00\x00\x00" * 500,
    "large answers on the socket": b"".join(
        b"\x81" + bytes((0x80 | len(text),)) + bytes(4) + text
        for text in [b'{"type":"list_conversations","id":"1"}'] * 40
    ),
}
"""Bytes that a client sends after its handshake, before it resets the connection."""
REPEATS = 2
MOST_CHARACTERS = 200
"""Max characters of a line about a client: what it sent is not quoted."""


async def act(world: World, data: bytes, frames: bytes = b"", *, reads: bool) -> None:
    """Send bytes and reset the connection, either when an answer begins or immediately."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(world.url.rpartition(":")[2]))
    writer.write(data)
    with contextlib.suppress(TimeoutError, ConnectionError):
        if frames:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(frames)
        if reads:
            async with asyncio.timeout(0.02):  # some requests get no answer
                await reader.read(10)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_repeated_client_errors_are_not_logged_each_time(settings: Settings, lines: Lines) -> None:
    settings = msgspec.structs.replace(settings, address_rate=10_000, connections_per_address=10_000)
    async with World(settings, workers=1) as world:
        ada = await world.user("Ada")
        token = ada.token.encode()
        handshake = ACTS["handshake with a token"]
        refused = b"\x81\x80\x00\x00\x00\x00"
        acts = [(data, b"") for data in ACTS.values()]
        for frames in FRAMES.values():
            acts += [(handshake, frames), (ACTS["handshake"], frames), (ACTS["handshake"], refused + frames)]
        for data, frames in acts:
            data = data.replace(b"TOKEN", token)  # noqa: PLW2901
            await asyncio.gather(*(act(world, data, frames, reads=bool(n % 2)) for n in range(2 * REPEATS)))
        await idle(world)
        gc.collect()  # a failed task is reported when it is garbage-collected
        assert "Traceback" not in lines.text
        assert lines.text.count("\n") <= len(acts)
        assert max(map(len, lines.text.splitlines()), default=0) < MOST_CHARACTERS
        async with http_client(world.url) as http:
            assert (await http.get("/readyz")).status_code == 200


def test_repeated_entries_of_one_line_of_code_are_counted(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0.0
    monkeypatch.setattr(lines.bound, "_clock", lambda: at)
    logger = logging.getLogger("test")

    def fail(number: int) -> None:
        try:
            raise ValueError(number)
        except ValueError:
            logger.exception("it failed")

    for number in range(100):
        logger.warning("of a client: %d", number)
        fail(number)
        logger.critical("the end")
    logger.warning("of another place")
    assert lines.text.count("of a client") == lines.text.count("builtins.ValueError") == log.MOST_ENTRIES
    assert lines.text.count("the end") == 100
    assert "of another place" in lines.text
    at = log.WINDOW_SECONDS
    logger.warning("later")
    assert lines.text.count(f"{100 - log.MOST_ENTRIES} more entries like those of test line") == 2
    fail(100)
    assert lines.text.count("builtins.ValueError") == log.MOST_ENTRIES + 1
    assert lines.text.count("more entries") == 2


async def test_suppressed_entries_are_counted_even_if_nothing_else_is_logged(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "WINDOW_SECONDS", 0.3)  # longer than three entries take
    monkeypatch.setattr(log, "MOST_ENTRIES", 1)
    # The loop counts whole milliseconds. With another clock it would call too early.
    monkeypatch.setattr(lines.bound, "_clock", lambda: 0.9 * time.monotonic())
    for _ in range(3):
        logging.getLogger("test").warning("again")
    await until(lambda: "2 more entries" in lines.text)
    assert lines.text.count("again") == 1
