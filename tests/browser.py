"""A simulated browser with a push service, to which notifications are sent."""

import asyncio
import base64
import os

import http_ece
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from protocol import client
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.push import Notification
from server.jobs.push_posts import Push
from server.queries.push import PushPost


class Browser:
    """A push service and the browser behind it. Receives notifications and decrypts them."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.auth = os.urandom(16)
        self.received: asyncio.Queue[tuple[dict[str, str], bytes]] = asyncio.Queue()
        self.status = 201
        self.statuses: dict[str, int] = {}
        """Other statuses by the end of the path, sent with a `Retry-After` of an hour."""
        self.answers = asyncio.Event()
        """Clear this event to delay responses."""
        self.answers.set()
        self.url = ""
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/push/{uuid7().hex}"

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    def subscription(self) -> client.RegisterPush:
        point = self.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return client.RegisterPush(endpoint=self.url, p256dh=text(point), auth=text(self.auth))

    async def next(self) -> tuple[dict[str, str], Notification]:
        async with asyncio.timeout(10):
            headers, body = await self.received.get()
        plain = http_ece.decrypt(body, private_key=self.key, auth_secret=self.auth, version="aes128gcm")
        return headers, msgspec.json.decode(plain, type=Notification)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        path = first.split(" ")[1]
        status = next((one for end, one in self.statuses.items() if path.endswith(end)), self.status)
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        await self.received.put((headers, body))
        await self.answers.wait()
        retry = "retry-after: 3600\r\n" if status in self.statuses.values() else ""
        writer.write(f"HTTP/1.1 {status} Status\r\n{retry}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()


def text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def post_to(endpoint: str, user_id: UserId | None = None) -> PushPost:
    """Return a post about a new message to an endpoint, by default for a new user."""
    return PushPost(user_id or UserId(uuid7()), endpoint, ConversationId(uuid7()), MessageId(uuid7()))


async def prepared_push(post: PushPost) -> Push:
    """Return a dummy notification, in place of the statement that reads its content."""
    return Push(post.endpoint, "", "", "", b"x")
