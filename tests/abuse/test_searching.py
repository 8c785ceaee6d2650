"""A server of default limits on which somebody searches as much as they may, and in the worst way."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from protocol import client
from prove.client import Client
from tests.abuse.conftest import Scene

pytestmark = pytest.mark.more

MESSAGES = 60_000
ASKERS = 40
WORDS = "engine loom weave brass steel punch cards gear wheel crank"
FILL = """
WITH said AS (
    INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
    SELECT c.id, c.created_by, $2::text || ' ' || n, c.version + n, c.version + n
    FROM conversation c, generate_series(1, $3::int) n WHERE c.id = $1
    RETURNING id, conversation_id, created_at, content
), found AS (
    INSERT INTO message_search (message_id, conversation_id, created_at, words)
    SELECT id, conversation_id, created_at, search_words(conversation_id, content, NULL, '{}', '{}', '{}') FROM said
)
UPDATE conversation SET version = version + $3 WHERE id = $1
"""


async def test_who_searches_in_the_worst_way_delays_nobody_else(scene: Scene) -> None:
    async with Client(scene.url, scene.attacker.token) as attacker:
        about = await scene.world.channel(attacker)
        await scene.world.db.execute(FILL, about, WORDS, MESSAGES)
        # Beginnings of words, which match all of them, ranked.
        frame = client.Search(text=" ".join(word[:3] for word in WORDS.split()), order="relevance", limit=100)

        async def search(asker: Client) -> None:
            while True:
                await asker.ask(frame)
                await asyncio.sleep(0.02)

        async def attack() -> None:
            async with asyncio.TaskGroup() as group:
                for asker in askers:
                    group.create_task(search(asker))

        async with AsyncExitStack() as connections:
            askers = [
                await connections.enter_async_context(Client(scene.url, scene.attacker.token)) for _ in range(ASKERS)
            ]
            await scene.bystander.is_unaffected(attack)
