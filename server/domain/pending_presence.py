"""Users whose presence will be announced, and why. After a failure, they stay pending."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

from protocol.ids import UserId
from server.core.failures import Failures
from server.fairness.batcher import Batcher
from server.queries.presence import Visibility

USERS_PER_ANNOUNCEMENT = 1_000
"""Max users per announcement."""
CALLS_AT_ONCE = 256
"""Max calls of `tell` that share an announcement."""
AGAIN_SECONDS = 0.5
"""Pause after a failed announcement, in seconds."""

log = logging.getLogger(__name__)


class Reason(IntEnum):
    """Why a user's presence is announced. DEVICE: a device connected, disconnected or became idle. CHOICE: another
    status or custom status, or its end. PRIVACY: another setting of privacy.

    Each reason is announced in all states in which a lower one is, and in more. An event that an invisible user causes
    would reveal that the user is online.
    """

    DEVICE = 1
    CHOICE = 2
    PRIVACY = 3

    def is_told_of(self, choice: Visibility) -> bool:
        """Whether the watchers of a user with this choice receive an announcement."""
        if self is Reason.DEVICE:
            return choice.is_shown and choice.status != "invisible"
        return choice.is_shown or self is Reason.PRIVACY


class PresenceNews(NamedTuple):
    """The reason of an announcement, and when the user's last device disconnected, if it did."""

    reason: Reason
    left_at: float | None = None

    def with_other(self, other: "PresenceNews") -> "PresenceNews":
        """Return both announcements as one."""
        return PresenceNews(max(self.reason, other.reason), max(self.left_at or 0.0, other.left_at or 0.0) or None)


class PendingPresence:
    """All pending announcements of this worker."""

    def __init__(self, announce: Callable[[Mapping[UserId, PresenceNews]], Awaitable[None]]) -> None:
        """`announce` reads the current presence of users and publishes it. Calls are serialized, so that the latest one
        is published last.
        """
        self._announce = announce
        self._waiting: dict[UserId, PresenceNews] = {}
        self._in_flight: dict[UserId, PresenceNews] = {}
        self._has_some = asyncio.Event()
        self._tells: Batcher[UserId | None, bool] = Batcher(self._tell, most=CALLS_AT_ONCE)
        self._failures = Failures(log, "announcing presence")

    def __bool__(self) -> bool:
        return bool(self._waiting or self._in_flight)

    def isdisjoint(self, user_ids: Collection[UserId]) -> bool:
        """Whether none of these users is pending."""
        return self._waiting.keys().isdisjoint(user_ids) and self._in_flight.keys().isdisjoint(user_ids)

    def keep(self, user_id: UserId, news: PresenceNews) -> None:
        """Add a user, to be announced soon."""
        there = self._waiting.get(user_id)
        self._waiting[user_id] = news if there is None else news.with_other(there)
        self._has_some.set()

    async def tell(self, user_id: UserId | None = None) -> bool:
        """Announce up to `USERS_PER_ANNOUNCEMENT` users: `user_id` if it is pending, then those who have waited
        longest. On failure return False, and keep the users pending.
        """
        return await self._tells.submit(user_id)

    async def tell_due(self) -> bool:
        """Wait for a pending user, and announce up to `USERS_PER_ANNOUNCEMENT`. Return whether as many are pending
        again. A job.
        """
        await self._has_some.wait()
        if not await self.tell():
            await asyncio.sleep(AGAIN_SECONDS)
        return len(self._waiting) >= USERS_PER_ANNOUNCEMENT

    async def _tell(self, calls: list[UserId | None]) -> list[bool]:
        # Announce once, not until none is pending. This may be a frame's task, and more users are added meanwhile.
        first = dict.fromkeys(user_id for user_id in calls if user_id is not None and user_id in self._waiting)
        rest = islice(
            (user_id for user_id in self._waiting if user_id not in first), USERS_PER_ANNOUNCEMENT - len(first)
        )
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
        except Exception as error:  # noqa: BLE001 - they stay pending
            self._failures.add(error)
        finally:
            for user_id, news in () if are_told else self._in_flight.items():
                self.keep(user_id, news)
            self._in_flight = {}
        return [are_told] * len(calls)
