"""Read and delivered positions whose events may have been lost. They have no version to compare."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Protocol

from protocol.codec import encode, text_frame
from protocol.ids import ConversationId, UserId
from protocol.server import MessageDelivered, MessageRead
from server.hub.entries import NOBODY
from server.hub.online_users import OnlineUsers
from server.hub.rounds import pause_after
from server.hub.topics import Topics

MARGIN_SECONDS = 20.0
"""Time before a loss from which positions are read again, in seconds. The time of a position is the start of its
statement, which may take ten seconds. A loss is noticed, and the comparison starts, some seconds after the loss.
"""
BEATS = 4
"""Number of last heartbeats of this worker before a loss that count as after it. A worker that was suspended sends some
before it notices that its bus was interrupted.
"""
PAIRS = 1_000
"""Max participants of large conversations per statement."""
FRAMES = 200
"""Max frames that are made in one turn of the loop."""


class ReceiptStore(Protocol):
    """Queries about positions. `PostgresHubStore` implements them. `since` is a time of the loop."""

    async def moved(
        self, conversation_ids: Sequence[ConversationId], *, since: float
    ) -> tuple[Iterator[tuple[MessageRead | MessageDelivered, Collection[UserId]]], Sequence[ConversationId]]:
        """Return the events of positions that have moved, each with the participants who may not receive it. The second
        value has those of the conversations that are too large to share positions.
        """

    async def moved_of(
        self, pairs: Sequence[tuple[ConversationId, UserId]], *, since: float
    ) -> Sequence[MessageRead | MessageDelivered]:
        """Return the events of these participants' positions that have moved."""


class MissedReceipts:
    """Delivers positions that have moved since shortly before a loss to the sockets of this worker. Clients ignore
    those that they have, by their revision.
    """

    def __init__(self, store: ReceiptStore, topics: Topics, online_users: OnlineUsers) -> None:
        self._store = store
        self._topics = topics
        self._online_users = online_users
        self._loop = asyncio.get_running_loop()
        self._beats = deque([self._loop.time()], maxlen=BEATS)
        self._since = self._since_of_round = math.inf

    def beat(self) -> None:
        """Note that this worker runs. It is called with each heartbeat."""
        self._beats.append(self._loop.time())

    def lost(self) -> None:
        """Note that events may have been lost. The next round compares all conversations."""
        self._since = min(self._since, self._recent())

    def begin(self) -> list[ConversationId]:
        """Begin a round. Return its conversations, which are none if nothing was lost."""
        self._since_of_round, self._since = self._since, math.inf
        return [] if self._since_of_round == math.inf else self._topics.ids()

    async def compare(self, conversation_ids: Sequence[ConversationId]) -> None:
        """Deliver the positions of conversations that may have been lost."""
        if not conversation_ids:
            return
        since = min(self._since_of_round, self._recent())
        try:
            receipts, crowds = await self._store.moved(conversation_ids, since=since)
            while some := list(islice(receipts, FRAMES)):
                for event, blind in some:
                    self._deliver(event, blind)
                await asyncio.sleep(0)
            pairs = ((one, user_id) for one in crowds for user_id in self._topics.user_ids(one))
            while some_pairs := list(islice(pairs, PAIRS)):
                began = time.monotonic()
                for own in await self._store.moved_of(some_pairs, since=since):
                    self._online_users.write(own.user_id, text_frame(encode(own)))
                await pause_after(began)
        except Exception:
            self._since = min(self._since, since)
            raise

    def _recent(self) -> float:
        return self._beats[0] - MARGIN_SECONDS

    def _deliver(self, event: MessageRead | MessageDelivered, blind: Collection[UserId]) -> None:
        frame = text_frame(encode(event))
        if blind:
            for user_id in self._topics.user_ids(event.conversation_id).difference(blind):
                self._online_users.write(user_id, frame)
        else:
            self._topics.accept(event.conversation_id, 0, frame, NOBODY)
