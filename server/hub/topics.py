"""Topics: the conversations that this worker follows, and the version up to which each is delivered.

A durable event is delivered once, in the order of its conversation's versions. An early one is held until the events
before it arrive or are fetched. Events of this worker's handlers, of the bus and of PostgreSQL all pass through
`accept`.

In a crowd, changes of participants, reactions and votes are gathered, and leave together once a second
(`server/core/crowds.py`). Messages do not wait. The gathered changes precede them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from uuid import UUID

from protocol.codec import encode, payload, text_frame
from protocol.errors import ErrorCode, Refused
from protocol.ids import EVERYONE, ConversationId, UserId
from protocol.limits import MAX_SHARED_PARTICIPANTS
from protocol.server import Changes, ConversationLeft
from server.core.crowds import CROWD_SECONDS, Change
from server.core.errors import log_failure
from server.hub.backlog import Backlog
from server.hub.bus import Bus
from server.hub.delivery_times import DeliveryTimes
from server.hub.entries import NOBODY
from server.hub.gathered import Gathered
from server.hub.online_users import OnlineUsers, Socket
from server.hub.rounds import follow_up

GAP_SECONDS = 0.1
"""Delay before the events before an early one are fetched, in seconds."""
FETCHES_AT_ONCE = 4
"""Max concurrent fetches that a comparison starts. After an outage many conversations have changed, and frames of
clients would wait behind all of their fetches.
"""
MAX_EARLY = 256
"""Max early events that are kept, per conversation. Others are fetched."""
LINGER_SECONDS = 30.0
"""Time for which the worker follows a conversation without sockets, in seconds."""
MANY_SOCKETS, WRITE_PAUSE_FACTOR = 50, 2.0
"""With at least `MANY_SOCKETS`, a busy conversation pauses after a write for `WRITE_PAUSE_FACTOR` times its duration.
"""

log = logging.getLogger(__name__)


class Fetched(NamedTuple):
    """A `changes` event, the version that it leads to, and the users who left by it."""

    changes: Changes
    version: int
    gone: Sequence[UserId]


class ConversationStore(Protocol):
    """Queries about conversations. `PostgresHubStore` implements them."""

    async def since(self, conversation_id: ConversationId, version: int) -> Fetched | None:
        """Return the changes after a version, or a first part of them. Return None if there are none."""

    async def versions(self, conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
        """Return the versions of conversations."""


class Topic:
    """A conversation that this worker follows."""

    __slots__ = (
        "behind", "changed_at", "channel", "delivered", "delivery_times", "early", "fetch", "gathered", "gathers_until",
        "id", "joining", "opening", "pending", "quiet_at", "release", "rests_until", "sockets",
    )  # fmt: skip

    def __init__(self, conversation_id: ConversationId) -> None:
        self.id = conversation_id
        self.channel = channel(conversation_id)
        self.delivered = 0
        self.sockets: dict[Socket, Callable[[bytes], None]] = {}
        # Sockets that were sent a version which is not written to the others yet. They receive later events only.
        self.joining: dict[Socket, int] = {}
        # Sockets that are reading a version which may be outdated by then, with the events delivered meanwhile.
        self.behind: dict[Socket, Backlog] = {}
        self.early: dict[int, tuple[bytes, bytes]] = {}
        self.pending: list[bytes] = []
        # Delivered changes of a crowd that are not written yet. They are later than `pending`.
        self.gathered: Gathered | None = None
        self.gathers_until = 0.0
        self.release: asyncio.TimerHandle | None = None
        self.delivery_times: DeliveryTimes | None = None
        self.fetch: asyncio.Task[None] | None = None
        self.opening: asyncio.Task[None] | None = None
        self.quiet_at = 0.0
        self.changed_at = 0.0
        self.rests_until = 0.0


class Topics:
    """All topics of this worker."""

    def __init__(
        self,
        store: ConversationStore,
        bus: Bus,
        online_users: OnlineUsers,
        *,
        flush_soon: Callable[[], None],
        doubt: Callable[[UserId, ConversationId], None],
        compare_soon: Callable[[], None],
    ) -> None:
        """`flush_soon` is called when `flush` has something to write in this turn of the loop. `doubt` is called with
        each user who leaves a conversation, and with the conversation, because the user may see fewer people.
        `compare_soon` is called when missing events could not be read.
        """
        self._store = store
        self._bus = bus
        self._online_users = online_users
        self._flush_soon = flush_soon
        self._doubt = doubt
        self._compare_soon = compare_soon
        self._topics: dict[ConversationId, Topic] = {}
        self._dirty: list[Topic] = []
        self._loop = asyncio.get_running_loop()
        self.delivered = 0
        self.fetched = 0

    def __len__(self) -> int:
        return len(self._topics)

    # -------------------------------------------------------------------------------- topics and their sockets

    async def open(self, conversation_ids: Iterable[ConversationId]) -> None:
        """Follow conversations. After this returns, no later event of theirs is missed."""
        now = self._loop.time()
        new: list[Topic] = []
        waiting: set[asyncio.Task[None]] = set()
        for conversation_id in conversation_ids:
            topic = self._topics.get(conversation_id)
            if topic is None:
                topic = self._topics[conversation_id] = Topic(conversation_id)
                new.append(topic)
            elif topic.opening is not None:
                waiting.add(topic.opening)
            topic.quiet_at = now
        if new:
            opening = asyncio.create_task(self._open(new))
            waiting.add(opening)
            for topic in new:
                topic.opening = opening
        for task in waiting:
            # A caller that disconnects must not cancel the opening of the others.
            await asyncio.shield(task)

    async def _open(self, topics: list[Topic]) -> None:
        try:
            await self._bus.subscribe([topic.channel for topic in topics])
            versions = await self._store.versions([topic.id for topic in topics])
        except BaseException:
            for topic in topics:
                self._close(topic)
            raise
        for topic in topics:
            topic.opening = None
            # Opening may have taken long, and the callers that waited for it attach next.
            topic.quiet_at = self._loop.time()
            # Events that the bus delivered meanwhile are included in the version, or are early.
            topic.delivered = versions.get(topic.id, 0)
            self._drain(topic)

    def attach(self, socket: Socket, conversation_id: ConversationId, version: int) -> bool:
        """Deliver the events after `version` to a socket. Return False if some of them were delivered already.

        Raises Refused while the topic is opening, which takes long only if PostgreSQL is slow.
        """
        topic = self._topics.get(conversation_id)
        if topic is None or topic.opening is not None:
            raise Refused(
                ErrorCode.UNAVAILABLE,
                "The conversation is still loading. Retry after `retry_after_ms`.",
                retry_after_ms=1_000,
            )
        missed: Sequence[bytes] | None = ()
        if topic.delivered > version:
            missed = topic.behind[socket].after(version) if socket in topic.behind else None
            if missed is None:
                return False
        self._flush(topic)
        socket.attached.add(conversation_id)
        if missed:
            self.delivered += len(missed)
            socket.write(b"".join(missed))
        if topic.delivered < version or topic.gathered is not None:
            topic.joining[socket] = max(topic.delivered, version)
        else:
            topic.sockets[socket] = socket.write
        return True

    @contextmanager
    def catching_up(self, socket: Socket, conversation_id: ConversationId) -> Iterator[None]:
        """Keep events for a socket that are delivered during the block. After a read of a version in the block,
        `attach` has the later ones. In a busy conversation there always are some.
        """
        topic = self._topics.get(conversation_id)
        if topic is not None:
            topic.behind[socket] = Backlog()
        try:
            yield
        finally:
            if topic is not None:
                topic.behind.pop(socket, None)

    def detach(self, socket: Socket, conversation_id: ConversationId) -> None:
        """Stop delivering events of a conversation to a socket."""
        socket.attached.discard(conversation_id)
        if (topic := self._topics.get(conversation_id)) is not None:
            self._flush(topic)
            topic.sockets.pop(socket, None)
            topic.joining.pop(socket, None)
            topic.quiet_at = self._loop.time()

    def recent(self, conversation_ids: Iterable[ConversationId], *, since: float) -> dict[ConversationId, int]:
        """Return the delivered versions of those conversations that had an event after `since`, which is a time of the
        loop.
        """
        topics = [self._topics[conversation_id] for conversation_id in conversation_ids]
        for topic in topics:
            self._flush(topic)  # a delivered version that is not written yet must not look lost
        return {
            topic.id: topic.delivered if topic.gathered is None else topic.gathered.since
            for topic in topics
            if topic.changed_at > since
        }

    def is_crowd(self, conversation_id: ConversationId) -> bool:
        """Whether a conversation is a crowd at this worker."""
        topic = self._topics.get(conversation_id)
        return topic is not None and _is_crowd(topic)

    # ---------------------------------------------------------------------------------------- order of versions

    def accept(self, conversation_id: ConversationId, version: int, frame: bytes, gone: bytes) -> None:
        """Deliver an event once, when its version is next. Then stop delivery to the user `gone`. Version 0 is an
        ephemeral event.
        """
        topic = self._topics.get(conversation_id)
        if topic is None:
            return
        if version == 0:
            self._enqueue(topic, frame)
            for socket in topic.joining:
                socket.write(frame)
        elif version == topic.delivered + 1 and topic.opening is None:
            self._deliver(topic, version, frame, gone)
            if topic.early:
                self._drain(topic)
        elif version > topic.delivered:
            if len(topic.early) < MAX_EARLY:
                topic.early[version] = (frame, gone)
            if topic.opening is None:
                self._fetch_soon(topic, GAP_SECONDS)

    def _drain(self, topic: Topic) -> None:
        for version in [version for version in topic.early if version <= topic.delivered]:
            del topic.early[version]
        while (held := topic.early.pop(topic.delivered + 1, None)) is not None:
            self._deliver(topic, topic.delivered + 1, *held)
        if topic.early:
            self._fetch_soon(topic, GAP_SECONDS)

    def _deliver(self, topic: Topic, version: int, frame: bytes, gone: bytes) -> None:
        self._advance(topic, version, frame, map(payload, (frame,)))
        if gone != NOBODY:
            self._drop(topic, UserId(UUID(bytes=gone)))

    def _advance(self, topic: Topic, version: int, frame: bytes, events: Iterable[bytes]) -> None:
        """Deliver a WebSocket frame that leads to `version`. `events` are its durable events, as JSON."""
        since = topic.delivered
        for backlog in topic.behind.values():
            backlog.add(since, version, frame)
        if topic.delivery_times is None:
            topic.delivery_times = DeliveryTimes(since)
        topic.delivery_times.add(version, time.time())
        topic.delivered = version
        topic.changed_at = self._loop.time()
        is_large = len(topic.sockets) + len(topic.joining) > MAX_SHARED_PARTICIPANTS
        if not is_large or not self._gather(topic, since, events):
            self._write(topic, version, frame)

    def _write(self, topic: Topic, version: int, frame: bytes) -> None:
        """Write a frame that leads to `version` with the next flush."""
        self._release(topic)
        ready = [socket for socket, since in topic.joining.items() if since < version]
        if ready:
            # Pending frames are older than the versions of these sockets.
            self._flush(topic)
            for socket in ready:
                del topic.joining[socket]
                topic.sockets[socket] = socket.write
        self._enqueue(topic, frame)

    def _gather(self, topic: Topic, since: int, events: Iterable[bytes]) -> bool:
        """Gather the events after the version `since`, if the conversation is a crowd. Return False if they have to be
        written as they are: messages, and changes after `CROWD_SECONDS` without one.
        """
        now = self._loop.time()
        changes = [(Change.of(event), event) for event in events]
        can_wait = all(change.subject is not None for change, _ in changes)
        if len(changes) != 1:
            self._release(topic)  # together they might not fit into a frame
        elif not can_wait:
            return False
        elif topic.gathered is None and now >= topic.gathers_until:
            topic.gathers_until = now + CROWD_SECONDS
            return False
        if topic.gathered is None:
            if not _is_crowd(topic):
                return False
            topic.gathered = Gathered(topic.id, since)
        topic.gathered.add(topic.delivered, changes)
        if not can_wait or topic.gathered.is_full or now >= topic.gathers_until:
            self._release(topic)
        elif topic.release is None:
            topic.release = self._loop.call_later(topic.gathers_until - now, self._release, topic)
        return True

    def _release(self, topic: Topic) -> None:
        """Write the gathered changes. Sockets that have some of them already receive the others."""
        gathered, topic.gathered = topic.gathered, None
        if topic.release is not None:
            topic.release.cancel()
            topic.release = None
        if gathered is None:
            return
        self._flush(topic)
        topic.gathers_until = self._loop.time() + CROWD_SECONDS
        for socket, write in topic.sockets.items():
            write(gathered.frame(socket.user_id, gathered.since))
        self.delivered += len(topic.sockets)
        for socket, since in list(topic.joining.items()):
            if since <= gathered.version:
                del topic.joining[socket]
                topic.sockets[socket] = socket.write
            if since < gathered.version:
                self.delivered += 1
                socket.write(gathered.frame(socket.user_id, since))

    def _drop(self, topic: Topic, user_id: UserId) -> None:
        sockets = (
            [*topic.sockets, *topic.joining, *topic.behind]
            if user_id == EVERYONE
            else self._online_users.sockets(user_id)
        )
        for socket in sockets:
            topic.behind.pop(socket, None)  # the socket checks again whether its user may read
            if topic.id in socket.attached:
                self.detach(socket, topic.id)
                socket.write(text_frame(encode(ConversationLeft(conversation_id=topic.id))))
                self._doubt(socket.user_id, topic.id)

    # -------------------------------------------------------------------------------- changes read from PostgreSQL

    def _fetch_soon(self, topic: Topic, delay: float) -> None:
        if topic.fetch is None:
            topic.fetch = asyncio.create_task(self._fetch(topic, delay))

    async def _fetch(self, topic: Topic, delay: float) -> None:
        """Deliver missing events from PostgreSQL, as one or more `changes` events."""
        await asyncio.sleep(delay)
        is_filled = False
        try:
            is_filled = await self._fill(topic)
        except Exception as error:  # noqa: BLE001 - the database is away, and the next comparison finds the gap again
            log_failure(log, f"reading the changes of {topic.id}", error)
            self._compare_soon()
        finally:
            topic.fetch = None
        if is_filled and topic.early:
            # An early event behind another gap arrived during this fetch.
            self._fetch_soon(topic, GAP_SECONDS)

    async def _fill(self, topic: Topic) -> bool:
        """Deliver the events before the current early ones. Return False if PostgreSQL has none."""
        highest = max(topic.early, default=topic.delivered + 1)
        while topic.delivered < highest:
            since = topic.delivered
            fetched = await self._store.since(topic.id, since)
            if since != topic.delivered:
                continue  # some of it was delivered meanwhile
            if fetched is None or fetched.version <= since:
                return False
            self.fetched += 1
            for user_id in fetched.gone:
                self._drop(topic, user_id)  # before the changes, some of which were made after the user left
            frame = text_frame(encode(fetched.changes))
            self._advance(topic, fetched.version, frame, map(encode, fetched.changes.events))
            self._drain(topic)
        return True

    def ids(self) -> list[ConversationId]:
        """Return all followed conversations. Stop following those that have been without sockets for a while."""
        self._close_quiet()
        return list(self._topics)

    def user_ids(self, conversation_id: ConversationId) -> set[UserId]:
        """Return the users with sockets that are attached to a conversation."""
        topic = self._topics.get(conversation_id)
        return set() if topic is None else {socket.user_id for socket in (*topic.sockets, *topic.joining)}

    def followed(self, conversation_ids: Iterable[ConversationId]) -> list[ConversationId]:
        """Return those conversations that are followed."""
        return [one for one in conversation_ids if one in self._topics]

    async def compare(self, conversation_ids: Sequence[ConversationId]) -> None:
        """Compare the positions of conversations with PostgreSQL, and fetch missed events."""
        versions = await self._store.versions(conversation_ids)
        if self._bus.is_up and any(self._is_behind(*one) for one in versions.items()):
            await asyncio.sleep(GAP_SECONDS)  # the events are probably on their way
        await follow_up(self._fetches(versions), at_once=FETCHES_AT_ONCE)

    def _is_behind(self, conversation_id: ConversationId, version: int) -> bool:
        topic = self._topics.get(conversation_id)
        return topic is not None and topic.opening is None and version > topic.delivered

    def _fetches(self, versions: Mapping[ConversationId, int]) -> Iterator[asyncio.Task[None] | None]:
        for conversation_id, version in versions.items():
            if self._is_behind(conversation_id, version):
                topic = self._topics[conversation_id]
                self._fetch_soon(topic, 0)
                yield topic.fetch

    def delivered_at(self, conversation_id: ConversationId, version: int) -> float | None:
        """Return when this worker delivered a version, as `DeliveryTimes.of` does."""
        topic = self._topics.get(conversation_id)
        return None if topic is None or topic.delivery_times is None else topic.delivery_times.of(version)

    def close(self) -> None:
        """Cancel fetches and openings."""
        for topic in self._topics.values():
            for task in (topic.fetch, topic.opening, topic.release):
                if task is not None:
                    task.cancel()

    def _close_quiet(self) -> None:
        before = self._loop.time() - LINGER_SECONDS
        for topic in list(self._topics.values()):
            if not topic.sockets and not topic.joining and topic.opening is None and topic.quiet_at < before:
                self._close(topic)

    def _close(self, topic: Topic) -> None:
        if self._topics.pop(topic.id, None) is not None:
            self._bus.unsubscribe(topic.channel)
        for task in (topic.fetch, topic.release):
            if task is not None:
                task.cancel()

    # --------------------------------------------------------------------------------------- writes to sockets

    def flush(self) -> None:
        """Write pending events, once to each socket of each conversation that does not pause."""
        dirty, self._dirty = self._dirty, []
        for topic in dirty:
            if (rest := topic.rests_until - time.monotonic()) > 0:
                self._loop.call_later(rest, self._flush, topic)
            else:
                self._flush(topic)

    def _enqueue(self, topic: Topic, frame: bytes) -> None:
        if topic.sockets:
            if not topic.pending:
                self._dirty.append(topic)
            topic.pending.append(frame)
            self._flush_soon()

    def _flush(self, topic: Topic) -> None:
        if not (pending := topic.pending):
            return
        self.delivered += len(topic.sockets) * len(pending)
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        topic.pending = []
        began = time.monotonic()
        for write in topic.sockets.values():
            write(data)
        ended = time.monotonic()
        if len(pending) > 1 and len(topic.sockets) >= MANY_SOCKETS:
            # The conversation is busy. Events during the pause leave in one write per socket, and other tasks run.
            topic.rests_until = ended + WRITE_PAUSE_FACTOR * (ended - began)


def _is_crowd(topic: Topic) -> bool:
    """Whether a topic has sockets of more than `MAX_SHARED_PARTICIPANTS` users. All of them are participants."""
    return len({socket.user_id for socket in (*topic.sockets, *topic.joining)}) > MAX_SHARED_PARTICIPANTS


def channel(conversation_id: ConversationId) -> bytes:
    """Return the bus channel of a conversation."""
    return b"c:" + conversation_id.hex.encode()
