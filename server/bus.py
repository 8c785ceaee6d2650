"""The bus between workers, as the hub sees it, and the one of a worker that is alone."""

from collections.abc import Collection
from typing import Protocol


class Bus(Protocol):
    """Says in channels what happened, and hears what others say. What it carries are hints; PostgreSQL has the truth.

    `is_up` tells whether what others say is heard now; the numbers are for the metrics.
    """

    is_up: bool
    published: int
    received: int
    dropped: int

    async def start(self) -> None:
        """Connect. Raises Fatal if that cannot be."""

    async def close(self) -> None:
        """Disconnect."""

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Listen to channels; when this returns, nothing that is said in them is missed, unless the bus is down."""

    def unsubscribe(self, channel: bytes) -> None:
        """Listen to a channel no more."""

    def publish(self, channel: bytes, words: bytes) -> None:
        """Say something in a channel."""


class Alone:
    """The bus of the only worker there can be: nobody hears it, and there is nobody to hear."""

    is_up = True
    published = received = dropped = 0

    async def start(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to disconnect from."""

    async def subscribe(self, channels: Collection[bytes]) -> None:
        """Nobody says anything."""

    def unsubscribe(self, channel: bytes) -> None:
        """Nobody did."""

    def publish(self, channel: bytes, words: bytes) -> None:
        """Nobody is told."""
