"""One allowance of a user at all workers: each charges itself what the others have given out.

Asking Redis for every frame would cost more than most frames do. So a worker decides by its own bucket, and twice a
second tells the others, by counters in Redis, about those users who are busy enough to matter; what others counted is
taken from its own bucket too. Whoever spreads over workers gets at most half a second's worth more. Without Redis each
worker's allowance is its own.
"""

import asyncio
import logging
import time
from collections import Counter

from redis.asyncio import Redis, RedisCluster

from protocol.ids import UserId
from server.core.errors import REDIS_LOST
from server.core.periodic import end
from server.limits.retries import Retries
from server.limits.token_bucket import Clock, Pace, TokenBuckets

SHARE_SECONDS = 0.5
MATTERS = 0.1
"""The share of the rate from which on a user's frames at one worker are told to the others."""
LASTS_SECONDS = 60
KEY = "openchat:allowance:"

TOLD = {"write": "writes", "read": "reads", "ephemeral": "ephemeral", "search": "searches"}
"""What `ready.limits` calls each allowance."""

log = logging.getLogger(__name__)


class SharedRateLimit:
    """An allowance of frames for each user, of one class."""

    def __init__(
        self,
        name: str,
        rate: float,
        redis: Redis | RedisCluster | None,
        *,
        installation: str = "",
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """`rate` is in frames a second; `redis` is None where there is only one worker."""
        self._prefix = f"{KEY}{installation}:{name}:"
        self.rate = rate
        self._bucket: TokenBuckets[UserId] = TokenBuckets(f"`{TOLD[name]}` of your user", rate, clock=clock)
        self._retries: Retries[UserId] = Retries(Pace.of(rate), clock=clock)
        self._redis = redis
        self._matters = max(2.0, rate * SHARE_SECONDS * MATTERS)
        self._counts: Counter[UserId] = Counter()
        # The counter in Redis as it was when this worker last looked.
        self._totals: dict[UserId, int] = {}
        self._sharing: asyncio.Task[None] | None = None

    def require(
        self, user_id: UserId, count: int = 1, *, taken: int = 0, to_come: int = 0, path: str | None = None
    ) -> None:
        """Take tokens as `TokenBuckets.require` does. Raises Refused if there are too few."""
        self._bucket.require(user_id, count, taken=taken, to_come=to_come, path=path)
        self._tell(user_id, count)

    def charge(self, user_id: UserId, count: int) -> None:
        """Take tokens for what was done already, whether they are there or not; at most one bucket is owed."""
        self._bucket.charge(user_id, count)
        self._tell(user_id, count)

    def retry_after(self, user_id: UserId, wait_ms: int, tokens: int) -> int:
        """Return after how many milliseconds, at least `wait_ms`, to repeat a refused frame of so many tokens."""
        return self._retries.after(user_id, wait_ms, tokens)

    def _tell(self, user_id: UserId, count: int) -> None:
        if self._redis is not None:
            self._counts[user_id] += count
            if self._sharing is None:
                self._sharing = asyncio.create_task(self._share(self._redis))

    async def close(self) -> None:
        """Share no more: what is not told yet stays untold."""
        self._redis = None
        if self._sharing is not None:
            await end([self._sharing])

    async def _share(self, redis: Redis | RedisCluster) -> None:
        await asyncio.sleep(SHARE_SECONDS)
        counts, self._counts = self._counts, Counter()
        self._sharing = None
        busy = {user_id: count for user_id, count in counts.items() if count >= self._matters}
        if not busy:
            self._totals.clear()
            return
        try:
            async with redis.pipeline(transaction=False) as pipe:
                for user_id, count in busy.items():
                    pipe.incrby(self._key(user_id), count)
                    pipe.expire(self._key(user_id), LASTS_SECONDS)
                totals = (await pipe.execute())[::2]
        except REDIS_LOST as error:
            log.debug("rate limits are not shared: %s", error)
            return
        before, self._totals = self._totals, dict(zip(busy, totals, strict=True))
        for user_id, total in self._totals.items():
            # Of a user who was not busy here before, what others counted long ago is not held against them.
            others = total - before.get(user_id, total - busy[user_id]) - busy[user_id]
            if others > 0:
                self._bucket.charge(user_id, others)

    def _key(self, user_id: UserId) -> str:
        return self._prefix + user_id.hex
