"""One worker in a separate process, an attacker and a bystander."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from server.core.config import Settings
from server.processes.supervisor import Worker
from tests.bystander import Bystander, Round
from tests.cluster import Cluster
from tests.world import UserSession, World


class Scene(NamedTuple):
    """The parties of a test. `world` creates users. `url` is the address of the attacked worker."""

    world: World
    url: str
    worker: Worker
    attacker: UserSession
    bystander: Bystander


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The default limits, which an attack does not exceed."""
    usual = Settings()
    limits = [name for name in Settings.__struct_fields__ if name not in {"database_url", "redis_url"}]
    return msgspec.structs.replace(settings, **{name: getattr(usual, name) for name in limits})


FIGURES = pytest.StashKey[dict[str, list[Round]]]()
"""The measurements of the bystander of each test."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the median round of each test."""
    if config.stash[FIGURES]:
        terminalreporter.section("the bystander's p99, in ms")
        terminalreporter.line(f"{'quiet':>8} {'attacked':>8} {'ratio':>6}")
    for name, rounds in config.stash[FIGURES].items():
        if not rounds:
            continue
        one = sorted(rounds, key=lambda one: one.ratio)[len(rounds) // 2]
        quiet = max(one.before.p99, one.after.p99)
        terminalreporter.line(f"{quiet:8.1f} {one.during.p99:8.1f} {one.ratio:6.1f}  {name}")


@pytest.fixture
async def scene(settings: Settings, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
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
            bystander = Bystander(url, other, quiet, worker=worker.process.pid)
            yield Scene(world, url, worker, attacker, bystander)
            request.config.stash[FIGURES][request.node.name] = bystander.rounds
    finally:
        cluster.stop()
