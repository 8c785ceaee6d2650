"""States without a version, such as read positions: after a loss, every device ends with the stored ones."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from protocol import client, server
from protocol.ids import ConversationId
from protocol.values import Presence
from prove import truth
from prove.client import Client
from prove.mirror import Mirror
from server.app import hub_store
from server.app.hub_store import PostgresHubStore
from server.core.config import Settings
from server.handlers import receipts as receipt_handlers
from server.hub import comparisons
from server.hub.hub import Hub
from server.queries import presence, receipts
from tests.world import UserSession, World, sent, until, without_bus

ROWS = """
SELECT p.conversation_id, p.user_id, CASE WHEN p.last_read_message_id IS NULL THEN 0 ELSE p.last_read_version END,
    p.delivered_version, u.face_version, u.status
FROM conversation_participant p JOIN "user" u ON u.id = p.user_id WHERE p.conversation_id = ANY($1)
"""
POSITIONS = (server.MessageRead, server.MessageDelivered)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make heartbeats ten times as fast. The periodic comparison finds nothing during a test."""
    monkeypatch.setattr(comparisons, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(comparisons, "MAX_JITTER_SECONDS", 0.0)
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 3_600.0)
    monkeypatch.setattr(comparisons, "COMPARE_USERS_SECONDS", 3_600.0)


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, ephemeral_rate=1e6)) as world:
        yield world


class Devices:
    """Devices of users, which watch some of these, and what each device has received."""

    def __init__(self, world: World, users: list[UserSession]) -> None:
        self.world = world
        self.users = users
        self.clients: list[Client] = []
        self.mirrors: list[Mirror] = []
        self.groups: list[ConversationId] = []

    async def add(self, user: UserSession, worker: int, watched: Sequence[UserSession]) -> Client:
        device = await self.world.connect(user, worker)
        mirror = Mirror()
        for event in device.events:
            mirror.receive(event)

        def receive(frame: server.ServerFrame) -> None:
            device.events.append(frame)
            mirror.receive(frame)

        device.on_event = receive
        known = await device.call(client.Watch(user_ids=[one.id for one in watched]), server.PresenceList)
        mirror.show(known.presences)
        for face in (await device.call(client.GetUsers(user_ids=[one.id for one in watched]), server.UserList)).users:
            mirror.receive(server.UserUpdated(user=face))
        self.clients.append(device)
        self.mirrors.append(mirror)
        return device

    async def have_the_rows(self) -> None:
        """Wait until every device has the position of every participant, every face and every presence."""
        deadline = time.monotonic() + 15
        while older := await self.older():
            assert time.monotonic() < deadline, older
            await asyncio.sleep(0.05)

    async def older(self) -> list[Any]:
        found = []
        for row in await self.world.db.fetch(ROWS, self.groups):
            group, user_id, *revisions, status = row
            keys = (server.MessageRead, (group, user_id)), (server.MessageDelivered, (group, user_id)), (
                server.UserUpdated, (user_id,))  # fmt: skip
            for mirror in self.mirrors:
                there = [mirror.states[key].revision if key in mirror.states else 0 for key in keys]
                shown = mirror.states[server.PresenceChanged, (user_id,)]
                assert isinstance(shown, server.PresenceChanged)
                if there != revisions or shown.presence.status != status:
                    found.append((there, revisions, shown.presence.status, status))
        return found

    async def behind(self) -> list[str]:
        """Return what `openchat prove` reports of these devices."""
        return [
            one
            for device, mirror in zip(self.clients, self.mirrors, strict=True)
            for one in await truth.behind(self.world.db, device.ready.user.id, mirror.current_states)
        ]


@pytest.fixture
async def devices(world: World) -> Devices:
    """Two devices of Ada and two of Charles, one at each worker, who share two groups."""
    users = await world.users("Ada", "Charles")
    await world.befriend(*users)
    found = Devices(world, users)
    for user in users:
        for worker in range(2):
            await found.add(user, worker, users)
    for device in found.clients[::2]:
        await device.call(client.SetPresence(status="online"))
    for _ in range(2):
        found.groups.append(await world.group(found.clients[0], users[1]))
    await until(lambda: all(mirror.copies.keys() == set(found.groups) for mirror in found.mirrors))
    return found


@pytest.mark.parametrize("cut", [0, 1])
async def test_every_device_has_the_stored_states_after_an_interruption_of_the_bus(devices: Devices, cut: int) -> None:
    ids = [(one, await sent(devices.clients[0], one, str(n))) for n in range(8) for one in devices.groups]
    for device in devices.clients:
        await device.call(client.UpdateProfile(name="Before"))
    async with without_bus(devices.world.workers[cut].app.hub.bus):
        for place, (group, message_id) in enumerate(ids):
            at: dict[str, Any] = {"conversation_id": group, "message_id": message_id}
            frames: list[client.Frame] = [
                client.Read(**at), client.Delivered(**at), client.UpdateProfile(name=f"Name {place}"),
                client.SetPresence(status=random.choice(("online", "busy"))),
            ]  # fmt: skip
            await asyncio.gather(*(random.choice(devices.clients).call(frame) for frame in frames))
        assert await devices.older()
        assert await devices.behind()
    await devices.have_the_rows()
    assert not await devices.behind()


async def test_states_with_an_unknown_outcome_reach_every_device(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = await sent(devices.clients[0], devices.groups[0])
    at: dict[str, Any] = {"conversation_id": devices.groups[0], "message_id": message_id}
    changes: list[tuple[Any, str, client.Frame]] = [
        (receipts, "read", client.Read(**at)),
        (receipts, "delivered", client.Delivered(**at)),
        (presence, "choose", client.SetPresence(status="busy")),
    ]
    for module, name, frame in changes:
        store = getattr(module, name)

        async def lost(*args: Any, store: Any = store, **options: Any) -> Any:
            await store(*args, **options)
            raise TimeoutError  # after the commit

        with monkeypatch.context() as lose:
            lose.setattr(module, name, lost)
            assert isinstance(await devices.clients[0].ask(frame), server.Error)

    def defect(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as broken:
        broken.setattr(Hub, "send_to_watchers", defect)
        assert isinstance(await devices.clients[0].ask(client.UpdateProfile(name="Augusta")), server.Error)
    await devices.have_the_rows()


async def test_after_a_loss_positions_reach_only_those_who_may_know_them(devices: Devices) -> None:
    """Readers are known to all participants. Nobody receives the arrival of a message at a user who is invisible, or
    who has blocked them. To those whom a user has blocked, the user is offline again, as if the user were.
    """
    world, (ada, _, charles, _), group = devices.world, devices.clients, devices.groups[0]
    charles_id = devices.users[1].id
    eve_, ian_ = await world.users("Eve", "Ian")
    eve, ian = await devices.add(eve_, 0, devices.users), await devices.add(ian_, 1, devices.users)
    await ada.call(client.AddParticipants(conversation_id=group, participants=[eve_.id, ian_.id]))
    for one in (eve, ian):
        await one.event(server.ConversationJoined)
    seen = len(eve.events)
    await charles.call(client.Block(user_id=eve_.id))
    await eve.event(server.PresenceChanged, lambda event: event.presence.user_id == charles_id, start=seen)
    seen = len(eve.events)
    at: dict[str, Any] = {"conversation_id": group, "message_id": await sent(ada, group)}
    async with without_bus(world.workers[1].app.hub.bus):
        for one in (charles, ian):
            await one.call(client.Delivered(**at))
        await ian.call(client.SetPresence(status="invisible"))
        await ian.call(client.Read(conversation_id=group, message_id=at["message_id"]))
    device = devices.clients[1]
    for one in (ada, device, eve):
        await one.event(server.MessageRead, lambda event: event.user_id == ian_.id)
    for one in (ada, device):
        await one.event(server.MessageDelivered, lambda event: event.user_id == charles_id)
    shown = await eve.event(server.PresenceChanged, lambda event: event.presence.user_id == charles_id, start=seen)
    assert shown.presence == Presence(user_id=charles_id, status="offline", revision=shown.presence.revision)
    received = [one for one in (*eve.events, *ada.events) if isinstance(one, server.MessageDelivered)]
    assert {one.user_id for one in received} == {charles_id}
    assert not [one for one in eve.events if isinstance(one, server.MessageDelivered)]


async def test_after_a_loss_positions_in_a_large_conversation_reach_own_devices_only(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (hub_store, receipt_handlers):
        monkeypatch.setattr(module, "MAX_SHARED_PARTICIPANTS", 1)
    (ada, *_, charles), group = devices.clients, devices.groups[0]
    at: dict[str, Any] = {"conversation_id": group, "message_id": await sent(ada, group)}
    async with without_bus(devices.world.workers[1].app.hub.bus):
        await ada.call(client.Read(**at))
        await charles.call(client.Delivered(**at))
    for other, kind in ((devices.clients[1], server.MessageRead), (devices.clients[2], server.MessageDelivered)):
        await other.event(kind)
    received = [[type(one) for one in device.events if isinstance(one, POSITIONS)] for device in devices.clients]
    assert [set(kinds) for kinds in received] == [{server.MessageRead}] * 2 + [{server.MessageDelivered}] * 2


async def test_states_reach_a_device_that_has_later_messages_than_its_worker(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = devices.world.workers[0].app.hub.bus
    publish = bus.publish
    monkeypatch.setattr(
        bus, "publish", lambda channel, message: None if channel.startswith(b"c:") else publish(channel, message)
    )
    group = devices.groups[0]
    message_id = await sent(devices.clients[0], group)
    device = await devices.add(devices.users[0], 1, devices.users)
    topic = devices.world.workers[1].app.hub.topics._topics[group]  # noqa: SLF001
    assert len(topic.joining) == 1
    await devices.clients[3].call(client.Read(conversation_id=group, message_id=message_id))
    await device.event(server.MessageRead)
    assert len(topic.joining) == 1


async def test_without_a_sign_of_loss_no_positions_are_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 0.05)
    compared = Counter[str]()
    for name in ("versions", "moved"):
        read = getattr(PostgresHubStore, name)

        async def counted(*args: Any, name: str = name, read: Any = read, **options: Any) -> Any:
            compared[name] += 1
            return await read(*args, **options)

        monkeypatch.setattr(PostgresHubStore, name, counted)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        await world.channel(ada)
        compared.clear()
        await until(lambda: compared["versions"] >= 3)
        assert compared["moved"] == 0
        world.workers[0].app.hub.comparisons.soon()
        await until(lambda: compared["moved"] == 1)
