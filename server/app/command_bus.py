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
        self._collected: list[tuple[bytes, bytes]] = []
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

    def publish(self, channel: bytes, content: bytes) -> None:
        """Collect a message for a channel."""
        self._collected.append((self._prefix + channel, self._origin + content))

    async def send(self, redis: Redis | RedisCluster) -> None:
        """Publish all collected messages. Raises an error of `REDIS_LOST` if Redis cannot be reached."""
        collected, self._collected = self._collected, []
        for channel, content in collected:
            if isinstance(redis, RedisCluster):
                await redis.spublish(channel, content)
            else:
                await redis.publish(channel, content)
            self.published += 1


async def connect(url: str) -> Redis | RedisCluster:
    """Return a client of the Redis at `url`, or of its cluster. Raises Fatal if it cannot be reached."""
    kind = RedisCluster if await is_cluster(url) else Redis
    return kind.from_url(url, socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS)
