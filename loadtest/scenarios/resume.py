"""Connections that drop, miss almost a thousand events, and resume."""

from collections import deque

from loadtest.connection import Connection
from loadtest.scenario import Layout, Scenario, Size, split

MISSED = 950
"""Events that each connection misses. More than 1,000 may be answered with `start_over`, and some arrive meanwhile."""
DROP_EVERY = 50
"""Messages per dropped connection."""


class Resume(Scenario):
    """Messages are sent at a rate. Connections drop, and resume after they have missed `MISSED` events."""

    name = "resume"
    about = f"5 rooms of 100: drop, miss {MISSED} events, resume"
    people = 500
    group = 100
    rate = 500.0

    @classmethod
    def layout(cls, size: Size) -> Layout:
        return Layout(people=size.people, groups=split(range(size.people), size.group), talkers=size.group // 4)

    def begin(self) -> None:
        self._talkers = [connection for connection in self.crowd.connections if connection.user.talks]
        self._awake = deque(connection for connection in self.crowd.connections if not connection.user.talks)
        self._asleep: deque[tuple[Connection, str, int]] = deque()
        self._count = 0
        self._observers = {about: connection for connection in self._talkers for about in connection.user.conversations}

    def act(self, due: int) -> None:
        talker = self.random.choice(self._talkers)
        talker.send(self.random.choice(talker.user.conversations), due)
        if self._asleep:
            connection, about, version = self._asleep[0]
            if self._observers[about].position(about) >= version + MISSED:
                self._asleep.popleft()
                self.crowd.reconnect(connection, due)
                self._awake.append(connection)
        self._count += 1
        if self._awake and self._count % DROP_EVERY == 0:
            self._drop(self._awake.popleft())

    def _drop(self, connection: Connection) -> None:
        about = connection.user.conversations[0]
        if connection.is_open and about in self._observers:
            connection.drop()
            self._asleep.append((connection, about, connection.position(about)))
        else:
            self._awake.append(connection)
