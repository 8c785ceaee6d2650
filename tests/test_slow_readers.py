"""A reader gets as many conversations as there are, in pages, at its own pace. Only a reader that stops is closed."""

import asyncio
import socket
from collections import defaultdict
from collections.abc import AsyncIterator

import msgspec
import pytest

from protocol import client, server
from protocol.ids import ConversationId
from prove.client import Client
from server.core.config import Settings
from server.gateway import websocket
from server.gateway.connection import Connection
from server.queries import changes, conversation_views
from tests.test_many import CHANGE, FILL, Asked
from tests.world import UserSession, World, sent, until

OUTBOX_BYTES = 65_536
COUNT = 1_500
"""Number of conversations. Each takes about a kilobyte on the wire, so all of them exceed the buffers many times."""
PAGE_BYTES = 100_000
"""Max bytes of the frames about a page of these conversations."""
RECEIVE_BYTES = 16 * 1024
PAGES = {changes.MISSED, conversation_views.GET}
"""The statements that read a page of conversations."""


@pytest.fixture
async def alone(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, outbox_bytes=OUTBOX_BYTES), workers=1) as world:
        yield world


class Slow:
    """A client that reads nothing until `read` is called. Its kernel receives little meanwhile."""

    def __init__(self, world: World, one: Client) -> None:
        (held,) = world.workers[0].app.hub.online_users.sockets(one.ready.user.id)
        assert isinstance(held, Connection)
        self.client = one
        self.held = held
        self.socket = held.socket
        one.socket.transport.pause_reading()

    @classmethod
    async def connect(cls, world: World, who: UserSession) -> "Slow":
        with socket.socket() as small:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            small.connect(("127.0.0.1", int(world.url.rpartition(":")[2])))
            return cls(world, await world.connect(who, query="?resume=1", sock=small.dup()))

    @property
    def waiting(self) -> int:
        """The number of bytes that wait for this client in the worker."""
        return self.socket.transport.get_write_buffer_size()

    def read(self) -> None:
        self.client.socket.transport.resume_reading()

    def versions(self) -> dict[ConversationId, list[int]]:
        """Return the versions of the events of each conversation, in the order of arrival."""
        found: dict[ConversationId, list[int]] = defaultdict(list)
        for event in self.client.events:
            if isinstance(event, server.Changes):
                found[event.conversation_id] += [one.version for one in event.events]
            elif isinstance(event, server.MessageSent):
                found[event.conversation_id].append(event.version)
        return found


async def many(world: World) -> tuple[UserSession, UserSession, dict[ConversationId, int]]:
    """Return a user with many conversations, one who has sent a message to each, and the versions before that."""
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(FILL, ada.id, COUNT)
    every = {ConversationId(row[0]): 2 for row in await world.db.fetch("SELECT id FROM conversation")}
    await world.db.execute(CHANGE, list(every), 1, charles.id, 300)
    return ada, charles, every


JOIN = """
INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version)
SELECT id, $2, 2, 2 FROM unnest($1::uuid[]) id
"""


@pytest.mark.parametrize("kind", ["changes", "joined", "start over"])
async def test_slow_reader_gets_all_conversations_at_its_own_pace(
    alone: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Meanwhile the worker reads no further pages, and keeps little in memory."""
    ada, charles, every = await many(alone)
    slow = await Slow.connect(alone, ada)
    asked = Asked(monkeypatch)
    frame = client.Resume(
        epoch="another" if kind == "start over" else slow.client.ready.epoch,
        versions={} if kind == "joined" else every,
        user_version=0,
    )
    answer = asyncio.create_task(slow.client.call(frame, server.Resumed))
    await until(lambda: slow.socket.is_behind)
    most = slow.waiting
    assert most < OUTBOX_BYTES + PAGE_BYTES
    count = sum(one in PAGES for one in asked.statements)
    assert count < COUNT / 50 / 2
    # Others go on, in these conversations and with their own `resume`.
    await alone.db.execute(JOIN, [*every][:3] + [*every][-3:], charles.id)
    other = await alone.connect(charles, query="?resume=1")
    done = await other.call(client.Resume(epoch=other.ready.epoch, versions={}), server.Resumed)
    assert done.conversations == 6
    busy = [*every][:3] + [*every][-3:]
    for number in range(4):
        for one in busy:
            await sent(other, one, f"Live {number}")
    assert sum(one in PAGES for one in asked.statements) <= count + 1, "nothing is read for the slow reader"
    assert slow.waiting < most + PAGE_BYTES / 2
    slow.read()
    assert (await answer).conversations == COUNT
    for one in busy:
        await sent(other, one, "Last")
    await slow.client.synced()
    found = slow.versions()
    views = {
        event.view.conversation.id: event.view.version
        for event in slow.client.events
        if isinstance(event, server.ConversationJoined | server.StartOver)
    }
    assert (found.keys() if kind == "changes" else views.keys()) == every.keys()
    for one in every:
        latest = 8 if one in busy else 3
        assert found.get(one, []) == list(range(views.get(one, 2) + 1, latest + 1))
    assert not slow.client.is_over


async def test_slow_reader_gets_all_conversations_after_connecting(alone: World) -> None:
    ada, _, every = await many(alone)
    with socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        small.connect(("127.0.0.1", int(alone.url.rpartition(":")[2])))
        slow = Slow(alone, await alone.connect(ada, query="?resume=0", sock=small.dup()))
    await until(lambda: slow.socket.is_behind)
    assert slow.waiting < OUTBOX_BYTES + PAGE_BYTES
    slow.read()
    await slow.client.settled()
    pages = [event for event in slow.client.events if isinstance(event, server.Conversations)]
    assert {view.conversation.id for page in pages for view in page.conversations} == every.keys()


async def test_reader_that_stops_during_a_resume_is_cut(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read or kept for it afterwards, and another connection of its user resumes."""
    monkeypatch.setattr(websocket, "STALL_SECONDS", 0.3)
    ada, _, every = await many(alone)
    slow = await Slow.connect(alone, ada)
    asked = Asked(monkeypatch)
    frame = client.Resume(epoch=slow.client.ready.epoch, versions=every)
    answer = asyncio.create_task(slow.client.call(frame, server.Resumed))
    app = alone.workers[0].app
    await until(lambda: slow.held.is_closed)
    await until(lambda: not app._working)  # noqa: SLF001
    assert sum(one in PAGES for one in asked.statements) < COUNT / 50 / 2
    slow.read()
    with pytest.raises(ConnectionError):
        await answer
    assert not any(topic.sockets or topic.joining or topic.behind for topic in app.hub.topics._topics.values())  # noqa: SLF001
    phone = await alone.connect(ada, query="?resume=1")
    assert (await phone.call(frame, server.Resumed)).conversations == COUNT
    assert {event.conversation_id for event in phone.events if isinstance(event, server.Changes)} == every.keys()


async def test_two_connections_of_a_user_resume_at_their_own_pace(alone: World) -> None:
    ada, _, every = await many(alone)
    slow = await Slow.connect(alone, ada)
    frame = client.Resume(epoch=slow.client.ready.epoch, versions=every)
    answer = asyncio.create_task(slow.client.call(frame, server.Resumed))
    await until(lambda: slow.socket.is_behind)
    quick = await alone.connect(ada, query="?resume=1")
    assert (await quick.call(msgspec.structs.replace(frame), server.Resumed)).conversations == COUNT
    assert not answer.done()
    slow.read()
    await answer
    for one in (slow.client, quick):
        events = [event for event in one.events if isinstance(event, server.Changes)]
        assert sorted(event.conversation_id for event in events) == sorted(every)
