"""No event is lost when Valkey stops or hangs, PostgreSQL restarts or hangs, or a client stops reading."""

import asyncio
import gc
import os
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, MessageId
from protocol.limits import MAX_FRAME_BYTES
from protocol.server import Error
from protocol.values import ConversationSettings
from prove.client import TIMEOUT_SECONDS, Client
from prove.mirror import Mirror
from prove.truth import assert_same, read_conversation
from server.core.config import Settings
from server.db import database, hosts
from server.domain import presence
from server.gateway.connection import Connection
from tests.conftest import Lines, Servers
from tests.test_batches import counted
from tests.world import UserSession, World, http_client, message, new_messages, received_message, sent, until

MEMBERS = 100
OUTBOX_BYTES = 256 * 1024


class Talk:
    """Two users on two workers who send until `end`, each with a mirror of the received events."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.people: list[UserSession] = []
        self.clients: list[Client] = []
        self.mirrors = [Mirror(), Mirror()]
        self.channel: ConversationId
        self.acknowledged: list[MessageId] = []
        self.refusals: list[Refused] = []
        self._is_over = False
        self._talking: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        self.people = await self.world.users("Ada", "Charles")
        for number, (who, mirror) in enumerate(zip(self.people, self.mirrors, strict=True)):
            one = await self.world.connect(who, number)
            for event in one.events:
                mirror.receive(event)
            one.on_event = mirror.receive
            self.clients.append(one)
        quiet = ConversationSettings(system_messages=False)
        self.channel = await self.world.channel(self.clients[0], is_public=True, settings=quiet)
        await self.clients[1].call(client.Join(conversation_id=self.channel))
        for mirror in self.mirrors:
            mirror.unloaded.clear()
        self._talking = [asyncio.create_task(self._talk(one)) for one in self.clients]

    async def end(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._talking)

    async def _talk(self, one: Client) -> None:
        while not self._is_over:
            frame = message(self.channel, "Still there")
            await self._call_until_accepted(one, frame)
            self.acknowledged.append(frame.message_id)
            await asyncio.sleep(0.01)

    async def _call_until_accepted(self, one: Client, frame: Frame) -> None:
        while True:
            try:
                await one.call(frame)
            except Refused as refused:
                assert refused.code is ErrorCode.UNAVAILABLE, refused
                assert refused.retry_after_ms is not None
                self.refusals.append(refused)
                await asyncio.sleep(refused.retry_after_ms / 1000)
                continue
            return

    async def assert_nothing_lost(self) -> None:
        """Assert that each user received each version once and in order, which the mirror checks, up to the last."""
        async with asyncio.timeout(10):
            truth = await read_conversation(self.world.db, self.channel)
            for one, mirror in zip(self.clients, self.mirrors, strict=True):
                while mirror.copies[self.channel].version < truth.version:
                    await one.synced()
                mirror.copies[self.channel].participants = truth.participants
                assert_same(mirror.copies[self.channel], truth)
        assert sorted(self.acknowledged) == sorted(truth.messages)


async def readiness(world: World, wanted: int) -> None:
    async with http_client() as http, asyncio.timeout(15):
        for worker in world.workers:
            while (await http.get(f"{worker.url}/readyz")).status_code != wanted:
                await asyncio.sleep(0.05)


@pytest.mark.long
async def test_valkey_stopped_for_ten_seconds_loses_no_event(own: tuple[Settings, Servers]) -> None:
    settings, servers = own
    async with World(settings) as world:
        talk = Talk(world)
        await talk.begin()
        servers.valkey.stop()
        await readiness(world, 503)
        stopped_at = time.monotonic()
        slowest = 0.0
        while time.monotonic() < stopped_at + 10:
            began = time.monotonic()
            message_id = await sent(talk.clients[0], talk.channel, "Over PostgreSQL")
            talk.acknowledged.append(message_id)
            received = talk.mirrors[1].copies[talk.channel].messages
            await until(lambda: message_id in received)  # noqa: B023 - awaited in this turn
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 2.0
        await asyncio.to_thread(servers.valkey.start)
        await readiness(world, 200)
        await talk.end()
        assert talk.refusals == []
        await talk.assert_nothing_lost()


CLOSED = 'SELECT last_close FROM "user" WHERE id = $1 AND NOT is_online'


async def test_hanging_valkey_loses_no_event(own: tuple[Settings, Servers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.0)
    settings, servers = own
    async with World(settings) as world:
        talk = Talk(world)
        await talk.begin()
        slow = await world.user("Slow")
        await world.connect(slow)
        here = world.workers[0].app
        await until(lambda: not here.presence._dirty)  # noqa: SLF001
        os.kill(servers.valkey.pid, signal.SIGSTOP)
        try:
            await readiness(world, 503)
            message_id = await sent(talk.clients[0], talk.channel, "Over PostgreSQL")
            talk.acknowledged.append(message_id)
            await until(lambda: message_id in talk.mirrors[1].copies[talk.channel].messages, seconds=2)
            for socket_of_slow in here.hub.online_users.sockets(slow.id):
                socket_of_slow.close(CloseCode.SLOW)
            await until(lambda: slow.id in here.presence._unsaved)  # noqa: SLF001
        finally:
            os.kill(servers.valkey.pid, signal.SIGCONT)
        await readiness(world, 200)
        async with asyncio.timeout(5):
            while await world.db.fetchval(CLOSED, slow.id) != CloseCode.SLOW:
                await asyncio.sleep(0.01)
        await until(lambda: not here.presence._left_at)  # noqa: SLF001
        await talk.end()
        await talk.assert_nothing_lost()


def assert_outage_is_logged_briefly(text: str, *, workers: int) -> None:
    """Assert that each worker logs one line for the outage and one for its end, whatever failed meanwhile."""
    told = [line for line in text.splitlines() if "HTTP Request" not in line]
    lost = [line for line in told if "failed, database lost (" in line]
    assert 1 <= len(lost) <= workers, text
    assert [line.split(" INFO ")[-1] for line in told if line not in lost] == [
        "PostgreSQL can be reached again"
    ] * workers


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_restart_of_postgres_loses_no_message(
    own: tuple[Settings, Servers], how: signal.Signals, lines: Lines
) -> None:
    settings, servers = own
    async with World(settings) as world:
        talk = Talk(world)
        await talk.begin()
        await until(lambda: len(talk.acknowledged) > 50)
        os.kill(servers.postgres.pid, how)
        await until(lambda: len(talk.refusals) > 0)
        async with http_client() as http:
            assert (await http.get(f"{world.url}/healthz")).status_code == 200
        await readiness(world, 503)
        await until(lambda: not servers.postgres.is_running())
        await asyncio.to_thread(servers.postgres.start)
        await readiness(world, 200)
        before = len(talk.acknowledged)
        await until(lambda: len(talk.acknowledged) > before + 50)
        await talk.end()
        world.db = await asyncpg.connect(settings.database_url)
        await talk.assert_nothing_lost()
        gc.collect()  # an unhandled exception of a task is reported when the task is deleted
        assert_outage_is_logged_briefly(lines.text, workers=len(world.workers))
    # A start with recovery opens no connection before PostgreSQL is ready, since each would log an error.
    log = servers.postgres.log.path
    size = log.stat().st_size
    os.kill(servers.postgres.pid, how)
    await until(lambda: not servers.postgres.is_running())
    await asyncio.to_thread(servers.postgres.start)
    with log.open("rb") as file:
        file.seek(size)
        assert [line for line in file if b"FATAL" in line and b"is starting up" in line] == []


SENDERS = 64
MAX_RUNS = 4
"""Max statements for the messages of these senders: one for the first message, others for those that arrive later."""


@pytest.mark.long
async def test_hanging_postgres_fails_waiting_sends_together(
    own: tuple[Settings, Servers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections stay open. Waiting messages are tried once in shared statements, not one by one."""
    settings, servers = own
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 1.0)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(hosts, "CONNECT_SECONDS", 1.0)
    async with World(msgspec.structs.replace(settings, connections_per_address=200), workers=1) as world:
        people = await world.users(*(f"P{number}" for number in range(SENDERS)))
        senders = [await world.connect(one) for one in people]
        about = await world.channel(senders[0], is_public=True)
        for sender in senders[1:]:
            await sender.call(client.Join(conversation_id=about))
        await asyncio.gather(*(sent(sender, about) for sender in senders))
        runs: list[int] = []
        sends: Any = world.workers[0].app._sends  # noqa: SLF001 - statements are only visible in private attributes
        for batcher in (sends._common, sends.lanes._light, sends.lanes._heavy):  # noqa: SLF001
            batcher._work = counted(batcher._work, runs)  # noqa: SLF001
        frames = [message(about, "Frozen") for _ in senders]
        pids = [servers.postgres.pid, *(row[0] for row in await world.db.fetch("SELECT pid FROM pg_stat_activity"))]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            answers = await asyncio.gather(*(one.ask(frame) for one, frame in zip(senders, frames, strict=True)))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert [getattr(answer, "code", None) for answer in answers] == [ErrorCode.UNAVAILABLE] * SENDERS
        assert (sum(runs), len(runs) <= MAX_RUNS) == (SENDERS, True), runs
        # Messages in flight may have been stored. After all retries, each is stored and delivered once.
        async with asyncio.timeout(TIMEOUT_SECONDS):
            for sender, frame in zip(senders, frames, strict=True):
                while isinstance(answer := await sender.ask(frame), Error):
                    assert answer.code is ErrorCode.UNAVAILABLE
                    await asyncio.sleep((answer.retry_after_ms or 0) / 1_000)
        world.workers[0].app.hub.comparisons.soon()
        last = await sent(senders[0], about, "Last")
        for sender in senders[:2]:
            await received_message(sender, last)  # in an event of its own, or in one of the comparison
            received = [one.id for one in new_messages(sender) if one.content == "Frozen"]
            assert sorted(received) == sorted(frame.message_id for frame in frames)


async def test_connection_during_a_database_outage_gets_503(
    own: tuple[Settings, Servers],
) -> None:
    settings, servers = own
    async with World(settings, workers=1) as world:
        who = await world.user("Ada")
        servers.postgres.stop()
        with pytest.raises(Exception, match="503"):
            await Client(world.url, who.token).open()
        await asyncio.to_thread(servers.postgres.start)
        await readiness(world, 200)
        world.db = await asyncpg.connect(settings.database_url)
        async with Client(world.url, who.token) as one:
            await one.settled()


@pytest.mark.long
async def test_client_that_repeats_many_frames_after_retry_after_ms_is_not_closed(
    own: tuple[Settings, Servers],
) -> None:
    """PostgreSQL is stopped, and each frame is repeated after its `retry_after_ms`."""
    settings, servers = own
    settings = msgspec.structs.replace(settings, write_rate=100.0, frame_rate=200.0)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        channel = await world.channel(ada)
        codes: Counter[ErrorCode] = Counter()

        async def deliver() -> MessageId:
            frame = message(channel)
            while isinstance(answer := await ada.ask(frame), server.Error):
                codes[answer.code] += 1
                assert answer.retry_after_ms is not None
                await asyncio.sleep(answer.retry_after_ms / 1000)
            return frame.message_id

        servers.postgres.stop()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            delivering = [group.create_task(deliver()) for _ in range(400)]
            await asyncio.sleep(4)  # length of the outage
            await asyncio.to_thread(servers.postgres.start)
        delivered = {task.result() for task in delivering}
        assert codes[ErrorCode.UNAVAILABLE] > 400
        world.db = await asyncpg.connect(settings.database_url)
        stored = await world.db.fetch("SELECT id FROM message WHERE conversation_id = $1", channel)
        assert len(delivered) == 400
        assert {row["id"] for row in stored} >= delivered
        await ada.call(client.GetMe())


@pytest.fixture
async def narrow(settings: Settings) -> AsyncIterator[World]:
    """A worker with a small outbox per connection."""
    settings = msgspec.structs.replace(settings, outbox_bytes=OUTBOX_BYTES)
    async with World(settings, workers=1) as world:
        yield world


async def test_slow_reader_is_closed_and_others_are_unaffected(narrow: World) -> None:
    world = narrow
    owner = await world.connect(await world.user("Ada"))
    channel = await world.channel(owner, is_public=True)
    readers = []
    for number in range(MEMBERS - 1):
        one = await world.connect(await world.user(f"Reader{number}"))
        await one.call(client.Join(conversation_id=channel))
        readers.append(one)
    owner.on_event = lambda _: None

    async def seconds(meanwhile: Callable[[], Awaitable[object]] | None) -> float:
        """Send messages, and return the lower quartile of the time until all readers have a message.

        Other programs delay some messages, while waiting for a slow reader would delay all.
        """
        spans = []
        for number in range(60):
            if number == 10 and meanwhile is not None:
                await meanwhile()
            content = f"{number} " + "x" * 9_900
            began = time.perf_counter()
            message_id = await sent(owner, channel, content)
            for one in readers:
                start = max(0, len(one.events) - 3)
                await one.event(server.MessageSent, lambda event: event.message.id == message_id, start=start)  # noqa: B023
            spans.append(time.perf_counter() - began)
        return statistics.quantiles(spans, n=4)[0]

    without = await seconds(None)
    # With default buffers, the client's kernel would receive megabytes.
    with socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        small.connect(("127.0.0.1", int(world.url.rpartition(":")[2])))
        slow = await world.connect(await world.user("Slow"), sock=small.dup())
    await slow.call(client.Join(conversation_id=channel))

    (held,) = world.workers[0].app.hub.online_users.sockets(slow.ready.user.id)
    assert isinstance(held, Connection)

    async def stall() -> None:
        slow.socket.transport.pause_reading()

    # The slow client reads nothing until the others have all messages, so waiting for it would never end.
    with_one = await seconds(stall)
    assert world.workers[0].app.sockets.closed == {str(int(CloseCode.SLOW)): 1}
    assert held.socket.transport.get_write_buffer_size() < OUTBOX_BYTES + MAX_FRAME_BYTES
    slow.socket.transport.resume_reading()
    assert await slow.closed() == CloseCode.SLOW
    # Measure without a slow reader before and after, since other programs use the machine.
    without = max(without, await seconds(None))
    assert with_one < 2 * without, (with_one, without)
    await readers[0].synced()
