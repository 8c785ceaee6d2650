"""The table of privacy rules, cell by cell, and the frames that follow it."""

from itertools import product

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, UserId, uuid7
from protocol.privacy import MET, PUBLIC, RULES, SAME, STANDINGS, YES
from tests.world import UserSession, World, message, refused, sent

SETTINGS = ("allow_friend_requests", "show_online_status", "allow_adding")
SWITCHES = ("can_see_online_status", "can_send_messages", "can_see_profile")
RELATE = """
INSERT INTO user_relationship (from_user_id, to_user_id, type, status) VALUES ($1, $2, $3, $4)
ON CONFLICT ON CONSTRAINT user_relationship_key DO UPDATE SET status = excluded.status
"""


async def relate(world: World, viewer: UserId, target: UserId, standing: str) -> None:
    """Give two users the relationship `standing`, and no other."""
    await world.db.execute("DELETE FROM user_relationship; DELETE FROM conversation_participant")
    await relate_also(world, viewer, target, standing)


async def relate_also(world: World, viewer: UserId, target: UserId, standing: str) -> None:
    match standing:
        case "friend":
            await world.db.execute(RELATE, viewer, target, "friend", "accepted")
            await world.db.execute(RELATE, target, viewer, "friend", "accepted")
        case "together":
            about = await world.db.fetchval(
                "INSERT INTO conversation (type, title, created_by) VALUES ('group', 'G', $1) RETURNING id", viewer
            )
            for one in (viewer, target):
                await world.db.execute(
                    "INSERT INTO conversation_participant (conversation_id, user_id) VALUES ($1, $2)", about, one
                )
        case "blocking":
            await world.db.execute(RELATE, viewer, target, "block", "active")
        case "blocked":
            await world.db.execute(RELATE, target, viewer, "block", "active")


@pytest.mark.parametrize("before", ["stranger", "together"])
@pytest.mark.parametrize("standing", STANDINGS)
async def test_each_cell_of_the_privacy_table(world: World, standing: str, before: str) -> None:
    viewer, target = await world.users("Viewer", "Target")
    await relate(world, viewer.id, target.id, before)
    await relate_also(world, viewer.id, target.id, standing)
    # A row of an inactive relationship carries the switches.
    await world.db.execute(RELATE, target.id, viewer.id, "mute", "inactive")
    place = list(STANDINGS).index(standing)
    for is_private, *flags in product((False, True), repeat=1 + len(SETTINGS) + len(SWITCHES)):
        is_on = dict(zip((*SETTINGS, *SWITCHES), flags, strict=True))
        await world.db.execute(
            'UPDATE "user" SET is_private = $2, allow_friend_requests = $3, show_online_status = $4, allow_adding = $5'
            " WHERE id = $1", target.id, is_private, *(is_on[name] for name in SETTINGS),
        )  # fmt: skip
        await world.db.execute(
            "UPDATE user_relationship SET can_see_online_status = $2, can_send_messages = $3, can_see_profile = $4"
            " WHERE from_user_id = $1 AND type = 'mute'", target.id, *(is_on[name] for name in SWITCHES),
        )  # fmt: skip
        rows = await world.db.fetch(
            "SELECT action, may(action, $2, $3) FROM unnest($1::text[]) AS a (action)",
            list(RULES), viewer.id, target.id,
        )  # fmt: skip
        for action, answer in rows:
            rule = RULES[action]
            cell = rule.cells[place]
            if standing == "stranger" or cell == SAME:
                cell = rule.cells[list(STANDINGS).index(before)]
            expected = (
                (cell == YES or (cell == PUBLIC and not is_private) or (cell == MET and before == "together"))
                and (rule.setting is None or is_on[rule.setting])
                and (rule.switch is None or is_on[rule.switch])
            )
            assert answer is expected, (action, is_private, is_on)


async def test_only_the_profile_of_a_departed_user_may_be_visible(world: World) -> None:
    viewer, target = await world.users("Viewer", "Target")
    ask = "SELECT array_agg(action) FROM unnest($1::text[]) AS a (action) WHERE may(action, $2, $3)"

    async def allowed() -> list[str] | None:
        found: list[str] | None = await world.db.fetchval(ask, list(RULES), viewer.id, target.id)
        return found

    await relate(world, viewer.id, target.id, "together")
    await world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', target.id)
    assert await allowed() == ["see_face"]
    await relate(world, viewer.id, target.id, "friend")
    assert await allowed() is None
    await world.db.execute('UPDATE "user" SET is_deleted = true, erased_at = now() WHERE id = $1', target.id)
    assert await allowed() == ["see_face"]
    assert not await world.db.fetchval("SELECT may('see_face', $1, $2)", viewer.id, uuid7())
    assert not await world.db.fetchval("SELECT may('see_face', NULL, $1)", target.id)


# ------------------------------------------------------------------------------------------------ what frames do


async def test_block_ends_existing_relationships(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    one, other = await world.connect(ada), await world.connect(charles, 1)
    direct = (await one.call(client.CreateDirect(user_id=charles.id), server.OneConversation)).view.conversation.id
    await sent(one, direct)
    await other.call(client.Follow(user_id=ada.id))
    await other.call(client.RequestFriend(user_id=ada.id))
    await one.call(client.AnswerFriend(user_id=charles.id, accept=True))
    watched = await other.call(client.Watch(user_ids=[ada.id]), server.PresenceList)
    if watched.presences[0].status == "offline":  # her worker was not notified yet
        await other.event(server.PresenceChanged, lambda event: event.presence.status == "online")
    await one.call(client.SetPresence(status="online", custom_status="Here"))
    await other.event(server.PresenceChanged, lambda event: event.presence.custom_status == "Here")

    await one.call(client.Block(user_id=charles.id))
    gone = await other.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
    assert gone.presence.user_id == ada.id
    await one.call(client.SetPresence(status="busy"))
    await other.call(client.Ping())
    shown = [event for event in other.events if isinstance(event, server.PresenceChanged)]
    assert "busy" not in {event.presence.status for event in shown}
    for ended in (one, other):
        page = await ended.call(client.ListRelationships(kind="friend"), server.RelationshipPage)
        assert page.relationships == []
    for each, frame, code, path in (
        (other, message(direct), ErrorCode.FORBIDDEN, "conversation_id"),
        (one, message(direct), ErrorCode.FORBIDDEN, "conversation_id"),
        (other, client.GetProfile(user_id=ada.id), ErrorCode.NOT_FOUND, "user_id"),
        (other, client.RequestFriend(user_id=ada.id), ErrorCode.NOT_FOUND, "user_id"),
        (other, client.Follow(user_id=ada.id), ErrorCode.NOT_FOUND, "user_id"),
        (other, group_with(ada), ErrorCode.NOT_FOUND, "participants"),
        (one, group_with(charles), ErrorCode.NOT_FOUND, "participants"),
    ):
        with refused(code, path):
            await each.call(frame)
    # They still share the direct conversation, its history, and the names and pictures of its participants.
    assert len((await other.call(client.History(conversation_id=direct), server.MessagePage)).messages) == 1
    assert [face.id for face in (await other.call(client.GetUsers(user_ids=[ada.id]), server.UserList)).users] == [
        ada.id
    ]
    assert [face.id for face in (await other.call(client.SearchUsers(text="Ada"), server.UserList)).users] == [ada.id]
    # A blocked user is not informed, and may block, too.
    theirs = await other.call(client.ListRelationships(), server.RelationshipPage)
    assert [entry.relationship.kind for entry in theirs.relationships] == ["follow"], (
        "a relationship of their own, which only they end"
    )
    await other.call(client.Block(user_id=ada.id))
    await one.call(client.Unblock(user_id=charles.id))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await one.call(message(direct))
    await other.call(client.Unblock(user_id=ada.id))
    await sent(one, direct, "Again")


def group_with(who: UserSession) -> client.CreateGroup:
    return client.CreateGroup(conversation_id=ConversationId(uuid7()), title="Us", participants=[who.id])


async def test_private_profile_is_for_friends_and_name_for_shared_conversations(world: World) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    private, friend, stranger = await world.connect(ada), await world.connect(charles), await world.connect(mary, 1)
    await private.call(client.UpdateProfile(bio="Poetical science", location="London"))
    profile = await stranger.call(client.GetProfile(user_id=ada.id), server.OneProfile)
    assert (profile.profile.bio, profile.profile.location) == ("Poetical science", "London")
    await stranger.call(client.Watch(user_ids=[ada.id]))
    await private.call(client.UpdateProfile(is_private=True))
    gone = await stranger.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
    assert gone.presence.user_id == ada.id
    for frame in (client.GetProfile(user_id=ada.id), client.CreateDirect(user_id=ada.id)):
        with refused(ErrorCode.NOT_FOUND, "user_id"):
            await stranger.call(frame)
    assert (await stranger.call(client.SearchUsers(text="ada"), server.UserList)).users == []
    await friend.call(client.RequestFriend(user_id=ada.id))
    await private.call(client.AnswerFriend(user_id=charles.id, accept=True))
    assert (await friend.call(client.GetProfile(user_id=ada.id), server.OneProfile)).profile.bio == "Poetical science"
    about = await world.channel(private, is_public=True)
    await stranger.call(client.Join(conversation_id=about))
    assert [one.name for one in (await stranger.call(client.SearchUsers(text="ada"), server.UserList)).users] == ["Ada"]
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await stranger.call(client.GetProfile(user_id=ada.id))


async def test_switch_applies_to_one_user(world: World) -> None:
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    one, other, third = await world.connect(ada), await world.connect(charles, 1), await world.connect(mary, 1)
    hide = client.SetSwitches(user_id=charles.id, can_see_online_status=False, can_send_messages=False)
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await one.call(hide)
    await other.call(client.Watch(user_ids=[ada.id]))
    await third.call(client.Watch(user_ids=[ada.id]))
    await one.call(client.Follow(user_id=charles.id))
    set_now = await one.call(hide, server.OneRelationship)
    assert set_now.relationship.switches is not None
    assert set_now.relationship.switches.can_send_messages is False
    await other.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await other.call(client.CreateDirect(user_id=ada.id))
    await third.call(client.CreateDirect(user_id=ada.id))
    await one.call(client.SetPresence(status="busy"))
    await third.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    await one.call(client.UpdateProfile(show_online_status=False))
    await third.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
