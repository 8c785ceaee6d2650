"""Connects to a host of DATABASE_URL that accepts writes. The URL may list several, of which one is the primary."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from server.core.errors import told
from server.core.faults import Away

CONNECT_SECONDS = 5.0
"""Max time to connect, and max wait for a connection of the pool, in seconds."""
HOST_SECONDS = 2.5
"""Max time to connect to a host if the URL lists others, in seconds."""
HEAD_START = 0.3
"""Time that a host has before the next one is tried too, in seconds. A host that does not answer costs no more."""
CLOSE_SECONDS = 1.0
"""Max time to close a connection that is not used, in seconds."""
SILENT_SECONDS = 5
"""Max time without an answer of the kernel of PostgreSQL's machine, in seconds. The connection is then closed."""
REFUSED = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Raised by connecting."""
WRITABLE = "read-write"
"""Default of `target_session_attrs` if the URL lists several hosts."""
SILENT = "it does not answer"
UNCONFIRMED = "it does not confirm a commit in time; if a synchronous standby is required, it may be away"
UNFIT = "it is a standby or read-only, or otherwise not what target_session_attrs requires"
"""Reasons not to use a host."""

# A transaction that writes to the WAL and nowhere else. Where commits wait for a synchronous standby, it returns after
# that standby has all earlier ones. An old primary that was restarted shows commits that no standby has. Without this
# statement, a repeated frame would be acknowledged because of them, although the new primary does not have them.
CONFIRM = """
SELECT CASE WHEN NOT current_setting('transaction_read_only')::boolean
    THEN pg_logical_emit_message(true, 'openchat', '') END
"""

# Idle connections are probed, too. Without these options, a connection to a machine that lost its power or its network
# ends after minutes or never.
KEEP_ALIVE = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 2),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", SILENT_SECONDS * 1_000),
)
"""Options of a TCP socket. macOS lacks some of them."""

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Check: TypeAlias = Callable[[Connection], Awaitable[None]]


class Hosts:
    """The hosts of one URL. The host that was used last is tried first."""

    def __init__(self, url: str, check: Check | None = None, **options: Any) -> None:  # noqa: ANN401 - asyncpg's
        """`check` raises one of `REFUSED` if a new connection must not be used; by default it is `confirm`. `options`
        are passed to `asyncpg.connect`. Raises ValueError if the URL is malformed.
        """
        self._urls = single_hosts(url)
        self._check = check or confirm
        self._options = options
        self._seconds = CONNECT_SECONDS
        if len(self._urls) > 1:
            self._seconds = HOST_SECONDS
            if "target_session_attrs" not in dict(parse_qsl(url.partition("?")[2])):
                self._options["target_session_attrs"] = WRITABLE
        self._closing: set[asyncio.Task[None]] = set()

    async def connect(self, session: Mapping[str, str] | None = None) -> Connection:
        """Return a connection with the settings in `session`. The next host is tried when the one before it has failed,
        or has not answered for `HEAD_START`.

        Raises one of `REFUSED` or ValueError if no host can be used. Raises Away without trying another host if `check`
        does.
        """
        left = list(self._urls)
        attempts: dict[asyncio.Task[Connection], str] = {}
        failures: dict[str, Exception] = {}
        try:
            while left or attempts:
                if left:
                    url = left.pop(0)
                    attempts[asyncio.create_task(self._try(url, session))] = url
                done, _ = await asyncio.wait(
                    attempts, timeout=HEAD_START if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for attempt in [one for one in attempts if one in done]:
                    url = attempts.pop(attempt)
                    try:
                        connection = attempt.result()
                    except Away:
                        raise
                    except (*REFUSED, ValueError) as error:
                        failures[url] = error
                    else:
                        self._urls.sort(key=lambda one, used=url: one != used)  # type: ignore[misc]
                        return connection
        finally:
            for attempt in attempts:
                attempt.add_done_callback(self._leave)
                attempt.cancel()
        raise _failure({url: failures[url] for url in self._urls})

    async def _try(self, url: str, session: Mapping[str, str] | None) -> Connection:
        """Return a connection to one host that passed the check."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._seconds):
                connection = await asyncpg.connect(
                    url, timeout=self._seconds, server_settings=dict(session or {}), connection_class=_Kept,
                    **self._options,
                )  # fmt: skip
                await self._check(connection)
        except BaseException as error:
            if connection is not None:
                self._close(connection)
            if isinstance(error, TimeoutError):
                raise TimeoutError(UNCONFIRMED if connection is not None else SILENT) from None
            if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
                raise ConnectionError(UNFIT) from None
            raise
        return connection

    def _leave(self, attempt: "asyncio.Task[Connection]") -> None:
        """Close the connection of an attempt that was completed although another one was faster."""
        if not attempt.cancelled() and attempt.exception() is None:
            self._close(attempt.result())

    def _close(self, connection: Connection) -> None:
        """Close a connection in the background. A statement in progress is cancelled, because a commit could wait for a
        standby for as long as that is away.
        """
        closing = asyncio.create_task(_closed(connection))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class _Kept(asyncpg.Connection):
    """A connection that ends when the other machine vanishes."""

    __slots__ = ()

    def __init__(self, protocol: Any, transport: asyncio.Transport, *rest: Any) -> None:  # noqa: ANN401 - asyncpg's
        super().__init__(protocol, transport, *rest)
        keep_alive(transport.get_extra_info("socket"))


async def confirm(connection: Connection) -> None:
    """Return when the standbys that must confirm commits have everything that a new connection can see."""
    await connection.execute(CONFIRM)


def keep_alive(connected: socket.socket) -> None:
    """Let the kernel close a TCP socket whose other end does not answer for `SILENT_SECONDS`."""
    if connected.family in {socket.AF_INET, socket.AF_INET6}:
        for level, name, value in KEEP_ALIVE:
            if (option := getattr(socket, name, None)) is not None:
                connected.setsockopt(level, option, value)


def single_hosts(url: str) -> list[str]:
    """Return a URL for each host that `url` lists. Raises ValueError if the URL is malformed.

    asyncpg has one time limit for all hosts. It also uses one password for all, of the first line of a password file
    that fits any of them.
    """
    parts = urlsplit(url)
    user, at, places = parts.netloc.rpartition("@")
    if places:
        each = [parts._replace(netloc=f"{user}{at}{place}") for place in _listed(places)]
        if not all(one.port is None or one.port for one in each):  # the property raises ValueError, too
            raise ValueError("a port is invalid")
        return [urlunsplit(one) for one in each]
    options = dict(parse_qsl(parts.query))
    hosts, ports = _listed(options.get("host", "")), _listed(options.get("port", ""))
    if len(hosts) == 1:
        return [url]
    if len(ports) == 1:
        ports *= len(hosts)
    return [
        urlunsplit(parts._replace(query=urlencode(options | {"host": host} | ({"port": port} if port else {}))))
        for host, port in zip(hosts, ports, strict=True)
    ]


def _listed(text: str) -> list[str]:
    """Return the items of a list with commas. Raises ValueError if it has several and one is empty."""
    items = text.split(",")
    if len(items) > 1 and not all(items):
        raise ValueError("an item of a list is empty")
    return items


def _failure(failures: Mapping[str, Exception]) -> Exception:
    """Return the error of the only host, or one error for all hosts with their names."""
    if len(failures) == 1:
        return next(iter(failures.values()))
    return ConnectionError("; ".join(f"{_place(url)}: {told(error)}" for url, error in failures.items()))


def _place(url: str) -> str:
    """Return the host of a URL, and the port if the URL has one."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    return parts.netloc.rpartition("@")[2] or options.get("host", "")


async def _closed(connection: Connection) -> None:
    """Close a connection, whatever state it is in."""
    with contextlib.suppress(*REFUSED):
        await connection.close(timeout=CLOSE_SECONDS)
