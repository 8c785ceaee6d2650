"""Accounts with thousands of conversations and changes are read in pages and in turns, without a loss."""

from contextlib import nullcontext
from typing import Any

import pytest
from asyncpg import Connection

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId
from protocol.limits import MAX_CHANGES_BYTES
from protocol.payloads import Poll
from server.db.database import Database
from server.domain import sync
from server.fairness.share import Share
from server.hub.topics import Topics
from server.queries import changes, conversation_views, conversations, latest, memberships, own_news
from tests.world import Room, UserSession, World, refused, sent

FILL = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version, participant_count, settings_version)
    SELECT 'group', 'Room ' || n, $1, 2, 1, 1 FROM generate_series(1, $2::int) n RETURNING id
)
INSERT INTO conversation_participant (conversation_id, user_id, role, version, last_read_version)
SELECT id, $1, 'owner', 2, 2 FROM made
"""
FOLLOW = """
WITH others AS (
    INSERT INTO "user" (name, email) SELECT 'Other ' || n, 'other' || n || '@example.org'
    FROM generate_series(1, $2::int) n RETURNING id
), moved AS (UPDATE "user" SET version = version + $2 WHERE id = $1 RETURNING version)
INSERT INTO user_relationship (from_user_id, to_user_id, type, status, from_version)
SELECT $1, id, 'follow', 'active', m.version - $2 + 1 + row_number() OVER () / 9 FROM others, moved m
"""


async def test_resume_without_a_turn_is_refused_and_succeeds_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "CONVERSATIONS_PER_PAGE", 3)
    turns = world.workers[0].app._database._state.catching_up = Share(1, waiting=0, patience=60.0)  # noqa: SLF001
    (ada,) = await world.users("Ada")
    await world.db.execute(FILL, ada.id, 10)
    reader = await world.connect(ada, query="?resume=1")
    frame = client.Resume(epoch=reader.ready.epoch, versions={}, user_version=0)
    async with turns.hold(nullcontext()):
        answer = await reader.ask(frame)
        assert isinstance(answer, server.Error)
        assert (answer.code, bool(answer.retry_after_ms)) == (ErrorCode.UNAVAILABLE, True)
    assert (await reader.call(frame, server.Resumed)).conversations == 10
    joined = [event.view.conversation.id for event in reader.events if isinstance(event, server.ConversationJoined)]
    assert len(set(joined)) == 10


async def test_resume_of_many_conversations_reads_pages_in_turns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each statement reads few conversations. After the first page, each needs a connection from a share."""
    monkeypatch.setattr(sync, "CONVERSATIONS_PER_PAGE", 3)
    monkeypatch.setattr(memberships, "MAX_READ", 4)
    asked: list[int] = []
    in_turn: list[int] = []
    rows_read: list[int] = []
    parts, catching_up, fetch = conversation_views.parts, Database.catching_up, Connection.fetch

    async def counted(db: Any, user_id: Any, wanted: Any) -> Any:
        asked.append(len(wanted))
        return await parts(db, user_id, wanted)

    def taken(database: Database) -> Any:
        in_turn.append(1)
        return catching_up(database)

    async def fetched(db: Any, query: str, *args: Any, **options: Any) -> Any:
        rows = await fetch(db, query, *args, **options)
        if query == memberships.READ:
            rows_read.append(len(rows))
        return rows

    monkeypatch.setattr(Connection, "fetch", fetched)
    monkeypatch.setattr(conversation_views, "parts", counted)
    monkeypatch.setattr(Database, "catching_up", taken)
    (ada,) = await world.users("Ada")
    await world.db.execute(FILL, ada.id, 10)
    every = {row[0] for row in await world.db.fetch("SELECT id FROM conversation")}
    for versions, epoch, kind, expected in (
        ({}, None, server.ConversationJoined, 4),
        (dict.fromkeys(every, 1), "another", server.StartOver, 4),
        (dict.fromkeys(every, 1), None, server.Changes, 0),
    ):
        asked.clear()
        in_turn.clear()
        reader = await world.connect(ada, query="?resume=1")
        done = await reader.call(client.Resume(epoch=epoch or reader.ready.epoch, versions=versions), server.Resumed)
        assert done.conversations == 10
        told = [event for event in reader.events if isinstance(event, kind)]
        said = {one.conversation_id if isinstance(one, server.Changes) else one.view.conversation.id for one in told}
        assert (len(told), said) == (10, every)
        assert len(asked) == expected
        assert max(asked, default=0) <= 3
        assert 0 < max(rows_read) <= 4
        assert len(in_turn) >= 3


CHANGE = """
WITH moved AS (UPDATE conversation SET version = version + $2::int WHERE id = ANY($1) RETURNING id, version)
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT id, $3, repeat('x', $4), version - $2 + n, version - $2 + n FROM moved, generate_series(1, $2) n
"""


OF_RESUME = {memberships.READ, conversations.VERSIONS, changes.MISSED, conversation_views.GET, own_news.READ}
"""The statements of a `resume`. Jobs run others meanwhile."""


class Asked:
    """The statements that workers send to PostgreSQL, and for each read of changes its conversations and rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statements: list[str] = []
        self.reads: list[tuple[int, int]] = []
        for name in ("fetch", "fetchrow", "fetchval", "execute"):
            monkeypatch.setattr(Connection, name, self._counted(getattr(Connection, name)))

    def _counted(self, method: Any) -> Any:
        async def counted(db: Any, query: str, *args: Any, **options: Any) -> Any:
            self.statements.append(query)
            rows = await method(db, query, *args, **options)
            if query == changes.MISSED:
                self.reads.append((len(args[0]), sum(len(row["versions"]) for row in rows)))
            return rows

        return counted


async def resumed(
    world: World, who: UserSession, versions: dict[ConversationId, int], asked: Asked
) -> dict[ConversationId, list[int]]:
    """Resume, and return the versions of the changes of each conversation. `asked` gets the statements of the frame."""
    reader = await world.connect(who, query="?resume=1")
    asked.statements.clear()
    await reader.call(client.Resume(epoch=reader.ready.epoch, versions=versions, user_version=0), server.Resumed)
    found: dict[ConversationId, list[int]] = {}
    for event in reader.events:
        if isinstance(event, server.Changes):
            found.setdefault(event.conversation_id, []).extend(one.version for one in event.events)
    return found


async def test_resume_of_200_changed_conversations_takes_few_statements(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(FILL, ada.id, 300)
    every = {row[0]: 2 for row in await world.db.fetch("SELECT id FROM conversation")}
    changed = list(every)[:200]
    for count in (1, 2, 3):
        await world.db.execute(CHANGE, changed[:: 4 - count], count, charles.id, 10)
    asked = Asked(monkeypatch)
    found = await resumed(world, ada, every, asked)
    assert found.keys() == set(changed)
    assert all(versions == list(range(3, 3 + len(versions))) for versions in found.values())
    assert sum(map(len, found.values())) == 200 * 3 + 100 * 2 + 67
    assert len([one for one in asked.statements if one in OF_RESUME]) <= 10
    assert len(asked.reads) == 200 / sync.CONVERSATIONS_PER_PAGE


async def test_start_reads_and_follows_conversations_in_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (ada,) = await world.users("Ada")
    count = sync.FOLLOWED_AT_ONCE + 1
    await world.db.execute(FILL, ada.id, count)
    asked = Asked(monkeypatch)
    reader = await world.connect(ada)
    pages = [event for event in reader.events if isinstance(event, server.Conversations)]
    assert len({view.conversation.id for page in pages for view in page.conversations}) == count
    assert asked.statements.count(conversation_views.ORDER) == 1
    assert asked.statements.count(conversation_views.GET) == len(pages) == 1 + count // sync.CONVERSATIONS_PER_PAGE
    # Both workers also compare the versions of followed conversations.
    assert 2 <= asked.statements.count(conversations.VERSIONS) < len(pages)


async def test_changes_that_do_not_fit_into_a_shared_statement_are_read_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for their number and for their bytes. They arrive whole, and no statement exceeds the bounds."""
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(FILL, ada.id, 12)
    every = {row[0]: 2 for row in await world.db.fetch("SELECT id FROM conversation")}
    few, many, large = list(every)[:8], list(every)[8:10], list(every)[10:]
    await world.db.execute(CHANGE, few, 1, charles.id, 10)
    await world.db.execute(CHANGE, many, 600, charles.id, 10)
    await world.db.execute(CHANGE, large, 120, charles.id, 10_000)
    asked = Asked(monkeypatch)
    found = await resumed(world, ada, every, asked)
    assert {one: len(versions) for one, versions in found.items()} == (
        dict.fromkeys(few, 1) | dict.fromkeys(many, 600) | dict.fromkeys(large, 120)
    )
    # Both large ones have room by their number, and only one by its bytes.
    assert asked.reads == [(8, 8), (2, 120), (1, 120), (1, 600), (1, 600)]


COUNT_BYTES = """
CREATE SEQUENCE made MINVALUE 0 START 0;
SELECT nextval('made');
ALTER FUNCTION message_json(message) RENAME TO uncounted;
CREATE FUNCTION message_json(m message) RETURNS json LANGUAGE plpgsql STABLE AS $$
DECLARE
    made json := uncounted(m);
BEGIN
    PERFORM setval('made', (SELECT last_value FROM made) + octet_length(made::text));
    RETURN made;
END $$;
"""


@pytest.mark.parametrize(("each", "statements"), [(10, 2), (60, 12)], ids=["several fit", "one fits"])
async def test_postgresql_makes_no_changes_that_it_does_not_send(
    world: World, monkeypatch: pytest.MonkeyPatch, each: int, statements: int
) -> None:
    """Conversations that do not fit into a statement are left out before their messages are made to JSON. `since`
    reads too many changes in parts, and each part makes about what it returns.
    """
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(COUNT_BYTES)
    await world.db.execute(FILL, ada.id, 12)
    every = {row[0]: 2 for row in await world.db.fetch("SELECT id FROM conversation")}
    await world.db.execute(CHANGE.replace("'x'", "'\u4e00'"), list(every), each, charles.id, 10_000)
    asked = Asked(monkeypatch)
    found = await resumed(world, ada, every, asked)
    assert all(len(found[one]) == each for one in every)
    bytes_each = 31_000
    assert await world.db.fetchval("SELECT last_value FROM made") <= 1.1 * 12 * each * bytes_each
    assert len(asked.reads) == statements
    first = next(iter(every))
    await world.db.execute(CHANGE.replace("'x'", "'\u4e00'"), [first], 200, charles.id, 10_000)
    await world.db.execute("SELECT setval('made', 0)")
    late = await changes.since(world.db, first, 2, limit=1_000)
    assert late is not None
    part = await late.decoded()
    assert len(part.changes.events) * bytes_each > MAX_CHANGES_BYTES / 2
    assert await world.db.fetchval("SELECT last_value FROM made") <= MAX_CHANGES_BYTES + 2 * bytes_each
    await world.db.execute("SELECT setval('made', 0)")
    assert (await resumed(world, ada, every, asked)).keys() == every.keys() - {first}, "it starts over"
    assert await world.db.fetchval("SELECT last_value FROM made") <= 1.1 * 12 * each * bytes_each


async def test_lengths_never_exceed_the_json_of_a_message(room: Room, world: World) -> None:
    """Otherwise a client would start over although its changes fit."""
    numbers = {str(number): number for number in range(120)}
    for content, fields in (
        ("x", {}),
        ("\u4e00" * 10_000, {"metadata": numbers}),
        ("**x** " * 500, {"is_markdown": True, "metadata": {"x": "y" * 10_000}}),
        ("Tea?", {"payload": Poll(options=[str(number) for number in range(20)])}),
    ):
        await sent(room.ada, room.group, content, **fields)
    hidden, deleted = [await sent(room.ada, room.group, "x" * 5_000) for _ in range(2)]
    await world.moderate_as_owner(client.Moderate(conversation_id=room.group, message_id=hidden, reason="Rude"))
    await room.ada.call(client.Delete(conversation_id=room.group, message_id=deleted))
    sizes = changes._SIZES.format(since="0", limit="100")  # noqa: SLF001
    for settings in ("{}", '{"history": "from_joining"}'):
        await world.db.execute("UPDATE conversation SET settings = $1, access_version = version - 3", settings)
        rows = await world.db.fetch(
            f"SELECT s.* FROM conversation c CROSS JOIN LATERAL ({sizes}) s WHERE id = $1", room.group
        )
        found = await world.db.fetchrow(changes.SINCE, room.group, 0, 100, MAX_CHANGES_BYTES)
        assert found is not None
        made = dict(zip(found["versions"], map(len, map(str.encode, found["events"])), strict=True))
        assert len(rows) == 6
        assert all(row["bytes"] <= made[row["version"]] for row in rows), (rows, made)


async def test_changes_during_a_resume_exceed_the_share_of_a_conversation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(FILL, ada.id, 50)
    every = {row[0]: 2 for row in await world.db.fetch("SELECT id FROM conversation")}
    busy, over, *_ = every
    await world.db.execute(CHANGE, list(every), 1, charles.id, 10)
    open_topics = Topics.open

    async def late(self: Topics, conversation_ids: Any) -> None:
        if not asked.reads and len(made) < 2:
            made.append(await world.db.execute(CHANGE, [busy], 10, charles.id, 10))
            await world.db.execute(CHANGE, [over], 600, charles.id, 10)
        await open_topics(self, conversation_ids)

    made: list[str] = []
    asked = Asked(monkeypatch)
    monkeypatch.setattr(Topics, "open", late)
    found = await resumed(world, ada, every, asked)
    assert over not in found, "it starts over"
    assert {one: len(versions) for one, versions in found.items()} == dict.fromkeys(every.keys() - {over}, 1) | {
        busy: 21
    }
    assert [count for count, _ in asked.reads] == [50, 2, 1]


async def test_own_changes_are_read_in_pages_and_none_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More changes than a page holds may have the same user version."""
    monkeypatch.setattr(sync, "OWN_PAGE", 7)
    read: list[int] = []
    news = own_news.read

    async def counted(db: Any, user_id: Any, since: int, *, limit: int) -> Any:
        found = await news(db, user_id, since, limit=limit)
        read.append(len((await found.decoded()).events))
        return found

    monkeypatch.setattr(own_news, "read", counted)
    (ada,) = await world.users("Ada")
    await world.db.execute(FOLLOW, ada.id, 50)
    reader = await world.connect(ada, query="?resume=1")
    await reader.call(client.Resume(epoch=reader.ready.epoch, versions={}, user_version=0))
    told = [event for event in reader.events if isinstance(event, server.RelationshipChanged)]
    assert len({event.relationship.user_id for event in told}) == len(told) == 50
    assert [event.user_version for event in told] == sorted(event.user_version for event in told)
    # Nine changes have the same version, more than a page holds, so that page is read at twice its size.
    assert max(read) <= 14
    late = await world.connect(ada, query="?resume=1")
    await late.call(client.Resume(epoch=late.ready.epoch, versions={}, user_version=told[-1].user_version))
    assert not [event for event in late.events if isinstance(event, server.RelationshipChanged)]


async def test_search_and_feed_read_the_latest_conversations(room: Room, world: World) -> None:
    """Older conversations are found by name, and the answer is marked as incomplete."""
    ada, mine = room.ada, room.users[0].id
    await world.db.execute(FILL, mine, latest.SEARCHED)
    old, new = await world.group(room.charles, room.users[0]), await world.group(room.charles, room.users[0])
    there = {one: await sent(room.charles, one, "Found @everyone") for one in (old, new)}
    named = await sent(room.charles, old, "Hello @Ada")
    await world.db.execute("UPDATE conversation SET last_activity_at = '2020-01-01' WHERE id = $1", old)
    await world.indexed()
    found = await ada.call(client.Search(text="found"), server.SearchPage)
    assert ([hit.message.id for hit in found.hits], found.is_partial) == ([there[new]], True)
    found = await ada.call(client.Search(text="found", conversation_id=old), server.SearchPage)
    assert ([hit.message.id for hit in found.hits], found.is_partial) == ([there[old]], False)
    page = await ada.call(client.ListFeed(kinds=["mention"]), server.FeedPage)
    assert [one.message.id for one in page.entries if one.message is not None] == [named, there[new]]
    assert page.is_partial, "a mention of everyone is missing"
    assert not (await ada.call(client.ListFeed(kinds=["reply"]), server.FeedPage)).is_partial
    found = await ada.call(client.Search(mentions_me=True, conversation_id=old), server.SearchPage)
    assert [hit.message.id for hit in found.hits] == [named, there[old]], "mentions of everyone are included"
    found = await room.charles.call(client.Search(text="found"), server.SearchPage)
    assert (len(found.hits), found.is_partial) == (2, False)
    with refused(ErrorCode.INVALID, "text"):
        await ada.call(client.Search())
