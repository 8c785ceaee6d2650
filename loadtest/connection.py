"""One WebSocket of the crowd, with as little Python per delivery as a complete check allows.

It uses only the wire format (`protocol/`). Received bytes are compared, a chunk at a time, with those that another
socket of this process has already checked (`stream.py`). Otherwise they are parsed frame by frame.
"""

import asyncio
import random
import re
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast
from uuid import UUID

import msgspec

from loadtest.stream import Stream
from protocol import SUBPROTOCOL, client
from protocol.codec import encode
from protocol.ids import ConversationId, MessageId, uuid7

if TYPE_CHECKING:
    from loadtest.crowd import Crowd

TEXT, CLOSE, PING = 0x1, 0x8, 0x9
SHORT, MEDIUM = 126, 127
"""Length codes: the length follows in two or in eight bytes (RFC 6455, section 5.2)."""
RETRY_AFTER = re.compile(rb'"retry_after_ms":(\d+)')
SOON_NS = 500_000_000
"""Max delay before a client reconnects after a lost connection, in nanoseconds."""
PADDING = "and about as long as what people write to each other when they have something to say"


class User(msgspec.Struct):
    """A user to connect: the source address, and the conversations in which the user sends messages."""

    token: str
    user_id: str
    source: str
    conversations: list[str]
    talks: bool = True


class MessageHead(msgspec.Struct):
    """The fields of a message that the crowd reads."""

    content: str = ""
    id: str = ""


class View(msgspec.Struct):
    """The fields of a conversation that the crowd reads."""

    version: int
    me: "Me"


class Me(msgspec.Struct):
    """The user's own participation, which contains the conversation's id."""

    conversation_id: str


class Head(msgspec.Struct):
    """The fields of all kinds of frames that the crowd reads."""

    type: str
    conversation_id: str | None = None
    version: int = 0
    since: int | None = None
    message: MessageHead | str | None = None
    """The message of an event, or the text of an error."""
    re: int | None = None
    code: str | None = None
    is_last: bool = False
    conversations: list[View] = []
    view: View | None = None
    versions: dict[str, int] = {}
    epoch: str = ""
    reconnect_after_ms: int = 0
    ticket: str | None = None

    @property
    def sent(self) -> MessageHead | None:
        """The message of an event."""
        return self.message if isinstance(self.message, MessageHead) else None


_head = msgspec.json.Decoder(Head)


Answered = Callable[[Head], None]
"""Callback for an answer."""


class RetryLater(ConnectionError):  # noqa: N818 - an answer, not a fault
    """The server asked to connect again after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the server asked to connect again in {seconds:.1f} s")
        self.seconds = seconds


class PendingFrame(NamedTuple):
    """A frame without an answer. `due` is in nanoseconds of the monotonic clock; 0 means that it is not measured."""

    due: int
    answered: Answered | None
    payload: bytes


NOTHING = PendingFrame(0, None, b"")


class Connection(asyncio.Protocol):
    """One connection to OpenChat. Subclasses connect to other servers."""

    is_ordered = True
    """Whether events have versions and arrive in their order."""

    def __init__(self, crowd: "Crowd", user: User) -> None:
        self.user = user
        self.crowd = crowd
        self.positions: dict[str, int] = {}
        self.latest: dict[str, str] = {}
        self.epoch = ""
        self.stream: Stream | None = None
        self.began = 0.0
        self.ready: asyncio.Future[None]
        self.is_open = False
        self.transport: asyncio.Transport
        self._conversation = ""
        self._offset = 0
        self._tail = b""
        self._has_answered = False
        self._waiting: dict[int, PendingFrame] = {}
        self._next = 0
        self._resume = 0
        self._has_to_resume = False
        """Whether `connect` asks for missed changes instead of the first page."""
        self._ticket: str | None = None
        self._returns_at = 0
        self._is_going_away = False
        """Whether the server has announced the end of this socket."""
        self.is_reconnecting = False
        """Whether the connection ends and will be opened again. Frames wait until then."""

    # ------------------------------------------------------------------------------------------------- connection

    async def connect(self, *, due: float | None = None) -> None:
        """Connect, and return when the first page has arrived, or after `drop`, the missed changes.

        `due` is when the connection should have begun. Raises OSError, ConnectionError if it ends before that, and
        RetryLater if the server asks to connect later. The caller connects again; `connection_lost` does so only for a
        connection that was open.
        """
        loop = asyncio.get_running_loop()
        self.began = time.monotonic() if due is None else due
        self.ready = loop.create_future()
        self._is_going_away = self._has_answered = False
        self._tail = b""
        local = (self.user.source, 0) if self.user.source else None
        transport, _ = await loop.create_connection(lambda: self, *self.crowd.host, local_addr=local)
        try:
            await self.ready
        except BaseException:  # also a time-out, after which this socket must not receive anything
            self.is_open = False
            transport.abort()
            raise

    def opened(self) -> None:
        """Handle the end of the first page, or of the missed changes."""
        if self.ready.done():
            return
        self.ready.set_result(None)
        counters = self.crowd.counters
        if self._has_to_resume:
            counters.resumed += 1
        else:
            counters.connected += 1
        counters.opened.add(time.monotonic() - self.began)
        self._has_to_resume, self.is_open = False, True
        if self.is_reconnecting:
            # Frames without an answer are sent again. Their ids make that idempotent.
            for asked in self._waiting.values():
                self.write(asked.payload)
        self.is_reconnecting = self._is_going_away

    def drop(self) -> None:
        """Abort the connection, and keep the versions for the next `connect`."""
        self.leave_stream()
        self._has_to_resume, self.is_open = True, False
        self._waiting.clear()
        self.transport.abort()

    def request(self) -> bytes:
        """Return the HTTP upgrade request."""
        head = (
            "GET /v1/ws HTTP/1.1",
            f"Host: {self.crowd.name}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
            f"Authorization: Bearer {self._ticket or self.user.token}",
        )
        self._ticket = None
        if self._has_to_resume:
            head = (head[0].replace("/v1/ws", "/v1/ws?resume=1"), *head[1:])
        return "\r\n".join((*head, "", "")).encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request())

    def connection_lost(self, exc: Exception | None) -> None:
        """Reconnect if the connection was open. Otherwise `connect` raises an error, or `drop` ended it."""
        if not self.is_open:
            self._fail(exc or ConnectionError("the server ended the connection"))
            return
        if not self._is_going_away:
            self.crowd.counters.errors["connection lost"] += 1
            self._returns_at = time.monotonic_ns() + random.randrange(SOON_NS)
        self.is_open, self.is_reconnecting = False, True
        self.leave_stream()
        self._has_to_resume = True
        self.crowd.reconnect(self, self._returns_at)

    def _fail(self, error: Exception) -> None:
        """Make `connect` raise an error, unless it has ended."""
        if self.ready.done():
            return
        if self._is_going_away:
            error = RetryLater(max(0.0, (self._returns_at - time.monotonic_ns()) / 1e9))
        self.ready.set_exception(error)

    # ----------------------------------------------------------------------------------------------------- sending

    def ask(self, frame: client.Frame, due: int, answered: Answered | None = None) -> None:
        """Send a frame, and measure the time from `due` (monotonic, in nanoseconds) to its answer."""
        self._next += 1
        frame.id = self._next
        asked = self._waiting[self._next] = PendingFrame(due, answered, encode(frame))
        self.crowd.counters.sent += 1
        if not self.is_reconnecting:
            self.write(asked.payload)

    async def answer(self, frame: client.Frame) -> Head:
        """Send a frame and return its answer. Never returns if the frame is refused."""
        answered: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self.ask(frame, time.monotonic_ns(), answered.set_result)
        return await answered

    def send(self, conversation_id: str, due: int) -> MessageId:
        """Send a message that contains its due time, and return its id."""
        message_id = MessageId(uuid7())
        about = ConversationId(UUID(conversation_id))
        self.ask(client.Send(conversation_id=about, message_id=message_id, content=f"{due} {PADDING}"), due)
        return message_id

    def write(self, payload: bytes) -> None:
        """Send one text frame, masked with zeros. Masks protect proxies, and there is none."""
        if self.transport.is_closing():
            return  # `connection_lost` counts it
        size = len(payload)
        if size < SHORT:
            head = struct.pack("!BB", 0x80 | TEXT, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x80 | TEXT, 0x80 | SHORT, size)
        else:
            head = struct.pack("!BBQ", 0x80 | TEXT, 0x80 | MEDIUM, size)
        self.transport.write(head + bytes(4) + payload)

    # --------------------------------------------------------------------------------------------------- receiving

    def data_received(self, data: bytes) -> None:
        stream = self.stream
        if stream is not None and not self._tail and stream.log.startswith(data, self._offset):
            self._advance(stream, self._offset + len(data))
            return
        if stream is not None and not self._tail and (begin := stream.begin_of_frame(self._offset)) < self._offset:
            # The difference is inside a frame. Parse the frame from its beginning.
            data = bytes(stream.log[begin : self._offset]) + data
            self._offset = begin
        self._parse(self._tail + data if self._tail else data)

    def join_stream(self, conversation_id: str, stream: Stream) -> None:
        """Compare further data with the stream that other connections read in this conversation."""
        self._conversation, self.stream, self._offset = conversation_id, stream, len(stream.log)

    @property
    def is_waiting(self) -> bool:
        """Whether a frame has no answer yet."""
        return bool(self._waiting)

    def leave_stream(self) -> None:
        """Parse every further frame."""
        if self.stream is not None:
            self._offset = self.stream.begin_of_frame(self._offset)
            self.positions[self._conversation] = self.stream.version_at(self._offset)
            self.stream = None

    def position(self, conversation_id: str) -> int:
        """Return the version of a conversation that this connection has reached."""
        if self.stream is not None and conversation_id == self._conversation:
            return self.stream.version_at(self._offset)
        return self.positions.get(conversation_id, 0)

    def _advance(self, stream: Stream, offset: int) -> None:
        now = time.monotonic_ns()
        counters = self.crowd.counters
        for due, count in stream.completed(self._offset, offset):
            counters.delivered += count
            if due:
                counters.deliveries.add((now - due) / 1e9, count)
        self._offset = offset

    def _parse(self, data: bytes) -> None:
        self._tail = b""
        at = 0
        if not self._has_answered:
            head, blank, _ = data.partition(b"\r\n\r\n")
            if not blank:
                self._tail = data
                return
            if b" 101 " not in head.partition(b"\r\n")[0]:
                self._refused(head.partition(b"\r\n")[0].decode("latin-1"), data)
                return
            self._has_answered = True
            at = len(head) + 4
            self.on_open()
        total = len(data)
        while at + 2 <= total:
            size, first = data[at + 1], at + 2
            if size == SHORT:
                size, first = int.from_bytes(data[at + 2 : at + 4]), at + 4
            elif size == MEDIUM:
                size, first = int.from_bytes(data[at + 2 : at + 10]), at + 10
            if first + size > total:
                break
            self._frame(data[at : first + size], first - at)
            at = first + size
        self._tail = data[at:]

    def _refused(self, status: str, answer: bytes) -> None:
        told = RETRY_AFTER.search(answer)
        error = ConnectionError(f"the server answered: {status}")
        self._fail(RetryLater(int(told[1]) / 1000) if told else error)

    def _frame(self, frame: bytes, first: int) -> None:
        kind = frame[0] & 0xF
        if kind == TEXT:
            stream = self.stream
            if stream is not None and stream.log.startswith(frame, self._offset):
                self._advance(stream, self._offset + len(frame))
            else:
                self.on_frame(frame[first:], frame)
        elif kind == PING:
            self.transport.write(b"\x8a\x80\0\0\0\0")
        elif kind == CLOSE:
            code = int.from_bytes(frame[first : first + 2])
            if self._is_going_away:
                self.transport.close()
            elif self.is_open:
                self.is_open = False
                self._waiting.clear()
                self.crowd.counters.errors[f"closed with {code}"] += 1
            else:
                self._fail(ConnectionError(f"the server closed the connection with {code}"))

    # -------------------------------------------------------------------------------------------- OpenChat's frames

    def on_open(self) -> None:
        """Handle the opening of the WebSocket. Sends `resume` after a reconnection."""
        if self._has_to_resume:
            versions = {ConversationId(UUID(about)): version for about, version in self.positions.items()}
            self._next += 1
            self.write(encode(client.Resume(id=self._next, epoch=self.epoch, versions=versions)))
            self._resume = self._next

    def on_frame(self, payload: bytes, frame: bytes) -> None:
        """Handle a received frame."""
        head = _head.decode(payload)
        if head.re is not None:
            self._answer(head)
        elif head.version and head.conversation_id is not None:
            self._durable(head, frame)
        elif head.conversations or head.is_last:
            for view in head.conversations:
                self.positions[view.me.conversation_id] = view.version
            if head.is_last:
                self.opened()
        elif head.view is not None:
            self.positions[head.view.me.conversation_id] = head.view.version
            self.crowd.counters.errors["start_over"] += head.type == "start_over"
        elif head.code is not None:
            self.crowd.counters.errors[head.code] += 1
        else:
            self._about_connection(head)

    def _about_connection(self, head: Head) -> None:
        if head.type == "ready":
            self.epoch = head.epoch
        elif head.type == "heartbeat":
            behind = sum(1 for about, version in head.versions.items() if self.position(about) < version)
            self.crowd.counters.lost += behind
        elif head.type == "going_away":
            self._is_going_away, self._ticket = True, head.ticket
            if self.is_open:
                self.is_reconnecting = True
            self._returns_at = time.monotonic_ns() + head.reconnect_after_ms * 1_000_000
        else:
            self.crowd.counters.ephemeral += 1

    def _answer(self, head: Head) -> None:
        if head.re == self._resume:
            self._resume = 0
            self.opened()
            return
        due, answered, _ = self._waiting.pop(cast(int, head.re), NOTHING)
        counters = self.crowd.counters
        if head.code is not None:
            counters.errors[head.code] += 1
            return
        if due:
            counters.answered += 1
            counters.answers.add((time.monotonic_ns() - due) / 1e9)
        if answered is not None:
            answered(head)

    def _durable(self, head: Head, frame: bytes) -> None:
        about = cast(str, head.conversation_id)
        stream = self.stream
        before = self.position(about)
        message = head.sent
        due = due_of(message.content) if message is not None else 0
        if stream is not None:
            if self._offset == len(stream.log) and head.version == before + 1 and about == self._conversation:
                stream.append(frame, due)
                self._advance(stream, len(stream.log))
                return
            self.leave_stream()
        counters = self.crowd.counters
        since = head.version - 1 if head.since is None else head.since
        if head.version <= before:
            counters.duplicated += 1
            return
        if since > before:
            counters.skipped += since - before
        counters.delivered += head.version - before
        self.positions[about] = head.version
        if message is not None:
            self.latest[about] = message.id
        if due:
            counters.deliveries.add((time.monotonic_ns() - due) / 1e9)


def due_of(content: str) -> int:
    """Return the due time that a message contains, in nanoseconds of the monotonic clock, or 0."""
    word = content.partition(" ")[0]
    return int(word) if word.isdecimal() else 0
