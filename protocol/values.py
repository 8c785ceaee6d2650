"""The nouns that frames, replies and events share. None of them depends on who reads it, but the last one."""

from datetime import datetime
from typing import Any, Literal

import msgspec

from protocol.ids import ConversationId, EditId, MessageId, SessionId, UserId
from protocol.limits import CustomStatus

ConversationType = Literal["direct", "group", "channel", "assistant"]
ContentType = Literal["text", "image", "file", "audio", "video", "code", "system", "poll", "location"]
Role = Literal["owner", "admin", "moderator", "member", "guest"]
ParticipantStatus = Literal["active", "invited", "left", "removed", "banned"]
PresenceStatus = Literal["online", "away", "busy", "invisible", "offline"]
Json = dict[str, Any]
"""A JSON object whose inside is the client's own affair."""


class User(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's public face."""

    id: UserId
    name: str
    display_name: str | None = None
    image: str | None = None
    bio: str | None = None


class Session(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A login, on one device."""

    id: SessionId
    created_at: datetime
    expires_at: datetime
    ip_address: str | None = None
    user_agent: str | None = None
    is_current: bool = False


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message. Deleted, it keeps its place and loses its words.

    `sent_version` is its place in the conversation; `version` is the clock at its last change.
    """

    id: MessageId
    conversation_id: ConversationId
    sender_id: UserId
    content: str
    content_type: ContentType = "text"
    formatted_content: str | None = None
    mentions: list[UserId] = []
    metadata: Json | None = None
    reactions: dict[str, int] = {}
    parent_message_id: MessageId | None = None
    thread_root_id: MessageId | None = None
    reply_count: int = 0
    edited_at: datetime | None = None
    is_deleted: bool = False
    deleted_at: datetime | None = None
    deleted_by: UserId | None = None
    sent_version: int
    version: int
    created_at: datetime


class MessageEdit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a message said before an edit."""

    id: EditId
    content: str
    formatted_content: str | None = None
    edited_by: UserId
    edited_at: datetime
    version: int


class Permissions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a participant may do, by role or by grant."""

    can_add_members: bool = False
    can_remove_members: bool = False
    can_edit_conversation: bool = False
    can_delete_messages: bool = False
    can_pin_messages: bool = False


class Participant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Someone's part in a conversation; it stays, with its status, after they leave."""

    conversation_id: ConversationId
    user_id: UserId
    role: Role
    status: ParticipantStatus = "active"
    permissions: Permissions = Permissions()
    joined_at: datetime
    left_at: datetime | None = None
    invited_by: UserId | None = None
    version: int


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation's own settings; `version` is the clock when they last changed."""

    id: ConversationId
    type: ConversationType
    title: str | None = None
    description: str | None = None
    is_public: bool = False
    max_participants: int | None = None
    is_archived: bool = False
    created_by: UserId
    participant_count: int
    settings: Json = {}
    version: int
    created_at: datetime


class Presence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a user is seen by others: never `invisible`, which looks like `offline`."""

    user_id: UserId
    status: PresenceStatus
    custom_status: CustomStatus | None = None
    last_seen_at: datetime | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """How far someone has read."""

    user_id: UserId
    message_id: MessageId


class ConversationView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation as one of its participants sees it: the only value that depends on the reader.

    `version` is the conversation's clock; every event up to it is already in here. `unread_count` stops at 100.
    `peer_id` is the other one of a direct conversation; `invite_code` is there for who may add participants.
    """

    conversation: Conversation
    version: int
    me: Participant
    peer_id: UserId | None = None
    last_message: Message | None = None
    unread_count: int = 0
    last_read_message_id: MessageId | None = None
    last_activity_at: datetime
    invite_code: str | None = None
