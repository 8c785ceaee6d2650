"""Cost of frequent queries: they use indexes and read a bounded number of rows, regardless of the size of tables.

`make bench ARGS=growth` measures up to 10,000,000 messages.
"""

import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import asyncpg
import pytest

from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_CHANGES_BYTES, MAX_COUNTED_READERS, MAX_TRACED_PARTICIPANTS
from protocol.roles import ROLES
from server.db.database import SESSION
from server.queries import (
    accounts,
    audit,
    badge,
    bounds,
    changes,
    conversation_views,
    conversations,
    creation,
    delivery_report,
    drafts,
    edits,
    expiry,
    feed,
    invitations,
    invite_codes,
    joins,
    latest,
    locks,
    memberships,
    messages,
    moderation,
    own_news,
    participants,
    pins,
    polls,
    presence,
    push,
    reactions,
    receipts,
    relationships,
    scheduled,
    search,
    search_matches,
    sending,
    sessions,
    system_messages,
    threads,
    unread,
    users,
    welcome,
)
from server.queries import mentions as meaning

pytestmark = pytest.mark.new_database

MESSAGES = 60_000
SMALL = 1_000
OTHERS = 8_000
"""Further conversations of five participants each, which the queries do not concern."""


class Place(NamedTuple):
    """A conversation, a participant, and the number of messages."""

    conversation_id: ConversationId
    user_id: UserId
    size: int


class Plan(NamedTuple):
    """The execution of a statement: rows visited in all nodes, pages read, tables scanned sequentially, and tables
    read without a key (`KEY`).
    """

    rows: int
    pages: int
    scanned: list[str]
    without_key: list[str]


KEY = re.compile(
    r"\b(conversation_id(?: ELSE NULL::uuid END)?|chain|user_id|sender_id|author_id|from_user_id|to_user_id|direct_low)"
    " = "
)
"""Columns by which rows would be sharded over several servers (docs/scale.md)."""
WITHOUT_KEY = {
    "sessions by id": "by session, of users who reconnect",
    "begin session": "by user",
    "login": "by e-mail address",
    "session": "by token",
    "living sessions": "by session, of connected users",
    "slide": "by session, of connected users",
    "invite code": "by invite code",
    "guests": "by invited user, and by inviting user",
    "send": "by message: whether its id is taken, since the key of `message` is the id",
    "send past what is held": "the same",
    "send plain": "the same",
    "react": "by message: PostgreSQL checks the foreign key of the reaction",
    "vote": "by message: PostgreSQL checks the foreign key of the vote",
    "earlier": "by message: read when an id is taken, to compare",
    "made in a day": "by creator",
    "reported in a day": "by reporter",
    "find anew": "by message, after it was found in its conversation",
    "who is next": "by time",
    "what has expired": "by time",
    "due for a push": "by message: those of the last second, whose ids are in memory",
    "notices": "by message: those of the posts, whose ids are in memory",
}
"""Statements without a condition on the conversation or the user, with the condition that they have."""
EITHER_KEY = {"expire", "edits that expire"}
"""Statements about given messages of given conversations, which PostgreSQL finds by either."""


FILL = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version, message_count, participant_count, settings_version,
        invite_code)
    VALUES ('group', $2::text, $1, 2 + $3::int, $3, 1, 1, $2) RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, role, version, last_read_version)
    SELECT id, $1, 'owner', 2, 2 FROM made
)
SELECT id FROM made
"""
ADD_MESSAGES = """
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT $1, $2, 'Message ' || n, 2 + n, 2 + n FROM generate_series(1, $3::int) n
"""

MAKE_POLL = """
UPDATE message SET expires_at = now(), content_type = 'poll', payload = '{"options": ["Yes", "No"]}',
    poll_counts = '{0, 0}'
WHERE id = $1
"""


@pytest.fixture
async def db(database_url: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    connection = await asyncpg.connect(database_url, server_settings=SESSION | {"statement_timeout": "0"})
    yield connection
    await connection.close()


@pytest.fixture
async def filler(database_url: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """Return a connection to fill tables with. It does not check foreign keys, which would take half of the time. `db`
    would lose its plans if it changed `session_replication_role`.
    """
    connection = await asyncpg.connect(database_url, server_settings={"session_replication_role": "replica"})
    yield connection
    await connection.close()


async def filled(filler: "asyncpg.Connection[asyncpg.Record]", name: str, size: int) -> Place:
    user_id = await filler.fetchval(
        'INSERT INTO "user" (name, email) VALUES ($1, $1 || $2) RETURNING id', name, "@example.org"
    )
    other = await filler.fetchval(
        'INSERT INTO "user" (name, email) VALUES ($1, $1 || $2) RETURNING id', f"{name}2", "@example.org"
    )
    conversation_id = await filler.fetchval(FILL, user_id, name, size)
    await filler.execute(ADD_MESSAGES, conversation_id, other, size)
    return Place(conversation_id, user_id, size)


OTHER_USERS = """
INSERT INTO "user" (name, email) SELECT 'Other ' || n, 'other' || n || '@example.org' FROM generate_series(1, $1::int) n
"""
OTHER_CONVERSATIONS = """
INSERT INTO conversation (type, title, created_by, version, participant_count)
SELECT 'group', 'Other', id, 5, 5 FROM "user" WHERE name LIKE 'Other %' LIMIT $1
"""
OTHER_PARTICIPANTS = """
INSERT INTO conversation_participant (conversation_id, user_id, version)
SELECT c.id, u.id, k
FROM (SELECT id, row_number() OVER () AS n FROM conversation WHERE title = 'Other') c
CROSS JOIN generate_series(1, 5) k
JOIN (SELECT id, row_number() OVER () AS n FROM "user" WHERE name LIKE 'Other %') u ON u.n = 1 + (c.n * 7 + k) % $1::int
"""
OTHER_SESSIONS = """
INSERT INTO session (user_id, token, expires_at)
SELECT id, id::text, now() + interval '1 day' FROM "user" WHERE name LIKE 'Other %'
"""


OTHER_MESSAGES = """
INSERT INTO message (conversation_id, sender_id, content, mentions, sent_version, version)
SELECT c.id, c.created_by, 'Other words', ARRAY[c.created_by], 6, 6 FROM conversation c
"""
OTHER_WORDS = """
SELECT id, conversation_id, created_at, search_words(conversation_id, content, payload, mentions, '{}', '{}')
FROM message
"""


def literal(value: Any) -> str:
    """Return an argument as a literal for EXECUTE."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(str(one) for one in value) + "}'"
    return "'" + str(value).replace("'", "''") + "'"


FUNCTIONS = {
    "send_messages",
    "change_reactions",
    "change_votes",
    "join_conversations",
    "expire_messages",
    "newest_matches",
}
"""Functions that contain the statements of a batch, or of a search."""
EXPLAIN_INNER = """
LOAD 'auto_explain';
SET LOCAL auto_explain.log_min_duration = 0;
SET LOCAL auto_explain.log_nested_statements = on;
SET LOCAL auto_explain.log_analyze = on;
SET LOCAL auto_explain.log_timing = off;
SET LOCAL auto_explain.log_format = json;
SET LOCAL client_min_messages = log
"""
"""Makes PostgreSQL send the plan of each statement in a function to the client."""


async def explained(db: "asyncpg.Connection[asyncpg.Record]", name: str, arguments: tuple[Any, ...]) -> Plan:
    """Run a prepared statement and roll it back. Return its plan, or that of all statements in a function of
    `FUNCTIONS`.
    """
    inner: list[str] = []

    def note(_: object, message: asyncpg.PostgresLogMessage) -> None:
        inner.append((message.message or "").partition("plan:")[2])

    db.add_log_listener(note)
    transaction = db.transaction()
    await transaction.start()
    await db.execute(EXPLAIN_INNER)
    given = f"({', '.join(literal(one) for one in arguments)})"
    text = await db.fetchval(f'EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE "{name}" {given}')
    await transaction.rollback()
    db.remove_log_listener(note)
    top = json.loads(text)[0]["Plan"]
    rows, scanned, without_key = 0, [], []
    is_call = any(one.get("Function Name") in FUNCTIONS for one in (top, *top.get("Plans", [])))
    nodes = [json.loads(one)["Plan"] for one in inner if one] if is_call else [top]
    assert len(nodes) > (2 if is_call else 0), "auto_explain reports each statement"
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        filtered = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
        rows += round((node["Actual Rows"] + filtered) * node["Actual Loops"])
        if node["Node Type"] == "Seq Scan":
            scanned.append(node["Relation Name"])
        if "Index Name" in node:
            table, asked = node.get("Relation Name", "words"), f"{node.get('Index Cond', '')} {node.get('Filter', '')}"
            is_root = table in {"conversation", "user"} and "(id = " in asked
            if not is_root and not KEY.search(asked):
                without_key.append(f"{table}: {asked}")
    return Plan(rows, top["Shared Hit Blocks"] + top["Shared Read Blocks"], scanned, without_key)


async def prepare(db: "asyncpg.Connection[asyncpg.Record]", statements: dict[str, tuple[str, tuple[Any, ...]]]) -> None:
    """Prepare statements and run each once, so that its plan is made now and kept."""
    for name, (query, arguments) in statements.items():
        await db.execute(f'PREPARE "{name}" AS {query}')
        await explained(db, name, arguments)


def hot(place: Place, ids: dict[str, Any]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Return every statement that clients can trigger, with arguments in the middle of the conversation."""
    about, user = place.conversation_id, place.user_id
    send = json.dumps([{
        "place": 0, "sender_id": str(user), "message_id": str(ids["new"]), "conversation_id": str(about),
        "content": "Hello #there", "content_type": "text", "mentions": [str(user)], "loud_mentions": [],
        "hashtags": ["there"], "parent_message_id": str(ids["middle"]), "also_in_conversation": False,
        "quoted_message_id": str(ids["middle"]),
    }])  # fmt: skip
    reaction = json.dumps([{
        "place": 0, "conversation_id": str(about), "message_id": str(ids["middle"]), "user_id": str(user),
        "normal": "x", "typed": "x", "is_added": True,
    }])  # fmt: skip
    vote = json.dumps([{
        "place": 0, "conversation_id": str(about), "message_id": str(ids["middle"]), "user_id": str(user),
        "options": [0],
    }])  # fmt: skip
    join = json.dumps([{
        "place": 0, "conversation_id": str(about), "user_id": str(ids.get("stranger", user)),
        "invite_code": ids.get("code"),
    }])  # fmt: skip
    return {
        "send": (sending.SEND, (send, "false", "10ms")),
        "send plain": (sending.SEND_PLAIN, (send, "10ms")),
        "send past what is held": (sending.SEND, (send, "true", "10ms")),
        "earlier": (
            sending.EARLIER,
            (ids["middle"], about, user, None, "Hello", "false", "text", None, None, None, "false", None),
        ),
        "find": (messages.FIND, (ids["middle"], user, about)),
        "get": (messages.GET, (ids["middle"], user, about)),
        "history, newest": (messages.PAGE, (about, user, None, messages.NEWEST, 21, 0)),
        "history, before": (messages.PAGE, (about, user, ids["middle"], 0, 21, 0)),
        "history, after": (messages.PAGE, (about, user, ids["middle"], 1, 0, 21)),
        "history, around": (messages.PAGE, (about, user, ids["middle"], 0, 11, 11)),
        "edits": (edits.EDITS, (ids["middle"], user, about, 101, None)),
        "read": (receipts.READ, (ids["middle"], user, about)),
        "resume, 10 missed": (changes.MISSED, ([about], user, [place.size - 8], 100, MAX_CHANGES_BYTES, 1001)),
        "resume, all missed": (changes.MISSED, ([about], user, [0], 100, MAX_CHANGES_BYTES, 1001)),
        "a gap": (changes.SINCE, (about, place.size - 8, 1001, MAX_CHANGES_BYTES)),
        "conversations": (conversation_views.PAGE, (user, 50, None, None, None, None, None)),
        "one conversation": (conversation_views.GET, (user, [about])),
        "memberships": (memberships.READ, ([user], [uuid4()], 2_000)),
        "clocks": (conversations.VERSIONS, ([about],)),
        "participants": (participants.PAGE, (about, user, push.FIRST, 21)),
        "outsiders": (participants.OUTSIDERS, (about, user, push.FIRST, 21, "banned")),
        "typing": (conversations.SEND_ACCESS, (about, user)),
        "session": (sessions.FIND, (["no such hash"],)),
        "users": (users.GET, (user, [user])),
        "edit": (edits.EDIT, (about, ids["middle"], ids["new"], user, "Edited", None, [], [], [])),
        "edited": (edits.EDITED, (ids["new"], ids["middle"], user, "Edited", "false", about)),
        "delete": (edits.DELETE, (about, ids["middle"], user)),
        "react": (reactions.CHANGE, (reaction, "true", "10ms", *reactions.LIMITS)),
        "lock": (locks.LOCK, (about,)),
        "lock as": (locks.LOCK_AS, (about, user, "active")),
        "lock as with user": (locks.LOCK_AS_WITH_USER, (about, user, "active")),
        "keep": (conversations.KEEP, (about, user)),
        "lock part": (locks.LOCK_PART, (about, user)),
        "lock row": (locks.LOCK_ROW, (about,)),
        "direct": (creation.DIRECT, (user, user)),
        "invite code": (invite_codes.FIND, ("no such code",)),
        "join": (joins.JOIN, (join, "true", "10ms", *joins.LIMITS)),
        "participant": (participants.GET, (about, user)),
        "add": (participants.ADD, (about, [user], "member", user)),
        "change": (participants.CHANGE, (about, user, "member", "left", 1)),
        "heir": (participants.HEIR, (about, user, True, list(ROLES[::-1]))),
        "seen parts": (participants.SEEN, (about, user, [user])),
        "guests": (welcome.GUESTS, (user, about, [user], 100, 1_000, 5)),
        "watchable": (presence.WATCHABLE, ([user], [user])),
        "may": (users.ALL_MAY, ("write", user, [user])),
        "news": (own_news.READ, (user, 0, 501)),
        "me": (users.ME, (user,)),
        "profile": (users.PROFILE, (user, user)),
        "invite": (invitations.INVITE, (about, [user], "member", user)),
        "invitations": (invitations.LIST, (user,)),
        "prefer": (participants.PREFER, (about, user, "{}")),
        "permit": (participants.PERMIT, (about, user, "{}")),
        "stamp": (participants.STAMP, (about, [user], [])),
        "announce": (system_messages.STORE, (about, user, "joined", "{}", "join")),
        "moderate": (moderation.MODERATE, (about, ids["middle"], user, "Rude")),
        "unmoderate": (moderation.UNMODERATE, (about, ids["middle"])),
        "report": (moderation.REPORT, (about, ids["middle"], user, "Rude", ids["new"])),
        "reports": (moderation.REPORTS, (about, "open", push.FIRST, 21, user)),
        "audit": (audit.PAGE, (about, 0, 21, user)),
        "audited": (audit.RECORD, (about, None, "ban", user, None, "{}")),
        "relationship": (relationships.STATUS, (user, user, "friend")),
        "relationships": (relationships.PAGE, (user, None, None, None, None, 21)),
        "touch": (users.TOUCH, ([user],)),
        "seen": (presence.SEEN, ([user], ["true"], [1012], [0.0])),
        "user clocks": (users.VERSIONS, ([user],)),
        "login": (accounts.FIND, ("nobody@example.org",)),
        "sessions by id": (sessions.FIND_BY_ID, ([user],)),
        "begin session": (sessions.CREATE, (user, "a hash", "30 days", None, None, None)),
        "lock users": (users.LOCK, ([user],)),
        "living sessions": (sessions.LIVING, ([user],)),
        "slide": (sessions.SLIDE, ([user], "30 days")),
        "sessions": (sessions.LIST, (user, user)),
        "session to revoke": (sessions.IS_THERE, (user, user)),
        "revoke": (sessions.REVOKE, (user, None)),
        "timeline, newest": (messages.TIMELINE, (about, user, None, messages.NEWEST, 21, 0)),
        "timeline, around": (messages.TIMELINE, (about, user, ids["middle"], 0, 11, 11)),
        "replies": (messages.REPLIES, (about, user, ids["middle"], messages.NEWEST, 21, 0)),
        "thread": (threads.GET, (ids["middle"], user, about)),
        "threads": (threads.LIST, (user, "true", None, None)),
        "follow": (threads.CHANGE, (ids["middle"], user, about, "true", None)),
        "find anew": (edits.FIND_ANEW, (about, ids["middle"], None)),
        "words": (edits.WORDS, (about, ids["middle"], None, None, None, None)),
        "mentions": (meaning.RESOLVE, (about, user, [user], [])),
        "pin": (pins.PIN, (about, ids["middle"], user, "true")),
        "pinned": (pins.PINNED, (about,)),
        "pins": (pins.LIST, (about, user, None, None)),
        "star": (pins.STAR, (ids["middle"], user, about)),
        "unstar": (pins.UNSTAR, (ids["middle"], user)),
        "stars": (pins.STARS, (None, user, 21, None)),
        "vote": (polls.CHANGE, (vote, "true", "10ms")),
        "votes": (polls.VOTES, (ids["middle"], about, push.FIRST, 21)),
        "mark unread": (receipts.MARK_UNREAD, (ids["middle"], user, about)),
        "delivered": (receipts.DELIVERED, (ids["middle"], user, about, 100)),
        "readers": (receipts.READERS, (ids["middle"], user, about, 100)),
        "badge": (badge.READ, (user,)),
        "badges": (unread.BADGES, ([user],)),
        "draft": (drafts.SET, (about, user, "I thi")),
        "drafts": (drafts.LIST, (user, None, None)),
        "schedule": (scheduled.PUT, (ids["new"], user, about, "{}", "2030-01-01")),
        "scheduled": (scheduled.LIST, (user, None, None)),
        "who is next": (scheduled.WALK, ("15 seconds", "1970-01-01", UUID(int=0), scheduled.WALKED)),
        "who sends": (scheduled.SENDER, ("15 seconds", user)),
        "what is due": (scheduled.CLAIM, ("15 seconds", user)),
        "what has expired": (expiry.DUE, (200, [], [])),
        "expire": (expiry.EXPIRE, ([about], [ids["middle"]], "true", "10ms")),
        "edits that expire": (expiry.FORGET_EDITS, ([about], [ids["middle"]], 100)),
        "see feed": (feed.SEE, (user, "2030-01-01")),
        "due for a push": (push.DUE, ([about], [push.FIRST], [ids["middle"]], 100)),
        "notices": (push.NOTICES, ([user], ["https://push.example/1"], [about], [ids["middle"]])),
        "edits kept": (edits.COUNT, (about, ids["middle"])),
        "made in a day": (bounds.MADE, (user,)),
        "taking part": (bounds.MEMBERSHIPS, ([user], 5_000)),
        "stars kept": (bounds.STARS, (user,)),
        "relationships kept": (bounds.RELATIONSHIPS, (user, "friend")),
        "requests": (bounds.REQUESTS, (user, user)),
        "reported in a day": (bounds.REPORTS, (user,)),
        "threads kept": (bounds.THREADS, (user,)),
        "threads forgotten": (bounds.FORGET_THREADS, (user, 100)),
        "stars forgotten": (bounds.FORGET_STARS, (user, 1_000, 100)),
        "end": (conversations.DELETE, (about,)),
        "why": (delivery_report.OF, (ids["middle"], user, about)),
    }


async def others(filler: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Fill the tables with rows that the queries do not concern."""
    await filler.execute(OTHER_USERS, OTHERS)
    await filler.execute(OTHER_CONVERSATIONS, OTHERS)
    await filler.execute(OTHER_PARTICIPANTS, OTHERS)
    await filler.execute(OTHER_SESSIONS)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_cost_does_not_grow_with_history(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]", *, again: bool
) -> None:
    # Statements are planned while there are no messages, when the planner errs most. With `again`, they are planned
    # again when the tables have grown. ANALYZE finds only sizes (docs/decisions/0051). Here it leaves out `message`, as
    # autovacuum does with empty tables.
    await others(filler)
    await filler.execute('ANALYZE "user", conversation, conversation_participant, session')
    nobody = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
    await prepare(db, hot(nobody, {"new": uuid4(), "middle": uuid4()}))
    small = await filled(filler, "small", SMALL)
    plans: dict[int, dict[str, Plan]] = {}
    for place in (small, MESSAGES):
        if isinstance(place, int):
            place = await filled(filler, "large", MESSAGES)  # noqa: PLW2901
            if again:
                await db.execute("ANALYZE")
        name = "small" if place is small else "large"
        ids = {
            "code": name,
            "stranger": await db.fetchval('SELECT id FROM "user" WHERE name = $1', f"{name}2"),
            "new": await db.fetchval("SELECT gen_random_uuid()"),
            "middle": await db.fetchval(
                "SELECT id FROM message WHERE conversation_id = $1 AND sent_version = $2",
                place.conversation_id,
                place.size // 2,
            ),
        }
        await filler.execute(MAKE_POLL, ids["middle"])
        statements = hot(place, ids)
        # After ANALYZE, the first call plans the statements of a function, and reads pages for that.
        for name in ("send", "react", "vote", "join", "expire"):
            await explained(db, name, statements[name][1])
        plans[place.size] = {name: await explained(db, name, arguments) for name, (_, arguments) in statements.items()}
    await db.close()
    lines = [
        f"{name:20} {plans[SMALL][name].rows:6} {plan.rows:6} rows {plans[SMALL][name].pages:6} {plan.pages:6} pages"
        for name, plan in plans[MESSAGES].items()
    ]
    report = "\n".join(lines)
    without_key = {name: plan.without_key for name, plan in plans[MESSAGES].items() if plan.without_key}
    assert without_key.keys() - EITHER_KEY == WITHOUT_KEY.keys(), without_key
    for name, plan in plans[MESSAGES].items():
        before = plans[SMALL][name]
        assert plan.scanned == [], f"{name} scans {plan.scanned}\n{report}"
        assert plan.rows <= before.rows + 50, f"{name}\n{report}"
        # Indexes may be one or two levels higher, and messages of one time on more pages.
        assert plan.pages <= 1.5 * before.pages + 30, f"{name}\n{report}"
        assert plan.rows < 10_000, f"{name}\n{report}"


REPLY = """
INSERT INTO message (conversation_id, sender_id, content, sent_version, version, parent_message_id, thread_root_id,
    thread_order)
SELECT $1, $2, 'Reply ' || n, 1000000 + n, 1000000 + n, $3, $3, n FROM generate_series(1, $4::int) n
"""


async def test_cost_does_not_grow_with_the_length_of_a_thread(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    def asked(place: Place, root: Any) -> dict[str, tuple[str, tuple[Any, ...]]]:
        about, user = place.conversation_id, place.user_id
        send = json.dumps([{
            "place": 0, "sender_id": str(user), "message_id": str(uuid4()), "conversation_id": str(about),
            "content": "Hello", "content_type": "text", "mentions": [], "loud_mentions": [], "hashtags": [],
            "parent_message_id": str(root), "also_in_conversation": False,
        }])  # fmt: skip
        return {
            "reply": (sending.SEND, (send, "false", "10ms")),
            "newest replies": (messages.REPLIES, (about, user, root, messages.NEWEST, 21, 0)),
            "replies after": (messages.REPLIES, (about, user, root, 5, 0, 21)),
            "thread": (threads.GET, (root, user, about)),
            "threads": (threads.LIST, (user, "false", None, None)),
            "unread threads": (threads.LIST, (user, "true", None, None)),
            "feed": (feed.ROWS, (user, ["reply"], None, None, "2020-01-01", 21, *[[]] * 7)),
            "history": (messages.TIMELINE, (about, user, None, messages.NEWEST, 21, 0)),
            "unread": (conversation_views.GET, (user, [about])),
        }

    nobody = Place(ConversationId(uuid4()), UserId(uuid4()), 0)
    await prepare(db, asked(nobody, uuid4()))
    plans: dict[int, dict[str, Plan]] = {}
    for size in (10, 10_000):
        place = await filled(filler, f"thread{size}", 50)
        root, sender = await db.fetchrow(  # type: ignore[misc]
            "SELECT id, sender_id FROM message WHERE conversation_id = $1 LIMIT 1", place.conversation_id
        )
        await filler.execute(REPLY, place.conversation_id, sender, root, size)
        await filler.execute("UPDATE message SET thread_order = $2, reply_count = $2 WHERE id = $1", root, size)
        await filler.execute("UPDATE conversation SET version = 2000000 WHERE id = $1", place.conversation_id)
        follow = "INSERT INTO thread_follow (root_id, user_id, conversation_id, has_replied) VALUES ($1, $2, $3, true)"
        await filler.execute(follow, root, place.user_id, place.conversation_id)
        plans[size] = {name: await explained(db, name, given) for name, (_, given) in asked(place, root).items()}
    await db.close()
    for name, plan in plans[10_000].items():
        before = plans[10][name]
        # Up to 100 existing replies are counted, and indexes are a level higher.
        assert plan.rows <= before.rows + 500, (name, before, plan)
        assert plan.pages <= before.pages + 200, (name, before, plan)


JOIN_MANY = """
WITH them AS (
    INSERT INTO "user" (name, email, is_active)
    SELECT 'Heir ' || n, 'heir' || n || '@example.org', n > $3::int FROM generate_series(1, $2::int) n
    RETURNING id, substring(name FROM 6)::int AS n
)
INSERT INTO conversation_participant (conversation_id, user_id, role, joined_at, version)
SELECT $1, id, CASE n % 1000 WHEN 500 THEN 'moderator' ELSE 'member' END,
    '2020-01-01'::timestamptz + n * interval '1 s', 2
FROM them
"""
SILENCE = """
UPDATE "user" SET is_active = substring(name FROM 6)::int > $1, is_deleted = substring(name FROM 6)::int <= $2
WHERE name LIKE 'Heir %'
"""


async def test_successor_of_an_owner_is_found_among_few_participants(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    """This holds for any number of participants, and of inactive accounts among the oldest."""
    await db.execute(f"PREPARE heir AS {participants.HEIR}")
    ranks = list(ROLES[::-1])
    await explained(db, "heir", (uuid4(), uuid4(), True, ranks))
    place = await filled(filler, "owner", 10)
    await filler.execute(JOIN_MANY, place.conversation_id, 5_000, 0)
    await db.execute("DISCARD PLANS")  # a plan of an empty table reads all participants
    asked = (place.conversation_id, place.user_id)
    plan = await explained(db, "heir", (*asked, True, ranks))
    assert (plan.rows < 50, plan.pages < 60, plan.scanned) == (True, True, []), plan
    leaving = await participants.get(db, *asked)
    assert leaving is not None
    # Active accounts are ordered by role, then by time of joining. If the candidates that are read have no active
    # account, the first one is chosen.
    for silent, deleted, name in ((0, 0, 500), (500, 0, 1500), (500, 1500, 2500), (4_900, 0, 500), (0, 5_000, 500)):
        await filler.execute(SILENCE, silent, deleted)
        heir = await participants.heir(db, leaving)
        assert heir is not None
        assert await db.fetchval('SELECT name FROM "user" WHERE id = $1', heir.user_id) == f"Heir {name}"
        plan = await explained(db, "heir", (*asked, True, ranks))
        assert plan.rows < 10 * participants.HEIRS_LOOKED_AT, (silent, plan)
    await filler.execute("UPDATE conversation_participant SET role = 'member' WHERE role = 'moderator'")
    await filler.execute(SILENCE, 900, 0)
    heir = await participants.heir(db, leaving)
    assert heir is not None
    assert await db.fetchval('SELECT name FROM "user" WHERE id = $1', heir.user_id) == "Heir 901"


GROWN = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version) SELECT 'group', 'Grown', $1, 2
    FROM generate_series(1, $3::int) RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, version, last_read_version)
    SELECT id, $1, 2, 2 FROM made
), people AS (
    INSERT INTO "user" (name, email) SELECT 'Silenced ' || n, 'silenced' || n || '@example.org'
    FROM generate_series(1, $3) n RETURNING id
)
INSERT INTO user_relationship (from_user_id, to_user_id, type, status)
SELECT $1, id, 'mute', 'active' FROM people UNION ALL SELECT id, $2, 'mute', 'active' FROM people
"""
"""User $1 is in $3 conversations and mutes $3 users, and $3 users mute user $2."""
READS_ALL = {
    "conversations",
    "memberships",
    "drafts",
    "made in a day",
    "taking part",
    "taken part",
    "delivered",
    "badge",
    "badges",
    "news",
    "relationships",
}
"""Statements that read all rows of a user, whose number is bounded. `delivered` reads relationships."""


async def test_cost_does_not_grow_with_the_data_of_other_users(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    nobody = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
    await prepare(db, hot(nobody, {"new": uuid4(), "middle": uuid4()}))
    place = await filled(filler, "grown", 200)
    middle = await db.fetchrow(
        "SELECT id, sender_id FROM message WHERE conversation_id = $1 AND sent_version = 100", place.conversation_id
    )
    assert middle is not None
    statements = hot(place, {"new": uuid4(), "middle": middle[0]})
    before = {name: await explained(db, name, arguments) for name, (_, arguments) in statements.items()}
    await filler.execute(GROWN, place.user_id, middle[1], 2_000)
    await db.execute("DISCARD PLANS")  # plans of empty tables read all conversations of a user for some statements
    after = {name: await explained(db, name, arguments) for name, (_, arguments) in statements.items()}
    await db.close()
    grown = {name: (before[name].rows, plan.rows) for name, plan in after.items() if plan.rows > before[name].rows + 50}
    assert grown.keys() <= READS_ALL, grown


JOINED = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version, last_activity_at)
    SELECT 'group', 'Joined', $1, 8, now() - n * interval '1 minute' FROM generate_series(1, $2::int) n RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, version, last_read_version)
    SELECT id, $1, 2, 4 FROM made
)
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT id, $1, 'Message', n, n FROM made, generate_series(3, 8) n
"""


@pytest.mark.parametrize("is_planned_first", [True, False])
async def test_cost_of_a_page_does_not_grow_with_the_conversations_of_its_user(
    db: "asyncpg.Connection[asyncpg.Record]",
    filler: "asyncpg.Connection[asyncpg.Record]",
    *,
    is_planned_first: bool,
) -> None:
    """A fresh start reads one page after another, and so would a resume."""
    user_id = await db.fetchval("INSERT INTO \"user\" (name, email) VALUES ('Ada', 'ada@example.org') RETURNING id")

    def asked(ids: list[Any]) -> dict[str, tuple[str, tuple[Any, ...]]]:
        versions, share = [6] * len(ids), 21
        return {
            "views": (conversation_views.GET, (user_id, ids)),
            "versions": (conversations.VERSIONS, (ids,)),
            "changes": (changes.MISSED, (ids, user_id, versions, 100, MAX_CHANGES_BYTES, share)),
        }

    if is_planned_first:
        await prepare(db, asked([]))
    pages: dict[int, dict[str, Plan]] = {}
    for size in (100, 2_000):
        await filler.execute(JOINED, user_id, size - sum(pages))
        ids = [row[0] for row in await db.fetch(conversation_views.ORDER, user_id)][-50:]
        if not is_planned_first and not pages:
            await prepare(db, asked(ids))
        pages[size] = {name: await explained(db, name, given) for name, (_, given) in asked(ids).items()}
    small, large = pages.values()
    for name, plan in large.items():
        assert plan.scanned == [], (name, plan)
        assert plan.rows <= small[name].rows + 10, (name, small[name], plan)
        # Conversations are on more pages, and indexes are a level higher.
        assert plan.pages <= 1.5 * small[name].pages + 50, (name, small[name], plan)


CROWD = """
WITH them AS (
    INSERT INTO "user" (name, email) SELECT 'Crowd ' || n, 'crowd' || n || '@example.org'
    FROM generate_series(1, $2::int) n RETURNING id
)
INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version) SELECT $1, id, 2, 2 FROM them
"""
SLOW_MODE = """
UPDATE conversation SET settings = '{"slow_mode_seconds": 1}';
UPDATE conversation_participant SET role = 'member'
"""
LISTS_PARTICIPANTS = {
    "get", "resume, 10 missed", "resume, all missed", "participants", "delivered", "readers", "why",
}  # fmt: skip
"""Statements that count or list the participants of a conversation."""


async def test_plans_of_an_empty_database_find_one_participant_of_many(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    nobody = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
    await prepare(db, hot(nobody, {"new": uuid4(), "middle": uuid4()}))
    place = await filled(filler, "first", 20)
    await filler.execute(SLOW_MODE)
    middle = await db.fetchval("SELECT id FROM message WHERE sent_version = 10")
    statements = hot(place, {"new": uuid4(), "middle": middle})
    before = {name: await explained(db, name, arguments) for name, (_, arguments) in statements.items()}
    await filler.execute(CROWD, place.conversation_id, 2_000)
    after = {name: await explained(db, name, arguments) for name, (_, arguments) in statements.items()}
    grown = {name: (before[name].rows, plan.rows) for name, plan in after.items() if plan.rows > before[name].rows + 50}
    assert grown.keys() <= LISTS_PARTICIPANTS, grown


ENDPOINTS = """
WITH begun AS (
    INSERT INTO session (user_id, token, expires_at)
    SELECT u.id, u.id::text, 'infinity' FROM unnest($1::uuid[]) u (id) RETURNING id, user_id
)
INSERT INTO push_endpoint (user_id, session_id, endpoint, p256dh, auth)
SELECT user_id, id, 'https://push.example/' || user_id, 'key', 'secret' FROM begun
"""
STRANGERS = "INSERT INTO \"user\" (name, email) SELECT 's', n || '@s' FROM generate_series(1, 300) n RETURNING id"


async def test_finding_recipients_costs_in_proportion_to_the_smaller_of_participants_and_endpoints(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    nobody = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
    await prepare(db, hot(nobody, {"new": uuid4(), "middle": uuid4()}))
    crowd, alone = await filled(filler, "many", 20), await filled(filler, "alone", 20)
    await filler.execute(CROWD, crowd.conversation_id, 2_000)
    found = (
        "SELECT user_id FROM conversation_participant WHERE conversation_id = $1 AND user_id <> $2 ORDER BY 1 LIMIT 5"
    )
    reachable = [row[0] for row in await db.fetch(found, crowd.conversation_id, crowd.user_id)]
    await filler.execute(ENDPOINTS, reachable)

    async def due(place: Place) -> tuple[set[UserId], int]:
        """Return the recipients of the first message in small pages, and the rows that one large page reads."""
        said = await db.fetchval("SELECT id FROM message WHERE conversation_id = $1 LIMIT 1", place.conversation_id)
        pages, recipients = [push.PushPage(place.conversation_id, push.FIRST, (said,))], list[UserId]()
        for page in pages:
            posts, following = await push.due(db, [page], 2)
            recipients += [post.user_id for post in posts]
            pages += [page._replace(after=after) for after in following.values()]
        assert len(recipients) == len(set(recipients)), "no user is found twice"
        plan = await explained(db, "due for a push", ([place.conversation_id], [push.FIRST], [said], 1_000))
        return set(recipients), plan.rows

    recipients, rows = await due(crowd)
    assert recipients == set(reachable)
    assert rows < 300, "five endpoints on the server, and 2,000 participants"
    strangers = [row[0] for row in await db.fetch(STRANGERS)]
    await filler.execute(ENDPOINTS, strangers)
    again, rows_of_all = await due(crowd)
    assert again == recipients
    assert rows_of_all < rows + 10 * len(strangers)
    recipients, rows = await due(alone)
    assert recipients == set()
    assert rows < 100, "one participant, and 305 endpoints on the server"


PAST_AND_CURRENT = """
INSERT INTO conversation_participant (conversation_id, user_id, status, version, joined_version, joined_at,
    last_read_version, left_version)
SELECT $1, gen_random_uuid(), status, 2, 2, now() + n * interval '1 us', $3, CASE status WHEN 'left' THEN 2 ELSE 0 END
FROM generate_series(1, $2::int) n, unnest('{left,active}'::text[]) status
"""


async def test_counting_readers_of_a_crowd_reads_a_bounded_number_of_participants(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    """Participants who have left do not count, and cost nothing where only current ones are read."""
    nobody = Place(ConversationId(uuid4()), UserId(uuid4()), SMALL)
    names = {"get": "read_by", "readers": "delivered_to", "why": "read_by"}
    planned = hot(nobody, {"new": uuid4(), "middle": uuid4()})
    await prepare(db, {name: planned[name] for name in names})
    place = await filled(filler, "popular", 20)
    await filler.execute("UPDATE conversation SET participant_count = 10000")
    middle = await db.fetchval("SELECT id FROM message WHERE sent_version = 10")
    statements = hot(place, {"new": uuid4(), "middle": middle})
    plans: list[dict[str, Plan]] = []
    for size, position in ((MAX_COUNTED_READERS - 1, 10), (4_000, 9), (10_000, 10)):
        await filler.execute(PAST_AND_CURRENT, place.conversation_id, size, position)
        plans.append({name: await explained(db, name, statements[name][1]) for name in names})
        for name, field in names.items():
            query, arguments = statements[name]
            counted = json.loads(await db.fetchval(query, *arguments))[field]
            assert counted == MAX_COUNTED_READERS - 1 or name == "why", "of the oldest participants"
    await db.close()
    for name, plan in plans[2].items():
        assert plan.rows <= plans[1][name].rows + (3 * MAX_TRACED_PARTICIPANTS if name == "why" else 100), name
        assert plan.scanned == [], name


MUCH = (
    """INSERT INTO conversation (id, type, title, created_by, version, is_public)
    SELECT place($1, n), 'group', 'Much', $1, $2::int, true FROM generate_series(1, 120) n""",
    """INSERT INTO conversation_participant (conversation_id, user_id, version, status, invited_by)
    SELECT place($1, n), $1, 2, CASE WHEN n <= 20 THEN 'active' ELSE 'invited' END, gen_random_uuid()
    FROM generate_series(1, 119 + least(1, $2::int)) n""",
    # In each of twenty conversations: a message of the user, messages that mention everyone, and replies.
    """INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, loud_mentions, created_at,
        thread_root_id, thread_order)
    SELECT place($1, 1000 * n + k), place($1, n), CASE k WHEN 0 THEN $1 ELSE gen_random_uuid() END, '', 1 + k, 1 + k,
        CASE WHEN k % 2 = 1 THEN '{everyone}'::text[] ELSE '{}' END, now() - k * interval '1 s',
        CASE WHEN k > 0 AND k % 2 = 0 THEN place($1, 1000 * n) END, k
    FROM generate_series(1, 20) n, generate_series(0, 2 * $2::int) k""",
    """INSERT INTO message_search SELECT id, conversation_id, created_at,
        search_words(conversation_id, content, payload, mentions, loud_mentions, '{}')
    FROM message WHERE conversation_id IN (SELECT place($1, n) FROM generate_series(1, $2::int) n)""",
    """INSERT INTO thread_follow (root_id, user_id, conversation_id)
    SELECT place($1, 1000 * n), $1, place($1, n) FROM generate_series(1, least(20, 20 * $2::int)) n""",
    """INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id, created_at)
    SELECT place($1, 1000 * n), gen_random_uuid(), 'x', place($1, n), k, $1, now() - (20 * k + n) * interval '1 s'
    FROM generate_series(1, 20) n, generate_series(1, $2::int) k""",
    """INSERT INTO user_relationship (from_user_id, to_user_id, type, updated_at)
    SELECT gen_random_uuid(), $1, 'friend', now() - k * interval '1 s' FROM generate_series(1, 20 * $2::int) k""",
)
"""Feed entries of user $1: 100 invitations, and $2 of each other kind in each of 20 conversations."""
PLACE = """
CREATE FUNCTION pg_temp.place(user_id uuid, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE RETURN
    (left(user_id::text, 24) || lpad(to_hex(n), 12, '0'))::uuid
"""


MUTE_ALL = """
INSERT INTO user_relationship (from_user_id, to_user_id, type, status)
SELECT $1, o.id, 'mute', 'active' FROM (
    SELECT sender_id AS id FROM message WHERE sender_id <> $1
    UNION SELECT user_id FROM message_reaction
    UNION SELECT from_user_id FROM user_relationship WHERE to_user_id = $1
) o
"""


@pytest.mark.parametrize("is_silenced", [False, True], ids=["entries", "messages of silenced users"])
async def test_cost_of_the_feed_does_not_grow_with(
    db: "asyncpg.Connection[asyncpg.Record]",
    filler: "asyncpg.Connection[asyncpg.Record]",
    is_silenced: bool,  # noqa: FBT001
) -> None:
    """Mentions by name are excluded, since the index of words is not ordered by time."""
    await filler.execute(PLACE)
    asked = {kind: (feed.ROWS, [kind], 21) for kind in feed.KINDS} | {"count": (feed.COUNT, list(feed.KINDS), 21)}
    for name, (query, _, _) in asked.items():
        await db.execute(f'PREPARE "{name}" AS {query}')
    plans: dict[int, dict[str, Plan]] = {}
    for much in (30, 300):
        user = await db.fetchval(
            'INSERT INTO "user" (name, email) VALUES ($1, $1) RETURNING id', f"much{much}@example.org"
        )
        for statement in MUCH:
            await filler.execute(statement.replace("place(", "pg_temp.place("), user, much)
        if is_silenced:
            await filler.execute(MUTE_ALL, user)
        there = (await latest.newest(db, user)).columns
        plans[much] = {
            name: await explained(db, name, (user, kinds, None, None, "2020-01-01", most, *there, [], [], [], []))
            for name, (_, kinds, most) in asked.items()
        }
    await db.close()
    for name, plan in plans[300].items():
        before = plans[30][name]
        assert before.rows > 20, name
        assert plan.scanned == [], name
        assert plan.rows < 1.5 * before.rows + 400, (name, before, plan)
        assert plan.pages < 1.5 * before.pages + 400, (name, before, plan)


MENTIONS = """
WITH sent AS (
    INSERT INTO message (conversation_id, sender_id, content, sent_version, version, created_at, mentions)
    SELECT $2, gen_random_uuid(), '', 1000 + n, 1000 + n, now() - n * interval '1 hour', ARRAY[$1::uuid]
    FROM generate_series(1, $3::int) n
    RETURNING id, conversation_id, created_at, mentions
)
INSERT INTO message_search SELECT id, conversation_id, created_at,
    search_words(conversation_id, '', NULL, mentions, '{}', '{}') FROM sent
"""
"""One mention of user $1 per hour."""


async def test_cost_of_the_newest_mentions_does_not_grow_with_older_ones(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    """This holds for the first page, for a later one, and for the number of new ones."""
    await db.execute(f"PREPARE named AS {feed.NAMED}")
    now = await db.fetchval("SELECT now()")
    plans = {}
    for name, count in (("few", 300), ("many", 6_000)):
        place = await filled(filler, name, 10)
        await filler.execute(MENTIONS, place.user_id, place.conversation_id, count)
        plans[name] = [
            await explained(db, "named", (place.user_id, ["mention"], before, before and UUID(int=0), after, most))
            for before, after, most in (
                (None, "0001-01-02", 21),
                (now - timedelta(days=5), "0001-01-02", 21),
                (None, now - timedelta(hours=3), 100),
            )
        ]
    await db.close()
    for few, many in zip(*plans.values(), strict=True):
        assert many.rows < few.rows + 50
        assert many.pages < few.pages + 50
        assert many.rows < 1_000
        assert many.scanned == []


KEEP_STARS = """
INSERT INTO message_star (user_id, message_id, conversation_id, user_version)
SELECT $1, m.id, m.conversation_id, m.version FROM message m
"""
KEEP_MORE = """
WITH drafted AS (
    INSERT INTO draft (user_id, conversation_id, content, user_version)
    SELECT $1::uuid, gen_random_uuid(), '', n FROM generate_series(1, 1000) n
), scheduled AS (
    INSERT INTO scheduled_message (id, sender_id, conversation_id, words, send_at, user_version)
    SELECT gen_random_uuid(), $1, gen_random_uuid(), '{}', now(), n FROM generate_series(1, 1000) n
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, version, user_version)
    SELECT gen_random_uuid(), $1, 1, n FROM generate_series(1, 1000) n
), liked AS (
    INSERT INTO user_relationship (from_user_id, to_user_id, type, from_version)
    SELECT $1, gen_random_uuid(), 'follow', n FROM generate_series(1, 1000) n
)
INSERT INTO user_relationship (from_user_id, to_user_id, type, to_version)
SELECT gen_random_uuid(), $1, 'follow', n FROM generate_series(1, 1000) n
"""
DUE = """
INSERT INTO scheduled_message (id, sender_id, conversation_id, words, send_at, user_version)
SELECT gen_random_uuid(), u.id, gen_random_uuid(), '{}', date_trunc('minute', now()), 1
FROM (SELECT id FROM "user" WHERE name LIKE 'Other %' ORDER BY id LIMIT $1) u, generate_series(1, $2::int)
"""
KEEP_THREADS = """
INSERT INTO thread_follow (user_id, root_id, conversation_id, user_version)
SELECT $1, m.id, m.conversation_id, m.version FROM message m
"""


async def test_cost_of_changes_does_not_grow_with_unchanged_rows_of_the_user(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    await db.execute(f"PREPARE news AS {own_news.READ}")
    await explained(db, "news", (uuid4(), 0, 501))
    place = await filled(filler, "keeper", 2_000)
    for keep in (KEEP_STARS, KEEP_THREADS, KEEP_MORE):
        await filler.execute(keep, place.user_id)
    plan = await explained(db, "news", (place.user_id, 1_999, 501))
    await db.close()
    assert plan.scanned == []
    assert plan.rows < 50, plan


MAKE_OLD = """
INSERT INTO conversation (type, title, created_by, created_at)
SELECT 'channel', 'Old', $1, now() - interval '2 days' FROM generate_series(1, 2000)
"""
REPORT_OLD = """
INSERT INTO report (conversation_id, message_id, reporter_id, reason, created_at)
SELECT m.conversation_id, m.id, $1, 'Rude', now() - interval '2 days' FROM message m
"""


async def test_cost_of_daily_counts_does_not_grow_with_older_rows(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    counts = {"made": bounds.MADE, "reported": bounds.REPORTS}
    for name, query in counts.items():
        await db.execute(f'PREPARE "{name}" AS {query}')
        await explained(db, name, (uuid4(),))
    place = await filled(filler, "maker", 2_000)
    for old in (MAKE_OLD, REPORT_OLD):
        await filler.execute(old, place.user_id)
    for name in counts:
        plan = await explained(db, name, (place.user_id,))
        assert plan.scanned == []
        assert plan.rows < 50, (name, plan)
    await db.close()


async def test_walk_of_scheduled_messages_reads_each_due_message_once(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    senders, of_each = 100, 100
    statements = {"walk": scheduled.WALK, "sender": scheduled.SENDER, "claim": scheduled.CLAIM}
    for name, query in statements.items():
        await db.execute(f'PREPARE "{name}" AS {query}')
    await filler.execute(OTHER_USERS, OTHERS)
    start = ("15 seconds", "1970-01-01", UUID(int=0), scheduled.WALKED)
    for name in statements:
        await explained(db, name, start if name == "walk" else ("15 seconds", uuid4()))
    await filler.execute(DUE, senders, of_each)
    last, found, plans = None, [], []
    while page := await scheduled.walk(db, last):
        place = start if last is None else (start[0], last.send_at, last.message_id, scheduled.WALKED)
        for mode in ("auto", "force_custom_plan"):
            await db.execute(f"SET plan_cache_mode = {mode}")
            plans.append(await explained(db, "walk", place))
        found += page
        last = page[-1]
    assert len({one.message_id for one in found}) == len(found) == senders * of_each
    assert max(plan.rows for plan in plans) <= 2 * scheduled.WALKED, "the limit, and the rows read"
    assert sum(plan.pages for plan in plans) <= 4 * len(found)
    assert not any(plan.scanned for plan in plans)
    of_one = [await explained(db, name, ("15 seconds", found[-1].sender_id)) for name in ("sender", "claim")]
    assert max(plan.rows for plan in of_one) < 10 * of_each, "linear, not quadratic"
    assert max(plan.pages for plan in of_one) < 2 * of_each + 50
    assert await scheduled.claim(db, found[-1].sender_id) is not None
    assert await scheduled.claim(db, found[-1].sender_id) is None, "one message of a sender at a time"
    await db.close()


ARRAYS_IN_ORDER = 17
"""Major version of PostgreSQL that reads an array of keys in one scan of an index."""
TAKES_PART = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version, participant_count, settings_version)
    SELECT 'group', 'Room', $1, 2, 1, 1 FROM generate_series(1, $2::int) RETURNING id
)
INSERT INTO conversation_participant (conversation_id, user_id, role) SELECT id, $1, 'owner' FROM made
"""
READ_OF = """
SELECT pg_stat_get_xact_tuples_returned(i) + pg_stat_get_xact_tuples_fetched(i)
FROM CAST('participant_user_idx'::regclass AS oid) i
"""


async def test_finding_common_conversations_costs_in_proportion_to_the_smaller_set(
    db: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """This holds when both have many conversations. Users with a direct conversation cost almost nothing."""
    one, other = [
        await db.fetchval("""INSERT INTO "user" (name, email) VALUES ($1, $1) RETURNING id""", name)
        for name in ("o", "p")
    ]
    await db.execute(TAKES_PART, one, 3_000)
    await db.execute(TAKES_PART, other, 100)

    async def read(first: UserId, second: UserId, *, are: bool) -> int:
        before = await db.fetchval(READ_OF)
        assert await db.fetchval("SELECT are_together($1, $2)", first, second) is are
        return int(await db.fetchval(READ_OF)) - int(before)

    async with db.transaction():
        for pair in ((one, other), (other, one)):
            assert 100 <= await read(*pair, are=False) < 2_500
        direct = await db.fetchval(
            """INSERT INTO conversation (type, created_by, direct_low, direct_high)
            VALUES ('direct', $1, least($1::uuid, $2), greatest($1::uuid, $2)) RETURNING id""", one, other,
        )  # fmt: skip
        for user_id in (one, other):
            await db.execute(
                "INSERT INTO conversation_participant (conversation_id, user_id) VALUES ($1, $2)", direct, user_id
            )
        assert await read(one, other, are=True) < 10


LOOKED_UP = """
SELECT sum(pg_stat_get_xact_numscans(i)) FROM unnest(ARRAY[
    'participant_user_idx'::regclass, 'conversation_participant_key'::regclass, 'conversation_pkey'::regclass
]::oid[]) i
"""
TAKE_PART = "INSERT INTO conversation_participant (conversation_id, user_id) SELECT unnest($1::uuid[]), $2"


async def test_common_conversation_of_users_with_thousands_is_found_in_few_index_scans(
    db: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """The conversations are not looked up one by one. A single common conversation is found, first or last."""
    one, other = [
        await db.fetchval("""INSERT INTO "user" (name, email) VALUES ($1, $1) RETURNING id""", name)
        for name in ("q", "r")
    ]
    for user_id in (one, other):
        await db.execute(TAKES_PART, user_id, 1_000)
    await db.execute("ANALYZE")
    async with db.transaction():
        before = await db.fetchval(LOOKED_UP)
        assert not await db.fetchval("SELECT are_together($1, $2)", one, other)
        looked_up = await db.fetchval(LOOKED_UP) - before
        if db.get_server_version().major >= ARRAYS_IN_ORDER:
            assert looked_up < 300
    theirs = [
        row[0]
        for row in await db.fetch(
            "SELECT conversation_id FROM conversation_participant WHERE user_id = $1 ORDER BY 1", one
        )
    ]
    for shared in (theirs[-1:], theirs[:1]):
        await db.execute(TAKE_PART, shared, other)
        for pair in ((one, other), (other, one)):
            assert await db.fetchval("SELECT are_together($1, $2)", *pair)
        await db.execute("UPDATE conversation SET is_deleted = true WHERE id = ANY($1)", shared)
        assert not await db.fetchval("SELECT are_together($1, $2)", one, other)


async def test_searches_use_their_indexes(
    db: "asyncpg.Connection[asyncpg.Record]", filler: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    # Statements are planned with empty tables, as in a new installation.
    statements = {
        "people": users.SEARCH,
        "channels": conversations.FIND,
        "messages": search_matches.MATCHES,
        "messages by the index": search_matches.INDEXED_IN_FEW,
        "messages by the index in many conversations": search_matches.INDEXED_IN_MANY,
        "messages, ranked": search.RANK,
        "page of messages": search.READ,
        "feed": feed.NAMED,
    }
    for name, query in statements.items():
        await db.execute(f'PREPARE "{name}" AS {query}')
    await others(filler)
    await db.execute("UPDATE conversation SET is_public = true, title = 'Channel ' || left(id::text, 8); ANALYZE")
    await filler.execute(OTHER_MESSAGES)
    await filler.execute("INSERT INTO message_search " + OTHER_WORDS)
    await filler.execute("ANALYZE")
    nobody = UserId(uuid4())
    somebody = await db.fetchval("SELECT user_id FROM conversation_participant LIMIT 1")
    title = await db.fetchval("SELECT title FROM conversation LIMIT 1")
    said = [await db.fetchval(f"SELECT array_agg({one}) FROM (SELECT * FROM message LIMIT 20) m")
            for one in ("id", "created_at::text")]  # fmt: skip
    there = await db.fetchval("SELECT array_agg(id) FROM (SELECT id FROM conversation LIMIT 5) c")
    looked_for = (
        "'word':*", there, [0] * 5, ["member"] * 5, "2100-01-01", uuid4(), None, None, None, None, None, 21,
    )  # fmt: skip
    asked: dict[str, tuple[Any, ...]] = {
        "people": (nobody, "other & 777:*", 20),
        "channels": (" & ".join(title.lower().split()), 20),
        "messages": (*looked_for, 1_000, 60),
        "messages by the index": looked_for,
        # It reads all matches of a word, so this word is rare.
        "messages by the index in many conversations": (f"'c:{there[0]}'", *looked_for[1:]),
        "messages, ranked": ("words:*", *said, None, None, None, 21),
        "page of messages": (somebody, "words:*", *said, [0.0] * 20),
        "feed": (somebody, list(feed.KINDS), None, None, "2020-01-01", 21),
    }
    await db.execute("SET enable_bitmapscan = on")
    for name, arguments in asked.items():
        plan = await explained(db, name, arguments)
        assert plan.scanned == [], name
        assert 0 < plan.rows < 1_000, (name, plan)
    await db.close()
