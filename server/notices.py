"""Notifications: what somebody has not read a few seconds after it was sent is pushed to their browsers (Web Push).

Encrypted for each browser (RFC 8291, by http-ece), signed by the server (RFC 8292, by py-vapid), handed to the push
service that the browser named. That is done by the worker that stored the message, from memory: should it die within
those seconds, a notification is lost, which is a hint; the message is not.
"""

import asyncio
import base64
import logging
import os
import time
from collections import deque
from urllib.parse import urlsplit

import http_ece
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from py_vapid import Vapid02

from protocol.codec import encode
from protocol.ids import ConversationId, MessageId
from protocol.push import Notification
from protocol.values import Message
from server.database import Database
from server.errors import is_lost
from server.outbound import Outbound, Unreachable
from server.queries import push, unread
from server.queries.push import Notice

MAX_WAITING = 10_000
AT_ONCE = 200
"""Messages looked at by one statement."""
POSTS_AT_ONCE = 16
EXCERPT = 160
TTL_SECONDS = 86_400
"""For how long a push service keeps it for a browser that is not there."""
SIGNED_SECONDS = 3_600
GONE = frozenset({404, 410})
"""What a push service answers about an endpoint that is no more."""

log = logging.getLogger(__name__)


class Notices:
    """Pushes messages to those who have not read them after a while."""

    def __init__(self, database: Database, outbound: Outbound, *, key: str, contact: str, after_seconds: float) -> None:
        """`key` is what `new_key` made; `contact` is how the operators of push services may reach the server's."""
        self._database = database
        self._outbound = outbound
        self._vapid = Vapid02.from_raw(key.encode())
        self._contact = contact
        self._after_seconds = after_seconds
        self._waiting: deque[tuple[float, MessageId]] = deque(maxlen=MAX_WAITING)
        self._signed: dict[str, tuple[float, str]] = {}
        point = self._vapid.public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.public_key = _base64url(point)
        """What browsers subscribe with."""

    def wanted(self, message: Message) -> None:
        """Have a message pushed to those who have not read it in a few seconds. The oldest make room if many wait."""
        self._waiting.append((time.monotonic() + self._after_seconds, message.id))

    async def push_due(self) -> None:
        """Push what has waited for long enough."""
        now = time.monotonic()
        due: list[MessageId] = []
        while self._waiting and self._waiting[0][0] <= now:
            due.append(self._waiting.popleft()[1])
        if not due:
            return
        try:
            async with self._database.connection() as db:
                if not await push.is_anybody_there(db):
                    return
            for start in range(0, len(due), AT_ONCE):
                await self._push(due[start : start + AT_ONCE])
        except Exception as error:
            if not is_lost(error):
                raise
            log.warning("notifications are lost, for the database is: %s", error)

    async def _push(self, message_ids: list[MessageId]) -> None:
        latest: dict[tuple[str, ConversationId], Notice] = {}
        async with self._database.connection() as db:
            for notice in await push.notices(db, message_ids):
                latest[notice.endpoint, notice.message.conversation_id] = notice
            badges = {one.user_id: 0 for one in latest.values()}
            for user_id in badges:
                badges[user_id] = await unread.badge(db, user_id)
        gate = asyncio.Semaphore(POSTS_AT_ONCE)

        async def post(notice: Notice) -> None:
            async with gate:
                await self._post(notice, badges[notice.user_id])

        await asyncio.gather(*(post(notice) for notice in latest.values()))

    async def _post(self, notice: Notice, badge: int) -> None:
        message = notice.message
        said = Notification(
            conversation_id=message.conversation_id,
            message_id=message.id,
            thread_root_id=message.thread_root_id,
            title=notice.title or notice.sender.display_name or notice.sender.name,
            sender=notice.sender.display_name or notice.sender.name,
            body=message.content[:EXCERPT],
            is_mention=notice.is_mention,
            badge=badge,
        )
        try:
            body = http_ece.encrypt(
                encode(said),
                salt=os.urandom(16),
                private_key=ec.generate_private_key(ec.SECP256R1()),
                dh=_from_base64url(notice.p256dh),
                auth_secret=_from_base64url(notice.auth),
                version="aes128gcm",
            )
            headers = {
                "authorization": self._authorization(notice.endpoint),
                "content-encoding": "aes128gcm",
                "content-type": "application/octet-stream",
                "ttl": str(TTL_SECONDS),
                # A newer one of the same conversation takes its place, while it waits (RFC 8030, section 5.4).
                "topic": _base64url(message.conversation_id.bytes),
            }
            answer = await self._outbound.post(notice.endpoint, body, headers)
        except Unreachable as error:
            log.info("a notification could not be pushed: %s", error)
            return
        except ValueError as error:
            log.info("the keys of an endpoint do not do: %s", error)
            answer = None
        if answer is None or answer.status in GONE:
            async with self._database.connection() as db:
                await push.forget(db, notice.endpoint)
        elif answer.status >= 400:  # noqa: PLR2004
            log.warning("a push service answered %d", answer.status)

    def _authorization(self, endpoint: str) -> str:
        """Return the signature for a push service, which is the same for an hour."""
        parts = urlsplit(endpoint)
        audience = f"{parts.scheme}://{parts.netloc}"
        until, signed = self._signed.get(audience, (0.0, ""))
        if until < time.time():
            until = time.time() + SIGNED_SECONDS
            claims = {"sub": self._contact, "aud": audience, "exp": int(until + SIGNED_SECONDS)}
            signed = self._vapid.sign(claims)["Authorization"]
            self._signed[audience] = (until, signed)
        return signed


def new_key() -> str:
    """Return a new private key, in base64url."""
    return _base64url(ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value.to_bytes(32))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4))
