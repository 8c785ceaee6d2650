"""Events that may overtake each other carry a number, by which clients find the latest state."""

import asyncio
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from protocol import client, server
from protocol.codec import now
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.values import Draft, Presence, User
from prove import truth
from prove.mirror import Mirror
from server.core.config import Settings
from tests.world import World, sent, until

GROUPS = (server.DurableEvent, server.OwnEvent, server.StateEvent, server.TypingEvent, server.ConnectionFrame)
ROW = """
SELECT p.last_read_version, p.delivered_version, u.name, u.status FROM conversation_participant p
JOIN "user" u ON u.id = p.user_id WHERE p.user_id = $1
"""


def test_each_frame_of_the_server_is_in_one_group_which_defines_its_number() -> None:
    for frame in get_args(server.ServerFrame):
        groups = [group for group in GROUPS if frame in get_args(group)]
        assert len(groups) == 1, f"put {frame.__name__} into one of the groups"
    numbers = ((server.DurableEvent, "version"), (server.OwnEvent, "user_version"), (server.StateEvent, "revision"))
    for group, number in numbers:
        for event in get_args(group):
            assert hasattr(event, number), (event, number)
    text = (Path(__file__).parent.parent / "docs/clients.md").read_text()
    for event in get_args(server.StateEvent):
        assert event.subject is not None
        assert f"\n| `{event.__struct_config__.tag}` |" in text, "clients must know its subject and its revision"


def test_client_keeps_the_state_with_the_highest_revision() -> None:
    mirror = Mirror()
    one, other = ConversationId(uuid7()), UserId(uuid7())
    fields: dict[str, Any] = {"conversation_id": one, "user_id": other}
    for kind in (server.MessageRead, server.MessageDelivered):
        events = [kind(**fields, message_id=MessageId(uuid7()), revision=number) for number in (4, 7, 5)]
        for event in events:
            mirror.receive(event)
        assert mirror.states[kind, (one, other)] == events[1]
    later = server.PresenceChanged(presence=Presence(user_id=other, status="busy", revision=9))
    face = server.UserUpdated(user=User(id=other, name="Ada", revision=1))
    mirror.receive(later)
    mirror.receive(server.PresenceChanged(presence=Presence(user_id=other, status="online", revision=8)))
    mirror.receive(face)
    assert mirror.states[server.PresenceChanged, (other,)] == later
    assert mirror.states[server.UserUpdated, (other,)] == face


def test_own_event_after_a_later_one_is_reported() -> None:
    mirror = Mirror()
    for version in (3, 4, 4, 2):
        draft = Draft(conversation_id=ConversationId(uuid7()), content="Dear", updated_at=now())
        mirror.receive(server.DraftChanged(user_version=version, draft=draft))
    assert mirror.wrong == {"out of order": 1}


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, ephemeral_rate=1e6)) as world:
        yield world


@pytest.mark.parametrize("rounds", [12, pytest.param(400, marks=pytest.mark.long)])
async def test_states_of_two_devices_on_two_workers_end_in_the_stored_state(world: World, rounds: int) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.befriend(ada, charles)
    devices = [await world.connect(charles, number) for number in range(2)]
    watching = [await world.connect(ada, number) for number in range(2)]
    mirrors = [Mirror() for _ in watching]
    for one, mirror in zip(watching, mirrors, strict=True):
        one.on_event = mirror.receive
        await one.call(client.Watch(user_ids=[charles.id]))
    group = await world.group(watching[0], charles)
    for one in (*watching, *devices):
        await one.event(server.ConversationJoined)
    ids = [await sent(watching[0], group, str(number)) for number in range(2 * rounds)]
    subject = (group, charles.id)

    def is_stored(mirror: Mirror, row: Any) -> bool:
        kinds = [(server.MessageRead, subject), (server.MessageDelivered, subject)]
        positions = [mirror.states[key].revision if key in mirror.states else 0 for key in kinds]
        face = mirror.states.get((server.UserUpdated, (charles.id,)))
        shown = mirror.states.get((server.PresenceChanged, (charles.id,)))
        return [*positions, face and face.user.name, shown and shown.presence.status] == list(row)  # type: ignore[union-attr]

    for number in range(rounds):
        frames: list[client.Frame] = []
        for which, message_id in enumerate(ids[2 * number : 2 * number + 2]):
            at: dict[str, Any] = {"conversation_id": group, "message_id": message_id}
            frames += [
                client.Read(**at), client.Delivered(**at), client.UpdateProfile(name=f"Charles {number} {which}"),
                client.SetPresence(status="busy" if which else "online"),
            ]  # fmt: skip
        random.shuffle(frames)
        await asyncio.gather(*(devices[place % 2].call(frame) for place, frame in enumerate(frames)))
        row = await world.db.fetchrow(ROW, charles.id)
        for mirror in mirrors:
            await until(partial(is_stored, mirror, row), seconds=5)
            assert not await truth.ahead(world.db, mirror.states.values())
    # A later state than the stored one is found.
    mirrors[0].receive(server.MessageRead(conversation_id=group, user_id=charles.id, message_id=ids[0], revision=10**6))
    assert await truth.ahead(world.db, mirrors[0].states.values()) == 1
