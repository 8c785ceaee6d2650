"""Messages whose notifications are due. Conversations take turns, so that no conversation delays another.

A pass finds the participants of a conversation who receive notifications for its due messages, page by page. A page has
candidates, users with an endpoint, and the statement finds those who take part. One statement reads the first pages of
several conversations. Further pages, of large conversations, and failed pages are read one at a time, with pauses in
between. A large conversation also pauses before its next pass.

Messages stay here until their pass has ended, so one limit covers them all.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from protocol.ids import ConversationId, MessageId, UserId
from server.core.tally import Tally
from server.jobs.push_drops import Drops
from server.queries.push import FIRST, PushPage

MAX_WAITING = 10_000
"""Max waiting messages, per worker."""
MAX_OF_SENDER = 500
"""Max waiting messages per sender and worker, which is more than the default rate allows until they are due."""
MAX_TOGETHER = 50
"""Max messages of one sender in one pass. Older ones are dropped."""
MAX_IN_PASS = 100
"""Max messages in one pass. Those of other senders wait for the next pass."""
MAX_CONVERSATIONS = 20
"""Max conversations in one statement."""
MAX_MESSAGES = 200
"""Max messages in one statement, unless one conversation has more."""
FIRST_PAGE = 100
"""Candidates for each conversation in a first page."""
NEXT_PAGE = 500
"""Candidates in a further page."""
PAGE_PAUSE_FACTOR = 3
"""Pause after a further page, as a multiple of its duration. So large conversations do not occupy a connection all the
time.
"""
PAUSE_PER_CANDIDATE = 0.000_5
"""Pause of a conversation after a pass, per candidate in it, in seconds."""
MAX_PAUSE = 10.0
"""Max pause of a conversation after a pass, and max pause after a page, in seconds."""
MAX_TRIES = 3
"""Max attempts to read a page, before the messages of its pass are dropped."""
RETRY_SECONDS = 1.0
"""Pause after a failed page, in seconds."""


class _Waiting(NamedTuple):
    at: float
    sender_id: UserId


class _Pass:
    """The messages of a conversation's current pass, and its last candidate so far."""

    def __init__(self, message_ids: list[MessageId]) -> None:
        self.message_ids = message_ids
        self.after = FIRST
        self.asked = 0
        self.tries = 0


class _Conversation:
    def __init__(self) -> None:
        self.messages: dict[MessageId, _Waiting] = {}
        self.ready_at = 0.0
        self.now: _Pass | None = None


class DueMessages:
    """The waiting messages, by conversation and by sender."""

    def __init__(self, drops: Drops, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._drops = drops
        self._clock = clock
        self._conversations: dict[ConversationId, _Conversation] = {}
        self._senders: dict[UserId, dict[MessageId, ConversationId]] = {}
        self._most: Tally[UserId] = Tally()
        self._count = 0
        self._further: dict[ConversationId, _Pass] = {}
        self._further_at = 0.0

    def __len__(self) -> int:
        return self._count

    def add(self, conversation_id: ConversationId, sender_id: UserId, message_id: MessageId, *, seconds: float) -> None:
        """Add a message, which is due in `seconds`. If too many wait, the sender with the most loses the oldest. A
        message that waits already is not added again.
        """
        if message_id in self._senders.get(sender_id, ()):
            return
        if len(self._senders.get(sender_id, ())) >= MAX_OF_SENDER:
            self._drop(sender_id)
        elif self._count >= MAX_WAITING:
            self._drop(self._most.most())
        conversation = self._conversations.setdefault(conversation_id, _Conversation())
        conversation.messages[message_id] = _Waiting(self._clock() + seconds, sender_id)
        self._senders.setdefault(sender_id, {})[message_id] = conversation_id
        self._most.add(sender_id, 1)
        self._count += 1

    def begin(self, now: float) -> list[PushPage]:
        """Begin passes of conversations with messages due at `now`, those that have waited longest first. Return their
        first pages.
        """
        pages: list[PushPage] = []
        count = 0
        for conversation_id, conversation in list(self._conversations.items()):
            if conversation.now is not None or conversation.ready_at > now:
                continue
            if not conversation.messages:
                del self._conversations[conversation_id]  # its pause is over
                continue
            if next(iter(conversation.messages.values())).at > now:
                continue
            ids = self._choose(conversation, now)
            if pages and (len(pages) == MAX_CONVERSATIONS or count + len(ids) > MAX_MESSAGES):
                break
            conversation.now = _Pass(ids)
            pages.append(PushPage(conversation_id, FIRST, tuple(ids)))
            count += len(ids)
        return pages

    def further(self) -> PushPage | None:
        """Return the next further page, of the conversation that has waited longest. Return None if none may be read
        now.
        """
        if self._clock() < self._further_at:
            return None
        while self._further:
            conversation_id, one = next(iter(self._further.items()))
            messages = self._conversations[conversation_id].messages
            if ids := tuple(message_id for message_id in one.message_ids if message_id in messages):
                return PushPage(conversation_id, one.after, ids)
            self._end(conversation_id)  # its messages were dropped meanwhile
        return None

    def wait(self) -> float | None:
        """Return the seconds until a further page may be read, or None if none waits."""
        return max(0.0, self._further_at - self._clock()) if self._further else None

    def done(self, page: PushPage, after: UserId | None, *, limit: int, seconds: float) -> None:
        """Record that a page of `limit` candidates was read within `seconds`. `after` is the last one of it, or None
        at the end.
        """
        one = self._conversations[page.conversation_id].now
        assert one is not None  # noqa: S101 - a page that was returned has a pass
        if self._further.pop(page.conversation_id, None) is not None:
            self._further_at = self._clock() + min(MAX_PAUSE, PAGE_PAUSE_FACTOR * seconds)
        if after is None:
            self._end(page.conversation_id)
            return
        one.after = after
        one.asked += limit
        one.tries = 0
        self._further[page.conversation_id] = one

    def failed(self, page: PushPage) -> None:
        """Retry a page alone. After the last attempt, drop the messages of its pass."""
        one = self._conversations[page.conversation_id].now
        assert one is not None  # noqa: S101 - as above
        self._further.pop(page.conversation_id, None)
        self._further_at = self._clock() + RETRY_SECONDS
        one.tries += 1
        if one.tries < MAX_TRIES:
            self._further[page.conversation_id] = one
        else:
            self._drops.add("database", len(page.message_ids))
            self._end(page.conversation_id)

    def forget(self, now: float) -> None:
        """Delete due messages, because nobody has subscribed to notifications."""
        for conversation_id, conversation in list(self._conversations.items()):
            for message_id in [one for one, waiting in conversation.messages.items() if waiting.at <= now]:
                self._remove(conversation_id, message_id)
            if conversation.now is not None:
                self._end(conversation_id)
            elif not conversation.messages:
                del self._conversations[conversation_id]

    def _choose(self, conversation: _Conversation, now: float) -> list[MessageId]:
        """Return the messages of the next pass. Drop older ones of a sender with too many."""
        by_sender: dict[UserId, list[MessageId]] = {}
        for message_id, waiting in conversation.messages.items():
            if waiting.at <= now:
                by_sender.setdefault(waiting.sender_id, []).append(message_id)
        chosen: list[MessageId] = []
        for sender_id, ids in by_sender.items():
            if chosen and len(chosen) + min(len(ids), MAX_TOGETHER) > MAX_IN_PASS:
                break
            if len(ids) > MAX_TOGETHER:
                for message_id in ids[:-MAX_TOGETHER]:
                    self._remove(self._senders[sender_id][message_id], message_id)
                self._drops.add("replaced", len(ids) - MAX_TOGETHER)
            chosen += ids[-MAX_TOGETHER:]
        return chosen

    def _end(self, conversation_id: ConversationId) -> None:
        """End a pass. The conversation pauses, and then comes after all others."""
        conversation = self._conversations.pop(conversation_id)
        self._further.pop(conversation_id, None)
        one = conversation.now
        assert one is not None  # noqa: S101 - only a conversation with a pass gets here
        conversation.now = None
        self._conversations[conversation_id] = conversation
        for message_id in one.message_ids:
            self._remove(conversation_id, message_id)
        conversation.ready_at = self._clock() + min(MAX_PAUSE, PAUSE_PER_CANDIDATE * one.asked)
        if not one.asked and not conversation.messages:
            del self._conversations[conversation_id]

    def _drop(self, sender_id: UserId) -> None:
        """Drop the oldest message of a sender."""
        message_id, conversation_id = next(iter(self._senders[sender_id].items()))
        self._remove(conversation_id, message_id)
        self._drops.add("messages_full")

    def _remove(self, conversation_id: ConversationId, message_id: MessageId) -> None:
        waiting = self._conversations[conversation_id].messages.pop(message_id, None)
        if waiting is None:
            return
        theirs = self._senders[waiting.sender_id]
        del theirs[message_id]
        if not theirs:
            del self._senders[waiting.sender_id]
        self._most.add(waiting.sender_id, -1)
        self._count -= 1
