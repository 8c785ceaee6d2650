"""Telling everyone what changed in a conversation. After the commit."""

from protocol.ids import UserId
from protocol.server import (
    Changed,
    ConversationUpdated,
    MessageChanged,
    MessageDeleted,
    MessageEdited,
)
from protocol.values import Conversation, Message
from server.context import Events
from server.queries.edits import Deleted
from server.queries.messages import FoundMessage
from server.queries.participants import ParticipantChange


def publish_changed(events: Events, found: FoundMessage, message: Message) -> Changed:
    """Tell that the message that was `found` is now `message`, with its words if everyone who is there may read them;
    return what to answer.
    """
    about, version = message.conversation_id, message.version
    if found.is_from_before:
        events.publish(MessageChanged(conversation_id=about, version=version, message_id=message.id))
    else:
        events.publish(MessageEdited(conversation_id=about, version=version, message=message))
    return Changed(conversation_id=about, version=version)


def publish_deleted(events: Events, deleted: Deleted) -> Changed:
    """Publish that a message was deleted, with what is left if everyone who is there may see it; return what to
    answer.
    """
    message = deleted.message
    about, version = message.conversation_id, message.version
    if deleted.is_from_before:
        events.publish(MessageChanged(conversation_id=about, version=version, message_id=message.id))
    else:
        events.publish(
            MessageDeleted(
                conversation_id=about, version=version, message=message, root_reply_count=deleted.root_reply_count
            )
        )
    return Changed(conversation_id=about, version=version)


def publish_updated(events: Events, conversation: Conversation, *, gone: UserId | None = None) -> None:
    """Tell what a conversation's settings are now; then drop who is `gone` by that."""
    event = ConversationUpdated(
        conversation_id=conversation.id, version=conversation.version, conversation=conversation
    )
    events.publish(event, gone=gone)


def publish_participant(events: Events, change: ParticipantChange) -> None:
    """Tell what everybody may know of what became of a participant; then drop them if they are not in any more."""
    now = change.participant
    events.publish(change.event, gone=None if now.status in {"active", "invited"} else now.user_id)
