"""People who connect and disconnect, type, and watch each other."""

from uuid import UUID

from loadtest.connection import Connection
from loadtest.scenario import Scenario
from protocol.client import SetPresence, Typing, Watch
from protocol.ids import ConversationId, UserId

BREAK_SECONDS = 1.0
"""Time between a disconnection and the reconnection, in seconds."""


class Presence(Scenario):
    """Of ten actions, six are typing indicators, two change the presence, and two disconnect and reconnect."""

    name = "presence"
    about = "100 teams of 10 who connect and disconnect, type, and watch each other"
    unit = "actions"
    rate = 100.0

    def begin(self) -> None:
        for connection in self.crowd.connections:
            others = {UserId(UUID(one)) for about in connection.user.conversations for one in self.crowd.members[about]}
            connection.ask(Watch(user_ids=list(others)), 0)

    def act(self, due: int) -> None:
        connection = self.random.choice(self.crowd.connections)
        if connection.is_open:
            self._act(connection, due)

    def _act(self, connection: Connection, due: int) -> None:
        chance = self.random.random()
        if chance < 0.6:  # noqa: PLR2004 - the shares are in the class's docstring
            about = ConversationId(UUID(self.random.choice(connection.user.conversations)))
            connection.ask(Typing(conversation_id=about, active=self.random.random() < 0.7), due)  # noqa: PLR2004
        elif chance < 0.8:  # noqa: PLR2004
            connection.ask(SetPresence(status=self.random.choice(("online", "away", "busy"))), due)
        else:
            connection.drop()
            self.crowd.reconnect(connection, due + int(BREAK_SECONDS * 1e9))
