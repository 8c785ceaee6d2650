"""The HTTP transport. It extends uvicorn's protocol class by deadlines and by limits on requests.

A deadline applies to a whole header or body, not to its next byte. So a client that sends single bytes is cut off like
a silent one.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, NoReturn

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_FRAME_BYTES
from server.core.errors import log_defect
from server.gateway.responses import refusal_response
from server.gateway.sockets import FREE_BYTES, LINGER_BYTES, PROXY, Sockets
from server.gateway.websocket import EXTENSION, WebSocket

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
"""Max time from accepting a connection, or from the first byte of a request, to the end of the header, in seconds."""
BODY_SECONDS = 30.0
"""Max time from the end of a header to the end of the body, in seconds."""
STALL_SECONDS = 30.0
"""Max time in which the client reads nothing of a response, in seconds."""
LINGER_SECONDS = 5.0
"""Max time to read the end of a response, in seconds. In that time the rest of a refused request is read and
dropped.
"""
MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 4 * MAX_FRAME_BYTES
"""Max bytes of a body on the wire, including the overhead of small chunks and bodies that nobody reads."""
MAX_HEADERS = 128
"""Max headers and trailers of a request. Each costs as much as 200 bytes of a long one."""
MAX_CHUNKS = 4096
"""Max chunks of a body, for the same reason."""
NO_HANDSHAKE = Refused(
    ErrorCode.BAD_FRAME, "The WebSocket handshake has a body, more than 128 headers, or a line over 8 KiB. Correct it."
)
HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%]+\]|[-\w.~%!$&'()*+,;=]*)(?::\d*)?")
"""A valid `Host` (RFC 9110, section 7.2). Proxies and caches may confuse requests without one, or with two."""
MAX_PIPELINED = 8
"""Max requests that wait for the response to the one before."""


class Stage(Enum):
    """The part of a request that the client has begun to send."""

    NOTHING = "nothing"
    HEAD = "header"
    BODY = "body"


class Answering:
    """The transport of a response. The connection decides when it is closed."""

    def __init__(self, transport: asyncio.Transport, write: Callable[[bytes], None], close: Callable[[], None]) -> None:
        self.write = write
        self.is_closing = transport.is_closing
        self.close = close


class Http(HttpToolsProtocol):
    """One connection, until it becomes a WebSocket."""

    def __init__(self, *args: Any, sockets: Sockets, **kwargs: Any) -> None:  # noqa: ANN401 - as uvicorn makes it
        super().__init__(*args, **kwargs)
        self._sockets = sockets
        # The key under which the connection is counted. On a proxy's connection, it is the current request's client.
        self._key: str | None = None
        self._is_of_proxy = False
        self._stage = Stage.NOTHING
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        # Bytes of the current header or body on the wire.
        self._bytes = 0
        # The request that the application handles now. `cycle` is the one that arrived last.
        self._running: RequestResponseCycle | None = None
        # Bytes of bodies that are counted in `sockets`, per request and client, and the number of further bytes that
        # are not counted.
        self._held: Counter[tuple[RequestResponseCycle, str]] = Counter()
        self._free = FREE_BYTES
        self._is_over = False
        self._is_lingering = False
        self._is_new = True
        # Headers and chunks of the current request.
        self._headers = self._chunks = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        super().connection_made(transport)
        try:
            self._key = self._sockets.arrive(self.client[0] if self.client else None)
        except Refused as refused:
            self._refuse(refused)
            return
        self._is_of_proxy = self._key == PROXY
        self._sockets.waits(self, self._abort)
        self._arm(HEAD_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._is_over = True
        super().connection_lost(exc)
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        self._disarm()
        self._unset_keepalive_if_required()
        if self._stalled is not None:
            self._stalled.cancel()
        self._release()
        self._sockets.works(self)
        if self._key is not None:
            self._sockets.leave(self._key)
            self._key = None
        self._forget()

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self._is_new:
            self._is_new = False
            self.transport.pause_reading()
            self._sockets.begin(self._key or PROXY, partial(self._begin, data))
        else:
            self._receive(data)

    def _begin(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            self.transport.resume_reading()
            self._receive(data)
        except Exception as error:  # noqa: BLE001 - the event loop, too, logs what `data_received` raises
            log_defect(log, "taking in the first bytes of a connection", error)
            self._abort()

    def _receive(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._is_lingering:
            if self._bytes > LINGER_BYTES:
                self._abort()
            return
        super().data_received(data)
        if self._is_over or self.transport.is_closing():
            return
        if self._stage is Stage.BODY:
            if self._bytes > MAX_BODY_BYTES:
                self._refuse(Refused(ErrorCode.INVALID, "The body is longer than 1 MiB. Shorten it."), status=413)
            elif self._deadline is None:
                self._arm(BODY_SECONDS, self._too_late)
        elif self._stage is Stage.HEAD or not self._is_answering():
            # Empty lines count, too. The parser skips them, and uvicorn restarts its own deadline with each.
            if self._bytes > MAX_HEAD_BYTES:
                self._refuse(
                    Refused(ErrorCode.BAD_FRAME, "The request line and headers are longer than 64 KiB. Shorten them."),
                    status=431,
                )
            elif self._deadline is None:
                self._arm(HEAD_SECONDS, self._too_late)

    def handle_websocket_upgrade(self) -> None:  # noqa: D102
        if self._is_over:
            return
        self._is_over = True
        self._disarm()
        self._sockets.works(self)
        key, self._key = self._key, None
        self.ws_protocol_class = partial(WebSocket, sockets=self._sockets, key=key)  # type: ignore[assignment]
        super().handle_websocket_upgrade()
        upgraded = self.transport.get_protocol()
        if isinstance(upgraded, WebSocket) and not upgraded.handshake_initiated:
            # websockets accepts fewer and shorter headers than HTTP does, and no body. It closes without a response.
            upgraded.disarm()
            upgraded.forget_conn()
            self.transport.set_protocol(self)
            self.connections.discard(upgraded)
            self.connections.add(self)
            self._key = key
            self._refuse(NO_HANDSHAKE, status=400)
        else:
            self._forget()

    # -------------------------------------------------------------------------------------- calls by the parser

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        self._headers += 1
        if self._headers > MAX_HEADERS:
            self._refuse_and_stop(
                Refused(ErrorCode.BAD_FRAME, f"The request has more than {MAX_HEADERS} headers. Send fewer."),
                status=431,
            )
        # Trailers follow the body. Nothing reads them, and a proxy may forward those of its client unchecked.
        if self._stage is Stage.HEAD:
            super().on_header(name, value)

    def on_message_begin(self) -> None:  # noqa: D102
        self._stage = Stage.HEAD
        self._headers = self._chunks = 0
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:  # noqa: D102
        if self._is_over:
            return
        hosts = [value for name, value in self.headers if name == b"host"]
        is_old = self.parser.get_http_version() == "1.0"
        if len(hosts) > 1 or not (hosts or is_old) or not all(HOST.fullmatch(host) for host in hosts):
            self._refuse_and_stop(
                Refused(ErrorCode.BAD_FRAME, "The `Host` header is missing, invalid or repeated. Send it once.")
            )
        if self._is_of_proxy:
            try:
                self._count_as(self._sockets.client_key(self.client[0] if self.client else None, self.headers))
            except Refused as refused:
                self._refuse_and_stop(refused)
        self._disarm()
        self._stage, self._bytes = Stage.BODY, 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse_and_stop(
                Refused(
                    ErrorCode.RATE_LIMITED,
                    "Too many requests of this connection are unanswered. Read the responses first.",
                )
            )
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.transport = Answering(self.transport, self._write, self._close)  # type: ignore[assignment]

    def on_chunk_header(self) -> None:
        """Count the chunks of a body. Parsing many small ones takes long, however few bytes they have."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            self._refuse_and_stop(
                Refused(ErrorCode.BAD_FRAME, f"The body has more than {MAX_CHUNKS:,} chunks. Send larger ones.")
            )

    def on_body(self, body: bytes) -> None:  # noqa: D102
        if self._is_over:
            return
        if self._is_answering():
            self._hold(len(body))
        super().on_body(body)

    def _hold(self, count: int) -> None:
        """Count bytes of a body. Raises Refused if there are too many."""
        free = min(count, self._free)
        self._free -= free
        if count > free:
            key = self._key or PROXY
            try:
                self._sockets.hold(key, count - free)
            except Refused as refused:
                self._refuse_and_stop(refused)
            self._held[self.cycle, key] += count - free

    def on_message_complete(self) -> None:  # noqa: D102
        if self._is_over:
            return
        self._disarm()
        self._stage, self._bytes = Stage.NOTHING, 0
        if self._is_answering():
            self._sockets.works(self)
        super().on_message_complete()

    # ------------------------------------------------------------------------------------------ the response

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _write(self, data: bytes) -> None:
        # The event loop raises for an aborted transport, and the application learns of it only afterwards.
        if not self._is_lingering and not self.transport.is_closing():
            self.transport.write(data)

    def on_response_complete(self) -> None:  # noqa: D102
        if self._is_lingering or self.cycle is None:  # nothing more can be written
            self.server_state.total_requests += 1
            return
        answered = self._running
        super().on_response_complete()
        if self.transport.is_closing():
            self._arm(LINGER_SECONDS, self._abort)
        elif self._is_answering():
            self._release(of=answered)  # the next request has begun, and holds its own bytes
        else:
            self._release()
            if not self._is_over:
                self._count_as(PROXY)
                self._sockets.waits(self, self._abort)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002, D102 - the library's name
        if not self._is_over:
            self._refuse(Refused(ErrorCode.BAD_FRAME, "The request is not valid HTTP. Correct it."))

    def timeout_keep_alive_handler(self) -> None:  # noqa: D102
        self._close()

    def pause_writing(self) -> None:  # noqa: D102
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self._abort)

    def resume_writing(self) -> None:  # noqa: D102
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # ------------------------------------------------------------------------------- the end of the connection

    def _too_late(self) -> None:
        self._sockets.timed_out += 1
        if self._stage is Stage.NOTHING:
            self._close()
        else:
            seconds = HEAD_SECONDS if self._stage is Stage.HEAD else BODY_SECONDS
            self._refuse(
                Refused(
                    ErrorCode.BAD_FRAME,
                    f"The {self._stage.value} did not arrive in time. Send it within {seconds:.0f} seconds.",
                ),
                status=408,
            )

    def _refuse_and_stop(self, refused: Refused, *, status: int | None = None) -> NoReturn:
        """Refuse the request, and raise Refused through the parser, which then drops the rest of the read bytes."""
        if not self._is_over:
            self._refuse(refused, status=status)
        try:
            raise refused
        finally:
            del refused  # its traceback refers to the variables of this call

    def _refuse(self, refused: Refused, *, status: int | None = None) -> None:
        """Respond in place of the application, and close."""
        self._is_over = True
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started or not self.cycle.more_body or self.pipeline:
                self._abort()  # the connection cannot carry another response now
                return
        elif self._stage is Stage.BODY and self.cycle is not None:
            self._linger()  # the response preceded the end of the body
            return
        response = refusal_response(refused, status=status)
        self._sockets.answered(response.status_code)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)]))
        if self._key is None:
            self._shut()  # the connection is not counted, so it must not stay
        else:
            self._linger()

    def _close(self) -> None:
        if self._stage is Stage.NOTHING:
            self._shut()
        else:
            self._linger()

    def _shut(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            self._arm(LINGER_SECONDS, self._abort)

    def _linger(self) -> None:
        """Send the end of the stream, and drop further bytes. Close when the client closes, or at the limits of dropped
        bytes and time.
        """
        if self._is_lingering or self.transport.is_closing():
            return
        self._is_over = self._is_lingering = True
        self._bytes = 0
        if self.cycle is not None:
            self.cycle.body.clear()
        self._release()
        self._unset_keepalive_if_required()
        self._sockets.waits(self, self._abort)
        self._arm(LINGER_SECONDS, self._abort)
        self.flow.resume_reading()
        self.transport.write_eof()

    def _abort(self) -> None:
        self.transport.abort()

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _release(self, of: RequestResponseCycle | None = None) -> None:
        """Release the counted bytes of one request, or of all. After all, `FREE_BYTES` are free again."""
        for one in [one for one in self._held if of is None or one[0] is of]:
            self._sockets.release(one[1], self._held.pop(one))
        if of is None:
            self._free = FREE_BYTES

    def _count_as(self, key: str) -> None:
        """Count a proxy's connection as the client's of the current request. Raises Refused if the client has
        too many.
        """
        if self._is_of_proxy and self._key is not None and self._key != key:
            self._sockets.move(self._key, key)
            self._key = key

    def _forget(self) -> None:
        """Delete what refers to this object. Otherwise it would stay until the next garbage collection."""
        self.parser = self.scope = self.cycle = self._running = None  # type: ignore[assignment]

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
