"""Faults of PostgreSQL, which are lost, busy or full: each has its refusal, its line in the log and its metric."""

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Never

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId
from protocol.server import Error
from prove.client import Client
from server.app import app, background
from server.core.config import Settings
from server.core.faults import REFUSALS, Away, Exhausted, Fault, fault_of, log_fault
from server.db import database, readiness
from server.db.pool import Lease
from tests.conftest import TEMPLATE, Lines, Servers
from tests.test_may_send import let_all_wait
from tests.world import Room, World, http_client, message, sent, until

KINDS = (
    (asyncpg.ConnectionDoesNotExistError("closed"), Fault.LOST),
    (asyncpg.AdminShutdownError("terminating connection"), Fault.LOST),
    (asyncpg.CannotConnectNowError("starting up"), Fault.LOST),
    (asyncpg.StatementCompletionUnknownError("unknown"), Fault.LOST),
    (asyncpg.InterfaceError("the pool is closed"), Fault.LOST),
    (asyncpg.InternalClientError("got an unexpected message"), Fault.LOST),
    (ConnectionResetError(104, "Connection reset by peer"), Fault.LOST),
    (TimeoutError(), Fault.LOST),
    (Away("starting up"), Fault.LOST),
    (Away("too many clients", Fault.BUSY), Fault.BUSY),
    (asyncpg.DeadlockDetectedError("deadlock detected"), Fault.BUSY),
    (asyncpg.SerializationError("could not serialize access"), Fault.BUSY),
    (asyncpg.QueryCanceledError("statement timeout"), Fault.BUSY),
    (asyncpg.LockNotAvailableError("lock timeout"), Fault.BUSY),
    (asyncpg.TooManyConnectionsError("too many clients"), Fault.BUSY),
    (asyncpg.ConfigurationLimitExceededError("temp_file_limit"), Fault.BUSY),
    (Exhausted("no connection became free in time"), Fault.BUSY),
    (RuntimeError("can't start new thread"), Fault.BUSY),
    (asyncpg.DiskFullError("could not extend file"), Fault.FULL),
    (asyncpg.OutOfMemoryError("out of memory"), Fault.FULL),
    (asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT"), Fault.FULL),
    (asyncpg.PostgresIOError("could not write"), Fault.FULL),
    (asyncpg.UndefinedColumnError("column x does not exist"), None),
    (asyncpg.InterfaceError("the server expects 1 argument for this query, 2 were passed"), None),
    (OSError(28, "No space left on device"), None),
    (ValueError("of ours"), None),
)


@pytest.mark.parametrize(("error", "kind"), KINDS)
def test_each_error_has_one_kind(error: Exception, kind: Fault | None) -> None:
    assert fault_of(error) is kind


def test_time_out_is_logged_as_a_sentence(lines: Lines) -> None:
    log_fault(logging.getLogger("test"), "/readyz", TimeoutError())
    assert told(lines, "/readyz") == ["WARNING /readyz failed, database lost (TimeoutError): it did not answer in time"]


async def refusal(one: Client, frame: client.Frame, kind: Fault) -> None:
    """Send a frame, and assert that the fault refuses it."""
    answer = await one.ask(frame)
    assert isinstance(answer, Error), answer
    words, retry_after_ms = REFUSALS[kind]
    assert (answer.code, answer.message) == (ErrorCode.UNAVAILABLE, words)
    assert answer.retry_after_ms is not None
    assert answer.retry_after_ms >= retry_after_ms


def renamed(group: ConversationId) -> client.UpdateConversation:
    return client.UpdateConversation(conversation_id=group, title="New")


def counted(world: World, kind: Fault) -> int:
    """Return the count of a kind, of all workers."""
    return sum(worker.app.metrics.faults[kind] for worker in world.workers)


def told(lines: Lines, what: str) -> list[str]:
    """Return what the log says about a frame, a job or a state, without the times."""
    return [line.split(" worker 1 ")[1] for line in lines.text.splitlines() if what in line]


RAISE = """
CREATE OR REPLACE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'could not extend file "base/5/2619"' USING ERRCODE = '53100', DETAIL = NEW::text;
END $$;
CREATE TRIGGER fault BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION fault()
"""


async def test_full_disk_is_refused_as_full_and_logged_once_per_frame_type(
    room: Room, world: World, lines: Lines
) -> None:
    await world.db.execute(RAISE.format(table="message"))
    for _ in range(5):
        await refusal(room.ada, message(room.group, "Is there room?"), Fault.FULL)
    said = await world.db.fetchval("SELECT count(*) FROM message")
    assert said == 0
    assert told(lines, "database full") == [
        'ERROR send failed, database full (53100): could not extend file "base/5/2619"'
    ]
    assert "room?" not in lines.text
    assert "Traceback" not in lines.text
    assert counted(world, Fault.FULL) == 5
    async with http_client(world.url) as http:
        page = (await http.get("/metrics")).text
    assert 'openchat_database_faults_total{kind="full",worker="1"} 5.0' in page
    await world.db.execute("DROP TRIGGER fault ON message")
    await sent(room.ada, room.group)


SET = "ALTER DATABASE {name} SET {setting}"
END_OTHERS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND starts_with(application_name, 'openchat')
"""


async def configure(world: World, setting: str) -> None:
    """Change a setting of all new sessions, and end the others."""
    name = await world.db.fetchval("SELECT current_database()")
    await world.db.execute(SET.format(name=name, setting=setting))
    await world.db.fetch(END_OTHERS)


async def test_read_only_database_is_refused_as_full_and_can_be_read(room: Room, world: World, lines: Lines) -> None:
    message_id = await sent(room.ada, room.group, "Before")
    await configure(world, "default_transaction_read_only = on")
    async with asyncio.timeout(10):
        while not told(lines, "send failed, database full (25006)"):
            if isinstance(await room.ada.ask(message(room.group)), server.Reply):
                await world.db.fetch(END_OTHERS)  # a session that began before the change was not listed yet
    await refusal(room.ada, client.Pin(**room.at(message_id)), Fault.FULL)
    assert isinstance(await room.charles.ask(client.History(conversation_id=room.group)), server.Reply)
    await configure(world, "default_transaction_read_only = off")
    async with asyncio.timeout(10):
        while isinstance(await room.ada.ask(message(room.group)), Error):
            await asyncio.sleep(0.01)
    assert len(told(lines, "send failed, database full")) == 1
    assert len(told(lines, "pin failed, database full (25006)")) == 1


async def test_terminated_connections_are_one_state_that_is_logged_once(room: Room, world: World, lines: Lines) -> None:
    """The connections wait for a lock, so that the statements of two frame types are interrupted."""
    async with holding(world, room.group):
        asked = [
            asyncio.create_task(one.ask(frame))
            for one, frame in (
                (room.ada, renamed(room.group)),
                (room.charles, client.Leave(conversation_id=room.group)),
            )
        ]
        await waiting(world, 2)
        await world.db.fetch(END_WAITING)
        for answer in await asyncio.gather(*asked):
            assert isinstance(answer, Error)
            assert (answer.code, answer.message) == (ErrorCode.UNAVAILABLE, REFUSALS[Fault.LOST][0])
    assert len(told(lines, "failed, database lost (")) == 1
    assert counted(world, Fault.LOST) >= 2


WAITING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
END_WAITING = f"SELECT pg_terminate_backend(pid, 5000) FROM ({WAITING}) waiting"
HOLD = "SELECT FROM conversation WHERE id = $1 FOR UPDATE"


@asynccontextmanager
async def holding(world: World, conversation_id: ConversationId) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Hold the lock of a conversation."""
    holder = await asyncpg.connect(world.settings.database_url)
    try:
        async with holder.transaction():
            await holder.execute(HOLD, conversation_id)
            yield holder
    finally:
        await holder.close()


async def waiting(world: World, count: int) -> None:
    """Return when as many statements wait for a lock."""
    async with asyncio.timeout(10):
        while len(await world.db.fetch(WAITING)) < count:
            await asyncio.sleep(0.01)


SLOW = """
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$;
CREATE TRIGGER slow AFTER UPDATE ON conversation FOR EACH ROW EXECUTE FUNCTION be_slow()
"""


async def test_frame_that_needs_a_locked_row_for_too_long_is_refused_as_busy(
    settings: Settings, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "ATTEMPTS_SECONDS", 0.3)
    async with World(settings) as world:
        ada = await world.connect(await world.user("Ada"))
        group = await world.channel(ada)
        async with holding(world, group):
            await refusal(ada, renamed(group), Fault.BUSY)
            await refusal(ada, message(group), Fault.BUSY)
        assert told(lines, "database busy") == [
            "WARNING update_conversation failed, database busy (55P03): canceling statement due to lock timeout",
            f"WARNING send failed, database busy (55P03): {group} is locked",
        ]
        assert counted(world, Fault.BUSY) == 2, "each frame, and not each attempt"
        await ada.call(renamed(group))


async def test_statement_timeout_is_refused_as_busy(
    settings: Settings, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(database.SESSION, "statement_timeout", "200ms")
    async with World(settings) as world:
        ada = await world.connect(await world.user("Ada"))
        group = await world.channel(ada)
        await world.db.execute(SLOW)
        await refusal(ada, renamed(group), Fault.BUSY)
        await world.db.execute("DROP FUNCTION be_slow() CASCADE")
        assert told(lines, "database busy") == [
            "WARNING update_conversation failed, database busy (57014): canceling statement due to statement timeout"
        ]
        assert counted(world, Fault.BUSY) == 1
        await ada.call(renamed(group))


async def test_exhausted_pool_is_refused_as_busy(
    settings: Settings, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CONNECT_SECONDS", 0.3)
    async with World(msgspec.structs.replace(settings, database_connections=2), workers=1) as world:
        hers = await world.connect(await world.user("Mary"))
        pool = world.workers[0].app._database._state.pool  # noqa: SLF001 - frames that wait for locks leave connections
        taken = [await pool.take() for _ in range(2)]
        await refusal(hers, client.ListRelationships(), Fault.BUSY)
        for connection in taken:
            pool.give(connection, is_usable=True)
        assert told(lines, "list_relationships") == [
            "WARNING list_relationships failed, database busy (Exhausted): no connection became free in time"
        ]
        assert isinstance(await hers.ask(client.ListRelationships()), server.Reply)


MANY = 20
"""More attempts to connect than three frames and the jobs of a worker make in a moment."""


async def test_frames_wait_for_connections_of_the_pool_if_postgresql_has_no_more(settings: Settings) -> None:
    attempts = []

    async def refuse() -> Never:
        attempts.append("refused")
        raise Away("too many clients", Fault.BUSY)

    async with World(settings, workers=1) as world:
        clients = [await world.connect(one) for one in await world.users("Ada", "Mary", "Charles")]
        pool = world.workers[0].app._database._state.pool  # noqa: SLF001 - PostgreSQL has more connections than this
        connection, *others = [await pool.take() for _ in range(len(pool))]
        pool._connect = refuse  # noqa: SLF001 - as above
        pool._most = len(pool) + len(clients)  # noqa: SLF001 - jobs may have opened all that it had
        asked = [asyncio.create_task(one.ask(client.ListRelationships())) for one in clients]
        await until(lambda: any(one.done() for one in asked) or len(attempts) >= len(clients))
        for one in (connection, *others):
            pool.give(one, is_usable=True)
        assert {type(one) for one in await asyncio.gather(*asked)} == {server.Reply}
        assert len(attempts) < MANY, "waiting frames do not pass on the right to try"


TIMEOUT = "SELECT extract(epoch FROM current_setting('statement_timeout')::interval)"


async def test_postgresql_cancels_a_statement_before_it_counts_as_lost(world: World) -> None:
    one = world.workers[0].app._database  # noqa: SLF001 - a slow statement would take ten seconds
    for lease in (one.connection(), one.sending(), Lease(one._state.ready, one._state.count)):  # noqa: SLF001 - as above
        async with lease as db:
            assert await db.fetchval(TIMEOUT) <= database.STATEMENT_SECONDS - 1


LOCK_LAST = """
CREATE FUNCTION lock_last() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock(1); RETURN NEW;
END $$;
CREATE TRIGGER lock_last AFTER UPDATE ON conversation FOR EACH ROW EXECUTE FUNCTION lock_last()
"""
PATIENT = "SET deadlock_timeout = '10s'"


async def test_second_deadlock_of_a_frame_is_refused_as_busy(settings: Settings, lines: Lines) -> None:
    async with World(settings) as world:
        ada = await world.connect(await world.user("Ada"))
        group = await world.channel(ada)
        let_all_wait(world)
        await configure(world, "deadlock_timeout = '200ms'")
        await world.db.execute(LOCK_LAST)
        holder = await asyncpg.connect(world.settings.database_url)
        await holder.execute(PATIENT)
        async with holder.transaction():
            await holder.execute("SELECT pg_advisory_xact_lock(1)")
            asked = asyncio.create_task(refusal(ada, renamed(group), Fault.BUSY))
            for _ in range(2):
                await waiting(world, 1)
                # The frame holds the conversation and waits for the holder. PostgreSQL aborts the frame.
                inner = holder.transaction()
                await inner.start()
                await holder.execute(HOLD, group)
                await inner.rollback()
            await asked
        await holder.close()
        assert told(lines, "update_conversation failed, database busy") == [
            "WARNING update_conversation failed, database busy (40P01): deadlock detected"
        ]
        assert len(told(lines, "rolled back by PostgreSQL and is retried once")) == 1
        await ada.call(renamed(group))


async def is_ready(world: World) -> bool:
    """Return the check of the database that `/readyz` reports. Its two results must agree."""
    async with http_client(world.url) as http:
        response = await http.get("/readyz")
    assert response.status_code == (200 if response.json()["database"] else 503)
    return bool(response.json()["database"])


async def becomes(world: World, *, ready: bool) -> None:
    async with asyncio.timeout(10):
        while await is_ready(world) is not ready:
            await asyncio.sleep(0.01)


@pytest.fixture
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the database for each `/readyz`, and only then."""
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(database, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(background, "WRITE_SECONDS", 36_000.0)


@pytest.mark.usefixtures("frequent_checks")
async def test_end_of_a_full_disk_is_logged_once_and_the_next_one_is_a_new_state(
    room: Room, world: World, lines: Lines
) -> None:
    """The job asks, because there may be no probes of `/readyz`."""
    (job,) = (one.run for one in world.workers[0].app.background.jobs if one.run.__name__ == "check_storage")
    for _ in range(2):
        await world.db.execute(RAISE.format(table="server_key"))
        await world.db.execute(RAISE.format(table="message"))
        for _ in range(3):
            await refusal(room.ada, message(room.group), Fault.FULL)
        with pytest.raises(asyncpg.DiskFullError):
            await job()
        await world.db.execute("DROP TRIGGER fault ON message; DROP TRIGGER fault ON server_key")
        for _ in range(3):
            await job()
        await sent(room.ada, room.group)
    ended = "INFO PostgreSQL can store again"
    failed = 'ERROR send failed, database full (53100): could not extend file "base/5/2619"'
    assert told(lines, "") == [failed, ended, failed, ended]


@pytest.mark.usefixtures("frequent_checks")
async def test_worker_is_not_ready_until_it_can_write_again(room: Room, world: World) -> None:
    await world.db.execute(RAISE.format(table="server_key"))
    assert await is_ready(world), "nothing was written"
    await world.db.execute(RAISE.format(table="message"))
    await refusal(room.ada, message(room.group), Fault.FULL)
    assert not await is_ready(world)
    assert not await is_ready(world)
    await world.db.execute("DROP TRIGGER fault ON message; DROP TRIGGER fault ON server_key")
    assert await is_ready(world)
    await sent(room.ada, room.group)


@pytest.mark.usefixtures("frequent_checks")
async def test_single_failure_to_store_leaves_a_worker_ready(room: Room, world: World) -> None:
    await world.db.execute(RAISE.format(table="message"))
    await refusal(room.ada, message(room.group), Fault.FULL)
    await world.db.execute("DROP TRIGGER fault ON message")
    assert await is_ready(world)
    assert await world.db.fetchval("SELECT count(*) FROM server_key WHERE name = 'nothing'") == 0


async def test_repeated_failures_of_some_frames_leave_a_worker_ready(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 0.0)
    await world.db.execute(RAISE.format(table="message"))
    for _ in range(3):
        await refusal(room.ada, message(room.group), Fault.FULL)
        assert await is_ready(world)


@pytest.mark.usefixtures("frequent_checks")
async def test_worker_is_not_ready_while_the_database_is_read_only(world: World) -> None:
    assert await is_ready(world)
    await configure(world, "default_transaction_read_only = on")
    await becomes(world, ready=False)
    assert not await is_ready(world), "it is not only the end of the connection"
    await configure(world, "default_transaction_read_only = off")
    await becomes(world, ready=True)


@pytest.mark.usefixtures("frequent_checks")
async def test_worker_whose_connections_all_wait_for_locks_is_ready(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, database_connections=2), workers=1) as world:
        ada, charles = await world.users("Ada", "Charles")
        owner, member = await world.connect(ada), await world.connect(charles)
        group = await world.group(owner, charles)
        async with holding(world, group):
            asked = [
                asyncio.create_task(owner.ask(renamed(group))),
                asyncio.create_task(member.ask(client.Leave(conversation_id=group))),
            ]
            await waiting(world, 2)
            assert await is_ready(world)
        assert {type(one) for one in await asyncio.gather(*asked)} == {server.Reply}


@pytest.mark.more
@pytest.mark.usefixtures("frequent_checks")
async def test_full_disk_makes_a_worker_unready_until_there_is_room(own: tuple[Settings, Servers]) -> None:
    """The tables are on a file system of 64 MB, which another file fills. It needs the right to mount one."""
    settings, servers = own
    with small_disk(servers.postgres.log.path) as disk:
        other = await asyncpg.connect(servers.postgres.url("postgres"))
        await other.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
        await other.execute(f"ALTER DATABASE {TEMPLATE} SET TABLESPACE small")
        async with World(settings) as world:
            ada = await world.connect(await world.user("Ada"))
            channel = await world.channel(ada)
            filled = disk / "filled"
            with filled.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            frame = message(channel, "x" * 10_000)
            while not isinstance(await ada.ask(frame), Error):
                frame = message(channel, "x" * 10_000)
            await refusal(ada, frame, Fault.FULL)
            assert not await is_ready(world)
            filled.unlink()
            assert await is_ready(world)
            await ada.call(frame)
        await other.execute(f"ALTER DATABASE {TEMPLATE} SET TABLESPACE pg_default")
        await other.execute("DROP TABLESPACE small")
        await other.close()


@contextlib.contextmanager
def small_disk(beside: Path) -> Iterator[Path]:
    """Mount a file system of 64 MB with the owner of a file and beside it, or skip the test."""
    disk, owner = beside.with_name("small"), beside.stat()
    disk.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", f"size=64m,mode=700,uid={owner.st_uid}", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(disk)], check=True)
