"""The TCP connections of a worker, counted when they are accepted. They never need more descriptors than there are."""

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterable

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_FRAME_BYTES
from server.core.addresses import limit_key
from server.core.metrics import OTHER
from server.core.proxies import FORWARDED_FOR, Proxies, entries
from server.core.throttle import Throttle
from server.fairness.fair_queue import FairQueue
from server.fairness.shared_bound import SharedBound
from server.limits.per_address import too_many_of_address
from server.limits.token_bucket import Pace

RESERVED_DESCRIPTORS = 128
"""Descriptors reserved for the database, Redis, logs, metrics and requests to other servers."""
MACOS_DESCRIPTORS = 10_240
"""Number of descriptors to try if the hard limit is infinite, because the kernel of macOS has another limit."""
SPARE = 8
"""Min number of connections per address beyond the admitted ones."""
UNREAD_BYTES = 16 * 1024 * 1024
"""Max bytes of incomplete or unanswered requests and of data before login, per worker. As many are allowed for
incomplete messages of users. Each address and each user gets a share (`SharedBound`).
"""
FREE_BYTES = 4096
"""Bytes of these that each connection has without counting. So logins, small requests and most messages pass, however
much others hold.
"""
LINGER_BYTES = 16 * MAX_FRAME_BYTES
"""Max bytes that are read and dropped before a connection is closed. Closing a socket with unread bytes resets it, and
the client may lose the response or the close frame.
"""
PROXY = ""
"""The key of a trusted proxy's connection between requests."""
RETRY_MS = 5_000
"""`retry_after_ms` of these refusals."""

log = logging.getLogger(__name__)


class Sockets:
    """Counts connections by the address of the TCP peer. A trusted proxy's connection counts for the client of its
    current request, from the end of the header until the response. In between it counts for nobody.
    """

    def __init__(
        self, *, most: int, per_address: int, proxies: Proxies, frames: Pace, outbox_bytes: int, compresses: bool = True
    ) -> None:
        """`frames` is the rate of WebSocket control frames and fragments, per connection. `outbox_bytes` is the max
        number of bytes that wait for a slow WebSocket peer. `compresses` allows compression of frames.
        """
        self.compresses = compresses
        self._most = most
        # A few more than are admitted, because a client can always read a refusal that answers its request, unlike one
        # before that. One address alone never takes the last eighth.
        self._per_address = min(per_address + max(SPARE, per_address // 4), max(1, most - most // 8 - 1))
        self._proxies = proxies
        self.frames = frames
        self.outbox_bytes = outbox_bytes
        self._count = 0
        self._of_address: Counter[str] = Counter()
        self.unread: SharedBound[str] = SharedBound(UNREAD_BYTES)
        """Bytes of incomplete or unanswered requests and of data before login, by address."""
        self.unread_of_users: SharedBound[UserId] = SharedBound(UNREAD_BYTES)
        """Bytes of incomplete messages, by user. Clients without an account take none of these."""
        # Idle connections, oldest first, each with the function that closes it.
        self._waiting: dict[object, Callable[[], None]] = {}
        self._beginning: FairQueue[str, Callable[[], None]] = FairQueue()
        self._is_beginning = False
        self._sheds: Throttle[None] = Throttle()
        self._floods: Throttle[str] = Throttle()
        self.too_many: Throttle[str] = Throttle()
        """Limits log entries about addresses with too many connections, here and in `Addresses`."""
        self.closed: Counter[str] = Counter()
        """WebSockets that the server closed, by close code."""
        self.answers: Counter[tuple[str, int]] = Counter()
        """HTTP responses, including refused handshakes, by path and status."""
        self.shed = 0
        self.timed_out = 0

    def __len__(self) -> int:
        return self._count

    def arrive(self, host: str | None) -> str:
        """Count a connection. Return its key for `leave`. Raises Refused if there is no room.

        If descriptors run out, the connection that has been idle for longest is closed.
        """
        key = PROXY if host is None or self._proxies.trusts(host) else limit_key(host)
        if key and self._of_address[key] >= self._per_address:
            raise too_many_of_address(key, self.too_many)
        if self._count >= self._most:
            self._shed()
            if not self._waiting:
                raise Refused(
                    ErrorCode.UNAVAILABLE,
                    "The server has too many connections. Retry after `retry_after_ms`.",
                    retry_after_ms=RETRY_MS,
                )
            close = self._waiting.pop(next(iter(self._waiting)))
            close()
        self._count += 1
        self._of_address[key] += 1
        return key

    def client_key(self, peer: str | None, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the key of the client of a proxied request, by the address in its headers, or else by the proxy's. If
        that entry is no address, another check refuses the request later.
        """
        try:
            host = self._proxies.client(peer, entries(headers, FORWARDED_FOR)).host
        except Refused:
            host = None
        return limit_key(host or peer or "unknown")

    def move(self, key: str, to: str) -> None:
        """Count a connection under another key. Raises Refused if that key has too many."""
        if to and self._of_address[to] >= self._per_address:
            raise too_many_of_address(to, self.too_many)
        self._of_address[to] += 1
        _take(self._of_address, key, 1)

    def leave(self, key: str) -> None:
        """End the count of a closed connection."""
        self._count -= 1
        _take(self._of_address, key, 1)

    def answered(self, status: int) -> None:
        """Count a response in place of the application's. The path does not matter."""
        self.answers[OTHER, status] += 1

    def flooded(self, key: str) -> None:
        """Log the key of a connection that is closed for abuse before login."""
        if self._floods.passes(key):
            log.warning("closing a connection from address %s with 4003: too many fragments or pings before login", key)

    def waits(self, connection: object, close: Callable[[], None]) -> None:
        """Mark a connection as idle. `close` closes it when another connection needs its place."""
        self._waiting[connection] = close

    def works(self, connection: object) -> None:
        """Mark a connection as busy."""
        self._waiting.pop(connection, None)

    def begin(self, key: str, received: Callable[[], None]) -> None:
        """Call `received`, which handles the first bytes of a connection, in its turn. A handshake blocks the loop for
        half a millisecond, and hundreds may arrive together. Each turn of the loop handles one, and addresses take
        turns.
        """
        self._beginning.put(key, received)
        if not self._is_beginning:
            self._is_beginning = True
            asyncio.get_running_loop().call_soon(self._begin_one)

    def _begin_one(self) -> None:
        key, received = self._beginning.take()
        self._beginning.done(key)
        self._is_beginning = bool(self._beginning)
        if self._is_beginning:
            asyncio.get_running_loop().call_soon(self._begin_one)
        received()

    def hold(self, client: str | UserId, count: int) -> None:
        """Count `count` bytes of a request or message for an address or a user. Raises Refused beyond the client's
        share or the total.
        """
        if isinstance(client, str):
            is_held = self.unread.take(client, count)
        else:
            is_held = self.unread_of_users.take(client, count)
        if not is_held:
            raise Refused(
                ErrorCode.UNAVAILABLE,
                "Too many bytes wait in unfinished or unanswered requests. Retry after `retry_after_ms`.",
                retry_after_ms=RETRY_MS,
            )

    def release(self, client: str | UserId, count: int) -> None:
        """Release bytes that `hold` counted."""
        if isinstance(client, str):
            self.unread.give(client, count)
        else:
            self.unread_of_users.give(client, count)

    def _shed(self) -> None:
        self.shed += 1
        if self._sheds.passes(None):
            log.warning("no file descriptors for more than %d connections; closing idle ones", self._most)


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of descriptors to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, MACOS_DESCRIPTORS):
        if soft == hard or (limit != resource.RLIM_INFINITY and limit <= soft):
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):
            continue
        return


def most_sockets(reserved: int) -> int:
    """Return the max number of connections, given the limit of descriptors, `reserved` ones and those for everything
    else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = MACOS_DESCRIPTORS
    return max(soft - RESERVED_DESCRIPTORS - reserved, soft // 2)


def _take(counts: Counter[str], key: str, count: int) -> None:
    counts[key] -= count
    if counts[key] <= 0:
        del counts[key]
