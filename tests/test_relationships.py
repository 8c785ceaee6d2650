"""Relationships: requested, answered and ended, with events on every device; and their list."""

import asyncio

import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.errors import ErrorCode
from protocol.ids import UserId, uuid7
from protocol.values import Relationship
from prove.client import Client
from server.queries import approaches
from tests.world import UserSession, World, refused, sent


class Pair:
    """Two users on two workers."""

    def __init__(self, ada: UserSession, charles: UserSession, one: Client, other: Client) -> None:
        self.ada, self.charles, self.one, self.other = ada, charles, one, other

    async def kinds(self, of: Client) -> list[tuple[str, str, bool]]:
        page = await of.call(client.ListRelationships(limit=100), server.RelationshipPage)
        found = [entry.relationship for entry in page.relationships]
        return sorted((one.kind, one.status, one.is_outgoing) for one in found)


@pytest.fixture
async def pair(world: World) -> Pair:
    ada, charles = await world.users("Ada", "Charles")
    return Pair(ada, charles, await world.connect(ada), await world.connect(charles, 1))


async def told(one: Client, status: str) -> Relationship:
    event = await one.event(server.RelationshipChanged, lambda event: event.relationship.status == status)
    return event.relationship


async def test_friend_request_is_accepted(pair: Pair) -> None:
    await pair.one.call(client.RequestFriend(user_id=pair.charles.id, message="We met at the fair"))
    asked = await told(pair.other, "pending")
    assert (asked.user_id, asked.is_outgoing, asked.request_message) == (pair.ada.id, False, "We met at the fair")
    answered = await pair.other.call(
        client.AnswerFriend(user_id=pair.ada.id, accept=True, message="So we did"), server.OneRelationship
    )
    assert answered.relationship.accepted_at is not None
    assert (await told(pair.one, "accepted")).user_id == pair.charles.id
    for one in (pair.one, pair.other):
        assert await pair.kinds(one) == [("friend", "accepted", False), ("friend", "accepted", True)]
    await pair.one.call(client.Unfriend(user_id=pair.charles.id))
    await told(pair.other, "inactive")
    assert await pair.kinds(pair.other) == []


async def test_rejected_user_cannot_request_again(pair: Pair) -> None:
    await pair.one.call(client.RequestFriend(user_id=pair.charles.id))
    await pair.other.call(client.AnswerFriend(user_id=pair.ada.id, accept=False, message="Not now"))
    assert (await told(pair.one, "rejected")).response_message == "Not now"
    with refused(ErrorCode.CONFLICT, "user_id"):
        await pair.one.call(client.RequestFriend(user_id=pair.charles.id))
    await pair.other.call(client.RequestFriend(user_id=pair.ada.id))
    await pair.one.call(client.AnswerFriend(user_id=pair.charles.id, accept=True))
    assert ("friend", "accepted", True) in await pair.kinds(pair.one)


async def test_friend_request_can_be_withdrawn(pair: Pair) -> None:
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await pair.one.call(client.Unfriend(user_id=pair.charles.id))
    await pair.one.call(client.RequestFriend(user_id=pair.charles.id))
    await pair.one.call(client.Unfriend(user_id=pair.charles.id))
    await told(pair.other, "inactive")
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await pair.other.call(client.AnswerFriend(user_id=pair.ada.id, accept=True))


async def test_mutual_requests_make_a_friendship(pair: Pair) -> None:
    await asyncio.gather(
        pair.one.call(client.RequestFriend(user_id=pair.charles.id)),
        pair.other.call(client.RequestFriend(user_id=pair.ada.id)),
    )
    assert await pair.kinds(pair.one) == [("friend", "accepted", False), ("friend", "accepted", True)]


async def test_user_who_allows_no_requests_gets_none(pair: Pair) -> None:
    await pair.other.call(client.UpdateProfile(allow_friend_requests=False))
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await pair.one.call(client.RequestFriend(user_id=pair.charles.id))


async def test_follow_is_visible_to_the_other_user_and_mute_is_not(pair: Pair) -> None:
    await pair.one.call(client.Follow(user_id=pair.charles.id))
    await pair.one.call(client.Mute(user_id=pair.charles.id))
    assert (await told(pair.other, "active")).kind == "follow"
    assert await pair.kinds(pair.other) == [("follow", "active", False)]
    assert await pair.kinds(pair.one) == [("follow", "active", True), ("mute", "active", True)]
    await pair.one.call(client.Unmute(user_id=pair.charles.id))
    await pair.one.call(client.Unfollow(user_id=pair.charles.id))
    assert await pair.kinds(pair.one) == []


async def test_relationship_needs_another_existing_user(pair: Pair) -> None:
    ends = (client.Unblock, client.Unfollow, client.Unmute, client.Unfriend)
    for kind in (client.RequestFriend, client.Block, client.Follow, client.Mute, *ends):
        frames: list[tuple[Frame, ErrorCode]] = [
            (kind(user_id=pair.ada.id), ErrorCode.INVALID), (kind(user_id=UserId(uuid7())), ErrorCode.NOT_FOUND),
        ]  # fmt: skip
        for frame, code in frames:
            with refused(code, "user_id"):
                await pair.one.call(frame)


async def test_list_has_the_number_of_direct_messages(pair: Pair) -> None:
    await pair.one.call(client.Follow(user_id=pair.charles.id))
    made = await pair.one.call(client.CreateDirect(user_id=pair.charles.id), server.OneConversation)
    for one in (pair.one, pair.other, pair.one):
        await sent(one, made.view.conversation.id)
    page = await pair.one.call(client.ListRelationships(), server.RelationshipPage)
    (entry,) = page.relationships
    assert entry.user is not None
    assert (entry.user.name, entry.interaction_count) == ("Charles", 3)
    assert entry.last_interaction_at is not None


async def test_relationships_are_listed_in_pages(world: World, pair: Pair) -> None:
    others = [await world.user(f"Person {number}") for number in range(5)]
    for other in others:
        await pair.one.call(client.Follow(user_id=other.id))
    found: list[UserId] = []
    after = None
    while True:
        page = await pair.one.call(
            client.ListRelationships(kind="follow", is_outgoing=True, limit=2, after=after), server.RelationshipPage
        )
        found += [entry.relationship.user_id for entry in page.relationships]
        if (after := page.after) is None:
            break
    assert sorted(found) == sorted(other.id for other in others)
    none = await pair.one.call(client.ListRelationships(kind="follow", is_outgoing=False), server.RelationshipPage)
    assert none.relationships == []


async def test_repeated_approaches_to_a_user_are_limited(
    pair: Pair, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Withdrawn requests, follows and invitations are counted per pair and day, as are blocks, mutes and switches.

    Over the limit they cause no events. A frame that is refused or changes nothing does not wait for the other's row,
    nor does a mute.
    """
    monkeypatch.setattr(approaches, "MAX_APPROACHES_A_DAY", 3)
    them = pair.charles.id
    about = await world.channel(pair.one)
    app = world.workers[0].app
    app._services = msgspec.structs.replace(app._services, anyone_adds=False)  # noqa: SLF001
    owner = await world.connect(pair.ada)
    clock = 'SELECT version + hidden_version FROM "user" WHERE id = $1'
    ways: list[tuple[Frame, Frame]] = [
        (client.RequestFriend(user_id=them), client.Unfriend(user_id=them)),
        (client.Follow(user_id=them), client.Unfollow(user_id=them)),
        (
            client.Invite(conversation_id=about, participants=[them]),
            client.RemoveParticipant(conversation_id=about, user_id=them),
        ),
        (
            client.SetSwitches(user_id=them, can_see_profile=False),
            client.SetSwitches(user_id=them, can_see_profile=True),
        ),
        (client.Mute(user_id=them), client.Unmute(user_id=them)),
        (client.Block(user_id=them), client.Unblock(user_id=them)),
    ]
    for begin, end in ways:
        for _ in range(3):
            await owner.call(begin)
            await owner.call(end)
        before = await world.db.fetchval(clock, them)
        answer = await owner.ask(begin)
        assert isinstance(answer, server.Error), begin
        assert answer.code == ErrorCode.RATE_LIMITED
        assert answer.retry_after_ms is not None
        assert 80_000_000 < answer.retry_after_ms <= 86_400_000
        # Ended relationships, and bans of users who are gone, cause no events.
        await owner.ask(end)
        for frame in (client.RemoveParticipant(conversation_id=about, user_id=them, ban=True),
                      client.Unban(conversation_id=about, user_id=them)):  # fmt: skip
            await owner.ask(frame)
        assert await world.db.fetchval(clock, them) == before
    # Other users have their own count, and the count ends after a day.
    mary = await world.connect(await world.user("Mary"))
    await mary.call(client.Follow(user_id=them))
    async with world.db.transaction(), asyncio.timeout(5):
        await world.db.execute('SELECT FROM "user" WHERE id = $1 FOR NO KEY UPDATE', them)
        for each in (frame for way in ways for frame in way):
            await owner.ask(each)
        for repeated in (client.Mute(user_id=them), client.Unmute(user_id=them), client.Follow(user_id=them)):
            await mary.call(repeated)
    await world.db.execute("UPDATE approach SET began_at = began_at - interval '1 day'")
    await owner.call(ways[1][0])
    await world.workers[0].app.background.clear_expired()
    assert await world.db.fetchval("SELECT count(*) FROM approach") == 1
