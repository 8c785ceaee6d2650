"""What clients say: one struct for each frame, named as a command. `server/routes.py` says what each one does.

Every frame may carry `id`, a number or a short string; its reply, or its error, carries it back in `re`.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol.ids import ConversationId, EditId, MessageId, UserId, require_uuid7
from protocol.limits import (
    DEFAULT_PAGE,
    MAX_MENTIONS,
    MAX_PARTICIPANTS_NAMED,
    MAX_RESUMED,
    MAX_WATCHED,
    Content,
    Cursor,
    CustomStatus,
    Description,
    Emoji,
    FormattedContent,
    InviteCode,
    PageSize,
    Title,
    Token,
    Version,
)
from protocol.values import ConversationType, Json, PresenceStatus

FrameId = Annotated[int, Meta(ge=-(2**53), le=2**53)] | Annotated[str, Meta(max_length=64)]
MaxParticipants = Annotated[int, Meta(ge=1, le=1_000_000)]
PARTICIPANTS_NAMED = Meta(min_length=1, max_length=MAX_PARTICIPANTS_NAMED)


class Frame(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """What all frames of a client have in common."""

    id: FrameId | None = None


# ------------------------------------------------------------------------------------------- the connection


class Authenticate(Frame, tag="authenticate"):
    """The first frame of a client that could not send its token as a header; within five seconds."""

    token: Token


class Resume(Frame, tag="resume"):
    """Ask for exactly what was missed: `versions` holds the clock of each conversation that the client has.

    `epoch` is the one from the `ready` in which these versions were learned.
    """

    epoch: Annotated[str, Meta(max_length=128)]
    versions: Annotated[dict[ConversationId, Version], Meta(max_length=MAX_RESUMED)]


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
    is_public: bool = False
    max_participants: MaxParticipants | None = None
    settings: Json = {}

    def __post_init__(self) -> None:
        require_uuid7(self.conversation_id, "conversation_id")


class CreateGroup(_Create, tag="create_group", kw_only=True):
    """Make a group of the caller, its owner, and the participants named."""

    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]


class CreateChannel(_Create, tag="create_channel"):
    """Make a channel, joined by whoever wants if public, and otherwise by invite code."""


class ListConversations(Frame, tag="list_conversations"):
    """The caller's conversations, most recently active first."""

    conversation_type: ConversationType | None = None
    archived: bool | None = None
    after: Cursor | None = None
    limit: PageSize = DEFAULT_PAGE


class GetConversation(Frame, tag="get_conversation"):
    """One conversation of the caller's."""

    conversation_id: ConversationId


class UpdateConversation(Frame, tag="update_conversation"):
    """Change the fields that are given and no others. `invite_code` 'new' makes one, 'none' takes it away."""

    conversation_id: ConversationId
    title: Title | UnsetType = UNSET
    description: Description | None | UnsetType = UNSET
    is_public: bool | UnsetType = UNSET
    is_archived: bool | UnsetType = UNSET
    max_participants: MaxParticipants | None | UnsetType = UNSET
    settings: Json | UnsetType = UNSET
    invite_code: Literal["new", "none"] | UnsetType = UNSET


class Join(Frame, tag="join"):
    """Join a public conversation by its id, or any by its invite code."""

    conversation_id: ConversationId | None = None
    invite_code: InviteCode | None = None

    def __post_init__(self) -> None:
        if (self.conversation_id is None) == (self.invite_code is None):
            raise ValueError("give either `conversation_id` or `invite_code`")


class Leave(Frame, tag="leave"):
    """Leave a conversation. When its only owner leaves, the next in rank, then in age, becomes owner."""

    conversation_id: ConversationId


class AddParticipants(Frame, tag="add_participants"):
    """Add users to a group or a channel; those who are in it already stay as they are."""

    conversation_id: ConversationId
    participants: Annotated[list[UserId], PARTICIPANTS_NAMED]
    role: Literal["admin", "moderator", "member", "guest"] = "member"


class RemoveParticipant(Frame, tag="remove_participant"):
    """Remove someone of a lower role; with `ban`, for good."""

    conversation_id: ConversationId
    user_id: UserId
    ban: bool = False


class SetRole(Frame, tag="set_role"):
    """Give someone of a lower role another one, below the caller's own."""

    conversation_id: ConversationId
    user_id: UserId
    role: Literal["admin", "moderator", "member", "guest"]


class ListParticipants(Frame, tag="list_participants"):
    """Who takes part, in the order of their ids, with how far they have read."""

    conversation_id: ConversationId
    after: UserId | None = None
    limit: PageSize = DEFAULT_PAGE


# -------------------------------------------------------------------------------------------------- messages


class Send(Frame, tag="send"):
    """Send a message. `message_id` is the client's: sent again, it is answered again and stored once."""

    conversation_id: ConversationId
    message_id: MessageId
    content: Content
    content_type: Literal["text", "image", "file", "audio", "video", "code", "location"] = "text"
    formatted_content: FormattedContent | None = None
    parent_message_id: MessageId | None = None
    mentions: Annotated[list[UserId], Meta(max_length=MAX_MENTIONS)] = []
    metadata: Json | None = None

    def __post_init__(self) -> None:
        require_uuid7(self.message_id, "message_id")


class _OfMessage(Frame):
    conversation_id: ConversationId
    message_id: MessageId


class Edit(_OfMessage, tag="edit"):
    """Change what the caller's own message says. With an `edit_id` of its own, a repeated edit is one edit."""

    content: Content
    formatted_content: FormattedContent | None = None
    edit_id: EditId | None = None

    def __post_init__(self) -> None:
        if self.edit_id is not None:
            require_uuid7(self.edit_id, "edit_id")


class Delete(_OfMessage, tag="delete"):
    """Delete a message: one's own, or anyone's with the permission."""


class React(_OfMessage, tag="react"):
    """Put an emoji on a message."""

    emoji: Emoji


class Unreact(_OfMessage, tag="unreact"):
    """Take it back."""

    emoji: Emoji


class Read(_OfMessage, tag="read"):
    """Everything up to this message has been read. The position only moves forward."""


class History(Frame, tag="history"):
    """A page of messages, oldest first: before, after or around a message, or the newest."""

    conversation_id: ConversationId
    before: MessageId | None = None
    after: MessageId | None = None
    around: MessageId | None = None
    limit: PageSize = DEFAULT_PAGE

    def __post_init__(self) -> None:
        if sum(anchor is not None for anchor in (self.before, self.after, self.around)) > 1:
            raise ValueError("give at most one of `before`, `after` and `around`")


class GetMessage(_OfMessage, tag="get_message"):
    """One message."""


class ListEdits(_OfMessage, tag="list_edits"):
    """What a message said before, newest first."""


# ---------------------------------------------------------------------------------------------------- people


class Typing(Frame, tag="typing"):
    """The caller is typing, or stopped. Say it again every few seconds: it fades after six."""

    conversation_id: ConversationId
    active: bool = True


class SetPresence(Frame, tag="presence"):
    """How the caller wants to be seen. `away` is this device's; the others are the user's. `offline` is
    `invisible`. Without `custom_status` that stays as it is; null takes it away.
    """

    status: PresenceStatus
    custom_status: CustomStatus | None | UnsetType = UNSET


class Watch(Frame, tag="watch"):
    """Be told when the presence of these users changes; the reply has it as it is now."""

    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=MAX_WATCHED)]


class Unwatch(Frame, tag="unwatch"):
    """No longer."""

    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=MAX_WATCHED)]


class GetUsers(Frame, tag="get_users"):
    """The public faces of users, those that exist and may be seen."""

    user_ids: Annotated[list[UserId], Meta(min_length=1, max_length=100)]


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
    | Join
    | Leave
    | AddParticipants
    | RemoveParticipant
    | SetRole
    | ListParticipants
    | Send
    | Edit
    | Delete
    | React
    | Unreact
    | Read
    | History
    | GetMessage
    | ListEdits
    | Typing
    | SetPresence
    | Watch
    | Unwatch
    | GetUsers
)
