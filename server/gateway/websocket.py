"""The WebSocket transport. It extends uvicorn's protocol class, and bypasses ASGI after the handshake.

ASGI carries a connection through authentication. Then a `Connection` takes over the socket. It receives frames
directly, and writes directly to the transport. Per connection that saves a task, two queues and a few kilobytes. Per
delivery it saves most of the cost (docs/performance.md).
"""

import asyncio
import socket as socket_module
from http import HTTPStatus
from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocketDisconnect
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.speedups import apply_mask

from protocol.codec import text_frame
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import UserId
from server.gateway import compression
from server.gateway.sockets import FREE_BYTES, LINGER_BYTES, Sockets
from server.limits.token_bucket import TokenBucket

if TYPE_CHECKING:
    from server.gateway.connection import Connection

EXTENSION = "openchat.socket"
"""The key of the connection in the scope's extensions."""
PING = b"\x89\x00"
"""A ping frame (RFC 6455, section 5.5.2)."""
HANDSHAKE_SECONDS = 30.0
"""Max time from the handshake's request until `take_over`, including `authenticate`, in seconds."""
MESSAGE_SECONDS = 30.0
"""Max time from the first to the last byte of a message, while the server reads, in seconds."""
STALL_SECONDS = 30.0
"""Max time in which the peer reads nothing of a large reply, in seconds."""
CLOSE_SECONDS = 5.0
"""Max time for the peer to answer a close frame or to read the rest, in seconds. Then the connection is cut."""
MAX_EARLY_BYTES = 4096
"""Max bytes of the one message before `take_over`, which is `authenticate`."""
MAX_FRAGMENTS = 128
"""Max fragments of a message."""


KERNEL_BYTES = 128 * 1024
"""Max bytes for a slow peer in the kernel's buffer, in addition to `outbox_bytes` in ours."""
_WHOLE_TEXT, _COMPRESSED_TEXT = 0x81, 0xC1
_PING, _PONG, _MASKED, _MASK_BYTES = 0x89, 0x8A, 0x80, 4
_FIN, _OPCODE, _CONTROL, _CONTINUATION, _CLOSE, _MAX_CONTROL = 0x80, 0x0F, 0x08, 0, 8, 125
_MEDIUM, _LARGE = 126, 127
"""Bits and lengths of RFC 6455, section 5.2."""
DRAIN_POLL_SECONDS = 0.02
"""Interval of checks whether the peer has read, in seconds."""
_NOTSENT_LOWAT: int | None = getattr(socket_module, "TCP_NOTSENT_LOWAT", None)


class _NobodysQueue(asyncio.Queue[Any]):
    """A queue for uvicorn's events after the application has ended."""

    def put_nowait(self, item: Any) -> None:  # noqa: ANN401 - as asyncio.Queue has it
        """Drop the event."""


_NOBODYS_QUEUE = _NobodysQueue()
_NOBODYS_EVENT = asyncio.Event()


class WebSocket(WebSocketsSansIOProtocol):
    """One connection of a client."""

    receiver: "Connection | None" = None
    # The first bytes of an incomplete frame, and the min number of bytes that complete it.
    _partial: bytearray | None = None
    _wanted = 0
    heard_at = 0.0
    # True while a large reply may exceed `outbox_bytes`.
    _is_wide = False
    # Max bytes of a message.
    _most_bytes = MAX_EARLY_BYTES
    # Bytes of an incomplete message and of `_unread`, as counted in `_sockets`, and the message's deadline.
    _held = 0
    _overdue: asyncio.TimerHandle | None = None
    # Bytes that arrived in the read in which reading paused, from the first unhandled frame.
    _unread = b""
    # Whether the message before `take_over` is a text.
    is_first_text = False
    # Fragments of the current message.
    _fragments = 0
    # Limits control frames and fragments. The receiver limits whole messages.
    _bucket: TokenBucket | None = None
    # Max window of compressed frames to the client, in bits (RFC 7692, section 7.1.2.1). 0 if it accepts none.
    _window_bits = 0
    # The newest unanswered ping.
    _ping: bytes | None = None
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _is_flooded = False
    # True once nothing more is written or read. `_dropped` counts the bytes after the close frame.
    _is_lingering = False
    _dropped = 0

    def __init__(self, *args: Any, sockets: Sockets, key: str | None, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's
        """`sockets` has counted this connection under `key`."""
        super().__init__(*args, **kwargs)
        self._sockets = sockets
        self._outbox_bytes = sockets.outbox_bytes
        self._key = key
        # The client for whom `_held` is counted: the address, or the user after `take_over`.
        self._client: str | UserId = key or ""
        self.conn.max_message_size = MAX_EARLY_BYTES
        if sockets.compresses:
            self.conn.available_extensions = [compression.EXTENSION]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102 - as asyncio.Protocol has it
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HANDSHAKE_SECONDS, self.transport.abort)
        self.heard_at = self.loop.time()
        self.transport.set_write_buffer_limits(high=self._outbox_bytes)
        if _NOTSENT_LOWAT is not None and (socket := transport.get_extra_info("socket")) is not None:
            # Otherwise the kernel would buffer megabytes for a slow peer, and the server would not notice that it is
            # slow.
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
            self.transport.abort()  # RFC 6455, section 4.1: no frame precedes the response to the handshake
        else:
            self._take_in(whole)

    def _take_in(self, data: bytes) -> None:
        """Handle frames until reading pauses. The rest waits until it resumes, because one read may have thousands of
        small frames. Before `take_over`, reading pauses after one message.
        """
        at = 0
        while at < len(data) and not self.read_paused:
            end = self._frame(data, at)
            if not end:
                self._partial = bytearray(data[at:])
                break
            if self._overdue is not None and self.conn.current_size is None:
                self._await_no_rest()  # this frame ended a message, not only a fragment
            at = end
        else:
            if at < len(data):
                self._unread += data[at:]
        if self._ping is not None:
            self._answer_ping()
        if self._partial is not None or self._unread or self._held or self.conn.current_size is not None:
            self._keep_unfinished()

    def _continued(self, partial: bytearray, data: bytes) -> bytes:
        """Return the frame that `data` continues, with the bytes after it. Return nothing while it is incomplete."""
        partial += data
        if len(partial) < self._wanted:
            return b""
        self._partial = None
        return bytes(partial)

    def _keep_unfinished(self) -> None:
        """Count the bytes of an incomplete message and of unhandled frames, and start the message's deadline. Close if
        the client or all clients together hold too many.
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
        """Start the deadline of an incomplete message, unless it runs already or reading is paused."""
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
        """Handle the frame at `at`. Return where it ends, or 0 if it is incomplete.

        Whole text messages go directly to the receiver. They are nearly all frames. The library websockets handles the
        rest.
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
        is_text = is_legal and data[at] in {_WHOLE_TEXT, _COMPRESSED_TEXT}
        if is_text and self._receive_text(data[at], data[first:end], data[mask:first]):
            return end
        if is_legal and data[at] in {_PING, _PONG} and size <= _MAX_CONTROL:
            if self._is_allowed(data[at]) and data[at] == _PING:
                self._ping = apply_mask(data[first:end], data[mask:first])
        elif is_legal and (self.close_sent and data[at] & _OPCODE != _CLOSE):
            self._is_allowed(data[at])  # nobody reads the frame any more
        elif self._is_allowed(data[at]):
            end = end if is_legal else len(data)
            super().data_received(data[at:end])
        return len(data) if self._is_lingering else end

    def _receive_text(self, head: int, masked: bytes, mask: bytes) -> bool:
        """Pass a whole text message to the receiver. Return False if the library websockets has to handle the frame, as
        it does if the message cannot be decompressed within the limit.
        """
        if self.receiver is None or self.close_sent or self.conn.current_size is not None:
            return False
        text: bytes | None = apply_mask(masked, mask)
        if text is not None and head == _COMPRESSED_TEXT:
            text = compression.inflated(text, self._most_bytes) if self._window_bits else None
        if text is None:
            return False
        self.receiver.received(text, is_text=True)
        return True

    def frame(self, payload: bytes) -> bytes:
        """Return a payload as a frame for this client, compressed if it is large and the client accepts that."""
        return compression.compressed_frame(payload, self._window_bits) if self._window_bits else text_frame(payload)

    def _is_allowed(self, head: int) -> bool:
        """Count a frame other than a whole text message, or a frame after the close frame. Close if there are too many.
        Return whether to handle the frame.
        """
        if not head & _CONTROL:
            self._fragments = self._fragments + 1 if head & _OPCODE == _CONTINUATION else 1
        if self._bucket is None:
            self._bucket = TokenBucket(self._sockets.frames)
        if not self._is_flooded and (self._bucket.take() > 0 or self._fragments > MAX_FRAGMENTS):
            self._is_flooded = True
            self._ping = None
            if self.close_sent:
                pass  # the client was told why, and may have sent much before it read that
            elif self.receiver is not None:
                self.receiver.flooded()
            else:
                self._sockets.flooded(self._key or "unknown")
                self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABUSE})
                self.close(CloseCode.ABUSE)
            self._linger()
        return not self._is_flooded

    def _answer_ping(self) -> None:
        """Answer the newest ping, which suffices (RFC 6455, section 5.5.3), unless the peer does not read."""
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
        self.forget_conn()

    def pause_writing(self) -> None:  # noqa: D102
        super().pause_writing()
        if self.receiver is not None:
            # This runs inside a write to a set of sockets, which the receiver must not change now.
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
        # Bytes, even for a text. The code that decodes the frame also checks its UTF-8.
        self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
        self.pause_receiving()

    async def receive(self) -> Any:  # noqa: ANN401, D102 - as uvicorn has it
        if not (self.handshake_complete and self.queue.empty()):
            return await self.queue.get()
        # While the client has not authenticated, other connections may take its place.
        self._sockets.waits(self, self.transport.abort)
        try:
            return await self.queue.get()
        finally:
            if not self.close_sent:
                self._sockets.works(self)

    def take_over(self, receiver: "Connection") -> None:
        """Pass all further messages to `receiver`, and those that are queued."""
        self.disarm()
        self.receiver = receiver
        while not self.queue.empty():
            event = self.queue.get_nowait()
            if event["type"] == "websocket.receive":
                receiver.received(event.get("bytes") or b"", is_text=self.is_first_text)
        self._most_bytes = self.conn.max_message_size = self.config.ws_max_size
        for extension in self.conn.extensions:
            assert isinstance(extension, PerMessageDeflate)  # noqa: S101 - no other one is available
            self._window_bits = extension.local_max_window_bits
        self._forget_handshake()
        self._release()
        self._client = receiver.user_id
        if self.disconnected or self._is_lingering:
            self._leave()
        else:
            self.resume_receiving()
            self._keep_unfinished()

    def disarm(self) -> None:
        """Cancel the deadline of the handshake."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget_handshake(self) -> None:
        """Delete the state of the handshake and of ASGI, which is half the memory of an idle connection. `scope` refers
        to this object, which would otherwise stay after its end until the next garbage collection.
        """
        self.scope = self.request = self.response = None  # type: ignore[assignment]
        self.queue = _NOBODYS_QUEUE
        self.writable = _NOBODYS_EVENT

    def forget_conn(self) -> None:
        """Delete what refers to `conn`: its generator, and the tracebacks of its errors. Otherwise it would stay until
        the next garbage collection.
        """
        self.conn.parser.close()
        for error in (self.conn.parser_exc, self.conn.handshake_exc):
            if error is not None:
                error.__traceback__ = error.__context__ = error.__cause__ = None

    def write_asked(self, data: bytes) -> None:
        """Write a reply or a part of one, which does not count the peer as slow, however large it is. The caller awaits
        `drained` after each part, so that one waits at a time.
        """
        waiting = self.transport.get_write_buffer_size()
        if waiting + len(data) > self._outbox_bytes // 4:
            parts = waiting if self._is_wide else 0  # the first part may follow events, which do count
            self.transport.set_write_buffer_limits(high=self._outbox_bytes + parts + len(data))
            self._is_wide = True
            # The peer read most of what was written before, so its time starts again with the bytes that wait now.
            if self._stalled is not None:
                self._stalled.cancel()
            self._stalled = self.loop.call_later(STALL_SECONDS, self._is_stalled, waiting + len(data))
        self.transport.write(data)

    def _is_stalled(self, before: int) -> None:
        """Cut the connection if the peer has read nothing of a large reply. Otherwise check again while some of it
        waits.
        """
        waiting = self.transport.get_write_buffer_size()
        self._stalled = None
        if waiting > self._outbox_bytes // 2:
            if waiting >= before:
                self.transport.abort()
            else:
                self._stalled = self.loop.call_later(STALL_SECONDS, self._is_stalled, waiting)

    @property
    def is_behind(self) -> bool:
        """Whether most of a large reply still waits for the peer."""
        return (
            self._is_wide
            and not self.transport.is_closing()
            and self.transport.get_write_buffer_size() > self._outbox_bytes // 2
        )

    async def drained(self) -> None:
        """Return when the peer has read most of its replies, or is gone. A peer that reads is not silent, although the
        pings that it has to answer wait behind the replies.
        """
        while self.is_behind:
            waiting = self.transport.get_write_buffer_size()
            await asyncio.sleep(DRAIN_POLL_SECONDS)  # the transport does not report progress of writing
            if self.transport.get_write_buffer_size() < waiting:
                self.heard_at = self.loop.time()
        if self._is_wide and not self.transport.is_closing():
            self.transport.set_write_buffer_limits(high=self._outbox_bytes)
            self._is_wide = False

    def pause_receiving(self) -> None:
        """Stop reading from the peer."""
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
            self._await_no_rest()

    def resume_receiving(self) -> None:
        """Handle bytes that were read before the pause, and read from the peer again."""
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
            unread, self._unread = self._unread, b""
            self._take_in(unread)

    def close(self, code: CloseCode) -> None:
        """Close with `code` after pending writes. Cut the connection if the peer is too slow."""
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
        """Drop further bytes after the close frame, until the peer closes or a limit is reached."""
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

    def shutdown(self) -> None:
        """Close the connection, because the worker ends. A handshake in progress is refused with 503, so that its
        client comes back. uvicorn would answer 500.
        """
        if self.handshake_complete or self.close_sent:
            super().shutdown()
            return
        response = self.conn.reject(HTTPStatus.SERVICE_UNAVAILABLE, "")
        response.headers["Retry-After"] = "1"
        self.conn.send_response(response)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

    async def send(self, message: ASGISendEvent) -> None:
        """Send a part of the answer to the handshake. Raises ClientDisconnected if `shutdown` has answered it."""
        if self.conn.eof_sent:
            raise ClientDisconnected
        await super().send(message)

    async def run_asgi(self) -> None:
        """Run the application for the handshake. If a receiver has taken over, the connection lives on."""
        try:
            await self.app(self.scope, self.receive, self.send)
        except (ClientDisconnected, WebSocketDisconnect):
            pass
        except Exception:
            self.logger.exception("the WebSocket handshake failed")
            self.send_500_response()
        if self.receiver is None and self.close_timer is None:
            self.transport.close()
        self._forget_handshake()
