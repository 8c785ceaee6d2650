"""Expiry of many messages: their order, their counts and versions, and what one portion locks."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest

from protocol import client, server
from protocol.ids import ConversationId, MessageId
from protocol.payloads import Poll
from prove.mirror import Mirror
from prove.truth import assert_same, read_conversation, recount
from server.app import background
from server.core.config import Settings
from server.jobs.expiry import expire_due
from server.queries import expiry
from tests.world import World, sent, until

# All messages of Ada are due before the message of Bob.
EXPIRE = """
UPDATE message SET expires_at = now() - CASE WHEN sender_id = $1 THEN interval '2 hours' ELSE interval '1 hour' END
"""
BEFORE = """
SELECT count(*) FROM message m JOIN message bobs ON bobs.id = $2
WHERE m.sender_id = $1 AND m.deleted_at < bobs.deleted_at
"""
LEFT = "SELECT count(*) FROM message WHERE NOT is_deleted"


@pytest.fixture
async def world(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        yield world


async def expire(world: World) -> None:
    """Delete the messages that are due now."""
    worker = world.workers[0].app
    await expire_due(worker._database, worker.hub)  # noqa: SLF001 - a job


@pytest.mark.parametrize("conversations", [1, 40])
async def test_senders_of_expired_messages_take_turns(
    world: World, monkeypatch: pytest.MonkeyPatch, conversations: int
) -> None:
    monkeypatch.setattr(expiry, "MAX_DUE", 100)
    who, other = await world.users("Ada", "Bob")
    ada, bob = await world.connect(who), await world.connect(other)
    places = [await world.channel(ada) for _ in range(conversations)]
    count = 3 * expiry.MAX_DUE
    await asyncio.gather(*(sent(ada, places[number % conversations]) for number in range(count)))
    bobs = await sent(bob, await world.channel(bob))
    await world.db.execute(EXPIRE, who.id)

    await expire(world)

    assert await world.db.fetchval(BEFORE, who.id, bobs) <= expiry.MAX_DUE
    assert await world.db.fetchval(LEFT) == 0


VERSIONS = "SELECT version FROM message WHERE is_deleted AND conversation_id = $1 ORDER BY version"
# Replies expire before the root of their thread, which would get the version of a later one.
DUE = "UPDATE message SET expires_at = now() - sent_version * interval '1 ms' WHERE id <> ALL ($1)"


@pytest.mark.parametrize("portion", [1, 4, expiry.PORTION])
async def test_counts_and_versions_of_messages_that_expire_together_are_exact(
    world: World, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    """Clients with the events have the same rows as clients that read them."""
    monkeypatch.setattr("server.jobs.expiry.PORTION", portion)
    who, other = await world.users("Ada", "Bob")
    ada, mirror = await world.connect(who), Mirror()
    bob = await world.connect(other)
    bob.on_event = mirror.receive
    group = await world.group(ada, other)
    await bob.event(server.ConversationJoined)
    mirror.unloaded.discard(group)

    def at(message_id: MessageId) -> dict[str, Any]:
        return {"conversation_id": group, "message_id": message_id}

    kept, root, poll, plain, deleted = (
        await sent(ada, group, "Kept"),
        await sent(ada, group, "Root"),
        await sent(ada, group, "Tea?", payload=Poll(options=["Yes", "No"])),
        await sent(bob, group, "Plain"),
        await sent(ada, group, "Deleted"),
    )
    for one in (kept, root, root, kept, plain, root):
        await sent(bob, group, "Reply", parent_message_id=one)
    for frame in (
        client.Vote(**at(poll), options=[0]),
        client.React(**at(plain), emoji="👍"),
        client.Pin(**at(plain)),
        client.Star(**at(root)),
        client.Edit(**at(root), content="Edited once"),
        client.Edit(**at(root), content="Edited twice"),
        client.Delete(**at(deleted)),
    ):
        await ada.call(frame)
    await world.db.execute(DUE, [kept])
    before = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", group)

    await expire(world)

    assert await recount(world.db) == []
    versions = [row[0] for row in await world.db.fetch(VERSIONS, group)]
    assert versions == [before, *range(before + 1, before + 10)], "the message that Ada deleted moved no version"
    assert await world.db.fetchval("SELECT count(*) FROM message_edit") == 0
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE expires_at IS NOT NULL") == 0
    truth = await read_conversation(world.db, group)
    await until(lambda: mirror.copies[group].version == truth.version)
    mirror.copies[group].participants = truth.participants
    assert_same(mirror.copies[group], truth)
    assert not mirror.wrong
    late = await world.connect(other, query="?resume=1")
    await late.call(client.Resume(epoch=late.ready.epoch, versions={group: before}), server.Resumed)
    (event,) = [one for one in late.events if isinstance(one, server.Changes)]
    assert [one.version for one in event.events if isinstance(one, server.MessageDeleted)] == versions[1:]


class Portions:
    """The portions that expire, and the time-outs of waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.timed_out = 0
        original = expiry.expire

        async def noted(db: Any, portion: Sequence[expiry.Due], *, passes_held: bool) -> Any:
            self.sizes.append(len(portion))
            try:
                return await original(db, portion, passes_held=passes_held)
            except asyncpg.LockNotAvailableError:
                self.timed_out += 1
                raise

        monkeypatch.setattr(expiry, "expire", noted)


async def test_messages_of_many_conversations_expire_in_one_statement(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation that is locked is passed over, and a failure in one concerns no other."""
    (who,) = await world.users("Ada")
    ada = await world.connect(who)
    places = [await world.channel(ada) for _ in range(expiry.PORTION)]
    for number in range(2 * expiry.PORTION):
        await sent(ada, places[number % len(places)])
    held, broken = places[3], places[5]
    await world.db.execute(FAIL.format(broken))
    await world.db.execute(DUE, [])
    portions = Portions(monkeypatch)
    async with world.db.transaction():
        await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", held)
        await expire(world)
    left = [row[0] for row in await world.db.fetch("SELECT conversation_id FROM message WHERE NOT is_deleted")]
    assert sorted(left) == sorted(2 * [held, broken])
    assert portions.timed_out == 1
    await world.db.execute("DROP TRIGGER fails ON message")
    portions.sizes.clear()
    await expire(world)
    assert portions.sizes == [4]
    assert await world.db.fetchval(LEFT) == 0
    assert await recount(world.db) == []


FAIL = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a broken row'; END $$;
CREATE TRIGGER fails BEFORE UPDATE ON message FOR EACH ROW
    WHEN (NEW.conversation_id = '{}' AND NEW.is_deleted) EXECUTE FUNCTION fail()
"""


async def test_portions_have_a_bound_in_rows_and_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (who,) = await world.users("Ada")
    ada = await world.connect(who)
    about = await world.channel(ada)
    for _ in range(2 * expiry.PORTION + 1):
        await sent(ada, about)
    portions = Portions(monkeypatch)
    await world.db.execute(DUE, [])
    await expire(world)
    assert portions.sizes == [expiry.PORTION, expiry.PORTION, 1]
    portions.sizes.clear()
    large = "".join(chr(0x4E00 + number * 7919 % 20_000) for number in range(10_000))
    for _ in range(6):
        await sent(ada, about, large)
    await world.db.execute(DUE, [row[0] for row in await world.db.fetch("SELECT id FROM message WHERE is_deleted")])
    await expire(world)
    assert sum(portions.sizes) == 6
    assert max(portions.sizes) <= 3
    assert await recount(world.db) == []


async def test_conversations_expire_concurrently_but_each_one_in_turn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first statement of a connection plans all others, before it locks a conversation."""
    (who,) = await world.users("Ada")
    ada = await world.connect(who)
    places = [await world.channel(ada) for _ in range(3)]
    for number in range(3 * (expiry.PORTION + 1)):
        await sent(ada, places[number % 3])
    await world.db.execute(DUE, [])
    asked: list[tuple[Any, int]] = []
    locked: set[ConversationId] = set()
    together = asyncio.Barrier(3)
    fetch = asyncpg.Connection.fetch

    async def noted(db: Any, query: str, *args: Any, **options: Any) -> Any:
        if query != expiry.EXPIRE:
            return await fetch(db, query, *args, **options)
        asked.append((db, len(args[1])))
        assert not locked & set(args[0])
        locked.update(args[0])
        if len(args[1]) == expiry.PORTION:
            await together.wait()
        try:
            return await fetch(db, query, *args, **options)
        finally:
            locked.difference_update(args[0])

    monkeypatch.setattr(asyncpg.Connection, "fetch", noted)
    worker = world.workers[0].app
    await expire_due(worker._database, worker.hub, most=4)  # noqa: SLF001 - a job
    assert await world.db.fetchval(LEFT) == 0
    assert await recount(world.db) == []
    first = dict(reversed(asked))
    assert len(first) >= 3
    assert set(first.values()) == {0}


async def test_two_workers_delete_each_message_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders write there meanwhile."""
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings) as world:
        (who,) = await world.users("Ada")
        ada = await world.connect(who)
        places = [await world.channel(ada) for _ in range(3)]
        for number in range(100):
            await sent(ada, places[number % 3])
        await world.db.execute(DUE, [])
        apps = [worker.app for worker in world.workers]
        runs = [expire_due(app._database, app.hub) for app in apps]  # noqa: SLF001 - a job
        await asyncio.gather(*runs, *(sent(ada, places[number % 3]) for number in range(30)))
        await expire(world)  # conversations that the other worker held
        assert await world.db.fetchval(LEFT) == 30
        assert await recount(world.db) == []
        for about in places:
            versions = [row[0] for row in await world.db.fetch(EVERY_VERSION, about)]
            assert versions == list(range(versions[0], versions[0] + len(versions)))


EVERY_VERSION = """
SELECT version FROM message WHERE conversation_id = $1
UNION SELECT sent_version FROM message WHERE conversation_id = $1 ORDER BY 1
"""
