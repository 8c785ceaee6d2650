"""The log of the application: what went wrong and where, and no value of a row or a frame."""

import ast
import asyncio
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from server import log
from server.errors import told
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
"""A constraint and a trigger that the server does not know, so that what they refuse is a defect."""


class Lines:
    """What this process logs, as the server configures it."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        log.configure("worker 1")
        (handler,) = logging.getLogger().handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(self._stream)

    @property
    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture
def lines() -> Iterator[Lines]:
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = root.handlers[:], root.level
    yield Lines()
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook = hook


async def test_a_row_that_the_database_refuses_is_not_in_the_log(room: Room, world: World, lines: Lines) -> None:
    await world.db.execute(REFUSING)
    answer = await room.ada.ask(message(room.group, WORDS))
    assert isinstance(answer, server.Error)
    assert answer.code is ErrorCode.INTERNAL
    answer = await room.ada.ask(client.SetDraft(conversation_id=room.group, content=WORDS))
    assert isinstance(answer, server.Error)
    assert lines.text.count("message_unknown") >= 1, "it says what was violated"
    assert lines.text.count("Traceback") >= 2
    assert WORDS not in lines.text
    assert "DETAIL" not in lines.text


async def test_an_address_that_the_database_refuses_is_not_in_the_log(world: World, lines: Lines) -> None:
    await world.db.execute('ALTER TABLE "user" ADD CONSTRAINT user_unknown CHECK (email NOT LIKE $$%secret%$$)')
    async with http_client(world.url) as http:
        fields = {"name": "Ada", "email": ADDRESS, "password": "correct horse battery"}
        response = await http.post("/v1/auth/register", json=fields)
    assert response.status_code == 500
    assert "user_unknown" in lines.text
    assert ADDRESS not in lines.text


async def values(db: "asyncpg.Connection[asyncpg.Record]") -> list[Exception]:
    """Return what is raised about a value, by PostgreSQL and by its client."""
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


async def test_no_way_of_logging_an_error_quotes_a_value(database_url: str, lines: Lines) -> None:
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


async def test_what_the_loop_logs_of_a_forgotten_task_quotes_no_value(database_url: str, lines: Lines) -> None:
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


def test_the_log_is_given_exceptions_and_not_their_texts() -> None:
    """`told` is asked of an exception, so a text made of one beforehand would pass it by."""
    found = [
        f"{path.name}:{call.lineno}"
        for path in sorted((ROOT / "server").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in WAYS_OF_LOGGING
        if any(is_text_of_something(argument) for argument in call.args)
    ]
    assert found == []


def test_a_failure_of_any_kind_is_logged_with_its_traceback() -> None:
    """Where everything is caught, a defect is caught, too: its text alone tells nobody where it is."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted(ROOT.glob("server/**/*.py"))
        for handler in ast.walk(ast.parse(path.read_text()))
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


def is_text_of_something(argument: ast.expr) -> bool:
    is_made = (
        isinstance(argument, ast.Call) and isinstance(argument.func, ast.Name) and argument.func.id in {"str", "repr"}
    )
    return is_made or isinstance(argument, ast.JoinedStr)


def test_an_error_without_words_is_named() -> None:
    assert told(asyncpg.PostgresError()) == "PostgresError"
