"""People who reply in threads, vote, star, search, and read their feeds."""

from uuid import UUID

from loadtest.connection import Connection
from loadtest.scenario import Scenario
from loadtest.scenarios.mixed import at
from protocol import client
from protocol.client import Frame
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.payloads import Poll

OPTIONS = ["Yes", "No", "Later"]


class Messages(Scenario):
    """The actions and their weights are in `_frame`."""

    name = "messages"
    about = "500 people in teams of 10 who reply in threads, vote, star, search, and read their feeds"
    unit = "actions"
    people = 500
    rate = 200.0

    def begin(self) -> None:
        # Votes are for the second to last poll of each conversation, which is certainly stored.
        self._asked: dict[str, str] = {}
        self._polls: dict[str, str] = {}

    def act(self, due: int) -> None:
        connection = self.random.choice(self.crowd.connections)
        if connection.is_open and connection.user.conversations:
            connection.ask(self._frame(connection, self.random.choice(connection.user.conversations)), due)

    def _frame(self, connection: Connection, about: str) -> Frame:
        latest = connection.latest.get(about)
        if latest is None:
            return self._send(about)
        place = at(about, latest)
        poll = self._polls.get(about)
        makes = (
            (20, lambda: self._send(about)),
            (20, lambda: self._send(about, reply_to=latest)),
            (2, lambda: self._send_poll(about)),
            (10, lambda: client.Vote(**at(about, poll), options=[self.random.randrange(3)]) if poll else client.Ping()),
            (10, lambda: client.Delivered(**place)),
            (10, lambda: client.Read(**place)),
            (5, lambda: client.Star(**place)),
            (5, lambda: client.SetDraft(conversation_id=place["conversation_id"], content="I thi")),
            (5, client.ListFeed),
            (5, client.GetBadge),
            (4, lambda: client.Search(text="people say")),
            (4, client.ListThreads),
        )
        (make,) = self.random.choices([make for _, make in makes], [share for share, _ in makes])
        return make()

    def _send(self, about: str, reply_to: str | None = None) -> client.Send:
        return client.Send(
            conversation_id=ConversationId(UUID(about)),
            message_id=MessageId(uuid7()),
            content=f"What people say to <@{self.random.choice(self.crowd.members[about])}> of #engines",
            parent_message_id=None if reply_to is None else MessageId(UUID(reply_to)),
        )

    def _send_poll(self, about: str) -> client.Send:
        frame = client.Send(
            conversation_id=ConversationId(UUID(about)),
            message_id=MessageId(uuid7()),
            content="Shall we?",
            payload=Poll(options=OPTIONS),
        )
        if about in self._asked:
            self._polls[about] = self._asked[about]
        self._asked[about] = str(frame.message_id)
        return frame
