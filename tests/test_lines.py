"""Queues per client take turns, also when clients give up and return."""

from collections import Counter
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from server.fairness.fair_queue import FairQueue

CLIENTS = "ABCD"
clients, places = st.sampled_from(CLIENTS), st.integers(0, 9)


class Item(NamedTuple):
    """An entry in the queue of a client."""

    client: str
    number: int


class Machine(RuleBasedStateMachine):
    """Clients enqueue items and cancel some, before or after the queue is told of it."""

    def __init__(self) -> None:
        super().__init__()
        self.over: set[Item] = set()
        self.lines: FairQueue[str, Item] = FairQueue(is_over=self.over.__contains__)
        self.enqueue: dict[str, list[Item]] = {client: [] for client in CLIENTS}
        self.busy: list[str] = []
        self.ahead: dict[str, Counter[str]] = {client: Counter() for client in CLIENTS}
        """For each waiting client, the turns of each other client meanwhile.

        A client that cancels and returns before the next turn has waited throughout.
        """
        self.count = 0

    def waiting(self) -> list[str]:
        """Return the clients that wait for a turn."""
        return [client for client in CLIENTS if self.enqueue[client] and client not in self.busy]

    @rule(client=clients)
    def put(self, client: str) -> None:
        self.count += 1
        item = Item(client, self.count)
        self.enqueue[client].append(item)
        self.lines.put(client, item)

    @precondition(lambda self: any(self.enqueue.values()))
    @rule(place=places, is_told=st.booleans())
    def give_up(self, place: int, is_told: bool) -> None:  # noqa: FBT001 - drawn
        items = [item for line in self.enqueue.values() for item in line]
        self._give_up(items[place % len(items)], is_told=is_told)

    @rule(client=clients)
    def come_back(self, client: str) -> None:
        for item in [*self.enqueue[client]]:
            self._give_up(item, is_told=True)
        self.put(client)

    def _give_up(self, item: Item, *, is_told: bool) -> None:
        self.enqueue[item.client].remove(item)
        self.over.add(item)
        if is_told:
            self.lines.drop(item.client, item)
            assert item not in self.lines._lines.get(item.client, ())  # noqa: SLF001

    @rule()
    def take(self) -> None:
        waiting = self.waiting()
        for client in CLIENTS:
            if client not in waiting:
                self.ahead[client].clear()
        assert bool(self.lines) == bool(waiting)
        if not waiting:
            return
        first = self.lines.first()
        client, item = self.lines.take()
        assert item == first == self.enqueue[client].pop(0), (
            "items of a client are taken in order, without cancelled ones"
        )
        self.busy.append(client)
        self.ahead[client].clear()
        for other in self.waiting():
            self.ahead[other][client] += 1
            assert self.ahead[other][client] == 1, "a client had two turns while another waited"

    @precondition(lambda self: self.busy)
    @rule(place=places)
    def done(self, place: int) -> None:
        self.lines.done(self.busy.pop(place % len(self.busy)))

    def teardown(self) -> None:
        while self.busy:
            self.done(0)
        while self.lines:
            self.take()
            self.done(0)
        assert not any(self.enqueue.values())
        assert (self.lines._lines, len(self.lines._next)) == ({}, 0), "state of a client is left"  # noqa: SLF001


TestLines = Machine.TestCase
TestLines.settings = settings(max_examples=100, stateful_step_count=50)
