"""The nouns that frames, replies and events share. None of them depends on who reads it, but the last one."""

from datetime import datetime, time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.ids import ConversationId, EditId, MessageId, RelationshipId, ReportId, SessionId, UserId
from protocol.json_object import Json
from protocol.payloads import Payload

ConversationType = Literal["direct", "group", "channel", "assistant"]
ContentType = Literal["text", "image", "file", "audio", "video", "code", "system", "poll", "location"]
Role = Literal["owner", "admin", "moderator", "member", "guest"]
ParticipantStatus = Literal["active", "invited", "declined", "left", "removed", "banned"]
PresenceStatus = Literal["online", "away", "busy", "invisible", "offline"]
SystemMessageType = Literal["join", "leave", "add_member", "remove_member", "title_change", "settings_change"]
NotificationLevel = Literal["all", "mentions", "none"]
RelationshipKind = Literal["friend", "block", "follow", "mute"]
RelationshipStatus = Literal["pending", "accepted", "rejected", "active", "inactive"]
ReportStatus = Literal["open", "upheld", "dismissed"]
ScheduledStatus = Literal["waiting", "sent", "failed", "cancelled"]
FeedKind = Literal["mention", "reply", "reaction", "friend_request", "invitation"]
RecipientState = Literal[
    "read", "delivered", "unconfirmed", "offline", "slow", "muted", "blocked", "left", "joined_later", "hidden"
]


class User(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's face: what everyone needs to show who said something."""

    id: UserId
    name: str
    display_name: str | None = None
    image: str | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a user tells about themselves, to those who may see it (docs/privacy.md)."""

    user: User
    bio: str | None = None
    location: str | None = None
    website: str | None = None
    created_at: datetime


class Me(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user as they see themselves. `status` is what they chose by `presence`, whether they are connected or not:
    `online` if they never did, and neither `offline` nor `away`, which is a device's.
    """

    user: User
    email: str
    email_verified: bool = False
    bio: str | None = None
    location: str | None = None
    website: str | None = None
    status: PresenceStatus
    custom_status: str | None = None
    custom_status_until: datetime | None = None
    is_private: bool = False
    allow_friend_requests: bool = True
    show_online_status: bool = True
    allow_adding: bool = True
    is_admin: bool = False
    quiet_from: time | None = None
    quiet_until: time | None = None
    time_zone: str = "UTC"
    feed_seen_at: datetime | None = None
    created_at: datetime


class Session(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A login, on one device."""

    id: SessionId
    created_at: datetime
    expires_at: datetime
    ip_address: str | None = None
    user_agent: str | None = None
    is_current: bool = False


class LinkPreview(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the page behind the first link of a message says of itself."""

    url: str
    title: str | None = None
    description: str | None = None
    image: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message. Deleted, it keeps its place and loses its words.

    `sent_version` is its place in the conversation; `version` is the clock at its last change. Hidden by a moderator
    (`is_moderated`), it has no words, either; those who may read them all the same get them beside it, as `withheld`.
    A system message says what its sender did, by `system_message_type` and `metadata`, and in English.

    `formatted_content` is what the server has made of `content`, if that was Markdown: HTML that is safe to show.
    `mentions`, `loud_mentions` (`everyone`, `here`, or a role) and `hashtags` are what the server found in it.
    `thread_order` is a reply's place in its thread, from 1, and on the root that of the newest reply; a reply is only
    in its thread unless it is `also_in_conversation`. `poll_counts` are the votes for each option.

    `is_unreadable` says that the server cannot read a part of the stored message. That part is left out; clients show
    the rest, and a note.
    """

    id: MessageId
    conversation_id: ConversationId
    sender_id: UserId
    content: str
    content_type: ContentType = "text"
    payload: Payload | None = None
    formatted_content: str | None = None
    mentions: list[UserId] = []
    loud_mentions: list[str] = []
    hashtags: list[str] = []
    link_preview: LinkPreview | None = None
    metadata: Json | None = None
    reactions: dict[str, int] = {}
    parent_message_id: MessageId | None = None
    thread_root_id: MessageId | None = None
    thread_order: int = 0
    reply_count: int = 0
    also_in_conversation: bool = False
    quoted_message_id: MessageId | None = None
    forwarded_from_id: MessageId | None = None
    forwarded_sender_id: UserId | None = None
    is_pinned: bool = False
    pinned_at: datetime | None = None
    pinned_by: UserId | None = None
    poll_counts: list[int] | None = None
    poll_voters: int = 0
    poll_closed_at: datetime | None = None
    expires_at: datetime | None = None
    edited_at: datetime | None = None
    is_deleted: bool = False
    deleted_at: datetime | None = None
    deleted_by: UserId | None = None
    system_message_type: SystemMessageType | None = None
    is_moderated: bool = False
    moderation_reason: str | None = None
    moderated_at: datetime | None = None
    moderated_by: UserId | None = None
    is_unreadable: bool = False
    sent_version: int
    version: int
    created_at: datetime


class Words(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is said, before it is a message."""

    content: str
    is_markdown: bool = False
    payload: Payload | None = None
    parent_message_id: MessageId | None = None
    also_in_conversation: bool = False
    quoted_message_id: MessageId | None = None
    metadata: Json | None = None


class Scheduled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that waits for its time, or what became of it; `problem` is why it could not be sent.

    `not_before` is the time of the next try, after slow mode or a busy server put the message off. Later ones of the
    same conversation come after it and have none.
    """

    message_id: MessageId
    conversation_id: ConversationId
    words: Words
    send_at: datetime
    status: ScheduledStatus
    problem: str | None = None
    created_at: datetime
    not_before: datetime | None = None


class Draft(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the user has begun to write in a conversation; empty, there is nothing."""

    conversation_id: ConversationId
    content: str = ""
    updated_at: datetime


class StarredMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that the user has put aside, or does not have there any more."""

    conversation_id: ConversationId
    message_id: MessageId
    is_removed: bool = False
    starred_at: datetime


class ThreadFollow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether the user follows a thread, and the `thread_order` of the last reply that they have read."""

    conversation_id: ConversationId
    root_id: MessageId
    is_following: bool
    last_read_order: int = 0


class ThreadView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A thread as the caller sees it. `participants` are who replied, at most 100; `unread_count` stops at 100."""

    root: Message
    follow: ThreadFollow
    participants: list[UserId]
    unread_count: int = 0
    last_reply: Message | None = None


class PollVote(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody has voted for, by the places of the options, from 0."""

    user_id: UserId
    options: list[int]
    voted_at: datetime


class Reader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Somebody who has read a message; at `read_at` they had read at least so far."""

    user_id: UserId
    read_at: datetime | None = None


class FeedEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that concerns the user: `user_id` did it. What is about a message has it with its words."""

    kind: FeedKind
    at: datetime
    user_id: UserId
    conversation_id: ConversationId | None = None
    message: Message | None = None
    emoji: str | None = None


class SearchHit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that was found. `snippet` is cut at what matches: every second piece, from the second on, does."""

    message: Message
    snippet: list[str]


class Recipient(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether a message has reached somebody, and if not, why (docs/clients.md)."""

    user_id: UserId
    state: RecipientState
    at: datetime | None = None


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


class ConversationSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a conversation works. `history` says what newcomers see of what was said before; `send_role` is the least
    role that may send; in slow mode a member waits that long after each message; `system_messages` tell who came,
    went and changed what; what is said from now on disappears after `expire_after_seconds`; senders may edit for
    `edit_window_seconds` (0: never), and `edits_visible_to` says who, besides the sender, sees what a message said
    before; `custom` is the clients' own.
    """

    history: Literal["from_start", "from_joining"] = "from_start"
    send_role: Role = "guest"
    slow_mode_seconds: Annotated[int, Meta(ge=0, le=6 * 3_600)] = 0
    system_messages: bool = True
    expire_after_seconds: Annotated[int, Meta(ge=1, le=10 * 365 * 86_400)] | None = None
    edit_window_seconds: Annotated[int, Meta(ge=0, le=10 * 365 * 86_400)] | None = None
    edits_visible_to: Literal["everyone", "moderators", "nobody"] = "everyone"
    custom: Json = {}


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation's own settings; `version` is the clock when they last changed."""

    id: ConversationId
    type: ConversationType
    title: str | None = None
    description: str | None = None
    image: str | None = None
    is_public: bool = False
    max_participants: int | None = None
    is_archived: bool = False
    is_deleted: bool = False
    created_by: UserId
    participant_count: int
    settings: ConversationSettings = ConversationSettings()
    version: int
    created_at: datetime


class Presence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a user is seen by others: never `invisible`, which looks like `offline`."""

    user_id: UserId
    status: PresenceStatus
    custom_status: str | None = None
    last_seen_at: datetime | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far someone has read, and how far a client of theirs has taken in what was sent."""

    user_id: UserId
    message_id: MessageId | None = None
    delivered_message_id: MessageId | None = None


class Preferences(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one participant wants to have a conversation, for themselves. The lowest `pin_order` is shown first; from
    `unread_from_id` on they want it to count as unread, until they read again.
    """

    pin_order: int | None = None
    is_hidden: bool = False
    is_muted: bool = False
    muted_until: datetime | None = None
    notification_level: NotificationLevel = "all"
    unread_from_id: MessageId | None = None


class InviteCode(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What lets in whoever has it, until it expires or is used up."""

    code: str
    expires_at: datetime | None = None
    uses_left: int | None = None


class Invitation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation that the user is asked to join, as far as one may know it from outside. `role` is the one that
    they join with, and `invited_by` the user who asked them.
    """

    conversation_id: ConversationId
    type: ConversationType
    title: str | None = None
    description: str | None = None
    image: str | None = None
    participant_count: int
    role: Role
    invited_by: UserId | None = None


class PublicConversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation that anyone can find and join."""

    conversation_id: ConversationId
    type: ConversationType
    title: str
    description: str | None = None
    image: str | None = None
    participant_count: int


class Switches(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one user lets another one do, beyond what their settings say to everyone."""

    can_see_online_status: bool = True
    can_send_messages: bool = True
    can_see_profile: bool = True
    notifications_enabled: bool = True


class Relationship(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is between the caller and `user_id`: `is_outgoing` if it is the caller's own. Friends have one each way."""

    id: RelationshipId
    user_id: UserId
    kind: RelationshipKind
    is_outgoing: bool
    status: RelationshipStatus
    request_message: str | None = None
    response_message: str | None = None
    switches: Switches | None = None
    created_at: datetime
    accepted_at: datetime | None = None


class RelationshipEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A relationship, the other one's face as far as it may be seen, and how much the two have written to each other
    directly. Who asks for friendship shows their face by it.
    """

    relationship: Relationship
    user: User | None = None
    interaction_count: int = 0
    last_interaction_at: datetime | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What someone finds wrong with a message, with the message's words as they are now."""

    id: ReportId
    conversation_id: ConversationId
    message_id: MessageId
    sender_id: UserId
    content: str
    reporter_id: UserId
    reason: str
    status: ReportStatus
    resolved_by: UserId | None = None
    resolved_at: datetime | None = None
    created_at: datetime


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who used what power on whom. `hash` covers the entry and `previous_hash`, that of the one before; without an
    actor, it was done on the server's command line.
    """

    number: int
    actor_id: UserId | None = None
    action: str
    user_id: UserId | None = None
    message_id: MessageId | None = None
    details: Json = {}
    created_at: datetime
    previous_hash: str
    hash: str


class ConversationView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation as one of its participants sees it: the only value that depends on the reader.

    `version` is the conversation's clock; every event up to it is already in here. `unread_count` stops at 100.
    `peer_id` is the other one of a direct conversation; `invite` is there for who may add participants.
    """

    conversation: Conversation
    version: int
    me: Participant
    peer_id: UserId | None = None
    last_message: Message | None = None
    unread_count: int = 0
    last_read_message_id: MessageId | None = None
    last_activity_at: datetime
    preferences: Preferences = Preferences()
    invite: InviteCode | None = None
