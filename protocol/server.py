"""What the server says: replies to frames, events of conversations, and words about the connection itself.

Durable events carry `version`, the conversation's clock, and the new state of what changed, so that applying
one is replacing what one has. A client's position in a conversation moves by one with each; `changes` moves it
from `since` to `version` at once.
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
    """A struct that says what it is in `type`."""


# ----------------------------------------------------------------------------------------- durable events


class _Event(_Tagged, frozen=True, kw_only=True):
    conversation_id: ConversationId
    version: int


class MessageSent(_Event, tag="message_sent", frozen=True, kw_only=True):
    """A new message. `root_reply_count` is the thread root's count when the message is a reply."""

    message: Message
    root_reply_count: int | None = None


class MessageEdited(_Event, tag="message_edited", frozen=True, kw_only=True):
    """A message changed, or was hidden by a moderator or shown again; here it is as it is now."""

    message: Message


class MessageDeleted(_Event, tag="message_deleted", frozen=True, kw_only=True):
    """A message was deleted; here is what is left. `root_reply_count` as in `message_sent`."""

    message: Message
    root_reply_count: int | None = None


class MessageReacted(_Event, tag="message_reacted", frozen=True, kw_only=True):
    """Someone put an emoji on a message; `count` is how many have it there now."""

    message_id: MessageId
    user_id: UserId
    emoji: str
    count: int


class MessageUnreacted(_Event, tag="message_unreacted", frozen=True, kw_only=True):
    """Someone took an emoji back; `count` is how many are left."""

    message_id: MessageId
    user_id: UserId
    emoji: str
    count: int


class PollVoted(_Event, tag="poll_voted", frozen=True, kw_only=True):
    """Someone voted in a poll, or otherwise than before; here is how it stands. Who, and for which options, is told
    unless the poll is anonymous.
    """

    message_id: MessageId
    poll_counts: list[int]
    poll_voters: int
    user_id: UserId | None = None
    options: list[int] | None = None


class MessageChanged(_Event, tag="message_changed", frozen=True, kw_only=True):
    """A message changed that not everyone here may see, for they joined later: ask for it with `get_message`."""

    message_id: MessageId


class ConversationUpdated(_Event, tag="conversation_updated", frozen=True, kw_only=True):
    """The conversation's settings changed, or it was made, or deleted."""

    conversation: Conversation


class ParticipantChanged(_Event, tag="participant_changed", frozen=True, kw_only=True):
    """Someone joined, was added, or has another role or other permissions."""

    participant: Participant
    participant_count: int


class ParticipantLeft(_Event, tag="participant_left", frozen=True, kw_only=True):
    """Someone takes part no more. Whether they left, or were removed or banned, it does not say."""

    user_id: UserId
    participant_count: int


class OutsidersChanged(_Event, tag="outsiders_changed", frozen=True, kw_only=True):
    """The invitations, refusals or bans changed. Whoever may see them asks with `list_participants`."""


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
    user_version: int


class MeChanged(_OwnEvent, tag="me_changed", frozen=True, kw_only=True):
    """The user's own profile or privacy settings changed, perhaps on another device."""

    me: Me


class RelationshipChanged(_OwnEvent, tag="relationship_changed", frozen=True, kw_only=True):
    """What is between the user and another one changed: asked, accepted, blocked and so on."""

    relationship: Relationship


class Invited(_OwnEvent, tag="invited", frozen=True, kw_only=True):
    """The user is invited to a conversation."""

    invitation: Invitation


class InvitationEnded(_OwnEvent, tag="invitation_ended", frozen=True, kw_only=True):
    """An invitation was taken back, or declined on another device."""

    conversation_id: ConversationId


class PreferencesChanged(_OwnEvent, tag="preferences_changed", frozen=True, kw_only=True):
    """How the user wants to have a conversation changed, perhaps on another device."""

    conversation_id: ConversationId
    preferences: Preferences


class StarChanged(_OwnEvent, tag="star_changed", frozen=True, kw_only=True):
    """The user put a message aside, or back."""

    star: StarredMessage


class DraftChanged(_OwnEvent, tag="draft_changed", frozen=True, kw_only=True):
    """What the user has begun to write in a conversation changed."""

    draft: Draft


class ScheduledChanged(_OwnEvent, tag="scheduled_changed", frozen=True, kw_only=True):
    """A message that waits was scheduled, changed, sent, given up or cancelled."""

    scheduled: Scheduled


class ThreadFollowChanged(_OwnEvent, tag="thread_follow_changed", frozen=True, kw_only=True):
    """The user follows a thread, or not, or has read on in it."""

    follow: ThreadFollow


OwnStartOverReason = Literal["forgotten", "ahead_of_server", "other_epoch"]


class OwnStartOver(_OwnEvent, tag="own_start_over", frozen=True, kw_only=True):
    """The server cannot name all own rows that the client has to drop. Drop relationships, invitations, stars, drafts,
    scheduled messages and followed threads: all that there are follow. `user_version` is 0. Unless `reason` is
    `forgotten`, read your profile again (`get_me`), and the `preferences` of conversations that did not start over.
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
"""Said in no order but that of `user_version`; each is the present state of what it is about."""

# --------------------------------------------------------------------------------------- ephemeral events


class MessageRead(_Tagged, tag="message_read", frozen=True, kw_only=True):
    """Someone has read up to a message. In a large conversation only the reader's own devices are told."""

    conversation_id: ConversationId
    user_id: UserId
    message_id: MessageId


class MessageDelivered(_Tagged, tag="message_delivered", frozen=True, kw_only=True):
    """A client of someone has taken in everything up to a message. Not told in a large conversation."""

    conversation_id: ConversationId
    user_id: UserId
    message_id: MessageId


class TypingStarted(_Tagged, tag="typing_started", frozen=True, kw_only=True):
    """Someone is typing; forget it after `fades_after_ms` unless it is said again."""

    conversation_id: ConversationId
    user_id: UserId
    fades_after_ms: int = 6_000


class TypingStopped(_Tagged, tag="typing_stopped", frozen=True, kw_only=True):
    """Someone stopped typing."""

    conversation_id: ConversationId
    user_id: UserId


class PresenceChanged(_Tagged, tag="presence_changed", frozen=True, kw_only=True):
    """A watched user is now seen like this."""

    presence: Presence


class UserUpdated(_Tagged, tag="user_updated", frozen=True, kw_only=True):
    """A watched user has another face."""

    user: User


# --------------------------------------------------------------------------- what is said about the connection


class Ready(_Tagged, tag="ready", frozen=True, kw_only=True):
    """The connection is authenticated. Keep `epoch` with the versions that are learned from here on. What changes for
    the user alone after `user_version`, their own clock, follows as events.
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
    """A page of the user's conversations, after `ready`. When `is_last`, everything has been said."""

    conversations: list[ConversationView]
    is_last: bool


class ConversationJoined(_Tagged, tag="conversation_joined", frozen=True, kw_only=True):
    """The user is now in a conversation; its events follow."""

    view: ConversationView


class ConversationLeft(_Tagged, tag="conversation_left", frozen=True, kw_only=True):
    """The user is no longer in a conversation; no events follow."""

    conversation_id: ConversationId


class Changes(_Tagged, tag="changes", frozen=True, kw_only=True):
    """What happened in a conversation after `since`, up to `version`, in order: the present state of all that
    changed. The position is `version` afterwards. `receipts` are the read positions, where they are shared. What is too
    large for one frame comes in several, each of which begins where the one before ends.
    """

    conversation_id: ConversationId
    since: int
    version: int
    events: list[DurableEvent]
    receipts: list[Receipt] = []
    unread_count: int | None = None
    last_read_message_id: MessageId | None = None


StartOverReason = Literal["too_many_changes", "ahead_of_server", "other_epoch"]


class StartOver(_Tagged, tag="start_over", frozen=True, kw_only=True):
    """The difference is too large or makes no sense: forget this conversation's messages and begin with `view`."""

    view: ConversationView
    reason: StartOverReason


class Heartbeat(_Tagged, tag="heartbeat", frozen=True, kw_only=True):
    """The server is there. `versions` are the clocks of what was active since the last one: a client that is
    behind one of them has lost something and should `resume`.
    """

    server_time: datetime
    versions: dict[ConversationId, int] = {}


class GoingAway(_Tagged, tag="going_away", frozen=True, kw_only=True):
    """This worker closes the connection, with 1012, as its next word. Come back, anywhere, after `reconnect_after_ms`,
    which is another time for each client; `ticket` may be given once instead of the token, within a minute.
    """

    reconnect_after_ms: int
    ticket: str | None = None


# --------------------------------------------------------------------------------------------------- results


class Done(_Tagged, tag="done", frozen=True, kw_only=True):
    """It is so; whether it was already does not matter."""


class Pong(_Tagged, tag="pong", frozen=True, kw_only=True):
    """The answer to `ping`."""

    server_time: datetime


class Resumed(_Tagged, tag="resumed", frozen=True, kw_only=True):
    """Everything that was missed has been sent, and live events follow. `read_positions` are the user's own, and
    `user_version` is the user's own clock: name it in the next `resume`, unless an event has a later one.
    """

    conversations: int
    user_version: int = 0
    read_positions: dict[ConversationId, MessageId] = {}


class Sent(_Tagged, tag="sent", frozen=True, kw_only=True):
    """The message is stored, for good, at this place."""

    conversation_id: ConversationId
    message_id: MessageId
    version: int
    created_at: datetime


class Changed(_Tagged, tag="changed", frozen=True, kw_only=True):
    """It is stored; `version` is the clock when it changed, or the earlier one if it was already so."""

    conversation_id: ConversationId
    version: int


class ReadUpTo(_Tagged, tag="read_up_to", frozen=True, kw_only=True):
    """The read position, which may be further on than what was asked for."""

    conversation_id: ConversationId
    message_id: MessageId
    unread_count: int


class OneConversation(_Tagged, tag="conversation", frozen=True, kw_only=True):
    """A conversation as the caller sees it. `added` and `invited` answer `create_group`: of the users named, those who
    take part, and those who are asked to. A repeated `create_group` names those whose part the caller may see now.
    """

    view: ConversationView
    added: list[UserId] = []
    invited: list[UserId] = []


class Added(_Tagged, tag="added", frozen=True, kw_only=True):
    """Of the users named, those who take part, and those who are asked to."""

    added: list[UserId] = []
    invited: list[UserId] = []


class ConversationPage(_Tagged, tag="conversation_page", frozen=True, kw_only=True):
    """Some of the caller's conversations; `after` asks for the next page, if there is one."""

    conversations: list[ConversationView]
    after: str | None = None


class ParticipantEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A participant, with how far they have read. Those who take part show their faces; those who are invited or banned
    show them to whoever may see them elsewhere.
    """

    participant: Participant
    user: User | None = None
    last_read_message_id: MessageId | None = None


class ParticipantPage(_Tagged, tag="participant_page", frozen=True, kw_only=True):
    """Some of a conversation's participants; `after` asks for the next page, if there is one."""

    participants: list[ParticipantEntry]
    after: UserId | None = None


class MessageList(_Tagged, tag="message_list", frozen=True, kw_only=True):
    """Messages that were pinned or starred, the latest first; `withheld` is what moderators have hidden, for who may
    read it. `after` asks for the next page, if there is one.
    """

    messages: list[Message]
    withheld: dict[MessageId, str] = {}
    after: str | None = None


class MessagePage(_Tagged, tag="message_page", frozen=True, kw_only=True):
    """Messages, oldest first, as of the conversation's `version`. `mine` has the caller's own reactions,
    `votes` the caller's own votes, `withheld` what moderators have hidden, for who may read it.

    A client that ignored events of messages it did not have yet applies those after `version` again.
    """

    version: int
    messages: list[Message]
    has_before: bool
    has_after: bool
    mine: dict[MessageId, list[str]] = {}
    votes: dict[MessageId, list[int]] = {}
    withheld: dict[MessageId, str] = {}


class OneMessage(_Tagged, tag="message", frozen=True, kw_only=True):
    """A message; `mine` has the caller's own reactions, `vote` their own vote, `read_by` how many others have read it,
    `withheld` what a moderator has hidden, for who may read it.
    """

    message: Message
    withheld: str | None = None
    mine: list[str] = []
    vote: list[int] = []
    read_by: int = 0


class EditPage(_Tagged, tag="edit_page", frozen=True, kw_only=True):
    """What a message said before, newest first; `after` asks for the next page, if there is one."""

    edits: list[MessageEdit]
    after: int | None = None


class VotePage(_Tagged, tag="vote_page", frozen=True, kw_only=True):
    """Some of the votes in a poll; `after` asks for the next page, if there is one."""

    votes: list[PollVote]
    after: UserId | None = None


class SearchPage(_Tagged, tag="search_page", frozen=True, kw_only=True):
    """Some of what was found; `after` asks for the next page, if there is one. Every page `is_partial` if the caller
    takes part in more than 200 conversations and named none: those were searched that were active last when the first
    page was read. Name a `conversation_id` to search another one.
    """

    hits: list[SearchHit]
    after: str | None = None
    is_partial: bool = False


class Whereabouts(_Tagged, tag="whereabouts", frozen=True, kw_only=True):
    """Where a message went. `published_at` is when this worker delivered it, if it did and remembers; `recipients` are
    all others who take part, at most 100, those without it first.
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
    """Threads that the caller follows, those with the latest replies first; `after` asks for the next page, if there is
    one.
    """

    threads: list[ThreadView]
    after: str | None = None


class OneThreadFollow(_Tagged, tag="thread_follow", frozen=True, kw_only=True):
    """Whether the caller follows a thread now, and how far they have read in it."""

    follow: ThreadFollow


class Readers(_Tagged, tag="readers", frozen=True, kw_only=True):
    """How many others have read a message and how many clients have taken it in, up to 1,000; and who has read it,
    unless it `is_crowd`.
    """

    read_by: int
    delivered_to: int
    readers: list[Reader]
    is_crowd: bool = False


class DraftList(_Tagged, tag="draft_list", frozen=True, kw_only=True):
    """What the caller has begun to write; `after` asks for the next page, if there is
    one.
    """

    drafts: list[Draft]
    after: str | None = None


class OneScheduled(_Tagged, tag="scheduled", frozen=True, kw_only=True):
    """A message that waits for its time."""

    scheduled: Scheduled


class ScheduledList(_Tagged, tag="scheduled_list", frozen=True, kw_only=True):
    """The caller's messages that wait, and those that could not be sent; `after` asks for the next page, if there is
    one.
    """

    scheduled: list[Scheduled]
    after: str | None = None


class FeedPage(_Tagged, tag="feed_page", frozen=True, kw_only=True):
    """Some of what concerns the caller, the latest first; `unread_count` is how much of it all is new, up to 100. Every
    page with mentions `is_partial` if the caller takes part in more than 200 conversations: mentions of everyone and of
    roles are from those that were active last when the first page was read. Mentions by name are from all of them.
    """

    entries: list[FeedEntry]
    unread_count: int
    after: str | None = None
    is_partial: bool = False


class Badge(_Tagged, tag="badge", frozen=True, kw_only=True):
    """What is unread: `messages` is the sum of `unread_count` of all conversations neither muted nor hidden."""

    messages: int
    feed: int


class PushKey(_Tagged, tag="push_key", frozen=True, kw_only=True):
    """The `applicationServerKey` to subscribe with, in base64url."""

    key: str


class PresenceList(_Tagged, tag="presence_list", frozen=True, kw_only=True):
    """How the watched users are seen now, in the order asked."""

    presences: list[Presence]


class UserList(_Tagged, tag="user_list", frozen=True, kw_only=True):
    """The users that exist and may be seen."""

    users: list[User]


class OneProfile(_Tagged, tag="profile", frozen=True, kw_only=True):
    """What a user tells about themselves."""

    profile: Profile


class OneMe(_Tagged, tag="me", frozen=True, kw_only=True):
    """The caller as they see themselves."""

    me: Me


class PublicConversationList(_Tagged, tag="public_conversation_list", frozen=True, kw_only=True):
    """Conversations that anyone can join, the largest first."""

    conversations: list[PublicConversation]


class InvitationList(_Tagged, tag="invitation_list", frozen=True, kw_only=True):
    """Where the caller is invited to."""

    invitations: list[Invitation]


class OneRelationship(_Tagged, tag="relationship", frozen=True, kw_only=True):
    """What is between the caller and another user now."""

    relationship: Relationship


class RelationshipPage(_Tagged, tag="relationship_page", frozen=True, kw_only=True):
    """Some of the caller's relationships; `after` asks for the next page, if there is one."""

    relationships: list[RelationshipEntry]
    after: RelationshipId | None = None


class ReportPage(_Tagged, tag="report_page", frozen=True, kw_only=True):
    """Some of what was reported, or none; `after` asks for the next page, if there is one."""

    reports: list[Report]
    after: ReportId | None = None


class AuditPage(_Tagged, tag="audit_page", frozen=True, kw_only=True):
    """Some of an audit log, or none, in order; `after` asks for the next page, if there is one."""

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
    | Whereabouts
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
    """The answer to the frame with the id `re`. If that frame wrote something, it is committed."""

    re: FrameId | None = None
    result: Result


class Error(_Tagged, tag="error", frozen=True, kw_only=True):
    """The refusal of the frame with the id `re`: nothing was written. `path` names the bad field."""

    re: FrameId | None = None
    code: ErrorCode
    message: str
    path: str | None = None
    retry_after_ms: int | None = None


ServerFrame = (
    DurableEvent
    | OwnEvent
    | MessageRead
    | MessageDelivered
    | TypingStarted
    | TypingStopped
    | PresenceChanged
    | UserUpdated
    | Ready
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
