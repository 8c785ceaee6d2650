"""A believable day: people in several conversations, who mostly read."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from loadtest.line import Line
from loadtest.scenario import Layout, Scenario, Size, split
from protocol import client
from protocol.ids import ConversationId, MessageId

BREAK_SECONDS = 2.0
EMOJI = ("👍", "❤️", "😂", "🎉", "👀")
OF_EACH = 5
"""Everyone is in a team, in up to this many others with other people, and in one room."""


class Mixed(Scenario):
    """What is done, and how often, is in SHARES."""

    name = "mixed"
    about = "a believable day of 500 people in teams, pairs of teams, and a room"
    unit = "acts"
    people = 500
    rate = 300.0

    @classmethod
    def layout(cls, size: Size) -> Layout:
        people = list(range(size.people))
        groups = split(people, size.group)
        # The same people, dealt differently: whoever shares a team shares no other one.
        for step in range(1, OF_EACH):
            dealt = sorted(people, key=lambda one: ((one * step + one // size.group) % size.group, one))
            groups += split(dealt, size.group * 2)
        return Layout(people=size.people, groups=[*groups, people])

    def act(self, due: int) -> None:
        line = self.random.choice(self.crowd.lines)
        if line.is_open and line.seat.conversations:
            act = self.random.choices(ACTS, SHARES)[0]
            act(self, line, self.random.choice(line.seat.conversations), due)

    def send(self, line: Line, about: str, due: int) -> None:
        """Say something; a few think again."""
        message_id = line.send(about, due)
        if self.random.random() < 0.05:  # noqa: PLR2004 - one in twenty
            line.ask(client.Edit(**at(about, str(message_id)), content="I meant to say something else"), due)

    def read(self, line: Line, about: str, due: int) -> None:
        """Read what is there."""
        if about in line.latest:
            line.ask(client.Read(**at(about, line.latest[about])), due)

    def type(self, line: Line, about: str, due: int) -> None:
        """Begin to write."""
        line.ask(client.Typing(conversation_id=ConversationId(UUID(about))), due)

    def react(self, line: Line, about: str, due: int) -> None:
        """Put an emoji on what was said last."""
        if about in line.latest:
            line.ask(client.React(**at(about, line.latest[about]), emoji=self.random.choice(EMOJI)), due)

    def look_back(self, line: Line, about: str, due: int) -> None:
        """Read the newest page."""
        line.ask(client.History(conversation_id=ConversationId(UUID(about))), due)

    def be_seen(self, line: Line, _: str, due: int) -> None:
        """Be away, or back."""
        line.ask(client.SetPresence(status=self.random.choice(("online", "away"))), due)

    def go(self, line: Line, _: str, due: int) -> None:
        """Walk through a tunnel."""
        line.drop()
        self.crowd.reconnect(line, due + int(BREAK_SECONDS * 1e9))


Act = Callable[[Mixed, Line, str, int], None]
TABLE: dict[Act, int] = {
    Mixed.read: 35,
    Mixed.send: 25,
    Mixed.type: 15,
    Mixed.look_back: 10,
    Mixed.react: 8,
    Mixed.be_seen: 4,
    Mixed.go: 3,
}
"""What people do, in parts of a hundred."""
ACTS, SHARES = list(TABLE), list(TABLE.values())


def at(about: str, message: str) -> dict[str, Any]:
    """Return what names a message, in a frame about it."""
    return {"conversation_id": ConversationId(UUID(about)), "message_id": MessageId(UUID(message))}
