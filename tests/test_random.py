"""Fifty users act at random, 1,500 times; connections drop, a worker is killed, and every event arrives."""

import asyncio
import random

import asyncpg
import pytest

from protocol.ids import ConversationId
from prove.actor import Actor
from prove.truth import absent, assert_same, memberships, own, own_of, read_conversation, recount, unsent, waiting
from server.core.config import Settings
from tests.cluster import Cluster
from tests.world import REPAIR_SECONDS, World, until_repaired

PEOPLE, ACTIONS, CHANNELS = 50, 30, 5


@pytest.mark.long
@pytest.mark.parametrize("seed", [1])
async def test_all_clients_end_with_the_state_of_the_database(settings: Settings, cluster: Cluster, seed: int) -> None:
    db = await asyncpg.connect(settings.database_url)
    world = World(settings, workers=0)
    world.db = db
    people = [await world.user(f"Person{number}") for number in range(PEOPLE)]
    channels: list[ConversationId] = []
    actors = [Actor(who, cluster.urls, channels, seed * 1000 + number) for number, who in enumerate(people)]
    await asyncio.gather(*(actor.connect() for actor in actors))
    assert actors[0].client is not None
    founder = actors[0].client
    channels += [await world.channel(founder, title=f"Channel {number}", is_public=True) for number in range(CHANNELS)]

    for actor in actors:
        actor.others = [one.id for one in people if one is not actor.account]
    acting = asyncio.gather(*(actor.act(ACTIONS) for actor in actors))
    await db.fetchval("SELECT 1")
    while not acting.done() and await db.fetchval("SELECT count(*) FROM message") < 200:
        await asyncio.sleep(0.02)
    victim = random.Random(seed).choice(cluster.workers)
    victim.kill()
    await cluster.start(victim)
    await acting

    async with asyncio.timeout(30):
        while await waiting(db):
            await asyncio.sleep(0.05)
    clocks = {row[0]: row[1] for row in await db.fetch("SELECT id, version FROM conversation")}
    assert all(await asyncio.gather(*(actor.settle(clocks.__getitem__, seconds=REPAIR_SECONDS) for actor in actors)))
    ended = {ConversationId(row[0]) for row in await db.fetch("SELECT id FROM conversation WHERE NOT is_active")}
    truths = {one: await read_conversation(db, one) for one in clocks}
    for actor in actors:
        assert (actor.mirror.wrong, actor.tally.unexpected, actor.noticed_losses) == ({}, {}, 0)
        assert actor.mirror.copies.keys() == await memberships(db, actor.account.id)
        for one, copy in actor.mirror.copies.items():
            assert_same(copy, truths[one])
        await wait_for_own_state(db, actor, ended)
    messages = set().union(*(actor.tally.messages for actor in actors))
    assert len(messages) > 300
    assert await absent(db, "message", messages) == 0
    assert await absent(db, "message_edit", set().union(*(actor.tally.edits for actor in actors))) == 0
    assert await unsent(db, set().union(*(actor.tally.scheduled for actor in actors))) == []
    assert await recount(db) == []
    for actor in actors:
        await actor.leave()
    await db.close()


async def wait_for_own_state(
    db: "asyncpg.Connection[asyncpg.Record]", actor: Actor, ended: set[ConversationId]
) -> None:
    """Wait until a user has their own private state. An invitation to an ended conversation may remain."""
    truth = await own(db, actor.account.id)
    over = {("invitation", str(one), "") for one in ended}
    await until_repaired(lambda: own_of(actor.mirror) - over == truth)
