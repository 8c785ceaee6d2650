"""Row-level security: direct readers of PostgreSQL see what the server shows the user, and nothing else."""

import json
import random
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, ReportId, UserId, uuid7
from protocol.payloads import Poll
from protocol.server import Error
from protocol.values import ConversationSettings, ConversationView, Message, ReportStatus
from prove.client import Client
from server.describe.columns import granted
from tests.world import Reader, UserSession, World, message, refused, sent

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PEOPLE = 8


async def crowd(world: World, seed: int) -> tuple[list[UserSession], list[Client], list[ConversationId]]:
    """Let users act on each other at random. Return also all ids there are."""
    chance = random.Random(seed)
    people = [await world.user(f"Person {number}") for number in range(PEOPLE)]
    clients = [await world.connect(who, number % 2) for number, who in enumerate(people)]
    conversations = [
        await world.channel(
            clients[number], is_public=True,
            settings=ConversationSettings(history="from_joining" if number % 2 else "from_start"),
        )
        for number in range(4)
    ]  # fmt: skip
    said: list[tuple[ConversationId, MessageId]] = []
    for _ in range(400):
        one, other = chance.choice(clients), chance.choice(people).id
        about = chance.choice(conversations)
        place = chance.choice(said) if said else (about, MessageId(uuid7()))
        at: dict[str, Any] = {"conversation_id": place[0], "message_id": place[1]}
        frame = chance.choice([
            client.Join(conversation_id=about), client.Join(conversation_id=about), client.Leave(conversation_id=about),
            client.RemoveParticipant(conversation_id=about, user_id=other, ban=chance.random() < 0.5),
            client.SetRole(conversation_id=about, user_id=other, role=chance.choice(["moderator", "admin", "guest"])),
            client.Invite(conversation_id=about, participants=[other]),
            client.Send(conversation_id=about, message_id=MessageId(uuid7()), content="Words"),
            client.Send(
                conversation_id=about, message_id=MessageId(uuid7()), content="Tea?",
                payload=Poll(options=["Yes", "No"], is_anonymous=chance.random() < 0.5),
            ),
            client.Vote(**at, options=[chance.randrange(2)]), client.Star(**at), client.Unstar(**at),
            client.SetDraft(conversation_id=about, content="I thi"), client.FollowThread(**at),
            client.React(**at, emoji="👍"), client.Edit(**at, content="Edited"), client.Delete(**at),
            client.Moderate(**at, reason="Rude"), client.ReportMessage(**at, reason="Rude"),
            client.Block(user_id=other), client.RequestFriend(user_id=other), client.Mute(user_id=other),
            client.AnswerFriend(user_id=other, accept=chance.random() < 0.5), client.Follow(user_id=other),
            client.UpdateProfile(is_private=chance.random() < 0.5),
        ])  # fmt: skip
        answer = await one.ask(frame)
        if isinstance(frame, client.Send) and not isinstance(answer, Error):
            said.append((about, frame.message_id))
    for number, about in enumerate(conversations):
        await polls(clients[number], [clients[number - 1], clients[number - 2]], about)
    return people, clients, conversations


async def polls(owner: Client, others: list[Client], about: ConversationId) -> None:
    """Make polls of both kinds with votes, then left, closed, deleted, or hidden by a moderator."""
    for is_anonymous in (True, False):
        for end in (None, "close", "delete", "moderate"):
            poll = Poll(options=["Yes", "No"], is_anonymous=is_anonymous)
            asked = message(about, "Tea?", payload=poll)
            if isinstance(await owner.ask(asked), Error):
                return  # a moderator removed them
            place: dict[str, Any] = {"conversation_id": about, "message_id": asked.message_id}
            for one in (owner, *others):
                await one.ask(client.Join(conversation_id=about))
                await one.ask(client.Vote(**place, options=[0]))
            await others[0].ask(client.Vote(**place, options=[]))
            ends = {
                "close": client.ClosePoll(**place), "delete": client.Delete(**place),
                "moderate": client.Moderate(**place, reason="Rude"),
            }  # fmt: skip
            if end is not None:
                await owner.ask(ends[end])


async def votes(one: Client, who: UserId, messages: list[Message]) -> set[str]:
    """Return the votes that the server shows: those in lists of votes, and the user's own with a message."""
    found = set()
    for poll in messages:
        if poll.is_moderated or poll.content_type != "poll":
            continue
        place: dict[str, Any] = {"conversation_id": poll.conversation_id, "message_id": poll.id}
        answer = await one.ask(client.ListVotes(**place, limit=100))
        if not isinstance(answer, Error):
            assert isinstance(answer.result, server.VotePage)
            found |= {f"{poll.id} {vote.user_id}" for vote in answer.result.votes}
        if (await one.call(client.GetMessage(**place), server.OneMessage)).vote:
            found.add(f"{poll.id} {who}")
    return found


async def edits(one: Client, messages: list[Message]) -> set[UUID]:
    """Return the ids of the edits that the server lists. A deleted message keeps some and lists none."""
    found: set[UUID] = set()
    for each in messages:
        if each.edited_at is not None or each.is_deleted:
            answer = await one.ask(client.ListEdits(conversation_id=each.conversation_id, message_id=each.id))
            if not isinstance(answer, Error):
                assert isinstance(answer.result, server.EditPage)
                found |= {edit.id for edit in answer.result.edits}
    return found


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
async def test_reader_sees_what_the_server_shows(world: World, reader: Reader, seed: int) -> None:
    people, clients, conversations = await crowd(world, seed)
    everyone = [one.id for one in people]
    totals = {"messages": 0, "hidden": 0, "faces": 0, "votes": 0, "edits": 0}
    for who, one in zip(people, clients, strict=True):
        faces = await one.call(client.GetUsers(user_ids=everyone), server.UserList)
        assert set(await reader.seen(who.id, 'SELECT id FROM "user"')) == {face.id for face in faces.users}
        profiles = [
            other for other in everyone
            if not isinstance(await one.ask(client.GetProfile(user_id=other)), Error)
        ]  # fmt: skip
        assert set(await reader.seen(who.id, "SELECT id FROM user_profile")) == set(profiles)
        relationships = await one.call(client.ListRelationships(limit=100), server.RelationshipPage)
        assert set(await reader.seen(who.id, "SELECT id FROM user_relationship WHERE status <> 'inactive'")) == {
            entry.relationship.id for entry in relationships.relationships
        }
        mine = await one.call(client.ListConversations(limit=100), server.ConversationPage)
        assert set(await reader.seen(who.id, "SELECT id FROM conversation")) == {
            view.conversation.id for view in mine.conversations
        }
        said: dict[ConversationId, list[Message]] = {}
        shown: set[UUID] = set()
        withheld: set[UUID] = set()
        participants: set[UUID] = set()
        reports: set[UUID] = set()
        for view in mine.conversations:
            about = view.conversation.id
            page = await one.call(client.History(conversation_id=about, limit=100), server.MessagePage)
            assert not page.has_before
            said[about] = page.messages
            shown |= {each.id for each in page.messages if not each.is_moderated or each.id in page.withheld}
            withheld |= page.withheld.keys()
            entries = await one.call(client.ListParticipants(conversation_id=about, limit=100), server.ParticipantPage)
            participants |= {entry.participant.user_id for entry in entries.participants}
            answer = await one.ask(client.ListReports(conversation_id=about, limit=100))
            if not isinstance(answer, Error):
                assert isinstance(answer.result, server.ReportPage)
                reports |= {report.id for report in answer.result.reports}
        assert set(await reader.seen(who.id, "SELECT id FROM message")) == shown
        active = "SELECT user_id FROM conversation_participant WHERE status = 'active'"
        assert set(await reader.seen(who.id, active)) == participants
        assert set(await reader.seen(who.id, "SELECT id FROM report WHERE status = 'open'")) == reports
        drafts = await one.call(client.ListDrafts(), server.DraftList)
        assert set(await reader.seen(who.id, "SELECT conversation_id FROM draft WHERE content <> ''")) >= {
            draft.conversation_id for draft in drafts.drafts
        }
        for table, column in (("draft", "user_id"), ("message_star", "user_id"), ("thread_follow", "user_id")):
            assert set(await reader.seen(who.id, f"SELECT {column} FROM {table}")) <= {who.id}
        expected = await votes(
            one, who.id, [each for view in mine.conversations for each in said[view.conversation.id]]
        )
        key = "message_id || ' ' || user_id"
        assert set(await reader.seen(who.id, f"SELECT {key} FROM poll_vote")) == expected
        kept = await edits(one, [each for messages in said.values() for each in messages])
        assert set(await reader.seen(who.id, "SELECT id FROM message_edit")) == kept
        totals["edits"] += len(kept)
        totals["votes"] += len(expected)
        totals["messages"] += len(shown)
        totals["hidden"] += len(withheld)
        totals["faces"] += len(faces.users)
    assert all(totals.values()), totals
    assert conversations


async def told(one: Client, about: ConversationId, reader: Reader) -> dict[str, list[MessageId | None]]:
    """Return the messages that a user reads about in reports and in the log, in pages of one row.

    Asserts that the policies give the same rows.
    """
    found: dict[str, list[MessageId | None]] = {"open": [], "dismissed": [], "upheld": [], "noted": []}
    statuses: list[ReportStatus] = ["open", "dismissed", "upheld"]
    for status in statuses:
        asked = client.ListReports(conversation_id=about, status=status, limit=1)
        while True:
            page = await one.call(msgspec.structs.replace(asked, id=None), server.ReportPage)
            found[status] += [report.message_id for report in page.reports]
            if page.after is None:
                break
            asked.after = page.after
        query = f"SELECT message_id FROM report WHERE status = '{status}' ORDER BY id"
        assert await reader.seen(one.ready.user.id, query) == found[status], status
    log = client.ListAudit(conversation_id=about, limit=1)
    while True:
        entries = await one.call(msgspec.structs.replace(log, id=None), server.AuditPage)
        found["noted"] += [entry.message_id for entry in entries.entries if entry.message_id is not None]
        if entries.after is None:
            break
        log.after = entries.after
    query = "SELECT message_id FROM audit_entry WHERE message_id IS NOT NULL ORDER BY number"
    assert await reader.seen(one.ready.user.id, query) == found["noted"]
    return found


async def test_newcomer_sees_no_reports_or_log_entries_about_earlier_messages(world: World, reader: Reader) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    owner, rude, newcomer = await world.connect(ada), await world.connect(charles), await world.connect(mary, 1)
    about = await world.group(owner, charles, settings=ConversationSettings(history="from_joining"))

    async def reported(reason: str) -> dict[str, list[MessageId]]:
        """Have messages reported and moderated, and return the messages by what was done."""
        said = [await sent(rude, about, f"{reason} {number}") for number in range(4)]
        for message_id in said[:3]:
            place: dict[str, Any] = {"conversation_id": about, "message_id": message_id}
            await owner.call(client.ReportMessage(**place, reason=reason))
        listed = client.ListReports(conversation_id=about)
        reports = {one.message_id: one.id for one in (await owner.call(listed, server.ReportPage)).reports}
        await owner.call(client.DismissReport(conversation_id=about, report_id=reports[said[1]]))
        await owner.call(client.Moderate(conversation_id=about, message_id=said[2], reason=reason))
        await owner.call(client.Delete(conversation_id=about, message_id=said[3]))
        return {"open": said[:1], "dismissed": said[1:2], "upheld": said[2:3], "noted": said[1:]}

    before = await reported("Before")
    await owner.call(client.AddParticipants(conversation_id=about, participants=[mary.id]))
    await owner.call(client.SetRole(conversation_id=about, user_id=mary.id, role="admin"))
    after = await reported("After")
    everything = {way: before[way] + after[way] for way in before}
    assert await told(owner, about, reader) == everything
    assert await told(newcomer, about, reader) == after
    (hidden,) = await world.db.fetch("SELECT id FROM report WHERE message_id = $1", before["open"][0])
    for report_id in (hidden[0], ReportId(uuid7())):
        with refused(ErrorCode.NOT_FOUND, "report_id"):
            await newcomer.call(client.DismissReport(conversation_id=about, report_id=report_id))
    await owner.call(client.UpdateConversation(conversation_id=about, settings=ConversationSettings()))
    assert await told(newcomer, about, reader) == everything
    await newcomer.call(client.DismissReport(conversation_id=about, report_id=hidden[0]))


async def everything(reader: Reader, who: UserId) -> dict[str, list[Any]]:
    """Return all columns that a reader sees for a user, by `table.column`."""
    found: dict[str, list[Any]] = {}
    for table, names in granted().items():
        rows = [json.loads(row) for row in await reader.seen(
            who, f'SELECT row_to_json(t) FROM (SELECT {", ".join(names) or "*"} FROM "{table}" ORDER BY 1, 2) t'
        )]  # fmt: skip
        found |= {f"{table}.{name}": [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return found


async def test_newcomer_reads_of_earlier_messages_only_what_frames_show(world: World, reader: Reader) -> None:
    ada, mary, charles = await world.users("Ada", "Mary", "Charles")
    owner, newcomer, other = await world.connect(ada), await world.connect(mary, 1), await world.connect(charles)
    settings = ConversationSettings(history="from_joining", system_messages=False)
    about = await world.channel(owner, is_public=True, settings=settings)
    await other.call(client.Join(conversation_id=about))
    said = [await sent(other if number == 4 else owner, about, f"Before {number}") for number in range(6)]
    said.append(await sent(owner, about, "Tea?", payload=Poll(options=["Yes", "No"])))
    await newcomer.call(client.Join(conversation_id=about), server.OneConversation)

    async def shown() -> list[ConversationView]:
        return (await newcomer.call(client.ListConversations(), server.ConversationPage)).conversations

    before, view = await everything(reader, mary.id), await shown()
    assert before["conversation.id"] == [str(about)]
    places: list[dict[str, Any]] = [{"conversation_id": about, "message_id": one} for one in said]
    for frame in (
        client.Delete(**places[0]), client.Edit(**places[1], content="Edited"), client.React(**places[2], emoji="👍"),
        client.Pin(**places[3]), client.Moderate(**places[4], reason="Rude"), client.Star(**places[5]),
        client.Vote(**places[6], options=[0]), client.ClosePoll(**places[6]),
        client.SetInviteCode(conversation_id=about, is_open=True),
    ):  # fmt: skip
        assert not isinstance(await owner.ask(frame), Error), frame
    after, (now,) = await everything(reader, mary.id), await shown()
    changed = {place for place, rows in after.items() if rows != before.get(place)}
    assert changed == {"conversation.version", "conversation.settings_version"}
    assert after["conversation.version"] == [now.version] != [view[0].version]
    assert after["conversation.settings_version"] == [now.conversation.version] != [view[0].conversation.version]


async def test_reader_without_a_user_id_sees_no_rows(world: World, reader: Reader) -> None:
    ada = await world.connect(await world.user("Ada"))
    await sent(ada, await world.channel(ada, is_public=True))
    for table in ('"user"', "session", "conversation", "conversation_participant", "message", "audit_entry"):
        assert await reader.seen(None, f"SELECT 1 FROM {table}") == []


ATTACKS = [
    'SELECT email FROM "user"',
    'SELECT bio FROM "user"',
    "SELECT token FROM session",
    "SELECT * FROM account",
    "SELECT * FROM verification",
    "SELECT invite_code FROM conversation",
    "SELECT last_read_message_id FROM conversation_participant",
    "SELECT can_see_online_status FROM user_relationship",
    "SELECT words FROM message_search",
    "SELECT endpoint FROM push_endpoint",
    "SELECT value FROM server_key",
    "SELECT silenced(gen_random_uuid())",
    "SELECT load_rows('user', '[]')",
    "SELECT may('see_face', gen_random_uuid(), gen_random_uuid())",
    "SELECT are_together(gen_random_uuid(), gen_random_uuid())",
    "SELECT grant_reader('postgres')",
    "SELECT close_to_public()",
    "CREATE TEMP TABLE mine ()",
    "CREATE VIEW public.mine AS SELECT 1",
    "CREATE SCHEMA mine",
    "UPDATE message SET content = 'Changed'",
    "DELETE FROM audit_entry",
    "INSERT INTO user_relationship (from_user_id, to_user_id, type) SELECT id, id, 'friend' FROM message",
    'UPDATE "user" SET is_admin = true',
    "TRUNCATE message",
    "ALTER TABLE message DISABLE ROW LEVEL SECURITY",
    "CREATE FUNCTION public.leak() RETURNS int LANGUAGE sql RETURN 1",
]


async def test_reader_cannot_exceed_its_grants(world: World, reader: Reader) -> None:
    ada = await world.user("Ada")
    one = await world.connect(ada)
    kept = await sent(one, await world.channel(one), "Kept")
    await reader.seen(ada.id, "SELECT 1")
    for attack in ATTACKS:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.db.execute(attack)
    assert await world.db.fetchval("SELECT content FROM message WHERE id = $1", kept) == "Kept"


async def test_errors_reveal_no_column_that_is_not_granted(world: World, reader: Reader) -> None:
    """A column of the reader's own row that is given in place of a permission is not read."""
    ada = await world.user("Ada")
    one = await world.connect(ada)
    channel = await world.channel(one)
    await sent(one, channel)
    columns = [row[0] for row in await world.db.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'conversation_participant'::regclass AND attnum > 0"
    )]  # fmt: skip
    for column in columns:
        asked = f"SELECT is_allowed('{channel}', 'nobody', '{column}')"
        assert await reader.seen(ada.id, asked) in ([False], [None]), column


async def test_leaking_functions_run_after_the_policy(world: World, reader: Reader) -> None:
    """A function that reveals its arguments does not run on rows that the policy hides."""
    ada, mary = await world.users("Ada", "Mary")
    one = await world.connect(ada)
    await sent(one, await world.channel(one), "Secret")
    leaking = "SELECT 1 FROM message WHERE CASE WHEN content LIKE 'Secret%' THEN 1 / (length(content) - 6) > 0 END"
    assert await reader.seen(mary.id, leaking) == []
    with pytest.raises(asyncpg.DivisionByZeroError):
        await reader.seen(ada.id, leaking)


async def test_policies_are_evaluated_before_comparisons_of_a_reader(world: World, reader: Reader) -> None:
    """Comparisons are leakproof. Evaluated before a policy, they would reveal hidden values by EXPLAIN (ANALYZE).

    The policy would read blocks only for rows that pass them.
    """
    columns = await world.db.fetch("""
        SELECT p.tablename, a.attname, format_type(a.atttypid, NULL) AS type FROM pg_policies p
        JOIN pg_attribute a ON a.attrelid = format('public.%I', p.tablename)::regclass AND a.attnum > 0
        WHERE NOT a.attisdropped AND p.schemaname = 'public'
    """)
    values = {
        "text": "'x'", "uuid": f"'{uuid7()}'", "timestamp with time zone": "'2000-01-01'", "bigint": "1",
        "integer": "1",
    }  # fmt: skip
    who = UserId(uuid7())
    asked = set()
    for table, column, kind in columns:
        if kind not in values:
            continue
        try:
            plan = await reader.seen(who, f'EXPLAIN SELECT 1 FROM "{table}" WHERE {column} >= {values[kind]}')
        except asyncpg.InsufficientPrivilegeError:
            continue
        filters = [line for line in plan if "Filter:" in line]
        policy = min(filters[0].find(name) % 10_000 for name in ("may_i(", "is_", "are_"))
        assert policy < filters[0].find(f"{column} >=") % 10_000, (table, column, plan)
        asked.add(table)
    assert {"message", "message_edit", "user", "conversation_participant", "user_relationship", "poll_vote"} <= asked
    assert {"draft", "scheduled_message", "session", "message_star", "thread_follow"} <= asked


async def test_each_policy_is_one_call_that_is_cheaper_than_an_operator(world: World) -> None:
    """PostgreSQL splits a policy at each AND, and orders the parts and the reader's comparisons by cost."""
    calls = await world.db.fetch(r"""
        SELECT p.tablename, p.qual, f.procost, f.prosecdef FROM pg_policies p
        LEFT JOIN pg_proc f ON f.pronamespace = 'public'::regnamespace
            AND f.proname = substring(p.qual FROM '^(\w+)\([^()]*\)$')
        WHERE p.schemaname = 'public'
    """)
    assert len(calls) > 15
    assert [row["tablename"] for row in calls if not (row["procost"] and row["procost"] <= 0.0001)] == []
    # A function that does not run as its owner may be inlined into the query.
    assert all(row["prosecdef"] for row in calls)
