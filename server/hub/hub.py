"""The hub delivers events of handlers and of other workers to sockets."""

import asyncio
import logging
import random
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

from protocol.codec import encode, is_text_frame, text_frame
from protocol.ids import ConversationId, UserId
from protocol.server import DurableEvent, OwnEvent, PresenceChanged, StateEvent, TypingEvent, UserUpdated
from server.core.errors import log_defect
from server.core.periodic import end, every
from server.hub import online_users, peers, topics, watchers
from server.hub.bus import Bus, Connect
from server.hub.entries import NOBODY, ids_of, log_ignored, pack, unpack
from server.hub.online_users import OnlineUsers, Socket, UserStore
from server.hub.peers import BEAT_SECONDS, Kind, Peers
from server.hub.rounds import Rounds
from server.hub.topics import ConversationStore, Topics
from server.hub.unsure import Unsure
from server.hub.watchers import Describe, Watchers, WatchStore

COMPARE_SECONDS = 60.0
COMPARE_USERS_SECONDS = 30.0
"""Intervals at which all conversations, and all users, are compared with PostgreSQL while the bus is up, in seconds.
The comparisons find events that were lost without a sign (docs/map.md).
"""
COMPARE_SECONDS_BESIDE_UNHEARD = 5.0
"""The same for conversations, while there is a worker that this one does not hear on the bus."""
AFTER_END_SECONDS = (0.0, 4.0, 12.0)
"""Delays of the comparisons after another worker disappeared, in seconds. PostgreSQL finishes the statements of a
worker that was killed. It cancels those that store messages after two seconds, and others after nine.
"""
LOSSES_SECONDS = 5.0
"""Min interval between two comparisons because of losses of other workers, in seconds. One whose connection to Redis is
bad reports them every second.
"""
LOOK_SECONDS = 5.0
"""Interval at which PostgreSQL is asked for the workers that are connected to it, in seconds."""
MAX_JITTER_SECONDS = 0.5
"""Max delay of the comparison after an outage, or after the end of another worker, in seconds. It is random, because
all workers notice these together.
"""

FACE = 1
"""Kind of an event about a user's face, instead of the presence, on the channel of watchers. It takes the place of the
version.
"""
WATCHING = 1
"""Kind of a notification about a change that affects whom the user may watch. It takes the place of the version."""
OWN = 2
"""Kind of a notification about a change of the user's own rows, whose event was published before. It takes the place of
the version, and the user version takes that of the user.
"""

_HAS_FRAME = {b"c:": True, b"o:": True, b"p:": False, b"u:": False}
"""The prefixes of channels, and whether each entry has a frame. Others are also notifications without one."""

log = logging.getLogger(__name__)


class HubStore(ConversationStore, UserStore, WatchStore, Protocol):
    """The hub's queries. `PostgresHubStore` implements them, because `hub` may not import `queries`."""

    async def workers(self) -> Collection[bytes]:
        """Return the ids of the workers that are connected to the database. Earlier releases have an empty id."""


class Hub:
    """Delivers events at one worker."""

    def __init__(self, store: HubStore, connect: Connect, *, describe: Describe, worker: bytes = NOBODY) -> None:
        """`connect` returns the bus to the other workers. `describe` returns the presences of watched users. `worker`
        is the id of this worker.
        """
        self._store = store
        self._worker = worker
        self.bus: Bus = connect(deliver=self._hear, caught_up=self._caught_up)
        self._peers = Peers(
            self.bus, say=self._say_to_workers, lost_events=self._lost_events, lost_worker=self._lost_worker
        )
        self._unsure_topics: Unsure[ConversationId] = Unsure()
        self._unsure_users: Unsure[UserId] = Unsure()
        self._is_beside_unheard = False
        self._compares_losses_at = -LOSSES_SECONDS
        self.watchers = Watchers(store, self.bus, describe=describe)
        self.online_users = OnlineUsers(store, self.bus, doubt=self.watchers.doubt_watched)
        self.topics = Topics(
            store,
            self.bus,
            self.online_users,
            flush_soon=self._flush_soon,
            doubt=lambda user_id, left: self.watchers.doubt_watched(user_id, cause=left),
            compare_soon=self._compare_topics,
        )
        self._topic_rounds = Rounds(
            self.topics.ids, self.topics.compare, seconds=self._topics_seconds, is_urgent=self._is_bus_down
        )
        self._user_rounds = Rounds(
            self.online_users.ids,
            self.online_users.compare,
            seconds=lambda: COMPARE_USERS_SECONDS,
            is_urgent=self._is_bus_down,
        )
        self._outgoing: dict[bytes, list[bytes]] = {}
        self._is_flushing = False
        self._loop = asyncio.get_running_loop()
        self._has_been_up = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect to the bus, and start comparing positions. Raises Fatal if the bus cannot be reached."""
        await self.bus.start()
        await self._peers.start()
        self._tasks = [
            asyncio.create_task(self._topic_rounds.run()),
            asyncio.create_task(self._user_rounds.run()),
            asyncio.create_task(every(BEAT_SECONDS, self._beat)),
            asyncio.create_task(every(LOOK_SECONDS, self._look_for_unheard, is_spread=True)),
        ]

    async def close(self) -> None:
        """Stop."""
        await end(self._tasks)
        self._peers.leave()
        self.flush()
        self.online_users.close()
        self.watchers.close()
        self.topics.close()
        await self.bus.close()

    # ---------------------------------------------------------------------------------- for handlers (Events)

    def publish(self, event: DurableEvent, *, gone: UserId | None = None) -> None:
        """Deliver a durable event at all workers, in the order of versions. Then stop delivery to the user `gone`."""
        frame = text_frame(encode(event))
        who = NOBODY if gone is None else gone.bytes
        self._say(topics.channel(event.conversation_id), event.version, frame, who)
        self.topics.accept(event.conversation_id, event.version, frame, who)

    def relay(self, conversation_id: ConversationId, event: StateEvent | TypingEvent) -> None:
        """Deliver an ephemeral event to the sockets that are attached now."""
        frame = text_frame(encode(event))
        self._say(topics.channel(conversation_id), 0, frame)
        self.topics.accept(conversation_id, 0, frame, NOBODY)

    def whisper(self, user_id: UserId, event: StateEvent) -> None:
        """Deliver an ephemeral event to a user's own devices."""
        frame = text_frame(encode(event))
        self._say(online_users.channel(user_id), 0, frame)
        self.online_users.write(user_id, frame)

    def tell_own(self, user_id: UserId, event: OwnEvent) -> None:
        """Deliver a change of a user's own rows at all workers, in the order of user versions."""
        frame = text_frame(encode(event))
        self._say(online_users.own_channel(user_id), event.user_version, frame)
        # Workers of an earlier release do not know that channel. They recheck the user.
        self._say(online_users.channel(user_id), OWN, b"", event.user_version.to_bytes(len(NOBODY)))
        self.online_users.accept(user_id, event.user_version, frame)

    def send_to_watchers(self, user_id: UserId, event: PresenceChanged | UserUpdated) -> None:
        """Deliver a user's presence or face to those who watch the user."""
        frame = text_frame(encode(event))
        kind = FACE if isinstance(event, UserUpdated) else 0
        self._say(watchers.channel(user_id), kind, frame, event.revision.to_bytes(len(NOBODY)))
        self.watchers.tell(user_id, frame, event.revision, is_face=kind == FACE)

    def reconsider(self, user_id: UserId, watcher: UserId | None = None) -> None:
        """Check again whether those who watch a user may do so, or whether `watcher` may. They receive nothing until
        the check is done.
        """
        who = NOBODY if watcher is None else watcher.bytes
        self._say(watchers.channel(user_id), 0, b"", who)
        self.watchers.doubt_watchers(user_id, watcher)

    def notify(self, user_ids: Iterable[UserId], *, may_watch_others: bool = False) -> None:
        """Make all workers recheck these users' conversations and sessions. With `may_watch_others`, also recheck whom
        they may watch.
        """
        for user_id in user_ids:
            self._say(online_users.channel(user_id), WATCHING if may_watch_others else 0, b"")
            self.online_users.recheck(user_id, may_watch_others=may_watch_others)

    def recheck(self, user_id: UserId, conversation_id: ConversationId | None) -> None:
        """Make all workers recheck a user and a conversation some seconds later, because the outcome of a write is
        unknown. If it was committed, nobody has published its events.
        """
        self._unsure_users.add(user_id)
        if conversation_id is not None:
            self._unsure_topics.add(conversation_id)

    def published_at(self, conversation_id: ConversationId, version: int) -> datetime | None:
        """Return when this worker delivered a version, if it still remembers."""
        at = self.topics.told_at(conversation_id, version)
        return None if at is None else datetime.fromtimestamp(at, UTC)

    def remove(self, socket: Socket) -> None:
        """Remove a socket from all topics and watchers."""
        for conversation_id in list(socket.attached):
            self.topics.detach(socket, conversation_id)
        self.watchers.remove(socket, list(socket.watched))
        self.online_users.remove(socket)

    # -------------------------------------------------------------------------------------------- other workers

    def _say_to_workers(self, kind: Kind, content: bytes) -> None:
        self._say(peers.CHANNEL, kind, content, self._worker)

    def _say(self, channel: bytes, version: int, frame: bytes, gone: bytes = NOBODY) -> None:
        self._outgoing.setdefault(channel, []).append(pack(version, frame, gone))
        self._flush_soon()

    def _hear(self, channel: bytes, words: bytes) -> None:
        try:
            kind, one = _kind_and_id(channel)
            for version, frame, gone in unpack(words):
                if channel == peers.CHANNEL:
                    self._hear_worker(version, frame, gone)
                elif kind not in _HAS_FRAME:
                    log_ignored("its channel is unknown")
                elif (frame or _HAS_FRAME[kind]) and not is_text_frame(frame):
                    log_ignored("its event has another form")
                elif kind == b"c:":
                    self.topics.accept(ConversationId(one), version, frame, gone)
                elif kind == b"p:":
                    self._hear_of_watched(UserId(one), version, frame, gone)
                elif kind == b"o:":
                    self.online_users.accept(UserId(one), version, frame)
                else:
                    self._hear_of_user(UserId(one), version, frame, gone)
        except Exception as error:  # noqa: BLE001 - a defect must not end the connection to the bus
            log_defect(log, "delivering events of another worker", error)
            self._lost_events()

    def _hear_of_watched(self, user_id: UserId, kind: int, frame: bytes, revision: bytes) -> None:
        if not frame:
            self.watchers.doubt_watchers(user_id, None if revision == NOBODY else UserId(UUID(bytes=revision)))
        elif kind in {0, FACE}:
            self.watchers.tell(user_id, frame, int.from_bytes(revision), is_face=kind == FACE)
        else:
            log_ignored("its kind is unknown")

    def _hear_of_user(self, user_id: UserId, kind: int, frame: bytes, version: bytes) -> None:
        if frame:
            self.online_users.write(user_id, frame)
        elif kind == OWN:
            self.online_users.expect(user_id, int.from_bytes(version))
        else:
            self.online_users.recheck(user_id, may_watch_others=kind == WATCHING)

    def _hear_worker(self, kind: int, content: bytes, worker: bytes) -> None:
        if kind in {Kind.BEAT, Kind.GOODBYE}:
            self._peers.hear(kind, worker, content)
        elif kind == Kind.RECHECK_CONVERSATIONS:
            self._topic_rounds.first(self.topics.followed(map(ConversationId, ids_of(content))))
        elif kind == Kind.RECHECK_USERS:
            self._user_rounds.first(self.online_users.online(map(UserId, ids_of(content))))
        else:
            log_ignored("its kind is unknown")

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the events of this turn of the loop to sockets, and publish them on the bus."""
        self._is_flushing = False
        self.topics.flush()
        outgoing, self._outgoing = self._outgoing, {}
        for channel, entries in outgoing.items():
            self.bus.publish(channel, b"".join(entries))

    # ----------------------------------------------------------------------------- comparison with PostgreSQL

    def compare_soon(self) -> None:
        """Compare all positions of conversations and users with PostgreSQL now, because events may have been missed.
        For example, a worker may have been killed after a commit.
        """
        self.watchers.doubt_all()
        self._start_rounds()

    def _caught_up(self) -> None:
        self._peers.report()
        if self._has_been_up:
            self._compare_with_delay()
        else:
            self._has_been_up = True
            self.compare_soon()

    def _compare_with_delay(self) -> None:
        self.watchers.doubt_all()
        delay = random.random() * MAX_JITTER_SECONDS  # noqa: S311 - it spreads load, and needs no secrecy
        self._loop.call_later(delay, self._start_rounds)

    def _lost_events(self) -> None:
        now = self._loop.time()
        if self._compares_losses_at <= now:  # otherwise a comparison follows already
            delay = max(0.0, self._compares_losses_at + LOSSES_SECONDS - now)
            self._compares_losses_at = now + delay
            self._loop.call_later(delay, self._compare_with_delay)

    def _lost_worker(self) -> None:
        for seconds in AFTER_END_SECONDS:
            self._loop.call_later(seconds, self._compare_with_delay)

    def _compare_topics(self) -> None:
        self._topic_rounds.soon()

    def _start_rounds(self) -> None:
        self._topic_rounds.soon()
        self._user_rounds.soon()

    def _topics_seconds(self) -> float:
        return min(COMPARE_SECONDS, COMPARE_SECONDS_BESIDE_UNHEARD) if self._is_beside_unheard else COMPARE_SECONDS

    def _is_bus_down(self) -> bool:
        return not self.bus.is_up

    async def _beat(self) -> None:
        self._peers.beat()
        if self._is_bus_down():
            self._start_rounds()
        if conversation_ids := self._unsure_topics.due():
            self._say_to_workers(Kind.RECHECK_CONVERSATIONS, b"".join(one.bytes for one in conversation_ids))
            self._topic_rounds.first(self.topics.followed(conversation_ids))
        if user_ids := self._unsure_users.due():
            self._say_to_workers(Kind.RECHECK_USERS, b"".join(one.bytes for one in user_ids))
            self._user_rounds.first(self.online_users.online(user_ids))

    async def _look_for_unheard(self) -> None:
        workers = set(await self._store.workers())
        was_beside_unheard = self._is_beside_unheard
        self._is_beside_unheard = not workers - {self._worker} <= self._peers.workers
        if self._is_beside_unheard and not was_beside_unheard:
            self._topic_rounds.soon()


def _kind_and_id(channel: bytes) -> tuple[bytes, UUID]:
    """Return the prefix of a channel, and its conversation or user. The prefix is empty if there is none."""
    try:
        return channel[:2], UUID(hex=channel[2:].decode())
    except ValueError:
        return b"", UUID(int=0)
