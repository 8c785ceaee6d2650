"""The base class of scenarios: the people and conversations, and the next action when one is due."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec

from loadtest.connection import User

if TYPE_CHECKING:
    from loadtest.crowd import Crowd


class Size(msgspec.Struct, kw_only=True):
    """The size of a run."""

    people: int
    connections: int
    group: int
    rate: float
    messages: int = 1_000_000
    """Number of messages in the conversation of `history`."""


class Layout(msgspec.Struct, kw_only=True):
    """The people, by number, their conversations, and how many members of each conversation send messages."""

    people: int
    groups: list[list[int]] = []
    talkers: int = 0
    """Number of members of each conversation who send messages; 0 means all."""
    is_direct: bool = False
    is_public: bool = False
    """Whether the conversations are public channels, which everyone joins."""
    is_kept: bool = False
    """Whether the (one) conversation is kept for the next run."""

    def fill(self, users: list[User], conversations: Sequence[str]) -> dict[str, list[str]]:
        """Fill the conversations and `talks` of each user, and return the users of each conversation. `conversations`
        are ids in the order of `groups`.
        """
        members: dict[str, list[str]] = {}
        for about, group in zip(conversations, self.groups, strict=True):
            members[about] = [users[one].user_id for one in group]
            for place, one in enumerate(group):
                users[one].conversations.append(about)
                users[one].talks |= not self.talkers or place < self.talkers
        return members


class Scenario:
    """The base of all scenarios, without actions."""

    name: ClassVar[str]
    about: ClassVar[str]
    unit: ClassVar[str] = "messages"
    """The unit of `rate`."""
    people: ClassVar[int] = 1_000
    group: ClassVar[int] = 10
    connections: ClassVar[int] = 0
    """Number of connections; 0 means one per person."""
    rate: ClassVar[float] = 0.0
    is_broadcast: ClassVar[bool] = False
    """Whether everyone is in one conversation and receives only its messages. Then connections compare streams."""

    def __init__(self, crowd: "Crowd", size: Size, seed: int) -> None:
        self.crowd = crowd
        self.size = size
        self.random = random.Random(seed)

    @classmethod
    def layout(cls, size: Size) -> Layout:
        """Return the people and conversations, by default groups of `size.group`."""
        return Layout(people=size.people, groups=split(range(size.people), size.group))

    def begin(self) -> None:
        """Prepare the actions, after all connections are open."""

    def act(self, due: int) -> None:
        """Perform the next action. `due` is its due time, in nanoseconds of the monotonic clock."""


def split(people: Sequence[int], size: int) -> list[list[int]]:
    """Return people in groups of `size`. The last group may be smaller."""
    return [list(people[start : start + size]) for start in range(0, len(people), size)]
