"""The bus on a Redis or Valkey cluster, by sharded pub/sub, with a connection to each primary.

A channel belongs to the node of its name's slot. So each conversation and each user has one node, and capacity grows
with the number of nodes. Slots move when the cluster changes. The worker polls their nodes every few seconds, and
subscribes again where channels moved.

An unreachable node counts as a bus that is down. Until it or its replica answers, the hub reads missed
events from PostgreSQL.
"""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import InvalidResponse

from server.core.errors import REDIS_LOST, redis_unreachable
from server.core.periodic import end, every
from server.hub.redis_bus import CONNECT_SECONDS, ORIGIN_BYTES, SHARDED, RedisBus, prefix

REFRESH_SECONDS = 2.0
"""Interval at which the worker asks for the nodes of all slots, in seconds."""

COUNTS = ("published", "received", "dropped", "losses")

Address: TypeAlias = tuple[str, int]


class ClusterBus:
    """This worker's connections to a cluster."""

    def __init__(
        self, url: str, installation: str, *, deliver: Callable[[bytes, bytes], None], caught_up: Callable[[], None]
    ) -> None:
        """`url` names any node of the cluster. The other parameters are those of `RedisBus`."""
        self._url = url
        self._installation = installation
        self._prefix = prefix(installation)
        self._deliver = deliver
        self._caught_up = caught_up
        self._origin = os.urandom(ORIGIN_BYTES)
        self._nodes: dict[Address, RedisBus] = {}
        self._slots: list[RedisBus | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._is_covered = False
        self._followed: dict[bytes, RedisBus | None] = {}
        self._refreshing: asyncio.Task[None] | None = None
        # Counts of nodes that left the cluster, and of messages for slots without a node.
        self._others: Counter[str] = Counter()

    @property
    def is_up(self) -> bool:
        """Whether all messages of other workers are received now."""
        return self._is_covered and all(node.is_up for node in self._nodes.values())

    @property
    def published(self) -> int:
        """The number of published messages."""
        return self._count("published")

    @property
    def received(self) -> int:
        """The number of received messages."""
        return self._count("received")

    @property
    def dropped(self) -> int:
        """The number of messages that could not be published."""
        return self._count("dropped")

    @property
    def losses(self) -> int:
        """The number of times that published messages may have been lost."""
        return self._count("losses")

    async def start(self) -> None:
        """Connect. Raises Fatal if the cluster cannot be reached."""
        try:
            await self._arrange(await slots(self._url))
        except REDIS_LOST as error:
            raise redis_unreachable(error) from error
        self._refreshing = asyncio.create_task(every(REFRESH_SECONDS, self._refresh))

    async def close(self) -> None:
        """Disconnect."""
        if self._refreshing is not None:
            await end([self._refreshing])
        for node in self._nodes.values():
            await node.close()

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Subscribe to channels. After this returns, no message on them is missed unless their node is down."""
        by_node: dict[RedisBus, list[bytes]] = {}
        for channel in channels:
            node = self._followed[channel] = self._node(channel)
            if node is not None:
                by_node.setdefault(node, []).append(channel)
        await asyncio.gather(*(node.subscribe(its) for node, its in by_node.items()))

    def unsubscribe(self, channel: bytes) -> None:
        """Unsubscribe from a channel."""
        if (node := self._followed.pop(channel, None)) is not None:
            node.unsubscribe(channel)

    def publish(self, channel: bytes, content: bytes) -> None:
        """Publish a message on a channel."""
        if (node := self._node(channel)) is not None:
            node.publish(channel, content)
        else:
            self._others.update(("dropped", "losses"))

    def _count(self, name: str) -> int:
        return self._others[name] + sum(int(getattr(node, name)) for node in self._nodes.values())

    def _node(self, channel: bytes) -> RedisBus | None:
        return self._slots[key_slot(self._prefix + channel)]

    async def _refresh(self) -> None:
        """Ask the first node that answers for the nodes of all slots, and move subscriptions."""
        for address in [*self._nodes, None]:
            with contextlib.suppress(*REDIS_LOST):
                await self._arrange(await slots(self._url if address is None else _at(self._url, address)))
                return

    async def _arrange(self, by_range: dict[tuple[int, int], Address]) -> None:
        for address in set(by_range.values()) - self._nodes.keys():
            node = self._nodes[address] = RedisBus(
                _at(self._url, address),
                self._installation,
                deliver=self._deliver,
                caught_up=self._caught_up,
                verbs=SHARDED,
                origin=self._origin,
            )
            node.begin()
        self._slots = [None] * REDIS_CLUSTER_HASH_SLOTS
        for (first, last), address in by_range.items():
            self._slots[first : last + 1] = [self._nodes[address]] * (last + 1 - first)
        self._is_covered = None not in self._slots
        moved = [channel for channel, node in self._followed.items() if node is not self._node(channel)]
        for channel in moved:
            if (before := self._followed[channel]) is not None:
                before.unsubscribe(channel)
        await self.subscribe(moved)
        for address in self._nodes.keys() - set(by_range.values()):
            node = self._nodes.pop(address)
            self._others.update({name: getattr(node, name) for name in COUNTS})
            self._others["losses"] += 1
            await node.close()
        if moved:
            self._caught_up()


async def is_cluster(url: str) -> bool:
    """Whether the Redis at `url` is a node of a cluster. Raises Fatal if it cannot be reached."""
    try:
        async with _node_at(url) as redis:
            return bool((await redis.info("cluster")).get("cluster_enabled"))
    except REDIS_LOST as error:
        raise redis_unreachable(error) from error


async def slots(url: str) -> dict[tuple[int, int], Address]:
    """Return the address of each slot range's primary, as the node at `url` reports it. A range has its first and its
    last slot. Raises an error of `REDIS_LOST` if the node cannot be reached or answers in another form.
    """
    async with _node_at(url) as redis:
        found = await redis.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
    return owners(found, urlsplit(url).hostname or "localhost")


def owners(found: Any, here: str) -> dict[tuple[int, int], Address]:  # noqa: ANN401 - any value of the protocol
    """Return the slot ranges in the answer of the node at `here`, as `slots` does."""
    try:
        # A node that does not know its own address omits it.
        return {(first, last): ((host or b"").decode() or here, port) for first, last, (host, port, *_), *_ in found}
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidResponse("CLUSTER SLOTS was answered in another form") from error


def _node_at(url: str) -> Redis:
    return Redis.from_url(url, socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS)


def _at(url: str, address: Address) -> str:
    """Return the URL of another node, with the same scheme, user and password."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host, port = address
    return parts._replace(netloc=f"{user}{at}{f'[{host}]' if ':' in host else host}:{port}").geturl()
