"""Deletion of rows of a user: devices that were offline drop them, or get `own_start_over`."""

import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import msgspec
import pytest

from protocol import client, server
from protocol.codec import now
from protocol.errors import ErrorCode
from protocol.ids import MessageId, uuid7
from prove.client import Client
from prove.mirror import Mirror
from server.domain.erasure import erase
from server.handlers import drafts
from server.queries import bounds, relationships, scheduled
from tests.world import Room, World, refused, sent


class Device:
    """A device of Charles that keeps its lists, and reads them again when it has to start over."""

    def __init__(self, room: Room, world: World) -> None:
        self.room, self.world = room, world
        self.mirror = Mirror()

    async def begin(self) -> None:
        phone = await self.world.connect(self.room.users[1], 1)
        self.mirror.receive(phone.ready)
        self.mirror.user_version = phone.ready.user_version
        await self.read(phone)
        await phone.close()

    async def read(self, phone: Client) -> None:
        """Read all lists."""
        stars = await phone.call(client.ListStars(), server.MessageList)
        self.mirror.stars = {one.id for one in stars.messages}
        threads = await phone.call(client.ListThreads(), server.ThreadList)
        self.mirror.follows = {one.root.id: True for one in threads.threads}
        waiting = await phone.call(client.ListScheduled(), server.ScheduledList)
        self.mirror.scheduled = {one.message_id: one.status for one in waiting.scheduled}
        page = await phone.call(client.ListRelationships(), server.RelationshipPage)
        self.mirror.relationships = {one.relationship.id: one.relationship for one in page.relationships}

    async def back(self, epoch: str | None = None) -> list[str]:
        """Reconnect and resume. Return the reasons of `own_start_over`."""
        phone = await self.world.connect(self.room.users[1], 1, query="?resume=1")
        frame = client.Resume(epoch=epoch or self.mirror.epoch, versions={}, user_version=self.mirror.user_version)
        resumed = await phone.call(frame, server.Resumed)
        for event in phone.events:
            self.mirror.receive(event)
        self.mirror.user_version = max(self.mirror.user_version, resumed.user_version)
        self.mirror.epoch = phone.ready.epoch
        why = [event.reason for event in phone.events if isinstance(event, server.OwnStartOver)]
        await phone.close()
        return list(why)

    def state(self) -> dict[str, set[Any]]:
        """Return the lists of the device, without ended entries."""
        return {
            "stars": set(self.mirror.stars),
            "follows": {one for one, is_following in self.mirror.follows.items() if is_following},
            "scheduled": {one for one, status in self.mirror.scheduled.items() if status in {"waiting", "failed"}},
            "relationships": {one for one, row in self.mirror.relationships.items() if row.status != "inactive"},
        }

    async def assert_current(self) -> None:
        """Assert that the lists equal those of a device that has just read everything."""
        fresh = Device(self.room, self.world)
        await fresh.begin()
        assert self.state() == fresh.state()


Act = Callable[[Room, World, pytest.MonkeyPatch], Awaitable[None]]


async def threads(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_THREAD_FOLLOWS", 1)
    old = await world.db.fetchval("SELECT root_id FROM thread_follow WHERE user_id = $1", room.users[1].id)
    await room.charles.call(client.UnfollowThread(**room.at(MessageId(old))))
    await room.charles.call(client.ReadThread(**room.at(await sent(room.ada, room.group)), thread_order=0))
    assert (
        await world.db.fetchval("SELECT count(*) FROM thread_follow WHERE user_version > 0 AND root_id = $1", old) == 0
    )


async def stars(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_REMOVED_STARS", 1)
    old = await world.db.fetchval("SELECT message_id FROM message_star")
    await room.charles.call(client.Unstar(**room.at(MessageId(old))))
    for _ in range(3):
        other = await sent(room.ada, room.group)
        await room.charles.call(client.Star(**room.at(other)))
        await room.charles.call(client.Unstar(**room.at(other)))
        assert await world.db.fetchval("SELECT count(*) FROM message_star WHERE is_removed") == 1


async def delete_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete ended rows as if they were old enough."""
    monkeypatch.setattr(scheduled, "KEPT", timedelta())
    monkeypatch.setattr(relationships, "KEPT", timedelta())
    await world.workers[0].app.background.forget_scheduled()
    await world.workers[0].app.background.forget_relationships()


async def cancel_scheduled(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await world.db.fetchval("SELECT id FROM scheduled_message")
    await room.charles.call(client.CancelScheduled(**room.at(MessageId(old))))
    await world.db.execute("UPDATE scheduled_message SET send_at = now() - interval '1 day'")
    await delete_ended(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM scheduled_message") == 0


async def end_relationship(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await room.charles.call(client.Unmute(user_id=room.users[0].id))
    await delete_ended(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship WHERE type = 'mute'") == 0


async def end_relationship_of_the_other(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await room.ada.call(client.Unfollow(user_id=room.users[1].id))
    await delete_ended(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship WHERE type = 'follow'") == 0


DELETIONS: dict[str, Act] = {
    "threads": threads, "stars": stars, "a scheduled message": cancel_scheduled, "a relationship": end_relationship,
    "a relationship of the other user": end_relationship_of_the_other,
}  # fmt: skip


@pytest.mark.parametrize("deletion", DELETIONS)
async def test_device_that_was_offline_drops_deleted_rows(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch, deletion: str
) -> None:
    root = await sent(room.ada, room.group)
    await sent(room.ada, room.group, parent_message_id=root)
    place = room.at(root)
    await room.charles.call(client.FollowThread(**place))
    await room.charles.call(client.Star(**place))
    later = client.Schedule(
        conversation_id=room.group, message_id=MessageId(uuid7()), content="Later", send_at=now() + timedelta(hours=1)
    )
    await room.charles.call(later)
    await room.charles.call(client.Mute(user_id=room.users[0].id))
    await room.ada.call(client.Follow(user_id=room.users[1].id))
    device = Device(room, world)
    await device.begin()
    assert [len(rows) for rows in device.state().values()] == [1, 1, 1, 2]
    await DELETIONS[deletion](room, world, monkeypatch)
    assert await device.back() == ["forgotten"]
    await device.assert_current()
    assert await device.back() == []
    await room.charles.call(client.Star(**room.at(await sent(room.ada, room.group))))
    assert await device.back() == []
    await device.assert_current()


async def test_device_ends_relationships_with_an_erased_user(room: Room, world: World) -> None:
    mary, blocked = await world.users("Mary", "Blocked")
    other = await world.connect(mary)
    await room.charles.call(client.Follow(user_id=mary.id))
    await other.call(client.Follow(user_id=room.users[1].id))
    await other.call(client.Block(user_id=blocked.id))
    device = Device(room, world)
    await device.begin()
    assert len(device.mirror.relationships) == 2
    await erase(world.workers[0].app._database, mary.id, lambda _: None)  # noqa: SLF001
    # The device gets the end of each relationship, and does not start over.
    assert await device.back() == []
    await device.assert_current()
    assert {one.status for one in device.mirror.relationships.values()} == {"inactive"}
    # The blocked user gets no event, which would reveal the block.
    assert await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', blocked.id) == 0


KEPT_COLUMNS = {"id", "type", "created_at", "updated_at", "from_version", "to_version"}
"""Columns of a relationship with an erased user that keep their values, besides the two ids and the status."""


async def test_relationship_with_an_erased_user_keeps_ids_and_times_and_is_deleted_after_90_days(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, charles = room.users
    await room.ada.call(client.RequestFriend(user_id=charles.id, message="It is Ada"))
    await room.charles.call(client.AnswerFriend(user_id=ada.id, accept=True, message="At last"))
    await room.charles.call(client.Follow(user_id=ada.id))
    await room.charles.call(client.SetSwitches(user_id=ada.id, notifications_enabled=False))
    await erase(world.workers[0].app._database, ada.id, lambda _: None)  # noqa: SLF001
    rows = [dict(row) for row in await world.db.fetch("SELECT * FROM user_relationship")]
    assert {(row["from_user_id"], row["to_user_id"], row["status"]) for row in rows} <= {
        (ada.id, charles.id, "inactive"), (charles.id, ada.id, "inactive"),
    }  # fmt: skip
    assert rows
    blank = {"request_message": None, "response_message": None, "accepted_at": None, "can_see_online_status": True,
             "can_send_messages": True, "can_see_profile": True, "notifications_enabled": True}  # fmt: skip
    kept = KEPT_COLUMNS | {"from_user_id", "to_user_id", "status"}
    for row in rows:
        assert {key: value for key, value in row.items() if key not in kept} == blank
    days = relationships.KEPT.days
    assert days == 90
    await world.workers[0].app.background.forget_relationships()
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == len(rows)
    await delete_ended(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == 0


@pytest.mark.parametrize("why", ["other_epoch", "ahead_of_server"])
async def test_own_lists_start_over_with_another_database(room: Room, world: World, why: str) -> None:
    """The device has rows that only the lost database had."""
    device = Device(room, world)
    await device.begin()
    await room.charles.call(client.Star(**room.at(await sent(room.ada, room.group))))
    device.mirror.stars.add(MessageId(uuid4()))
    device.mirror.relationships.clear()
    if why == "ahead_of_server":
        device.mirror.user_version += 1_000
    assert await device.back("another" if why == "other_epoch" else None) == [why]
    await device.assert_current()
    assert len(device.mirror.stars) == 1
    assert await device.back() == []


def test_documents_name_the_same_lists_to_drop_at_own_start_over() -> None:
    guide = " ".join((Path(__file__).parent.parent / "docs" / "clients.md").read_text().split())
    listed = [
        re.search(
            r"(?:`own_start_over`, drop|Delete all) ([a-z, ]+)(?:: all that there are|\. The current ones) follow",
            text,
        )
        for text in (guide, " ".join((server.OwnStartOver.__doc__ or "").split()))
    ]
    names = {one[1] if one else None for one in listed}
    assert names == {"relationships, invitations, stars, drafts, scheduled messages and followed threads"}
    # Each event of `OwnEvent` is about one of these lists, or about data that has to be read again.
    about = {
        server.RelationshipChanged, server.Invited, server.InvitationEnded, server.StarChanged, server.DraftChanged,
        server.ScheduledChanged, server.ThreadFollowChanged, server.MeChanged, server.PreferencesChanged,
    }  # fmt: skip
    assert set(get_args(server.OwnEvent)) - {server.OwnStartOver} == about
    for read_again in ("`get_me`", "`preferences`"):
        assert read_again in (server.OwnStartOver.__doc__ or "")


async def test_connected_device_starts_over_if_a_changed_row_was_deleted_before_its_event(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of an unfollowed thread is deleted before the worker reads it for the event."""
    place = room.at(await sent(room.ada, room.group))
    await room.charles.call(client.FollowThread(**place))
    other = await sent(room.ada, room.group)
    phone = await world.connect(room.users[1], 1)
    monkeypatch.setattr(bounds, "MAX_THREAD_FOLLOWS", 1)
    # Unfollow by SQL, as on a worker whose event is late.
    await world.db.execute(
        """WITH moved AS (UPDATE "user" SET version = version + 1 WHERE id = $1 RETURNING version)
        UPDATE thread_follow t SET is_following = false, user_version = m.version FROM moved m
        WHERE t.user_id = $1 AND t.root_id = $2""",
        room.users[1].id, place["message_id"],
    )  # fmt: skip
    await room.charles.call(client.ReadThread(**room.at(other), thread_order=0))
    assert (await phone.event(server.OwnStartOver)).reason == "forgotten"


async def test_rows_that_are_still_in_use_are_not_deleted(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, charles = room.users[0], room.users[1]
    mary = await world.user("Mary")
    await room.ada.call(client.RequestFriend(user_id=charles.id))
    await room.charles.call(client.AnswerFriend(user_id=ada.id, accept=False))
    await room.charles.call(client.Block(user_id=mary.id))
    await room.charles.call(client.Follow(user_id=ada.id))
    await room.charles.call(client.SetSwitches(user_id=ada.id, can_see_online_status=False))
    await room.charles.call(client.Unfollow(user_id=ada.id))
    await room.charles.call(
        client.Schedule(
            conversation_id=room.group, message_id=MessageId(uuid7()), content="x", send_at=now() + timedelta(hours=1)
        )
    )
    before = await world.db.fetchval("SELECT count(*) FROM user_relationship")
    monkeypatch.setattr(scheduled, "KEPT", timedelta(hours=-2))
    monkeypatch.setattr(relationships, "KEPT", timedelta())
    await world.workers[0].app.background.forget_scheduled()
    await world.workers[0].app.background.forget_relationships()
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == before == 3
    assert await world.db.fetchval("SELECT count(*) FROM scheduled_message") == 1


async def test_deletion_of_a_relationship_is_hidden_from_the_other_user(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocked or muted user does not start over, which would reveal the block."""
    for begin, finish in ((client.Block, client.Unblock), (client.Mute, client.Unmute)):
        await room.ada.call(begin(user_id=room.users[1].id))
        await room.ada.call(finish(user_id=room.users[1].id))
    await delete_ended(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == 0
    versions = 'SELECT forgotten_version > 0 FROM "user" WHERE id = $1'
    assert [await world.db.fetchval(versions, one.id) for one in room.users[:2]] == [True, False]


async def test_scheduled_message_with_a_deleted_row_is_not_sent_again(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds however late the frame is repeated."""
    frame = client.Schedule(
        conversation_id=room.group, message_id=MessageId(uuid7()), content="Once", send_at=now() + timedelta(hours=1)
    )
    await room.charles.call(frame)
    await world.db.execute("UPDATE scheduled_message SET send_at = now()")
    await room.ada.event(server.MessageSent, lambda event: event.message.id == frame.message_id)
    await room.charles.event(server.ScheduledChanged, lambda event: event.scheduled.status == "sent")
    await delete_ended(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM scheduled_message") == 0
    again = await room.charles.call(frame, server.OneScheduled)
    assert (again.scheduled.status, again.scheduled.words.content) == ("sent", "Once")
    with refused(ErrorCode.CONFLICT, "message_id"):
        await room.charles.call(msgspec.structs.replace(frame, content="Other"))
    with refused(ErrorCode.CONFLICT, "message_id"):
        await room.ada.call(frame)
    old = client.Schedule(
        conversation_id=room.group, message_id=MessageId(uuid7()), content="Old", send_at=now() - drafts.OLDEST
    )
    with refused(ErrorCode.INVALID, "send_at"):
        await room.charles.call(old)
    assert await world.db.fetchval("SELECT count(*) FROM scheduled_message") == 0
    await room.charles.call(msgspec.structs.replace(old, send_at=frame.send_at))
    with refused(ErrorCode.INVALID, "send_at"):
        await room.charles.call(old)


def test_rows_of_scheduled_messages_are_kept_longer_than_frames_may_be_repeated() -> None:
    assert scheduled.KEPT >= drafts.LATEST + 2 * drafts.OLDEST
