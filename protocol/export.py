"""A person's own data, as `openchat export` and GET /v1/auth/export write it: one JSON object, its lists in pages."""

from datetime import datetime

import msgspec

from protocol.ids import ConversationId, MessageId
from protocol.json_object import Json
from protocol.values import (
    Draft,
    Me,
    Message,
    MessageEdit,
    Participant,
    Preferences,
    Relationship,
    Scheduled,
    Session,
    StarredMessage,
    ThreadFollow,
)


class ExportedLogin(msgspec.Struct, frozen=True, kw_only=True):
    """A way to log in, without its secrets."""

    provider_id: str
    account_id: str
    created_at: datetime


class ExportedConversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation, as far as it is the person's: their part in it, and how they want to have it."""

    conversation_id: ConversationId
    title: str | None
    participant: Participant
    preferences: Preferences
    last_read_at: datetime | None


class ExportedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the person's, with what it said before. `withheld` is what a moderator has hidden.

    Of a message that the person may not see now, such as one in a conversation that they left, these are their own
    words and times alone, and not what others have done about it.
    """

    message: Message
    withheld: str | None = None
    edits: list[MessageEdit]


class ExportedReaction(msgspec.Struct, frozen=True, kw_only=True):
    """An emoji that the person put on a message."""

    conversation_id: ConversationId
    message_id: MessageId
    emoji: str
    created_at: datetime


class ExportedReport(msgspec.Struct, frozen=True, kw_only=True):
    """A message that the person reported. `status` is null if they may not see that message now."""

    conversation_id: ConversationId
    message_id: MessageId
    reason: str
    status: str | None
    created_at: datetime


class ExportedVote(msgspec.Struct, frozen=True, kw_only=True):
    """What the person voted for in a poll, by the places of the options."""

    conversation_id: ConversationId
    message_id: MessageId
    options: list[int]
    voted_at: datetime


class ExportedEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where notifications are pushed to."""

    endpoint: str
    created_at: datetime


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is stored about a person. `deeds` are the entries of audit logs that they are the actor of."""

    me: Me
    logins: list[ExportedLogin]
    sessions: list[Session]
    conversations: list[ExportedConversation]
    relationships: list[Relationship]
    reports: list[ExportedReport]
    stars: list[StarredMessage]
    drafts: list[Draft]
    scheduled: list[Scheduled]
    votes: list[ExportedVote]
    threads: list[ThreadFollow]
    push_endpoints: list[ExportedEndpoint]
    deeds: list[Json]
    reactions: list[ExportedReaction]
    messages: list[ExportedMessage]
