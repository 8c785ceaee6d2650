"""The users with sockets at this worker, and rechecks of their own rows."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from protocol.errors import CloseCode
from protocol.ids import ConversationId, SessionId, UserId
from server.context import UserNews
from server.core.errors import log_failure
from server.hub.bus import Bus
from server.hub.rounds import follow_up

RECHECKS_AT_ONCE = 32
"""Max concurrent rechecks that a comparison starts, with their pauses. After an outage many users have news."""
RECHECK_PAUSE_FACTOR, RECHECK_PAUSE_MOST_SECONDS = 4, 2.0
"""Pause between a user's rechecks, as a multiple of the last one's duration, and its max in seconds."""

UNKNOWN = (0, 0, 0)
"""The versions of a user who is not in the database."""

log = logging.getLogger(__name__)


class Sight(IntEnum):
    """Parts of a watched user that a socket may see. Each includes those before it."""

    NOTHING = 0
    FACE = 1
    ALL = 2


class Socket(Protocol):
    """A connection, as far as the hub uses it. `Connection` implements it, which `hub` may not import."""

    user_id: UserId
    session_id: SessionId
    user_version: int
    attached: set[ConversationId]
    watched: dict[UserId, Sight]
    write: Callable[[bytes], None]

    def refresh(self, user_news: UserNews) -> None:
        """Make the socket send the changes of its user's rows."""

    def tell_own(self, version: int, frame: bytes, user_news: UserNews) -> None:
        """Send the event of a user version if it is the next one. Otherwise `refresh`."""

    def close(self, code: CloseCode) -> None:
        """Close the socket."""


class UserStore(Protocol):
    """Queries about users. `PostgresHubStore` implements them."""

    async def user_versions(self, user_ids: Sequence[UserId]) -> Mapping[UserId, tuple[int, int, int]]:
        """Return three numbers for each user. The first is the user version. The second is the hidden version, which
        moves when others let the user see less or more. The third counts the moves of the first that concern more than
        the user's own rows.
        """

    def user_news(self, user_id: UserId, *, is_whole: bool) -> UserNews:
        """Return the news that a user's sockets share."""

    async def living(self, session_ids: Sequence[SessionId]) -> Collection[SessionId]:
        """Return the valid ones of these sessions."""


class OnlineUser:
    """A user with sockets at this worker. `version` is from the last event or recheck, and `shared` from the last
    recheck. `compared` has the hidden and the shared number of the last comparison.
    """

    __slots__ = ("channels", "compared", "is_recheck_due", "is_whole_due", "recheck", "shared", "sockets", "version")

    def __init__(self, channels: tuple[bytes, bytes]) -> None:
        self.channels = channels
        self.sockets: set[Socket] = set()
        self.version = -1
        self.shared = -1
        self.compared = (0, 0)
        self.is_recheck_due = False
        self.is_whole_due = False
        self.recheck: asyncio.Task[None] | None = None


class OnlineUsers:
    """All users with sockets at this worker."""

    def __init__(self, store: UserStore, bus: Bus, *, doubt: Callable[[UserId], None]) -> None:
        """`doubt` is called with each user who may see less or more than before."""
        self._store = store
        self._bus = bus
        self._doubt = doubt
        self._users: dict[UserId, OnlineUser] = {}
        self._rechecks: set[asyncio.Task[None]] = set()

    def sockets(self, user_id: UserId) -> list[Socket]:
        """Return a user's sockets."""
        return list(user.sockets) if (user := self._users.get(user_id)) is not None else []

    def version(self, user_id: UserId) -> int:
        """Return the user version as of the last recheck, or -1."""
        return user.version if (user := self._users.get(user_id)) is not None else -1

    def everyone(self) -> list[Socket]:
        """Return all sockets."""
        return [socket for user in self._users.values() for socket in user.sockets]

    async def add(self, socket: Socket, version: int) -> None:
        """Add a socket, which from now on receives news of its user. `version` is the user version at which its session
        was valid. Later changes are rechecked.
        """
        user = self._users.get(socket.user_id)
        if user is None:
            user = self._users[socket.user_id] = OnlineUser((channel(socket.user_id), own_channel(socket.user_id)))
        user.sockets.add(socket)
        await self._bus.subscribe(user.channels)
        if user.version < 0:
            found = await self._store.user_versions([socket.user_id])
            own, hidden, shared = found.get(socket.user_id, UNKNOWN)
            user.compared = (hidden, shared)
            user.version, user.shared = max(user.version, own), max(user.shared, shared)
        if user.version != version:
            self.recheck(socket.user_id, is_whole=True)

    def remove(self, socket: Socket) -> None:
        """Remove a socket."""
        user = self._users.get(socket.user_id)
        if user is not None:
            user.sockets.discard(socket)
            if not user.sockets:
                del self._users[socket.user_id]
                for one in user.channels:
                    self._bus.unsubscribe(one)

    def write(self, user_id: UserId, frame: bytes) -> None:
        """Write a frame to a user's sockets."""
        if (user := self._users.get(user_id)) is not None:
            for socket in user.sockets:
                socket.write(frame)

    def accept(self, user_id: UserId, version: int, frame: bytes) -> None:
        """Write the event of a user version to the user's sockets. If an earlier version is missing, recheck the user
        instead.
        """
        user = self._users.get(user_id)
        if user is None or user.version < 0 or version <= user.version:
            return
        if version > user.version + 1:
            self.recheck(user_id)
            return
        user.version = version
        user_news = self._store.user_news(user_id, is_whole=False)
        for socket in list(user.sockets):
            socket.tell_own(version, frame, user_news)

    def expect(self, user_id: UserId, version: int) -> None:
        """Recheck a user unless the event of a user version has arrived, which was published before this call."""
        user = self._users.get(user_id)
        if user is not None and 0 <= user.version < version:
            self.recheck(user_id)

    def fresh(self, user_id: UserId) -> UserNews:
        """Return all news for a socket of a user, which is read from now on."""
        return self._store.user_news(user_id, is_whole=True)

    def recheck(self, user_id: UserId, *, may_watch_others: bool = False, is_whole: bool = False) -> None:
        """Recheck a user, because something changed, and make the sockets send the news. Sessions and memberships are
        read only if the versions show that they may have changed, or with `is_whole`. With `may_watch_others`, also
        recheck whom the user may watch.
        """
        user = self._users.get(user_id)
        if user is None:
            return
        # This is not a part of `refresh`, which a client that does not read can delay.
        if may_watch_others:
            self._doubt(user_id)
        # Serialize rechecks; always run one that starts after this call. A recheck that waits serves all calls.
        user.is_whole_due |= is_whole
        if not user.is_recheck_due:
            user.is_recheck_due = True
            user.recheck = self._spawn(self._recheck(user_id, user, user.recheck))

    def ids(self) -> list[UserId]:
        """Return all users."""
        return list(self._users)

    def online(self, user_ids: Iterable[UserId]) -> list[UserId]:
        """Return those users who have sockets."""
        return [one for one in user_ids if one in self._users]

    async def compare(self, user_ids: Sequence[UserId]) -> None:
        """Compare the versions of users with PostgreSQL, and recheck those whose news was missed."""
        versions = await self._store.user_versions(user_ids)
        await follow_up(self._compared(versions), at_once=RECHECKS_AT_ONCE)

    def _compared(self, versions: Mapping[UserId, tuple[int, int, int]]) -> Iterator[asyncio.Task[None] | None]:
        for user_id, (version, hidden, shared) in versions.items():
            user = self._users.get(user_id)
            if user is None or user.version < 0:
                continue
            if user.compared != (hidden, shared):
                # The bus may have lost a notification with `may_watch_others`, which a recheck does not replace.
                user.compared = (hidden, shared)
                self._doubt(user_id)
            if user.version < version or user.shared != shared:
                self.recheck(user_id)
                yield user.recheck

    def close(self) -> None:
        """Cancel the rechecks."""
        for recheck in self._rechecks:
            recheck.cancel()

    async def _recheck(self, user_id: UserId, user: OnlineUser, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        is_whole, user.is_recheck_due, user.is_whole_due = user.is_whole_due, False, False
        began = time.monotonic()
        try:
            user_news = await self._send_news(user_id, user, is_whole=is_whole)
        except Exception as error:  # noqa: BLE001 - the database is away, and the next comparison rechecks
            log_failure(log, f"rechecking user {user_id}", error)
            user.version, user.shared = 0, -1
            user_news = None
        if user_news is not None:
            # The read may wait for the user's own turns. The next recheck may end a session, so it waits no longer than
            # this.
            await asyncio.wait([self._spawn(_read(user_news, user))], timeout=RECHECK_PAUSE_MOST_SECONDS)
        # News that arrives during the pause shares one recheck. So a user with many conversations takes a bounded share
        # of the loop.
        spent = time.monotonic() - began
        await asyncio.sleep(max(0.0, min(RECHECK_PAUSE_FACTOR * spent, RECHECK_PAUSE_MOST_SECONDS - spent)))

    async def _send_news(self, user_id: UserId, user: OnlineUser, *, is_whole: bool) -> UserNews | None:
        """Close sockets whose sessions have ended, and make the others send the news. Return the news, or None if
        nothing changed.
        """
        version, _, shared = (await self._store.user_versions([user_id])).get(user_id, UNKNOWN)
        is_whole = is_whole or shared != user.shared
        if not is_whole and version <= user.version:
            return None
        checked: set[Socket] = set()
        if is_whole:
            checked.update(user.sockets)
            living = await self._store.living([socket.session_id for socket in checked])
            for socket in checked:
                if socket.session_id not in living:
                    socket.close(CloseCode.SESSION_ENDED)
        user_news = self._store.user_news(user_id, is_whole=is_whole)
        user.version, user.shared = max(user.version, version), shared
        for socket in list(user.sockets):
            if not is_whole or socket in checked:
                socket.refresh(user_news)
            else:
                # The socket was added meanwhile.
                self.recheck(user_id, is_whole=True)
        return user_news

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._rechecks.add(task)
        task.add_done_callback(self._rechecks.discard)
        return task


async def _read(user_news: UserNews, user: OnlineUser) -> None:
    """Read the news that most sockets of a user need. Each socket handles failures itself."""
    with contextlib.suppress(Exception):
        if user_news.is_whole:
            await user_news.memberships()
        for since, _ in Counter(socket.user_version for socket in user.sockets).most_common(1):
            await user_news.news(since)


def channel(user_id: UserId) -> bytes:
    """Return the bus channel of a user."""
    return b"u:" + user_id.hex.encode()


def own_channel(user_id: UserId) -> bytes:
    """Return the bus channel of changes of a user's own rows."""
    return b"o:" + user_id.hex.encode()
