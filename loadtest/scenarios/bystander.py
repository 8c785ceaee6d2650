"""Strangers, who write and read in small groups while something else happens on the same server."""

import time
from itertools import cycle
from uuid import UUID

from loadtest.connection import Connection, Head
from loadtest.scenario import Scenario
from protocol import client
from protocol.ids import ConversationId


class Bystander(Scenario):
    """Half of the people send messages, and the others read the newest page of history.

    Nobody does both, because a connection handles one frame at a time. Both latencies are measured separately.
    """

    name = "bystander"
    about = "40 people in groups of 4 write and read, while another conversation or user is as busy as possible"
    unit = "frames"
    people = 40
    group = 4
    rate = 160.0

    def begin(self) -> None:
        acts = cycle((self._send, self._read))
        self._turns = cycle([*zip(self.crowd.connections, acts, strict=False)])

    def act(self, due: int) -> None:
        connection, act = next(self._turns)
        act(connection, due)

    def _send(self, connection: Connection, due: int) -> None:
        connection.send(connection.user.conversations[0], due)

    def _read(self, connection: Connection, due: int) -> None:
        counters = self.crowd.counters

        def answered(_: Head) -> None:
            counters.answered += 1
            counters.pages.add((time.monotonic_ns() - due) / 1e9)

        about = ConversationId(UUID(connection.user.conversations[0]))
        connection.ask(client.History(conversation_id=about), 0, answered)
