"""The lists of a message's columns agree with `Message`, so that a forgotten column fails a test."""

import ast
import inspect
import json
import re
from pathlib import Path

import msgspec

from protocol.client import Send
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.values import Message
from server.handlers import sending as handler
from server.queries import edits, export, sending
from server.queries.sending import Outgoing

SCHEMA = Path("schema.sql").read_text()
SET_LATER = {
    "link_preview", "reactions", "reply_count", "is_pinned", "pinned_at", "pinned_by", "poll_voters", "poll_closed_at",
    "edited_at", "is_deleted", "deleted_at", "deleted_by", "system_message_type", "is_moderated", "moderation_reason",
    "moderated_at", "moderated_by",
}  # fmt: skip
"""Columns that `send` does not fill."""
DECODED = {"is_unreadable"}
"""Fields of `Message` without a column."""
NOT_SHOWN = {"updated_at"}
"""Columns that `send` fills and clients do not see."""

NOT_ON_THE_WIRE = NOT_SHOWN | {
    "edited_by", "has_remains", "is_system_message", "model", "status", "token_count",
}  # fmt: skip
"""Columns of the table that are not fields of `Message`. docs/columns.md describes each."""

NOT_EXPORTED = {
    "link_preview", "is_pinned", "pinned_at", "pinned_by", "poll_counts", "poll_voters", "poll_closed_at", "expires_at",
    "reactions", "reply_count", "is_moderated", "moderation_reason", "moderated_at", "moderated_by",
}  # fmt: skip
"""Columns that an export omits or empties for a message that the user may no longer see."""


def fields() -> set[str]:
    return {field.name for field in msgspec.structs.fields(Message)} - DECODED


def inserted() -> list[str]:
    function = SCHEMA[SCHEMA.index("CREATE FUNCTION send_messages(") :]
    (names,) = re.findall(r"INSERT INTO message \((.+?)\)", function.partition("$$;")[0], re.DOTALL)
    return re.findall(r"\w+", names)


def test_table_has_the_fields_of_message() -> None:
    (body,) = re.findall(r"CREATE TABLE message \((.+?)\n\)", SCHEMA, re.DOTALL)
    columns = set(re.findall(r"^    (\w+) [a-z]", body, re.MULTILINE))

    assert columns - fields() == NOT_ON_THE_WIRE
    assert fields() - columns == set()


def test_message_json_has_the_fields_of_message() -> None:
    (body,) = re.findall(r"CREATE FUNCTION message_json\(m message\).+?\n    \);\n", SCHEMA, re.DOTALL)

    assert set(re.findall(r"^        '(\w+)',", body, re.MULTILINE)) == fields()


def test_a_send_fills_each_column_that_is_not_set_later() -> None:
    assert fields() - set(inserted()) == SET_LATER
    assert set(inserted()) - fields() == NOT_SHOWN


def test_the_event_of_a_send_has_the_columns_that_the_send_fills() -> None:
    (call,) = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(handler._message)))  # noqa: SLF001 - the list itself
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Message"
    ]

    assert {keyword.arg for keyword in call.keywords} == set(inserted()) - NOT_SHOWN


def test_send_reads_the_names_that_its_input_has() -> None:
    frame = Send(conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7()), content="")
    (row,) = json.loads(sending._encoded([Outgoing(UserId(uuid7()), frame)]))  # noqa: SLF001 - the list itself
    (columns,) = re.findall(r"CREATE TYPE outgoing_message AS \((.+?)\n\)", SCHEMA, re.DOTALL)

    assert [column.split()[0] for column in columns.split(",")] == list(row)


def test_an_export_decides_about_each_column_of_a_message_out_of_sight() -> None:
    names = set(re.findall(r"'(\w+)', ", export._WORDS_ALONE))  # noqa: SLF001 - the list itself

    assert names | NOT_EXPORTED == fields()


def test_an_expired_message_loses_the_columns_of_a_deleted_one() -> None:
    function = SCHEMA[SCHEMA.index("CREATE FUNCTION expire_messages(") :]
    (expired,) = re.findall(r"UPDATE message m SET (content = .+?)\n        WHERE", function, re.DOTALL)
    (deleted,) = re.findall(r"UPDATE message m SET (content = .+?)\nFROM", edits.DELETE, re.DOTALL)

    assert assigned(expired) == assigned(deleted) | {"expires_at"}


def assigned(text: str) -> set[str]:
    """Return the columns that an UPDATE sets."""
    return set(re.findall(r"(?:^|, |,\n +)(\w+) = ", text))
