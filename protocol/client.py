"""What clients say: one struct for each frame, named as a command. `server/routes.py` says what each one does.

Every frame may carry `id`, a number or a short string; its reply, or its error, carries it back in `re`.
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
    # Decoded with texts as keys, whose hashes nobody can choose. `Resume` makes ids of them.
    _Key = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]
    Versions = Annotated[dict[_Key, Version], Meta(max_length=MAX_RESUMED)]


class Frame(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """What all frames of a client have in common."""

    id: FrameId | None = None


def given(frame: Frame) -> dict[str, Any]:
    """Return those of a frame's fields that may be left out to stay as they are, and were not."""
    changing = [field.name for field in msgspec.structs.fields(frame) if field.default is UNSET]
    return {name: getattr(frame, name) for name in changing if getattr(frame, name) is not UNSET}


# ------------------------------------------------------------------------------------------- the connection


class Authenticate(Frame, tag="authenticate"):
    """The first frame of a client that could not send its token as a header; within five seconds."""

    token: Token


class Resume(Frame, tag="resume", kw_only=True):
    """Ask for exactly what was missed: `versions` holds the clock of each conversation that the client has.

    `epoch` is the one from the `ready` in which these versions were learned. `user_version` is the user's own clock,
    from the last event that carried it, or else from that `ready`: with it, what changed for the user alone is said.
    Conversations that are not in `versions` are said anew, except those that this connection follows already.
    """

    epoch: Annotated[str, Meta(max_length=128)]
    user_version: Version | None = None
    versions: Versions

    def __post_init__(self) -> None:
        try:
            ids = msgspec.convert(list(self.versions), list[ConversationId])
        except msgspec.ValidationError:
            raise ValueError("The keys of `versions` must be ids of conversations") from None
        require_different_hashes(ids, "versions")
        self.versions = dict(zip(ids, self.versions.values(), strict=True))


class Ping(Frame, tag="ping"):
    """Ask whether the server is there; the reply has its time."""


# --------------------------------------------------------------------------------------------- conversations


class CreateDirect(Frame, tag="create_direct"):
    """Open the one direct conversation with a user; made if there is none."""

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
    """Make a group of the caller, its owner, and those participants who may be added without asking (docs/privacy.md).
    The others are invited.
    """

    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]


class CreateChannel(_Create, tag="create_channel"):
    """Make a channel, joined by whoever wants if public, and otherwise by invite code."""


class ListConversations(Frame, tag="list_conversations"):
    """The caller's conversations, most recently active first; all of them, or those of a kind."""

    conversation_type: ConversationType | None = None
    archived: bool | None = None
    hidden: bool | None = None
    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class GetConversation(Frame, tag="get_conversation"):
    """One conversation of the caller's."""

    conversation_id: ConversationId


class UpdateConversation(Frame, tag="update_conversation"):
    """Change the fields that are given and no others. `settings` are replaced as a whole. A `max_participants` below
    the present number removes nobody: nobody enters until there is room.
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
    """Delete a group or a channel, for everyone."""

    conversation_id: ConversationId


class FindConversations(Frame, tag="find_conversations"):
    """Public conversations whose title or description has all of these words, or beginnings of words."""

    text: Query
    limit: PageSize = DEFAULT_PAGE


class SetPreferences(Frame, tag="set_preferences"):
    """How the caller, alone, wants to have a conversation: the fields that are given change and no others."""

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
    """Join a public conversation, or one that the caller is invited to, by its id; or any by its invite code."""

    conversation_id: ConversationId | None = None
    invite_code: InviteCode | None = None

    def __post_init__(self) -> None:
        if (self.conversation_id is None) == (self.invite_code is None):
            raise ValueError("Give either `conversation_id` or `invite_code`")


class Leave(Frame, tag="leave"):
    """Leave a conversation. When its only owner leaves, the next in rank, then in age, becomes owner."""

    conversation_id: ConversationId


class AddParticipants(Frame, tag="add_participants"):
    """Add users to a group or a channel. Those who may not be added without asking (docs/privacy.md) are invited; those
    who are in it already stay as they are.
    """

    conversation_id: ConversationId
    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]
    role: Literal["admin", "moderator", "member", "guest"] = "member"


class Invite(Frame, tag="invite"):
    """Ask users to join a group or a channel; those who are in it already stay as they are. One user who may not be
    invited has the whole frame refused, and is not named.
    """

    conversation_id: ConversationId
    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]
    role: Literal["admin", "moderator", "member", "guest"] = "member"


class Decline(Frame, tag="decline"):
    """Do not follow an invitation."""

    conversation_id: ConversationId


class ListInvitations(Frame, tag="list_invitations"):
    """Where the caller is invited to and has neither joined nor declined, at most 100."""


class SetInviteCode(Frame, tag="set_invite_code"):
    """With `is_open`, make a new code, good for that long and so often; the one before opens nothing any more."""

    conversation_id: ConversationId
    is_open: bool = True
    expires_in_seconds: Seconds | None = None
    max_uses: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class RemoveParticipant(Frame, tag="remove_participant"):
    """Remove someone of a lower role, or take back their invitation; with `ban`, for good."""

    conversation_id: ConversationId
    user_id: UserId
    ban: bool = False


class SetRole(Frame, tag="set_role"):
    """Give someone of a lower role another one, below the caller's own."""

    conversation_id: ConversationId
    user_id: UserId
    role: Literal["admin", "moderator", "member", "guest"]


class Unban(Frame, tag="unban"):
    """Lift a ban: they may join again."""

    conversation_id: ConversationId
    user_id: UserId


class SetPermissions(Frame, tag="set_permissions"):
    """Give someone of a lower role permissions beyond it, or take them back; those that are not given stay."""

    conversation_id: ConversationId
    user_id: UserId
    can_add_members: bool | UnsetType = UNSET
    can_remove_members: bool | UnsetType = UNSET
    can_edit_conversation: bool | UnsetType = UNSET
    can_delete_messages: bool | UnsetType = UNSET
    can_pin_messages: bool | UnsetType = UNSET


class TransferOwnership(Frame, tag="transfer_ownership"):
    """Make another participant the owner; the caller becomes an admin."""

    conversation_id: ConversationId
    user_id: UserId


class ListParticipants(Frame, tag="list_participants"):
    """Who takes part, in the order of their ids, with how far they have read. Who is invited, has declined or is banned
    is for those who may add or remove people; the first two also for whoever sent the invitation.
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
            raise ValueError("`also_in_conversation` is for replies. Give `parent_message_id`, or leave it out")


class Send(_Say, tag="send"):
    """Send a message. `message_id` is the client's: sent again, it is answered again and stored once.

    The server finds mentions (`@name`, `<@id>`, `@everyone`, `@here`, `@moderator`) and hashtags in `content`, and
    makes safe HTML of it if `is_markdown`. With `parent_message_id` it is a reply in a thread, which stands in the
    conversation itself only if it is `also_in_conversation`.
    """


class _OfMessage(Frame):
    conversation_id: ConversationId
    message_id: MessageId


class Forward(_OfMessage, tag="forward"):
    """Send what a message says to another conversation, as the message `new_message_id`."""

    to_conversation_id: ConversationId
    new_message_id: MessageId

    def __post_init__(self) -> None:
        require_uuid7(self.new_message_id, "new_message_id")


class Edit(_OfMessage, tag="edit"):
    """Change what the caller's own message says. With an `edit_id` of its own, a repeated edit is one edit;
    without one, an edit that changes nothing is none.
    """

    content: Content
    is_markdown: bool = False
    edit_id: EditId | None = None

    def __post_init__(self) -> None:
        if self.edit_id is not None:
            require_uuid7(self.edit_id, "edit_id")


class Delete(_OfMessage, tag="delete"):
    """Delete a message: one's own, or with the permission that of anyone whose role is not higher. No frame returns its
    words afterwards. The server keeps them until its author is erased, and the author's own export holds them.
    """


class React(_OfMessage, tag="react"):
    """Put an emoji on a message: one of Unicode's, or a name between colons, such as `:shipit:`. The server stores
    emoji fully qualified (❤ as ❤️) and names in lower case. Events and `reactions` have that spelling.
    """

    emoji: Emoji

    def __post_init__(self) -> None:
        self.emoji = normalized(self.emoji)


class Unreact(_OfMessage, tag="unreact"):
    """Take back the caller's emoji from a message, in any spelling that `react` takes, or as `mine` has it. Names that
    `react` no longer takes can be taken back, too.
    """

    emoji: Emoji


class Pin(_OfMessage, tag="pin"):
    """Have a message stand out for everyone."""


class Unpin(_OfMessage, tag="unpin"):
    """No longer."""


class ListPins(Frame, tag="list_pins"):
    """What is pinned, the latest first: at most 100 messages."""

    conversation_id: ConversationId
    after: Cursor | None = None


class Star(_OfMessage, tag="star"):
    """Put a message aside, for the caller alone."""


class Unstar(_OfMessage, tag="unstar"):
    """No longer."""


class ListStars(Frame, tag="list_stars"):
    """What the caller has put aside, the latest first."""

    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class Vote(_OfMessage, tag="vote"):
    """Vote in a poll for options, by their places from 0, instead of what they voted before; none withdraws it."""

    options: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_POLL_OPTIONS)]], Meta(max_length=MAX_POLL_OPTIONS)]

    def __post_init__(self) -> None:
        if len(set(self.options)) != len(self.options):
            raise ValueError("Give each of the `options` once")


class ClosePoll(_OfMessage, tag="close_poll"):
    """End the caller's own poll, or with the permission to delete messages that of anyone whose role is not higher."""


class ListVotes(_OfMessage, tag="list_votes"):
    """Who voted for what, in the order of their ids; not in an anonymous poll."""

    after: UserId | None = None
    limit: PageSize = DEFAULT_PAGE


class History(Frame, tag="history"):
    """A page of messages, oldest first: before, after or around a message, or the newest. Replies that stand in their
    threads alone are left out unless asked for `with_replies`.
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
    """One message."""


class ListEdits(_OfMessage, tag="list_edits"):
    """What a message said before, newest first. `after` is the version at which the page before ended."""

    after: Version | None = None


class Search(Frame, tag="search"):
    """Messages with all of these words, or beginnings of words, that the caller may see. A conversation, a hashtag and
    `mentions_me` can be looked for without words, too. By `relevance`, the best of the newest 1,000 come first.
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
    """Where a message went, for its sender and for moderators: stored, published, delivered, read, and why not."""


# ------------------------------------------------------------------------------------------------- threads


class GetThread(_OfMessage, tag="get_thread"):
    """The thread that begins with a message, as the caller sees it."""


class ListReplies(_OfMessage, tag="list_replies"):
    """A page of the thread that begins with a message, oldest first: before or after a place in it, or the newest."""

    before_order: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    after_order: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    limit: PageSize = DEFAULT_PAGE

    def __post_init__(self) -> None:
        if self.before_order is not None and self.after_order is not None:
            raise ValueError("Give at most one of `before_order` and `after_order`")


class FollowThread(_OfMessage, tag="follow_thread"):
    """Be told of replies in the thread that begins with a message, as who began it or replied in it is anyway."""


class UnfollowThread(_OfMessage, tag="unfollow_thread"):
    """No longer."""


class ReadThread(_OfMessage, tag="read_thread"):
    """The thread that begins with a message has been read up to a place in it. That only moves forward."""

    thread_order: Annotated[int, Meta(ge=0, le=2**31 - 1)]


class ListThreads(Frame, tag="list_threads"):
    """The threads that the caller follows, those with the latest replies first: at most 100 of the 1,000 newest in a
    page.
    """

    is_unread: bool = False
    after: Cursor | None = None


# ------------------------------------------------------------------------------------------------- receipts


class Read(_OfMessage, tag="read"):
    """Everything up to this message has been read. The position only moves forward."""


class Delivered(_OfMessage, tag="delivered"):
    """This client has taken in everything up to this message. Say it of the newest one, every few seconds at most.
    Those who may not see the caller's presence are not told; of an invisible caller it is not kept.
    """


class MarkUnread(_OfMessage, tag="mark_unread"):
    """Have everything from this message on count as unread, for the caller alone, until they read again."""


class ListReaders(_OfMessage, tag="list_readers"):
    """Who has read a message. In a conversation of more than 100 participants only how many."""


# ---------------------------------------------------------------------------------- drafts and scheduled messages


class SetDraft(Frame, tag="set_draft"):
    """Keep what the caller has begun to write, for their other devices; empty, there is nothing any more."""

    conversation_id: ConversationId
    content: DraftContent = ""


class ListDrafts(Frame, tag="list_drafts"):
    """What the caller has begun to write, the latest first, at most 100 in a page."""

    after: Cursor | None = None


class Schedule(_Say, tag="schedule", kw_only=True):
    """Send a message at a time, at most 366 days ahead, whichever worker is there then. Said again with another time or
    other words while it waits, it is changed.
    """

    send_at: Moment

    def __post_init__(self) -> None:
        super().__post_init__()
        require_moment(self.send_at, "send_at")


class CancelScheduled(_OfMessage, tag="cancel_scheduled"):
    """Do not send it."""


class ListScheduled(Frame, tag="list_scheduled"):
    """The caller's messages that wait for their time, and those that could not be sent: the latest first, at most 100
    in a page.
    """

    after: Cursor | None = None


# -------------------------------------------------------------------------------------------- notifications


class ListFeed(Frame, tag="list_feed"):
    """What concerns the caller, the latest first: mentions, replies, reactions, requests; all, or some kinds."""

    kinds: Annotated[list[FeedKind], Meta(min_length=1, max_length=5)] | None = None
    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class SeeFeed(Frame, tag="see_feed"):
    """The caller has seen what is in the feed up to a time, or up to now."""

    up_to: Moment | None = None

    def __post_init__(self) -> None:
        require_moment(self.up_to, "up_to")


class GetBadge(Frame, tag="get_badge"):
    """How much is unread in all conversations that are neither muted nor hidden, and new in the feed."""


class GetPushKey(Frame, tag="get_push_key"):
    """The key that a browser subscribes to notifications with (VAPID, RFC 8292)."""


class RegisterPush(Frame, tag="register_push"):
    """Push notifications to a browser's endpoint, with the keys of its subscription, until this session ends.

    `p256dh` is an uncompressed point of P-256 (65 bytes), `auth` has 16 bytes; both are in base64url.
    """

    endpoint: Link
    p256dh: Annotated[str, Meta(min_length=80, max_length=100, pattern=KEY)]
    auth: Annotated[str, Meta(min_length=16, max_length=32, pattern=KEY)]


class UnregisterPush(Frame, tag="unregister_push"):
    """No longer."""

    endpoint: Link


# ------------------------------------------------------------------------------------------------ moderation


class Moderate(_OfMessage, tag="moderate"):
    """Hide a message, and say why. Its sender and moderators can still read it. Open reports of it are upheld. Nobody
    hides their own message, or that of a sender whose role is higher.
    """

    reason: Reason


class Unmoderate(_OfMessage, tag="unmoderate"):
    """Show it again. That, too, is refused for one's own message and for that of a sender whose role is higher."""


class ReportMessage(_OfMessage, tag="report"):
    """Tell the moderators what is wrong with somebody else's message. A message is reported once."""

    reason: Reason


class ListReports(Frame, tag="list_reports"):
    """What was reported in a conversation, oldest first; without one, everywhere, for server administrators. With
    `history: from_joining`, reports about messages from before the caller joined are left out. Reports about the
    caller's own messages always are.
    """

    conversation_id: ConversationId | None = None
    status: ReportStatus = "open"
    after: ReportId | None = None
    limit: PageSize = DEFAULT_PAGE


class DismissReport(Frame, tag="dismiss_report"):
    """Find nothing wrong with a message that was reported: somebody else's, whose role is not higher."""

    conversation_id: ConversationId
    report_id: ReportId


class ListAudit(Frame, tag="list_audit"):
    """Who used what power, from after an entry on; without a conversation, on the server, for its administrators. With
    `history: from_joining`, entries about messages from before the caller joined are left out.
    """

    conversation_id: ConversationId | None = None
    after: Version = 0
    limit: PageSize = DEFAULT_PAGE


# ---------------------------------------------------------------------------------------------------- people


class Typing(Frame, tag="typing"):
    """The caller is typing, or stopped. Say it again every few seconds: it fades after six."""

    conversation_id: ConversationId
    active: bool = True


class SetPresence(Frame, tag="presence"):
    """How the caller wants to be seen. `away` is this device's; the others are the user's. `offline` is
    `invisible`. Without `custom_status` that stays as it is; null takes it away, and so does its time.
    """

    status: PresenceStatus
    custom_status: CustomStatus | None | UnsetType = UNSET
    custom_status_seconds: Seconds | None = None


class _OfWatched(Frame):
    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=MAX_WATCHED)]

    def __post_init__(self) -> None:
        require_different_hashes(self.user_ids, "user_ids")


class Watch(_OfWatched, tag="watch"):
    """Be told when the presence of these users changes; the reply has it as it is now.

    A user in the reply stays watched until `unwatch`: `presence_changed` also tells when they may not be seen any more,
    as `offline`, and when they may be seen again.
    """


class Unwatch(_OfWatched, tag="unwatch"):
    """No longer."""


class GetUsers(Frame, tag="get_users"):
    """The faces of users, those that exist and may be seen."""

    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=100)]


class GetProfile(Frame, tag="get_profile"):
    """What a user tells about themselves."""

    user_id: UserId


class SearchUsers(Frame, tag="search_users"):
    """Users whose name has all of these words, or beginnings of words, and who may be seen."""

    text: Query
    limit: PageSize = DEFAULT_PAGE


class GetMe(Frame, tag="get_me"):
    """The caller as they see themselves."""


class UpdateProfile(Frame, tag="update_profile"):
    """Change the fields that are given and no others. Between `quiet_from` and `quiet_until`, times of day in
    `time_zone` (such as `Europe/London`), nothing is pushed.
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
    """Ask for friendship. If the other one asks as well, that is a yes."""

    message: Reason | None = None


class AnswerFriend(_OfUser, tag="answer_friend"):
    """Accept or reject a request."""

    accept: bool
    message: Reason | None = None


class Unfriend(_OfUser, tag="unfriend"):
    """Take back a request, or end a friendship."""


class Block(_OfUser, tag="block"):
    """Be left alone by a user, who is not told. It ends a friendship, and the caller's own request or follow. Those of
    the other one stay, without effect, so that their end does not tell of the block.
    """


class Unblock(_OfUser, tag="unblock"):
    """No longer."""


class Follow(_OfUser, tag="follow"):
    """Follow a user, who can see it."""


class Unfollow(_OfUser, tag="unfollow"):
    """No longer."""


class Mute(_OfUser, tag="mute"):
    """Do not be told when a user says something; they cannot see it."""


class Unmute(_OfUser, tag="unmute"):
    """No longer."""


class SetSwitches(_OfUser, tag="set_switches"):
    """Say what someone may see or do beyond the caller's settings. The caller must have a relationship to them."""

    can_see_online_status: bool | UnsetType = UNSET
    can_send_messages: bool | UnsetType = UNSET
    can_see_profile: bool | UnsetType = UNSET
    notifications_enabled: bool | UnsetType = UNSET


class ListRelationships(Frame, tag="list_relationships"):
    """What is between the caller and others, all of it or of a kind; blocks and mutes only who made them knows."""

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
