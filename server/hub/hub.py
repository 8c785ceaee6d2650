"""The hub: where handlers tell what happened, the bus tells what happened elsewhere, and sockets get both."""

import asyncio
import contextlib
import logging
import struct
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

from protocol.codec import encode, text_frame
from protocol.ids import ConversationId, UserId
from protocol.server import DurableEvent, ServerFrame, UserUpdated
from server.core.failures import Failures
from server.hub import online_users, topics, watchers
from server.hub.bus import Bus, Connect
from server.hub.online_users import OnlineUsers, Socket, UserRecord
from server.hub.topics import NOBODY, ConversationRecord, Topics
from server.hub.watchers import Describe, Watchers, WatchRecord

COMPARE_SECONDS = 5.0
COMPARE_SECONDS_WITHOUT_BUS = 0.5
"""How often all positions are compared with PostgreSQL: the last line of defence, and without a bus the only one."""
PEOPLE_PARTS = 6
"""While the bus is up, the users are compared in so many parts, one at a time: there are many more of them than of
conversations, and their news is rare.
"""

_ENTRY = struct.Struct("!QI16s")
"""An event on the bus: its version (0 for ephemeral ones), how long its frame is, who is gone by it."""
FACE = 1
"""In the place of the version: about a user's face, for all who watch them, and not about their presence."""
WATCHING = 1
"""In the place of the version: what changed about a user decides whom they may watch."""

log = logging.getLogger(__name__)


class Record(ConversationRecord, UserRecord, WatchRecord, Protocol):
    """What the hub asks of the database: of `PostgresHubStore`, since `hub` may import no queries."""


class Hub:
    """What one worker delivers."""

    def __init__(self, record: Record, connect: Connect, *, describe: Describe) -> None:
        """`connect` returns the bus by which the other workers are met; `describe`, the presences of those watched."""
        self._record = record
        self.bus: Bus = connect(deliver=self._hear, caught_up=self.compare_soon)
        self.watchers = Watchers(record, self.bus, describe=describe)
        self.people = OnlineUsers(record, self.bus, doubt=self.watchers.doubt_watched)
        self.topics = Topics(
            record,
            self.bus,
            self.people,
            flush_soon=self._flush_soon,
            doubt=lambda user_id, left: self.watchers.doubt_watched(user_id, cause=left),
        )
        self._outgoing: dict[bytes, list[bytes]] = {}
        self._is_flushing = False
        self._loop = asyncio.get_running_loop()
        self._compare_now = asyncio.Event()
        self._comparing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect to the bus and begin to compare positions. Raises Fatal if the bus cannot be reached."""
        await self.bus.start()
        self._comparing = asyncio.create_task(self._compare())

    async def close(self) -> None:
        """Stop."""
        if self._comparing is not None:
            self._comparing.cancel()
        self.people.close()
        self.watchers.close()
        self.topics.close()
        await self.bus.close()

    # ----------------------------------------------------------------------------- what handlers use (Events)

    def publish(self, event: DurableEvent, *, gone: UserId | None = None) -> None:
        """Deliver a durable event here and everywhere, in the order of versions; then drop who is `gone`."""
        frame = text_frame(encode(event))
        who = NOBODY if gone is None else gone.bytes
        self._say(topics.channel(event.conversation_id), event.version, frame, who)
        self.topics.accept(event.conversation_id, event.version, frame, who)

    def relay(self, conversation_id: ConversationId, event: ServerFrame) -> None:
        """Deliver something ephemeral to those who follow a conversation now."""
        frame = text_frame(encode(event))
        self._say(topics.channel(conversation_id), 0, frame)
        self.topics.accept(conversation_id, 0, frame, NOBODY)

    def whisper(self, user_id: UserId, event: ServerFrame) -> None:
        """Deliver something ephemeral to a user's own devices."""
        frame = text_frame(encode(event))
        self._say(online_users.channel(user_id), 0, frame)
        self.people.write(user_id, frame)

    def announce(self, user_id: UserId, event: ServerFrame) -> None:
        """Deliver a user's presence, or their face, to those who watch them."""
        frame = text_frame(encode(event))
        kind = FACE if isinstance(event, UserUpdated) else 0
        self._say(watchers.channel(user_id), kind, frame)
        self.watchers.tell(user_id, frame, is_face=kind == FACE)

    def reconsider(self, user_id: UserId, watcher: UserId | None = None) -> None:
        """Check again whether all who watch a user may do so, or one of them. They get nothing until that is done."""
        who = NOBODY if watcher is None else watcher.bytes
        self._say(watchers.channel(user_id), 0, b"", who)
        self.watchers.doubt_watchers(user_id, watcher)

    def notify(self, user_ids: Iterable[UserId], *, may_watch_others: bool = False) -> None:
        """Have all workers look again at these users' conversations and sessions, and with `may_watch_others` check
        whom they may watch.
        """
        for user_id in user_ids:
            self._say(online_users.channel(user_id), WATCHING if may_watch_others else 0, b"")
            self.people.look(user_id, may_watch_others=may_watch_others)

    def published_at(self, conversation_id: ConversationId, version: int) -> datetime | None:
        """Return when a version was delivered here, as far as that is remembered."""
        at = self.topics.told_at(conversation_id, version)
        return None if at is None else datetime.fromtimestamp(at, UTC)

    def remove(self, socket: Socket) -> None:
        """Forget a socket altogether."""
        for conversation_id in list(socket.attached):
            self.topics.detach(socket, conversation_id)
        self.watchers.remove(socket, list(socket.watched))
        self.people.remove(socket)

    # -------------------------------------------------------------------------------------------- other workers

    def _say(self, channel: bytes, version: int, frame: bytes, gone: bytes = NOBODY) -> None:
        entries = self._outgoing.get(channel)
        if entries is None:
            entries = self._outgoing[channel] = []
        entries.append(_ENTRY.pack(version, len(frame), gone))
        entries.append(frame)
        self._flush_soon()

    def _hear(self, channel: bytes, words: bytes) -> None:
        kind, one = channel[:2], UUID(hex=channel[2:].decode())
        end = 0
        while end < len(words):
            version, size, gone = _ENTRY.unpack_from(words, end)
            start = end + _ENTRY.size
            end = start + size
            frame = words[start:end]
            if kind == b"c:":
                self.topics.accept(ConversationId(one), version, frame, gone)
            elif kind == b"p:" and frame:
                self.watchers.tell(UserId(one), frame, is_face=version == FACE)
            elif kind == b"p:":
                self.watchers.doubt_watchers(UserId(one), None if gone == NOBODY else UserId(UUID(bytes=gone)))
            elif frame:
                self.people.write(UserId(one), frame)
            else:
                self.people.look(UserId(one), may_watch_others=version == WATCHING)

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what was delivered in this turn of the loop, and publish it."""
        self._is_flushing = False
        self.topics.flush()
        outgoing, self._outgoing = self._outgoing, {}
        for channel, entries in outgoing.items():
            self.bus.publish(channel, b"".join(entries))

    # -------------------------------------------------------------------------------------- looking for oneself

    def compare_soon(self) -> None:
        """Compare all positions with PostgreSQL now: something may have been missed."""
        self._compare_now.set()

    async def _compare(self) -> None:
        failures = Failures(log, "comparing positions")
        while True:
            pause = COMPARE_SECONDS if self.bus.is_up else COMPARE_SECONDS_WITHOUT_BUS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._compare_now.wait(), pause)
            was_away = self._compare_now.is_set()
            self._compare_now.clear()
            if was_away:
                self.watchers.doubt_all()
            is_all = was_away or not self.bus.is_up
            try:
                await self.topics.compare()
                await self.people.compare(parts=1 if is_all else PEOPLE_PARTS)
                failures.end()
            except Exception as error:  # noqa: BLE001 - the database is away: compare again when it is back
                failures.add(error)
