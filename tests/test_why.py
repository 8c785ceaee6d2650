"""The delivery report of a message: the state for each recipient, with the reason."""

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import MessageId, UserId
from prove.client import Client
from server.hub.delivery_times import REMEMBERED, DeliveryTimes
from server.queries import delivery_report
from tests.world import Room, World, refused, sent, until


async def why(one: Client, room: Room, message_id: MessageId) -> server.DeliveryReport:
    return await one.call(client.Why(**room.at(message_id)), server.DeliveryReport)


async def test_report_has_the_times_of_each_step(room: Room, world: World) -> None:
    async with asyncio.timeout(10):
        while not await world.db.fetchval('SELECT is_online FROM "user" WHERE id = $1', room.users[1].id):
            await asyncio.sleep(0.01)
    before = datetime.now(UTC)
    message_id = await sent(room.ada, room.group)
    told = await why(room.ada, room, message_id)
    assert told.published_at is not None
    assert before - timedelta(seconds=1) < told.stored_at <= told.published_at + timedelta(seconds=1)
    assert (told.sender_id, told.delivered_to, told.read_by) == (room.users[0].id, 0, 0)
    assert [one.state for one in told.recipients] == ["unconfirmed"]
    await room.charles.call(client.Delivered(**room.at(message_id)))
    told = await why(room.ada, room, message_id)
    assert [(one.state, one.at is not None) for one in told.recipients] == [("delivered", True)]
    await room.charles.call(client.Read(**room.at(message_id)))
    told = await why(room.ada, room, message_id)
    assert (told.delivered_to, told.read_by, [one.state for one in told.recipients]) == (1, 1, ["read"])
    assert told.version == (await room.ada.event(server.MessageSent)).version


async def test_report_has_a_reason_for_each_recipient_without_the_message(room: Room, world: World) -> None:
    names = ("Left", "Offline", "Slow", "Muting", "Blocking", "Late")
    people = dict(zip(names, await world.users(*names), strict=True))
    early = [one.id for name, one in people.items() if name != "Late"]
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=early))
    for name in ("Left", "Muting", "Blocking"):
        one = await world.connect(people[name], 1)
        if name == "Left":
            await one.call(client.Leave(conversation_id=room.group))
        else:
            await one.call((client.Mute if name == "Muting" else client.Block)(user_id=room.users[0].id))
    message_id = await sent(room.ada, room.group)
    await world.db.execute(
        'UPDATE "user" SET is_online = false, last_close = 4008, last_seen_at = now() WHERE id = $1', people["Slow"].id
    )
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[people["Late"].id]))
    ids: dict[UserId, str] = {one.id: name for name, one in people.items()} | {room.users[1].id: "Charles"}
    await world.db.execute('UPDATE "user" SET is_online = true WHERE id = $1', room.users[1].id)
    told = await delivery_report.of(world.db, message_id, None, viewer=None)
    assert told is not None
    assert {ids[one.user_id]: one.state for one in told.recipients} == {
        "Left": "left", "Offline": "offline", "Slow": "slow", "Muting": "muted", "Blocking": "blocked",
        "Late": "joined_later", "Charles": "unconfirmed",
    }  # fmt: skip
    # The sender sees all of that except what the recipients keep private.
    for_sender = {ids[one.user_id]: one.state for one in (await why(room.ada, room, message_id)).recipients}
    assert for_sender | {"Muting": "", "Blocking": ""} == {
        "Left": "left", "Offline": "offline", "Slow": "slow", "Muting": "", "Blocking": "", "Late": "joined_later",
        "Charles": "unconfirmed",
    }  # fmt: skip
    assert not {for_sender["Muting"], for_sender["Blocking"]} & {"muted", "blocked"}


async def test_report_shows_a_client_that_read_too_slowly(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner = await world.connect(ada)
    group = await world.group(owner, charles)
    slow = await world.connect(charles)
    connection = next(iter(world.workers[0].app.hub.online_users.sockets(charles.id)))
    message_id = await sent(owner, group)
    connection.overflowed()  # type: ignore[attr-defined]
    await slow.closed()
    presence = world.workers[0].app.presence
    await until(lambda: charles.id not in presence._devices)  # noqa: SLF001 - the client learns of it first
    await presence.close()
    told = await delivery_report.of(world.db, message_id, None, viewer=None)
    assert told is not None
    assert [one.state for one in told.recipients] == ["slow"]
    assert json.dumps([one.state for one in told.recipients])


async def test_report_is_for_the_sender_and_moderators(room: Room) -> None:
    hers = await sent(room.ada, room.group)
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await why(room.charles, room, hers)
    his = await sent(room.charles, room.group)
    await why(room.charles, room, his)
    await why(room.ada, room, his)


def test_delivery_times_take_two_kilobytes() -> None:
    times = DeliveryTimes(7)
    assert times.of(8) is None
    largest = 0
    for version in range(8, 10_008):
        times.add(version, 1000.25 + (version - 8) * 0.5)
        largest = max(largest, sum(map(sys.getsizeof, (times, times._versions, times._times))))  # noqa: SLF001
    assert largest <= 2_048
    last, since = 10_007, 10_007 - 2 * REMEMBERED
    assert [times.of(last), times.of(last - 1), times.of(last - 2)] == [5999.75, 5999.75, 5998.75]
    assert times.of(last + 1) is None
    assert (times.of(since), times.of(since + 1)) == (None, 5999.75 - REMEMBERED + 1)
    # Versions that arrived in one event have its time.
    times.add(last + 50, 7000.0)
    assert times.of(last + 1) == times.of(last + 50) == 7000.0
