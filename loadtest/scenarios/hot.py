"""Conversations and accounts that are as busy as possible. `bystander` runs them beside the strangers."""

from itertools import cycle
from typing import Any
from uuid import UUID

from loadtest.connection import Connection
from loadtest.scenario import Layout, Scenario, Size
from loadtest.scenarios.mixed import at
from protocol import client
from protocol.client import Frame
from protocol.ids import ConversationId, EditId, MessageId, uuid7
from protocol.payloads import Poll

EMOJI = "👍"
CONVERSATIONS = 100
"""Conversations of the busy account."""
WRITES, READS, EPHEMERAL, SEARCHES = 50, 100, 20, 2
"""Weights of the kinds of frames of the busy account, which are also the default limits per second."""


class Hot(Scenario):
    """The base of the scenarios: everyone is in one public channel."""

    people = 40
    group = 40
    is_broadcast = True

    @classmethod
    def layout(cls, size: Size) -> Layout:
        return Layout(people=size.people, groups=[list(range(size.people))], is_public=True)

    def begin(self) -> None:
        self._turns = cycle(self.crowd.connections)
        first = self.crowd.connections[0]
        self._about = first.user.conversations[0]
        self._message = first.send(self._about, 0)
        self._reacted: set[Connection] = set()

    def _react(self, connection: Connection, due: int) -> None:
        """Add a reaction to one message, or remove it."""
        place = at(self._about, str(self._message))
        if connection in self._reacted:
            self._reacted.remove(connection)
            connection.ask(client.Unreact(**place, emoji=EMOJI), due)
        else:
            self._reacted.add(connection)
            connection.ask(client.React(**place, emoji=EMOJI), due)


class Reacting(Hot):
    """Everyone reacts to one message."""

    name = "reacting"
    about = "40 people react in one channel"
    unit = "reactions"
    rate = 240.0

    def act(self, due: int) -> None:
        self._react(next(self._turns), due)


class Voting(Hot):
    """Everyone votes in one poll, for the other option each time."""

    name = "voting"
    about = "40 people vote in one channel"
    unit = "votes"
    rate = 240.0

    def begin(self) -> None:
        super().begin()
        self._poll = MessageId(uuid7())
        poll = client.Send(
            conversation_id=ConversationId(UUID(self._about)),
            message_id=self._poll,
            content="Tea?",
            payload=Poll(options=["Yes", "No"]),
        )
        self.crowd.connections[0].ask(poll, 0)
        self._voted: dict[Connection, int] = {}

    def act(self, due: int) -> None:
        connection = next(self._turns)
        option = self._voted[connection] = 1 - self._voted.get(connection, 1)
        connection.ask(client.Vote(**at(self._about, str(self._poll)), options=[option]), due)


class Writing(Hot):
    """Everyone in turn writes a message and reacts to one."""

    name = "writing"
    about = "40 people write and react in one channel"
    unit = "frames"
    rate = 80.0

    def begin(self) -> None:
        super().begin()
        self._is_reaction = cycle((False, True))

    def act(self, due: int) -> None:
        connection = next(self._turns)
        if next(self._is_reaction):
            self._react(connection, due)
        else:
            connection.send(self._about, due)


class Filling(Hot):
    """Everyone writes messages."""

    name = "filling"
    about = "40 people write in one channel"
    rate = 1_000.0

    def act(self, due: int) -> None:
        next(self._turns).send(self._about, due)


class Joining(Hot):
    """Some people leave a channel and join it again, and the others write in it."""

    name = "joining"
    about = "20 people leave and join, and 20 write"
    unit = "frames"
    rate = 80.0
    is_broadcast = False

    def begin(self) -> None:
        super().begin()
        connections = self.crowd.connections
        half = -(-len(connections) // 2)
        self._writers, joiners = cycle(connections[:half]), connections[half:]
        self._joiners = cycle(joiners)
        self._is_join = cycle((True, False))
        self._outside: set[Connection] = set()
        for connection in joiners:
            connection.user.conversations = []  # so that nobody waits for what happens while they are outside

    def act(self, due: int) -> None:
        if not next(self._is_join):
            next(self._writers).send(self._about, due)
            return
        connection, about = next(self._joiners), ConversationId(UUID(self._about))
        if connection in self._outside:
            self._outside.remove(connection)
            connection.ask(client.Join(conversation_id=about), due)
        else:
            self._outside.add(connection)
            connection.ask(client.Leave(conversation_id=about), due)


class Busy(Scenario):
    """One account on several devices, with frames of all kinds."""

    name = "busy"
    about = "one account with 100 conversations, on 5 devices"
    unit = "frames"
    people = 1
    connections = 5
    rate = 0.95 * (WRITES + READS + EPHEMERAL + SEARCHES)

    @classmethod
    def layout(cls, size: Size) -> Layout:
        return Layout(people=size.people, groups=[[0]] * CONVERSATIONS, is_public=True)

    def begin(self) -> None:
        self._places: list[tuple[ConversationId, MessageId]] = []
        first = self.crowd.connections[0]
        for about in first.user.conversations:
            place = ConversationId(UUID(about)), MessageId(uuid7())
            message = client.Send(conversation_id=place[0], message_id=place[1], content="I am here")
            first.ask(message, 0, lambda _, place=place: self._places.append(place))  # type: ignore[misc]

    def act(self, due: int) -> None:
        connection = self.random.choice(self.crowd.connections)
        if not self._places:
            connection.ask(client.Ping(), due)
            return
        about, message = self.random.choice(self._places)
        (kind,) = self.random.choices(
            (self._write, self._read, self._signal, self._search), (WRITES, READS, EPHEMERAL, SEARCHES)
        )
        connection.ask(kind(about, {"conversation_id": about, "message_id": message}), due)

    def _write(self, about: ConversationId, place: dict[str, Any]) -> Frame:
        return self.random.choice(
            (
                client.Send(conversation_id=about, message_id=MessageId(uuid7()), content="I am here"),
                client.Edit(**place, content=f"I was {self.random.random()}", edit_id=EditId(uuid7())),
                client.React(**place, emoji=EMOJI),
                client.Unreact(**place, emoji=EMOJI),
                client.Read(**place),
                client.MarkUnread(**place),
                client.Star(**place),
                client.Unstar(**place),
                client.Pin(**place),
                client.Unpin(**place),
                client.SetDraft(conversation_id=about, content=f"I thi {self.random.random()}"),
                client.SetPreferences(conversation_id=about, pin_order=self.random.randrange(10)),
            )
        )

    def _read(self, about: ConversationId, place: dict[str, Any]) -> Frame:
        return self.random.choice(
            (
                client.History(conversation_id=about, limit=100),
                client.ListConversations(limit=100),
                client.GetConversation(conversation_id=about),
                client.GetMessage(**place),
                client.GetBadge(),
                client.ListThreads(),
                client.ListDrafts(),
                client.ListStars(),
                client.Why(**place),
            )
        )

    def _signal(self, about: ConversationId, place: dict[str, Any]) -> Frame:
        return self.random.choice((client.Typing(conversation_id=about), client.Delivered(**place)))

    def _search(self, about: ConversationId, place: dict[str, Any]) -> Frame:
        del about, place
        return self.random.choice((client.Search(text="here"), client.ListFeed()))
