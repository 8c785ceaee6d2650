"""Messages that may be stored although their senders received `unavailable`."""

from datetime import datetime, timedelta

from protocol.ids import MessageId

MAX_UNCONFIRMED = 10_000
"""Max messages, per worker. Beyond it, the oldest are forgotten."""
CLOCK_SKEW = timedelta(seconds=1)
"""Max difference by which the database's clock may be behind the worker's."""


class Unconfirmed:
    """Messages whose commit was not confirmed, because the database was lost meanwhile. Nobody was notified of them."""

    def __init__(self) -> None:
        self._messages: dict[MessageId, datetime] = {}

    def add(self, message_id: MessageId, tried_at: datetime) -> None:
        """Remember a message, and when the first attempt with an unknown outcome began."""
        if message_id in self._messages:
            return
        if len(self._messages) >= MAX_UNCONFIRMED:
            del self._messages[next(iter(self._messages))]
        self._messages[message_id] = tried_at

    def settle(self, message_id: MessageId, created_at: datetime) -> bool:
        """Forget a message that is stored. Return whether an attempt with an unknown outcome stored it. Messages stored
        before the first such attempt were confirmed, although the sender may have missed the reply.
        """
        tried_at = self._messages.pop(message_id, None)
        return tried_at is not None and created_at >= tried_at - CLOCK_SKEW
