"""The presence of users in Redis: a hash per user with a field per worker, and a sign of life of each worker.

Each method raises an error of `REDIS_LOST` if Redis cannot be reached.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from redis.asyncio import Redis, RedisCluster

from protocol.ids import UserId
from server.core.faults import ONCE

SIGN_LASTS_SECONDS = 6
"""The lifetime of a worker's sign of life, in seconds."""

WORKERS = "openchat:workers:"
WORKER = "openchat:worker:"
USER = "openchat:presence:"

log = logging.getLogger(__name__)


async def has_worker(redis: Redis | RedisCluster, installation: str) -> bool:
    """Whether a worker of an installation is alive. Raises an error of `REDIS_LOST` if Redis cannot be reached."""
    members = await redis.smembers(f"{WORKERS}{installation}")
    for member in members:
        if await redis.exists(f"{WORKER}{installation}:".encode() + _name(member)):
            return True
    return False


class Signs(NamedTuple):
    """Whether this worker's previous sign of life was still there, and the workers without one."""

    is_known: bool
    dead: set[bytes]


class PresenceEntries:
    """The entries of all workers, and the name of this one."""

    def __init__(self, redis: Redis | RedisCluster, installation: str) -> None:
        self._redis = redis
        self._workers = f"{WORKERS}{installation}"
        self._worker_key = f"{WORKER}{installation}:".encode()
        self.user_key = f"{USER}{installation}:"
        self.worker = os.urandom(8).hex().encode()

    async def read(self, user_ids: Sequence[UserId]) -> dict[UserId, dict[bytes, bytes]]:
        """Return the states of users, by worker."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.hgetall(self.user_key + user_id.hex)
            return dict(zip(user_ids, await pipe.execute(), strict=True))

    async def exchange(
        self, user_ids: Sequence[UserId], here: Mapping[UserId, dict[bytes, bytes]]
    ) -> dict[UserId, dict[bytes, bytes]]:
        """Write the states of users at this worker. Users without one in `here` are gone. Return the states before, by
        worker.
        """
        gone = [user_id for user_id in user_ids if user_id not in here]
        async with self._redis.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.hgetall(self.user_key + user_id.hex)
            for user_id, local in here.items():
                pipe.hset(self.user_key + user_id.hex, mapping=local)  # type: ignore[arg-type]
            for user_id in gone:
                pipe.hdel(self.user_key + user_id.hex, self.worker)
            # If this worker dies, others delete the entries of these users.
            if here:
                pipe.sadd(self._worker_key + self.worker + b":users", *(user_id.hex for user_id in here))
            if gone:
                pipe.srem(self._worker_key + self.worker + b":users", *(user_id.hex for user_id in gone))
            answers = await pipe.execute()
        return dict(zip(user_ids, answers, strict=False))

    async def sign(self) -> Signs:
        """Renew the sign of life of this worker, and read those of others."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(self._worker_key + self.worker, "1", ex=SIGN_LASTS_SECONDS, get=True)
            pipe.sadd(self._workers, self.worker)
            pipe.smembers(self._workers)
            known, _, members = await pipe.execute()
        workers = sorted(map(_name, members))
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker in workers:
                pipe.exists(self._worker_key + worker)
            alive = await pipe.execute()
        return Signs(
            known is not None, {worker for worker, is_there in zip(workers, alive, strict=True) if not is_there}
        )

    async def delete_sign(self) -> None:
        """Delete the sign of life of this worker."""
        await self._redis.delete(self._worker_key + self.worker)

    async def delete_states(self, worker: bytes) -> dict[UserId, dict[bytes, bytes]]:
        """Delete the states of users at a dead worker. Return their states at others."""
        members = await self._redis.smembers(self._worker_key + worker + b":users")
        user_ids = [user_id for member in members if (user_id := _user_id(_name(member))) is not None]
        async with self._redis.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.hdel(self.user_key + user_id.hex, worker)
                pipe.hgetall(self.user_key + user_id.hex)
            answers = await pipe.execute()
        return dict(zip(user_ids, answers[1::2], strict=True))

    async def delete_worker(self, worker: bytes) -> None:
        """Delete a dead worker, and the list of its users."""
        await self._redis.delete(self._worker_key + worker + b":users")
        await self._redis.srem(self._workers, worker)


def _user_id(member: bytes) -> UserId | None:
    """Return the user whom a worker listed, or None for an entry in another form."""
    try:
        return UserId(UUID(hex=member.decode()))
    except ValueError:
        log.warning("ignored a user of a dead worker whose id has another form", extra={ONCE: "ignored ids of users"})
        return None


def _name(member: bytes | str) -> bytes:
    return member if isinstance(member, bytes) else member.encode()
