"""Order of expiry when many messages are due."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.app import background
from server.core.config import Settings
from server.jobs.expiry import expire_due
from server.queries import expiry
from tests.world import World, sent

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


@pytest.mark.parametrize("conversations", [1, 40])
async def test_senders_of_expired_messages_take_turns(world: World, conversations: int) -> None:
    who, other = await world.users("Ada", "Bob")
    ada, bob = await world.connect(who), await world.connect(other)
    places = [await world.channel(ada) for _ in range(conversations)]
    count = 3 * expiry.MAX_DUE
    await asyncio.gather(*(sent(ada, places[number % conversations]) for number in range(count)))
    bobs = await sent(bob, await world.channel(bob))
    await world.db.execute(EXPIRE, who.id)
    worker = world.workers[0].app

    await expire_due(worker._database, worker.hub)  # noqa: SLF001 - due now

    assert await world.db.fetchval(BEFORE, who.id, bobs) <= expiry.MAX_DUE
    assert await world.db.fetchval(LEFT) == 0
