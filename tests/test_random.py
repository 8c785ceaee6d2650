"""Fifty people do two thousand random things while connections drop and a worker is killed: nobody loses anything."""

import asyncio
import random

import asyncpg
import pytest

from protocol.ids import ConversationId
from server.config import Settings
from tests.actor import Actor
from tests.cluster import Cluster
from tests.mirror import assert_same, from_database
from tests.world import World

PEOPLE, ACTIONS, CHANNELS = 50, 40, 5


@pytest.mark.parametrize("seed", [1])
async def test_everyone_ends_with_the_truth(settings: Settings, cluster: Cluster, seed: int) -> None:
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

    acting = asyncio.gather(*(actor.act(ACTIONS) for actor in actors))
    await db.fetchval("SELECT 1")
    while await db.fetchval("SELECT count(*) FROM message") < 300:
        await asyncio.sleep(0.02)
    victim = random.Random(seed).choice(cluster.workers)
    victim.kill()
    await cluster.start(victim)
    await acting

    clocks = {row[0]: row[1] for row in await db.fetch("SELECT id, version FROM conversation")}
    await asyncio.gather(*(actor.settle(clocks.__getitem__) for actor in actors))
    truths = {one: await from_database(db, one) for one in channels}
    for actor in actors:
        for one, copy in actor.mirror.copies.items():
            assert_same(copy, truths[one])
    stored = {message_id for truth in truths.values() for message_id in truth.messages}
    acknowledged = set().union(*(actor.acknowledged for actor in actors))
    assert acknowledged <= stored
    assert len(acknowledged) > 800
    for one in channels:
        sent = [row[0] for row in await db.fetch("SELECT sent_version FROM message WHERE conversation_id = $1", one)]
        assert len(set(sent)) == len(sent)
        assert max(sent) <= clocks[one]
    await assert_counts_are_derived(db)
    for actor in actors:
        assert actor.client is not None
        await actor.client.close()
    await db.close()


async def assert_counts_are_derived(db: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Every count that is kept equals the count of the rows that it counts."""
    wrong = await db.fetch("""
        SELECT c.id, 'participants' AS what FROM conversation c WHERE participant_count <> (
            SELECT count(*) FROM conversation_participant p WHERE p.conversation_id = c.id AND p.status = 'active')
        UNION ALL
        SELECT c.id, 'messages' FROM conversation c WHERE message_count <> (
            SELECT count(*) FROM message m WHERE m.conversation_id = c.id AND NOT m.is_deleted)
        UNION ALL
        SELECT m.id, 'replies' FROM message m WHERE reply_count <> (
            SELECT count(*) FROM message r WHERE r.thread_root_id = m.id AND NOT r.is_deleted)
        UNION ALL
        SELECT m.id, 'reactions' FROM message m WHERE reactions <> coalesce((
            SELECT jsonb_object_agg(emoji, n) FROM (
                SELECT emoji, count(*) AS n FROM message_reaction r
                WHERE r.message_id = m.id AND NOT r.is_removed GROUP BY emoji
            ) counted), '{}')
    """)
    assert wrong == []
