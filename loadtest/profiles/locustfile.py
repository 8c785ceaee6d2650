"""A load test of OpenChat with Locust.

    pip install locust websocket-client
    locust -f loadtest/profiles/locustfile.py --host http://127.0.0.1:8000 --headless -u 50 -r 10 -t 30s

Everyone joins one channel and sends messages. `send` is the time from a message to its durable answer, and `delivery`
the time from a message to each receiver. Locust waits for answers before it continues (a closed loop), so a stalled
server receives fewer frames. `openchat load` keeps its rate, and checks what it receives.
"""

import json
import secrets
import time
from typing import Any
from uuid import UUID

import gevent
import websocket
from gevent.event import AsyncResult
from locust import HttpUser, between, events, task

CHANNEL = "01a20000-0000-7000-8000-0000000000ff"
PATIENCE = 10.0


def uuid7() -> str:
    """Return a new UUIDv7 (RFC 9562, section 5.7)."""
    random = secrets.randbits(74)
    bits = time.time_ns() // 1_000_000 << 80 | 7 << 76 | random >> 62 << 64 | 2 << 62 | random & (1 << 62) - 1
    return str(UUID(int=bits))


class Talker(HttpUser):
    """A user who sends a message every second or two."""

    wait_time = between(1, 2)

    def on_start(self) -> None:
        """Register, connect, and join the channel. The first user creates it."""
        name = f"locust-{secrets.token_hex(8)}"
        account = {"name": name, "email": f"{name}@crowd.example", "password": secrets.token_hex(16)}
        token = self.client.post("/v1/auth/register", data=json.dumps(account), name="register").json()["token"]
        self._answers: dict[int, AsyncResult] = {}
        self._socket = websocket.create_connection(
            self.host.replace("http", "ws", 1) + "/v1/ws",
            header=[f"Authorization: Bearer {token}"],
            subprotocols=["openchat.v1.json"],
            suppress_origin=True,
        )
        self._listener = gevent.spawn(self._listen)
        if self._ask({"type": "join", "conversation_id": CHANNEL})["type"] == "error":
            made = {"type": "create_channel", "conversation_id": CHANNEL, "title": "Locust", "is_public": True}
            if self._ask(made)["type"] == "error":  # another user was first
                self._ask({"type": "join", "conversation_id": CHANNEL})

    def on_stop(self) -> None:
        """Close the connection."""
        self._listener.kill()
        self._socket.close()

    @task
    def send(self) -> None:
        """Send a message and wait for its answer."""
        message = {"type": "send", "conversation_id": CHANNEL, "message_id": uuid7(), "content": str(time.time())}
        began = time.perf_counter()
        answer = self._ask(message)
        error = RuntimeError(answer["message"]) if answer["type"] == "error" else None
        self._report("send", time.perf_counter() - began, error)

    def _ask(self, frame: dict[str, Any]) -> dict[str, Any]:
        number = len(self._answers) + 1
        self._answers[number] = AsyncResult()
        self._socket.send(json.dumps(frame | {"id": number}))
        answer: dict[str, Any] = self._answers[number].get(timeout=PATIENCE)
        return answer

    def _listen(self) -> None:
        while True:
            frame = json.loads(self._socket.recv())
            if "re" in frame:
                self._answers[frame["re"]].set(frame)
            elif frame["type"] == "message_sent":
                self._report("delivery", time.time() - float(frame["message"]["content"]))

    def _report(self, name: str, seconds: float, error: Exception | None = None) -> None:
        events.request.fire(
            request_type="WS", name=name, response_time=seconds * 1e3, response_length=0, exception=error, context={}
        )
