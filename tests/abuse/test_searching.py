"""The most expensive searches that the default limits allow do not delay other users."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from protocol import client
from prove.client import Client
from tests.abuse.conftest import Scene

pytestmark = pytest.mark.more

MESSAGES = 60_000
CONNECTIONS = 40
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


async def test_most_expensive_searches_do_not_delay_other_users(scene: Scene) -> None:
    async with Client(scene.url, scene.attacker.token) as attacker:
        about = await scene.world.channel(attacker)
        await scene.world.db.execute(FILL, about, WORDS, MESSAGES)
        # Prefixes that match every message, ordered by relevance.
        frame = client.Search(text=" ".join(word[:3] for word in WORDS.split()), order="relevance", limit=100)

        async def search(connection: Client) -> None:
            while True:
                await connection.ask(frame)
                await asyncio.sleep(0.02)

        async def attack() -> None:
            async with asyncio.TaskGroup() as group:
                for connection in connections:
                    group.create_task(search(connection))

        async with AsyncExitStack() as stack:
            connections = [
                await stack.enter_async_context(Client(scene.url, scene.attacker.token)) for _ in range(CONNECTIONS)
            ]
            await scene.bystander.is_unaffected(attack)
