"""A bound that all clients of a worker share: however much some of them hold, there is some left for the others."""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

SHARE: Final = 4
"""One client holds at most one in `SHARE` of what the others leave."""

Key = TypeVar("Key", bound=Hashable)


class SharedBound(Generic[Key]):
    """Places or bytes, counted by client. A client that holds none takes no memory.

    The first client gets at most a fourth of all, and the next ones a fourth of what is left. A fixed share would be
    small for one client alone, or used up by few.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._held: dict[Key, int] = {}

    def take(self, key: Key, count: int = 1) -> bool:
        """Count `count` more of a client; False, and nothing is counted, beyond its share or the bound."""
        held = self._held.get(key, 0)
        left = self.most - self.taken
        if count > left or held + count > max(1, (left + held) // SHARE):
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
