"""One client's connection. It answers frames in order, one at a time, and writes all frames to the client."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import NamedTuple

from protocol import PROTOCOL_VERSION
from protocol.codec import encode, label, now
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, UserId
from protocol.limits import MAX_FRAME_BYTES, Limits
from protocol.server import Error, GoingAway, Ready, Reply, ServerFrame
from protocol.values import Presence
from server.context import Context, UserNews
from server.core.errors import INTERNAL, log_defect, refusal
from server.core.throttle import Throttle
from server.gateway.dispatch import Dispatch, error_frame
from server.gateway.websocket import WebSocket
from server.hub.hub import Hub
from server.hub.online_users import Sight
from server.limits.admission import Slot
from server.limits.reservations import ReservingBucket
from server.limits.strikes import Strikes
from server.limits.token_bucket import Pace, too_many

log = logging.getLogger(__name__)

MAX_INBOX = 32
"""Max frames that wait in the inbox before the socket is not read any more. The max size is `MAX_FRAME_BYTES`."""
FRAMES_PER_TURN = 4
"""Max frames of a connection that are answered in one turn of the event loop."""
ENTER_SECONDS = 10.0
"""Max time of a connection's admission, in seconds. A client that announces a `resume` may never send it."""
REFRESH_RETRY_SECONDS = 1.0
"""Delay of a recheck after a failed refresh, in seconds."""
NOT_TEXT = Refused(ErrorCode.BAD_FRAME, "Binary messages are not supported. Send each frame as a text message.")
"""The reply to a binary message."""


class Hooks(NamedTuple):
    """Callbacks of a connection besides its frames, when it begins and when its user's rows change."""

    start: Callable[[Context], Awaitable[None]]
    refresh: Callable[[Context, UserNews, UserNews | None], Awaitable[None]]


class ConnectionDeps(NamedTuple):
    """Dependencies that all connections of a worker share."""

    epoch: str
    hub: Hub
    dispatch: Dispatch
    hooks: Hooks
    limits: Limits
    frames: Pace
    arrived: Callable[["Connection"], None]
    left: Callable[["Connection"], None]
    connections_per_user: int
    connection_counts: Counter[UserId]
    """The number of connections, per user."""
    heartbeat_seconds: float
    abuse: Throttle[UserId]
    """Limits log entries about users whose connection is closed for abuse."""
    working: "set[asyncio.Task[None]]"
    """Tasks that answer frames. They end before the server closes what they use."""


def too_many_of_user(most: int) -> Refused:
    """Return the last frame to a connection beyond its user's limit."""
    return Refused(
        ErrorCode.CONFLICT, f"Your user has {most:,} connections to this server, which is the max. Close one first."
    )


class Connection:
    """An authenticated WebSocket."""

    __slots__ = (
        "_deps", "_entering", "_frames", "_gone", "_has_to_refresh", "_inbox", "_inbox_bytes", "_is_closed",
        "_is_counted", "_is_resuming", "_last", "_said", "_slot", "_strikes", "_todo", "_user_news", "_whole",
        "_worker", "attached", "closed_with", "context", "expires_at", "is_partly_resumed", "session_id", "socket",
        "user_id", "user_version", "watched", "write",
    )  # fmt: skip

    def __init__(
        self,
        socket: WebSocket,
        deps: ConnectionDeps,
        *,
        expires_at: datetime,
        user_version: int,
        slot: Slot,
        gone: Callable[[], None],
    ) -> None:
        """`expires_at` and `user_version` are the session's. `slot` is the connection's slot in admission. `gone` is
        called when the connection has ended. `begin` sets `context`, because the two refer to each other.
        """
        self._gone = gone
        self._slot: Slot | None = slot
        self.socket = socket
        self.write: Callable[[bytes], None] = socket.transport.write
        self.expires_at = expires_at
        self.context: Context
        self.user_id: UserId
        self.attached: set[ConversationId] = set()
        self.watched: dict[UserId, Sight] = {}
        self._deps = deps
        # A list, because it is short, and an empty deque takes ten times the memory.
        self._inbox: list[bytes | None] = []
        self._inbox_bytes = 0
        self._todo: list[Callable[[], Awaitable[None]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._is_closed = False
        self._last: tuple[GoingAway, CloseCode] | None = None
        self._is_resuming = False
        self.is_partly_resumed = False
        self._has_to_refresh = False
        # The newest sources for the next refresh: own rows, and memberships.
        self._user_news: UserNews | None = None
        self._whole: UserNews | None = None
        self._entering: asyncio.TimerHandle | None = None
        self._is_counted = False
        # These belong to this connection alone. A table of them by `id` would fail, because ids of objects are reused.
        self._frames = ReservingBucket(deps.frames)
        self._strikes: Strikes | None = None
        self._said = 0  # bytes written since the current frame began
        self.user_version = user_version
        self.closed_with: CloseCode | None = None

    def begin(self, context: Context, *, is_resuming: bool) -> None:
        """Send `ready`, and then all conversations unless the client will send `resume`."""
        self.context = context
        self.user_id = context.user_id
        self.session_id = context.session_id
        self._is_resuming = is_resuming
        # Admission ends after this time in any case.
        self._entering = asyncio.get_running_loop().call_later(ENTER_SECONDS, self._is_in)
        self._todo.append(self._begin)
        # Counted before the first `await`, so that concurrent connections see each other.
        self._is_counted = self._deps.connection_counts[self.user_id] < self._deps.connections_per_user
        self._deps.connection_counts[self.user_id] += self._is_counted
        self._deps.arrived(self)
        self.socket.take_over(self)
        if not self._is_counted:
            self.say(error_frame(too_many_of_user(self._deps.connections_per_user)))
            self.close(CloseCode.TOO_MANY_CONNECTIONS)
        self._wake()

    def finish(self, last: GoingAway, code: CloseCode) -> None:
        """Answer the current frame, send `last`, and close. At the end of an epoch, close immediately, because replies
        from it are worthless.
        """
        self._last = last, code
        self._inbox.clear()
        if self._worker is None or code is CloseCode.START_OVER:
            self._go(last, code)

    # ------------------------------------------------------------------------------ from the socket

    def received(self, data: bytes, *, is_text: bool) -> None:
        """Put a frame into the inbox. Stop reading when the inbox is full."""
        if self._is_closed or self._last is not None:
            self.socket.pause_receiving()  # until the close frame, because frames that are dropped take no tokens
            return
        self._inbox.append(data if is_text else None)
        self._inbox_bytes += len(data)
        if len(self._inbox) >= MAX_INBOX or self._inbox_bytes >= MAX_FRAME_BYTES:
            self.socket.pause_receiving()
        self._wake()

    def overflowed(self) -> None:
        """Close, because the client reads too slowly."""
        self.close(CloseCode.SLOW)

    def flooded(self) -> None:
        """Close, because the client sends too many control frames or fragments."""
        self._end_abuse("too many control frames or fragments")

    def unfinished(self, refused: Refused, code: CloseCode) -> None:
        """Refuse the incomplete message, and close."""
        self.say(error_frame(refused))
        self.close(code)

    def lost(self) -> None:
        """The connection is lost."""
        if not self._is_closed:
            self._leave()

    # ------------------------------------------------------------------------------------------ to the socket

    def say(self, *frames: ServerFrame) -> None:
        """Send frames to this connection alone, in one write."""
        if not self._is_closed:
            encoded = [encode(frame) for frame in frames]
            self._said += sum(map(len, encoded))
            self.socket.write_asked(b"".join(map(self.socket.frame, encoded)))

    def close(self, code: CloseCode) -> None:
        """Close the connection."""
        if not self._is_closed:
            self.closed_with = code
            self._leave()
            self.socket.close(code)

    def refresh(self, user_news: UserNews | None = None) -> None:
        """Send the changes of the user's rows as soon as possible: those in `user_news`, or all."""
        if self._is_closed:
            return
        if self._is_resuming and self._entering is not None:
            # Nothing is followed yet. A refresh now would send everything just before the client says what it has.
            self._has_to_refresh = True
            return
        self._user_news = user_news or self._deps.hub.online_users.fresh(self.user_id)
        if self._user_news.is_whole:
            self._whole = self._user_news
        if self._refresh not in self._todo:
            self._todo.append(self._refresh)
            self._wake()

    def tell_own(self, version: int, frame: bytes, user_news: UserNews) -> None:
        """Send the event of a user version if it is the next one. Otherwise send all changes as soon as possible."""
        if self._is_closed or version <= self.user_version:
            return
        if self._entering is None and version == self.user_version + 1:
            self.user_version = version
            self.write(frame)
        else:
            self.refresh(user_news)

    # --------------------------------------------------------------------------------- for handlers (Subscriber)

    @property
    def is_closed(self) -> bool:
        """Whether no further frame reaches the client."""
        return self._is_closed

    async def open(self, conversation_ids: Sequence[ConversationId]) -> None:
        """Make the worker follow conversations."""
        await self._deps.hub.topics.open(conversation_ids)

    def charge(self, size: int) -> None:
        """Make the current frame take tokens for `size` more bytes."""
        self._said += size

    async def drained(self) -> None:
        """Wait until the client has received most of what was sent, so that the caller may produce more."""
        if self._slot is not None and self.socket.is_behind:
            self._slot.end()
        await self.socket.drained()

    def attach(self, conversation_id: ConversationId, version: int) -> bool:
        """Deliver the events after `version`. Return False if later ones were delivered already."""
        return self._is_closed or self._deps.hub.topics.attach(self, conversation_id, version)

    def catching_up(self, conversation_id: ConversationId) -> AbstractContextManager[None]:
        """Keep events that are delivered during the block, for `attach`."""
        return self._deps.hub.topics.catching_up(self, conversation_id)

    def detach(self, conversation_id: ConversationId) -> None:
        """Stop delivering events of a conversation."""
        self._deps.hub.topics.detach(self, conversation_id)

    def is_crowd(self, conversation_id: ConversationId) -> bool:
        """Whether the worker leaves out changes of a conversation."""
        return self._deps.hub.topics.is_crowd(conversation_id)

    async def watch(self, user_ids: Collection[UserId]) -> Mapping[UserId, Presence]:
        """Deliver the presence and the faces of users. Return their presences."""
        if (self._is_resuming and not self.attached) or self.is_partly_resumed:
            # Otherwise the connection would not notice the end of a conversation through which it sees them.
            self.is_partly_resumed = False
            self.refresh()
        return {} if self._is_closed else await self._deps.hub.watchers.watch(self, user_ids)

    def unwatch(self, user_ids: Iterable[UserId]) -> None:
        """Stop delivering these users."""
        self._deps.hub.watchers.remove(self, user_ids)

    # ---------------------------------------------------------------------------------------------- the worker

    def _wake(self) -> None:
        if self._worker is None and not self._is_closed:
            self._worker = asyncio.create_task(self._work())
            self._deps.working.add(self._worker)

    async def _work(self) -> None:
        """Do the pending work in order, and end. So an idle connection has no task."""
        done = 0
        try:
            while not self._is_closed:
                await self.socket.drained()
                done += 1
                if done % FRAMES_PER_TURN == 0:
                    await asyncio.sleep(0)  # refusals await nothing, so a full inbox would delay others
                if self._todo:
                    await self._todo.pop(0)()
                elif self._inbox:
                    await self._answer(self._inbox.pop(0))
                    if not self._inbox:
                        self._inbox_bytes = 0
                        self.socket.resume_receiving()
                else:
                    break
        except Exception:
            log.exception("a connection failed")
            self.close(CloseCode.GOING_AWAY)
        finally:
            if self._worker is not None:
                self._deps.working.discard(self._worker)
            self._worker = None
            if self._is_closed:
                self._forget_context()
        if self._last is not None:
            self._go(*self._last)

    async def _answer(self, data: bytes | None) -> None:
        answer: Reply | Error
        if self._slot is not None:
            self._slot.again()
        is_flood = is_abuse = False
        self._said = 0
        if data is None:
            answer = error_frame(NOT_TEXT)
        elif (wait := self._frames.take()) > 0:
            answer, is_flood = error_frame(too_many("`frames` of this connection", wait), re=label(data)), True
        else:
            answer = await self._deps.dispatch.run(self.context, data)
        if isinstance(answer, Error):
            self._strikes = self._strikes or Strikes()
            is_abuse = self._strikes.is_abuse(answer, is_flood=is_flood)
        try:
            self.say(answer)
            if data is not None:
                # The size includes the frames that a `resume` has sent.
                self._deps.dispatch.answered(self.context.user_id, data, self._said)
        except Exception as error:  # noqa: BLE001 - a reply that cannot be written is a defect of its frame alone
            log_defect(log, "writing an answer", error)
            answer = error_frame(INTERNAL, re=answer.re)
            self.say(answer)
        if self._entering is not None:
            self._is_in()
        if is_abuse:
            self._end_abuse("too many frames that are refused")

    def _end_abuse(self, what: str) -> None:
        if not self._is_closed and self._deps.abuse.passes(self.user_id):
            log.warning("closing a connection of user %s with 4003 (abuse): %s", self.user_id, what)
        self.close(CloseCode.ABUSE)

    async def _begin(self) -> None:
        deps = self._deps
        try:
            await deps.hub.online_users.add(self, self.user_version)
            self.say(
                Ready(
                    protocol=PROTOCOL_VERSION,
                    user=self.context.user,
                    user_version=self.user_version,
                    session_id=self.session_id,
                    epoch=deps.epoch,
                    server_time=now(),
                    heartbeat_ms=int(deps.heartbeat_seconds * 1000),
                    limits=deps.limits,
                )
            )
            if self._is_closed:
                return
            if not self._is_resuming:
                await deps.hooks.start(self.context)
                self._is_in()
            elif self._slot is not None and not self._inbox:
                self._slot.end()  # the connection waits for its client, so it needs no slot
        except Exception as error:
            if refusal(error, "a new connection") is None:
                raise
            self.close(CloseCode.GOING_AWAY)

    async def _refresh(self) -> None:
        user_news, whole, self._user_news, self._whole = self._user_news, self._whole, None, None
        if user_news is None:
            return
        try:
            await self._deps.hooks.refresh(self.context, user_news, whole)
        except Exception as error:
            if refusal(error, "the news of a user") is None:
                raise
            # One recheck serves all sockets of the user, which failed alike.
            again = partial(self._deps.hub.online_users.recheck, self.user_id, is_whole=True)
            asyncio.get_running_loop().call_later(REFRESH_RETRY_SECONDS, again)

    def _is_in(self) -> None:
        if self._slot is not None:
            self._slot.end()
            self._slot = None
        if self._entering is not None:
            self._entering.cancel()
            self._entering = None
            if self._has_to_refresh:
                self.refresh()

    def _go(self, last: GoingAway, code: CloseCode) -> None:
        self.say(last)
        self.close(code)

    def _leave(self) -> None:
        self._is_closed = True
        self._is_in()
        self._gone()
        if self._is_counted:
            self._is_counted = False
            self._deps.connection_counts[self.user_id] -= 1
            if not self._deps.connection_counts[self.user_id]:
                del self._deps.connection_counts[self.user_id]
        self._inbox.clear()
        self._todo.clear()
        self._deps.hub.remove(self)
        self._deps.left(self)
        if self._worker is None:
            self._forget_context()

    def _forget_context(self) -> None:
        """Delete the context of a closed connection, to which it refers. Otherwise both would stay until the next
        garbage collection.
        """
        del self.context
