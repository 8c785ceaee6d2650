"""Presences and faces of users whom very many watch. They are delivered at intervals."""

import asyncio
from collections.abc import Callable

from protocol.ids import UserId
from server.core.crowds import CROWD_SECONDS
from server.hub.doubts import HeldFrame


class PacedFrames:
    """The frames about each user that wait until the interval after the last delivery has passed. Only the newest of
    each kind is kept, because each has the whole state.
    """

    def __init__(self, deliver: Callable[[UserId, HeldFrame, bool], None]) -> None:
        """`deliver` is called with a user, a frame that has waited, and whether it is about the face."""
        self._deliver = deliver
        self._waiting: dict[UserId, dict[bool, HeldFrame]] = {}
        self._timers: dict[UserId, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def is_waiting(self, user_id: UserId) -> bool:
        """Whether the interval after a delivery about a user has not passed, so that an earlier frame may wait."""
        return user_id in self._waiting

    def has_passed(self, user_id: UserId, frame: HeldFrame, *, is_face: bool) -> bool:
        """Return whether a frame about a user is delivered now. If not, it waits, unless a newer one does."""
        waiting = self._waiting.get(user_id)
        if waiting is None:
            self._begin(user_id)
            return True
        if is_face not in waiting or waiting[is_face].revision <= frame.revision:
            waiting[is_face] = frame
        return False

    def close(self) -> None:
        """Cancel all timers."""
        for timer in self._timers.values():
            timer.cancel()

    def _begin(self, user_id: UserId) -> None:
        self._waiting[user_id] = {}
        self._timers[user_id] = self._loop.call_later(CROWD_SECONDS, self._end, user_id)

    def _end(self, user_id: UserId) -> None:
        del self._timers[user_id]
        waiting = self._waiting.pop(user_id)
        if waiting:
            self._begin(user_id)
        for is_face, frame in waiting.items():
            self._deliver(user_id, frame, is_face)
