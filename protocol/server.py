"""Frames that the server sends: replies, events of conversations and users, and frames about the connection.

A durable event carries the `version` of its conversation and the new state of the object that changed. A client applies
it by replacing its copy. Each event advances the client's position in the conversation by one. `changes` advances it
from `since` to `version`.
"""

from datetime import datetime
from typing import Literal

import msgspec

from protocol.client import FrameId
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, RelationshipId, ReportId, SessionId, UserId
from protocol.limits import Limits
from protocol.values import (
    AuditEntry,
    Conversation,
    ConversationView,
    Draft,
    FeedEntry,
    Invitation,
    Me,
    Message,
    MessageEdit,
    Participant,
    PollVote,
    Preferences,
    Presence,
    Profile,
    PublicConversation,
    Reader,
    Receipt,
    Recipient,
    Relationship,
    RelationshipEntry,
    Report,
    Scheduled,
    SearchHit,
    StarredMessage,
    ThreadFollow,
    ThreadView,
    User,
)


class _Tagged(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """The base of all frames and results; `type` names each."""


# ----------------------------------------------------------------------------------------- durable events


class _Event(_Tagged, frozen=True, kw_only=True):
    conversation_id: ConversationId
    version: int


class MessageSent(_Event, tag="message_sent", frozen=True, kw_only=True):
    """A message was sent. If it is a reply, `root_reply_count` is the new reply count of the thread's root."""

    message: Message
    root_reply_count: int | None = None


class MessageEdited(_Event, tag="message_edited", frozen=True, kw_only=True):
    """A message was edited, hidden by a moderator, or shown again. `message` is its new state."""

    message: Message


class MessageDeleted(_Event, tag="message_deleted", frozen=True, kw_only=True):
    """A message was deleted. `message` is what remains of it; `root_reply_count` is as in `message_sent`."""

    message: Message
    root_reply_count: int | None = None


class MessageReacted(_Event, tag="message_reacted", frozen=True, kw_only=True):
    """A user added a reaction. `count` is how many users now have this emoji on the message."""

    message_id: MessageId
    user_id: UserId
    emoji: str
    count: int


class MessageUnreacted(_Event, tag="message_unreacted", frozen=True, kw_only=True):
    """A user removed a reaction. `count` is how many users still have this emoji on the message."""

    message_id: MessageId
    user_id: UserId
    emoji: str
    count: int


class PollVoted(_Event, tag="poll_voted", frozen=True, kw_only=True):
    """A user voted in a poll, or changed their vote. `poll_counts` and `poll_voters` are the new totals. An anonymous
    poll has no `user_id` and `options`.
    """

    message_id: MessageId
    poll_counts: list[int]
    poll_voters: int
    user_id: UserId | None = None
    options: list[int] | None = None


class MessageChanged(_Event, tag="message_changed", frozen=True, kw_only=True):
    """A message changed that some participants may not see, because they joined later. Request it with
    `get_message`.
    """

    message_id: MessageId


class ConversationUpdated(_Event, tag="conversation_updated", frozen=True, kw_only=True):
    """The conversation was created or deleted, or its settings changed."""

    conversation: Conversation


class ParticipantChanged(_Event, tag="participant_changed", frozen=True, kw_only=True):
    """A participant joined, was added, or has a new role or new permissions."""

    participant: Participant
    participant_count: int


class ParticipantLeft(_Event, tag="participant_left", frozen=True, kw_only=True):
    """A participant left or was removed or banned; the event does not reveal which."""

    user_id: UserId
    participant_count: int


class OutsidersChanged(_Event, tag="outsiders_changed", frozen=True, kw_only=True):
    """Invitations, declined invitations or bans changed. Clients whose user may see them request
    `list_participants`.
    """


DurableEvent = (
    MessageSent
    | MessageEdited
    | MessageDeleted
    | MessageReacted
    | MessageUnreacted
    | PollVoted
    | MessageChanged
    | ConversationUpdated
    | ParticipantChanged
    | ParticipantLeft
    | OutsidersChanged
)

# ------------------------------------------------------------------------------ durable, and for one user alone


class _OwnEvent(_Tagged, frozen=True, kw_only=True):
    """A change of one of the user's own rows. Its object carries the same `user_version`, and does so in replies and
    views, too. These may be older than an event that arrived before them; the higher `user_version` is later.
    """

    user_version: int


class MeChanged(_OwnEvent, tag="me_changed", frozen=True, kw_only=True):
    """The user's own profile or settings changed, perhaps on another device."""

    me: Me


class RelationshipChanged(_OwnEvent, tag="relationship_changed", frozen=True, kw_only=True):
    """A relationship of the user changed, for example by a request, an acceptance or a block."""

    relationship: Relationship


class Invited(_OwnEvent, tag="invited", frozen=True, kw_only=True):
    """The user was invited to a conversation."""

    invitation: Invitation


class InvitationEnded(_OwnEvent, tag="invitation_ended", frozen=True, kw_only=True):
    """An invitation was revoked, or declined on another device."""

    conversation_id: ConversationId


class PreferencesChanged(_OwnEvent, tag="preferences_changed", frozen=True, kw_only=True):
    """The user's preferences for a conversation changed, perhaps on another device."""

    conversation_id: ConversationId
    preferences: Preferences


class StarChanged(_OwnEvent, tag="star_changed", frozen=True, kw_only=True):
    """The user starred or unstarred a message."""

    star: StarredMessage


class DraftChanged(_OwnEvent, tag="draft_changed", frozen=True, kw_only=True):
    """A draft of the user changed."""

    draft: Draft


class ScheduledChanged(_OwnEvent, tag="scheduled_changed", frozen=True, kw_only=True):
    """A scheduled message was created, changed, sent or cancelled, or it failed."""

    scheduled: Scheduled


class ThreadFollowChanged(_OwnEvent, tag="thread_follow_changed", frozen=True, kw_only=True):
    """The user followed or unfollowed a thread, or read further in it."""

    follow: ThreadFollow


OwnStartOverReason = Literal["forgotten", "ahead_of_server", "other_epoch"]


class OwnStartOver(_OwnEvent, tag="own_start_over", frozen=True, kw_only=True):
    """The server cannot name all own rows that the client must delete. Delete all relationships, invitations, stars,
    drafts, scheduled messages and followed threads. The current ones follow as events. `user_version` is 0.

    Unless `reason` is `forgotten`, also request `get_me`, and the `preferences` of conversations that did not start
    over.
    """

    reason: OwnStartOverReason


OwnEvent = (
    MeChanged
    | RelationshipChanged
    | Invited
    | InvitationEnded
    | PreferencesChanged
    | StarChanged
    | DraftChanged
    | ScheduledChanged
    | ThreadFollowChanged
    | OwnStartOver
)
"""Events for one user, in the order of `user_version`. Each carries the current state of its object."""

# ------------------------------------------------------------------------------------------- states, latest wins


class _State(_Tagged, frozen=True, kw_only=True):
    """The current state of a subject. Of two events with the same `type` and `subject`, the one with the higher
    `revision` is later, whichever arrives first.
    """


class _Position(_State, frozen=True, kw_only=True):
    conversation_id: ConversationId
    user_id: UserId
    message_id: MessageId
    revision: int = 0

    @property
    def subject(self) -> tuple[ConversationId | UserId, ...]:
        """Whose position it is, and in which conversation."""
        return self.conversation_id, self.user_id


class MessageRead(_Position, tag="message_read", frozen=True, kw_only=True):
    """A participant has read everything up to a message. `revision` is the message's `sent_version`. In a large
    conversation, only the reader's own devices receive this.
    """


class MessageDelivered(_Position, tag="message_delivered", frozen=True, kw_only=True):
    """A client of a participant has received everything up to a message. `revision` is the message's `sent_version`.
    Not sent in a large conversation.
    """


class PresenceChanged(_State, tag="presence_changed", frozen=True, kw_only=True):
    """The presence of a watched user changed."""

    presence: Presence

    @property
    def subject(self) -> tuple[ConversationId | UserId, ...]:
        """Whose presence it is."""
        return (self.presence.user_id,)

    @property
    def revision(self) -> int:
        """The revision of the presence."""
        return self.presence.revision


class UserUpdated(_State, tag="user_updated", frozen=True, kw_only=True):
    """The name or picture of a watched user changed."""

    user: User

    @property
    def subject(self) -> tuple[ConversationId | UserId, ...]:
        """Whose name and picture these are."""
        return (self.user.id,)

    @property
    def revision(self) -> int:
        """The revision of the name and picture."""
        return self.user.revision


StateEvent = MessageRead | MessageDelivered | PresenceChanged | UserUpdated
"""Events without a place in the order of a conversation or a user. Each carries the whole state, and its `revision`, at
the top or in the object that it contains.
"""

# ----------------------------------------------------------------------------------------------- states that expire


class TypingStarted(_Tagged, tag="typing_started", frozen=True, kw_only=True):
    """A participant is typing. The state expires after `fades_after_ms` unless the event is repeated."""

    conversation_id: ConversationId
    user_id: UserId
    fades_after_ms: int = 6_000


class TypingStopped(_Tagged, tag="typing_stopped", frozen=True, kw_only=True):
    """A participant stopped typing."""

    conversation_id: ConversationId
    user_id: UserId


TypingEvent = TypingStarted | TypingStopped
"""Events about a state that expires by itself, so they have no number. If those of two devices arrive in the wrong
order, the state is wrong until it expires.
"""


# --------------------------------------------------------------------------- what is said about the connection


class Ready(_Tagged, tag="ready", frozen=True, kw_only=True):
    """The connection is authenticated. Store `epoch` with the versions that you receive from now on. Changes that
    concern only the user and are later than `user_version` follow as events.
    """

    protocol: int
    user: User
    user_version: int
    session_id: SessionId
    epoch: str
    server_time: datetime
    heartbeat_ms: int
    limits: Limits


class Conversations(_Tagged, tag="conversations", frozen=True, kw_only=True):
    """A page of the user's conversations, after `ready`. `is_last` marks the last page."""

    conversations: list[ConversationView]
    is_last: bool


class ConversationJoined(_Tagged, tag="conversation_joined", frozen=True, kw_only=True):
    """The user now takes part in a conversation. Its events follow."""

    view: ConversationView


class ConversationLeft(_Tagged, tag="conversation_left", frozen=True, kw_only=True):
    """The user no longer takes part in a conversation. No more events of it follow."""

    conversation_id: ConversationId


class Changes(_Tagged, tag="changes", frozen=True, kw_only=True):
    """The changes of a conversation after `since`, up to `version`, in order. The events carry the current state of
    each object that changed. Set the position to `version` afterwards.

    `receipts` are the read positions, in conversations that share them. `last_read_revision` is that of the user's own
    position, as in `message_read`. Changes that exceed one frame come in several: each starts where the previous one
    ended.

    With `is_partial`, which only large conversations have, changes of other participants are left out. The last
    `participant_changed` or `participant_left` has the current `participant_count`. To show the participants, request
    `list_participants` again.
    """

    conversation_id: ConversationId
    since: int
    version: int
    events: list[DurableEvent]
    is_partial: bool = False
    receipts: list[Receipt] = []
    unread_count: int | None = None
    last_read_message_id: MessageId | None = None
    last_read_revision: int = 0


StartOverReason = Literal["too_many_changes", "ahead_of_server", "other_epoch"]


class StartOver(_Tagged, tag="start_over", frozen=True, kw_only=True):
    """The client's version is too old or invalid. Delete this conversation's messages and start with `view`."""

    view: ConversationView
    reason: StartOverReason


class Heartbeat(_Tagged, tag="heartbeat", frozen=True, kw_only=True):
    """The connection works. `versions` holds the versions of conversations that were active since the last heartbeat. A
    client that is behind one of them has missed an event and should `resume`.
    """

    server_time: datetime
    versions: dict[ConversationId, int] = {}


class GoingAway(_Tagged, tag="going_away", frozen=True, kw_only=True):
    """The server is about to close this connection with 1012. Reconnect to any server after `reconnect_after_ms`, which
    differs between clients. `ticket` replaces the token once, within a minute.
    """

    reconnect_after_ms: int
    ticket: str | None = None


# --------------------------------------------------------------------------------------------------- results


class Done(_Tagged, tag="done", frozen=True, kw_only=True):
    """The frame succeeded, or its effect was already in place."""


class Pong(_Tagged, tag="pong", frozen=True, kw_only=True):
    """The reply to `ping`."""

    server_time: datetime


class Resumed(_Tagged, tag="resumed", frozen=True, kw_only=True):
    """All missed events were sent, and live events follow. `read_positions` are the user's own, and `read_revisions`
    their revisions, as in `message_read`. After a `resume` with `is_last` false, all of this is about the conversations
    in its `versions`. `conversations` is the number of all. Use `user_version` in the next `resume`, unless a later
    event carries a higher one.
    """

    conversations: int
    user_version: int = 0
    read_positions: dict[ConversationId, MessageId] = {}
    read_revisions: dict[ConversationId, int] = {}


class Sent(_Tagged, tag="sent", frozen=True, kw_only=True):
    """The message is stored durably, with this version."""

    conversation_id: ConversationId
    message_id: MessageId
    version: int
    created_at: datetime


class Changed(_Tagged, tag="changed", frozen=True, kw_only=True):
    """The change is stored. `version` is that of the change, or an earlier one if nothing had to change."""

    conversation_id: ConversationId
    version: int


class ReadUpTo(_Tagged, tag="read_up_to", frozen=True, kw_only=True):
    """The read position. It may be later than the requested one, because it only moves forward. `unread_count` counts
    messages up to the conversation's `version`.

    `revision` is that of the position, as in `message_read`. The reply to `mark_unread` has none, because `message_id`
    is the mark. `mark_version` is the user version of the mark, or of its removal. Ignore that if you have a
    `preferences_changed` of the conversation with a higher `user_version`.
    """

    conversation_id: ConversationId
    message_id: MessageId
    unread_count: int
    version: int = 0
    revision: int = 0
    mark_version: int = 0


class OneConversation(_Tagged, tag="conversation", frozen=True, kw_only=True):
    """A conversation as the caller sees it. In the reply to `create_group`, `added` and `invited` list the named users
    by outcome. A repeated `create_group` lists only users whose participation the caller may see now.
    """

    view: ConversationView
    added: list[UserId] = []
    invited: list[UserId] = []


class Added(_Tagged, tag="added", frozen=True, kw_only=True):
    """The named users by outcome: `added` or `invited`."""

    added: list[UserId] = []
    invited: list[UserId] = []


class ConversationPage(_Tagged, tag="conversation_page", frozen=True, kw_only=True):
    """A page of the caller's conversations. `after` requests the next page, if there is one."""

    conversations: list[ConversationView]
    after: str | None = None


class ParticipantEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A participant and their read position, with its revision as in `message_read`. `user` is there for active
    participants. For invited and banned users, it is there if the caller may see it elsewhere.
    """

    participant: Participant
    user: User | None = None
    last_read_message_id: MessageId | None = None
    last_read_revision: int = 0


class ParticipantPage(_Tagged, tag="participant_page", frozen=True, kw_only=True):
    """A page of participants. `after` requests the next page, if there is one."""

    participants: list[ParticipantEntry]
    after: UserId | None = None


class MessageList(_Tagged, tag="message_list", frozen=True, kw_only=True):
    """Pinned or starred messages, latest first. `withheld` holds the content that moderators have hidden, if the caller
    may read it. `after` requests the next page, if there is one.

    Pinned messages are as of the conversation's `version`. `star_versions` are the user versions of the caller's stars,
    as in `star_changed`.
    """

    messages: list[Message]
    version: int = 0
    star_versions: dict[MessageId, int] = {}
    withheld: dict[MessageId, str] = {}
    after: str | None = None


class MessagePage(_Tagged, tag="message_page", frozen=True, kw_only=True):
    """A page of messages, oldest first, as of the conversation's `version`. `mine` holds the caller's reactions, and
    `votes` the caller's votes. `withheld` holds the content that moderators have hidden, if the caller may read it.

    A client may have ignored events of messages that it did not have yet. It must apply those after `version` again.
    """

    version: int
    messages: list[Message]
    has_before: bool
    has_after: bool
    mine: dict[MessageId, list[str]] = {}
    votes: dict[MessageId, list[int]] = {}
    withheld: dict[MessageId, str] = {}


class OneMessage(_Tagged, tag="message", frozen=True, kw_only=True):
    """A message as of the conversation's `version`. `mine` holds the caller's reactions, `vote` the caller's vote, and
    `read_by` how many others have read it, as in `readers`. `withheld` holds the content that a moderator has hidden,
    if the caller may read it.
    """

    version: int = 0
    message: Message
    withheld: str | None = None
    mine: list[str] = []
    vote: list[int] = []
    read_by: int = 0


class EditPage(_Tagged, tag="edit_page", frozen=True, kw_only=True):
    """A page of earlier contents of a message, newest first. `after` requests the next page, if there is one."""

    edits: list[MessageEdit]
    after: int | None = None


class VotePage(_Tagged, tag="vote_page", frozen=True, kw_only=True):
    """A page of votes in a poll. `after` requests the next page, if there is one."""

    votes: list[PollVote]
    after: UserId | None = None


class SearchPage(_Tagged, tag="search_page", frozen=True, kw_only=True):
    """A page of search results. `after` requests the next page, if there is one. A page before the last one may have
    fewer than `limit` hits, or none, because messages were deleted while the search ran.

    `is_partial` is true on all pages if the caller takes part in more than 200 conversations and gave no
    `conversation_id`. Then only the 200 that were most recently active at the first page were searched. Give a
    `conversation_id` to search another one.

    It is also true if a search takes long. Then messages before `searched_to` were not searched yet, and the page may
    have less than `limit` hits, or none. Pass `after` to search on. In the order `relevance`, the hits are the most
    relevant ones since `searched_to`.
    """

    hits: list[SearchHit]
    after: str | None = None
    is_partial: bool = False
    searched_to: datetime | None = None


class DeliveryReport(_Tagged, tag="whereabouts", frozen=True, kw_only=True):
    """The delivery report of a message. `published_at` is when this worker delivered it, if it did and still remembers.
    It may be up to a second too late. `recipients` has at most 100 other participants, those who have not received it
    first. Of a conversation with more than 10,000 past and current participants, the report covers only 10,000.
    """

    message_id: MessageId
    sender_id: UserId
    version: int
    stored_at: datetime
    published_at: datetime | None = None
    delivered_to: int
    read_by: int
    recipients: list[Recipient]


class OneThread(_Tagged, tag="thread", frozen=True, kw_only=True):
    """A thread as the caller sees it."""

    thread: ThreadView


class ThreadList(_Tagged, tag="thread_list", frozen=True, kw_only=True):
    """Threads that the caller follows, most recently replied to first. `after` requests the next page, if there
    is one.
    """

    threads: list[ThreadView]
    after: str | None = None


class OneThreadFollow(_Tagged, tag="thread_follow", frozen=True, kw_only=True):
    """Whether the caller follows a thread, and their read position in it."""

    follow: ThreadFollow


class Readers(_Tagged, tag="readers", frozen=True, kw_only=True):
    """The readers of a message. `read_by` counts the other users who have read it, and `delivered_to` the clients that
    have received it, up to 1,000. `readers` lists the readers unless `is_crowd`.

    Of more than 2,000 participants, only 2,000 are counted: those with the highest roles, and among equals the oldest.
    """

    read_by: int
    delivered_to: int
    readers: list[Reader]
    is_crowd: bool = False


class DraftList(_Tagged, tag="draft_list", frozen=True, kw_only=True):
    """A page of the caller's drafts. `after` requests the next page, if there is one."""

    drafts: list[Draft]
    after: str | None = None


class OneScheduled(_Tagged, tag="scheduled", frozen=True, kw_only=True):
    """A scheduled message."""

    scheduled: Scheduled


class ScheduledList(_Tagged, tag="scheduled_list", frozen=True, kw_only=True):
    """A page of the caller's scheduled messages that wait or failed. `after` requests the next page, if there
    is one.
    """

    scheduled: list[Scheduled]
    after: str | None = None


class FeedPage(_Tagged, tag="feed_page", frozen=True, kw_only=True):
    """A page of the feed, newest first. `unread_count` is the number of unseen entries in the whole feed, up to 100.

    `is_partial` is true on all pages with mentions if the caller takes part in more than 200 conversations. Then
    mentions of everyone and of roles come only from the 200 that were most recently active at the first page. Mentions
    by name come from all conversations.
    """

    entries: list[FeedEntry]
    unread_count: int
    after: str | None = None
    is_partial: bool = False


class Badge(_Tagged, tag="badge", frozen=True, kw_only=True):
    """Unread counts: `messages` is the sum of `unread_count` over all conversations that are neither muted nor
    hidden.
    """

    messages: int
    feed: int


class PushKey(_Tagged, tag="push_key", frozen=True, kw_only=True):
    """The `applicationServerKey` to subscribe with, in base64url."""

    key: str


class PresenceList(_Tagged, tag="presence_list", frozen=True, kw_only=True):
    """The presence of the watched users, in the order of the request."""

    presences: list[Presence]


class UserList(_Tagged, tag="user_list", frozen=True, kw_only=True):
    """The requested users who exist and may be seen."""

    users: list[User]


class OneProfile(_Tagged, tag="profile", frozen=True, kw_only=True):
    """A user's profile."""

    profile: Profile


class OneMe(_Tagged, tag="me", frozen=True, kw_only=True):
    """The caller's own profile and settings."""

    me: Me


class PublicConversationList(_Tagged, tag="public_conversation_list", frozen=True, kw_only=True):
    """Public conversations, largest first."""

    conversations: list[PublicConversation]


class InvitationList(_Tagged, tag="invitation_list", frozen=True, kw_only=True):
    """The caller's pending invitations."""

    invitations: list[Invitation]


class OneRelationship(_Tagged, tag="relationship", frozen=True, kw_only=True):
    """The new state of a relationship of the caller."""

    relationship: Relationship


class RelationshipPage(_Tagged, tag="relationship_page", frozen=True, kw_only=True):
    """A page of the caller's relationships. `after` requests the next page, if there is one."""

    relationships: list[RelationshipEntry]
    after: RelationshipId | None = None


class ReportPage(_Tagged, tag="report_page", frozen=True, kw_only=True):
    """A page of reports. `after` requests the next page, if there is one, even after an empty page."""

    reports: list[Report]
    after: ReportId | None = None


class AuditPage(_Tagged, tag="audit_page", frozen=True, kw_only=True):
    """A page of an audit log, in order. `after` requests the next page, if there is one, even after an empty page."""

    entries: list[AuditEntry]
    after: int | None = None


Result = (
    Done
    | Pong
    | Resumed
    | Sent
    | Changed
    | ReadUpTo
    | OneConversation
    | Added
    | ConversationPage
    | ParticipantPage
    | MessagePage
    | MessageList
    | OneMessage
    | EditPage
    | VotePage
    | SearchPage
    | DeliveryReport
    | OneThread
    | ThreadList
    | OneThreadFollow
    | Readers
    | DraftList
    | OneScheduled
    | ScheduledList
    | FeedPage
    | Badge
    | PushKey
    | PresenceList
    | UserList
    | OneProfile
    | OneMe
    | PublicConversationList
    | InvitationList
    | OneRelationship
    | RelationshipPage
    | ReportPage
    | AuditPage
)


class Reply(_Tagged, tag="reply", frozen=True, kw_only=True):
    """The reply to the frame whose `id` is `re`. Everything that the frame wrote is committed."""

    re: FrameId | None = None
    result: Result


class Error(_Tagged, tag="error", frozen=True, kw_only=True):
    """The refusal of the frame whose `id` is `re`: nothing was written. `path` names the field at fault."""

    re: FrameId | None = None
    code: ErrorCode
    message: str
    path: str | None = None
    retry_after_ms: int | None = None


ConnectionFrame = (
    Ready
    | Conversations
    | ConversationJoined
    | ConversationLeft
    | Changes
    | StartOver
    | Heartbeat
    | GoingAway
    | Reply
    | Error
)
"""Frames that one worker writes to one connection, in the order in which they apply."""

ServerFrame = DurableEvent | OwnEvent | StateEvent | TypingEvent | ConnectionFrame
