"""Login attempts, counted per account and per address. Redis has the counters of all workers. Without Redis each worker
counts on its own.

An attempt is counted before it is made. Otherwise concurrent attempts could all pass before any of them has failed.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from redis.asyncio import Redis, RedisCluster

from protocol.errors import ErrorCode, Refused
from server.core.errors import REDIS_LOST
from server.limits.per_address import OF_A_PROXY

WINDOW_SECONDS = 300
"""Length of a window, in seconds, from its first attempt."""
KEY = "openchat:attempts:"
MAX_COUNTED_HERE = 10_000
"""Max counters in a worker's own memory, of which the oldest are dropped first. They decide only while Redis is
unavailable.
"""
FAILURES = frozenset({ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN})
"""Refusals that stand for a wrong password."""

log = logging.getLogger(__name__)


class Attempts:
    """Counts attempts in windows of five minutes."""

    def __init__(self, redis: Redis | RedisCluster, installation: str, *, per_account: int, per_address: int) -> None:
        self._redis = redis
        self._prefix = f"{KEY}{installation}:"
        self._limits = {"account": per_account, "address": per_address}
        self._here: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def of_address(self, address: str) -> None:
        """Count an attempt from an address. Raises Refused if it has made too many."""
        self._require("address", *await self._count(self._key("address", address)))

    @asynccontextmanager
    async def at_account(self, who: str) -> AsyncIterator[None]:
        """Count an attempt at an account, which is made in the block. Raises Refused if there were too many.

        The block raises Refused with one of `FAILURES` if the attempt fails. Success clears earlier failures. An
        attempt that another error prevents is not counted.

        A worker makes one attempt at an account at a time. So the attempts of an owner with many devices do not add up
        before the first one succeeds.
        """
        key = self._key("account", who)
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:
            self._require("account", *await self._count(key))
            try:
                yield
            except Exception as error:
                if not isinstance(error, Refused) or error.code not in FAILURES:
                    await self._take_back(key)
                raise
            await self._forget(key)

    async def forget(self, who: str) -> None:
        """Clear the failed attempts at an account."""
        await self._forget(self._key("account", who))

    def _require(self, kind: str, count: int, seconds: float) -> None:
        most = self._limits[kind]
        if count > most:
            if count == most + 1:  # logged once, for the first refused attempt at any worker
                text = "login attempts of one %s reached %d; refusing further ones for %.0f s%s"
                log.warning(text, kind, most, seconds, OF_A_PROXY if kind == "address" else "")
            raise Refused(
                ErrorCode.RATE_LIMITED,
                "Too many attempts. Retry after `retry_after_ms`.",
                retry_after_ms=int(seconds * 1000),
            )

    async def _count(self, key: str) -> tuple[int, float]:
        """Count an attempt. Return the number of attempts in the window, and its remaining seconds."""
        here, until = self._count_here(key)
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.incr(key)
                pipe.expire(key, WINDOW_SECONDS, nx=True)
                pipe.ttl(key)
                count, _, seconds = await pipe.execute()
            return count, max(seconds, 1)
        except REDIS_LOST:
            return here, until - time.monotonic()

    async def _take_back(self, key: str) -> None:
        if (there := self._here.get(key)) is not None:
            self._here[key] = (there[0] - 1, there[1])
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.decr(key)
                pipe.expire(key, WINDOW_SECONDS, nx=True)
                await pipe.execute()
        except REDIS_LOST:
            return

    async def _forget(self, key: str) -> None:
        self._here.pop(key, None)
        try:
            await self._redis.delete(key)
        except REDIS_LOST:
            return

    def _count_here(self, key: str) -> tuple[int, float]:
        now = time.monotonic()
        count, until = self._here.get(key, (0, 0.0))
        if until <= now:
            # All windows have the same length, so expired counters come first in the OrderedDict.
            self._here.pop(key, None)
            count, until = 0, now + WINDOW_SECONDS
            while self._here and (len(self._here) >= MAX_COUNTED_HERE or next(iter(self._here.values()))[1] <= now):
                self._here.popitem(last=False)
        self._here[key] = (count + 1, until)
        return count + 1, until

    def _key(self, kind: str, who: str) -> str:
        # The key is a hash, so that Redis stores no e-mail or IP addresses.
        return f"{self._prefix}{kind}:{hashlib.sha256(who.encode()).hexdigest()[:32]}"
