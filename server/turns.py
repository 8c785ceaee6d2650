"""Turns: at most so many at a time for each key; others of the same key wait in line."""

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """Gives out turns. A key without turns takes no memory."""

    def __init__(self, most: int, *, patience: float) -> None:
        """`most` is the number of turns per key, `patience` the max wait for one, in seconds."""
        self._most = most
        self._patience = patience
        self._taken: dict[Key, int] = {}
        self._waiting: dict[Key, deque[asyncio.Future[None]]] = {}

    async def take(self, key: Key) -> None:
        """Return when the caller has a turn, which lasts until `give`. Raises TimeoutError if none is free in time."""
        taken = self._taken.get(key, 0)
        if taken < self._most:
            self._taken[key] = taken + 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            async with asyncio.timeout(self._patience):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give(key)  # the turn came too late: the next in line has it
            else:
                self._drop(key, turn)  # none may come for long
            raise

    def give(self, key: Key) -> None:
        """End a turn: the one who has waited longest is next."""
        waiting = self._waiting.get(key, ())
        while waiting:
            turn = waiting.popleft()
            if not waiting:
                del self._waiting[key]
            if not turn.done():
                turn.set_result(None)
                return
        taken = self._taken[key] - 1
        if taken:
            self._taken[key] = taken
        else:
            del self._taken[key]

    def _drop(self, key: Key, turn: asyncio.Future[None]) -> None:
        """Take a turn that nobody waits for any more out of the line, if it is still there."""
        waiting = self._waiting.get(key)
        if waiting is not None and turn in waiting:
            waiting.remove(turn)
            if not waiting:
                del self._waiting[key]
