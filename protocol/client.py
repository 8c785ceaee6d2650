"""Frames that clients send: one struct per frame, named as a command. `server/routes.py` maps each to its handler.

Every frame may carry an `id`, which is a number or a short string. The server repeats it as `re` in the reply or error.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol.ids import (
    ConversationId,
    EditId,
    MessageId,
    RelationshipId,
    ReportId,
    UserId,
    require_different_hashes,
    require_uuid7,
)
from protocol.json_object import Json
from protocol.limits import (
    DEFAULT_PAGE,
    HASHTAG,
    KEY,
    MAX_PARTICIPANTS_NAMED,
    MAX_POLL_OPTIONS,
    MAX_RESUMED,
    MAX_WATCHED,
    Bio,
    Content,
    Cursor,
    CustomStatus,
    Description,
    DraftContent,
    Emoji,
    InviteCode,
    Link,
    Name,
    PageSize,
    PinOrder,
    Query,
    Reason,
    Seconds,
    Text,
    TimeZone,
    Title,
    Token,
    Version,
)
from protocol.moments import Moment, TimeOfDay, require_moment
from protocol.payloads import Payload
from protocol.reaction import normalized
from protocol.values import (
    ContentType,
    ConversationSettings,
    ConversationType,
    FeedKind,
    NotificationLevel,
    PresenceStatus,
    RelationshipKind,
    RelationshipStatus,
    ReportStatus,
)

FrameId = Annotated[int, Meta(ge=-(2**53), le=2**53)] | Annotated[str, Meta(max_length=64)]
MaxParticipants = Annotated[int, Meta(ge=1, le=1_000_000)]
PARTICIPANTS_NAMED = Meta(min_length=1, max_length=MAX_PARTICIPANTS_NAMED)

if TYPE_CHECKING:
    Versions = dict[ConversationId, Version]
else:
    # The keys are decoded as strings, whose hashes are salted. `Resume` converts them to ids.
    _Key = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]
    Versions = Annotated[dict[_Key, Version], Meta(max_length=MAX_RESUMED)]


class Frame(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """The base of all client frames."""

    id: FrameId | None = None


def given(frame: Frame) -> dict[str, Any]:
    """Return the optional fields that the client included in a frame. The others stay unchanged."""
    changing = [field.name for field in msgspec.structs.fields(frame) if field.default is UNSET]
    return {name: getattr(frame, name) for name in changing if getattr(frame, name) is not UNSET}


# ------------------------------------------------------------------------------------------- the connection


class Authenticate(Frame, tag="authenticate"):
    """Authenticate a connection whose client could not send its token in a header. It must be the first frame, within
    five seconds.
    """

    token: Token


class Resume(Frame, tag="resume", kw_only=True):
    """Request everything that this client missed. `versions` maps each conversation that the client holds to the last
    version that it applied.

    `epoch` is from the `ready` under which the client received these versions. `user_version` is from the last event
    that carried one, or else from that `ready`. With `user_version`, the server also sends changes that concern only
    the user. The server sends conversations that are not in `versions` in full, unless this connection already follows
    them.

    A client may name its conversations in several frames. With `is_last` false, the server sends no conversation that
    is not in `versions`, because a later frame may name it. Put `user_version` into the first one only.
    """

    epoch: Annotated[str, Meta(max_length=128)]
    user_version: Version | None = None
    versions: Versions
    is_last: bool = True

    def __post_init__(self) -> None:
        try:
            ids = msgspec.convert(list(self.versions), list[ConversationId])
        except msgspec.ValidationError:
            raise ValueError("The keys of `versions` must be conversation ids") from None
        require_different_hashes(ids, "versions")
        self.versions = dict(zip(ids, self.versions.values(), strict=True))


class Ping(Frame, tag="ping"):
    """Check that the connection works. The reply carries the server's time."""


# --------------------------------------------------------------------------------------------- conversations


class CreateDirect(Frame, tag="create_direct"):
    """Open the direct conversation with a user, and create it if there is none. Each pair of users has at most one."""

    user_id: UserId


class _Create(Frame, kw_only=True):
    conversation_id: ConversationId
    title: Title
    description: Description | None = None
    image: Link | None = None
    is_public: bool = False
    max_participants: MaxParticipants | None = None
    settings: ConversationSettings = ConversationSettings()

    def __post_init__(self) -> None:
        require_uuid7(self.conversation_id, "conversation_id")


class CreateGroup(_Create, tag="create_group", kw_only=True):
    """Create a group that the caller owns. Participants who may be added without an invitation (docs/privacy.md) are
    added; the others are invited.
    """

    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]


class CreateChannel(_Create, tag="create_channel"):
    """Create a channel. Any user may join a public channel. Users join another channel by an invite code or an
    invitation, or are added.
    """


class ListConversations(Frame, tag="list_conversations"):
    """List the caller's conversations, most recently active first. Each filter that is given narrows the list."""

    conversation_type: ConversationType | None = None
    archived: bool | None = None
    hidden: bool | None = None
    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class GetConversation(Frame, tag="get_conversation"):
    """Get one of the caller's conversations."""

    conversation_id: ConversationId


class UpdateConversation(Frame, tag="update_conversation"):
    """Update the fields that are given; the others stay unchanged. `settings` is replaced as a whole. A
    `max_participants` below the current count removes nobody, but prevents joins.
    """

    conversation_id: ConversationId
    title: Title | UnsetType = UNSET
    description: Description | None | UnsetType = UNSET
    image: Link | None | UnsetType = UNSET
    is_public: bool | UnsetType = UNSET
    is_archived: bool | UnsetType = UNSET
    max_participants: MaxParticipants | None | UnsetType = UNSET
    settings: ConversationSettings | UnsetType = UNSET


class DeleteConversation(Frame, tag="delete_conversation"):
    """Delete a group or a channel for all participants."""

    conversation_id: ConversationId


class FindConversations(Frame, tag="find_conversations"):
    """Find public conversations whose title or description contains all of these words or word prefixes."""

    text: Query
    limit: PageSize = DEFAULT_PAGE


class SetPreferences(Frame, tag="set_preferences"):
    """Set the caller's own preferences for a conversation. Fields that are left out stay unchanged."""

    conversation_id: ConversationId
    pin_order: PinOrder | None | UnsetType = UNSET
    is_hidden: bool | UnsetType = UNSET
    is_muted: bool | UnsetType = UNSET
    muted_until: Moment | None | UnsetType = UNSET
    notification_level: NotificationLevel | UnsetType = UNSET

    def __post_init__(self) -> None:
        require_moment(self.muted_until, "muted_until")


# -------------------------------------------------------------------------------------------- participants


class Join(Frame, tag="join"):
    """Join a conversation by `conversation_id` if it is public or the caller is invited, or any conversation by
    `invite_code`.
    """

    conversation_id: ConversationId | None = None
    invite_code: InviteCode | None = None

    def __post_init__(self) -> None:
        if (self.conversation_id is None) == (self.invite_code is None):
            raise ValueError("Give exactly one of `conversation_id` and `invite_code`")


class Leave(Frame, tag="leave"):
    """Leave a conversation. When the owner leaves, the participant with the highest role becomes the owner, and among
    several the one who joined first. Participants with active accounts come before all others.
    """

    conversation_id: ConversationId


class AddParticipants(Frame, tag="add_participants"):
    """Add users to a group or a channel. Users who may not be added without an invitation (docs/privacy.md) are
    invited. Current participants stay unchanged.
    """

    conversation_id: ConversationId
    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]
    role: Literal["admin", "moderator", "member", "guest"] = "member"


class Invite(Frame, tag="invite"):
    """Invite users to a group or a channel. Current participants stay unchanged. If one user may not be invited, the
    server refuses the whole frame and does not reveal which user it was.
    """

    conversation_id: ConversationId
    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]
    role: Literal["admin", "moderator", "member", "guest"] = "member"


class Decline(Frame, tag="decline"):
    """Decline an invitation."""

    conversation_id: ConversationId


class ListInvitations(Frame, tag="list_invitations"):
    """List the caller's pending invitations, at most 100."""


class SetInviteCode(Frame, tag="set_invite_code"):
    """With `is_open`, create an invite code that expires after `expires_in_seconds` or `max_uses` joins. Without
    `is_open`, the conversation has no code. In both cases, the previous code stops working.
    """

    conversation_id: ConversationId
    is_open: bool = True
    expires_in_seconds: Seconds | None = None
    max_uses: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class RemoveParticipant(Frame, tag="remove_participant"):
    """Remove a participant of a lower role, or revoke an invitation. With `ban`, the user cannot return until
    unbanned.
    """

    conversation_id: ConversationId
    user_id: UserId
    ban: bool = False


class SetRole(Frame, tag="set_role"):
    """Set the role of a participant whose role is lower than the caller's. The new role must be lower, too."""

    conversation_id: ConversationId
    user_id: UserId
    role: Literal["admin", "moderator", "member", "guest"]


class Unban(Frame, tag="unban"):
    """Lift a ban, so that the user may join again."""

    conversation_id: ConversationId
    user_id: UserId


class SetPermissions(Frame, tag="set_permissions"):
    """Grant or revoke permissions beyond the role of a participant whose role is lower than the caller's. Fields that
    are left out stay unchanged.
    """

    conversation_id: ConversationId
    user_id: UserId
    can_add_members: bool | UnsetType = UNSET
    can_remove_members: bool | UnsetType = UNSET
    can_edit_conversation: bool | UnsetType = UNSET
    can_delete_messages: bool | UnsetType = UNSET
    can_pin_messages: bool | UnsetType = UNSET


class TransferOwnership(Frame, tag="transfer_ownership"):
    """Make another participant the owner. The caller becomes an admin."""

    conversation_id: ConversationId
    user_id: UserId


class ListParticipants(Frame, tag="list_participants"):
    """List participants by id, with their read positions. Only users who may add or remove participants see the
    statuses `invited`, `declined` and `banned`. Inviters see `invited` and `declined` for the users whom they invited.
    """

    conversation_id: ConversationId
    status: Literal["active", "invited", "declined", "banned"] = "active"
    after: UserId | None = None
    limit: PageSize = DEFAULT_PAGE


# -------------------------------------------------------------------------------------------------- messages


class _Say(Frame):
    conversation_id: ConversationId
    message_id: MessageId
    content: Content
    is_markdown: bool = False
    payload: Payload | None = None
    parent_message_id: MessageId | None = None
    also_in_conversation: bool = False
    quoted_message_id: MessageId | None = None
    metadata: Json | None = None

    def __post_init__(self) -> None:
        require_uuid7(self.message_id, "message_id")
        if self.also_in_conversation and self.parent_message_id is None:
            raise ValueError("`also_in_conversation` requires `parent_message_id`. Give both or neither")


class Send(_Say, tag="send"):
    """Send a message. The client makes `message_id`; a repeated `send` with the same id gets the same reply, and the
    message is stored once.

    The server finds mentions (`@name`, `<@id>`, `@everyone`, `@here`, `@moderator`) and hashtags in `content`. With
    `is_markdown`, it also renders `content` as safe HTML. With `parent_message_id`, the message is a reply in a thread.
    A reply appears in the conversation itself only with `also_in_conversation`.
    """


class _OfMessage(Frame):
    conversation_id: ConversationId
    message_id: MessageId


class Forward(_OfMessage, tag="forward"):
    """Send a copy of a message to another conversation, as a new message with the id `new_message_id`."""

    to_conversation_id: ConversationId
    new_message_id: MessageId

    def __post_init__(self) -> None:
        require_uuid7(self.new_message_id, "new_message_id")


class Edit(_OfMessage, tag="edit"):
    """Edit the caller's own message. With `edit_id`, a repeated frame counts as one edit. Without it, an edit that
    changes nothing is ignored.
    """

    content: Content
    is_markdown: bool = False
    edit_id: EditId | None = None

    def __post_init__(self) -> None:
        if self.edit_id is not None:
            require_uuid7(self.edit_id, "edit_id")


class Delete(_OfMessage, tag="delete"):
    """Delete the caller's own message, or, with the permission, a message whose sender has no higher role. No frame
    returns the content of a deleted message. The server keeps it until the author is erased, and includes it in the
    author's export.
    """


class React(_OfMessage, tag="react"):
    """Add a reaction to a message: a Unicode emoji, or a name between colons, such as `:shipit:`. The server stores
    emoji fully qualified (❤ as ❤️) and names in lower case. Events and `reactions` use that spelling.
    """

    emoji: Emoji

    def __post_init__(self) -> None:
        self.emoji = normalized(self.emoji)


class Unreact(_OfMessage, tag="unreact"):
    """Remove the caller's reaction from a message. `emoji` may have any spelling that `react` accepts, or the one in
    `mine`. Names that `react` no longer accepts can be removed, too.
    """

    emoji: Emoji


class Pin(_OfMessage, tag="pin"):
    """Pin a message for all participants."""


class Unpin(_OfMessage, tag="unpin"):
    """Unpin a message."""


class ListPins(Frame, tag="list_pins"):
    """List the pinned messages, most recently pinned first, at most 100."""

    conversation_id: ConversationId
    after: Cursor | None = None


class Star(_OfMessage, tag="star"):
    """Star a message. Only the caller sees the star."""


class Unstar(_OfMessage, tag="unstar"):
    """Remove the star from a message."""


class ListStars(Frame, tag="list_stars"):
    """List the messages that the caller starred, most recently starred first."""

    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class Vote(_OfMessage, tag="vote"):
    """Vote in a poll. `options` holds the indexes of the chosen options, from 0, and replaces the caller's previous
    vote. An empty list withdraws the vote.
    """

    options: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_POLL_OPTIONS)]], Meta(max_length=MAX_POLL_OPTIONS)]

    def __post_init__(self) -> None:
        if len(set(self.options)) != len(self.options):
            raise ValueError("`options` must not repeat an index")


class ClosePoll(_OfMessage, tag="close_poll"):
    """Close the caller's own poll, or, with the permission to delete messages, a poll whose sender has no
    higher role.
    """


class ListVotes(_OfMessage, tag="list_votes"):
    """List who voted for which options, by user id. Refused for anonymous polls."""

    after: UserId | None = None
    limit: PageSize = DEFAULT_PAGE


class History(Frame, tag="history"):
    """Get a page of messages, oldest first: before, after or around a message, or the newest page. Replies that appear
    only in their thread are included only with `with_replies`.
    """

    conversation_id: ConversationId
    before: MessageId | None = None
    after: MessageId | None = None
    around: MessageId | None = None
    with_replies: bool = False
    limit: PageSize = DEFAULT_PAGE

    def __post_init__(self) -> None:
        if sum(anchor is not None for anchor in (self.before, self.after, self.around)) > 1:
            raise ValueError("Give at most one of `before`, `after` and `around`")


class GetMessage(_OfMessage, tag="get_message"):
    """Get one message."""


class ListEdits(_OfMessage, tag="list_edits"):
    """List the earlier contents of a message, newest first. `after` is the version at which the previous page ended."""

    after: Version | None = None


class Search(Frame, tag="search"):
    """Search the messages that the caller may see, by words or word prefixes that must all match. `text` may be left
    out with a `conversation_id`, a `hashtag` or `mentions_me`. The order `relevance` ranks the newest 1,000 matches.
    """

    text: Query | None = None
    conversation_id: ConversationId | None = None
    sender_id: UserId | None = None
    content_type: ContentType | None = None
    sent_before: Moment | None = None
    sent_after: Moment | None = None
    hashtag: Annotated[str, Meta(min_length=1, max_length=100, pattern=HASHTAG)] | None = None
    has_file: bool = False
    in_thread: MessageId | None = None
    mentions_me: bool = False
    is_pinned: bool = False
    order: Literal["newest", "relevance"] = "newest"
    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE

    def __post_init__(self) -> None:
        require_moment(self.sent_before, "sent_before")
        require_moment(self.sent_after, "sent_after")


class Why(_OfMessage, tag="why"):
    """Trace a message, as its sender or a moderator: when it was stored and published, and what each recipient's state
    is.
    """


# ------------------------------------------------------------------------------------------------- threads


class GetThread(_OfMessage, tag="get_thread"):
    """Get the thread that starts with a message, as the caller sees it."""


class ListReplies(_OfMessage, tag="list_replies"):
    """Get a page of replies in the thread that starts with a message, oldest first. The page is before or after a
    `thread_order`, or the newest one.
    """

    before_order: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    after_order: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    limit: PageSize = DEFAULT_PAGE

    def __post_init__(self) -> None:
        if self.before_order is not None and self.after_order is not None:
            raise ValueError("Give at most one of `before_order` and `after_order`")


class FollowThread(_OfMessage, tag="follow_thread"):
    """Follow the thread that starts with a message, to be notified of replies. Its author and everyone who replied
    follow it by default.
    """


class UnfollowThread(_OfMessage, tag="unfollow_thread"):
    """Stop following a thread."""


class ReadThread(_OfMessage, tag="read_thread"):
    """Mark the replies of a thread as read, up to a `thread_order`. The position only moves forward."""

    thread_order: Annotated[int, Meta(ge=0, le=2**31 - 1)]


class ListThreads(Frame, tag="list_threads"):
    """List the threads that the caller follows, most recently replied to first. A page has at most 100 threads; only
    the newest 1,000 are listed.
    """

    is_unread: bool = False
    after: Cursor | None = None


# ------------------------------------------------------------------------------------------------- receipts


class Read(_OfMessage, tag="read"):
    """Mark everything up to a message as read. The position only moves forward."""


class Delivered(_OfMessage, tag="delivered"):
    """Confirm that this client has received everything up to a message. Send it for the newest message only, and at
    most every few seconds. Users who may not see the caller's presence are not notified. Nothing is stored for an
    invisible caller.
    """


class MarkUnread(_OfMessage, tag="mark_unread"):
    """Count everything from a message on as unread, for the caller only, until the next `read`."""


class ListReaders(_OfMessage, tag="list_readers"):
    """List the users who have read a message. In a conversation of more than 100 participants, the reply has only the
    counts.
    """


# ---------------------------------------------------------------------------------- drafts and scheduled messages


class SetDraft(Frame, tag="set_draft"):
    """Store the caller's unfinished message, for their other devices. An empty `content` deletes the draft."""

    conversation_id: ConversationId
    content: DraftContent = ""


class ListDrafts(Frame, tag="list_drafts"):
    """List the caller's drafts, most recently changed first, at most 100 per page."""

    after: Cursor | None = None


class Schedule(_Say, tag="schedule", kw_only=True):
    """Schedule a message for a time at most 366 days ahead. Repeating the frame with another time or content changes
    the scheduled message while it waits.
    """

    send_at: Moment

    def __post_init__(self) -> None:
        super().__post_init__()
        require_moment(self.send_at, "send_at")


class CancelScheduled(_OfMessage, tag="cancel_scheduled"):
    """Cancel a scheduled message."""


class ListScheduled(Frame, tag="list_scheduled"):
    """List the caller's scheduled messages that wait or failed, latest first, at most 100 per page."""

    after: Cursor | None = None


# -------------------------------------------------------------------------------------------- notifications


class ListFeed(Frame, tag="list_feed"):
    """List notifications for the caller, newest first: mentions, replies, reactions, friend requests and invitations.
    With `kinds`, only those kinds.
    """

    kinds: Annotated[list[FeedKind], Meta(min_length=1, max_length=5)] | None = None
    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class SeeFeed(Frame, tag="see_feed"):
    """Mark the feed as seen, up to a time or up to now."""

    up_to: Moment | None = None

    def __post_init__(self) -> None:
        require_moment(self.up_to, "up_to")


class GetBadge(Frame, tag="get_badge"):
    """Count the unread messages of all conversations that are neither muted nor hidden, and the unseen entries of the
    feed.
    """


class GetPushKey(Frame, tag="get_push_key"):
    """Get the server's VAPID key (RFC 8292), which a browser needs to subscribe to push notifications."""


class RegisterPush(Frame, tag="register_push"):
    """Send push notifications to a browser's endpoint until this session ends. The keys are those of the browser's
    subscription.

    `p256dh` is an uncompressed P-256 point (65 bytes) and `auth` is 16 bytes long. Both are base64url.
    """

    endpoint: Link
    p256dh: Annotated[str, Meta(min_length=80, max_length=100, pattern=KEY)]
    auth: Annotated[str, Meta(min_length=16, max_length=32, pattern=KEY)]


class UnregisterPush(Frame, tag="unregister_push"):
    """Stop sending push notifications to an endpoint."""

    endpoint: Link


# ------------------------------------------------------------------------------------------------ moderation


class Moderate(_OfMessage, tag="moderate"):
    """Hide a message, with a reason. Its sender and moderators can still read it. Open reports about the message are
    upheld. Callers cannot hide their own messages, or those of a sender with a higher role.
    """

    reason: Reason


class Unmoderate(_OfMessage, tag="unmoderate"):
    """Show a hidden message again. Callers cannot do this for their own messages, or those of a sender with a higher
    role.
    """


class ReportMessage(_OfMessage, tag="report"):
    """Report another user's message to the moderators. Each user can report a message once."""

    reason: Reason


class ListReports(Frame, tag="list_reports"):
    """List reports of a conversation, oldest first. Without `conversation_id`, list those of all conversations, for
    server administrators. With `history: from_joining`, reports about messages from before the caller joined are left
    out. Reports about the caller's own messages are always left out.
    """

    conversation_id: ConversationId | None = None
    status: ReportStatus = "open"
    after: ReportId | None = None
    limit: PageSize = DEFAULT_PAGE


class DismissReport(Frame, tag="dismiss_report"):
    """Dismiss a report. The reported message must be another user's, whose role is not higher than the caller's."""

    conversation_id: ConversationId
    report_id: ReportId


class ListAudit(Frame, tag="list_audit"):
    """List entries of a conversation's audit log, after an entry number. Without `conversation_id`, list those of the
    server, for server administrators. With `history: from_joining`, entries about messages from before the caller
    joined are left out.
    """

    conversation_id: ConversationId | None = None
    after: Version = 0
    limit: PageSize = DEFAULT_PAGE


# ---------------------------------------------------------------------------------------------------- people


class Typing(Frame, tag="typing"):
    """Announce that the caller is typing, or has stopped. Repeat it every few seconds, because it expires after six."""

    conversation_id: ConversationId
    active: bool = True


class SetPresence(Frame, tag="presence"):
    """Set how others see the caller. `away` applies to this device, and the other values to the user. `offline` means
    the same as `invisible`. `custom_status` stays unchanged if left out, and null deletes it. It also expires after
    `custom_status_seconds`.
    """

    status: PresenceStatus
    custom_status: CustomStatus | None | UnsetType = UNSET
    custom_status_seconds: Seconds | None = None


class _OfWatched(Frame):
    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=MAX_WATCHED)]

    def __post_init__(self) -> None:
        require_different_hashes(self.user_ids, "user_ids")


class Watch(_OfWatched, tag="watch"):
    """Subscribe to the presence of users. The reply has their current presence.

    A user in the reply stays watched until `unwatch`. `presence_changed` with `offline` also reports that the caller
    may no longer see a user. Another one follows when the caller may see them again.
    """


class Unwatch(_OfWatched, tag="unwatch"):
    """Unsubscribe from the presence of users."""


class GetUsers(Frame, tag="get_users"):
    """Get users by id. Users who do not exist or may not be seen are left out."""

    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=100)]


class GetProfile(Frame, tag="get_profile"):
    """Get a user's profile."""

    user_id: UserId


class SearchUsers(Frame, tag="search_users"):
    """Find users whose name contains all of these words or word prefixes, among those whom the caller may see."""

    text: Query
    limit: PageSize = DEFAULT_PAGE


class GetMe(Frame, tag="get_me"):
    """Get the caller's own profile and settings."""


class UpdateProfile(Frame, tag="update_profile"):
    """Update the fields that are given; the others stay unchanged. Nothing is pushed between `quiet_from` and
    `quiet_until`, which are times of day in `time_zone` (such as `Europe/London`).
    """

    name: Name | UnsetType = UNSET
    display_name: Name | None | UnsetType = UNSET
    image: Link | None | UnsetType = UNSET
    bio: Bio | None | UnsetType = UNSET
    location: Text | None | UnsetType = UNSET
    website: Link | None | UnsetType = UNSET
    is_private: bool | UnsetType = UNSET
    allow_friend_requests: bool | UnsetType = UNSET
    show_online_status: bool | UnsetType = UNSET
    allow_adding: bool | UnsetType = UNSET
    quiet_from: TimeOfDay | None | UnsetType = UNSET
    quiet_until: TimeOfDay | None | UnsetType = UNSET
    time_zone: TimeZone | UnsetType = UNSET


# --------------------------------------------------------------------------------------------- relationships


class _OfUser(Frame):
    user_id: UserId


class RequestFriend(_OfUser, tag="request_friend"):
    """Request a friendship. If the other user has requested one, too, this accepts it."""

    message: Reason | None = None


class AnswerFriend(_OfUser, tag="answer_friend"):
    """Accept or reject a friend request."""

    accept: bool
    message: Reason | None = None


class Unfriend(_OfUser, tag="unfriend"):
    """Withdraw a friend request, or end a friendship."""


class Block(_OfUser, tag="block"):
    """Block a user, who is not notified. A friendship, and the caller's own request or follow, end. The other user's
    request or follow stays without effect, so that its end does not reveal the block.
    """


class Unblock(_OfUser, tag="unblock"):
    """Unblock a user."""


class Follow(_OfUser, tag="follow"):
    """Follow a user, who can see it."""


class Unfollow(_OfUser, tag="unfollow"):
    """Stop following a user."""


class Mute(_OfUser, tag="mute"):
    """Mute a user: the caller gets no notifications of their messages. The user cannot see it."""


class Unmute(_OfUser, tag="unmute"):
    """Unmute a user."""


class SetSwitches(_OfUser, tag="set_switches"):
    """Set what one user may see or do beyond the caller's settings. The caller must have a relationship to that
    user.
    """

    can_see_online_status: bool | UnsetType = UNSET
    can_send_messages: bool | UnsetType = UNSET
    can_see_profile: bool | UnsetType = UNSET
    notifications_enabled: bool | UnsetType = UNSET


class ListRelationships(Frame, tag="list_relationships"):
    """List the caller's relationships to other users; each filter that is given narrows the list. Blocks and mutes
    appear only for the user who made them.
    """

    kind: RelationshipKind | None = None
    is_outgoing: bool | None = None
    status: RelationshipStatus | None = None
    after: RelationshipId | None = None
    limit: PageSize = DEFAULT_PAGE


ClientFrame = (
    Authenticate
    | Resume
    | Ping
    | CreateDirect
    | CreateGroup
    | CreateChannel
    | ListConversations
    | GetConversation
    | UpdateConversation
    | DeleteConversation
    | FindConversations
    | SetPreferences
    | Join
    | Leave
    | AddParticipants
    | Invite
    | Decline
    | ListInvitations
    | SetInviteCode
    | RemoveParticipant
    | Unban
    | SetRole
    | SetPermissions
    | TransferOwnership
    | ListParticipants
    | Send
    | Forward
    | Edit
    | Delete
    | React
    | Unreact
    | Pin
    | Unpin
    | ListPins
    | Star
    | Unstar
    | ListStars
    | Vote
    | ClosePoll
    | ListVotes
    | History
    | GetMessage
    | ListEdits
    | Search
    | Why
    | GetThread
    | ListReplies
    | FollowThread
    | UnfollowThread
    | ReadThread
    | ListThreads
    | Read
    | Delivered
    | MarkUnread
    | ListReaders
    | SetDraft
    | ListDrafts
    | Schedule
    | CancelScheduled
    | ListScheduled
    | ListFeed
    | SeeFeed
    | GetBadge
    | GetPushKey
    | RegisterPush
    | UnregisterPush
    | Moderate
    | Unmoderate
    | ReportMessage
    | ListReports
    | DismissReport
    | ListAudit
    | Typing
    | SetPresence
    | Watch
    | Unwatch
    | GetUsers
    | GetProfile
    | SearchUsers
    | GetMe
    | UpdateProfile
    | RequestFriend
    | AnswerFriend
    | Unfriend
    | Block
    | Unblock
    | Follow
    | Unfollow
    | Mute
    | Unmute
    | SetSwitches
    | ListRelationships
)
