"""Events that a worker committed and did not publish: after its end, during its outage, or with an unknown outcome."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, uuid7
from prove.client import Client
from prove.cluster import OwnCluster
from server.core.config import Settings
from server.hub import comparisons, redis_bus
from server.hub.hub import Hub
from server.hub.redis_bus import RedisBus
from server.queries import sending
from server.queries.sending import Outgoing
from tests.world import Worker, World, message, received_message, sent, session_of, until, without_bus

BEAT = 0.1


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make heartbeats ten times as fast. The periodic comparison finds nothing during a test."""
    monkeypatch.setattr(comparisons, "HEARTBEAT_SECONDS", BEAT)
    monkeypatch.setattr(comparisons, "MAX_JITTER_SECONDS", 0.0)
    monkeypatch.setattr(comparisons, "CONNECTED_SECONDS", 3_600.0)
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 3_600.0)
    monkeypatch.setattr(comparisons, "COMPARE_USERS_SECONDS", 3_600.0)


class Pair:
    """Ada at one worker, with another device and Charles at the other one, in a group."""

    def __init__(self, world: World, ada: Client, device: Client, charles: Client, group: ConversationId) -> None:
        self.world = world
        self.ada = ada
        self.device = device
        self.charles = charles
        self.group = group
        self.hubs = [worker.app.hub for worker in world.workers]

    async def arrives_by_comparison(self) -> bool:
        """Send a message, and wait until Charles has it. Return whether his worker read it from PostgreSQL."""
        before = self.hubs[1].topics.fetched
        await received_message(self.charles, await sent(self.ada, self.group))
        return self.hubs[1].topics.fetched > before


@asynccontextmanager
async def paired(world: World) -> AsyncIterator[Pair]:
    one, other = await world.users("Ada", "Charles")
    ada, device, charles = [await world.connect(who, number) for who, number in ((one, 0), (one, 1), (other, 1))]
    group = await world.group(ada, other)
    await charles.event(server.ConversationJoined)
    await device.event(server.ConversationJoined)
    pair = Pair(world, ada, device, charles, group)
    await until(lambda: all(len(one.comparisons._peers) == 1 for one in pair.hubs))  # noqa: SLF001
    await until(lambda: not any(one.comparisons._topic_rounds._is_fast() for one in pair.hubs))  # noqa: SLF001
    yield pair


@pytest.fixture
async def pair(world: World) -> AsyncIterator[Pair]:
    async with paired(world) as pair:
        yield pair


def mute(monkeypatch: pytest.MonkeyPatch, worker: Hub) -> None:
    """Make a worker publish nothing, as if it were killed."""
    monkeypatch.setattr(worker.bus, "publish", lambda *_: None)


async def test_changes_of_a_worker_that_disappears_are_delivered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    mute(monkeypatch, pair.hubs[0])
    await pair.ada.call(client.SetDraft(conversation_id=pair.group, content="Dear Charles"))
    assert await pair.arrives_by_comparison()
    await pair.device.event(server.DraftChanged)
    assert len(pair.hubs[1].comparisons._peers) == 0  # noqa: SLF001


async def test_commit_after_the_end_of_a_worker_is_delivered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL finishes the statement of a killed worker."""
    monkeypatch.setattr(comparisons, "AFTER_END_SECONDS", (0.0, 1.0))
    mute(monkeypatch, pair.hubs[0])
    await until(lambda: len(pair.hubs[1].comparisons._peers) == 0)  # noqa: SLF001
    await until(lambda: not pair.hubs[1].comparisons._topic_rounds._is_due)  # noqa: SLF001
    assert await pair.arrives_by_comparison()


async def test_goodbye_causes_no_comparison(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[None] = []
    monkeypatch.setattr(pair.hubs[1].comparisons, "_soon_with_jitter", lambda: compared.append(None))
    await pair.world.workers.pop(0).stop()
    await until(lambda: len(pair.hubs[1].comparisons._peers) == 0)  # noqa: SLF001
    assert compared == []


async def test_messages_that_could_not_be_published_are_delivered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(redis_bus, "MAX_UNSENT_BYTES", -1)
        message_id = await sent(pair.ada, pair.group)
        assert pair.hubs[0].bus.dropped > 0
    await received_message(pair.charles, message_id)
    assert pair.hubs[1].topics.fetched == 1


async def test_losses_that_another_worker_reports_often_cause_few_comparisons(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "LOSSES_SECONDS", 0.4)
    times: list[float] = []
    monkeypatch.setattr(pair.hubs[1].comparisons, "_soon_with_jitter", lambda: times.append(time.monotonic()))
    bus = pair.hubs[0].bus
    assert isinstance(bus, RedisBus)
    while len(times) < 3:
        bus.losses += 1
        pair.hubs[0].comparisons._peers.report()  # noqa: SLF001
        await asyncio.sleep(0.01)
    assert times[2] - times[0] > 0.7


async def test_messages_of_a_worker_without_a_bus_are_delivered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other worker's bus is up all the time. It compares again when the first one has reconnected."""
    monkeypatch.setattr(comparisons, "AFTER_END_SECONDS", (0.0,))
    async with without_bus(pair.hubs[0].bus):
        await until(lambda: len(pair.hubs[1].comparisons._peers) == 0)  # noqa: SLF001
        await until(lambda: not pair.hubs[1].comparisons._topic_rounds._is_due)  # noqa: SLF001
        message_id = await sent(pair.ada, pair.group)
    await received_message(pair.charles, message_id)
    assert pair.hubs[1].topics.fetched == 1


async def test_conversations_are_compared_often_beside_a_worker_that_is_silent(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a Redis per server, or beside a worker of an earlier release."""
    monkeypatch.setattr(comparisons, "AFTER_END_SECONDS", (0.0,))
    monkeypatch.setattr(comparisons, "CONNECTED_SECONDS", 0.05)
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS_BESIDE_SILENT", 0.05)
    async with World(settings) as world, paired(world) as pair:
        await until(lambda: not pair.hubs[1].comparisons._is_beside_silent)  # noqa: SLF001
        mute(monkeypatch, pair.hubs[0])
        await until(lambda: pair.hubs[1].comparisons._is_beside_silent)  # noqa: SLF001
        for _ in range(2):
            assert await pair.arrives_by_comparison()
        monkeypatch.undo()
        await until(lambda: not pair.hubs[1].comparisons._is_beside_silent)  # noqa: SLF001
        old = await asyncpg.connect(settings.database_url, server_settings={"application_name": "openchat"})
        await until(lambda: pair.hubs[1].comparisons._is_beside_silent)  # noqa: SLF001
        await old.close()
        await until(lambda: not pair.hubs[1].comparisons._is_beside_silent)  # noqa: SLF001


async def test_message_with_an_unknown_outcome_is_delivered_everywhere(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sending.send_plain

    async def lost(db: Any, items: list[Outgoing]) -> Any:
        await store(db, items)
        raise TimeoutError  # after the commit

    frame = message(pair.group)
    with monkeypatch.context() as lose:
        lose.setattr(sending, "send_plain", lost)
        answer = await pair.ada.ask(frame)
    assert isinstance(answer, server.Error)
    assert answer.code is ErrorCode.UNAVAILABLE
    for one in (pair.ada, pair.device, pair.charles):
        await received_message(one, frame.message_id)
    assert [one.topics.fetched for one in pair.hubs] == [1, 1]


async def test_change_whose_handler_failed_after_the_commit_is_delivered(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = await sent(pair.ada, pair.group)

    def defect(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as broken:
        broken.setattr(Hub, "publish", defect)
        answer = await pair.ada.ask(client.Delete(conversation_id=pair.group, message_id=message_id))
    assert isinstance(answer, server.Error)
    assert answer.code is ErrorCode.INTERNAL
    await pair.charles.event(
        server.Changes, lambda event: any(isinstance(one, server.MessageDeleted) for one in event.events)
    )
    # A refused write has no effect that could be missed.
    other = await pair.world.channel(pair.ada)
    await pair.ada.ask(client.Edit(conversation_id=other, message_id=message_id, content="Elsewhere"))
    assert list(pair.hubs[0].comparisons._unsure_topics._ages) == [pair.group]  # noqa: SLF001


async def test_two_single_workers_receive_messages_of_each_other(settings: Settings) -> None:
    """As while a worker replaces the only one."""
    async with World(settings, workers=0) as world:
        world.workers += [Worker(settings, world.folder, number, is_alone=True) for number in (1, 2)]
        for worker in world.workers:
            await worker.start()
        async with paired(world) as pair:
            assert not await pair.arrives_by_comparison()


SLOW_COMMIT = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON message DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
EXECUTE FUNCTION slow()
"""


async def worker_of(cluster: OwnCluster, one: Client) -> int:
    """Return the process that does not answer this client while it is stopped."""
    for pid in cluster.workers():
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(0.5):
                await one.call(client.GetMe())
        except TimeoutError:
            return pid
        finally:
            os.kill(pid, signal.SIGCONT)
    raise AssertionError


@pytest.mark.long
async def test_message_of_a_worker_killed_before_it_published_arrives_within_five_seconds() -> None:
    """PostgreSQL commits it after the worker's end."""
    async with OwnCluster(2) as cluster:
        await cluster.ready()
        db = await cluster.database()
        ada, charles = [await session_of(db, name) for name in ("Ada", "Charles")]
        places: dict[int, Client] = {}
        while len(places) < 2:
            one = Client(cluster.url, (ada if not places else charles).token)
            await one.__aenter__()
            places.setdefault(await worker_of(cluster, one), one)
        (victim, author), (_, reader) = places.items()
        about = ConversationId(uuid7())
        await author.call(client.CreateChannel(conversation_id=about, title="News", is_public=True))
        await reader.call(client.Join(conversation_id=about))
        await db.execute(SLOW_COMMIT)
        frame = message(about)
        sending_it = asyncio.create_task(author.ask(frame))
        while not await db.fetchval("SELECT true FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
            await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        await received_message(reader, frame.message_id)
        assert time.monotonic() - killed_at < 5
        sending_it.cancel()
        await db.close()
