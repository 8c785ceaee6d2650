"""The bus of an operator's command. It publishes the changes of the command, and receives nothing."""

import os
from collections.abc import Collection

from redis.asyncio import Redis, RedisCluster

from server.hub.cluster_bus import is_cluster
from server.hub.redis_bus import CONNECT_SECONDS, ORIGIN_BYTES, prefix


class CommandBus:
    """Collects messages. `send` publishes them, and waits for the server to confirm."""

    is_up = True
    received = dropped = losses = 0

    def __init__(self, installation: str) -> None:
        self._prefix = prefix(installation)
        self._said: list[tuple[bytes, bytes]] = []
        self._origin = os.urandom(ORIGIN_BYTES)
        self.published = 0

    async def start(self) -> None:
        """Do nothing, because `send` connects."""

    async def close(self) -> None:
        """Do nothing, because `send` disconnects."""

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Do nothing, because a command has no sockets."""

    def unsubscribe(self, channel: bytes) -> None:
        """Do nothing, because a command has no sockets."""

    def publish(self, channel: bytes, words: bytes) -> None:
        """Collect a message for a channel."""
        self._said.append((self._prefix + channel, self._origin + words))

    async def send(self, redis: Redis | RedisCluster) -> None:
        """Publish all collected messages. Raises an error of `REDIS_LOST` if Redis cannot be reached."""
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
