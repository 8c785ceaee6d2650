"""Every column of schema.sql is written and read by a statement, or is listed as not used yet."""

import ast
import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import msgspec
import pytest

from protocol import values
from protocol.ids import uuid7
from server import queries
from server.describe import columns, query_tree
from server.describe.columns import WAITING, WAITING_VALUES, granted
from server.describe.query_tree import Use
from server.queries import erasure
from tests.trees import parsed
from tests.world import Room, World

READERS = "readers of the database"
CODE = "".join(
    path.read_text()
    for folder in ("protocol", "server")
    for path in Path(folder).rglob("*.py")
    if path.parent.name != "describe"
)
DOCUMENT = Path("docs/columns.md").read_text()
DEFAULT = "its default"


@pytest.fixture
async def db(database_url: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


USED: dict[str, Use] = {}


@pytest.fixture
async def used(db: "asyncpg.Connection[asyncpg.Record]") -> dict[str, Use]:
    """The columns that each statement uses. They are found once per run, since that takes two seconds."""
    if not USED:
        USED.update(await columns.uses(db))
    return USED


async def test_document_is_current(db: "asyncpg.Connection[asyncpg.Record]", used: dict[str, Use]) -> None:
    assert columns.markdown(await columns.columns(db, used)) == DOCUMENT, "run `make docs`"


async def test_every_column_is_written_and_read(db: "asyncpg.Connection[asyncpg.Record]", used: dict[str, Use]) -> None:
    found = {f"{column.table}.{column.name}": column for column in await columns.columns(db, used)}
    assert {place for place, column in found.items() if not column.note and not column.writers} == set()
    assert {place for place, column in found.items() if not column.note and not column.readers} == set()
    # No column listed as unused is used.
    assert set(WAITING) - found.keys() <= {column.table for column in found.values()}
    for place in WAITING:
        if place in found:
            writers = {name for name in found[place].writers if not name.startswith("erasure.")} - {DEFAULT}
            assert not (writers and set(found[place].readers) - {READERS}), place


async def test_every_statement_is_prepared_or_part_of_a_prepared_one(used: dict[str, Use]) -> None:
    texts = columns.statements()
    whole = [text for name, text in texts.items() if name in used]
    assert len(whole) > 250
    for name in texts.keys() - used.keys():
        for piece in re.split(r"\{\w*\}", texts[name]):
            assert any(piece.replace("{{", "{").replace("}}", "}") in text for text in whole), name


def test_every_statement_is_a_module_constant() -> None:
    hidden = [
        f"{path.name}: {part.value}"
        for path in Path(queries.__file__).parent.glob("*.py")
        for function in ast.walk(parsed(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for argument in call.args
        for part in ast.walk(argument)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        if re.match(r"\s*(SELECT|WITH|INSERT INTO|UPDATE|DELETE FROM)\b", part.value)
    ]
    assert hidden == []


async def test_unused_values_are_allowed_and_never_written(
    db: "asyncpg.Connection[asyncpg.Record]", used: dict[str, Use]
) -> None:
    """A value is written if it occurs in a statement that writes its column, in a handler or in the protocol."""
    allowed: dict[str, set[str]] = {}
    for table, text in await db.fetch(
        "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'c'"
    ):
        if found := re.search(r"\(+(\w+) = ANY \(ARRAY\[(.*?)\]", text):
            allowed[f"{table.strip(chr(34))}.{found[1]}"] = set(re.findall(r"'(\w+)'", found[2]))
    assert WAITING_VALUES.keys() < allowed.keys()
    texts = columns.statements()
    for place, names in allowed.items():
        waiting = set(WAITING_VALUES.get(place, ()))
        assert waiting <= names
        written = " ".join(texts.get(name, "") for name, use in used.items() if place in use.written)
        assert {name for name in names if f"'{name}'" in written} & waiting == set()
        assert {name for name in names - waiting if f"'{name}'" not in written and f'"{name}"' not in CODE} == set()


STATEMENTS = {
    "SELECT s.content FROM (SELECT * FROM draft) s": ({"content"}, set()),
    "WITH all_of AS (SELECT * FROM draft) SELECT a.user_id FROM all_of a": ({"user_id"}, set()),
    "WITH unasked AS (SELECT content FROM draft) SELECT 1": (set(), set()),
    "SELECT count(*) FROM draft d WHERE EXISTS (SELECT d.content FROM draft o WHERE o.user_id = d.user_id)":
        ({"user_id"}, set()),
    "SELECT d.user_id FROM draft d ORDER BY d.updated_at": ({"user_id", "updated_at"}, set()),
    "SELECT max(d.updated_at) FROM draft d GROUP BY d.user_id HAVING count(d.content) > 1":
        ({"updated_at", "user_id", "content"}, set()),
    "SELECT user_id FROM draft UNION SELECT conversation_id FROM draft": ({"user_id", "conversation_id"}, set()),
    "SELECT a.content FROM draft a JOIN draft b USING (user_id)": ({"content", "user_id"}, set()),
    "SELECT (found.d).content FROM (SELECT d FROM draft d) found": ({"content"}, set()),
    "SELECT l.content FROM (SELECT d FROM draft d) found CROSS JOIN LATERAL (SELECT (found.d).*) l":
        ({"content"}, set()),
    "SELECT row_to_json(d) FROM draft d":
        ({"user_id", "conversation_id", "content", "user_version", "updated_at"}, set()),
    "UPDATE draft SET user_version = user_version + 1": (set(), {"user_version"}),
    "UPDATE draft SET content = $1, user_version = user_version + 1 WHERE user_id = $2 RETURNING user_version":
        ({"user_id", "user_version"}, {"content", "user_version"}),
    "WITH moved AS (UPDATE draft SET content = '' RETURNING *) SELECT m.user_id FROM moved m":
        ({"user_id"}, {"content"}),
    "INSERT INTO draft (user_id, content) SELECT user_id, content FROM draft": ({"user_id", "content"},) * 2,
    "INSERT INTO draft AS d (user_id) VALUES ($1) ON CONFLICT (user_id, conversation_id)"
    " DO UPDATE SET content = excluded.content WHERE d.user_version < 5":
        ({"content", "user_version"}, {"user_id", "content"}),
}  # fmt: skip
"""Columns of `draft` that each statement reads and writes."""


async def test_statement_reads_columns_that_reach_a_condition_or_the_result(
    db: "asyncpg.Connection[asyncpg.Record]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "statements", lambda: {text: text for text in STATEMENTS})
    found = await columns.uses(db)
    for text, (read, written) in STATEMENTS.items():
        assert found[text].read == {f"draft.{name}" for name in read}, text
        assert found[text].written == {f"draft.{name}" for name in written}, text


async def test_row_passed_to_a_function_is_read_by_the_function(used: dict[str, Use]) -> None:
    assert used["users.ME"].read == {"user.id"}
    assert {"user.email", "user.bio"} <= used["schema.me_json"].read
    # Also for functions in PL/pgSQL, views and policies.
    assert {"user.erased_at", "user_relationship.can_see_profile"} <= used["schema.may"].read
    assert "conversation.direct_low" in used["schema.are_together"].read
    assert used["schema.is_unerased_now"].read == {"user.id", "user.erased_at"}
    assert {"user.bio", "user.id"} <= used["schema.user_profile"].read
    assert used["schema.message_access"].read == {
        "message.conversation_id", "message.sent_version", "message.is_moderated", "message.sender_id",
    }  # fmt: skip


def test_parse_tree_with_escaped_names_and_empty_values_is_read() -> None:
    tree = query_tree.parse('({ALIAS :aliasname a\\ b :colnames ("x y" "z") :none <> :value 2 [ 1 0 ]})')
    assert tree == [
        {"type": "ALIAS", "aliasname": "a\\ b", "colnames": ['"x y"', '"z"'], "none": None, "value": "2",
         "value, more": ["[", "1", "0", "]"]}
    ]  # fmt: skip


async def test_notifications_are_enabled_unless_the_level_is_none(world: World, room: Room) -> None:
    db = world.db
    await db.execute("""
        UPDATE conversation_participant SET notification_level = 'none', notifications_enabled = false
    """)
    await erasure.clear(db, room.users[0].id, erasure.Cleared())
    rows = await db.fetch("SELECT notification_level, notifications_enabled FROM conversation_participant")
    assert all(is_enabled == (level != "none") for level, is_enabled in rows)


SHOWN: dict[str, tuple[type[msgspec.Struct], ...]] = {
    "user": (values.User,),
    "user_profile": (values.User, values.Profile),
    "session": (values.Session,),
    "conversation": (values.Conversation, values.ConversationView),
    "conversation_participant": (values.Participant, values.Permissions),
    "message": (values.Message,),
    "message_edit": (values.MessageEdit,),
    "poll_vote": (values.PollVote,),
    "thread_follow": (values.ThreadFollow,),
    "message_star": (values.StarredMessage,),
    "draft": (values.Draft,),
    "scheduled_message": (values.Scheduled,),
    "report": (values.Report,),
    "audit_entry": (values.AuditEntry,),
    "user_relationship": (values.Relationship,),
}
"""The structs that show the rows of each table to the user who may read them."""
SAME = {
    "session.user_id": "the reader's own", "poll_vote.conversation_id": "the message's",
    "message_edit.message_id": "the frame's", "message_edit.conversation_id": "the frame's",
    "poll_vote.message_id": "the frame's", "poll_vote.version": "the event's",
    "thread_follow.user_id": "the reader's own", "thread_follow.has_replied": "the reader's own",
    "message_star.user_id": "the reader's own", "draft.user_id": "the reader's own",
    "scheduled_message.sender_id": "the reader's own",
    "scheduled_message.id": "`message_id`", "scheduled_message.claimed_at": "the reader's own",
    "conversation.settings_version": "`version` of the conversation; the view has the other one",
    "conversation_participant.id": "random",
    "message.status": "follows from `edited_at` and `is_deleted`", "message.edited_by": "the sender",
    "message.is_system_message": "follows from `system_message_type`", "message.model": "empty",
    "message.has_remains": "whether it is deleted and had reactions or votes",
    "message.token_count": "empty", "message.updated_at": "when `version` moved, which an event tells",
    "audit_entry.chain": "the frame's `conversation_id`",
    "user_relationship.from_user_id": "`user_id` and `is_outgoing`",
    "user_relationship.to_user_id": "`user_id` and `is_outgoing`", "user_relationship.type": "`kind`",
}  # fmt: skip
"""Columns without a field of their own, and why."""
SHOWN_OTHERWISE = {"message_reaction": "events and `list_reactions`, row by row", "attachment": "empty"}
USER_VERSION = "user_version"


async def test_every_column_open_to_a_reader_is_shown_to_the_same_user_by_frames(
    db: "asyncpg.Connection[asyncpg.Record]", used: dict[str, Use]
) -> None:
    every: dict[str, list[str]] = {}
    for column in await columns.columns(db, used):
        every.setdefault(column.table, []).append(column.name)
    every["user_profile"] = ["id", "bio", "location", "website", "created_at"]
    hidden, needless = [], set(SAME)
    for table, names in granted().items():
        if table in SHOWN_OTHERWISE:
            continue
        shown = {field for struct in SHOWN[table] for field in struct.__struct_fields__}
        for name in names or every[table]:
            place = f"{table}.{name}"
            if name not in shown and place in SAME:
                needless.remove(place)
            elif name not in shown and name != USER_VERSION:
                hidden.append(place)
    assert hidden == []
    assert needless == set()


async def test_columns_open_to_a_reader_are_listed(database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    role = f"lister_{uuid7().hex}"
    try:
        await db.execute(f"CREATE ROLE {role}; SELECT grant_reader('{role}')")
        rows = await db.fetch(
            """SELECT c.relname, a.attname, has_column_privilege($1, c.oid, a.attnum, 'SELECT') FROM pg_class c
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')""",
            role,
        )  # fmt: skip
    finally:
        await db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await db.close()
    readable = {(table, column) for table, column, is_readable in rows if is_readable}
    listed = granted()
    assert {table for table, _ in readable} == listed.keys()
    for table, column, is_readable in rows:
        assert is_readable == (table in listed and (not listed[table] or column in listed[table])), (table, column)
