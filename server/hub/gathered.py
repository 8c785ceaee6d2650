"""Changes of a crowd that leave together, as one `changes` event."""

from collections.abc import Iterable

import msgspec

from protocol.codec import encode, text_frame
from protocol.ids import ConversationId, UserId
from protocol.server import Changes
from server.core.crowds import Change, Crowd

MAX_GATHERED = 1_000
"""Max events that are gathered, per conversation. With the largest of them, they fit into a frame of 1 MiB."""


class Gathered:
    """Durable events without a gap, from after the version `since` up to `version`."""

    __slots__ = ("_changes", "_crowd", "_events", "_frames", "_id", "since", "version")

    def __init__(self, conversation_id: ConversationId, since: int) -> None:
        self._id = conversation_id
        self.since = self.version = since
        self._events: list[bytes] = []
        self._changes: list[Change] = []
        self._crowd: Crowd | None = None
        self._frames: dict[int, bytes] = {}

    @property
    def is_full(self) -> bool:
        """Whether the events should leave."""
        return len(self._events) >= MAX_GATHERED

    def add(self, version: int, events: Iterable[tuple[Change, bytes]]) -> None:
        """Add the events that lead to a version, with their JSON."""
        for change, event in events:
            self._changes.append(change)
            self._events.append(event)
        self.version = version

    def frame(self, user_id: UserId, since: int) -> bytes:
        """Return a WebSocket frame for a user who has the version `since`. Nothing may be added after this."""
        if self._crowd is None:
            self._crowd = Crowd(self._changes)
        if self._crowd.has_own(user_id):
            return self._encoded(user_id, since)
        if (frame := self._frames.get(since)) is None:
            frame = self._frames[since] = self._encoded(None, since)
        return frame

    def _encoded(self, user_id: UserId | None, since: int) -> bytes:
        assert self._crowd is not None  # noqa: S101 - created by `frame`
        places, is_partial = self._crowd.delivered(user_id)
        events = [msgspec.Raw(self._events[place]) for place in places if self._changes[place].version > since]
        changes = Changes(
            conversation_id=self._id,
            since=since,
            version=self.version,
            events=events,  # type: ignore[arg-type]  # as JSON
            is_partial=is_partial,
        )
        return text_frame(encode(changes))
