"""DATABASE_URL may list several hosts, of which one is the primary."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from protocol.errors import ErrorCode
from protocol.server import Error
from server.core.config import Settings, masked
from server.core.errors import Fatal
from server.db import database, hosts
from server.db.database import Database, connect
from server.db.hosts import Hosts, keep_alive, single_hosts
from server.db.migrate import migrate
from tests.conftest import Servers
from tests.world import World, message, sent

PATIENCE = 20
"""Max seconds for anything that must not wait for a host that does not answer."""
WAITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.mark.parametrize(
    ("url", "each"),
    [
        ("postgresql:///chat", ["postgresql:///chat"]),
        ("postgresql://db/chat", ["postgresql://db/chat"]),
        ("postgresql://me:it@a,b:6000/chat?sslmode=require",
         ["postgresql://me:it@a/chat?sslmode=require", "postgresql://me:it@b:6000/chat?sslmode=require"]),
        ("postgres://[::1]:1,[::2]:2/chat", ["postgres://[::1]:1/chat", "postgres://[::2]:2/chat"]),
        ("postgresql://me@/chat?host=/a,/b",
         ["postgresql://me@/chat?host=%2Fa", "postgresql://me@/chat?host=%2Fb"]),
        ("postgresql://me@/chat?host=a,b&port=1,2",
         ["postgresql://me@/chat?host=a&port=1", "postgresql://me@/chat?host=b&port=2"]),
        ("postgresql://me@/chat?host=a,b&port=1",
         ["postgresql://me@/chat?host=a&port=1", "postgresql://me@/chat?host=b&port=1"]),
    ],
)  # fmt: skip
def test_url_is_split_into_one_url_per_host(url: str, each: list[str]) -> None:
    assert single_hosts(url) == each


@pytest.mark.parametrize(
    "url",
    ["postgresql://a,,b/chat", "postgresql://a,/chat", "postgresql://a:1,b:x/chat", "postgresql://a:1,b:99999/chat",
     "postgresql:///chat?host=a,b,c&port=1,2", "postgresql:///chat?host=a,,b"],
)  # fmt: skip
async def test_malformed_list_of_hosts_is_refused(url: str) -> None:
    for refused in (connect(url), Database.open(Settings(database_url=url))):
        with pytest.raises(Fatal, match=r"^DATABASE_URL is invalid\. Check its host, port and options\.$"):
            await refused


def test_list_of_hosts_is_shown_without_its_password() -> None:
    assert masked("postgresql://me:secret@a:1,b/chat?passfile=x") == "postgresql://me@a:1,b/chat"
    assert masked("postgresql://me@/chat?host=/a,/b&password=secret") == "postgresql://me@/chat?host=/a,/b"


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a host that never answers, although its kernel accepts connections."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def lost() -> Iterator[int]:
    """The port of a host whose packets are lost. The queue of its listener is full, so the kernel drops others."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            full = stack.enter_context(socket.socket())
            full.settimeout(0)
            full.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listing(settings: Settings, *before: int) -> str:
    """Return the URL of the database with other hosts at these ports before it."""
    url, _, folder = settings.database_url.partition("?host=")
    others = "".join("127.0.0.1," for _ in before)
    ports = ",".join(map(str, (*before, 5432)))
    return f"{url}?host={others}{folder}&port={ports}&sslmode=disable"


@pytest.mark.parametrize("host", ["silent", "lost", "closed"])
async def test_host_that_does_not_answer_delays_no_connection(
    settings: Settings, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(hosts, "HOST_SECONDS", 60.0)
    monkeypatch.setattr(hosts, "HEAD_START", 0.05)
    url = listing(settings, request.getfixturevalue(host))
    async with asyncio.timeout(PATIENCE):
        found = await Database.open(Settings(database_url=url))
        async with found.connection() as db:
            assert await db.fetchval("SELECT true")
        await found.close()
        for connection in (await connect(url), await Hosts(url).connect()):
            await connection.close()
        assert await migrate(url) == []


async def test_host_that_was_used_last_is_tried_first(
    settings: Settings, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Hosts(listing(settings, silent))
    await (await one.connect()).close()
    monkeypatch.setattr(hosts, "HEAD_START", 3_600.0)
    async with asyncio.timeout(PATIENCE):
        again = await one.connect()
    assert await again.fetchval("SELECT true")
    await again.close()


async def test_error_names_each_host_and_no_password(settings: Settings, silent: int, closed: int) -> None:
    del settings
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hosts, "HOST_SECONDS", 0.5)
        with pytest.raises(Fatal) as refused:
            await connect(f"postgresql://me:secret@127.0.0.1:{silent},127.0.0.1:{closed}/chat?sslmode=disable")
    text = str(refused.value)
    assert f"127.0.0.1:{silent}: it does not answer; 127.0.0.1:{closed}: " in text
    assert "secret" not in text


async def test_read_only_host_is_not_used_if_others_are_listed(settings: Settings, closed: int) -> None:
    """A standby is read-only, too. If the URL lists no other host, commands may read from it."""
    read_only = "&default_transaction_read_only=on"
    reading = await connect(settings.database_url + read_only)
    assert await reading.fetchval("SELECT true")
    await reading.close()
    url = listing(settings, closed) + read_only
    for opening in (connect(url), Database.open(Settings(database_url=url))):
        with pytest.raises(Fatal, match="it is a standby or read-only"):
            await opening


async def test_connection_that_became_read_only_is_replaced(settings: Settings) -> None:
    one = await Database.open(settings)
    write = "UPDATE database_epoch SET is_only = true"
    async with one.connection() as db:
        await db.execute("SET default_transaction_read_only = on")
        old = db
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        async with one.connection() as db:
            await db.execute(write)
    assert old.is_closed()
    async with one.connection() as db:
        await db.execute(write)
    await one.close()


async def test_each_host_gets_its_own_password_of_a_password_file(tmp_path: Path) -> None:
    given: dict[int, bytes] = {}

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Ask for the password as PostgreSQL does, and hang up."""
        await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
        writer.write(b"R" + (8).to_bytes(4) + (3).to_bytes(4))
        assert await reader.readexactly(1) == b"p"
        password = await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
        given[writer.get_extra_info("sockname")[1]] = password.rstrip(b"\0")
        writer.close()

    servers = [await asyncio.start_server(ask, "127.0.0.1", 0) for _ in range(2)]
    first, second = [server.sockets[0].getsockname()[1] for server in servers]
    file = tmp_path / "passwords"
    file.write_text(f"127.0.0.1:{first}:*:me:one\n127.0.0.1:{second}:*:me:two\n")
    file.chmod(0o600)
    url = f"postgresql://me@127.0.0.1:{first},127.0.0.1:{second}/chat?sslmode=disable&passfile={file}"
    with pytest.raises(ConnectionError):
        await Hosts(url).connect()
    assert given == {first: b"one", second: b"two"}
    for server in servers:
        server.close()


def test_kernel_ends_connections_to_a_machine_that_vanished(silent: int) -> None:
    with socket.create_connection(("127.0.0.1", silent)) as one:
        keep_alive(one)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            seconds = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1_000
            assert seconds == hosts.SILENT_SECONDS < database.STATEMENT_SECONDS


@contextlib.asynccontextmanager
async def required_standby(servers: Servers) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Require a synchronous standby that is away. Yields a connection."""
    admin = await asyncpg.connect(servers.postgres.url("postgres"))
    require = "ALTER SYSTEM SET synchronous_standby_names = '{}'"
    await admin.execute(require.format("away"))
    await admin.execute("SELECT pg_reload_conf()")
    # PostgreSQL's checkpointer reads the setting later than this session does.
    await until_commits_wait(admin)
    try:
        yield admin
    finally:
        await admin.execute(require.format(""))
        await admin.execute("SELECT pg_reload_conf()")
        await until_shown(admin, "")
        await admin.close()


async def until_shown(db: "asyncpg.Connection[asyncpg.Record]", standbys: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while await db.fetchval("SHOW synchronous_standby_names") != standbys:
            await asyncio.sleep(0.01)


async def until_commits_wait(db: "asyncpg.Connection[asyncpg.Record]") -> None:
    with contextlib.suppress(TimeoutError):
        for _ in range(1_000):
            await db.execute(hosts.CONFIRM, timeout=1)


@pytest.mark.long
async def test_nothing_is_used_or_acknowledged_before_the_required_standby_has_it(
    own: tuple[Settings, Servers], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, servers = own
    for module in (database, hosts):
        monkeypatch.setattr(module, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 1.0)
    async with World(settings, workers=1) as world:
        (ada,) = await world.users("Ada")
        one = await world.connect(ada)
        channel = await world.channel(one)
        await sent(one, channel)
        frame = message(channel, "Not confirmed")
        stored = "SELECT count(*) FROM message WHERE id = $1"
        async with required_standby(servers) as admin:
            for _ in range(3):  # the repeated frame is not acknowledged either
                answer = await one.ask(frame)
                assert isinstance(answer, Error)
                assert answer.code is ErrorCode.UNAVAILABLE
            # Nobody may see the message: its commit still waits, because no statement was cancelled.
            assert await world.db.fetchval(stored, frame.message_id) == 0
            for opening in (connect(settings.database_url), Database.open(settings)):
                with pytest.raises(Fatal, match="it does not confirm a commit in time"):
                    await opening
            # The server has ended the sessions of new connections that were not used.
            waiting = await admin.fetchval(WAITS)
            with pytest.raises(Fatal):
                await connect(settings.database_url)
            await until_waiting(admin, waiting)
        async with asyncio.timeout(PATIENCE):
            while isinstance(await one.ask(frame), Error):
                await asyncio.sleep(0.1)
        assert await world.db.fetchval(stored, frame.message_id) == 1


async def until_waiting(db: "asyncpg.Connection[asyncpg.Record]", most: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while await db.fetchval(WAITS) > most:
            await asyncio.sleep(0.05)
