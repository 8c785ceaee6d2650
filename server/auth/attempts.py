"""Login attempts, counted for each account and each address: in Redis for all workers, or else in this one."""

import hashlib
import time

from redis.asyncio import Redis, RedisCluster

from protocol.errors import ErrorCode, Refused
from server.errors import REDIS_LOST

WINDOW_SECONDS = 300
KEY = "openchat:attempts:"


class Attempts:
    """Counts in windows of five minutes."""

    def __init__(self, redis: Redis | RedisCluster, *, per_account: int, per_address: int) -> None:
        self._redis = redis
        self._limits = {"account": per_account, "address": per_address}
        self._here: dict[str, tuple[int, float]] = {}

    async def of_address(self, address: str) -> None:
        """Count one attempt of an address. Raises Refused if it had too many."""
        self._require("address", *await self._count("address", address))

    async def require_account(self, email: str) -> None:
        """Raises Refused if an account had too many failed attempts."""
        self._require("account", *await self._read("account", email))

    async def failed(self, email: str) -> None:
        """Count a failed attempt at an account."""
        await self._count("account", email)

    async def succeeded(self, email: str) -> None:
        """Forget the failed ones."""
        key = _key("account", email)
        self._here.pop(key, None)
        try:
            await self._redis.delete(key)
        except REDIS_LOST:
            return

    def _require(self, kind: str, count: int, seconds: float) -> None:
        if count > self._limits[kind]:
            raise Refused(
                ErrorCode.RATE_LIMITED, "Too many attempts; wait a little.", retry_after_ms=int(seconds * 1000)
            )

    async def _read(self, kind: str, who: str) -> tuple[int, float]:
        key = _key(kind, who)
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.get(key)
                pipe.ttl(key)
                count, seconds = await pipe.execute()
            return int(count or 0) + 1, max(seconds, 1)
        except REDIS_LOST:
            count, until = self._local(key)
            return count + 1, until - time.monotonic()

    async def _count(self, kind: str, who: str) -> tuple[int, float]:
        key = _key(kind, who)
        count, until = self._local(key)
        self._here[key] = (count + 1, until)
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.incr(key)
                pipe.expire(key, WINDOW_SECONDS, nx=True)
                pipe.ttl(key)
                total, _, seconds = await pipe.execute()
            return total, max(seconds, 1)
        except REDIS_LOST:
            return count + 1, until - time.monotonic()

    def _local(self, key: str) -> tuple[int, float]:
        now = time.monotonic()
        count, until = self._here.get(key, (0, 0.0))
        if until > now:
            return count, until
        self._here = {key: entry for key, entry in self._here.items() if entry[1] > now}
        return 0, now + WINDOW_SECONDS


def _key(kind: str, who: str) -> str:
    # Hashed: neither addresses of people nor of machines belong into another server's memory.
    return f"{KEY}{kind}:{hashlib.sha256(who.encode()).hexdigest()[:32]}"
