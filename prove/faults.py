"""The faults. Each is injected while people chat, and the cluster has to recover completely."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from loadtest.distance import DistantDatabase
from loadtest.proxy import Pipe, Proxy
from prove.actor import Actor
from prove.cluster import Cluster, OwnCluster

FREEZE_SECONDS = 8.0
CUT_EVERY_SECONDS = 0.5
FAULT_SECONDS = 8.0
SLOW_BYTES_PER_SECOND = 2_000.0
DELAY_SECONDS = 0.3
ROUND_TRIP_SECONDS = 0.01
"""Added round trip to PostgreSQL, in seconds."""
DEVICES = 4
"""Further devices of the busy account."""
ROLL_SECONDS = 60.0
POLL_SECONDS = 0.1


class FaultContext(NamedTuple):
    """The objects on which a fault can act."""

    cluster: Cluster
    proxy: Proxy
    actors: Sequence[Actor]
    random: random.Random
    devices: list[Actor]
    """Devices that the fault has added. They are compared with the rows, too, and leave after that."""

    @property
    def own(self) -> OwnCluster:
        """The cluster, if its processes were started by this run."""
        assert isinstance(self.cluster, OwnCluster)  # noqa: S101 - used only by faults that need it
        return self.cluster

    def some(self) -> list[Pipe]:
        """Return a random quarter of the connections, rounded up."""
        pipes = [pipe for pipe in self.proxy.pipes if not pipe.is_black_hole]
        return self.random.sample(pipes, -(-len(pipes) // 4))


class Fault(NamedTuple):
    """One fault of the schedule. `inject` may return a remark about what happened."""

    name: str
    about: str
    inject: Callable[[FaultContext], Awaitable[str | None]]
    needs_processes: bool = False


async def _nothing(context: FaultContext) -> None:
    del context


async def _kill_worker(context: FaultContext) -> None:
    os.kill(context.random.choice(context.own.workers()), signal.SIGKILL)


async def _freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(FREEZE_SECONDS)
    finally:
        os.kill(pid, signal.SIGCONT)


async def _freeze_worker(context: FaultContext) -> None:
    await _freeze(context.random.choice(context.own.workers()))


async def _restart_postgres(context: FaultContext) -> None:
    os.kill(context.own.postgres(), signal.SIGINT)


async def _kill_postgres(context: FaultContext) -> None:
    os.kill(context.own.postgres(), signal.SIGKILL)


async def _end_database_sessions(context: FaultContext) -> None:
    await context.cluster.end_database_sessions()


async def _kill_valkey(context: FaultContext) -> None:
    os.kill(context.own.valkey(), signal.SIGKILL)


async def _freeze_valkey(context: FaultContext) -> None:
    await _freeze(context.own.valkey())


async def _flush_redis(context: FaultContext) -> None:
    await context.cluster.flush_redis()


async def _cut_sockets(context: FaultContext) -> None:
    end = time.monotonic() + FAULT_SECONDS
    while time.monotonic() < end:
        for pipe in context.some():
            pipe.is_cut_short = True
        await asyncio.sleep(CUT_EVERY_SECONDS)


async def _slow_clients(context: FaultContext) -> None:
    for pipe in context.some():
        pipe.bytes_per_second = SLOW_BYTES_PER_SECOND
    await asyncio.sleep(FAULT_SECONDS)


async def _half_open(context: FaultContext) -> None:
    for pipe in context.some():
        pipe.is_black_hole = True
    await asyncio.sleep(FAULT_SECONDS)


async def _slow_network(context: FaultContext) -> None:
    context.proxy.delay = DELAY_SECONDS
    await asyncio.sleep(FAULT_SECONDS)
    context.proxy.delay = 0.0


async def _hold_row(context: FaultContext) -> None:
    """Lock the row of a channel in which everyone acts, as a long transaction of another program would."""
    db = await context.cluster.database()
    try:
        async with db.transaction():
            await db.execute("SELECT FROM conversation WHERE type = 'channel' ORDER BY id LIMIT 1 FOR UPDATE")
            await asyncio.sleep(FAULT_SECONDS)
    finally:
        await db.close()


async def _busy_account(context: FaultContext) -> None:
    """Act on further devices of one user without pauses, so that its rate limits apply."""
    actor = context.random.choice(context.actors)
    context.devices.extend(actor.another_device(context.random.getrandbits(32)) for _ in range(DEVICES))
    for device in context.devices:  # one after the other, because they share the limits of their user
        await device.connect()
    end = time.monotonic() + FAULT_SECONDS
    await asyncio.gather(*(device.act(is_over=lambda: time.monotonic() > end) for device in context.devices))


async def _distant_database(context: FaultContext) -> None:
    async with DistantDatabase(context.own.installation.run) as database:
        await database.set_round_trip(ROUND_TRIP_SECONDS)
        await asyncio.sleep(FAULT_SECONDS)


async def _expire_sessions(context: FaultContext) -> None:
    """Expire the sessions of some users, as a clock that steps by a month would. The new user versions make the workers
    check them.
    """
    db = await context.cluster.database()
    try:
        some = [actor.account.id for actor in context.actors][::4]
        await db.execute("UPDATE session SET expires_at = now() - interval '1 second' WHERE user_id = ANY($1)", some)
        await db.execute('UPDATE "user" SET version = version + 1 WHERE id = ANY($1)', some)
    finally:
        await db.close()


async def _roll(context: FaultContext) -> None:
    before = set(context.own.workers())
    context.own.roll()
    await _replaced(context, before)


async def _new_epoch(context: FaultContext) -> None:
    before = set(context.own.workers())
    db = await context.cluster.database()
    try:
        await db.execute("UPDATE database_epoch SET epoch = gen_random_uuid()")
    finally:
        await db.close()
    await _replaced(context, before)


async def _replaced(context: FaultContext, before: set[int]) -> None:
    async with asyncio.timeout(ROLL_SECONDS):
        while before & set(context.own.workers()):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(POLL_SECONDS)


FAULTS = (
    Fault("no fault", "people chat", _nothing),
    Fault("worker killed", "SIGKILL to one of the workers", _kill_worker, needs_processes=True),
    Fault("worker frozen", "SIGSTOP to one of the workers for 8 s", _freeze_worker, needs_processes=True),
    Fault("rolling restart", "all workers are replaced, one after the other", _roll, needs_processes=True),
    Fault("PostgreSQL restarted", "fast shutdown and restart", _restart_postgres, needs_processes=True),
    Fault("PostgreSQL killed", "SIGKILL and recovery", _kill_postgres, needs_processes=True),
    Fault("database sessions ended", "PostgreSQL terminates all connections", _end_database_sessions),
    Fault("distant database", "PostgreSQL is 10 ms away for 8 s", _distant_database, needs_processes=True),
    Fault("row held", "a session locks the row of a channel for 8 s", _hold_row),
    Fault("busy account", "one account on 5 devices acts for 8 s as fast as its rate limits allow", _busy_account),
    Fault("new epoch", "as after a restore: all workers end, and clients start over", _new_epoch, needs_processes=True),
    Fault("Valkey killed", "SIGKILL and an empty restart", _kill_valkey, needs_processes=True),
    Fault("Valkey frozen", "SIGSTOP for 8 s", _freeze_valkey, needs_processes=True),
    Fault("Valkey flushed", "FLUSHALL", _flush_redis),
    Fault("sockets cut", "a quarter of the sockets, mid-frame, twice a second for 8 s", _cut_sockets),
    Fault("slow clients", "a quarter of the clients read 2 kB/s for 8 s", _slow_clients),
    Fault("half-open sockets", "a quarter of the sockets stop transmitting, without a close", _half_open),
    Fault("slow network", "300 ms in each direction for 8 s", _slow_network),
    Fault("sessions expired", "a quarter of the sessions end, and people log in again", _expire_sessions),
)
"""All faults, in the order of the first round. The seed shuffles later rounds."""
