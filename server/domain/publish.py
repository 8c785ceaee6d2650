"""Publishes changes in a conversation, after the commit."""

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
    """Publish that the message `found` is now `message`. The event includes its content if all participants may read
    it. Return the reply.
    """
    about, version = message.conversation_id, message.version
    if found.is_from_before:
        events.publish(MessageChanged(conversation_id=about, version=version, message_id=message.id))
    else:
        events.publish(MessageEdited(conversation_id=about, version=version, message=message))
    return Changed(conversation_id=about, version=version)


def publish_deleted(events: Events, deleted: Deleted) -> Changed:
    """Publish that a message was deleted. The event includes its remains if all participants may see them. Return the
    reply.
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
    """Publish a conversation's settings. Then stop delivery to the user `gone`."""
    event = ConversationUpdated(
        conversation_id=conversation.id, version=conversation.version, conversation=conversation
    )
    events.publish(event, gone=gone)


def publish_participant(events: Events, change: ParticipantChange) -> None:
    """Publish the public part of a participant's change. Then stop delivery to a user who left."""
    now = change.participant
    events.publish(change.event, gone=None if now.status in {"active", "invited"} else now.user_id)
