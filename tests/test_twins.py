"""Users who block the caller, are private or invisible look the same as users who are offline."""

import json
from typing import Any

import msgspec
import pytest

from protocol import client, server
from protocol.ids import MessageId
from protocol.values import User
from prove.client import Client
from prove.writes import PUSH_POINT
from server.queries import push, relationships
from server.queries.relationships import RelationshipChange
from tests.world import Room, UserSession, World, sent

BLOCKS, HIDES, SWITCHED, INVISIBLE, AWAY = "Blocks", "Hides", "Switched", "Invisible", "Away"


async def people(room: Room, world: World) -> dict[str, UserSession]:
    """Return members of the room who are online but hidden from Ada in different ways, and one who is offline."""
    ada = room.users[0].id
    names = (BLOCKS, HIDES, SWITCHED, INVISIBLE, AWAY)
    them = dict(zip(names, await world.users(*names), strict=True))
    await room.ada.call(
        client.AddParticipants(conversation_id=room.group, participants=[one.id for one in them.values()])
    )
    frames: dict[str, list[Any]] = {
        BLOCKS: [client.Block(user_id=ada)],
        HIDES: [client.UpdateProfile(show_online_status=False)],
        SWITCHED: [client.Mute(user_id=ada), client.SetSwitches(user_id=ada, can_see_online_status=False)],
        INVISIBLE: [client.SetPresence(status="invisible")],
        AWAY: [],
    }
    for name, frame in frames.items():
        if name != AWAY:
            one = await world.connect(them[name], 1)
            for each in frame:
                await one.call(each)
    connected = [one.id for name, one in them.items() if name != AWAY]
    await world.db.execute('UPDATE "user" SET is_online = id = ANY($1), last_seen_at = now()', connected)
    return them


async def about(room: Room, who: UserSession, message_id: MessageId) -> str:
    """Return all that Ada learns about a user, without the id and name."""
    told: list[Any] = []
    page = await room.ada.call(client.Why(conversation_id=room.group, message_id=message_id), server.DeliveryReport)
    told += [one for one in page.recipients if one.user_id == who.id]
    readers = await room.ada.call(client.ListReaders(conversation_id=room.group, message_id=message_id), server.Readers)
    told += [one for one in readers.readers if one.user_id == who.id]
    text = msgspec.json.encode(told).decode()
    return json.dumps(json.loads(text.replace(str(who.id), "id").replace(who.name, "name")), sort_keys=True)


async def test_delivery_report_reveals_nothing_about_hidden_users(room: Room, world: World) -> None:
    them = await people(room, world)
    message_id = await sent(room.ada, room.group)
    plain = await about(room, them[AWAY], message_id)
    assert '"offline"' in plain
    for close in (None, 4008):
        # A connection that was closed for slowness shows that the user was online.
        await world.db.execute(
            'UPDATE "user" SET last_close = $1, last_seen_at = now(), is_online = is_online AND $1::int IS NULL'
            " WHERE id <> $2", close, them[AWAY].id,
        )  # fmt: skip
        for name in (BLOCKS, HIDES, SWITCHED, INVISIBLE):
            assert await about(room, them[name], message_id) == plain, (name, close)


async def listed_profiles(one: Client) -> dict[str, User | None]:
    """Return the names and pictures in the caller's list of relationships, by user."""
    page = await one.call(client.ListRelationships(limit=100), server.RelationshipPage)
    return {str(entry.relationship.user_id): entry.user for entry in page.relationships}


async def test_list_of_relationships_shows_only_visible_profiles(world: World) -> None:
    ada, blocking, private, erased, open_ = await world.users("Ada", "Blocking", "Private", "Gone", "Open")
    one = await world.connect(ada)
    for other in (blocking, private, erased, open_):
        await one.call(client.Mute(user_id=other.id))
    assert all((await listed_profiles(one)).values())
    theirs, hidden = await world.connect(blocking, 1), await world.connect(private, 1)
    await theirs.call(client.Block(user_id=ada.id))
    await hidden.call(client.UpdateProfile(is_private=True, display_name="Secret"))
    await world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', erased.id)
    faces = await listed_profiles(one)
    shown = await one.call(client.GetUsers(user_ids=[blocking.id, private.id, erased.id, open_.id]), server.UserList)
    assert {user for user, face in faces.items() if face is not None} == {str(face.id) for face in shown.users}
    for other in (blocking, erased):
        assert faces[str(other.id)] is None
    assert faces[str(open_.id)] is not None


async def test_every_frame_shows_the_same_profiles_of_participants(room: Room, world: World) -> None:
    """Participants may block the caller, be private, deactivated or erased.

    Frames agree on whether they are visible.
    """
    names = ("Blocks", "Private", "Gone", "Erased")
    them = dict(zip(names, await world.users(*names), strict=True))
    outsiders = dict(zip(("Invited", "Banned"), await world.users("Invited", "Banned"), strict=True))
    listed_profiles = [one.id for one in (*them.values(), outsiders["Banned"])]
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=listed_profiles))
    await room.ada.call(client.Invite(conversation_id=room.group, participants=[outsiders["Invited"].id]))
    await room.ada.call(client.RemoveParticipant(conversation_id=room.group, user_id=outsiders["Banned"].id, ban=True))
    for one in (them["Blocks"], *outsiders.values()):
        await (await world.connect(one)).call(client.Block(user_id=room.users[0].id))
    await world.db.execute('UPDATE "user" SET is_private = true WHERE id = $1', them["Private"].id)
    await world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', them["Gone"].id)
    await world.db.execute('UPDATE "user" SET erased_at = now(), is_deleted = true WHERE id = $1', them["Erased"].id)
    entries = [
        entry
        for status in ("active", "invited", "banned")
        for entry in (
            await room.ada.call(
                client.ListParticipants(conversation_id=room.group, status=status),
                server.ParticipantPage,
            )
        ).participants
    ]
    asked = client.GetUsers(user_ids=[entry.participant.user_id for entry in entries])
    shown = {face.id: face for face in (await room.ada.call(asked, server.UserList)).users}
    assert {entry.participant.user_id: entry.user for entry in entries if entry.user is not None} == shown
    assert {one.id for one in (*them.values(), *room.users)} == set(shown)
    assert len(entries) == len(shown) + len(outsiders)
    assert await room.ada.call(client.Mute(user_id=them["Blocks"].id)), "a visible user can be muted"


@pytest.mark.parametrize("is_blocked", [False, True])
async def test_user_who_requests_friendship_becomes_visible(world: World, *, is_blocked: bool) -> None:
    ada, private = await world.users("Ada", "Private")
    one, other = await world.connect(ada), await world.connect(private, 1)
    await other.call(client.UpdateProfile(is_private=True))
    await other.call(client.RequestFriend(user_id=ada.id))
    if is_blocked:
        await other.call(client.Block(user_id=ada.id))
        assert await listed_profiles(one) == {}
    else:
        face = (await listed_profiles(one))[str(private.id)]
        assert face is not None
        assert face.name == "Private"


async def add_watched_user(room: Room, world: World) -> tuple[UserSession, Client]:
    """Return a user in the room whom Ada watches and sees, and their connection to the other worker."""
    who = await world.user("Xaver")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[who.id]))
    one = await world.connect(who, 1)
    await one.event(server.Conversations)
    watched = await room.ada.call(client.Watch(user_ids=[who.id]), server.PresenceList)
    if watched.presences[0].status == "offline":
        await room.ada.event(server.PresenceChanged, lambda event: event.presence.status == "online")
    return who, one


async def test_profile_change_is_sent_to_watchers_who_may_not_see_presence(room: Room, world: World) -> None:
    _, one = await add_watched_user(room, world)
    await one.call(client.Block(user_id=room.users[0].id))
    await room.ada.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
    await room.ada.synced()
    seen = len(room.ada.events)
    await one.call(client.SetPresence(status="busy", custom_status="Computing"))
    await one.call(client.UpdateProfile(display_name="X."))
    assert (await room.ada.event(server.UserUpdated)).user.display_name == "X."
    assert not [event for event in room.ada.events[seen:] if isinstance(event, server.PresenceChanged)]
    await one.call(client.Unblock(user_id=room.users[0].id))
    # The current presence is sent without a further change of it.
    await room.ada.event(server.PresenceChanged, lambda event: event.presence.custom_status == "Computing")
    await one.call(client.SetPresence(status="online"))
    await room.ada.event(server.PresenceChanged, lambda event: event.presence.status == "online", start=seen)


async def test_worker_detects_a_missed_block_without_a_new_user_version(room: Room, world: World) -> None:
    who, _ = await add_watched_user(room, world)
    ada = room.users[0].id
    before = await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', ada)
    await relationships.put(world.db, who.id, ada, RelationshipChange("block", "active"), who.id)
    online_users = world.workers[0].app.hub.online_users
    await online_users.compare(online_users.ids())
    await room.ada.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
    assert await world.db.fetchval('SELECT version FROM "user" WHERE id = $1', ada) == before
    again = await world.connect(room.users[0])
    assert again.ready.user_version == before


async def test_notification_does_not_contain_a_name_that_is_no_longer_visible(room: Room, world: World) -> None:
    who, one = await add_watched_user(room, world)
    key = client.RegisterPush(endpoint="https://push.example/1", p256dh=PUSH_POINT, auth="A" * 22)
    await room.ada.call(key)
    message_id = await sent(one, room.group)
    queued = (await push.due(world.db, [push.PushPage(room.group, push.FIRST, (message_id,))], 100)).posts
    assert [notice.sender.id for notice in await push.notices(world.db, queued)] == [who.id]
    await one.call(client.Leave(conversation_id=room.group))
    assert len(await push.notices(world.db, queued)) == 1, "the name is visible to all users"
    await one.call(client.UpdateProfile(is_private=True))
    assert await push.notices(world.db, queued) == []
