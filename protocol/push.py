"""What a browser's service worker finds in a notification, as JSON."""

import msgspec

from protocol.ids import ConversationId, MessageId


class Notification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that its reader has not read yet. `badge` is what `get_badge` says of messages."""

    conversation_id: ConversationId
    message_id: MessageId
    thread_root_id: MessageId | None = None
    title: str
    sender: str
    body: str
    is_mention: bool = False
    badge: int = 0
