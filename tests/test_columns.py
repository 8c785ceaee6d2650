"""Every column of schema.sql has a statement that writes it and one that reads it, or waits for what it is for."""

import re

import asyncpg
import msgspec

from protocol import values
from protocol.ids import uuid7
from server.describe.columns import FOR_READERS, WAITING, columns, granted, without_targets, written


async def test_no_column_is_dead(database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    rows = await db.fetch("""
        SELECT table_name || '.' || column_name FROM information_schema.columns
        JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_schema = 'public' AND table_type = 'BASE TABLE' AND table_name <> 'schema_migration'
    """)
    await db.close()
    known = {f"{column.table}.{column.name}": column for column in columns()}
    assert known.keys() == {row[0] for row in rows}
    assert {place for place, column in known.items() if not column.note and not column.writers} == set()
    assert {place for place, column in known.items() if not column.note and not column.readers} == set()
    assert known.keys() >= FOR_READERS
    # What waits is not in use already.
    for place in WAITING:
        if "." in place:
            column = known[place]
            writers = [name for name in column.writers if name != "its default" and not name.startswith("erasure.")]
            assert not (column.readers and writers), place


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
"""What frames show of the rows of each table that a reader reads, to the same user."""
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
"""What the columns show that are no fields."""
TOLD = {"message_reaction": "events and `list_reactions`, row by row", "attachment": "empty"}
OWN_CLOCK = "user_version"


async def test_each_column_that_a_reader_reads_is_shown_by_frames_to_the_same_user() -> None:
    every: dict[str, list[str]] = {}
    for column in columns():
        every.setdefault(column.table, []).append(column.name)
    every["user_profile"] = ["id", "bio", "location", "website", "created_at"]
    hidden, needless = [], set(SAME)
    for table, names in granted().items():
        if table in TOLD:
            continue
        shown = {field for struct in SHOWN[table] for field in struct.__struct_fields__}
        for name in names or every[table]:
            place = f"{table}.{name}"
            if name not in shown and place in SAME:
                needless.remove(place)
            elif name not in shown and name != OWN_CLOCK:
                hidden.append(place)
    assert hidden == []
    assert needless == set()


async def test_columns_that_a_reader_reads_are_listed(database_url: str) -> None:
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


def test_the_test_knows_a_writer_from_a_reader() -> None:
    text = (
        "UPDATE message m SET content = $1, version = b.version FROM bumped b WHERE m.id = $2 RETURNING m.sent_version"
    )
    assert written(text) == {"message": {"content", "version"}}
    assert re.search(r"\bcontent\b", without_targets(text)) is None
    assert re.search(r"\bsent_version\b", without_targets(text))
    assert written("INSERT INTO report (id, reason) VALUES ($1, $2)") == {"report": {"id", "reason"}}
