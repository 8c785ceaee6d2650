"""Messages that may have been stored, though their senders were told `unavailable`."""

from datetime import datetime, timedelta

from protocol.ids import MessageId

MAX_UNCONFIRMED = 10_000
"""Max messages, per worker: of more, the oldest are forgotten."""
CLOCK_SKEW = timedelta(seconds=1)
"""How much the database's clock may be behind the worker's."""


class Unconfirmed:
    """Messages whose commit was not confirmed, because the database was lost meanwhile. Nobody was notified of them."""

    def __init__(self) -> None:
        self._messages: dict[MessageId, datetime] = {}

    def add(self, message_id: MessageId, tried_at: datetime) -> None:
        """Remember a message, and when the first try began whose outcome is in doubt."""
        if message_id in self._messages:
            return
        if len(self._messages) >= MAX_UNCONFIRMED:
            del self._messages[next(iter(self._messages))]
        self._messages[message_id] = tried_at

    def settle(self, message_id: MessageId, created_at: datetime) -> bool:
        """Forget a message that is stored; return whether a try stored it whose outcome was in doubt. What was stored
        before the first of them was confirmed, though its sender may not have had the answer.
        """
        tried_at = self._messages.pop(message_id, None)
        return tried_at is not None and created_at >= tried_at - CLOCK_SKEW
