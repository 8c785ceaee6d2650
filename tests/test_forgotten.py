"""Rows of a user's own that are deleted: a device that was away drops them, or is told to start over."""

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
    """A device of Charles that keeps all of its lists, and reads them again when it has to start over."""

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
        """Come back; return why the device started over."""
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
        """Return what is on the device, without what has ended."""
        return {
            "stars": set(self.mirror.stars),
            "follows": {one for one, is_following in self.mirror.follows.items() if is_following},
            "scheduled": {one for one, status in self.mirror.scheduled.items() if status in {"waiting", "failed"}},
            "relationships": {one for one, row in self.mirror.relationships.items() if row.status != "inactive"},
        }

    async def assert_current(self) -> None:
        """Compare with a device that reads everything anew."""
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


async def aged(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete what is over, as if it were old enough."""
    monkeypatch.setattr(scheduled, "KEPT", timedelta())
    monkeypatch.setattr(relationships, "KEPT", timedelta())
    await world.workers[0].app.background.forget_scheduled()
    await world.workers[0].app.background.forget_relationships()


async def cancelled(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await world.db.fetchval("SELECT id FROM scheduled_message")
    await room.charles.call(client.CancelScheduled(**room.at(MessageId(old))))
    await world.db.execute("UPDATE scheduled_message SET send_at = now() - interval '1 day'")
    await aged(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM scheduled_message") == 0


async def ended(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await room.charles.call(client.Unmute(user_id=room.users[0].id))
    await aged(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship WHERE type = 'mute'") == 0


async def ended_by_the_other(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await room.ada.call(client.Unfollow(user_id=room.users[1].id))
    await aged(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship WHERE type = 'follow'") == 0


DEEDS: dict[str, Act] = {
    "threads": threads, "stars": stars, "a scheduled message": cancelled, "a relationship": ended,
    "a relationship of the other one": ended_by_the_other,
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
async def test_device_that_was_away_drops_rows_that_were_deleted(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch, deed: str
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
    await DEEDS[deed](room, world, monkeypatch)
    assert await device.back() == ["forgotten"]
    await device.assert_current()
    assert await device.back() == []
    await room.charles.call(client.Star(**room.at(await sent(room.ada, room.group))))
    assert await device.back() == []
    await device.assert_current()


async def test_device_drops_relationships_with_who_was_erased(room: Room, world: World) -> None:
    mary, blocked = await world.users("Mary", "Blocked")
    other = await world.connect(mary)
    await room.charles.call(client.Follow(user_id=mary.id))
    await other.call(client.Follow(user_id=room.users[1].id))
    await other.call(client.Block(user_id=blocked.id))
    device = Device(room, world)
    await device.begin()
    assert len(device.mirror.relationships) == 2
    await erase(world.workers[0].app._database, mary.id, lambda _: None)  # noqa: SLF001
    # Told of the end of each, and not made to read all of its own rows.
    assert await device.back() == []
    await device.assert_current()
    assert {one.status for one in device.mirror.relationships.values()} == {"inactive"}
    # Nobody is told of a block by its end.
    assert await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', blocked.id) == 0


TOLD_OF_ERASED = {"id", "type", "created_at", "updated_at", "from_version", "to_version"}
"""Columns of a relationship with somebody who was erased that say something, beside the two ids."""


async def test_relationship_with_who_was_erased_says_two_ids_and_when_and_is_deleted_after_90_days(
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
    said = TOLD_OF_ERASED | {"from_user_id", "to_user_id", "status"}
    for row in rows:
        assert {key: value for key, value in row.items() if key not in said} == blank
    days = relationships.KEPT.days
    assert days == 90
    await world.workers[0].app.background.forget_relationships()
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == len(rows)
    await aged(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == 0


@pytest.mark.parametrize("why", ["other_epoch", "ahead_of_server"])
async def test_own_lists_start_over_where_the_database_is_another(room: Room, world: World, why: str) -> None:
    """Rows that only the lost database had are on the device."""
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


def test_the_documents_name_the_same_rows_to_drop_at_a_start_over() -> None:
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
    # Each event of the user's own is about one of these, or about what has to be read again.
    about = {
        server.RelationshipChanged, server.Invited, server.InvitationEnded, server.StarChanged, server.DraftChanged,
        server.ScheduledChanged, server.ThreadFollowChanged, server.MeChanged, server.PreferencesChanged,
    }  # fmt: skip
    assert set(get_args(server.OwnEvent)) - {server.OwnStartOver} == about
    for read_again in ("`get_me`", "`preferences`"):
        assert read_again in (server.OwnStartOver.__doc__ or "")


async def test_device_that_is_here_is_told_of_rows_that_were_deleted_before_it_knew_of_their_change(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of an unfollowed thread is gone before the worker reads it for the device's event."""
    place = room.at(await sent(room.ada, room.group))
    await room.charles.call(client.FollowThread(**place))
    other = await sent(room.ada, room.group)
    phone = await world.connect(room.users[1], 1)
    monkeypatch.setattr(bounds, "MAX_THREAD_FOLLOWS", 1)
    # Unfollowed at a worker whose news are late.
    await world.db.execute(
        """WITH moved AS (UPDATE "user" SET version = version + 1 WHERE id = $1 RETURNING version)
        UPDATE thread_follow t SET is_following = false, user_version = m.version FROM moved m
        WHERE t.user_id = $1 AND t.root_id = $2""",
        room.users[1].id, place["message_id"],
    )  # fmt: skip
    await room.charles.call(client.ReadThread(**room.at(other), thread_order=0))
    assert (await phone.event(server.OwnStartOver)).reason == "forgotten"


async def test_rows_that_still_say_something_are_not_deleted(
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


async def test_relationship_that_was_deleted_tells_the_other_one_nothing(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was blocked or muted does not start over, which would tell of the block."""
    for begin, finish in ((client.Block, client.Unblock), (client.Mute, client.Unmute)):
        await room.ada.call(begin(user_id=room.users[1].id))
        await room.ada.call(finish(user_id=room.users[1].id))
    await aged(world, monkeypatch)
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship") == 0
    versions = 'SELECT forgotten_version > 0 FROM "user" WHERE id = $1'
    assert [await world.db.fetchval(versions, one.id) for one in room.users[:2]] == [True, False]


async def test_scheduled_message_whose_row_was_deleted_is_not_sent_again(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late a frame comes once more."""
    frame = client.Schedule(
        conversation_id=room.group, message_id=MessageId(uuid7()), content="Once", send_at=now() + timedelta(hours=1)
    )
    await room.charles.call(frame)
    await world.db.execute("UPDATE scheduled_message SET send_at = now()")
    await room.ada.event(server.MessageSent, lambda event: event.message.id == frame.message_id)
    await room.charles.event(server.ScheduledChanged, lambda event: event.scheduled.status == "sent")
    await aged(world, monkeypatch)
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


def test_rows_of_scheduled_messages_outlive_every_frame_that_could_repeat_them() -> None:
    assert scheduled.KEPT >= drafts.LATEST + 2 * drafts.OLDEST
