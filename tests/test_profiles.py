"""Profiles: changes, events to watchers, search, and custom statuses that expire."""

from protocol import client, server
from protocol.errors import ErrorCode
from tests.world import World, refused


async def test_profile_change_is_sent_to_watchers_and_own_devices(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    phone, desk, other = await world.connect(ada), await world.connect(ada, 1), await world.connect(charles, 1)
    await other.call(client.Watch(user_ids=[ada.id]))
    frame = client.UpdateProfile(display_name="The Countess", image="https://example.org/ada.png", location="London")
    me = (await phone.call(frame, server.OneMe)).me
    assert (me.user.display_name, me.location, me.email[:4]) == ("The Countess", "London", "ada.")
    assert (await other.event(server.UserUpdated)).user == me.user
    assert (await desk.event(server.MeChanged)).me == me
    await phone.call(client.UpdateProfile(location=None))
    assert (await desk.call(client.GetMe(), server.OneMe)).me.location is None
    for bad, path in (
        (b'{"type": "update_profile", "website": "javascript:alert(1)"}', "website"),
        (b'{"type": "update_profile", "bio": "%s"}' % (b"x" * 501), "bio"),
        (b'{"type": "update_profile", "name": null}', "name"),
        (b'{"type": "update_profile", "is_admin": true}', "is_admin"),
    ):
        error = await phone.raw(bad.decode())
        assert (error.code, error.path) == (ErrorCode.INVALID, path)


async def test_users_are_found_by_prefixes_of_their_names(world: World) -> None:
    await world.users("Ada Lovelace", "Ada Byron", "Charles Babbage")
    one = await world.connect(await world.user("Mary"))
    for text, names in (
        ("ada", ["Ada Byron", "Ada Lovelace"]), ("LOVE ad", ["Ada Lovelace"]), ("babb", ["Charles Babbage"]),
        ("love & !babbage | x:*'", []), ("mary", []),
    ):  # fmt: skip
        found = await one.call(client.SearchUsers(text=text), server.UserList)
        assert [user.name for user in found.users] == names
    limited = await one.call(client.SearchUsers(text="ada", limit=1), server.UserList)
    assert len(limited.users) == 1
    with refused(ErrorCode.INVALID, "text"):
        await one.call(client.SearchUsers(text="&|!"))


async def test_custom_status_expires(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    phone, other = await world.connect(ada), await world.connect(charles, 1)
    watched = await other.call(client.Watch(user_ids=[ada.id]), server.PresenceList)
    assert watched.presences[0].custom_status is None
    # A client that sets the status that `get_me` returns for a user without one hides nobody.
    mine = (await phone.call(client.GetMe(), server.OneMe)).me.status
    assert mine == "online"
    await phone.call(client.SetPresence(status=mine))
    assert (await phone.call(client.GetMe(), server.OneMe)).me.status == mine
    await phone.call(client.SetPresence(status="busy", custom_status="Calculating", custom_status_seconds=60))
    seen = await other.event(server.PresenceChanged, lambda event: event.presence.custom_status == "Calculating")
    assert seen.presence.status == "busy"
    start = len(other.events)
    assert (await phone.call(client.GetMe(), server.OneMe)).me.custom_status_until is not None
    await world.db.execute('UPDATE "user" SET custom_status_until = now()')
    await world.workers[0].app.presence.expire_statuses()
    over = await other.event(server.PresenceChanged, lambda event: event.presence.custom_status is None, start=start)
    assert over.presence.status == "busy"
    assert (await phone.call(client.GetMe(), server.OneMe)).me.custom_status is None
