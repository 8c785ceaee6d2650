"""Push notifications: messages that users have not read after some seconds are sent to their browsers (Web Push).

They are encrypted for each browser (RFC 8291, by http-ece), signed by the server (RFC 8292, by py-vapid), and sent to
the browser's push service. The worker that stored a message does this from memory. If it dies within those seconds, the
notification is lost, but not the message.
"""

import asyncio
import base64
import logging
import os
import time
from collections import OrderedDict
from email.utils import parsedate_to_datetime
from itertools import count, groupby
from urllib.parse import urlsplit

import http_ece
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from py_vapid import Vapid02

from protocol.codec import encode
from protocol.ids import UserId
from protocol.push import Notification
from protocol.values import Message
from server.core.errors import log_failure
from server.core.faults import fault_of
from server.core.stopwatch import Stopwatch
from server.db.database import Database
from server.domain.push_keys import from_base64url
from server.fairness.batcher import Batcher
from server.jobs.push_drops import Drops
from server.jobs.push_due import FIRST_PAGE, NEXT_PAGE, DueMessages
from server.jobs.push_pauses import MAX_RETRY_AFTER
from server.jobs.push_posts import Failed, Posts, Push, Rejected, host_of
from server.jobs.safe_http import SafeHttp, Unreachable
from server.queries import push, unread
from server.queries.push import FIRST, Notice, PushPage, PushPost

TICK_SECONDS = 1.0
"""Time within which due messages of a conversation share a pass, in seconds."""
IN_A_TURN = 50
"""Max posts that are queued in one turn of the loop. A user may have 20 in each conversation."""
READS = 16
"""Max posts whose content and badges one statement reads."""
MAX_SIGNED = 500
"""Max signatures that are kept. Each host has one."""
TTL_SECONDS = 86_400
"""Time for which a push service keeps a notification for an offline browser, in seconds."""
SIGNED_SECONDS = 3_600
"""Time for which a signature is reused, in seconds."""
GONE = frozenset({404, 410})
"""Statuses of endpoints that no longer exist."""
MAX_DATE = 100
"""Max characters of a Retry-After header that are parsed."""

log = logging.getLogger(__name__)


class WebPush:
    """Pushes messages to users who have not read them after some seconds."""

    def __init__(
        self, database: Database, safe_http: SafeHttp, *, key: str, contact: str, after_seconds: float
    ) -> None:
        """`key` is a result of `new_key`. `contact` is for the operators of push services."""
        self._database = database
        self._safe_http = safe_http
        self._vapid = Vapid02.from_raw(key.encode())
        self._contact = contact
        self._after_seconds = after_seconds
        self._signed: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._drops = Drops()
        self.dropped = self._drops.counts
        """The number of dropped notifications, by reason."""
        self._due = DueMessages(self._drops)
        self._one_run = asyncio.Lock()
        self._reads: Batcher[PushPost, Push | None] = Batcher(self._read, most=READS)
        self._posts = Posts(self._read_one, self._post, self._drops)
        point = self._vapid.public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.public_key = _base64url(point)
        """The public key for browsers' subscriptions."""

    def enqueue(self, message: Message) -> None:
        """Enqueue a message for users who have not read it after some seconds."""
        self._due.add(message.conversation_id, message.sender_id, message.id, seconds=self._after_seconds)

    async def push_due(self) -> None:
        """Queue posts for due messages, one call at a time. Never waits for a post."""
        self._posts.start()
        if self._due:
            async with self._one_run:
                await self._push_all_due()

    async def _push_all_due(self) -> None:
        tick = time.monotonic()
        async with self._database.connection() as db:
            if not await push.is_anybody_there(db):
                self._due.forget(tick)
                return
        while True:
            # Messages of a conversation that become due within a second share one pass.
            if time.monotonic() - tick >= TICK_SECONDS:
                tick = time.monotonic()
            if pages := self._due.begin(tick):
                await self._read_pages(pages, FIRST_PAGE)
            # First pages do not prevent further ones, because a slow database may produce first pages all the time.
            if further := self._due.further():
                await self._read_pages([further], NEXT_PAGE)
            if pages or further:
                continue
            if (wait := self._due.wait()) is not None:
                await asyncio.sleep(min(wait, TICK_SECONDS))
            else:
                return

    async def _read_pages(self, pages: list[PushPage], limit: int) -> None:
        """Find the users who receive notifications for messages, and queue posts to them."""
        began = time.monotonic()
        try:
            async with self._database.connection() as db:
                found = await push.due(db, pages, limit)
        except Exception as error:
            for page in pages:
                self._due.failed(page)
            if fault_of(error) is None:
                raise
            log_failure(log, "finding the receivers of notifications", error)
            return
        seconds = time.monotonic() - began
        crowds = {page.conversation_id for page in pages if page.after != FIRST} | found.next.keys()
        for page in pages:
            self._due.done(page, found.next.get(page.conversation_id), limit=limit, seconds=seconds)
        by_user = groupby(sorted(found.posts, key=lambda post: post.user_id), key=lambda post: post.user_id)
        added = count(1)
        for user_id, group in by_user:
            posts = list(group)
            self._posts.keep(user_id, {post.endpoint for post in posts})
            for post in posts:
                self._posts.add(post, is_crowd=post.conversation_id in crowds)
                if next(added) % IN_A_TURN == 0:
                    await asyncio.sleep(0)
        self._posts.start()

    async def close(self) -> None:
        """Cancel the posts in flight."""
        await self._posts.close()

    async def _read_one(self, post: PushPost) -> Push | None:
        try:
            return await self._reads.submit(post)
        except Exception as error:
            if fault_of(error) is None:
                raise
            log_failure(log, "reading a notification", error)
            self._drops.add("database")
            return None

    async def _read(self, posts: list[PushPost]) -> list[Push | None]:
        """Return the content of posts. It is None for readers who may no longer read the message or have read it."""
        async with self._database.connection() as db:
            found = {notice.post: notice for notice in await push.notices(db, posts)}
            badges = await unread.badges(db, {post.user_id for post in found})
        return [
            None if (notice := found.get(post)) is None else _push_of(notice, badges.get(post.user_id, 0))
            for post in posts
        ]

    async def _post(self, notification: Push, stopwatch: Stopwatch) -> None:
        """Encrypt and send a notification. Raises Failed or Rejected."""
        try:
            body = http_ece.encrypt(
                notification.payload,
                salt=os.urandom(16),
                private_key=ec.generate_private_key(ec.SECP256R1()),
                dh=from_base64url(notification.p256dh),
                auth_secret=from_base64url(notification.auth),
                version="aes128gcm",
            )
            headers = {
                "authorization": self._authorization(notification.endpoint),
                "content-encoding": "aes128gcm",
                "content-type": "application/octet-stream",
                "ttl": str(TTL_SECONDS),
                # A newer notification of the conversation replaces one that waits at the service (RFC 8030, section
                # 5.4).
                "topic": notification.topic,
            }
            answer = await self._safe_http.post(notification.endpoint, body, headers, stopwatch=stopwatch)
        except Unreachable as error:
            log.info("cannot push a notification: %s", error)
            raise Failed from error
        except (ValueError, http_ece.ECEException) as error:
            self._drops.add("unusable")
            if (user_id := await self._forget(notification.endpoint)) is not None:
                log.warning(
                    "deleted an unusable endpoint of user %s at %s (%s)",
                    user_id, urlsplit(notification.endpoint).hostname, type(error).__name__,
                )  # fmt: skip
            return
        if answer.status in GONE:
            await self._forget(notification.endpoint)
        elif answer.status >= 400:  # noqa: PLR2004
            retry_after = seconds_of(answer.headers.get("retry-after", ""))
            raise Failed(retry_after) if answer.status >= 500 else Rejected(retry_after)  # noqa: PLR2004

    async def _forget(self, endpoint: str) -> UserId | None:
        """Delete an endpoint. Return its user. Return None if it does not exist, or after a fault of the database."""
        try:
            async with self._database.connection() as db:
                return await push.forget(db, endpoint)
        except Exception as error:
            # The next notification to this endpoint tries again.
            if fault_of(error) is None:
                raise
            log_failure(log, "deleting an endpoint", error)
            return None

    def _authorization(self, endpoint: str) -> str:
        """Return the signature for a push service, which is reused for an hour."""
        audience = host_of(endpoint)
        until, signed = self._signed.pop(audience, (0.0, ""))
        if until < time.time():
            until = time.time() + SIGNED_SECONDS
            claims = {"sub": self._contact, "aud": audience, "exp": int(until + SIGNED_SECONDS)}
            signed = self._vapid.sign(claims)["Authorization"]
        self._signed[audience] = (until, signed)
        if len(self._signed) > MAX_SIGNED:
            self._signed.popitem(last=False)
        return signed


def _push_of(notice: Notice, badge: int) -> Push:
    post = notice.post
    said = Notification(
        conversation_id=post.conversation_id,
        message_id=post.message_id,
        thread_root_id=notice.thread_root_id,
        title=notice.title or notice.sender.display_name or notice.sender.name,
        sender=notice.sender.display_name or notice.sender.name,
        body=notice.body,
        is_mention=notice.is_mention,
        badge=badge,
    )
    return Push(post.endpoint, notice.p256dh, notice.auth, _base64url(post.conversation_id.bytes), encode(said))


def seconds_of(retry_after: str) -> float:
    """Return the seconds of a Retry-After header in either form, at most `MAX_RETRY_AFTER`. Return 0 if the header is
    invalid.
    """
    asked = retry_after[:MAX_DATE]
    if asked.isascii() and asked.isdigit():
        return min(float(asked), MAX_RETRY_AFTER)
    try:
        return min(max(0.0, parsedate_to_datetime(asked).timestamp() - time.time()), MAX_RETRY_AFTER)
    except Exception:  # noqa: BLE001 - the header is untrusted, and the library raises many kinds of errors
        return 0.0


def new_key() -> str:
    """Return a new private key, in base64url."""
    return _base64url(ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value.to_bytes(32))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
