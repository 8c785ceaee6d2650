"""Every message is added to the search index once, soon after it is sent, and a deleted one never comes back."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
import pytest

from protocol import client, server
from protocol.ids import MessageId
from protocol.values import ConversationSettings
from prove.client import Client
from server.core.config import Settings
from server.db.database import speak
from server.jobs import search_index as job
from server.queries import expiry, search_index
from server.queries.expiry import Due
from server.queries.search_index import FIRST
from tests.world import Room, World, sent

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

WORDS = "SELECT words::text FROM message_search WHERE message_id = $1"
WAITING = "SELECT count(*) FROM search_queue"


@pytest.fixture
async def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker adds messages."""
    monkeypatch.setattr(job, "GATHER_SECONDS", 3_600.0)
    monkeypatch.setattr(job, "SWEEP_SECONDS", 3_600.0)


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[Db]:
    """A connection of another worker."""
    db = await asyncpg.connect(settings.database_url)
    await speak(db, settings.search_language)
    yield db
    await db.close()


async def found(one: Client, text: str) -> list[MessageId]:
    page = await one.call(client.Search(text=text), server.SearchPage)
    return [hit.message.id for hit in page.hits]


async def test_message_is_found_soon_after_it_is_sent(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.GATHER_SECONDS < 0.5
    monkeypatch.setattr(job, "SWEEP_SECONDS", 3_600.0)
    async with World(settings) as world:
        ada = await world.connect(await world.user("Ada"), 1)
        about = await world.channel(ada)
        async with asyncio.timeout(15):
            for word in ("engine", "loom"):
                said = await sent(ada, about, word)
                while await found(ada, word) != [said]:
                    await asyncio.sleep(0.1)


async def test_message_of_a_killed_worker_is_found_after_a_restart(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(job, "GATHER_SECONDS", 3_600.0)
        patched.setattr(job, "SWEEP_SECONDS", 3_600.0)
        async with World(settings, workers=1) as world:
            who = await world.user("Ada")
            ada = await world.connect(who)
            said = await sent(ada, await world.channel(ada), "engine")
            assert await found(ada, "engine") == []
    async with World(settings, workers=1) as world, asyncio.timeout(15):
        ada = await world.connect(who)
        while await found(ada, "engine") != [said]:
            await asyncio.sleep(0.05)


# A statement that sends takes its snapshot, waits for a lock, and then gets its transaction id.
WAITED = "INSERT INTO search_queue (message_ids) SELECT ARRAY[$1::uuid] FROM pg_sleep(0.4)"


async def test_message_of_a_statement_that_waited_is_not_overlooked(
    settings: Settings, other: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SWEEP_SECONDS", 3_600.0)
    monkeypatch.setattr(job, "GATHER_SECONDS", 0.01)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        about = await world.channel(ada)

        async def indexed() -> None:
            while await world.db.fetchval(WAITING):
                await asyncio.sleep(0.01)

        said = await sent(ada, about, "engine")
        async with asyncio.timeout(15):
            await indexed()
            waiting = asyncio.create_task(other.execute(WAITED, said))
            while not waiting.done():
                await sent(ada, about, "loom")
            await waiting
            await sent(ada, about, "loom")
            await indexed()


@pytest.mark.usefixtures("quiet")
class TestQueue:
    """The test decides when messages are added."""

    async def test_two_workers_never_add_the_same_message(self, room: Room, world: World, other: Db) -> None:
        for number in range(search_index.MAX_ROWS + 1):
            await sent(room.ada, room.group, f"engine {number}")
        waiting = await world.db.fetchval(WAITING)
        first, second = world.db.transaction(), other.transaction()
        await first.start()
        await second.start()
        one, two = [await search_index.waiting(db, FIRST) for db in (world.db, other)]
        assert (one.taken, one.taken + two.taken) == (search_index.MAX_ROWS, waiting)
        await first.rollback()  # as if the worker were killed
        await second.commit()
        assert await world.db.fetchval(WAITING) == one.taken
        assert (await search_index.waiting(other, FIRST)).taken == one.taken
        assert await world.db.fetchval("SELECT count(*) FROM message_search") == search_index.MAX_ROWS + 1

    async def test_statement_adds_a_bounded_number_of_messages(self, room: Room, world: World) -> None:
        said = await sent(room.ada, room.group, "engine")
        await world.db.execute("DELETE FROM search_queue")
        for _ in range(4):
            await world.db.execute(
                "INSERT INTO search_queue (message_ids) SELECT array_agg($1::uuid) FROM generate_series(1, $2)",
                said,
                search_index.MAX_MESSAGES // 2 + 1,
            )
        taken = [(await search_index.waiting(world.db, FIRST)).taken for _ in range(3)]
        assert taken == [2, 2, 0]

    async def test_message_that_commits_late_is_not_overlooked(self, room: Room, world: World, other: Db) -> None:
        async with other.transaction():
            await other.execute('UPDATE "user" SET bio = $1', "")  # it has its transaction id before the others
            said = await sent(room.ada, room.group, "engine")
            await search_index.waiting(world.db, FIRST)
            batch = await search_index.waiting(world.db, FIRST)
            await other.execute("INSERT INTO search_queue (message_ids) VALUES ($1)", [said])
        await sent(room.ada, room.group, "loom")
        assert [(await search_index.waiting(world.db, batch.floor)).taken for _ in range(2)] == [2, 0]
        floor = (await search_index.waiting(world.db, batch.floor)).floor
        assert int(floor) > int(batch.floor)

    async def test_deleted_words_never_come_back(self, room: Room, world: World, other: Db) -> None:
        """A delete waits for the worker that adds the message, and takes away what it added."""
        said = await sent(room.ada, room.group, "secret")
        adding = other.transaction()
        await adding.start()
        assert (await search_index.waiting(other, FIRST)).left == 0
        deleting: asyncio.Task[server.Changed] = asyncio.create_task(room.ada.call(client.Delete(**room.at(said))))
        _, waits = await asyncio.wait([deleting], timeout=0.1)
        assert waits
        await adding.commit()
        await deleting
        assert await world.db.fetchval(WORDS, said) is None

    async def test_expired_words_never_come_back(self, room: Room, world: World, other: Db) -> None:
        about = await world.channel(room.ada, settings=ConversationSettings(expire_after_seconds=86_400))
        said = await sent(room.ada, about, "secret")
        await world.db.execute("UPDATE message SET expires_at = now() WHERE id = $1", said)
        adding = other.transaction()
        await adding.start()
        assert (await search_index.waiting(other, FIRST)).left == 0
        due = [Due(room.users[0].id, about, said, 1, has_edits=False)]
        async with world.db.transaction():
            expiring = asyncio.create_task(expiry.expire(world.db, due, passes_held=True))
            _, waits = await asyncio.wait([expiring], timeout=0.01)
            assert waits
            await adding.commit()
            assert len((await expiring).deleted) == 1
        assert await world.db.fetchval(WORDS, said) is None

    async def test_message_that_is_being_changed_waits_and_gets_its_new_words(
        self, room: Room, world: World, other: Db
    ) -> None:
        edited, deleted, free = [await sent(room.ada, room.group, word) for word in ("old", "secret", "free")]
        changing = other.transaction()
        await changing.start()
        await other.execute("UPDATE message SET content = 'new' WHERE id = $1", edited)
        await other.execute("UPDATE message SET content = '', is_deleted = true WHERE id = $1", deleted)
        batch = await search_index.waiting(world.db, FIRST)
        assert (batch.taken, batch.left) == (3, 2)
        assert await world.db.fetchval(WORDS, free)
        await changing.commit()
        batch = await search_index.waiting(world.db, FIRST)
        assert (batch.taken, batch.left) == (1, 0)
        assert "'new'" in await world.db.fetchval(WORDS, edited)
        assert await world.db.fetchval(WORDS, deleted) is None

    async def test_edit_before_the_message_is_added_is_found_immediately(self, room: Room, world: World) -> None:
        said = await sent(room.ada, room.group, "old")
        await room.ada.call(client.Edit(**room.at(said), content="new"))
        assert await found(room.ada, "new") == [said]
        await world.indexed()
        assert (await found(room.ada, "new"), await found(room.ada, "old")) == ([said], [])

    async def test_mention_is_in_the_feed_immediately(self, room: Room) -> None:
        said = await sent(room.ada, room.group, "Hello @charles, engine")
        page = await room.charles.call(client.ListFeed(), server.FeedPage)
        assert [entry.message.id for entry in page.entries if entry.message] == [said]
        assert await found(room.charles, "engine") == []
