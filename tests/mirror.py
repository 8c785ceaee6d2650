"""What a client knows, built from nothing but what it was told; and the same, read from PostgreSQL."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import asyncpg
import msgspec

from protocol import server
from protocol.ids import ConversationId, MessageId, UserId
from protocol.server import DurableEvent, ServerFrame
from protocol.values import Conversation, ConversationView, Message, Participant

replace = msgspec.structs.replace


@dataclass
class Copy:
    """One conversation."""

    version: int
    conversation: Conversation
    participants: dict[UserId, Participant] = field(default_factory=dict)
    messages: dict[MessageId, Message] = field(default_factory=dict)
    ignored: list[DurableEvent] = field(default_factory=list)


class Mirror:
    """All conversations of one user. Raises AssertionError when an event is missing, early, late or double."""

    def __init__(self) -> None:
        self.copies: dict[ConversationId, Copy] = {}
        self.unloaded: set[ConversationId] = set()
        self.epoch = ""

    @property
    def versions(self) -> dict[ConversationId, int]:
        """What a `resume` names: those that are complete."""
        return {one: copy.version for one, copy in self.copies.items() if one not in self.unloaded}

    def hear(self, frame: ServerFrame) -> None:
        """Apply a frame."""
        match frame:
            case server.Ready():
                self.epoch = frame.epoch
            case server.Conversations():
                for view in frame.conversations:
                    self._begin(view)
            case server.ConversationJoined() | server.StartOver():
                self._begin(frame.view)
            case server.ConversationLeft():
                self.copies.pop(frame.conversation_id, None)
                self.unloaded.discard(frame.conversation_id)
            case server.Changes():
                copy = self.copies[frame.conversation_id]
                assert frame.since <= copy.version <= frame.version, (frame.since, copy.version, frame.version)
                for event in frame.events:
                    self._apply(copy, event)
                copy.version = frame.version
            case (
                server.MessageSent() | server.MessageEdited() | server.MessageDeleted() | server.MessageReacted()
                | server.MessageUnreacted() | server.ConversationUpdated() | server.ParticipantChanged()
            ):  # fmt: skip
                copy = self.copies[frame.conversation_id]
                assert frame.version == copy.version + 1, f"expected {copy.version + 1}, got {frame}"
                self._apply(copy, frame)
                copy.version = frame.version
            case _:
                pass

    def load(self, conversation_id: ConversationId, page: server.MessagePage) -> None:
        """Take over a page of history."""
        copy = self.copies[conversation_id]
        new = [message for message in page.messages if message.id not in copy.messages]
        copy.messages.update({message.id: message for message in new})
        ids = {message.id for message in new}
        for event in copy.ignored:
            if event.version > page.version and not ids.isdisjoint(_touched(event)):
                self._apply_to_messages(copy, event)

    def load_participants(self, conversation_id: ConversationId, entries: Iterable[server.ParticipantEntry]) -> None:
        """Take over a page of participants."""
        copy = self.copies[conversation_id]
        for entry in entries:
            there = copy.participants.get(entry.participant.user_id)
            if there is None or there.version < entry.participant.version:
                copy.participants[entry.participant.user_id] = entry.participant

    def _begin(self, view: ConversationView) -> None:
        self.copies[view.conversation.id] = Copy(version=view.version, conversation=view.conversation)
        self.unloaded.add(view.conversation.id)

    def _apply(self, copy: Copy, event: DurableEvent) -> None:
        copy.ignored.append(event)
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
                    copy.messages[root_id] = replace(copy.messages[root_id], reply_count=count, version=event.version)
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
        case server.MessageReacted() | server.MessageUnreacted():
            return {event.message_id}
        case _:
            return set()


async def from_database(db: "asyncpg.Connection[asyncpg.Record]", conversation_id: ConversationId) -> Copy:
    """Return a conversation as PostgreSQL has it."""
    version, text = await db.fetchrow(
        "SELECT version, conversation_json(c) FROM conversation c WHERE id = $1", conversation_id
    ) or (0, "")
    copy = Copy(version=version, conversation=msgspec.json.decode(text, type=Conversation))
    for row in await db.fetch("SELECT message_json(m) FROM message m WHERE conversation_id = $1", conversation_id):
        message = msgspec.json.decode(row[0], type=Message)
        copy.messages[message.id] = message
    for row in await db.fetch(
        "SELECT participant_json(p) FROM conversation_participant p WHERE conversation_id = $1 AND status = 'active'",
        conversation_id,
    ):
        participant = msgspec.json.decode(row[0], type=Participant)
        copy.participants[participant.user_id] = participant
    return copy


def assert_same(copy: Copy, truth: Copy) -> None:
    """Compare, with words that help."""
    assert copy.version == truth.version
    assert copy.conversation == truth.conversation
    active = {user_id: one for user_id, one in copy.participants.items() if one.status == "active"}
    assert active == truth.participants
    assert copy.messages.keys() == truth.messages.keys()
    for message_id, message in truth.messages.items():
        assert copy.messages[message_id] == message
