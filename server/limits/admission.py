"""Admission of connections: a bounded number connects concurrently. The others get a time to retry, which follows from
the measured rate.

A slot stands for work that the server does. A connection that waits for its client holds none.
"""

import random
import time
from collections.abc import Callable

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from server.core.deadlines import Deadlines
from server.fairness.shared_bound import CLIENT_SHARE_DIVISOR, SharedBound

MAX_CONNECTING = 256
"""Max connections between the handshake and their first page, or the end of their resume."""
WINDOW_SECONDS = 1.0
FIRST_GUESS = 200.0
"""Slots released per second, until that rate is measured."""
SOONEST_SECONDS, LATEST_SECONDS = 0.25, 30.0


class Admission:
    """Counts connections that hold a slot, per address and per user. Measures how many slots are released per second,
    and remembers the times that refused clients were told.
    """

    def __init__(self, *, max_connecting: int = MAX_CONNECTING, clock: Callable[[], float] = time.monotonic) -> None:
        self._addresses: SharedBound[str] = SharedBound(max_connecting)
        self._users: SharedBound[UserId] = SharedBound(max_connecting)
        self._clock = clock
        self._rate = FIRST_GUESS
        self._given = 0
        self._since = clock()
        # The time by which all refused clients have had their turn, in total and per client.
        self._booked_until = 0.0
        self._booked: Deadlines[str | UserId, float] = Deadlines()
        self.refused = 0

    def __len__(self) -> int:
        return self._addresses.taken

    def begin(self, address: str) -> "Slot":
        """Return a slot for a new connection. Raises Refused, with a time to retry, if too many connections hold a
        slot, in total or from this address.
        """
        slot = Slot(self, address)
        if not self.take(slot):
            raise self._later(address)
        return slot

    def require(self, slot: "Slot", user_id: UserId) -> None:
        """Count a slot for a user, too. Raises Refused, as `begin` does, if too many connections of the user hold a
        slot.
        """
        if not self._users.take(user_id):
            raise self._later(user_id)
        slot.user_id = user_id

    def take(self, slot: "Slot") -> bool:
        """Take a slot. Return False if the share of its client has none left."""
        if not self._addresses.take(slot.address):
            return False
        if slot.user_id is not None and not self._users.take(slot.user_id):
            self._addresses.give(slot.address)
            return False
        if self._addresses.taken == 1:
            self._since, self._given = self._clock(), 0  # occasional connections do not show the rate
        slot.is_held = True
        return True

    def give(self, slot: "Slot") -> None:
        """Release a slot."""
        slot.is_held = False
        self._addresses.give(slot.address)
        if slot.user_id is not None:
            self._users.give(slot.user_id)
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
        if booked - after_those_inside <= self._addresses.most / CLIENT_SHARE_DIVISOR / self._rate:
            # A client that retries continuously delays the times of other clients only up to its share.
            self._booked_until = max(self._booked_until, after_those_inside) + 1 / self._rate
        self._booked.put(client, min(booked, now + LATEST_SECONDS), now)
        # The random factor spreads the retries. Most of it is above 1, so that earlier connections are finished by
        # then.
        wait = (max(booked, self._booked_until) - now) * random.uniform(0.9, 1.3)  # noqa: S311 - it need not be secret
        return Refused(
            ErrorCode.UNAVAILABLE,
            "Too many clients are connecting. Reconnect after `retry_after_ms`.",
            retry_after_ms=int(min(max(wait, SOONEST_SECONDS), LATEST_SECONDS) * 1000),
        )


class Slot:
    """The slot of one connection during admission."""

    __slots__ = ("_admission", "address", "is_held", "user_id")

    def __init__(self, admission: Admission, address: str) -> None:
        self._admission = admission
        self.address = address
        self.user_id: UserId | None = None
        self.is_held = False

    def require(self, user_id: UserId) -> None:
        """Count the slot for a user, too. Raises Refused if the user has too many."""
        self._admission.require(self, user_id)

    def end(self) -> None:
        """Release the slot, because the connection is admitted, waits for its client, or is lost."""
        if self.is_held:
            self._admission.give(self)

    def again(self) -> None:
        """Take a slot again, because the client has sent what the connection waited for. Without a free slot the client
        continues anyway. Its frames have rate limits and turns at the database, and others keep their slots.
        """
        if not self.is_held:
            self._admission.take(self)
