"""Conversations in which people send messages: one large, many small, or pairs."""

from itertools import cycle
from typing import TYPE_CHECKING

from loadtest.connection import Connection
from loadtest.scenario import Layout, Scenario, Size, split

if TYPE_CHECKING:
    from loadtest.crowd import Crowd

MESSAGES_PER_TALKER = 25
"""Max messages per sender and second, below the server's rate limit."""


class Talk(Scenario):
    """Senders take turns."""

    is_broadcast = True

    def __init__(self, crowd: "Crowd", size: Size, seed: int) -> None:
        super().__init__(crowd, size, seed)
        turns = [
            (connection, about)
            for connection in crowd.connections
            if connection.user.talks
            for about in connection.user.conversations
        ]
        self.random.shuffle(turns)
        self._turns: cycle[tuple[Connection, str]] = cycle(turns)

    def act(self, due: int) -> None:
        connection, about = next(self._turns)
        connection.send(about, due)


class Room(Talk):
    """One conversation of many, of whom a few send messages."""

    name = "room"
    about = "one conversation of 1,000, in which a few send messages"
    group = 1_000
    rate = 20.0

    @classmethod
    def layout(cls, size: Size) -> Layout:
        return Layout(
            people=size.people,
            groups=split(range(size.people), size.group),
            talkers=min(size.group, max(4, int(size.rate / MESSAGES_PER_TALKER) + 1)),
        )


class Teams(Talk):
    """Many small conversations, in which everyone sends messages."""

    name = "teams"
    about = "200 conversations of 10"
    people = 2_000
    rate = 200.0


class Direct(Talk):
    """Direct conversations of two."""

    name = "direct"
    about = "500 pairs"
    group = 2
    rate = 200.0

    @classmethod
    def layout(cls, size: Size) -> Layout:
        return Layout(people=size.people, groups=split(range(size.people - size.people % 2), 2), is_direct=True)
