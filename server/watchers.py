"""Watchers: the sockets that are told each user's presence and face, and whether they still may be."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_WATCHED
from protocol.server import PresenceChanged
from protocol.values import Presence
from server.bus import Bus
from server.errors import log_failure
from server.people import Socket

PAIRS = 2_000
"""Max pairs of a watcher and a watched user in one statement."""
RETRY_SECONDS = 1.0

Pair = tuple[UserId, UserId]
"""A watcher and a watched user."""

log = logging.getLogger(__name__)


class WatchRecord(Protocol):
    """What is asked of the database about watchers."""

    async def watchable(self, pairs: Sequence[Pair]) -> Mapping[Pair, bool]:
        """Return those of the pairs whose watcher may see the face, and whether also the presence."""


class Watchers:
    """Who watches whom at this worker.

    A pair is in doubt from when something changed that may forbid it until the database was asked. What would be
    delivered meanwhile is held back: of each kind the newest, since each frame says all.
    """

    def __init__(self, record: WatchRecord, bus: Bus) -> None:
        self._record = record
        self._bus = bus
        self._watchers: dict[UserId, dict[Socket, Callable[[bytes], None]]] = {}
        self._held: dict[UserId, dict[Socket, dict[bool, bytes]]] = {}
        self._due: dict[tuple[Socket, UserId], None] = {}
        self._asking: asyncio.Task[None] | None = None

    async def add(self, socket: Socket, user_ids: Collection[UserId]) -> None:
        """Deliver the presence and the faces of users to a socket. Raises Refused if that would be too many."""
        if len(socket.watched.union(user_ids)) > MAX_WATCHED:
            raise Refused(
                ErrorCode.CONFLICT,
                f"A connection watches at most {MAX_WATCHED} users. Unwatch some first.",
                path="user_ids",
            )
        socket.watched.update(user_ids)
        for user_id in user_ids:
            self._watchers.setdefault(user_id, {})[socket] = socket.write
        # The caller asked before the socket was among the watchers: what changed since then told it nothing.
        self._doubt((socket, user_id) for user_id in user_ids)
        await self._bus.subscribe([channel(user_id) for user_id in user_ids])

    def remove(self, socket: Socket, user_ids: Iterable[UserId]) -> None:
        """Deliver them no more."""
        for user_id in user_ids:
            socket.watched.discard(user_id)
            socket.faces_only.discard(user_id)
            watchers = self._watchers.get(user_id)
            if watchers is not None and watchers.pop(socket, None) is not None and not watchers:
                del self._watchers[user_id]
                self._bus.unsubscribe(channel(user_id))

    def tell(self, user_id: UserId, frame: bytes, *, is_face: bool) -> None:
        """Write a user's presence, or their face, to the sockets that may have it."""
        held = self._held.get(user_id, {})
        for socket, write in self._watchers.get(user_id, {}).items():
            if socket in held:
                held[socket][is_face] = frame
            elif is_face or user_id not in socket.faces_only:
                write(frame)

    def doubt_watchers(self, user_id: UserId, watcher: UserId | None) -> None:
        """Ask again whether all who watch a user may, or one of them."""
        self._doubt(
            (socket, user_id)
            for socket in self._watchers.get(user_id, {})
            if watcher is None or socket.user_id == watcher
        )

    def doubt_all(self) -> None:
        """Ask again about everybody: news that forbids something may have been missed."""
        self._doubt((socket, user_id) for user_id, watchers in self._watchers.items() for socket in watchers)

    def doubt_watched(self, socket: Socket) -> None:
        """Ask again whether a socket may watch whom it watches."""
        self._doubt((socket, user_id) for user_id in socket.watched)

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    # ------------------------------------------------------------------------------------------------- asking

    def _doubt(self, pairs: Iterator[tuple[Socket, UserId]]) -> None:
        for socket, user_id in pairs:
            self._held.setdefault(user_id, {}).setdefault(socket, {})
            self._due[socket, user_id] = None
        if self._due and self._asking is None:
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Ask about all pairs in doubt, one statement after the other: many changes take no more of the database."""
        most = PAIRS
        try:
            while self._due:
                pairs = list(islice(self._due, most))
                for pair in pairs:
                    del self._due[pair]
                try:
                    # Each once, however many sockets a user has.
                    asked = dict.fromkeys((socket.user_id, user_id) for socket, user_id in pairs)
                    found = await self._record.watchable(list(asked))
                except Exception as error:  # noqa: BLE001 - what is held back stays so until it could be asked
                    log_failure(log, "asking who may watch whom", error)
                    # Behind the others, and fewer together: the statement may have taken too long.
                    self._due |= dict.fromkeys(pairs)
                    most = max(1, most // 2)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                most = PAIRS
                for socket, user_id in pairs:
                    if (socket, user_id) not in self._due:
                        self._decide(socket, user_id, is_seen=found.get((socket.user_id, user_id)))
        finally:
            self._asking = None

    def _decide(self, socket: Socket, user_id: UserId, *, is_seen: bool | None) -> None:
        """Deliver what was held back of a user, as far as the socket may see it; None: not even the face."""
        held = self._held[user_id].pop(socket)
        if not self._held[user_id]:
            del self._held[user_id]
        if user_id not in socket.watched:
            return
        was_seen = user_id not in socket.faces_only
        if is_seen is None:
            self.remove(socket, [user_id])
        elif is_seen:
            socket.faces_only.discard(user_id)
        else:
            # In a conversation a face is seen when presence is not, whoever hides it from whom.
            socket.faces_only.add(user_id)
        if was_seen and not is_seen:
            socket.say(PresenceChanged(presence=Presence(user_id=user_id, status="offline")))
        for is_face, frame in held.items():
            if is_seen or (is_face and is_seen is not None):
                socket.write(frame)


def channel(user_id: UserId) -> bytes:
    """Return the bus channel of a user's presence and face."""
    return b"p:" + user_id.hex.encode()
