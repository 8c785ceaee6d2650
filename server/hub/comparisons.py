"""Comparisons: when a worker compares what it has delivered with PostgreSQL.

The section "How missed events are found" in docs/map.md lists the signs that start one.
"""

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from protocol.ids import ConversationId, UserId
from server.core.periodic import end, every
from server.hub.bus import Bus
from server.hub.entries import ids_of, log_ignored
from server.hub.online_users import OnlineUsers
from server.hub.peers import HEARTBEAT_SECONDS, Kind, Peers
from server.hub.receipts import MissedReceipts, ReceiptStore
from server.hub.rounds import Rounds
from server.hub.topics import Topics
from server.hub.unsure import Unsure
from server.hub.watchers import Watchers

COMPARE_SECONDS = 60.0
COMPARE_USERS_SECONDS = 30.0
"""Intervals at which all conversations, and all users, are compared with PostgreSQL while the bus is up, in seconds.
The comparisons find events that were lost without a sign.
"""
COMPARE_SECONDS_BESIDE_SILENT = 5.0
"""The same for conversations, while a worker is silent on the bus."""
AFTER_END_SECONDS = (0.0, 4.0, 12.0)
"""Delays of the comparisons after another worker disappeared, in seconds. PostgreSQL finishes the statements of a
worker that was killed. It cancels those that store messages after two seconds, and others after ten.
"""
LOSSES_SECONDS = 5.0
"""Min interval between two comparisons because of losses, in seconds. A worker whose connection to Redis is bad reports
them every second.
"""
CONNECTED_SECONDS = 5.0
"""Interval at which PostgreSQL is asked for the workers that are connected to it, in seconds."""
MAX_JITTER_SECONDS = 0.5
"""Max delay of the comparison after an outage, or after the end of another worker, in seconds. It is random, because
all workers notice these together.
"""


class WorkerStore(ReceiptStore, Protocol):
    """Queries about workers and positions. `PostgresHubStore` implements them."""

    async def workers(self) -> Collection[bytes]:
        """Return the ids of the workers that are connected to the database. Earlier releases have an empty id."""


class Comparisons:
    """All comparisons of one worker, of conversations and of users."""

    def __init__(
        self,
        store: WorkerStore,
        bus: Bus,
        topics: Topics,
        online_users: OnlineUsers,
        watchers: Watchers,
        *,
        publish: Callable[[Kind, bytes], None],
        worker: bytes,
    ) -> None:
        """`publish` publishes a message to the other workers. `worker` is the id of this one."""
        self._store = store
        self._bus = bus
        self._topics = topics
        self._online_users = online_users
        self._watchers = watchers
        self._publish = publish
        self._worker = worker
        self._peers = Peers(bus, publish=publish, has_losses=self.after_losses, has_ended=self._after_end)
        self._topic_rounds = Rounds(
            topics.ids, topics.compare, seconds=self._topics_seconds, is_urgent=self._is_bus_down
        )
        self._user_rounds = Rounds(
            online_users.ids, online_users.compare, seconds=lambda: COMPARE_USERS_SECONDS, is_urgent=self._is_bus_down
        )
        self._receipts = MissedReceipts(store, topics, online_users)
        self._receipt_rounds = Rounds(
            self._receipts.begin, self._receipts.compare, seconds=lambda: COMPARE_SECONDS, is_urgent=lambda: False
        )
        self._unsure_topics: Unsure[ConversationId] = Unsure()
        self._unsure_users: Unsure[UserId] = Unsure()
        self._is_beside_silent = False
        self._compares_losses_at = -LOSSES_SECONDS
        self._has_been_up = False
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Receive the messages of other workers, and start comparing."""
        await self._peers.start()
        self._tasks = [
            asyncio.create_task(self._topic_rounds.run()),
            asyncio.create_task(self._user_rounds.run()),
            asyncio.create_task(self._receipt_rounds.run()),
            asyncio.create_task(every(HEARTBEAT_SECONDS, self._beat)),
            asyncio.create_task(every(CONNECTED_SECONDS, self._check_connected_workers, is_spread=True)),
        ]

    async def close(self) -> None:
        """Stop, and publish that this worker leaves."""
        await end(self._tasks)
        self._peers.leave()

    # --------------------------------------------------------------------------------------------------- signs

    def soon(self) -> None:
        """Compare everything now, because events may have been missed."""
        self._watchers.missed_all()
        self._start_rounds()

    def topics_soon(self) -> None:
        """Compare all conversations now, because the changes of one could not be read."""
        self._topic_rounds.soon()

    def after_outage(self) -> None:
        """Compare everything, because the bus is up again. It is also called when the bus is up for the first time."""
        self._peers.report()
        if self._has_been_up:
            self._soon_with_jitter()
        else:
            self._has_been_up = True
            self.soon()

    def after_losses(self) -> None:
        """Compare everything, because events were lost that another worker published."""
        now = self._loop.time()
        if self._compares_losses_at <= now:  # otherwise a comparison follows already
            delay = max(0.0, self._compares_losses_at + LOSSES_SECONDS - now)
            self._compares_losses_at = now + delay
            self._loop.call_later(delay, self._soon_with_jitter)

    def after_unknown_outcome(self, user_id: UserId, conversation_id: ConversationId | None) -> None:
        """Make all workers compare a user and a conversation some seconds later, because the outcome of a write is
        unknown. If it was committed, nobody has published its events.
        """
        self._unsure_users.add(user_id)
        if conversation_id is not None:
            self._unsure_topics.add(conversation_id)

    def receive(self, kind: int, content: bytes, worker: bytes) -> None:
        """Handle a message of another worker."""
        if kind in {Kind.HEARTBEAT, Kind.GOODBYE}:
            self._peers.receive(kind, content, worker)
        elif kind == Kind.RECHECK_CONVERSATIONS:
            self._recheck_conversations([ConversationId(one) for one in ids_of(content)])
        elif kind == Kind.RECHECK_USERS:
            self._recheck_users([UserId(one) for one in ids_of(content)])
        else:
            log_ignored("its kind is unknown")

    def _after_end(self) -> None:
        for seconds in AFTER_END_SECONDS:
            self._loop.call_later(seconds, self._soon_with_jitter)

    def _soon_with_jitter(self) -> None:
        self._watchers.missed_all()
        delay = random.random() * MAX_JITTER_SECONDS  # noqa: S311 - it spreads load, and needs no secrecy
        self._loop.call_later(delay, self._start_rounds)

    def _start_rounds(self) -> None:
        self._topic_rounds.soon()
        self._user_rounds.soon()
        self._receipts_soon()

    def _receipts_soon(self) -> None:
        self._receipts.lost()
        self._receipt_rounds.soon()

    def _recheck_conversations(self, conversation_ids: Sequence[ConversationId]) -> None:
        followed = self._topics.followed(conversation_ids)
        self._topic_rounds.first(followed)
        self._receipt_rounds.first(followed)

    def _recheck_users(self, user_ids: Sequence[UserId]) -> None:
        self._user_rounds.first(self._online_users.online(user_ids))
        for user_id in user_ids:
            self._watchers.missed(user_id)

    def _topics_seconds(self) -> float:
        return min(COMPARE_SECONDS, COMPARE_SECONDS_BESIDE_SILENT) if self._is_beside_silent else COMPARE_SECONDS

    def _is_bus_down(self) -> bool:
        return not self._bus.is_up

    # --------------------------------------------------------------------------------------------------- jobs

    async def _beat(self) -> None:
        self._peers.beat()
        self._receipts.beat()
        if self._is_bus_down():
            self._start_rounds()
        if conversation_ids := self._unsure_topics.due():
            self._publish(Kind.RECHECK_CONVERSATIONS, b"".join(one.bytes for one in conversation_ids))
            self._recheck_conversations(conversation_ids)
        if user_ids := self._unsure_users.due():
            self._publish(Kind.RECHECK_USERS, b"".join(one.bytes for one in user_ids))
            self._recheck_users(user_ids)

    async def _check_connected_workers(self) -> None:
        """Compare often while a worker is connected to PostgreSQL whose heartbeats do not arrive."""
        workers = set(await self._store.workers())
        was_beside_silent = self._is_beside_silent
        self._is_beside_silent = not workers - {self._worker} <= self._peers.workers
        if self._is_beside_silent:
            self._receipts_soon()
        if self._is_beside_silent and not was_beside_silent:
            self._topic_rounds.soon()
