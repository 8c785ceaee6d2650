"""The hub: which sockets follow which conversations, and how far each conversation has been delivered.

A durable event is delivered in the order of its conversation's clock, once. One that comes early is held back
while what lies before it is on its way, or is fetched. Where an event came from, this worker's handlers, the
bus or PostgreSQL, makes no difference: all of them end in `_accept`.
"""

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from protocol.codec import encode, text_frame
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, SessionId, UserId
from protocol.limits import MAX_WATCHED
from protocol.server import ConversationLeft, DurableEvent, ServerFrame
from server.bus import Bus

GAP_SECONDS = 0.1
"""How long an early event waits for those before it, before they are fetched."""
MAX_EARLY = 256
"""How many early events of a conversation are kept; the others are fetched."""
LINGER_SECONDS = 30.0
"""How long a conversation that nobody follows any more is still listened to."""
COMPARE_SECONDS = 5.0
COMPARE_SECONDS_WITHOUT_BUS = 0.5
COMPARE_AT_ONCE = 2_000
NOBODY = bytes(16)

_ENTRY = struct.Struct("!QI16s")
"""An event on the bus: its version (0 for ephemeral ones), how long its frame is, who is gone by it."""

log = logging.getLogger(__name__)


class Socket(Protocol):
    """What the hub needs of a connection."""

    user_id: UserId
    session_id: SessionId
    attached: set[ConversationId]
    watched: set[UserId]
    write: Callable[[bytes], None]

    def say(self, frame: ServerFrame) -> None:
        """Send a frame to it alone."""

    def refresh(self) -> None:
        """Have it compare what it follows with what its user takes part in."""

    def close(self, code: CloseCode) -> None:
        """Close it."""


class Fetched(NamedTuple):
    """A `changes` event that leads to a version, and who is gone by it."""

    changes: ServerFrame
    version: int
    gone: Sequence[UserId]


class Record(Protocol):
    """What the hub asks of the database."""

    async def since(self, conversation_id: ConversationId, version: int) -> Fetched | None:
        """Return what came after a version, or the first part of it."""

    async def versions(self, conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
        """Return conversations' clocks."""

    async def user_versions(self, user_ids: Sequence[UserId]) -> dict[UserId, int]:
        """Return users' own clocks."""

    async def living(self, session_ids: Sequence[SessionId]) -> Collection[SessionId]:
        """Return which of the sessions are valid."""

    async def epoch(self) -> str:
        """Return what tells this database from another one."""


class Topic:
    """A conversation that this worker follows."""

    __slots__ = (
        "changed_at", "channel", "delivered", "early", "fetch", "id", "joining", "opening", "pending", "quiet_at",
        "sockets",
    )  # fmt: skip

    def __init__(self, conversation_id: ConversationId) -> None:
        self.id = conversation_id
        self.channel = b"c:" + conversation_id.hex.encode()
        self.delivered = 0
        self.sockets: dict[Socket, Callable[[bytes], None]] = {}
        self.joining: dict[Socket, int] = {}
        self.early: dict[int, tuple[bytes, bytes]] = {}
        self.pending: list[bytes] = []
        self.fetch: asyncio.Task[None] | None = None
        self.opening: asyncio.Task[None] | None = None
        self.quiet_at = 0.0
        self.changed_at = 0.0


class Person:
    """A user with sockets at this worker. `version` is their own clock as of the last look."""

    __slots__ = ("channel", "look", "sockets", "version")

    def __init__(self, user_id: UserId) -> None:
        self.channel = b"u:" + user_id.hex.encode()
        self.sockets: set[Socket] = set()
        self.version = -1
        self.look: asyncio.Task[None] | None = None


class Hub:
    """All topics and people of one worker."""

    def __init__(self, record: Record, redis_url: str) -> None:
        self._record = record
        self.bus = Bus(redis_url, deliver=self._hear, caught_up=self._compare_soon)
        self.topics: dict[ConversationId, Topic] = {}
        self.people: dict[UserId, Person] = {}
        self.watchers: dict[UserId, dict[Socket, Callable[[bytes], None]]] = {}
        self._origin = os.urandom(8)
        self._dirty: list[Topic] = []
        self._outgoing: dict[bytes, list[bytes]] = {}
        self._is_flushing = False
        self._loop = asyncio.get_running_loop()
        self._compare_now = asyncio.Event()
        self._comparing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.epoch = ""
        self.delivered = 0
        self.fetched = 0

    async def start(self) -> None:
        """Connect to the bus and begin to compare positions. Raises Fatal if the bus cannot be reached."""
        self.epoch = await self._record.epoch()
        await self.bus.start()
        self._comparing = asyncio.create_task(self._compare())

    async def close(self) -> None:
        """Stop."""
        for task in [*self._tasks, *([self._comparing] if self._comparing else [])]:
            task.cancel()
        await self.bus.close()

    # ----------------------------------------------------------------------------- what handlers use (Events)

    def publish(self, event: DurableEvent, *, gone: UserId | None = None) -> None:
        """Deliver a durable event here and everywhere, in the order of versions; then drop who is `gone`."""
        frame = text_frame(encode(event))
        who = NOBODY if gone is None else gone.bytes
        self._say(b"c:" + event.conversation_id.hex.encode(), event.version, frame, who)
        if (topic := self.topics.get(event.conversation_id)) is not None:
            self._accept(topic, event.version, frame, who)

    def relay(self, conversation_id: ConversationId, event: ServerFrame) -> None:
        """Deliver something ephemeral to those who follow a conversation now."""
        frame = text_frame(encode(event))
        self._say(b"c:" + conversation_id.hex.encode(), 0, frame)
        if (topic := self.topics.get(conversation_id)) is not None:
            self._enqueue(topic, frame)

    def whisper(self, user_id: UserId, event: ServerFrame) -> None:
        """Deliver something ephemeral to a user's own devices."""
        frame = text_frame(encode(event))
        self._say(b"u:" + user_id.hex.encode(), 0, frame)
        self._whisper(user_id, frame)

    def announce(self, user_id: UserId, event: ServerFrame) -> None:
        """Deliver a user's presence to those who watch it."""
        frame = text_frame(encode(event))
        self._say(b"p:" + user_id.hex.encode(), 0, frame)
        self._show(user_id, frame)

    def poke(self, user_ids: Iterable[UserId]) -> None:
        """Have all workers look again at these users' conversations and sessions."""
        for user_id in user_ids:
            self._say(b"u:" + user_id.hex.encode(), 0, b"")
            self._look(user_id)

    # ---------------------------------------------------------------------------------- what connections use

    async def add(self, socket: Socket) -> None:
        """Let a connection in: from now on news about its user reaches it."""
        person = self.people.get(socket.user_id)
        if person is None:
            person = self.people[socket.user_id] = Person(socket.user_id)
        person.sockets.add(socket)
        await self.bus.subscribe([person.channel])
        if person.version < 0:
            found = await self._record.user_versions([socket.user_id])
            person.version = max(person.version, found.get(socket.user_id, 0))

    def devices(self, user_id: UserId) -> int:
        """Return how many connections of a user there are."""
        return len(person.sockets) if (person := self.people.get(user_id)) is not None else 0

    def remove(self, socket: Socket) -> None:
        """Forget a connection."""
        for conversation_id in list(socket.attached):
            self.detach(socket, conversation_id)
        self.unwatch(socket, list(socket.watched))
        person = self.people.get(socket.user_id)
        if person is not None:
            person.sockets.discard(socket)
            if not person.sockets:
                del self.people[socket.user_id]
                self.bus.unsubscribe(person.channel)

    async def open(self, conversation_ids: Iterable[ConversationId]) -> None:
        """Follow conversations; when this returns, nothing of them is missed from here on."""
        now = self._loop.time()
        new: list[Topic] = []
        waiting: set[asyncio.Task[None]] = set()
        for conversation_id in conversation_ids:
            topic = self.topics.get(conversation_id)
            if topic is None:
                topic = self.topics[conversation_id] = Topic(conversation_id)
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
            await task

    async def _open(self, topics: list[Topic]) -> None:
        try:
            await self.bus.subscribe([topic.channel for topic in topics])
            versions = await self._record.versions([topic.id for topic in topics])
        except BaseException:
            for topic in topics:
                self._close(topic)
            raise
        for topic in topics:
            topic.opening = None
            # Only now is there a position to compare with; what the bus brought meanwhile is in it, or early.
            topic.delivered = max(topic.delivered, versions.get(topic.id, 0))
            self._drain(topic)

    def attach(self, socket: Socket, conversation_id: ConversationId, version: int) -> bool:
        """Deliver to a connection what comes after `version`; False if some of that was delivered already.

        Raises Refused if the conversation is not open, which only a very slow reader of the database sees.
        """
        topic = self.topics.get(conversation_id)
        if topic is None or topic.opening is not None:
            raise Refused(ErrorCode.UNAVAILABLE, "This took too long; try again.", retry_after_ms=1_000)
        if topic.delivered > version:
            return False
        self._flush_topic(topic)
        socket.attached.add(conversation_id)
        if topic.delivered < version:
            topic.joining[socket] = version
        else:
            topic.sockets[socket] = socket.write
        return True

    def detach(self, socket: Socket, conversation_id: ConversationId) -> None:
        """Deliver no more of a conversation to a connection."""
        socket.attached.discard(conversation_id)
        if (topic := self.topics.get(conversation_id)) is not None:
            self._flush_topic(topic)
            topic.sockets.pop(socket, None)
            topic.joining.pop(socket, None)
            topic.quiet_at = self._loop.time()

    def recent(self, conversation_ids: Iterable[ConversationId], *, since: float) -> dict[ConversationId, int]:
        """Return how far those of the conversations were delivered in which something was, after a loop time."""
        topics = [self.topics[conversation_id] for conversation_id in conversation_ids]
        return {topic.id: topic.delivered for topic in topics if topic.changed_at > since}

    async def watch(self, socket: Socket, user_ids: Sequence[UserId]) -> None:
        """Deliver the presence of users to a connection. Raises Refused if that would be too many."""
        if len(socket.watched.union(user_ids)) > MAX_WATCHED:
            raise Refused(ErrorCode.CONFLICT, f"A connection watches at most {MAX_WATCHED} users.", path="user_ids")
        socket.watched.update(user_ids)
        for user_id in user_ids:
            self.watchers.setdefault(user_id, {})[socket] = socket.write
        await self.bus.subscribe([b"p:" + user_id.hex.encode() for user_id in user_ids])

    def unwatch(self, socket: Socket, user_ids: Iterable[UserId]) -> None:
        """Deliver it no more."""
        for user_id in user_ids:
            socket.watched.discard(user_id)
            watchers = self.watchers.get(user_id)
            if watchers is not None and watchers.pop(socket, None) is not None and not watchers:
                del self.watchers[user_id]
                self.bus.unsubscribe(b"p:" + user_id.hex.encode())

    # ------------------------------------------------------------------------------------------ the bus's side

    def _say(self, channel: bytes, version: int, frame: bytes, gone: bytes = NOBODY) -> None:
        entries = self._outgoing.get(channel)
        if entries is None:
            entries = self._outgoing[channel] = [self._origin]
        entries.append(_ENTRY.pack(version, len(frame), gone))
        entries.append(frame)
        self._flush_soon()

    def _hear(self, channel: bytes, words: bytes) -> None:
        if words[:8] == self._origin:
            return
        kind, one = channel[:2], UUID(hex=channel[2:].decode())
        topic = self.topics.get(ConversationId(one)) if kind == b"c:" else None
        end = 8
        while end < len(words):
            version, size, gone = _ENTRY.unpack_from(words, end)
            start = end + _ENTRY.size
            end = start + size
            frame = words[start:end]
            if topic is not None:
                if version:
                    self._accept(topic, version, frame, gone)
                else:
                    self._enqueue(topic, frame)
            elif kind == b"p:":
                self._show(UserId(one), frame)
            elif kind == b"u:":
                if frame:
                    self._whisper(UserId(one), frame)
                else:
                    self._look(UserId(one))

    # ---------------------------------------------------------------------------------------- order of versions

    def _accept(self, topic: Topic, version: int, frame: bytes, gone: bytes) -> None:
        if version <= topic.delivered:
            return
        if version == topic.delivered + 1 and topic.opening is None:
            self._deliver(topic, version, frame, gone)
            if topic.early:
                self._drain(topic)
            return
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
        if topic.joining:
            self._let_in(topic, version)
        topic.delivered = version
        topic.changed_at = self._loop.time()
        self._enqueue(topic, frame)
        if gone != NOBODY:
            self._drop(topic, UserId(UUID(bytes=gone)))

    def _let_in(self, topic: Topic, next_version: int) -> None:
        ready = [socket for socket, version in topic.joining.items() if version < next_version]
        if ready:
            # What is waiting to be written is older than they are.
            self._flush_topic(topic)
            for socket in ready:
                del topic.joining[socket]
                topic.sockets[socket] = socket.write

    def _drop(self, topic: Topic, user_id: UserId) -> None:
        person = self.people.get(user_id)
        for socket in list(person.sockets) if person else []:
            if topic.id in socket.attached:
                self.detach(socket, topic.id)
                socket.say(ConversationLeft(conversation_id=topic.id))

    def _fetch_soon(self, topic: Topic, delay: float) -> None:
        if topic.fetch is None:
            topic.fetch = self._spawn(self._fetch(topic, delay))

    async def _fetch(self, topic: Topic, delay: float) -> None:
        """Deliver from PostgreSQL what did not come, as one `changes` event or several."""
        await asyncio.sleep(delay)
        try:
            highest = max(topic.early, default=topic.delivered + 1)
            while topic.delivered < highest:
                since = topic.delivered
                fetched = await self._record.since(topic.id, since)
                if fetched is None or fetched.version <= topic.delivered:
                    return
                if since != topic.delivered:
                    continue  # some of it came meanwhile
                self.fetched += 1
                self._let_in(topic, fetched.version)
                topic.delivered = fetched.version
                topic.changed_at = self._loop.time()
                self._enqueue(topic, text_frame(encode(fetched.changes)))
                for user_id in fetched.gone:
                    self._drop(topic, user_id)
                self._drain(topic)
        except Exception as error:  # noqa: BLE001 - the database is away: the next comparison finds the gap again
            log.warning("changes of %s could not be read: %s", topic.id, error)
        finally:
            topic.fetch = None

    # ---------------------------------------------------------------------------------------- onto the sockets

    def _enqueue(self, topic: Topic, frame: bytes) -> None:
        if topic.sockets:
            if not topic.pending:
                self._dirty.append(topic)
            topic.pending.append(frame)
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what was delivered in this turn of the loop, and publish it."""
        self._is_flushing = False
        dirty, self._dirty = self._dirty, []
        for topic in dirty:
            self._flush_topic(topic)
        outgoing, self._outgoing = self._outgoing, {}
        for channel, entries in outgoing.items():
            self.bus.publish(channel, b"".join(entries))

    def _flush_topic(self, topic: Topic) -> None:
        if not (pending := topic.pending):
            return
        self.delivered += len(topic.sockets) * len(pending)
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        topic.pending = []
        for write in topic.sockets.values():
            write(data)

    def _whisper(self, user_id: UserId, frame: bytes) -> None:
        if (person := self.people.get(user_id)) is not None:
            for socket in person.sockets:
                socket.write(frame)

    def _show(self, user_id: UserId, frame: bytes) -> None:
        for write in self.watchers.get(user_id, {}).values():
            write(frame)

    # ------------------------------------------------------------------------------------- looking for oneself

    def _look(self, user_id: UserId) -> None:
        if (person := self.people.get(user_id)) is not None:
            # One look at a time, and one after the last poke.
            before, person.look = person.look, None
            person.look = self._spawn(self._look_at(user_id, person, before))

    async def _look_at(self, user_id: UserId, person: Person, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        sockets = list(person.sockets)
        try:
            version = (await self._record.user_versions([user_id])).get(user_id, 0)
            living = await self._record.living([socket.session_id for socket in sockets])
        except Exception as error:  # noqa: BLE001 - the next comparison looks again
            log.warning("user %s could not be looked at: %s", user_id, error)
            person.version = 0
            return
        person.version = version
        for socket in sockets:
            if socket.session_id in living:
                socket.refresh()
            else:
                socket.close(CloseCode.SESSION_ENDED)

    def _compare_soon(self) -> None:
        self._compare_now.set()

    async def _compare(self) -> None:
        """Compare every position with PostgreSQL, often while there is no bus to tell: the last line of defence."""
        while True:
            pause = COMPARE_SECONDS if self.bus.is_up else COMPARE_SECONDS_WITHOUT_BUS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._compare_now.wait(), pause)
            self._compare_now.clear()
            try:
                await self._compare_once()
            except Exception as error:  # noqa: BLE001 - the database is away: compare again when it is back
                log.warning("positions could not be compared: %s", error)
                continue

    async def _compare_once(self) -> None:
        if (epoch := await self._record.epoch()) != self.epoch:
            log.warning("the database was replaced: everyone starts over")
            self.epoch = epoch
            for socket in [socket for person in self.people.values() for socket in person.sockets]:
                socket.close(CloseCode.START_OVER)
            return
        self._close_quiet()
        ids = list(self.topics)
        for start in range(0, len(ids), COMPARE_AT_ONCE):
            versions = await self._record.versions(ids[start : start + COMPARE_AT_ONCE])
            for conversation_id, version in versions.items():
                topic = self.topics.get(conversation_id)
                if topic is not None and topic.opening is None and version > topic.delivered:
                    self._fetch_soon(topic, 0 if not self.bus.is_up else GAP_SECONDS)
        users = list(self.people)
        for start in range(0, len(users), COMPARE_AT_ONCE):
            user_versions = await self._record.user_versions(users[start : start + COMPARE_AT_ONCE])
            for user_id, version in user_versions.items():
                person = self.people.get(user_id)
                if person is not None and 0 <= person.version != version:
                    self._look(user_id)

    def _close_quiet(self) -> None:
        before = self._loop.time() - LINGER_SECONDS
        for topic in list(self.topics.values()):
            if not topic.sockets and not topic.joining and topic.opening is None and topic.quiet_at < before:
                self._close(topic)

    def _close(self, topic: Topic) -> None:
        if self.topics.pop(topic.id, None) is not None:
            self.bus.unsubscribe(topic.channel)
        if topic.fetch is not None:
            topic.fetch.cancel()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
