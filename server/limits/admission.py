"""Who may come in now: a bounded number at once, and the others are told when, by how fast it really goes.

A place stands for work that the server does. A connection that waits for its client holds none.
"""

import random
import time
from collections.abc import Callable

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from server.core.deadlines import Deadlines
from server.fairness.shared_bound import SHARE, SharedBound

AT_ONCE = 256
"""How many connections may be on their way in: from the handshake to their first page, or the end of their resume."""
WINDOW_SECONDS = 1.0
FIRST_GUESS = 200.0
"""How many places a second are given back, before that is known."""
SOONEST_SECONDS, LATEST_SECONDS = 0.25, 30.0


class Admission:
    """Counts who is on the way in, by address and by user, who was told to come later, and how many get in within a
    second.
    """

    def __init__(self, *, at_once: int = AT_ONCE, clock: Callable[[], float] = time.monotonic) -> None:
        self._addresses: SharedBound[str] = SharedBound(at_once)
        self._users: SharedBound[UserId] = SharedBound(at_once)
        self._clock = clock
        self._rate = FIRST_GUESS
        self._given = 0
        self._since = clock()
        # When everyone who was told to come later will have had their turn: all of them, and those of each client.
        self._booked_until = 0.0
        self._booked: Deadlines[str | UserId, float] = Deadlines()
        self.refused = 0

    def __len__(self) -> int:
        return self._addresses.taken

    def begin(self, address: str) -> "Slot":
        """Let one more begin to come in. Raises Refused, with a time to come back, if too many are on their way, in all
        or from this address.
        """
        place = Slot(self, address)
        if not self.take(place):
            raise self._later(address)
        return place

    def require(self, place: "Slot", user_id: UserId) -> None:
        """Count a place as one of a user. Raises Refused, as `begin`, if too many of the user's connections come in."""
        if not self._users.take(user_id):
            raise self._later(user_id)
        place.user_id = user_id

    def take(self, place: "Slot") -> bool:
        """Count a place; False if there is none in the share of its client."""
        if not self._addresses.take(place.address):
            return False
        if place.user_id is not None and not self._users.take(place.user_id):
            self._addresses.give(place.address)
            return False
        if self._addresses.taken == 1:
            self._since, self._given = self._clock(), 0  # what comes now and then says nothing about how fast it goes
        place.is_held = True
        return True

    def give(self, place: "Slot") -> None:
        """Take a place back."""
        place.is_held = False
        self._addresses.give(place.address)
        if place.user_id is not None:
            self._users.give(place.user_id)
        self._given += 1
        elapsed = self._clock() - self._since
        if elapsed >= WINDOW_SECONDS:
            self._rate = max(1.0, self._given / elapsed)
            self._since, self._given = self._clock(), 0

    def _later(self, client: str | UserId) -> Refused:
        self.refused += 1
        now = self._clock()
        after_those_inside = now + len(self) / self._rate
        booked = max(self._booked.get(client, now), after_those_inside) + 1 / self._rate
        if booked - after_those_inside <= self._addresses.most / SHARE / self._rate:
            # One client that asks again and again has others told a later time only up to its share.
            self._booked_until = max(self._booked_until, after_those_inside) + 1 / self._rate
        self._booked.put(client, min(booked, now + LATEST_SECONDS), now)
        # Nobody is told the same moment, and nobody who comes when told finds the ones before still waiting.
        wait = (max(booked, self._booked_until) - now) * random.uniform(0.9, 1.3)  # noqa: S311 - it need not be secret
        return Refused(
            ErrorCode.UNAVAILABLE,
            "Too many clients are connecting. Reconnect after `retry_after_ms`.",
            retry_after_ms=int(min(max(wait, SOONEST_SECONDS), LATEST_SECONDS) * 1000),
        )


class Slot:
    """A place of one connection among those that are on their way in."""

    __slots__ = ("_admission", "address", "is_held", "user_id")

    def __init__(self, admission: Admission, address: str) -> None:
        self._admission = admission
        self.address = address
        self.user_id: UserId | None = None
        self.is_held = False

    def require(self, user_id: UserId) -> None:
        """Count the place as one of a user, too. Raises Refused if the user has too many."""
        self._admission.require(self, user_id)

    def end(self) -> None:
        """Give the place back: the connection is in, waits for its client, or is gone."""
        if self.is_held:
            self._admission.give(self)

    def again(self) -> None:
        """Take a place again: the client has said what the connection waited for. A client that has no place left goes
        on without: its frames have a rate and turns at the database, and others who come keep their places.
        """
        if not self.is_held:
            self._admission.take(self)
