"""A rate limit per user that workers share. Each worker takes tokens for the frames at other workers, too.

Asking Redis for every frame would cost more than most frames do. So a worker decides by its own buckets. Twice a second
it adds the frames of busy users to counters in Redis, and takes tokens for the frames that others added. A user with
connections at several workers gets at most the tokens of half a second more. Without Redis each worker limits alone.
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
"""Interval at which a worker shares its counts, in seconds."""
MATTERS = 0.1
"""Min frames of a user at one worker that are shared, as a part of the rate."""
LASTS_SECONDS = 60
"""Seconds after which an unused counter expires in Redis."""
KEY = "openchat:allowance:"

TOLD = {"write": "writes", "read": "reads", "ephemeral": "ephemeral", "search": "searches"}
"""The names of these limits in `ready.limits`."""

log = logging.getLogger(__name__)


class SharedRateLimit:
    """A rate limit per user for one class of frames."""

    def __init__(
        self,
        name: str,
        rate: float,
        redis: Redis | RedisCluster | None,
        *,
        installation: str = "",
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """`rate` is in frames per second. `redis` is None with a single worker."""
        self._prefix = f"{KEY}{installation}:{name}:"
        self.rate = rate
        self._bucket: TokenBuckets[UserId] = TokenBuckets(f"`{TOLD[name]}` of your user", rate, clock=clock)
        self._retries: Retries[UserId] = Retries(Pace.of(rate), clock=clock)
        self._redis = redis
        self._matters = max(2.0, rate * SHARE_SECONDS * MATTERS)
        self._counts: Counter[UserId] = Counter()
        # The counters in Redis as this worker last read them.
        self._totals: dict[UserId, int] = {}
        self._sharing: asyncio.Task[None] | None = None

    def require(
        self, user_id: UserId, count: int = 1, *, taken: int = 0, to_come: int = 0, path: str | None = None
    ) -> None:
        """Take tokens as `TokenBuckets.require` does. Raises Refused if there are too few."""
        self._bucket.require(user_id, count, taken=taken, to_come=to_come, path=path)
        self._tell(user_id, count)

    def charge(self, user_id: UserId, count: int) -> None:
        """Take tokens for frames that were handled already. If there are too few, up to one more bucket is owed."""
        self._bucket.charge(user_id, count)
        self._tell(user_id, count)

    def retry_after(self, user_id: UserId, wait_ms: int, tokens: int) -> int:
        """Return after how many milliseconds, at least `wait_ms`, to retry a frame that takes `tokens` tokens."""
        return self._retries.after(user_id, wait_ms, tokens)

    def _tell(self, user_id: UserId, count: int) -> None:
        if self._redis is not None:
            self._counts[user_id] += count
            if self._sharing is None:
                self._sharing = asyncio.create_task(self._share(self._redis))

    async def close(self) -> None:
        """Stop sharing. Frames that were not shared yet are lost to the other workers."""
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
            # A user who was not busy here before is not charged for what others counted since, which may be old.
            others = total - before.get(user_id, total - busy[user_id]) - busy[user_id]
            if others > 0:
                self._bucket.charge(user_id, others)

    def _key(self, user_id: UserId) -> str:
        return self._prefix + user_id.hex
