"""Untold: the users whose presence is to be announced, and why. Whatever fails, nobody is forgotten until it is."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

from protocol.ids import UserId
from server.core.failures import Failures
from server.fairness.batcher import Batcher
from server.queries.users import Visibility

AT_ONCE = 1_000
"""Max users who are announced together."""
CALLS_AT_ONCE = 256
"""Max calls of `tell` that share an announcement."""
AGAIN_SECONDS = 0.5
"""Pause after an announcement that failed."""

log = logging.getLogger(__name__)


class Reason(IntEnum):
    """Why a user's presence is announced: a device came, went, or is idle; another status or custom status, or the end
    of one; another setting of privacy. Each is told of all that those before it are, and of more. An event that an
    invisible user causes would tell that they are here.
    """

    DEVICE = 1
    CHOICE = 2
    PRIVACY = 3

    def is_told_of(self, choice: Visibility) -> bool:
        """Whether those who watch a user who has chosen this are told."""
        if self is Reason.DEVICE:
            return choice.is_shown and choice.status != "invisible"
        return choice.is_shown or self is Reason.PRIVACY


class PresenceNews(NamedTuple):
    """Why a user is to be announced, and when their last device went, if it did."""

    reason: Reason
    left_at: float | None = None

    def with_other(self, other: "PresenceNews") -> "PresenceNews":
        """Return what is to be announced of both."""
        return PresenceNews(max(self.reason, other.reason), max(self.left_at or 0.0, other.left_at or 0.0) or None)


class PendingPresence:
    """All of them."""

    def __init__(self, announce: Callable[[Mapping[UserId, PresenceNews]], Awaitable[None]]) -> None:
        """`announce` reads how users are now, and tells it. One call at a time, so that nothing older is told last."""
        self._announce = announce
        self._waiting: dict[UserId, PresenceNews] = {}
        self._in_flight: dict[UserId, PresenceNews] = {}
        self._has_some = asyncio.Event()
        self._tells: Batcher[UserId | None, bool] = Batcher(self._tell, most=CALLS_AT_ONCE)
        self._failures = Failures(log, "announcing presence")

    def __bool__(self) -> bool:
        return bool(self._waiting or self._in_flight)

    def isdisjoint(self, user_ids: Collection[UserId]) -> bool:
        """Whether none of these users is to be announced."""
        return self._waiting.keys().isdisjoint(user_ids) and self._in_flight.keys().isdisjoint(user_ids)

    def keep(self, user_id: UserId, news: PresenceNews) -> None:
        """Have a user announced, soon."""
        there = self._waiting.get(user_id)
        self._waiting[user_id] = news if there is None else news.with_other(there)
        self._has_some.set()

    async def tell(self, user_id: UserId | None = None) -> bool:
        """Announce up to `AT_ONCE` users, this one among them, then those who wait for longest. Return False if that
        fails: they are due again.
        """
        return await self._tells.submit(user_id)

    async def tell_due(self) -> bool:
        """Wait for somebody, and announce up to `AT_ONCE`. Return whether as many are due again. A job."""
        await self._has_some.wait()
        if not await self.tell():
            await asyncio.sleep(AGAIN_SECONDS)
        return len(self._waiting) >= AT_ONCE

    async def _tell(self, calls: list[UserId | None]) -> list[bool]:
        # One announcement, not as many as it takes: this may be the task of a frame, and others are kept meanwhile.
        first = dict.fromkeys(user_id for user_id in calls if user_id is not None and user_id in self._waiting)
        rest = islice((user_id for user_id in self._waiting if user_id not in first), AT_ONCE - len(first))
        self._in_flight = {user_id: self._waiting.pop(user_id) for user_id in [*first, *rest]}
        if not self._waiting:
            self._has_some.clear()
        if not self._in_flight:
            return [True] * len(calls)
        are_told = False
        try:
            await self._announce(self._in_flight)
            are_told = True
            self._failures.end()
        except Exception as error:  # noqa: BLE001 - they are announced later
            self._failures.add(error)
        finally:
            for user_id, news in () if are_told else self._in_flight.items():
                self.keep(user_id, news)
            self._in_flight = {}
        return [are_told] * len(calls)
