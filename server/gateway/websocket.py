"""The WebSocket, as bytes: uvicorn's protocol class, with a way past ASGI for everything after the handshake.

ASGI carries a connection through authentication. Then a `Connection` takes the socket over: frames go straight to
it, and what it writes goes straight to the transport. Per connection that saves a task, two queues and a few
kilobytes; per delivery it saves most of the cost (docs/performance.md).
"""

import asyncio
import socket as socket_module
from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.speedups import apply_mask

from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import UserId
from server.gateway.sockets import FREE_BYTES, LINGER_BYTES, Sockets
from server.limits.token_bucket import TokenBucket

if TYPE_CHECKING:
    from server.gateway.connection import Connection

EXTENSION = "openchat.socket"
"""The key of the connection in the scope's extensions."""
PING = b"\x89\x00"
"""The frame that asks a peer for a pong (RFC 6455, section 5.5.2)."""
HANDSHAKE_SECONDS = 30.0
"""Max seconds from the handshake's request until somebody takes the socket over, `authenticate` included."""
MESSAGE_SECONDS = 30.0
"""Max seconds from the first byte of a message to its last, as long as the server reads."""
STALL_SECONDS = 30.0
"""Max seconds without the peer taking in any of a large answer."""
CLOSE_SECONDS = 5.0
"""How long a peer may take to answer a close, or to read what is left, before the connection is cut."""
MAX_EARLY_BYTES = 4096
"""Max bytes of the one message that is read before somebody takes the socket over: `authenticate` is small."""
MAX_FRAGMENTS = 128
"""Max frames that a message may be cut into."""


KERNEL_BYTES = 128 * 1024
"""How much the kernel may hold that the peer has not room for, besides `outbox_bytes` of ours."""
_WHOLE_TEXT, _PING, _PONG, _MASKED, _MASK_BYTES = 0x81, 0x89, 0x8A, 0x80, 4
_FIN, _OPCODE, _CONTROL, _CONTINUATION, _CLOSE, _MAX_CONTROL = 0x80, 0x0F, 0x08, 0, 8, 125
_MEDIUM, _LARGE = 126, 127
"""The bits and lengths of RFC 6455, section 5.2."""
DRAIN_LOOK_SECONDS = 0.02
_NOTSENT_LOWAT: int | None = getattr(socket_module, "TCP_NOTSENT_LOWAT", None)


class _NobodysQueue(asyncio.Queue[Any]):
    """Where uvicorn puts what it has to say to an application that is not there any more."""

    def put_nowait(self, item: Any) -> None:  # noqa: ANN401 - as asyncio.Queue has it
        """Drop it."""


_NOBODYS_QUEUE = _NobodysQueue()
_NOBODYS_EVENT = asyncio.Event()


class WebSocket(WebSocketsSansIOProtocol):
    """One connection of a client."""

    receiver: "Connection | None" = None
    # The first bytes of an incomplete frame, and the min number of bytes that complete it.
    _partial: bytearray | None = None
    _wanted = 0
    heard_at = 0.0
    # True while a large answer, which the peer asked for, may exceed `outbox_bytes`.
    _is_wide = False
    # Max bytes of a message.
    _most_bytes = MAX_EARLY_BYTES
    # Bytes of a message that is not complete, and `_unread`, as counted at `_sockets`, and the message's deadline.
    _held = 0
    _overdue: asyncio.TimerHandle | None = None
    # Bytes that arrived in the read in which reading paused, from the first frame that was not taken in.
    _unread = b""
    # Whether the message before `take_over` is a text.
    _is_first_text = False
    # Fragments of the message that is being received.
    _fragments = 0
    # Control frames and fragments; whole messages are the receiver's to count.
    _bucket: TokenBucket | None = None
    # The newest ping that is not answered.
    _ping: bytes | None = None
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _is_flooded = False
    # True once nothing is written any more, and no frame is read. Bytes that arrived since the close frame was sent.
    _is_lingering = False
    _dropped = 0

    def __init__(self, *args: Any, sockets: Sockets, key: str | None, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's
        """`sockets` has counted this connection under `key`."""
        super().__init__(*args, **kwargs)
        self._sockets = sockets
        self._outbox_bytes = sockets.outbox_bytes
        self._key = key
        # Whose bytes `_held` are: of the address, or of the user who took the socket over.
        self._client: str | UserId = key or ""
        self.conn.max_message_size = MAX_EARLY_BYTES

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102 - as asyncio.Protocol has it
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HANDSHAKE_SECONDS, self.transport.abort)
        self.heard_at = self.loop.time()
        self.transport.set_write_buffer_limits(high=self._outbox_bytes)
        if _NOTSENT_LOWAT is not None and (socket := transport.get_extra_info("socket")) is not None:
            # Or the kernel would hold megabytes more for a slow peer, and we would not know that it is slow.
            socket.setsockopt(IPPROTO_TCP, _NOTSENT_LOWAT, KERNEL_BYTES)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self.heard_at = self.loop.time()
        if self.close_sent:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self.transport.abort()
            if self._is_lingering or self.transport.is_closing():
                return
        whole = data if self._partial is None else self._continued(self._partial, data)
        if self.receiver is None and (not self.handshake_initiated or self.conn.parser_exc is not None):
            super().data_received(whole)
        elif not self.handshake_complete:
            self.transport.abort()  # RFC 6455, section 4.1: nothing before the answer to the handshake
        else:
            self._take_in(whole)

    def _take_in(self, data: bytes) -> None:
        """Take in frames until reading pauses. The rest waits until it resumes: thousands of small frames may arrive in
        one read. Before `take_over`, reading pauses after one message.
        """
        at = 0
        while at < len(data) and not self.read_paused:
            end = self._frame(data, at)
            if not end:
                self._partial = bytearray(data[at:])
                break
            if self._overdue is not None and self.conn.current_size is None:
                self._await_no_rest()  # that was the end of a message, and not only of a part of it
            at = end
        else:
            if at < len(data):
                self._unread += data[at:]
        if self._ping is not None:
            self._answer_ping()
        if self._partial is not None or self._unread or self._held or self.conn.current_size is not None:
            self._keep_unfinished()

    def _continued(self, partial: bytearray, data: bytes) -> bytes:
        """Return bytes with those of the frame that they continue; nothing as long as it is not complete."""
        partial += data
        if len(partial) < self._wanted:
            return b""
        self._partial = None
        return bytes(partial)

    def _keep_unfinished(self) -> None:
        """Count the bytes of a message that is not complete, and those that are not taken in yet. Begin the message's
        time. Close if all hold too much of that.
        """
        if self._is_lingering:
            return
        unread = len(self._partial or b"") + (self.conn.current_size or 0) + len(self._unread)
        count = max(0, unread - FREE_BYTES)
        try:
            if count > self._held:
                self._sockets.hold(self._client, count - self._held)
            elif count < self._held:
                self._sockets.release(self._client, self._held - count)
        except Refused as refused:
            self._give_up(refused, CloseCode.GOING_AWAY)
            return
        self._held = count
        self._await_rest()

    def _await_rest(self) -> None:
        """Begin the time of a message that is not complete, unless it runs already or the server does not read."""
        is_begun = self._partial is not None or self.conn.current_size is not None
        if is_begun and self._overdue is None and not (self.read_paused or self._is_lingering):
            self._overdue = self.loop.call_later(MESSAGE_SECONDS, self._is_overdue)

    def _await_no_rest(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _is_overdue(self) -> None:
        self._overdue = None
        self._sockets.timed_out += 1
        message = f"The rest of a message did not arrive in time. Send it within {MESSAGE_SECONDS:.0f} seconds."
        self._give_up(Refused(ErrorCode.BAD_FRAME, message), CloseCode.SILENT)

    def _give_up(self, refused: Refused, code: CloseCode) -> None:
        if self.receiver is not None:
            self.receiver.unfinished(refused, code)
        elif not self.close_sent:
            self.transport.abort()
        self._linger()

    def _forget_unfinished(self) -> None:
        self._await_no_rest()
        self._partial = None
        self._unread = b""
        self.frames = []
        self._release()

    def _release(self) -> None:
        if self._held:
            self._sockets.release(self._client, self._held)
            self._held = 0

    def _frame(self, data: bytes, at: int) -> int:
        """Take in the frame that begins at `at`, and return where it ends; 0 if it is not all there.

        A whole text message, which nearly all frames are, goes straight to the receiver; websockets sees to the rest.
        """
        if len(data) < at + 2:
            self._wanted = 2
            return 0
        size, first = data[at + 1] & 0x7F, at + 2
        if size == _MEDIUM:
            size, first = int.from_bytes(data[first : first + 2]), first + 2
        elif size == _LARGE:
            size, first = int.from_bytes(data[first : first + 8]), first + 8
        mask, first = first, first + _MASK_BYTES
        end = first + size
        is_legal = data[at + 1] & _MASKED and size <= self._most_bytes
        if is_legal and end > len(data):
            self._wanted = end - at
            return 0
        is_whole = is_legal and data[at] == _WHOLE_TEXT and self.conn.current_size is None
        if is_whole and self.receiver is not None and not self.close_sent:
            self.receiver.received(apply_mask(data[first:end], data[mask:first]), is_text=True)
            return end
        if is_legal and data[at] in {_PING, _PONG} and size <= _MAX_CONTROL:
            if self._is_allowed(data[at]) and data[at] == _PING:
                self._ping = apply_mask(data[first:end], data[mask:first])
        elif is_legal and (self.close_sent and data[at] & _OPCODE != _CLOSE):
            self._is_allowed(data[at])  # nobody reads it any more
        elif self._is_allowed(data[at]):
            end = end if is_legal else len(data)
            super().data_received(data[at:end])
        return len(data) if self._is_lingering else end

    def _is_allowed(self, head: int) -> bool:
        """Count a frame that is not a whole text message, or comes after the close frame. Close if that is too many."""
        if not head & _CONTROL:
            self._fragments = self._fragments + 1 if head & _OPCODE == _CONTINUATION else 1
        if self._bucket is None:
            self._bucket = TokenBucket(self._sockets.frames)
        if not self._is_flooded and (self._bucket.take() > 0 or self._fragments > MAX_FRAGMENTS):
            self._is_flooded = True
            self._ping = None
            if self.close_sent:
                pass  # it was told why, and a client may have sent much before it read that
            elif self.receiver is not None:
                self.receiver.flooded()
            else:
                self._sockets.flooded(self._key or "unknown")
                self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABUSE})
                self.close(CloseCode.ABUSE)
            self._linger()
        return not self._is_flooded

    def _answer_ping(self) -> None:
        """Answer the newest ping, which is enough (RFC 6455, section 5.5.3), unless the peer does not read."""
        ping, self._ping = self._ping, None
        is_reading = self.transport.get_write_buffer_size() <= self._outbox_bytes // 4
        if ping is not None and is_reading and not self.close_sent:
            self.transport.write(bytes((_PONG, len(ping))) + ping)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        super().connection_lost(exc)
        self.disarm()
        if self._stalled is not None:
            self._stalled.cancel()
        self._forget_unfinished()
        if self._key is not None:
            self._sockets.leave(self._key)
            self._key = None
        self._sockets.works(self)
        self._leave()

    def pause_writing(self) -> None:  # noqa: D102
        super().pause_writing()
        if self.receiver is not None:
            # Called from within a write: the receiver may not change who is written to just now.
            self.loop.call_soon(self.receiver.overflowed)

    def handle_connect(self, event: Any) -> None:  # noqa: D102, ANN401 - websockets' Request
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]
        else:
            self._sockets.answered(self.response.status_code)

    def send_receive_event_to_app(self) -> None:  # noqa: D102
        self._fragments = 0
        frames, self.frames = self.frames, []
        if self.close_sent:
            return
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        is_text = self.curr_msg_data_type == "text"
        if self.receiver is not None:
            self.receiver.received(data, is_text=is_text)
            return
        self.is_first_text = is_text
        # As bytes also if it is a text: whether they are UTF-8 is for whoever reads them to find out and to answer.
        self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
        self.pause_receiving()

    async def receive(self) -> Any:  # noqa: ANN401, D102 - as uvicorn has it
        if not (self.handshake_complete and self.queue.empty()):
            return await self.queue.get()
        # For the client to authenticate: whoever does not makes room for others.
        self._sockets.waits(self, self.transport.abort)
        try:
            return await self.queue.get()
        finally:
            if not self.close_sent:
                self._sockets.works(self)

    def take_over(self, receiver: "Connection") -> None:
        """Hand everything that comes from here on to `receiver`, and what came already."""
        self.disarm()
        self.receiver = receiver
        while not self.queue.empty():
            event = self.queue.get_nowait()
            if event["type"] == "websocket.receive":
                receiver.received(event.get("bytes") or b"", is_text=self.is_first_text)
        self._most_bytes = self.conn.max_message_size = self.config.ws_max_size
        self._forget_handshake()
        self._release()
        self._client = receiver.user_id
        if self.disconnected or self._is_lingering:
            self._leave()
        else:
            self.resume_receiving()
            self._keep_unfinished()

    def disarm(self) -> None:
        """End the deadline of the handshake."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget_handshake(self) -> None:
        """Let go of what only the handshake and ASGI need: half of what an idle connection would hold."""
        del self.scope, self.request, self.response
        self.queue = _NOBODYS_QUEUE
        self.writable = _NOBODYS_EVENT

    def write_asked(self, data: bytes) -> None:
        """Write what the peer asked for: however large, it does not make the peer slow. Await `drained` before the next
        such thing, so that no more than one of them waits.
        """
        if len(data) > self._outbox_bytes // 4:
            waiting = self.transport.get_write_buffer_size()
            self.transport.set_write_buffer_limits(high=waiting + len(data) + self._outbox_bytes)
            self._is_wide = True
            # Most of the answer before was taken in: the time begins anew, with what waits now.
            if self._stalled is not None:
                self._stalled.cancel()
            self._stalled = self.loop.call_later(STALL_SECONDS, self._is_stalled, waiting + len(data))
        self.transport.write(data)

    def _is_stalled(self, before: int) -> None:
        """Cut the connection if the peer has taken in nothing of a large answer; look again while some of it waits."""
        waiting = self.transport.get_write_buffer_size()
        self._stalled = None
        if waiting > self._outbox_bytes // 2:
            if waiting >= before:
                self.transport.abort()
            else:
                self._stalled = self.loop.call_later(STALL_SECONDS, self._is_stalled, waiting)

    @property
    def is_behind(self) -> bool:
        """Whether the peer has most of a large answer still to take in."""
        return (
            self._is_wide
            and not self.transport.is_closing()
            and self.transport.get_write_buffer_size() > self._outbox_bytes // 2
        )

    async def drained(self) -> None:
        """Return when the peer has taken in most of what it asked for, or is gone."""
        while self.is_behind:  # noqa: ASYNC110 - nothing tells when the transport has written
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        if self._is_wide and not self.transport.is_closing():
            self.transport.set_write_buffer_limits(high=self._outbox_bytes)
            self._is_wide = False

    def pause_receiving(self) -> None:
        """Read no more from the peer for now."""
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
            self._await_no_rest()

    def resume_receiving(self) -> None:
        """Read from the peer again, and take in first what was read before."""
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
            unread, self._unread = self._unread, b""
            self._take_in(unread)

    def close(self, code: CloseCode) -> None:
        """Close with `code` after what is already on its way, and cut the connection if the peer is too slow."""
        if self.close_sent or self.transport.is_closing():
            return
        try:
            self.conn.send_close(code, code.name.lower())
        except InvalidState:
            self.transport.close()
            return
        self.transport.write(b"".join(self.conn.data_to_send()))
        self._sockets.closed[str(code.value)] += 1
        self.close_sent = True
        self._sockets.waits(self, self.transport.abort)
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)
        self.resume_receiving()

    def handle_parser_exception(self) -> None:  # noqa: D102
        assert self.conn.close_sent is not None  # noqa: S101 - the library's condition
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self._sockets.closed[str(int(code))] += 1
        self.close_sent = True
        self._linger()

    def _linger(self) -> None:
        """After the close frame of a peer that no frame is taken from any more: drop what comes, until the peer closes
        or at the bounds.
        """
        if self._is_lingering or self.transport.is_closing():
            return
        self._is_lingering = True
        self._ping = None
        self._forget_unfinished()
        self.disarm()
        self._leave()
        self._sockets.waits(self, self.transport.abort)
        self.resume_receiving()
        self.transport.write_eof()
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def _leave(self) -> None:
        """Tell the receiver that nothing can be written any more."""
        if self.receiver is not None:
            self.receiver.lost()
            self.receiver = None

    async def run_asgi(self) -> None:
        """Run the app for the handshake; afterwards the connection lives on if somebody took it over."""
        try:
            await self.app(self.scope, self.receive, self.send)
        except (ClientDisconnected, WebSocketDisconnect):
            pass
        except Exception:
            self.logger.exception("the WebSocket handshake failed")
            self.send_500_response()
        if self.receiver is None and self.close_timer is None:
            self.transport.close()
