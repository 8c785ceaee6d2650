"""The crowd's connections to the other servers, with their own protocols."""

import time

import msgspec

from loadtest.connection import PADDING, Connection, Head, MessageHead, PendingFrame, due_of
from protocol.codec import encode
from protocol.ids import MessageId, uuid7

_head = msgspec.json.Decoder(Head)
_event = msgspec.json.Decoder(tuple[str, MessageHead])


class PlainConnection(Connection):
    """A connection to a server whose events have no versions. They are counted and timed, but not checked for order."""

    is_ordered = False

    def on_open(self) -> None:
        """Handle the opening of the WebSocket. Only the ids of the conversations are known."""
        self.positions = dict.fromkeys(self.user.conversations, 0)

    def on_frame(self, payload: bytes, frame: bytes) -> None:
        """Handle a received frame."""
        head = _head.decode(payload)
        if head.type == "ready":
            self.opened()
        elif head.re is not None:
            self._answer(head)
        elif head.sent is not None:
            self.delivered(frame, due_of(head.sent.content))

    def delivered(self, frame: bytes, due: int) -> None:
        """Count an event, and add it to the stream that the other connections compare with."""
        stream = self.stream
        if stream is not None and self._offset == len(stream.log):
            stream.append(frame, due)
            self._advance(stream, len(stream.log))
            return
        self.leave_stream()
        self.crowd.counters.delivered += 1
        self.crowd.counters.deliveries.add((time.monotonic_ns() - due) / 1e9)


class RawConnection(PlainConnection):
    """A connection to a server that sends each frame unchanged to everyone. There are no answers."""

    def send(self, conversation_id: str, due: int) -> MessageId:
        """Send the event that everyone receives, and count it as answered."""
        message_id = MessageId(uuid7())
        event = {
            "type": "message_sent",
            "conversation_id": conversation_id,
            "version": 1,
            "message": {
                "id": message_id,
                "conversation_id": conversation_id,
                "sender_id": self.user.user_id,
                "content": f"{due} {PADDING}",
                "created_at": "2026-01-01T00:00:00.000000Z",
            },
        }
        self.crowd.counters.sent += 1
        self.crowd.counters.answered += 1
        self.write(encode(event))
        return message_id


class SocketIoConnection(PlainConnection):
    """A connection to socket.io version 4, directly by WebSocket: JSON in Socket.IO packets in Engine.IO packets."""

    READY = b'42["ready"'
    OPEN, ENGINE_PING, CONNECTED, EVENT, ANSWER = b"0", b"2", b"40", b"42", b"43"

    def request(self) -> bytes:
        """Return the HTTP upgrade request."""
        return super().request().replace(b"/v1/ws", b"/socket.io/?EIO=4&transport=websocket")

    def on_frame(self, payload: bytes, frame: bytes) -> None:
        """Handle a received packet."""
        if payload.startswith(self.EVENT):
            if payload.startswith(self.READY):
                self.opened()
            else:
                self.delivered(frame, due_of(_event.decode(payload[2:])[1].content))
        elif payload.startswith(self.ANSWER):
            number = payload[2:].partition(b"[")[0]
            self._answer(Head(type="reply", re=int(number), code="refused" if b'"code"' in payload else None))
        elif payload.startswith(self.CONNECTED):
            pass
        elif payload.startswith(self.OPEN):
            self.write(b'40{"token":"' + self.user.token.encode() + b'"}')
        elif payload == self.ENGINE_PING:
            self.write(b"3")

    def send(self, conversation_id: str, due: int) -> MessageId:
        """Send a message with an id for its acknowledgement."""
        self._next += 1
        self._waiting[self._next] = PendingFrame(due, None, b"")
        return self._send(b"%d" % self._next, conversation_id, due)

    def _send(self, number: bytes, conversation_id: str, due: int) -> MessageId:
        """Send a message. `number` identifies its acknowledgement. If it is empty, there is none."""
        message_id = MessageId(uuid7())
        self.crowd.counters.sent += 1
        message = {"message_id": message_id, "conversation_id": conversation_id, "content": f"{due} {PADDING}"}
        self.write(self.EVENT + number + encode(["send", message]))
        return message_id


class UnansweredSocketIoConnection(SocketIoConnection):
    """A connection to socket.io that asks for no acknowledgements."""

    def send(self, conversation_id: str, due: int) -> MessageId:
        """Send a message, and count it as answered."""
        self.crowd.counters.answered += 1
        return self._send(b"", conversation_id, due)
