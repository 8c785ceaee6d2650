"""Messages whose notifications are due, conversation by conversation in turns: nobody's messages hold up another's.

A pass asks for which participants of a conversation its due messages are news, page by page. The first page is asked
for several conversations in one statement. Further pages, of large conversations, and pages that failed are asked one
at a time, with a rest in between; a large conversation also rests before its next pass.

All messages are kept here until their pass is over, so one bound holds for all.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from protocol.ids import ConversationId, MessageId, UserId
from server.core.tally import Tally
from server.jobs.push_drops import Drops
from server.queries.push import FIRST, PushPage

MAX_WAITING = 10_000
"""Max messages that wait, per worker."""
MAX_OF_SENDER = 500
"""Max messages of one sender that wait, per worker: more than the default rate brings until they are due."""
MAX_TOGETHER = 50
"""Max messages of one sender in one pass: the newest."""
MAX_IN_PASS = 100
"""Max messages in one pass; those of other senders wait for the next one."""
MAX_LOOKS = 20
"""Max conversations in one statement."""
MAX_MESSAGES = 200
"""Max messages in one statement, unless one conversation has more."""
PAGE = 100
"""Participants of each conversation in a first page."""
NEXT_PAGE = 500
"""Participants in a further page."""
REST = 3
"""Rest after a further page, as a multiple of its duration: large conversations occupy no connection all the time."""
REST_OF_PARTICIPANT = 0.000_5
"""Rest of a conversation after a pass, for each participant asked about, in seconds."""
MAX_REST = 10.0
"""Max rest of a conversation after a pass, and after a page, in seconds."""
MAX_TRIES = 3
"""Times that a page is asked for, before the messages of its pass are dropped."""
RETRY_SECONDS = 1.0
"""Rest after a page that failed, in seconds."""


class _Waiting(NamedTuple):
    at: float
    sender_id: UserId


class _Pass:
    """What is asked about a conversation now, and after which participant."""

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
    """The messages that wait, by conversation and by sender."""

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
        """Have a message looked at in so many seconds. If too many wait, the sender with most of them loses the
        oldest. One that waits already is looked at once.
        """
        if message_id in self._senders.get(sender_id, ()):
            return
        if len(self._senders.get(sender_id, ())) >= MAX_OF_SENDER:
            self._drop(sender_id)
        elif self._count >= MAX_WAITING:
            self._drop(self._most.most())
        place = self._conversations.setdefault(conversation_id, _Conversation())
        place.messages[message_id] = _Waiting(self._clock() + seconds, sender_id)
        self._senders.setdefault(sender_id, {})[message_id] = conversation_id
        self._most.add(sender_id, 1)
        self._count += 1

    def begin(self, now: float) -> list[PushPage]:
        """Begin passes of conversations with messages due at `now`, those that wait for longest first. Return their
        first pages.
        """
        looks: list[PushPage] = []
        count = 0
        for conversation_id, place in list(self._conversations.items()):
            if place.now is not None or place.ready_at > now:
                continue
            if not place.messages:
                del self._conversations[conversation_id]  # its rest is over
                continue
            if next(iter(place.messages.values())).at > now:
                continue
            ids = self._choose(place, now)
            if looks and (len(looks) == MAX_LOOKS or count + len(ids) > MAX_MESSAGES):
                break
            place.now = _Pass(ids)
            looks.append(PushPage(conversation_id, FIRST, tuple(ids)))
            count += len(ids)
        return looks

    def further(self) -> PushPage | None:
        """Return the next further page, of the conversation that waits for longest, or None if none may be asked for
        now.
        """
        if self._clock() < self._further_at:
            return None
        while self._further:
            conversation_id, one = next(iter(self._further.items()))
            messages = self._conversations[conversation_id].messages
            if ids := tuple(message_id for message_id in one.message_ids if message_id in messages):
                return PushPage(conversation_id, one.after, ids)
            self._end(conversation_id)  # they were dropped meanwhile
        return None

    def wait(self) -> float | None:
        """Return the seconds until a further page may be asked for, or None if none waits."""
        return max(0.0, self._further_at - self._clock()) if self._further else None

    def done(self, look: PushPage, after: UserId | None, *, limit: int, seconds: float) -> None:
        """Note that a page was asked for, of `limit` participants, in so many seconds. `after` is where the next one
        begins.
        """
        one = self._conversations[look.conversation_id].now
        assert one is not None  # noqa: S101 - the pass of a page that was returned ends here
        if self._further.pop(look.conversation_id, None) is not None:
            self._further_at = self._clock() + min(MAX_REST, REST * seconds)
        if after is None:
            self._end(look.conversation_id)
            return
        one.after = after
        one.asked += limit
        one.tries = 0
        self._further[look.conversation_id] = one

    def failed(self, look: PushPage) -> None:
        """Have a page asked for again, by itself. At the last try, drop the messages of its pass."""
        one = self._conversations[look.conversation_id].now
        assert one is not None  # noqa: S101 - as above
        self._further.pop(look.conversation_id, None)
        self._further_at = self._clock() + RETRY_SECONDS
        one.tries += 1
        if one.tries < MAX_TRIES:
            self._further[look.conversation_id] = one
        else:
            self._drops.add("database", len(look.message_ids))
            self._end(look.conversation_id)

    def forget(self, now: float) -> None:
        """Forget what is due: nobody wants notifications."""
        for conversation_id, place in list(self._conversations.items()):
            for message_id in [one for one, waiting in place.messages.items() if waiting.at <= now]:
                self._remove(conversation_id, message_id)
            if place.now is not None:
                self._end(conversation_id)
            elif not place.messages:
                del self._conversations[conversation_id]

    def _choose(self, place: _Conversation, now: float) -> list[MessageId]:
        """Return the messages of the next pass, and forget the older ones of a sender who has too many."""
        by_sender: dict[UserId, list[MessageId]] = {}
        for message_id, waiting in place.messages.items():
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
        """End a pass. The conversation rests, behind all others."""
        place = self._conversations.pop(conversation_id)
        self._further.pop(conversation_id, None)
        one = place.now
        assert one is not None  # noqa: S101 - a pass is what ends
        place.now = None
        self._conversations[conversation_id] = place
        for message_id in one.message_ids:
            self._remove(conversation_id, message_id)
        place.ready_at = self._clock() + min(MAX_REST, REST_OF_PARTICIPANT * one.asked)
        if not one.asked and not place.messages:
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
