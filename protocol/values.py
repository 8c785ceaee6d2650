"""Values that frames, replies and events share. All but `ConversationView` are the same for every reader."""

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
    """The public face of a user: what a client needs to show the sender of a message. `revision` is higher after each
    change of it.
    """

    id: UserId
    name: str
    display_name: str | None = None
    image: str | None = None
    revision: int = 0


class Profile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's profile, for those who may see it (docs/privacy.md)."""

    user: User
    bio: str | None = None
    location: str | None = None
    website: str | None = None
    created_at: datetime


class Me(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The caller's own profile and settings. `status` is the one that they last set by `presence`, whether or not they
    are connected. It is `online` by default, and never `offline` or `away`, which belongs to a device. `user_version`
    is that of the last change, as in `me_changed`.
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
    user_version: int = 0


class Session(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A login on one device."""

    id: SessionId
    created_at: datetime
    expires_at: datetime
    ip_address: str | None = None
    user_agent: str | None = None
    is_current: bool = False


class LinkPreview(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A preview of the page behind the first link in a message, from that page's own metadata."""

    url: str
    title: str | None = None
    description: str | None = None
    image: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message. A deleted message keeps its place and loses its content.

    `sent_version` is its place in the conversation, and `version` is that of its last change. A message that a
    moderator hid (`is_moderated`) has no content, either. Readers who may see it all the same receive it beside the
    message, as `withheld`. A system message describes an action of its sender, by `system_message_type`, `metadata` and
    English text.

    `formatted_content` is safe HTML that the server rendered if `content` is Markdown. `mentions`, `loud_mentions`
    (`everyone`, `here`, or a role) and `hashtags` are those that the server found in `content`. `poll_counts` has the
    number of votes per option.

    `thread_order` is the place of a reply in its thread, from 1; on the root, it is that of the newest reply. A reply
    appears only in its thread, unless it is `also_in_conversation`.

    `is_unreadable` is true if the server cannot read a part of the stored message. The message lacks that part. Clients
    should show the rest, with a note.
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
    """The content of a message that is not sent yet."""

    content: str
    is_markdown: bool = False
    payload: Payload | None = None
    parent_message_id: MessageId | None = None
    also_in_conversation: bool = False
    quoted_message_id: MessageId | None = None
    metadata: Json | None = None


class Scheduled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A scheduled message. `problem` is why it failed.

    `not_before` is the time of the next attempt, if slow mode or a busy server delayed the message. Later messages of
    the same conversation wait for it and have no `not_before`. `user_version` is that of the last change, as in
    `scheduled_changed`.
    """

    message_id: MessageId
    conversation_id: ConversationId
    words: Words
    send_at: datetime
    status: ScheduledStatus
    problem: str | None = None
    created_at: datetime
    not_before: datetime | None = None
    user_version: int = 0


class Draft(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A draft of the user in a conversation. An empty `content` means that there is none. `user_version` is that of the
    last change, as in `draft_changed`.
    """

    conversation_id: ConversationId
    content: str = ""
    updated_at: datetime
    user_version: int = 0


class StarredMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A star of the user, or its removal. `user_version` is that of the last change, as in `star_changed`."""

    conversation_id: ConversationId
    message_id: MessageId
    is_removed: bool = False
    starred_at: datetime
    user_version: int = 0


class ThreadFollow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether the user follows a thread, and the `thread_order` of the last reply that they have read. `user_version`
    is that of the last change, as in `thread_follow_changed`. A reply by the user moves only `last_read_order`, which
    never falls.
    """

    conversation_id: ConversationId
    root_id: MessageId
    is_following: bool
    last_read_order: int = 0
    user_version: int = 0


class ThreadView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A thread as the caller sees it. `participants` has at most 100 users who replied; `unread_count` is at
    most 100.
    """

    root: Message
    follow: ThreadFollow
    participants: list[UserId]
    unread_count: int = 0
    last_reply: Message | None = None


class PollVote(msgspec.Struct, frozen=True, kw_only=True):
    """A vote in a poll. `options` are indexes of options, from 0."""

    user_id: UserId
    options: list[int]
    voted_at: datetime


class Reader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user who has read a message. At `read_at`, they had read up to it or further."""

    user_id: UserId
    read_at: datetime | None = None


class FeedEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A notification. `user_id` is the user who caused it. `message` is there if it concerns a message."""

    kind: FeedKind
    at: datetime
    user_id: UserId
    conversation_id: ConversationId | None = None
    message: Message | None = None
    emoji: str | None = None


class SearchHit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that matches a search. `snippet` alternates between text that does not match and text that does."""

    message: Message
    snippet: list[str]


class Recipient(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a message for one recipient (docs/clients.md)."""

    user_id: UserId
    state: RecipientState
    at: datetime | None = None


class MessageEdit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of a message before an edit."""

    id: EditId
    content: str
    formatted_content: str | None = None
    edited_by: UserId
    edited_at: datetime
    version: int


class Permissions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Permissions of a participant, by role or by grant."""

    can_add_members: bool = False
    can_remove_members: bool = False
    can_edit_conversation: bool = False
    can_delete_messages: bool = False
    can_pin_messages: bool = False


class Participant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's participation in a conversation. It remains, with its status, after they leave."""

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
    """Settings of a conversation.

    `history` is what new participants see of earlier messages. `send_role` is the lowest role that may send. In slow
    mode, members wait `slow_mode_seconds` after each message. With `system_messages`, the server posts changes of
    settings and, in conversations of up to 100 participants, joins and departures. New messages expire after
    `expire_after_seconds`.

    Senders may edit a message for `edit_window_seconds` (0 means never). `edits_visible_to` is who may see earlier
    contents, besides the sender. `custom` is free for clients.
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
    """A conversation. `version` is that of the last change of these fields."""

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
    """The presence of a user, as others see it. It is never `invisible`, which looks like `offline`. A presence that
    was read later has a higher `revision`.
    """

    user_id: UserId
    status: PresenceStatus
    custom_status: str | None = None
    last_seen_at: datetime | None = None
    revision: int = 0


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The read position of a participant, and the last message that a client of theirs has received, with the
    revisions as in `message_read` and `message_delivered`.
    """

    user_id: UserId
    message_id: MessageId | None = None
    revision: int = 0
    delivered_message_id: MessageId | None = None
    delivered_revision: int = 0


class Preferences(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One participant's preferences for a conversation. Conversations with the lowest `pin_order` are shown first.
    Messages from `unread_from_id` on count as unread, until the next `read`. `user_version` is that of the last change,
    as in `preferences_changed`.
    """

    pin_order: int | None = None
    is_hidden: bool = False
    is_muted: bool = False
    muted_until: datetime | None = None
    notification_level: NotificationLevel = "all"
    unread_from_id: MessageId | None = None
    user_version: int = 0


class InviteCode(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A code that lets any user join, until it expires or is used up."""

    code: str
    expires_at: datetime | None = None
    uses_left: int | None = None


class Invitation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An invitation, with what an outsider may see of the conversation. `role` is the one that the user will join with.
    `invited_by` is the user who sent the invitation. `user_version` is as in `invited`.
    """

    conversation_id: ConversationId
    type: ConversationType
    title: str | None = None
    description: str | None = None
    image: str | None = None
    participant_count: int
    role: Role
    invited_by: UserId | None = None
    user_version: int = 0


class PublicConversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation that any user can find and join."""

    conversation_id: ConversationId
    type: ConversationType
    title: str
    description: str | None = None
    image: str | None = None
    participant_count: int


class Switches(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Switches for one other user, in addition to the settings that apply to everyone."""

    can_see_online_status: bool = True
    can_send_messages: bool = True
    can_see_profile: bool = True
    notifications_enabled: bool = True


class Relationship(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A relationship between the caller and `user_id`. `is_outgoing` is true if it is the caller's. Friends have one in
    each direction. `user_version` is that of the last change, as in `relationship_changed`.
    """

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
    user_version: int = 0


class RelationshipEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A relationship, the other user if the caller may see them, and how much the two wrote to each other directly. A
    friend request shows its sender.
    """

    relationship: Relationship
    user: User | None = None
    interaction_count: int = 0
    last_interaction_at: datetime | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A report about a message, with the message's current content."""

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
    """An entry of an audit log: who did what to whom. `hash` covers the entry and `previous_hash`, the hash of the
    entry before. An entry without `actor_id` comes from the server's command line.
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
    """A conversation as one participant sees it; no other value depends on the reader.

    `version` is the conversation's: all events up to it are included. `unread_count` is at most 100. `peer_id` is the
    other user of a direct conversation. `invite` is there for participants who may add others. `last_read_revision` is
    the revision of the read position, as in `message_read`.
    """

    conversation: Conversation
    version: int
    me: Participant
    peer_id: UserId | None = None
    last_message: Message | None = None
    unread_count: int = 0
    last_read_message_id: MessageId | None = None
    last_read_revision: int = 0
    last_activity_at: datetime
    preferences: Preferences = Preferences()
    invite: InviteCode | None = None
