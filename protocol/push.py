"""The JSON of a push notification, as a browser's service worker receives it."""

import msgspec

from protocol.ids import ConversationId, MessageId


class Notification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that its reader has not read yet. `badge` is `messages` of `get_badge`."""

    conversation_id: ConversationId
    message_id: MessageId
    thread_root_id: MessageId | None = None
    title: str
    sender: str
    body: str
    is_mention: bool = False
    badge: int = 0
