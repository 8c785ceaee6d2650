"""A bound that all clients of a worker share. Some of it stays free for others, however much a few clients hold."""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

CLIENT_SHARE_DIVISOR: Final = 4
"""Max share of what other clients leave, per client, as 1 / `CLIENT_SHARE_DIVISOR`."""

Key = TypeVar("Key", bound=Hashable)


class SharedBound(Generic[Key]):
    """Places or bytes, counted per client. A client that holds none takes no memory.

    The first client gets at most a fourth of all, and each next one a fourth of the rest. A fixed share would be small
    for a single client, or used up by a few.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._held: dict[Key, int] = {}

    def take(self, key: Key, count: int = 1) -> bool:
        """Add `count` to a client. Return False, without an effect, if that exceeds its share or the bound."""
        held = self._held.get(key, 0)
        left = self.most - self.taken
        if count > left or held + count > max(1, (left + held) // CLIENT_SHARE_DIVISOR):
            return False
        self.taken += count
        self._held[key] = held + count
        return True

    def give(self, key: Key, count: int = 1) -> None:
        """Give back what `take` counted."""
        self.taken -= count
        held = self._held[key] - count
        if held:
            self._held[key] = held
        else:
            del self._held[key]
