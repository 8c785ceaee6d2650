"""A typical day of people in several conversations, who mostly read."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from loadtest.connection import Connection
from loadtest.scenario import Layout, Scenario, Size, split
from protocol import client
from protocol.ids import ConversationId, MessageId

BREAK_SECONDS = 2.0
EMOJI = ("👍", "❤️", "😂", "🎉", "👀")
OF_EACH = 5
"""Max conversations per person besides the common room: a team, and larger groups with other people."""


class Mixed(Scenario):
    """The actions and their weights are in `TABLE`."""

    name = "mixed"
    about = "a typical day of 500 people in teams, larger groups, and a room"
    unit = "actions"
    people = 500
    rate = 300.0

    @classmethod
    def layout(cls, size: Size) -> Layout:
        people = list(range(size.people))
        groups = split(people, size.group)
        # The same people in other combinations, so that members of a team share no other group.
        for step in range(1, OF_EACH):
            dealt = sorted(people, key=lambda one: ((one * step + one // size.group) % size.group, one))
            groups += split(dealt, size.group * 2)
        return Layout(people=size.people, groups=[*groups, people])

    def act(self, due: int) -> None:
        connection = self.random.choice(self.crowd.connections)
        if connection.is_open and connection.user.conversations:
            act = self.random.choices(ACTS, SHARES)[0]
            act(self, connection, self.random.choice(connection.user.conversations), due)

    def send(self, connection: Connection, about: str, due: int) -> None:
        """Send a message, and edit a few of them."""
        message_id = connection.send(about, due)
        if self.random.random() < 0.05:  # noqa: PLR2004 - one in twenty
            connection.ask(client.Edit(**at(about, str(message_id)), content="I meant to say something else"), due)

    def read(self, connection: Connection, about: str, due: int) -> None:
        """Mark the latest message as read."""
        if about in connection.latest:
            connection.ask(client.Read(**at(about, connection.latest[about])), due)

    def type(self, connection: Connection, about: str, due: int) -> None:
        """Send a typing indicator."""
        connection.ask(client.Typing(conversation_id=ConversationId(UUID(about))), due)

    def react(self, connection: Connection, about: str, due: int) -> None:
        """React to the latest message."""
        if about in connection.latest:
            connection.ask(client.React(**at(about, connection.latest[about]), emoji=self.random.choice(EMOJI)), due)

    def read_history(self, connection: Connection, about: str, due: int) -> None:
        """Read the newest page of history."""
        connection.ask(client.History(conversation_id=ConversationId(UUID(about))), due)

    def set_presence(self, connection: Connection, _: str, due: int) -> None:
        """Change the presence to away or online."""
        connection.ask(client.SetPresence(status=self.random.choice(("online", "away"))), due)

    def drop_connection(self, connection: Connection, _: str, due: int) -> None:
        """Lose the connection, and reconnect after `BREAK_SECONDS`."""
        connection.drop()
        self.crowd.reconnect(connection, due + int(BREAK_SECONDS * 1e9))


Act = Callable[[Mixed, Connection, str, int], None]
TABLE: dict[Act, int] = {
    Mixed.read: 35,
    Mixed.send: 25,
    Mixed.type: 15,
    Mixed.read_history: 10,
    Mixed.react: 8,
    Mixed.set_presence: 4,
    Mixed.drop_connection: 3,
}
"""Weights of the actions, in per cent."""
ACTS, SHARES = list(TABLE), list(TABLE.values())


def at(about: str, message: str) -> dict[str, Any]:
    """Return the fields that name a message in a frame."""
    return {"conversation_id": ConversationId(UUID(about)), "message_id": MessageId(UUID(message))}
