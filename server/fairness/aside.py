"""Places for frames that wait for held rows. Few wait at a time, so that other frames keep their connections."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from server.core.faults import Exhausted
from server.fairness.turns import Turns

Key = TypeVar("Key", bound=Hashable)


class Aside(Generic[Key]):
    """Gives out places, at most one per key and one per client. A key without frames takes no memory."""

    def __init__(self, places: asyncio.Semaphore, *, patience: float) -> None:
        """`places` are those of all keys, which others may share. `patience` is the max wait for one, in seconds."""
        self._places = places
        self._patience = patience
        self._of_key: Turns[Key] = Turns(1, patience=patience)
        self._of_client: Turns[Hashable] = Turns(1, patience=patience)

    def is_held(self, key: Key) -> bool:
        """Whether a frame of this key has a place or waits for one, so that the next one has to wait, too."""
        return self._of_key.is_taken(key)

    @asynccontextmanager
    async def place(self, key: Key, client: Hashable) -> AsyncIterator[None]:
        """Hold a place for the block. Clients of a key take turns, and so do the keys of a client. Raises Exhausted if
        none becomes free in time.
        """
        # The client is first, so that nobody waits for a client who waits for another of its keys.
        async with self._of_client.turn(client), self._of_key.turn(key, client):
            try:
                async with asyncio.timeout(self._patience):
                    await self._places.acquire()
            except TimeoutError:
                raise Exhausted("no place became free in time") from None
            try:
                yield
            finally:
                self._places.release()
