"""The bus of a command of the operator: it publishes what the command changed, and receives nothing."""

import os
from collections.abc import Collection

from redis.asyncio import Redis, RedisCluster

from server.hub.cluster_bus import is_cluster
from server.hub.redis_bus import CONNECT_SECONDS, ORIGIN_BYTES, prefix


class CommandBus:
    """Collects what is published, until `send` does so and waits for the server to confirm it."""

    is_up = True
    received = dropped = 0

    def __init__(self, installation: str) -> None:
        self._prefix = prefix(installation)
        self._said: list[tuple[bytes, bytes]] = []
        self._origin = os.urandom(ORIGIN_BYTES)
        self.published = 0

    async def start(self) -> None:
        """Nothing to connect to before `send`."""

    async def close(self) -> None:
        """Nothing to disconnect from."""

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """A command has no sockets."""

    def unsubscribe(self, channel: bytes) -> None:
        """A command has no sockets."""

    def publish(self, channel: bytes, words: bytes) -> None:
        """Collect something to be said in a channel."""
        self._said.append((self._prefix + channel, self._origin + words))

    async def send(self, redis: Redis | RedisCluster) -> None:
        """Publish all that is collected. Raises what REDIS_LOST names if Redis cannot be reached."""
        said, self._said = self._said, []
        for channel, words in said:
            if isinstance(redis, RedisCluster):
                await redis.spublish(channel, words)
            else:
                await redis.publish(channel, words)
            self.published += 1


async def connect(url: str) -> Redis | RedisCluster:
    """Return a client of the Redis at `url`, or of its cluster. Raises Fatal if it cannot be reached."""
    kind = RedisCluster if await is_cluster(url) else Redis
    return kind.from_url(url, socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS)
