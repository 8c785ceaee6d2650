"""One PostgreSQL and one Valkey for the run; a database, and workers, for each test."""

import asyncio
import functools
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
import redis.utils
import uvloop
from redis.asyncio import Redis

from protocol import server as said
from protocol.ids import uuid7
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
ROOM = 2 * 1024**3

# The library reads its own version from the disk for each connection (4 ms), and each test makes a dozen.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)


introspect = asyncpg.Connection._introspect_types  # type: ignore[attr-defined]  # noqa: SLF001 - has no public name
known_types: dict[frozenset[int], Any] = {}


async def introspect_once(connection: asyncpg.Connection, oids: Iterable[int], timeout: float | None) -> Any:  # noqa: ASYNC109 - as the library calls it
    """Ask PostgreSQL about a type once per process, not once per connection: the question costs it 20 ms.

    The schema has no types of its own, and those of PostgreSQL have the same numbers in every database.
    """
    asked = frozenset(oids)
    if asked not in known_types:
        known_types[asked] = await introspect(connection, asked, timeout)
    return known_types[asked]


asyncpg.Connection._introspect_types = introspect_once  # type: ignore[attr-defined]  # noqa: SLF001


class Servers(NamedTuple):
    """The real thing, twice."""

    postgres: Postgres
    valkey: Valkey


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that workers run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Let the log that a test configures end with it: later lines would go to a stream that is closed."""
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
    """Fail if a test left a socket open: the only warning that cannot be an error where it is found."""
    if unclosed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    path = Path(tempfile.mkdtemp(prefix="openchat-tests-", dir=scratch()))
    folder = DataFolder(path)
    # Nobody cuts the power of this one; the tests of faults have their own.
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
    """Return a folder in memory, if there is one with room: copying a database there takes 10 ms, not 300."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of our own in it
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOM else None


async def make_template(administration: str, template: str) -> None:
    connection = await asyncpg.connect(administration)
    await connection.execute(f"CREATE DATABASE {TEMPLATE}")
    await connection.close()
    await migrate.migrate(template)


@pytest.fixture(autouse=True)
def nothing_is_shed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine refuses no test's frames; tests/test_overload.py is about what is refused when."""
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
    # Tests write faster than people do; the limits are tested with the frames that are `ephemeral`. People in them are
    # mere strangers who add each other; tests/test_adding.py is about the default.
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
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers on one database, with users to be made."""
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
    them = await world.users("Ada", "Charles")
    ada, charles = await world.connect(them[0]), await world.connect(them[1], 1)
    group = await world.group(ada, them[1])
    await charles.event(said.ConversationJoined)
    return Room(group, ada, charles, them)


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
