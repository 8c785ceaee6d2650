"""HTTP requests to addresses that users chose. They never reach this machine or its network, and are limited in time
and size.

A name is resolved once and all of its addresses are checked. The connection uses one of these, so a name that resolves
to another address the second time (DNS rebinding) has no effect.
"""

import asyncio
import ipaddress
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx
from anyio.abc import ByteStream

from server.core.stopwatch import Stopwatch
from server.fairness.loop_time import LoopTime
from server.jobs.resolver import Resolver

TOTAL_SECONDS = 5.0
"""Max time of a request including redirects, in seconds. Waits for the worker's own share of the loop do not count."""
MAX_REDIRECTS = 3
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_OF_POST = 1_000
"""Max bytes of a response to a POST request that are read."""
MAX_BESIDE_BYTES = 16 * 1024
"""Max bytes of a response besides its body, which have to be parsed. These are headers, `103` responses and sizes of
chunks. A thousand of the shortest headers take a worker 2 ms.
"""
MAX_TLS_BYTES = 128 * 1024
"""Max bytes over TLS in addition to the max body, for certificates, records and tickets."""
MAX_READS = 1_000
"""Max reads per response, which may arrive byte by byte."""
TURN_BYTES = 4 * 1024
"""Max bytes that are parsed in one turn of the loop."""
LOOP_SHARE, BURST_SECONDS = 0.1, 0.02
"""Max share of the loop's time for all GET requests, and the same for all POST requests, and its burst in seconds."""
PORTS = {"http": 80, "https": 443}
NEAR = [ipaddress.ip_network(one) for one in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16")]
"""Networks for special purposes (RFC 6890) that Python 3.11 considers public. These are protocol assignments, relays of
6to4, documentation, and segment routing.
"""


class Unreachable(Exception):  # noqa: N818 - an answer, not a fault
    """The address cannot be reached, or may not be. `url` is the last address of the request."""

    def __init__(self, reason: str, *, url: str = "") -> None:
        super().__init__(reason)
        self.url = url


class HttpAnswer(NamedTuple):
    """A response. `body` is cut to the requested size. `url` is the address after redirects."""

    status: int
    headers: httpx.Headers
    body: bytes
    url: str


class _Cost:
    """The size and the reads of one response. Reads of it wait here for their turns of the loop."""

    def __init__(self, share: LoopTime, stopwatch: Stopwatch, limit: asyncio.Timeout, *, most: int) -> None:
        """`limit` cancels the request when `stopwatch` reaches `TOTAL_SECONDS`. `most` is the max size of the body, in
        bytes.
        """
        self._share = share
        self._stopwatch = stopwatch
        self._limit = limit
        self._reads = 0
        self._beside = 0
        self._encrypted = 0
        self._most_encrypted = most + MAX_TLS_BYTES

    async def turn(self) -> None:
        """Return in a later turn of the loop, when the share permits it. The time-out pauses meanwhile."""
        self._limit.reschedule(None)
        with self._stopwatch.stopped():
            await self._share.turn()
        self._limit.reschedule(_until(self._stopwatch))

    def note(self, read: int) -> None:
        """Count bytes that were read. Raises httpcore.ReadError if too many bytes do not belong to the body."""
        self._reads += 1
        self._beside += read
        # The bytes of the last read are not parsed yet, and may belong to the body.
        if self._reads > MAX_READS or self._beside > MAX_BESIDE_BYTES + TURN_BYTES:
            raise httpcore.ReadError("its answer has too many parts")

    def note_encrypted(self, received: int) -> None:
        """Count bytes that were received over TLS. Raises httpcore.ReadError if there are too many."""
        self._reads += 1
        self._encrypted += received
        if self._reads > MAX_READS or self._encrypted > self._most_encrypted:
            raise httpcore.ReadError("its answer has too many parts")

    def note_body(self, size: int) -> None:
        """Subtract bytes that belong to the body."""
        self._beside -= size


_COST: ContextVar[_Cost] = ContextVar("cost")
"""The counts of the response that the current task waits for."""


class SafeHttp:
    """Sends requests to other servers. The loop's time is limited for each response, and in total."""

    def __init__(self, *, to_private: bool) -> None:
        """`to_private` allows addresses of this machine and of its networks."""
        self._to_private = to_private
        self._resolver = Resolver()
        # GET and POST have one share each, so that links in messages do not delay notifications.
        self._gets = LoopTime(LOOP_SHARE, BURST_SECONDS)
        self._posts = LoopTime(LOOP_SHARE, BURST_SECONDS)
        self._creating = asyncio.Lock()
        self._transport: _Transport | None = None

    async def transport(self) -> "_Transport":
        """Return the transport. It is used without a client, which would keep the cookies of all responses for ever.

        The first call creates it. The certificates of all authorities are read in a thread, because that takes a tenth
        of a second.
        """
        async with self._creating:
            if self._transport is None:
                self._transport = _Transport(await asyncio.to_thread(httpx.create_ssl_context, trust_env=False))
        return self._transport

    async def close(self) -> None:
        """Close all connections."""
        if self._transport is not None:
            await self._transport.aclose()

    async def get(self, url: str, *, most: int) -> HttpAnswer:
        """Return up to `most` bytes of the page at an address, after a few redirects. Each redirect is checked again,
        and all share one time limit.

        Raises Unreachable.
        """
        stopwatch = Stopwatch()
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._ask("GET", url, most=most, headers={"accept": "text/html"}, stopwatch=stopwatch)
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                return answer
            try:
                url = urljoin(url, answer.headers["location"])
            except ValueError:
                raise Unreachable("it redirects to no address") from None
        raise Unreachable("there are too many redirects")

    async def post(self, url: str, body: bytes, headers: dict[str, str], *, stopwatch: Stopwatch) -> HttpAnswer:
        """Return the response to a POST request. `stopwatch` is stopped while the request waits for its turns.

        Raises Unreachable.
        """
        return await self._ask("POST", url, most=MOST_OF_POST, headers=headers, stopwatch=stopwatch, body=body)

    async def _ask(
        self,
        method: str,
        url: str,
        *,
        most: int,
        headers: dict[str, str],
        stopwatch: Stopwatch,
        body: bytes | None = None,
    ) -> HttpAnswer:
        share = self._gets if body is None else self._posts
        try:
            parts = urlsplit(url)
            if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
                raise Unreachable("this is not an address on the web")
            port = parts.port or PORTS[parts.scheme]
            # Outside the time-out, because after it this may wait for the end of the look-up's thread.
            address = await self._resolve(parts.hostname, max(0.0, TOTAL_SECONDS - stopwatch.seconds))
            async with asyncio.timeout_at(_until(stopwatch)) as limit:
                request = httpx.Request(
                    method,
                    httpx.URL(url, host=address, port=port),
                    headers={"host": parts.netloc, "accept-encoding": "identity", "user-agent": "OpenChat"} | headers,
                    content=body,
                    # The library's time-outs would include waits for the worker's share of the loop.
                    extensions={"sni_hostname": parts.hostname},
                )
                return await share.run(self._exchange(request, url, most, _Cost(share, stopwatch, limit, most=most)))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, ValueError) as error:
            raise Unreachable(str(error) or type(error).__name__, url=url) from error

    async def _exchange(self, request: httpx.Request, url: str, most: int, cost: _Cost) -> HttpAnswer:
        token = _COST.set(cost)
        try:
            response = await (await self.transport()).handle_async_request(request)
            try:
                return HttpAnswer(response.status_code, response.headers, await _read(response, most, cost), url)
            finally:
                await response.aclose()
        finally:
            _COST.reset(token)

    async def _resolve(self, host: str, seconds: float) -> str:
        found = await self._resolver.addresses(host, seconds=seconds)
        addresses = [ipaddress.ip_address(one) for one in found]
        if not self._to_private and not all(_is_public(one) for one in addresses):
            raise Unreachable("its address is not a public one")
        return str(addresses[0])


class _Transport(httpx.AsyncHTTPTransport):
    """Pools connections by address and name, because names at one address have different certificates."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context, max_connections=100, max_keepalive_connections=20, keepalive_expiry=5.0,
            network_backend=_Backend(),
        )  # fmt: skip

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        # A pool distinguishes connections by scheme, host and port. In hexadecimal, any name is a valid host.
        address = ipaddress.ip_address(request.url.host).packed.hex()
        name = str(request.extensions["sni_hostname"]).encode().hex()
        request.url = request.url.copy_with(host=f"{address}.{name}")
        return await super().handle_async_request(request)


class _Backend(httpcore.AnyIOBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's shape
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        address = str(ipaddress.ip_address(bytes.fromhex(host.partition(".")[0])))
        return _Stream(await super().connect_tcp(address, port, timeout, local_address, socket_options))


class _Stream(httpcore.AsyncNetworkStream):
    """Limits the bytes per read and in total, and lets other callbacks run after each read."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as above
        cost = _COST.get()
        data = await self._stream.read(min(max_bytes, TURN_BYTES), timeout)
        cost.note(len(data))
        await cost.turn()  # before parsing: of responses that arrive together, each turn parses one
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
    ) -> httpcore.AsyncNetworkStream:
        # TLS reads 64 KiB at a time, including bytes that never belong to a response. The library offers no other hook.
        self._stream._stream = _Encrypted(self._stream._stream)  # type: ignore[attr-defined]  # noqa: SLF001
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - as above
        return self._stream.get_extra_info(info)


class _Encrypted(ByteStream):
    """The bytes below TLS, read in small portions with a turn of the loop each."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def receive(self, max_bytes: int = TURN_BYTES) -> bytes:
        cost = _COST.get()
        data = await self._stream.receive(min(max_bytes, TURN_BYTES))
        cost.note_encrypted(len(data))
        await cost.turn()
        return data

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._stream.extra_attributes


def _until(stopwatch: Stopwatch) -> float:
    """Return the loop's time at which `TOTAL_SECONDS` have passed."""
    return asyncio.get_running_loop().time() + TOTAL_SECONDS - stopwatch.seconds


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inside = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if inside is not None:
        return _is_public(inside)
    # Python considers the site-local addresses of IPv6 global, but networks may still route them internally.
    is_near = address.is_multicast or address.is_reserved or getattr(address, "is_site_local", False)
    return address.is_global and not is_near and not any(address in network for network in NEAR)


async def _read(response: httpx.Response, most: int, cost: _Cost) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        cost.note_body(len(piece))
        body += piece
        if len(body) >= most:
            break
    return bytes(body[:most])
