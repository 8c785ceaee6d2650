"""Messages that may have been stored, though their senders were told `unavailable`."""

from protocol.ids import MessageId

MAX_UNCONFIRMED = 10_000
"""Max messages, per worker: of more, the oldest are forgotten."""


class Unconfirmed:
    """Messages whose commit was not confirmed, because the database was lost meanwhile. Nobody was notified of them."""

    def __init__(self) -> None:
        self._messages: dict[MessageId, None] = {}

    def add(self, message_id: MessageId) -> None:
        """Remember a message."""
        if len(self._messages) >= MAX_UNCONFIRMED:
            del self._messages[next(iter(self._messages))]
        self._messages[message_id] = None

    def remove(self, message_id: MessageId) -> bool:
        """Forget a message; return whether it was remembered."""
        if message_id not in self._messages:
            return False
        del self._messages[message_id]
        return True
