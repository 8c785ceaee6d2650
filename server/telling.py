"""Telling that a message changed: with its words, if everyone who is there may read them."""

from protocol.server import Changed, MessageChanged, MessageEdited
from protocol.values import Message
from server.context import Context
from server.queries.messages import Found


def tell_changed(context: Context, found: Found, message: Message) -> Changed:
    """Tell everyone that the message that was `found` is now `message`; return what to answer. After the commit."""
    about, version = message.conversation_id, message.version
    if found.is_from_before:
        context.events.publish(MessageChanged(conversation_id=about, version=version, message_id=message.id))
    else:
        context.events.publish(MessageEdited(conversation_id=about, version=version, message=message))
    return Changed(conversation_id=about, version=version)
