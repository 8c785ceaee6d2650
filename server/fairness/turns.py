"""Turns: a max number of concurrent turns per key, for which others of the same key queue."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from server.core.faults import Exhausted
from server.fairness.fair_queue import FairQueue

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """Gives out turns. A key without turns takes no memory."""

    def __init__(self, most: int, *, patience: float) -> None:
        """`most` is the number of turns per key, `patience` the max wait for one, in seconds."""
        self._most = most
        self._patience = patience
        self._taken: dict[Key, int] = {}
        self._waiting: dict[Key, FairQueue[Hashable, asyncio.Future[None]]] = {}

    async def take(self, key: Key, client: Hashable = None) -> None:
        """Return when the caller has a turn, which lasts until `give`. Clients of a key take turns, and each is served
        in order. Raises Exhausted if no turn is free in time.
        """
        taken = self._taken.get(key, 0)
        if taken < self._most:
            self._taken[key] = taken + 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = FairQueue(is_over=asyncio.Future.done)
        waiting.put(client, turn)
        try:
            async with asyncio.timeout(self._patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(key, client)  # the turn came too late, so pass it to the next one
            else:
                waiting.drop(client, turn)
                self._end_if_empty(key)
            if isinstance(error, TimeoutError):
                raise Exhausted("no turn became free in time") from None
            raise

    @asynccontextmanager
    async def turn(self, key: Key, client: Hashable = None) -> AsyncIterator[None]:
        """Hold a turn for the block. Raises what `take` raises."""
        await self.take(key, client)
        try:
            yield
        finally:
            self.give(key, client)

    def give(self, key: Key, client: Hashable = None) -> None:
        """End a turn of a client. Of the other clients, the one that has waited longest is next."""
        if (waiting := self._waiting.get(key)) is not None:
            waiting.to_end(client)
            if waiting:
                line, turn = waiting.take()
                waiting.done(line)
                self._end_if_empty(key)
                turn.set_result(None)
                return
            del self._waiting[key]
        taken = self._taken[key] - 1
        if taken:
            self._taken[key] = taken
        else:
            del self._taken[key]

    def _end_if_empty(self, key: Key) -> None:
        if key in self._waiting and not self._waiting[key]:
            del self._waiting[key]
