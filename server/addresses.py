"""What one address may do at a worker: so many requests a second, so many connections at once."""

from collections import Counter
from collections.abc import Callable

from starlette.requests import HTTPConnection

from protocol.errors import ErrorCode, Refused
from server.limits import Allowance

RETRY_MS = 5_000


class Addresses:
    """Counts by the address that a request comes from."""

    def __init__(self, rate: float, *, connections: int) -> None:
        """`rate` is in requests and new connections a second; `connections` how many may be open."""
        self._requests: Allowance[str] = Allowance(rate)
        self._connections: Counter[str] = Counter()
        self._most = connections

    def require(self, request: HTTPConnection) -> None:
        """Count a request. Raises Refused if its address has too many."""
        self._requests.require(address_of(request))

    def connect(self, request: HTTPConnection) -> Callable[[], None]:
        """Count a connection, and return what counts it out again. Raises Refused if its address has too many."""
        self.require(request)
        address = address_of(request)
        if self._connections[address] >= self._most:
            raise Refused(
                ErrorCode.RATE_LIMITED, "There are too many connections from this address.", retry_after_ms=RETRY_MS
            )
        self._connections[address] += 1

        def disconnect() -> None:
            self._connections[address] -= 1
            if not self._connections[address]:
                del self._connections[address]

        return disconnect


def address_of(request: HTTPConnection) -> str:
    """Return the address that a request comes from; behind a trusted proxy, the one that it names."""
    return request.client.host if request.client else "unknown"
