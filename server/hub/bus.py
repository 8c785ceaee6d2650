"""The bus between workers, as the hub sees it."""

from collections.abc import Callable, Collection
from typing import Protocol


class Bus(Protocol):
    """Says in channels what happened, and hears what others say: hints, for PostgreSQL has the truth."""

    @property
    def is_up(self) -> bool:
        """Whether what others say is heard now."""

    @property
    def published(self) -> int:
        """How many messages were said."""

    @property
    def received(self) -> int:
        """How many were heard."""

    @property
    def dropped(self) -> int:
        """How many could not be said; their events are found in PostgreSQL."""

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


class Connect(Protocol):
    """How the hub gets its bus."""

    def __call__(self, *, deliver: Callable[[bytes, bytes], None], caught_up: Callable[[], None]) -> Bus:
        """Return a bus. `deliver` is to be told a channel and what another worker said in it; `caught_up`, that
        the bus is up, so that what was said while it was not has to be looked for.
        """
