"""Read positions and unread marks, changed by several devices concurrently."""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId
from prove.client import Client
from tests.test_may_send import WAITING
from tests.world import Room, World, refused, sent, until

ROW = """
SELECT last_read_version, last_read_message_id, unread_from_id FROM conversation_participant
WHERE user_id = $1 AND conversation_id = $2
"""
MOVE = """
UPDATE conversation_participant SET last_read_message_id = $3,
    last_read_version = (SELECT sent_version FROM message WHERE id = $3)
WHERE user_id = $1 AND conversation_id = $2
"""


class Device:
    """A device that keeps the state with the highest number, from events and replies."""

    def __init__(self, connection: Client, group: ConversationId) -> None:
        self.connection = connection
        self._group = group
        self.position: tuple[int, MessageId | None] = (0, None)
        self.mark: tuple[int, MessageId | None] = (0, None)
        connection.on_event = self._receive

    def _receive(self, frame: server.ServerFrame) -> None:
        if isinstance(frame, server.MessageRead):
            self.position = max(self.position, (frame.revision, frame.message_id), key=lambda known: known[0])
        elif isinstance(frame, server.PreferencesChanged):
            self._marked(frame.user_version, frame.preferences.unread_from_id)

    def _marked(self, version: int, mark: MessageId | None) -> None:
        self.mark = max(self.mark, (version, mark), key=lambda known: known[0])

    def knows(self, position: MessageId, mark: MessageId | None) -> bool:
        return (self.position[1], self.mark[1]) == (position, mark)

    async def read(self, message_id: MessageId) -> server.ReadUpTo:
        got = await self.connection.call(
            client.Read(conversation_id=self._group, message_id=message_id), server.ReadUpTo
        )
        self.position = max(self.position, (got.revision, got.message_id), key=lambda known: known[0])
        self._marked(got.mark_version, None)
        return got

    async def mark_unread(self, message_id: MessageId) -> server.ReadUpTo:
        got = await self.connection.call(
            client.MarkUnread(conversation_id=self._group, message_id=message_id), server.ReadUpTo
        )
        self._marked(got.mark_version, message_id)
        return got


@pytest.mark.parametrize("rounds", [60, pytest.param(3_400, marks=pytest.mark.long)])
async def test_read_and_mark_unread_on_several_devices_lead_all_to_the_row(
    room: Room, world: World, rounds: int
) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(50)]
    versions = {row[0]: row[1] for row in await world.db.fetch("SELECT id, sent_version FROM message")}
    me = room.users[1].id
    devices = [Device(await world.connect(room.users[1], number % 2), room.group) for number in range(4)]
    wrong: Counter[str] = Counter()
    for number in range(rounds):
        first = number % 50
        if first == 0:
            await world.db.execute(MOVE, me, room.group, ids[0])
            for device in devices:
                device.position = (0, None)
        wanted = [ids[first], ids[min(first + 1, 49)], ids[min(first + 2, 49)]]
        reads = [device.read(message_id) for device, message_id in zip(devices, wanted, strict=False)]
        calls: list[Any] = [*reads, devices[3].mark_unread(ids[number * 7 % 50])]
        turn = number % 4
        got = await asyncio.gather(*calls[turn:], *calls[:turn])
        got = got[4 - turn :] + got[: 4 - turn]
        for reply, message_id in zip(got, wanted, strict=False):
            wrong["older position"] += versions[reply.message_id] < versions[message_id]
            wrong["count"] += reply.unread_count != 49 - ids.index(reply.message_id)
            wrong["revision"] += reply.revision != versions[reply.message_id]
        wrong["count of the mark"] += got[3].unread_count != 50 - number * 7 % 50
        _, position, mark = await world.db.fetchrow(ROW, me, room.group)  # type: ignore[misc]
        for device in devices:
            await until(partial(device.knows, position, mark))
    assert not +wrong, wrong


async def test_read_that_waited_for_another_device_answers_the_later_position(room: Room, world: World) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(4)]
    watch = await asyncpg.connect(world.settings.database_url)
    for mark, unread in ((None, 1), (ids[0], 1)):
        await world.db.execute("UPDATE conversation_participant SET last_read_version = 0")
        if mark is not None:
            await room.charles.call(client.MarkUnread(**room.at(mark)))
        async with world.db.transaction():
            await world.db.execute(MOVE, room.users[1].id, room.group, ids[2])
            reading = asyncio.create_task(room.charles.call(client.Read(**room.at(ids[1])), server.ReadUpTo))
            while not await watch.fetchval(WAITING):
                await asyncio.sleep(0.005)
        got = await reading
        assert (got.message_id, got.unread_count) == (ids[2], unread)
        assert (await world.db.fetchrow(ROW, room.users[1].id, room.group))[1:] == (ids[2], None)  # type: ignore[index]
    await watch.close()


async def test_mark_that_is_set_while_a_read_waits_is_removed(room: Room, world: World) -> None:
    """The statement began before the mark, so it does not know that it must move the user version."""
    ids = [await sent(room.ada, room.group, str(number)) for number in range(2)]
    watch = await asyncpg.connect(world.settings.database_url)
    async with world.db.transaction():
        await world.db.execute(
            "UPDATE conversation_participant SET unread_from_id = $1, unread_from_version = 1 WHERE user_id = $2",
            ids[0], room.users[1].id,
        )  # fmt: skip
        reading = asyncio.create_task(room.charles.call(client.Read(**room.at(ids[1])), server.ReadUpTo))
        while not await watch.fetchval(WAITING):
            await asyncio.sleep(0.005)
    got = await reading
    assert (got.message_id, got.unread_count) == (ids[1], 0)
    told = await room.charles.event(server.PreferencesChanged)
    assert (told.preferences.unread_from_id, told.user_version) == (None, got.mark_version)
    await watch.close()


async def test_read_waits_neither_for_the_conversation_nor_for_the_user(room: Room, world: World) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(2)]
    async with world.db.transaction():
        await world.db.execute("SELECT FROM conversation FOR NO KEY UPDATE")
        await world.db.execute('SELECT FROM "user" FOR NO KEY UPDATE')
        got = await room.charles.call(client.Read(**room.at(ids[0])), server.ReadUpTo)
        assert got.unread_count == 1
    async with world.db.transaction():
        await world.db.execute("SELECT FROM conversation FOR UPDATE")
        assert (await room.charles.call(client.MarkUnread(**room.at(ids[0])), server.ReadUpTo)).unread_count == 2
        assert (await room.charles.call(client.Read(**room.at(ids[1])), server.ReadUpTo)).unread_count == 0
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await (await world.connect(await world.user("Mallory"))).call(client.Read(**room.at(ids[0])))
