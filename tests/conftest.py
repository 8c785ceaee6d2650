"""Fixtures: one PostgreSQL and one Valkey per test run, and a database and workers per test."""

import asyncio
import functools
import io
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
import redis.utils
import uvloop
from redis.asyncio import Redis

from protocol import server
from protocol.ids import uuid7
from server.core import log
from server.core.config import Settings
from server.db import migrate
from server.limits import load_shedding
from server.processes.embedded.folder import DataFolder
from server.processes.embedded.postgres import Postgres
from server.processes.embedded.valkey import Valkey
from tests.cluster import Cluster
from tests.databases import Databases
from tests.world import Reader, Room, World

TEMPLATE = "template_openchat"
MIN_FREE_BYTES = 2 * 1024**3
"""Min free memory file system for the databases of the tests, bytes."""

# redis-py reads its own version from disk for each connection (4 ms), and each test opens a dozen.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)


introspect = asyncpg.Connection._introspect_types  # type: ignore[attr-defined]  # noqa: SLF001 - has no public name
known_types: dict[frozenset[int], Any] = {}


async def introspect_once(connection: asyncpg.Connection, oids: Iterable[int], timeout: float | None) -> Any:  # noqa: ASYNC109 - as the library calls it
    """Introspect a type once per process, not once per connection, since the query takes 20 ms.

    Queries use only built-in types of PostgreSQL, which have the same OIDs in every database.
    """
    key = frozenset(oids)
    if key not in known_types:
        known_types[key] = await introspect(connection, key, timeout)
    return known_types[key]


asyncpg.Connection._introspect_types = introspect_once  # type: ignore[attr-defined]  # noqa: SLF001


class Servers(NamedTuple):
    """The real database servers."""

    postgres: Postgres
    valkey: Valkey


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests on the event loop that workers use."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Restore the logging configuration after each test, since a test's stream is closed when the test ends."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = root.handlers[:], root.level
    try:
        return (yield)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        sys.excepthook = hook


unclosed: list[str] = []


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    if issubclass(warning_message.category, ResourceWarning):
        unclosed.append(nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a test left a socket open. Such a warning comes too late to fail the test itself."""
    if unclosed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    path = Path(tempfile.mkdtemp(prefix="openchat-tests-", dir=scratch()))
    folder = DataFolder(path)
    # This server need not survive a crash. Tests of faults start their own.
    postgres = Postgres(folder, max_connections=200, options={"fsync": "off", "full_page_writes": "off"})
    valkey = Valkey(folder)
    try:
        postgres.start()
        valkey.start()
        asyncio.run(make_template(postgres.url("postgres"), postgres.url(TEMPLATE)))
        yield Servers(postgres, valkey)
    finally:
        valkey.stop()
        postgres.stop()
        folder.release()
        shutil.rmtree(path)


def scratch() -> str | None:
    """Return a folder in memory if it has enough space. Copying a database there takes 10 ms instead of 300."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp creates a private folder in it
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > MIN_FREE_BYTES else None


async def make_template(administration: str, template: str) -> None:
    connection = await asyncpg.connect(administration)
    await connection.execute(f"CREATE DATABASE {TEMPLATE}")
    await connection.close()
    await migrate.migrate(template)


@pytest.fixture(autouse=True)
def no_load_shedding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable load shedding, so that a busy machine fails no test. Only tests/test_overload.py tests shedding."""
    if request.path.name != "test_overload.py":
        monkeypatch.setattr(load_shedding, "LATE_SECONDS", (60, 60, 60))


@pytest.fixture(scope="session")
def databases(servers: Servers) -> Iterator[Databases]:
    databases = Databases(servers.postgres.url, TEMPLATE)
    yield databases
    databases.close()


@pytest.fixture
async def database_url(servers: Servers, databases: Databases, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    database = await databases.take(is_new=request.node.get_closest_marker("new_database") is not None)
    yield servers.postgres.url(database.name)
    await databases.give(database)


@pytest.fixture
async def settings(servers: Servers, database_url: str) -> Settings:
    valkey = Redis.from_url(servers.valkey.url)
    await valkey.flushall()
    await valkey.aclose()
    # Tests write faster than people do, so rate limits are disabled. Tests of rate limits use `ephemeral` frames. Users
    # may add strangers. tests/test_adding.py tests the default of `add_people`.
    return Settings(
        database_url=database_url,
        redis_url=servers.valkey.url,
        database_connections=4,
        frame_rate=1e6,
        write_rate=1e6,
        read_rate=1e6,
        search_rate=1e6,
        address_rate=1e6,
        add_people="anyone",
    )


@pytest.fixture
async def own(settings: Settings) -> AsyncIterator[tuple[Settings, Servers]]:
    """A PostgreSQL and a Valkey of its own, which a test may stop."""
    path = Path(tempfile.mkdtemp(prefix="openchat-tests-", dir=scratch()))
    folder = DataFolder(path)
    postgres, valkey = Postgres(folder, max_connections=50), Valkey(folder)
    try:
        await asyncio.to_thread(postgres.start)
        await asyncio.to_thread(valkey.start)
        await make_template(postgres.url("postgres"), postgres.url(TEMPLATE))
        ours = msgspec.structs.replace(
            settings,
            database_url=postgres.url(TEMPLATE),
            redis_url=valkey.url,
            ephemeral_rate=1e6,
        )
        yield ours, Servers(postgres, valkey)
    finally:
        valkey.stop()
        postgres.stop()
        folder.release()
        shutil.rmtree(path)


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers on one database, without users."""
    async with World(settings) as world:
        yield world


@pytest.fixture
async def cluster(settings: Settings, tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(settings, tmp_path, 2)
    try:
        await cluster.start(*cluster.workers)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
async def room(world: World) -> Room:
    users = await world.users("Ada", "Charles")
    ada, charles = await world.connect(users[0]), await world.connect(users[1], 1)
    group = await world.group(ada, users[1])
    await charles.event(server.ConversationJoined)
    return Room(group, ada, charles, users)


@pytest.fixture
async def reader(world: World) -> AsyncIterator[Reader]:
    name = f"reader_{uuid7().hex}"
    await world.db.execute(f"CREATE ROLE {name} LOGIN")
    await world.db.execute("SELECT grant_reader($1)", name)
    db = await asyncpg.connect(world.settings.database_url)
    await db.execute(f"SET ROLE {name}")
    yield Reader(name, db)
    await db.close()
    await world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


class Lines:
    """The log of this process, configured as in the server."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        log.configure("worker 1")
        (handler,) = logging.getLogger().handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(self._stream)
        (self.bound,) = handler.filters

    @property
    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture
def lines() -> Lines:
    return Lines()
