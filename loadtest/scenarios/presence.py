"""People who connect and disconnect, type, and watch each other."""

from uuid import UUID

from loadtest.line import Line
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
        for line in self.crowd.lines:
            others = {UserId(UUID(one)) for about in line.seat.conversations for one in self.crowd.members[about]}
            line.ask(Watch(user_ids=list(others)), 0)

    def act(self, due: int) -> None:
        line = self.random.choice(self.crowd.lines)
        if line.is_open:
            self._act(line, due)

    def _act(self, line: Line, due: int) -> None:
        chance = self.random.random()
        if chance < 0.6:  # noqa: PLR2004 - the shares are in the class's docstring
            about = ConversationId(UUID(self.random.choice(line.seat.conversations)))
            line.ask(Typing(conversation_id=about, active=self.random.random() < 0.7), due)  # noqa: PLR2004
        elif chance < 0.8:  # noqa: PLR2004
            line.ask(SetPresence(status=self.random.choice(("online", "away", "busy"))), due)
        else:
            line.drop()
            self.crowd.reconnect(line, due + int(BREAK_SECONDS * 1e9))
