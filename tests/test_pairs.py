"""Pairs of writing frames, sent concurrently by two devices at two workers: all devices have the state of the rows."""

import asyncio
import random

import asyncpg
import pytest

from prove.pairs import Crew, FramePair, PairsProof, Run, pairs
from prove.scene import PEOPLE
from prove.writes import WRITES
from server.core.config import Settings
from server.gateway.dispatch import Rate
from server.routes import ROUTES
from tests.world import World

CREWS = 4
EPHEMERAL_WRITES = {"delivered", "presence"}


def test_the_table_has_every_frame_that_writes() -> None:
    writing = {kind for kind, route in ROUTES.items() if route.rate is Rate.WRITE}
    writing |= {kind for kind in ROUTES if kind.__struct_config__.tag in EPHEMERAL_WRITES}
    assert set(WRITES) == writing


async def acted_out(settings: Settings, chosen: list[FramePair], seed: int) -> PairsProof:
    proof = PairsProof(seed=seed)
    async with World(settings) as world:
        one_at_a_time = asyncio.Lock()  # they share a connection
        urls = [worker.url for worker in world.workers]

        async def new_crew() -> Crew:
            async with one_at_a_time:
                return Crew(await world.users(*PEOPLE), urls, seed)

        await Run(chosen, proof).act(CREWS, new_crew, connect=lambda: asyncpg.connect(settings.database_url))
    return proof


async def test_devices_have_the_state_of_the_rows_after_some_pairs_of_frames(settings: Settings) -> None:
    chosen = random.Random(1).sample(pairs(), 24)
    proof = await acted_out(settings, chosen, seed=1)
    assert proof.violations == []
    assert proof.pairs == len(chosen)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_devices_have_the_state_of_the_rows_after_many_pairs_of_frames(settings: Settings) -> None:
    seed = random.randrange(1_000)
    proof = await acted_out(settings, random.Random(seed).sample(pairs(), 500), seed)
    assert proof.violations == [], f"seed {seed}"
    assert [name for name, tried in proof.tried.items() if not tried.done] == []
