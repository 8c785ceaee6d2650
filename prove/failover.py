"""Faults of a primary PostgreSQL whose synchronous standby takes over. They have a cluster of their own."""

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Self

import asyncpg

from prove.actor import Actor
from prove.cluster import OwnCluster
from prove.faults import Fault, FaultContext
from prove.standby import ServerPair

NOTICE_SECONDS = 1.0
"""Time from the fault to the promotion of the standby, in seconds."""
BACK_SECONDS = 3.0
"""Time for which the silent primary is in use again, in seconds, before it is ended."""
ANSWER_SECONDS = 60.0
"""Max time until everyone has an answer, in seconds. The phase counts later ones."""
POLL_SECONDS = 0.05


class PairCluster(OwnCluster):
    """A cluster with a primary PostgreSQL and a synchronous standby. DATABASE_URL lists both."""

    def __init__(self, workers: int) -> None:
        self._pair_folder = Path(tempfile.mkdtemp(prefix="openchat-pair-"))
        self._pair_folder.chmod(0o755)
        self.pair = ServerPair(self._pair_folder)
        super().__init__(workers, DATABASE_URL=self.pair.url)

    async def __aenter__(self) -> Self:
        """Start both servers, and then the cluster."""
        try:
            await self.pair.start()
            return await super().__aenter__()
        except BaseException:
            self._remove()
            raise

    async def __aexit__(self, *reason: object) -> None:
        try:
            await super().__aexit__(*reason)
        finally:
            self._remove()

    def _remove(self) -> None:
        self.pair.stop()
        shutil.rmtree(self._pair_folder, ignore_errors=True)

    async def database(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Connect to the primary. An old one may still answer."""
        return await self.pair.primary.connect()


async def _kill_primary(context: FaultContext) -> str:
    """End the primary. The next phase needs a standby again."""
    pair = _pair(context)
    began = time.monotonic()
    pair.primary.kill()
    await asyncio.sleep(NOTICE_SECONDS)
    await pair.promote()
    told = await _everyone_has_an_answer(context, began)
    await pair.rebuild()
    return told


async def _silence_primary(context: FaultContext) -> str:
    """Stop the primary without closing its connections, as if its network were cut. It is back when the standby has
    taken over, and does not know that.
    """
    pair = _pair(context)
    began = time.monotonic()
    old = pair.primary
    old.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(NOTICE_SECONDS)
        await pair.promote()
        await asyncio.sleep(BACK_SECONDS)
    finally:
        old.signal(signal.SIGCONT)
    told = await _everyone_has_an_answer(context, began)
    await asyncio.sleep(BACK_SECONDS)
    await pair.rebuild()
    return told


async def _everyone_has_an_answer(context: FaultContext, began: float) -> str:
    """Wait until each person has an answer that came after this call. Return how long that took since `began`."""
    left: dict[Actor, int] = {actor: actor.tally.acknowledged for actor in context.actors}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            while left := {actor: count for actor, count in left.items() if actor.tally.acknowledged == count}:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
    if left:
        return f"{len(left)} people had no answer within {ANSWER_SECONDS:.0f} s"
    return f"everyone had an answer again {time.monotonic() - began:.1f} s after the fault"


def _pair(context: FaultContext) -> ServerPair:
    assert isinstance(context.cluster, PairCluster)  # noqa: S101 - used only with it
    return context.cluster.pair


FAILOVERS = (
    Fault(
        "primary killed",
        "SIGKILL to the primary PostgreSQL; its synchronous standby takes over after 1 s",
        _kill_primary,
        needs_processes=True,
    ),
    Fault(
        "primary silent",
        "SIGSTOP; the standby takes over after 1 s; 3 s later the old primary accepts connections again",
        _silence_primary,
        needs_processes=True,
    ),
)
