"""One client's connection: its frames in order, one at a time, and everything that is written to it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import NamedTuple

from protocol import PROTOCOL_VERSION
from protocol.codec import encode, label, now, text_frame
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
"""How many frames, or MAX_FRAME_BYTES in all, wait for their turn before the socket is not read any more."""
AT_ONCE = 4
"""Frames of a connection that are answered in one turn of the loop, at most."""
ENTER_SECONDS = 10.0
"""Max seconds on the way in: a client that says it will resume may never do so."""
REFRESH_RETRY_SECONDS = 1.0
NOT_TEXT = Refused(ErrorCode.BAD_FRAME, "Binary messages are not supported. Send each frame as a text message.")
"""The answer to a binary message."""


class Hooks(NamedTuple):
    """What happens to a connection besides its frames: when it begins, and when its user's conversations change."""

    start: Callable[[Context], Awaitable[None]]
    refresh: Callable[[Context, UserNews, UserNews | None], Awaitable[None]]


class ConnectionDeps(NamedTuple):
    """What all connections of a worker have in common."""

    epoch: str
    hub: Hub
    dispatch: Dispatch
    lifecycle: Hooks
    limits: Limits
    frames: Pace
    arrived: Callable[["Connection"], None]
    left: Callable[["Connection"], None]
    connections_per_user: int
    places: Counter[UserId]
    """Connections of each user."""
    heartbeat_seconds: float
    abuse: Throttle[UserId]
    """Picks of which users it is logged that they are closed for abuse."""
    working: "set[asyncio.Task[None]]"
    """What connections are in the middle of: it is done before what it needs is closed."""


def too_many_of_user(most: int) -> Refused:
    """Return the last answer to a connection beyond its user's limit."""
    return Refused(
        ErrorCode.CONFLICT, f"Your user has {most:,} connections to this server, which is the max. Close one first."
    )


class Connection:
    """A WebSocket that has been authenticated."""

    __slots__ = (
        "_entering", "_frames", "_gone", "_has_place", "_has_to_refresh", "_inbox", "_inbox_bytes", "_is_closed",
        "_is_resuming", "_last", "_look", "_place", "_said", "_shared", "_strikes", "_todo", "_whole", "_worker",
        "attached", "closed_with", "context", "expires_at", "session_id", "socket", "user_id", "user_version",
        "watched", "write",
    )  # fmt: skip

    def __init__(
        self,
        socket: WebSocket,
        shared: ConnectionDeps,
        *,
        expires_at: datetime,
        user_version: int,
        place: Slot,
        gone: Callable[[], None],
    ) -> None:
        """`expires_at` and `user_version` are of the session, `place` is among those who are on their way in; `gone` is
        called when the connection is no more. `context` comes with `begin`: each needs the other.
        """
        self._gone = gone
        self._place: Slot | None = place
        self.socket = socket
        self.write: Callable[[bytes], None] = socket.transport.write
        self.expires_at = expires_at
        self.context: Context
        self.user_id: UserId
        self.attached: set[ConversationId] = set()
        self.watched: dict[UserId, Sight] = {}
        self._shared = shared
        # A list: it is short, and an empty deque takes ten times the memory.
        self._inbox: list[bytes | None] = []
        self._inbox_bytes = 0
        self._todo: list[Callable[[], Awaitable[None]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._is_closed = False
        self._last: tuple[GoingAway, CloseCode] | None = None
        self._is_resuming = False
        self._has_to_refresh = False
        # What the next refresh is told from, the newest of each: own rows, and memberships.
        self._look: UserNews | None = None
        self._whole: UserNews | None = None
        self._entering: asyncio.TimerHandle | None = None
        self._has_place = False
        # Of this connection alone, and gone with it: the `id` of a connection is used again.
        self._frames = ReservingBucket(shared.frames)
        self._strikes: Strikes | None = None
        self._said = 0  # bytes since the frame began that is answered now
        self.user_version = user_version
        self.closed_with: CloseCode | None = None

    def begin(self, context: Context, *, is_resuming: bool) -> None:
        """Say `ready`, and then, unless the client will `resume`, all conversations."""
        self.context = context
        self.user_id = context.user_id
        self.session_id = context.session_id
        self._is_resuming = is_resuming
        # It is no longer on its way in, in any case, after a while.
        self._entering = asyncio.get_running_loop().call_later(ENTER_SECONDS, self._is_in)
        self._todo.append(self._begin)
        # Counted before anything is awaited, or connections that come concurrently would not see each other.
        self._has_place = self._shared.places[self.user_id] < self._shared.connections_per_user
        self._shared.places[self.user_id] += self._has_place
        self._shared.arrived(self)
        self.socket.take_over(self)
        if not self._has_place:
            self.say(error_frame(too_many_of_user(self._shared.connections_per_user)))
            self.close(CloseCode.TOO_MANY_CONNECTIONS)
        self._wake()

    def finish(self, last: GoingAway, code: CloseCode) -> None:
        """Answer what has been begun, say a last word, and close. What was begun in an epoch that is over has no answer
        that is worth the wait.
        """
        self._last = last, code
        self._inbox.clear()
        if self._worker is None or code is CloseCode.START_OVER:
            self._go(last, code)

    # ------------------------------------------------------------------------------ from the socket

    def received(self, data: bytes, *, is_text: bool) -> None:
        """Put a frame in line; stop reading when the line is long."""
        if self._is_closed or self._last is not None:
            self.socket.pause_receiving()  # until the close frame: what is dropped takes no tokens
            return
        self._inbox.append(data if is_text else None)
        self._inbox_bytes += len(data)
        if len(self._inbox) >= MAX_INBOX or self._inbox_bytes >= MAX_FRAME_BYTES:
            self.socket.pause_receiving()
        self._wake()

    def overflowed(self) -> None:
        """The client reads too slowly."""
        self.close(CloseCode.SLOW)

    def flooded(self) -> None:
        """The client sends too many control frames or fragments."""
        self._end_abuse("too many control frames or fragments")

    def unfinished(self, refused: Refused, code: CloseCode) -> None:
        """The rest of a message is not waited for any more."""
        self.say(error_frame(refused))
        self.close(code)

    def lost(self) -> None:
        """The connection is gone."""
        if not self._is_closed:
            self._leave()

    # ------------------------------------------------------------------------------------------ to the socket

    def say(self, *frames: ServerFrame) -> None:
        """Send frames to this connection alone, in one write."""
        if not self._is_closed:
            encoded = [encode(frame) for frame in frames]
            self._said += sum(map(len, encoded))
            self.socket.write_asked(b"".join([text_frame(one) for one in encoded]))

    def close(self, code: CloseCode) -> None:
        """Close the connection."""
        if not self._is_closed:
            self.closed_with = code
            self._leave()
            self.socket.close(code)

    def refresh(self, look: UserNews | None = None) -> None:
        """Say what changed for the user, when there is time: what `look` knows, or everything."""
        if self._is_closed:
            return
        if self._is_resuming and self._entering is not None:
            # Nothing is followed yet: all would be said anew, just before the client says what it has.
            self._has_to_refresh = True
            return
        self._look = look or self._shared.hub.people.fresh(self.user_id)
        if self._look.is_whole:
            self._whole = self._look
        if self._refresh not in self._todo:
            self._todo.append(self._refresh)
            self._wake()

    # ---------------------------------------------------------------------------- what handlers use (Subscriber)

    @property
    def is_closed(self) -> bool:
        """Whether nothing that is said reaches the client any more."""
        return self._is_closed

    async def open(self, conversation_ids: Sequence[ConversationId]) -> None:
        """Have the worker follow conversations."""
        await self._shared.hub.topics.open(conversation_ids)

    def charge(self, size: int) -> None:
        """Have the frame that is answered take tokens as if so many bytes were said."""
        self._said += size

    async def drained(self) -> None:
        """Return when most of what was said has been taken in: before more of it is made."""
        if self._place is not None and self.socket.is_behind:
            self._place.end()
        await self.socket.drained()

    def attach(self, conversation_id: ConversationId, version: int) -> bool:
        """Deliver the events after `version`; False if later ones were delivered already."""
        return self._is_closed or self._shared.hub.topics.attach(self, conversation_id, version)

    def catching_up(self, conversation_id: ConversationId) -> AbstractContextManager[None]:
        """Keep what is delivered meanwhile, for `attach`."""
        return self._shared.hub.topics.catching_up(self, conversation_id)

    def detach(self, conversation_id: ConversationId) -> None:
        """Deliver no more of them."""
        self._shared.hub.topics.detach(self, conversation_id)

    async def watch(self, user_ids: Collection[UserId]) -> Mapping[UserId, Presence]:
        """Deliver the presence and the faces of users; return how they are seen."""
        if self._is_resuming and not self.attached:
            # Or else it would not notice that a conversation ends in which it sees them.
            self.refresh()
        return {} if self._is_closed else await self._shared.hub.watchers.watch(self, user_ids)

    def unwatch(self, user_ids: Iterable[UserId]) -> None:
        """Deliver it no more."""
        self._shared.hub.watchers.remove(self, user_ids)

    # ---------------------------------------------------------------------------------------------- the worker

    def _wake(self) -> None:
        if self._worker is None and not self._is_closed:
            self._worker = asyncio.create_task(self._work())
            self._shared.working.add(self._worker)

    async def _work(self) -> None:
        """Do what there is to do, in order, and end: an idle connection has no task."""
        done = 0
        try:
            while not self._is_closed:
                await self.socket.drained()
                done += 1
                if done % AT_ONCE == 0:
                    await asyncio.sleep(0)  # refusals wait for nothing: a full inbox would keep others waiting
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
                self._shared.working.discard(self._worker)
            self._worker = None
        if self._last is not None:
            self._go(*self._last)

    async def _answer(self, data: bytes | None) -> None:
        answer: Reply | Error
        if self._place is not None:
            self._place.again()
        is_flood = is_abuse = False
        self._said = 0
        if data is None:
            answer = error_frame(NOT_TEXT)
        elif (wait := self._frames.take()) > 0:
            answer, is_flood = error_frame(too_many("`frames` of this connection", wait), re=label(data)), True
        else:
            answer = await self._shared.dispatch.run(self.context, data)
        if isinstance(answer, Error):
            self._strikes = self._strikes or Strikes()
            is_abuse = self._strikes.is_abuse(answer, is_flood=is_flood)
        try:
            self.say(answer)
            if data is not None:
                # With all that a `resume` has said.
                self._shared.dispatch.answered(self.context.user_id, data, self._said)
        except Exception as error:  # noqa: BLE001 - an answer that cannot be written is a defect of its frame alone
            log_defect(log, "writing an answer", error)
            answer = error_frame(INTERNAL, re=answer.re)
            self.say(answer)
        if self._entering is not None:
            self._is_in()
        if is_abuse:
            self._end_abuse("too many frames that are refused")

    def _end_abuse(self, what: str) -> None:
        if not self._is_closed and self._shared.abuse.passes(self.user_id):
            log.warning("closing a connection of user %s with 4003 (abuse): %s", self.user_id, what)
        self.close(CloseCode.ABUSE)

    async def _begin(self) -> None:
        shared = self._shared
        try:
            await shared.hub.people.add(self, self.user_version)
            self.say(
                Ready(
                    protocol=PROTOCOL_VERSION,
                    user=self.context.user,
                    user_version=self.user_version,
                    session_id=self.session_id,
                    epoch=shared.epoch,
                    server_time=now(),
                    heartbeat_ms=int(shared.heartbeat_seconds * 1000),
                    limits=shared.limits,
                )
            )
            if self._is_closed:
                return
            if not self._is_resuming:
                await shared.lifecycle.start(self.context)
                self._is_in()
            elif self._place is not None and not self._inbox:
                self._place.end()  # it waits for its client: the server has nothing to do
        except Exception as error:
            if refusal(error) is None:
                raise
            self.close(CloseCode.GOING_AWAY)

    async def _refresh(self) -> None:
        look, whole, self._look, self._whole = self._look, self._whole, None, None
        if look is None:
            return
        try:
            await self._shared.lifecycle.refresh(self.context, look, whole)
        except Exception as error:
            if refusal(error) is None:
                raise
            # One look for all sockets of the user, which failed alike.
            again = partial(self._shared.hub.people.look, self.user_id, is_whole=True)
            asyncio.get_running_loop().call_later(REFRESH_RETRY_SECONDS, again)

    def _is_in(self) -> None:
        if self._place is not None:
            self._place.end()
            self._place = None
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
        if self._has_place:
            self._has_place = False
            self._shared.places[self.user_id] -= 1
            if not self._shared.places[self.user_id]:
                del self._shared.places[self.user_id]
        self._inbox.clear()
        self._todo.clear()
        self._shared.hub.remove(self)
        self._shared.left(self)
