"""The other workers on the bus, by their heartbeats.

A worker that disappears without a goodbye may have committed a change that it did not publish. A worker whose bus was
interrupted may have published events that nobody received. In both cases this worker compares its positions with
PostgreSQL.
"""

import struct
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from enum import IntEnum

from server.hub.bus import OF_WORKERS, Bus
from server.hub.entries import log_ignored

HEARTBEAT_SECONDS = 1.0
"""Interval of heartbeats, in seconds."""
MAX_SILENT = 2
"""Max intervals without a heartbeat of a worker. They are counted, because a worker that was suspended itself has read
none in that time.
"""
CHANNEL = OF_WORKERS + bytes(16).hex().encode()
"""The bus channel of all workers. It has the form of a user's, of a user who does not exist."""

_LOSSES = struct.Struct("!Q")


class Kind(IntEnum):
    """Kinds of messages between workers. They take the place of the version."""

    HEARTBEAT = 0
    GOODBYE = 1
    RECHECK_CONVERSATIONS = 2
    RECHECK_USERS = 3


class Peer:
    """Another worker: its losses, as it last reported them, and the number of intervals since then."""

    __slots__ = ("losses", "silent")

    def __init__(self) -> None:
        self.losses = 0
        self.silent = 0


class Peers:
    """All other workers on the bus."""

    def __init__(
        self,
        bus: Bus,
        *,
        publish: Callable[[Kind, bytes], None],
        has_losses: Callable[[], None],
        has_ended: Callable[[], None],
    ) -> None:
        """`publish` publishes a message to the other workers. `has_losses` is called when another worker reports
        losses, and `has_ended` when one disappears.
        """
        self._bus = bus
        self._publish = publish
        self._has_losses = has_losses
        self._has_ended = has_ended
        self._peers: dict[bytes, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def workers(self) -> AbstractSet[bytes]:
        """The ids of the workers whose heartbeats arrive."""
        return self._peers.keys()

    async def start(self) -> None:
        """Receive the messages of other workers."""
        await self._bus.subscribe([CHANNEL])

    def receive(self, kind: int, content: bytes, worker: bytes) -> None:
        """Handle a heartbeat or a goodbye of a worker."""
        if kind == Kind.GOODBYE:
            self._peers.pop(worker, None)
        elif len(content) < _LOSSES.size:
            log_ignored("its heartbeat is cut off")
        else:
            peer = self._peers.get(worker)
            if peer is None:
                peer = self._peers[worker] = Peer()
                self.report()
            peer.silent = 0
            (losses,) = _LOSSES.unpack_from(content)  # a later release may add to it
            if losses != peer.losses:
                peer.losses = losses
                self._has_losses()

    def beat(self) -> None:
        """Send a heartbeat, and remove workers that are silent. It is called once per interval."""
        self.report()
        for worker, peer in list(self._peers.items()):
            # While the bus is down no heartbeat arrives, and all positions are compared anyway.
            peer.silent = peer.silent + 1 if self._bus.is_up else 0
            if peer.silent > MAX_SILENT:
                del self._peers[worker]
                self._has_ended()

    def leave(self) -> None:
        """Publish a goodbye. Nothing is published afterwards."""
        self._publish(Kind.GOODBYE, b"")

    def report(self) -> None:
        """Send a heartbeat. Workers that do not know this one answer with theirs."""
        self._publish(Kind.HEARTBEAT, _LOSSES.pack(self._bus.losses))
