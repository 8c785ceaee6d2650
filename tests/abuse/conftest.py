"""One worker in a process of its own, somebody who attacks it, and a bystander."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from server.config import Settings
from server.supervisor import Worker
from tests.bystander import Bystander
from tests.cluster import Cluster
from tests.world import Somebody, World


class Scene(NamedTuple):
    """Who is there. `world` makes users; connect to `url`: the worker that is attacked."""

    world: World
    url: str
    worker: Worker
    attacker: Somebody
    bystander: Bystander


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The limits that an installation has unless told otherwise: an attack stays within them."""
    usual = Settings()
    limits = [name for name in Settings.__struct_fields__ if name not in {"database_url", "redis_url"}]
    return msgspec.structs.replace(settings, **{name: getattr(usual, name) for name in limits})


@pytest.fixture
async def scene(settings: Settings, tmp_path: Path) -> AsyncIterator[Scene]:
    cluster = Cluster(settings, tmp_path, 1)
    try:
        await cluster.start(*cluster.workers)
        async with World(settings, workers=1) as world:
            attacker, other = await world.users("Mallory", "Bob")
            bob = await world.connect(other)
            quiet = await world.channel(bob, title="Quiet")
            await bob.close()
            (url,) = cluster.urls()
            worker = cluster.workers[0]
            assert worker.process is not None
            yield Scene(world, url, worker, attacker, Bystander(url, other, quiet, worker=worker.process.pid))
    finally:
        cluster.stop()
