"""What one address may do at a worker: so many requests a second, so many connections at once."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from protocol.errors import ErrorCode, Refused
from server.core.addresses import limit_key, parsed
from server.core.throttle import Throttle
from server.limits.token_bucket import TokenBuckets

OF_A_PROXY = ". If it is a proxy, set OPENCHAT_TRUSTED_PROXIES; otherwise all its clients count as one"

log = logging.getLogger(__name__)

RETRY_MS = 5_000
LATE_RATE = 100.0
"""Min answers a second to requests of an address beyond its rate, which is how many there are if it is higher."""


def address_of(request: HTTPConnection) -> str | None:
    """Return the address that a request comes from; behind a trusted proxy, the one that it names."""
    address = parsed(request.client.host.partition("%")[0]) if request.client else None
    return None if address is None else str(address)


def host_of(request: HTTPConnection) -> str | None:
    """Return the name or address in `Host`, in lower case and without a port; None if there is none."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def key_of(request: HTTPConnection) -> str:
    """Return what limits by address count a request by."""
    return limit_key(request.client.host) if request.client else "unknown"


class Addresses:
    """Counts by the address that a request comes from."""

    def __init__(self, rate: float, *, connections: int, too_many: Throttle[str]) -> None:
        """`rate` is in requests and new connections a second; `connections` how many may be open; `too_many` picks what
        is logged of addresses with more.
        """
        self._requests: TokenBuckets[str] = TokenBuckets("requests of this address", rate)
        self._late_rate = max(rate, LATE_RATE)
        self._late: Counter[str] = Counter()
        self._throttle: Throttle[str] = Throttle()
        self._too_many = too_many
        self._connections: Counter[str] = Counter()
        self._most = connections

    def require(self, request: HTTPConnection) -> None:
        """Count a request. Raises Refused if its address has too many."""
        key = key_of(request)
        try:
            self._requests.require(key)
        except Refused:
            if self._throttle.passes(key):
                log.warning("too many requests from address %s; refusing further ones%s", key, OF_A_PROXY)
            raise

    @contextmanager
    def late(self, request: HTTPConnection) -> Iterator[float]:
        """Count a request that `require` refused while its answer waits, and yield for how many seconds it should: one
        after another, or refusals would cost a worker as much as what they refuse.
        """
        key = key_of(request)
        self._late[key] += 1
        try:
            yield self._late[key] / self._late_rate
        finally:
            self._late[key] -= 1
            if not self._late[key]:
                del self._late[key]

    def connect(self, request: HTTPConnection) -> Callable[[], None]:
        """Count a connection, and return what counts it out again. Raises Refused if its address has too many."""
        key = key_of(request)
        if self._connections[key] >= self._most:
            raise too_many_of_address(key, self._too_many)
        self._connections[key] += 1

        def disconnect() -> None:
            self._connections[key] -= 1
            if not self._connections[key]:
                del self._connections[key]

        return disconnect


def too_many_of_address(key: str, throttle: Throttle[str]) -> Refused:
    """Return what to tell an address that has all the connections it may have. Log its key, if `throttle` passes."""
    if throttle.passes(key):
        log.warning("too many connections from address %s; refusing further ones%s", key, OF_A_PROXY)
    return Refused(
        ErrorCode.RATE_LIMITED,
        "Too many connections from this address. Close one, or retry after `retry_after_ms`.",
        retry_after_ms=RETRY_MS,
    )
