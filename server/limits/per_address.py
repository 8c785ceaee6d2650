"""Limits per client address: requests per second, and concurrent connections, at one worker."""

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
"""`retry_after_ms` of an address with too many connections."""
LATE_RATE = 100.0
"""Min rate of answers to refused requests, per address, in answers per second. A higher rate of the address counts
instead.
"""


def address_of(request: HTTPConnection) -> str | None:
    """Return the address of a request's client, as a trusted proxy reports it. Return None if it is no IP address."""
    address = parsed(request.client.host.partition("%")[0]) if request.client else None
    return None if address is None else str(address)


def host_of(request: HTTPConnection) -> str | None:
    """Return the name or address in `Host`, in lower case and without a port. Return None without a valid one."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def key_of(request: HTTPConnection) -> str:
    """Return the key of a request for limits per address."""
    return limit_key(request.client.host) if request.client else "unknown"


class Addresses:
    """Requests and connections per client address."""

    def __init__(self, rate: float, *, connections: int, too_many: Throttle[str]) -> None:
        """`rate` is the max number of requests and new connections per second. `connections` is the max number of open
        connections. `too_many` limits log entries about addresses with too many connections.
        """
        self._requests: TokenBuckets[str] = TokenBuckets("requests of this address", rate)
        self._late_rate = max(rate, LATE_RATE)
        self._late: Counter[str] = Counter()
        self._throttle: Throttle[str] = Throttle()
        self._too_many = too_many
        self._connections: Counter[str] = Counter()
        self._most = connections

    def require(self, request: HTTPConnection) -> None:
        """Count a request. Raises Refused if its address exceeds the rate."""
        key = key_of(request)
        try:
            self._requests.require(key)
        except Refused:
            if self._throttle.passes(key):
                log.warning("too many requests from address %s; refusing further ones%s", key, OF_A_PROXY)
            raise

    @contextmanager
    def late(self, request: HTTPConnection) -> Iterator[float]:
        """Count a request that `require` refused, and yield the delay of its answer, in seconds. Answers leave one
        after another. Otherwise refusals would cost a worker as much as the requests.
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
        """Count a connection. Return the function that ends the count. Raises Refused if the address has too many."""
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
    """Return the refusal for an address with the max number of connections. Log it if `throttle` passes."""
    if throttle.passes(key):
        log.warning("too many connections from address %s; refusing further ones%s", key, OF_A_PROXY)
    return Refused(
        ErrorCode.RATE_LIMITED,
        "Too many connections from this address. Close one, or retry after `retry_after_ms`.",
        retry_after_ms=RETRY_MS,
    )
