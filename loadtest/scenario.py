"""What a scenario is: who there is, and what one of them does each time something is due."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec

from loadtest.line import Seat

if TYPE_CHECKING:
    from loadtest.crowd import Crowd


class Size(msgspec.Struct, kw_only=True):
    """How large a run is to be. What is not said takes the scenario's own figure."""

    people: int
    connections: int
    group: int
    rate: float
    messages: int = 1_000_000
    """How many messages the conversation of `history` has."""


class Layout(msgspec.Struct, kw_only=True):
    """Who there is: people by number, the conversations they have, and how many of each one's members talk."""

    people: int
    groups: list[list[int]] = []
    talkers: int = 0
    """How many members of each conversation talk; 0 is all of them."""
    is_direct: bool = False
    is_kept: bool = False
    """Whether the (one) conversation is kept for the next run."""

    def fill(self, seats: list[Seat], conversations: Sequence[str]) -> dict[str, list[str]]:
        """Note on everyone's seat where they take part and talk; return who is in each of the conversations,
        which are given by their ids in the order of `groups`.
        """
        members: dict[str, list[str]] = {}
        for about, group in zip(conversations, self.groups, strict=True):
            members[about] = [seats[one].user_id for one in group]
            for place, one in enumerate(group):
                seats[one].conversations.append(about)
                seats[one].talks |= not self.talkers or place < self.talkers
        return members


class Scenario:
    """The base of all scenarios: nothing happens in it."""

    name: ClassVar[str]
    about: ClassVar[str]
    unit: ClassVar[str] = "messages"
    """What `rate` counts."""
    people: ClassVar[int] = 1_000
    group: ClassVar[int] = 10
    connections: ClassVar[int] = 0
    """How many there are, if more than one for each of the people."""
    rate: ClassVar[float] = 0.0
    is_broadcast: ClassVar[bool] = False
    """Whether everyone is in one conversation only, and hears nothing but its messages."""

    def __init__(self, crowd: "Crowd", size: Size, seed: int) -> None:
        self.crowd = crowd
        self.size = size
        self.random = random.Random(seed)

    @classmethod
    def layout(cls, size: Size) -> Layout:
        """Return who there is: by default groups of `size.group`."""
        return Layout(people=size.people, groups=split(range(size.people), size.group))

    def begin(self) -> None:
        """Everyone is connected; the clock is about to start."""

    def act(self, due: int) -> None:
        """Do the next thing, which was due at a time of the monotonic clock, in nanoseconds."""


def split(people: Sequence[int], size: int) -> list[list[int]]:
    """Return people in groups of `size`; the last one is as small as it comes out."""
    return [list(people[start : start + size]) for start in range(0, len(people), size)]
