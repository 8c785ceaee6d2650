"""A client's replica of its data, built only from received frames. It counts duplicated, late and lost events."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

import msgspec

from protocol import server
from protocol.ids import ConversationId, MessageId, RelationshipId, UserId
from protocol.server import DurableEvent, OwnEvent, PresenceChanged, ServerFrame, StateEvent
from protocol.values import (
    Conversation,
    ConversationView,
    Invitation,
    Me,
    Message,
    Participant,
    Preferences,
    Presence,
    Relationship,
)
from prove.own_rows import Row, row_of, rows_in

replace = msgspec.structs.replace


@dataclass
class Copy:
    """One conversation. `missing` are the versions before `version` that have not arrived."""

    version: int
    conversation: Conversation
    participants: dict[UserId, Participant] = field(default_factory=dict)
    left: dict[UserId, int] = field(default_factory=dict)
    """Versions at which users left, so that an older page of participants does not add them again."""
    messages: dict[MessageId, Message] = field(default_factory=dict)
    ignored: list[DurableEvent] = field(default_factory=list)
    is_partial: bool = False
    """Whether changes of participants were left out since the copy became incomplete, perhaps during its load."""
    missing: set[int] = field(default_factory=set)


class Mirror:
    """All conversations of one user.

    `wrong` counts violations: `duplicated` and `out of order` events, and `unknown` ones of conversations in which the
    user does not participate. Lost events are in `missing` of the copies.
    """

    def __init__(self) -> None:
        self.copies: dict[ConversationId, Copy] = {}
        self.unloaded: set[ConversationId] = set()
        self.epoch = ""
        self.user_version = 0
        self.me: Me | None = None
        self.invitations: dict[ConversationId, Invitation] = {}
        self.preferences: dict[ConversationId, Preferences] = {}
        self.relationships: dict[RelationshipId, Relationship] = {}
        self.stars: set[MessageId] = set()
        self.drafts: dict[ConversationId, str] = {}
        self.scheduled: dict[MessageId, str] = {}
        """The status of each scheduled message."""
        self.follows: dict[MessageId, bool] = {}
        """Whether threads are followed, as received in events. A reply follows a thread without an event."""
        self.numbers: dict[Row, int] = {}
        """The highest user version that has arrived of each own row, deleted ones included."""
        self.states: dict[tuple[type[StateEvent], tuple[UUID, ...]], StateEvent] = {}
        """The event with the highest revision of each type and subject. They arrive in any order."""
        self.current: set[tuple[type[StateEvent], tuple[UUID, ...]]] = set()
        """The keys in `states` for which this connection has received an event. It receives all later ones."""
        self.wrong: Counter[str] = Counter()
        self.shown: set[MessageId] = set()
        """Messages received in events since the last check."""

    def begin_resume(self) -> None:
        """Forget incomplete conversations. `resume` does not name them, so the server sends them again, unless the user
        has left them meanwhile.
        """
        self.current.clear()
        for one in list(self.unloaded):
            self.forget(one)

    @property
    def current_states(self) -> list[StateEvent]:
        """The states for which this connection has received an event."""
        return [self.states[key] for key in self.current if key in self.states]

    @property
    def versions(self) -> dict[ConversationId, int]:
        """The versions for `resume`, of complete conversations only."""
        return {one: copy.version for one, copy in self.copies.items() if one not in self.unloaded}

    def receive(self, frame: ServerFrame) -> None:
        """Apply a frame."""
        if isinstance(frame, server.OwnStartOver):
            self._start_own_over(frame)
        elif isinstance(frame, OwnEvent):
            self._receive_own(frame)
        elif isinstance(frame, StateEvent):
            self._receive_state(frame)
        elif isinstance(frame, DurableEvent):
            if (copy := self._copy(frame.conversation_id)) is not None:
                self._receive_event(copy, frame)
        else:
            self._receive_view(frame)

    def _receive_view(self, frame: ServerFrame) -> None:
        """Apply a frame that begins, ends or continues the copy of a conversation."""
        match frame:
            case server.Ready():
                # The epoch of a later `ready` takes effect when its `resume` is answered.
                self.epoch = self.epoch or frame.epoch
                if self.epoch != frame.epoch:
                    self.numbers.clear()
            case server.Conversations():
                for view in frame.conversations:
                    self._begin(view)
            case server.ConversationJoined() | server.StartOver():
                self._begin(frame.view)
            case server.ConversationLeft():
                self.forget(frame.conversation_id)
            case server.Changes():
                if (copy := self._copy(frame.conversation_id)) is not None:
                    self._receive_changes(copy, frame)
            case _:
                pass

    def _receive_state(self, event: StateEvent) -> None:
        """Keep an event unless a later one of its subject has arrived before."""
        there = self.states.get((type(event), event.subject))
        if there is None or there.revision < event.revision:
            self.states[type(event), event.subject] = event
        self.current.add((type(event), event.subject))

    def read(self, result: server.Result) -> None:
        """Apply the own rows in a reply, unless an event before it has later ones. Rows that the user never changed
        have no number.
        """
        for event in rows_in(result):
            if event.user_version:
                self._apply_own(event)
        if isinstance(result, server.MessageList):
            numbers = result.star_versions.items()
            self.stars |= {one for one, number in numbers if self._is_latest(("star", one), number)}

    def _is_latest(self, row: Row, number: int) -> bool:
        """Remember the number of an own row. Return whether no later one has arrived."""
        if number < self.numbers.get(row, 0):
            return False
        self.numbers[row] = number
        return True

    def _receive_own(self, event: OwnEvent) -> None:
        """Apply an event about data of this user only. It contains the current state."""
        self._advance(event.user_version)
        self._apply_own(event)

    def _apply_own(self, event: OwnEvent) -> None:
        if self._is_latest(row_of(event), event.user_version):
            self._keep(event)

    def _keep(self, event: OwnEvent) -> None:
        match event:
            case server.MeChanged():
                self.me = event.me
            case server.RelationshipChanged():
                self.relationships[event.relationship.id] = event.relationship
            case server.StarChanged():
                (self.stars.discard if event.star.is_removed else self.stars.add)(event.star.message_id)
            case server.DraftChanged():
                self.drafts[event.draft.conversation_id] = event.draft.content
            case server.ScheduledChanged():
                self.scheduled[event.scheduled.message_id] = event.scheduled.status
            case server.ThreadFollowChanged():
                self.follows[event.follow.root_id] = event.follow.is_following
            case server.Invited():
                self.invitations[event.invitation.conversation_id] = event.invitation
            case server.InvitationEnded():
                self.invitations.pop(event.conversation_id, None)
            case server.PreferencesChanged():
                self.invitations.pop(event.conversation_id, None)
                self.preferences[event.conversation_id] = event.preferences

    def _advance(self, user_version: int) -> None:
        if user_version < self.user_version:
            self.wrong["out of order"] += 1
        self.user_version = max(self.user_version, user_version)

    def _start_own_over(self, event: server.OwnStartOver) -> None:
        """Drop the user's own rows. The server sends them again, or the client reads them."""
        self.user_version = event.user_version
        self.numbers.clear()
        for rows in (
            self.invitations, self.relationships, self.stars, self.drafts, self.scheduled, self.follows,
        ):  # fmt: skip
            rows.clear()

    def forget(self, conversation_id: ConversationId) -> None:
        """Delete the copy of a conversation."""
        self.copies.pop(conversation_id, None)
        self.unloaded.discard(conversation_id)
        self._lose(conversation_id)

    def unwatch(self, user_ids: Iterable[UserId]) -> None:
        """Note that no more presences and faces of these users follow."""
        for user_id in user_ids:
            self._lose(user_id)

    def _lose(self, first: UUID) -> None:
        self.current = {key for key in self.current if key[1][0] != first}

    def forget_presences(self) -> None:
        """Delete the presences of users, whose revisions do not outlast a connection."""
        self.states = {key: event for key, event in self.states.items() if not isinstance(event, PresenceChanged)}

    def show(self, presences: Iterable[Presence]) -> None:
        """Apply the reply to `watch`."""
        for one in presences:
            self._receive_state(PresenceChanged(presence=one))

    def loaded(self, conversation_id: ConversationId) -> None:
        """Mark a conversation as complete, after its history and participants were loaded. It stays incomplete if
        changes of participants were left out meanwhile.
        """
        copy = self.copies[conversation_id]
        if not copy.is_partial:
            self.unloaded.discard(conversation_id)
            copy.ignored.clear()
        copy.is_partial = False

    def is_behind(self, beat: server.Heartbeat) -> bool:
        """Return whether a heartbeat reveals a lost event."""
        return any(one in self.copies and self.copies[one].version < version for one, version in beat.versions.items())

    def load(self, conversation_id: ConversationId, page: server.MessagePage) -> None:
        """Add a page of history."""
        copy = self.copies[conversation_id]
        new = [message for message in page.messages if message.id not in copy.messages]
        copy.messages.update({message.id: message for message in new})
        ids = {message.id for message in new}
        for event in copy.ignored:
            if event.version > page.version and not ids.isdisjoint(_touched(event)):
                self._apply_to_messages(copy, event)

    def load_participants(self, conversation_id: ConversationId, entries: Iterable[server.ParticipantEntry]) -> None:
        """Add a page of participants."""
        copy = self.copies[conversation_id]
        for entry in entries:
            there = copy.participants.get(entry.participant.user_id)
            version = copy.left.get(entry.participant.user_id, 0) if there is None else there.version
            if version < entry.participant.version:
                copy.participants[entry.participant.user_id] = entry.participant

    def _copy(self, conversation_id: ConversationId) -> Copy | None:
        copy = self.copies.get(conversation_id)
        if copy is None:
            self.wrong["unknown"] += 1
        return copy

    def _receive_changes(self, copy: Copy, frame: server.Changes) -> None:
        copy.missing.update(range(copy.version + 1, frame.since + 1))
        if frame.version < copy.version:
            self.wrong["duplicated"] += 1
            return
        for event in frame.events:
            self._apply(copy, event)
        copy.version = frame.version
        if frame.is_partial:
            copy.is_partial = frame.conversation_id in self.unloaded
            copy.participants.clear()
            self.unloaded.add(frame.conversation_id)

    def _receive_event(self, copy: Copy, event: DurableEvent) -> None:
        if event.version > copy.version:
            copy.missing.update(range(copy.version + 1, event.version))
            copy.version = event.version
        elif event.version in copy.missing:
            self.wrong["out of order"] += 1
            copy.missing.discard(event.version)
        else:
            self.wrong["duplicated"] += 1
            return
        self._apply(copy, event)

    def _begin(self, view: ConversationView) -> None:
        self._lose(view.conversation.id)
        self.copies[view.conversation.id] = Copy(version=view.version, conversation=view.conversation)
        self.unloaded.add(view.conversation.id)
        for event in rows_in(view):
            self._apply_own(event)

    def _apply(self, copy: Copy, event: DurableEvent) -> None:
        if event.conversation_id in self.unloaded:
            copy.ignored.append(event)
        if isinstance(event, server.MessageSent):
            self.shown.add(event.message.id)
        match event:
            case server.ConversationUpdated():
                if event.conversation.version >= copy.conversation.version:
                    count = copy.conversation.participant_count
                    copy.conversation = replace(event.conversation, participant_count=count)
            case server.ParticipantChanged():
                there = copy.participants.get(event.participant.user_id)
                if there is None or there.version < event.version:
                    copy.participants[event.participant.user_id] = event.participant
                copy.conversation = replace(copy.conversation, participant_count=event.participant_count)
            case server.ParticipantLeft():
                copy.left[event.user_id] = event.version
                there = copy.participants.get(event.user_id)
                if there is not None and there.version < event.version:
                    del copy.participants[event.user_id]
                copy.conversation = replace(copy.conversation, participant_count=event.participant_count)
            case _:
                self._apply_to_messages(copy, event)

    def _apply_to_messages(self, copy: Copy, event: DurableEvent) -> None:
        match event:
            case server.MessageSent() | server.MessageEdited() | server.MessageDeleted():
                there = copy.messages.get(event.message.id)
                if there is None or there.version <= event.version:
                    copy.messages[event.message.id] = event.message
                root_id = event.message.thread_root_id
                count = None if isinstance(event, server.MessageEdited) else event.root_reply_count
                if root_id in copy.messages and count is not None:
                    root = copy.messages[root_id]
                    order = max(root.thread_order, event.message.thread_order)
                    copy.messages[root_id] = replace(root, reply_count=count, thread_order=order, version=event.version)
            case server.PollVoted():
                if (there := copy.messages.get(event.message_id)) is not None:
                    copy.messages[event.message_id] = replace(
                        there, poll_counts=event.poll_counts, poll_voters=event.poll_voters
                    )
            case server.MessageChanged():
                # The event does not contain the message. The client has to request it.
                self.unloaded.add(event.conversation_id)
            case server.MessageReacted() | server.MessageUnreacted():
                if (there := copy.messages.get(event.message_id)) is not None:
                    reactions = {**there.reactions, event.emoji: event.count}
                    copy.messages[event.message_id] = replace(
                        there, reactions={emoji: count for emoji, count in reactions.items() if count}
                    )
            case _:
                pass


def _touched(event: DurableEvent) -> set[MessageId]:
    match event:
        case server.MessageSent() | server.MessageEdited() | server.MessageDeleted():
            return {event.message.id} | ({event.message.thread_root_id} if event.message.thread_root_id else set())
        case server.MessageReacted() | server.MessageUnreacted() | server.PollVoted():
            return {event.message_id}
        case _:
            return set()
