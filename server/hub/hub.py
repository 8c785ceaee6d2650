"""The hub delivers events of handlers and of other workers to sockets."""

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

from protocol.codec import encode, is_text_frame, text_frame
from protocol.ids import ConversationId, UserId
from protocol.server import DurableEvent, OwnEvent, PresenceChanged, StateEvent, TypingEvent, UserUpdated
from server.core.errors import log_defect
from server.hub import online_users, peers, topics, watchers
from server.hub.bus import Bus, Connect
from server.hub.comparisons import Comparisons, WorkerStore
from server.hub.entries import NOBODY, log_ignored, pack, unpack
from server.hub.online_users import OnlineUsers, Socket, UserStore
from server.hub.peers import Kind
from server.hub.topics import ConversationStore, Topics
from server.hub.watchers import Describe, Watchers, WatchStore

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


class HubStore(ConversationStore, UserStore, WatchStore, WorkerStore, Protocol):
    """The hub's queries. `PostgresHubStore` implements them, because `hub` may not import `queries`."""


class Hub:
    """Delivers events at one worker."""

    def __init__(self, store: HubStore, connect: Connect, *, describe: Describe, worker: bytes = NOBODY) -> None:
        """`connect` returns the bus to the other workers. `describe` returns the presences of watched users. `worker`
        is the id of this worker.
        """
        self._worker = worker
        self.bus: Bus = connect(
            deliver=self._receive,
            caught_up=lambda: self.comparisons.after_outage(),  # noqa: PLW0108 - it is created below
        )
        self.watchers = Watchers(store, self.bus, describe=describe)
        self.online_users = OnlineUsers(store, self.bus, doubt=self.watchers.doubt_watched)
        self.topics = Topics(
            store,
            self.bus,
            self.online_users,
            flush_soon=self._flush_soon,
            doubt=lambda user_id, left: self.watchers.doubt_watched(user_id, cause=left),
            compare_soon=lambda: self.comparisons.topics_soon(),  # noqa: PLW0108 - it is created below
        )
        self.comparisons = Comparisons(
            store,
            self.bus,
            self.topics,
            self.online_users,
            self.watchers,
            publish=self._publish_to_workers,
            worker=worker,
        )
        self._outgoing: dict[bytes, list[bytes]] = {}
        self._is_flushing = False
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Connect to the bus, and start comparing positions. Raises Fatal if the bus cannot be reached."""
        await self.bus.start()
        await self.comparisons.start()

    async def close(self) -> None:
        """Stop."""
        await self.comparisons.close()
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
        self._publish(topics.channel(event.conversation_id), event.version, frame, who)
        self.topics.accept(event.conversation_id, event.version, frame, who)

    def relay(self, conversation_id: ConversationId, event: StateEvent | TypingEvent) -> None:
        """Deliver an ephemeral event to the sockets that are attached now."""
        frame = text_frame(encode(event))
        self._publish(topics.channel(conversation_id), 0, frame)
        self.topics.accept(conversation_id, 0, frame, NOBODY)

    def whisper(self, user_id: UserId, event: StateEvent) -> None:
        """Deliver an ephemeral event to a user's own devices."""
        frame = text_frame(encode(event))
        self._publish(online_users.channel(user_id), 0, frame)
        self.online_users.write(user_id, frame)

    def tell_own(self, user_id: UserId, event: OwnEvent) -> None:
        """Deliver a change of a user's own rows at all workers, in the order of user versions."""
        frame = text_frame(encode(event))
        self._publish(online_users.own_channel(user_id), event.user_version, frame)
        # Workers of an earlier release do not know that channel. They recheck the user.
        self._publish(online_users.channel(user_id), OWN, b"", event.user_version.to_bytes(len(NOBODY)))
        self.online_users.accept(user_id, event.user_version, frame)

    def send_to_watchers(self, user_id: UserId, event: PresenceChanged | UserUpdated) -> None:
        """Deliver a user's presence or face to those who watch the user."""
        frame = text_frame(encode(event))
        kind = FACE if isinstance(event, UserUpdated) else 0
        self._publish(watchers.channel(user_id), kind, frame, event.revision.to_bytes(len(NOBODY)))
        self.watchers.deliver(user_id, frame, event.revision, is_face=kind == FACE)

    def reconsider(self, user_id: UserId, watcher: UserId | None = None) -> None:
        """Check again whether those who watch a user may do so, or whether `watcher` may. They receive nothing until
        the check is done.
        """
        who = NOBODY if watcher is None else watcher.bytes
        self._publish(watchers.channel(user_id), 0, b"", who)
        self.watchers.doubt_watchers(user_id, watcher)

    def notify(self, user_ids: Iterable[UserId], *, may_watch_others: bool = False) -> None:
        """Make all workers recheck these users' conversations and sessions. With `may_watch_others`, also recheck whom
        they may watch.
        """
        for user_id in user_ids:
            self._publish(online_users.channel(user_id), WATCHING if may_watch_others else 0, b"")
            self.online_users.recheck(user_id, may_watch_others=may_watch_others)

    def recheck(self, user_id: UserId, conversation_id: ConversationId | None) -> None:
        """Make all workers recheck a user and a conversation some seconds later, because the outcome of a write is
        unknown. If it was committed, nobody has published its events.
        """
        self.comparisons.after_unknown_outcome(user_id, conversation_id)

    def published_at(self, conversation_id: ConversationId, version: int) -> datetime | None:
        """Return when this worker delivered a version, if it still remembers."""
        at = self.topics.delivered_at(conversation_id, version)
        return None if at is None else datetime.fromtimestamp(at, UTC)

    def remove(self, socket: Socket) -> None:
        """Remove a socket from all topics and watchers."""
        for conversation_id in list(socket.attached):
            self.topics.detach(socket, conversation_id)
        self.watchers.remove(socket, list(socket.watched))
        self.online_users.remove(socket)

    # -------------------------------------------------------------------------------------------- other workers

    def _publish_to_workers(self, kind: Kind, content: bytes) -> None:
        self._publish(peers.CHANNEL, kind, content, self._worker)

    def _publish(self, channel: bytes, version: int, frame: bytes, gone: bytes = NOBODY) -> None:
        self._outgoing.setdefault(channel, []).append(pack(version, frame, gone))
        self._flush_soon()

    def _receive(self, channel: bytes, message: bytes) -> None:
        try:
            kind, one = _kind_and_id(channel)
            for version, frame, gone in unpack(message):
                if channel == peers.CHANNEL:
                    self.comparisons.receive(version, frame, gone)
                elif kind not in _HAS_FRAME:
                    log_ignored("its channel is unknown")
                elif (frame or _HAS_FRAME[kind]) and not is_text_frame(frame):
                    log_ignored("its event has another form")
                elif kind == b"c:":
                    self.topics.accept(ConversationId(one), version, frame, gone)
                elif kind == b"p:":
                    self._receive_of_watched(UserId(one), version, frame, gone)
                elif kind == b"o:":
                    self.online_users.accept(UserId(one), version, frame)
                else:
                    self._receive_of_user(UserId(one), version, frame, gone)
        except Exception as error:  # noqa: BLE001 - a defect must not end the connection to the bus
            log_defect(log, "delivering events of another worker", error)
            self.comparisons.after_losses()

    def _receive_of_watched(self, user_id: UserId, kind: int, frame: bytes, gone: bytes) -> None:
        if not frame:
            self.watchers.doubt_watchers(user_id, None if gone == NOBODY else UserId(UUID(bytes=gone)))
        elif kind in {0, FACE}:
            self.watchers.deliver(user_id, frame, int.from_bytes(gone), is_face=kind == FACE)
        else:
            log_ignored("its kind is unknown")

    def _receive_of_user(self, user_id: UserId, kind: int, frame: bytes, gone: bytes) -> None:
        if frame:
            self.online_users.write(user_id, frame)
        elif kind == OWN:
            self.online_users.expect(user_id, int.from_bytes(gone))
        else:
            self.online_users.recheck(user_id, may_watch_others=kind == WATCHING)

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


def _kind_and_id(channel: bytes) -> tuple[bytes, UUID]:
    """Return the prefix of a channel, and its conversation or user. The prefix is empty if there is none."""
    try:
        return channel[:2], UUID(hex=channel[2:].decode())
    except ValueError:
        return b"", UUID(int=0)
