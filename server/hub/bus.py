"""The interface of the bus between workers."""

from collections.abc import Callable, Collection
from typing import Protocol

OF_WORKERS = b"w:"
"""Prefix of the channel on which workers exchange heartbeats."""


class Bus(Protocol):
    """Publishes messages on channels to other workers. They are hints, because PostgreSQL has the truth."""

    @property
    def is_up(self) -> bool:
        """Whether messages of other workers are received now."""

    @property
    def published(self) -> int:
        """The number of published messages."""

    @property
    def received(self) -> int:
        """The number of received messages."""

    @property
    def dropped(self) -> int:
        """The number of messages that could not be published. Workers find their events in PostgreSQL."""

    @property
    def losses(self) -> int:
        """The number of times that published messages may have been lost, as far as this worker knows. It changes as
        soon as messages can be published again.
        """

    async def start(self) -> None:
        """Connect. Raises Fatal if that fails."""

    async def close(self) -> None:
        """Disconnect."""

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Subscribe to channels. After this returns, no message on them is missed unless the bus is down."""

    def unsubscribe(self, channel: bytes) -> None:
        """Unsubscribe from a channel."""

    def publish(self, channel: bytes, content: bytes) -> None:
        """Publish a message on a channel."""


class Connect(Protocol):
    """Creates the bus of a hub."""

    def __call__(self, *, deliver: Callable[[bytes, bytes], None], caught_up: Callable[[], None]) -> Bus:
        """Return a bus. It calls `deliver` with the channel and the content of each message of another worker. It calls
        `caught_up` when it is up again, because the hub then reads missed events from PostgreSQL.
        """
