"""A user's own data, as `openchat export` and GET /v1/auth/export return it: one JSON object whose lists come
in pages.
"""

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
    """A login method, without its secrets."""

    provider_id: str
    account_id: str
    created_at: datetime


class ExportedConversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation: the user's participation and preferences."""

    conversation_id: ConversationId
    title: str | None
    participant: Participant
    preferences: Preferences
    last_read_at: datetime | None


class ExportedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the user, with its earlier contents. `withheld` is the content that a moderator has hidden.

    For a message that the user may not see now, only their own words and times are included. An example is a message in
    a conversation that they left.
    """

    message: Message
    withheld: str | None = None
    edits: list[MessageEdit]


class ExportedReaction(msgspec.Struct, frozen=True, kw_only=True):
    """A reaction of the user."""

    conversation_id: ConversationId
    message_id: MessageId
    emoji: str
    created_at: datetime


class ExportedReport(msgspec.Struct, frozen=True, kw_only=True):
    """A report by the user. `status` is null if the user may not see the message now."""

    conversation_id: ConversationId
    message_id: MessageId
    reason: str
    status: str | None
    created_at: datetime


class ExportedVote(msgspec.Struct, frozen=True, kw_only=True):
    """A vote of the user in a poll, as indexes of options."""

    conversation_id: ConversationId
    message_id: MessageId
    options: list[int]
    voted_at: datetime


class ExportedEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that receives the user's push notifications."""

    endpoint: str
    created_at: datetime


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is stored about a user. `deeds` holds the audit log entries whose actor they are."""

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
