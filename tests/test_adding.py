"""Strangers are invited instead of added: frames, their replies, and changes while a frame waits for a lock."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.codec import decode_server, encode
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, UserId, uuid7
from protocol.limits import MAX_INVITATIONS, MAX_INVITATIONS_OF_PAIR, MAX_INVITATIONS_SENT
from protocol.server import Added, Error, OneConversation, Reply
from protocol.values import Participant, User
from prove.client import Client
from prove.truth import recount
from server.context import Context
from server.core.config import Settings
from server.db.database import Db
from server.gateway.dispatch import Rate
from server.handlers import conversations
from server.queries import relationships, users, welcome
from server.queries.relationships import RelationshipChange
from server.routes import ROUTES
from tests.test_may_send import let_all_wait, waiting
from tests.test_security import ROOT, sources
from tests.world import UserSession, World, http_client, refused

ENTERED = "SELECT count(*) FROM conversation_participant WHERE user_id = $1"


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers with the default of OPENCHAT_ADD_PEOPLE, and with enough database connections for waiting frames."""
    settings = msgspec.structs.replace(settings, add_people=Settings().add_people, database_connections=8)
    async with World(settings) as world:
        yield world


def group_of(*them: UserSession) -> client.CreateGroup:
    ids = [one.id for one in them]
    return client.CreateGroup(conversation_id=ConversationId(uuid7()), title="Engines", participants=ids)


def adding(about: ConversationId, *them: UserSession) -> client.AddParticipants:
    return client.AddParticipants(conversation_id=about, participants=[one.id for one in them])


def inviting(about: ConversationId, *them: UserSession) -> client.Invite:
    return client.Invite(conversation_id=about, participants=[one.id for one in them])


async def statuses(world: World, about: ConversationId) -> dict[UserId, str]:
    query = "SELECT user_id, status FROM conversation_participant WHERE conversation_id = $1"
    return {row[0]: row[1] for row in await world.db.fetch(query, about)}


async def listed(one: Client) -> tuple[set[ConversationId], set[ConversationId]]:
    """Return the conversations and the invitations of a user."""
    page = await one.call(client.ListConversations(limit=100), server.ConversationPage)
    asked = await one.call(client.ListInvitations(), server.InvitationList)
    return {view.conversation.id for view in page.conversations}, {one.conversation_id for one in asked.invitations}


# ---------------------------------------------------------------------------------------------- adding or inviting


async def test_stranger_cannot_add_a_user_to_any_conversation(world: World) -> None:
    """The victim is in no group, and has five invitations."""
    stranger, victim = await world.users("Stranger", "Victim")
    one, other = await world.connect(stranger), await world.connect(victim, 1)
    for _ in range(3):
        await one.call(group_of(victim))
    about = await world.channel(one)
    await one.call(adding(about, victim))
    # A direct conversation or a common channel does not make them friends.
    await one.call(client.CreateDirect(user_id=victim.id))
    public = await world.channel(one, is_public=True)
    await other.call(client.Join(conversation_id=public))
    await one.call(group_of(victim))
    entered, asked = await listed(other)
    assert (len(entered), len(asked)) == (2, 5)
    assert public in entered
    assert await recount(world.db) == []


@pytest.mark.parametrize("is_http", [False, True], ids=["socket", "http"])
async def test_reply_lists_added_and_invited_users(world: World, *, is_http: bool) -> None:
    ada, friend, stranger, mary = await world.users("Ada", "Friend", "Stranger", "Mary")
    for one in (friend, mary):
        await world.befriend(ada, one)
    owner, theirs, others = await world.connect(ada), await world.connect(friend), await world.connect(stranger, 1)

    async def call(frame: Frame) -> Any:
        if not is_http:
            return await owner.call(frame)
        async with http_client(world.url) as http:
            headers = {"authorization": f"Bearer {ada.token}"}
            reply = decode_server((await http.post("/v1/call", content=encode(frame), headers=headers)).content)
            assert isinstance(reply, Reply), reply
            return reply.result

    make = group_of(stranger, friend)
    made = await call(make)
    assert (made.added, made.invited) == ([friend.id], [stranger.id])
    assert made.view.conversation.participant_count == 2
    about = made.view.conversation.id
    await theirs.event(server.ConversationJoined, lambda event: event.view.conversation.id == about)
    invitation = (await others.event(server.Invited)).invitation
    assert (invitation.conversation_id, invitation.invited_by, invitation.role) == (about, ada.id, "member")
    # Repeat the frame, as if the reply was lost.
    assert await call(make) == made
    assert await statuses(world, about) == {ada.id: "active", friend.id: "active", stranger.id: "invited"}

    elsewhere = await world.channel(owner)
    frame = client.AddParticipants(
        conversation_id=elsewhere, participants=[stranger.id, mary.id, friend.id, ada.id], role="moderator"
    )
    for _ in range(2):
        assert await call(frame) == Added(added=[mary.id, friend.id], invited=[stranger.id])
    assert (await others.event(server.Invited, lambda event: event.invitation.conversation_id == elsewhere)
        ).invitation.role == "moderator"  # fmt: skip
    joined = await others.call(client.Join(conversation_id=elsewhere), OneConversation)
    assert joined.view.me.role == "moderator"
    assert (await call(frame)).added == [stranger.id, mary.id, friend.id]
    assert await recount(world.db) == []


async def test_former_participant_is_invited_again_and_a_friend_is_added_again(world: World) -> None:
    ada, *them = await world.users("Ada", "Left", "Removed", "Declined", "Friend")
    owner = await world.connect(ada)
    about = await world.channel(owner, is_public=True)
    left, removed, declined, friend = [await world.connect(one, 1) for one in them]
    for one in (left, removed, friend):
        await one.call(client.Join(conversation_id=about))
    await owner.call(inviting(about, them[2]))
    await declined.call(client.Decline(conversation_id=about))
    for one in (left, friend):
        await one.call(client.Leave(conversation_id=about))
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=them[1].id))
    await world.befriend(ada, them[3])
    reply = await owner.call(adding(about, *them), Added)
    assert reply == Added(added=[them[3].id], invited=[one.id for one in them[:3]])
    for one in (left, removed, declined):
        await one.event(server.Invited)
    assert await recount(world.db) == []


async def test_friend_with_a_pending_invitation_is_added(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner, other = await world.connect(ada), await world.connect(charles, 1)
    about = await world.channel(owner)
    await owner.call(adding(about, charles))
    await other.call(client.RequestFriend(user_id=ada.id))
    await owner.call(client.AnswerFriend(user_id=charles.id, accept=True))
    assert await owner.call(adding(about, charles), Added) == Added(added=[charles.id])
    await other.event(server.ConversationJoined)
    # The invitation is gone on all devices.
    assert await listed(other) == ({about}, set())


async def test_friend_who_disallows_adding_is_invited(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.befriend(ada, charles)
    owner, other = await world.connect(ada), await world.connect(charles, 1)
    me = (await other.call(client.UpdateProfile(allow_adding=False), server.OneMe)).me
    assert me.allow_adding is False
    assert (await owner.call(group_of(charles), OneConversation)).invited == [charles.id]
    await other.call(client.UpdateProfile(allow_adding=True))
    assert (await owner.call(group_of(charles), OneConversation)).added == [charles.id]


async def test_with_add_people_anyone_users_add_everyone_whom_they_may_invite(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, add_people="anyone")) as world:
        ada, charles, private, blocking = await world.users("Ada", "Charles", "Private", "Blocking")
        owner = await world.connect(ada)
        await (await world.connect(charles)).call(client.UpdateProfile(allow_adding=False))
        await (await world.connect(private)).call(client.UpdateProfile(is_private=True))
        await (await world.connect(blocking)).call(client.Block(user_id=ada.id))
        made = await owner.call(group_of(charles), OneConversation)
        assert (made.added, made.invited) == ([charles.id], [])
        for one in (private, blocking):
            with refused(ErrorCode.NOT_FOUND, "participants"):
                await owner.call(adding(made.view.conversation.id, one))


def test_add_people_has_two_values() -> None:
    assert Settings().add_people == "by_privacy"
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"add_people": "everyone"}, Settings)


def test_only_three_statements_insert_participants() -> None:
    """A new statement must check who may be added, too. Imports use `load_rows`."""
    found = []
    for path in sources("server"):
        for name, _ in re.findall(r'^([A-Z_]+) = f?"""(?:(?!""").)*?(INSERT INTO conversation_participant)',
                                  path.read_text(), re.DOTALL | re.MULTILINE):  # fmt: skip
            found.append(f"{path.relative_to(ROOT)}: {name}")
        assert path.read_text().count("INSERT INTO conversation_participant") == sum(
            one.startswith(f"{path.relative_to(ROOT)}:") for one in found
        )
    assert found == [
        "server/queries/creation.py: CREATE",
        "server/queries/invitations.py: INVITE",
        "server/queries/participants.py: ADD",
    ]


# ------------------------------------------------------------------------------------------------------- privacy


@pytest.mark.parametrize("add_people", ["by_privacy", "anyone"])
async def test_blocking_user_cannot_be_distinguished_from_a_missing_one(settings: Settings, add_people: str) -> None:
    """Users who block, have switched messages off, are private, deactivated or do not exist cause one error.

    The error is the same for all frames, and whether or not the caller shares a group with them.
    """
    async with World(msgspec.structs.replace(settings, add_people=add_people)) as world:
        names = ("Blocking", "Switched", "Private", "Deactivated")
        ada, host, *them = await world.users("Ada", "Host", *names, *names)
        owner = await world.connect(ada)
        shared = await world.channel(await world.connect(host), is_public=True)
        await owner.call(client.Join(conversation_id=shared))
        for blocking, switched, private, deactivated in (them[:4], them[4:]):
            devices = [await world.connect(one, 1) for one in (blocking, switched, private, deactivated)]
            if blocking is them[4]:
                for device in devices:
                    await device.call(client.Join(conversation_id=shared))
            await devices[0].call(client.Block(user_id=ada.id))
            await devices[1].call(client.Mute(user_id=ada.id))
            await devices[1].call(client.SetSwitches(user_id=ada.id, can_send_messages=False))
            await devices[2].call(client.UpdateProfile(is_private=True))
            await world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', deactivated.id)
        nobody = UserSession(UserId(uuid7()), "Nobody", "")
        about = await world.channel(owner)
        answers = set()
        for one in (*them, nobody):
            for frame in (group_of(one), adding(about, one), inviting(about, one), group_of(host, one)):
                answer = await owner.ask(frame)
                assert isinstance(answer, Error), one.name
                answers.add(msgspec.json.encode(msgspec.structs.replace(answer, re=None)))
        assert len(answers) == 1
        assert await statuses(world, about) == {ada.id: "active"}


async def test_block_does_not_change_a_pending_invitation(world: World) -> None:
    ada, silent, blocking = await world.users("Ada", "Silent", "Blocking")
    owner = await world.connect(ada)
    about = (await owner.call(group_of(silent, blocking), OneConversation)).view.conversation.id

    async def invited() -> list[Participant]:
        frame = client.ListParticipants(conversation_id=about, status="invited")
        return [entry.participant for entry in (await owner.call(frame, server.ParticipantPage)).participants]

    before = await invited()
    await owner.synced()
    seen = len(owner.events)
    await (await world.connect(blocking, 1)).call(client.Block(user_id=ada.id))
    assert await invited() == before
    await owner.synced()
    assert [event for event in owner.events[seen:] if hasattr(event, "conversation_id")] == []


# --------------------------------------------------------------------------------- changes while a frame waits


async def blocking(db: Db, caller: UserId, them: UserId) -> None:
    await relationships.end(db, them, caller, "friend")
    await relationships.put(db, them, caller, RelationshipChange("block", "active"), them)


async def unfriending(db: Db, caller: UserId, them: UserId) -> None:
    await relationships.end(db, them, caller, "friend")


async def switching_off(db: Db, caller: UserId, them: UserId) -> None:
    await relationships.switch(db, them, caller, {"can_send_messages": False})


async def disallowing_adding(db: Db, _: UserId, them: UserId) -> None:
    await users.update(db, them, {"allow_adding": False})


async def hiding(db: Db, caller: UserId, them: UserId) -> None:
    await relationships.end(db, them, caller, "friend")
    await users.update(db, them, {"is_private": True})


CHANGES: dict[Callable[[Db, UserId, UserId], Awaitable[None]], bool] = {
    blocking: False,
    switching_off: False,
    hiding: False,
    unfriending: True,
    disallowing_adding: True,
}
"""Changes by a friend, and whether the friend may be invited afterwards."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
async def test_permission_is_checked_after_waiting_for_the_lock(
    world: World, change: Callable[[Any, UserId, UserId], Awaitable[None]]
) -> None:
    ada, friend = await world.users("Ada", "Friend")
    await world.befriend(ada, friend)
    owner = await world.connect(ada)
    first, second = await world.channel(owner), await world.channel(owner)
    frames: list[Frame] = [
        group_of(friend), adding(first, friend), inviting(second, friend), client.CreateDirect(user_id=friend.id),
    ]  # fmt: skip
    devices = [await world.connect(ada, number % 2) for number in range(len(frames))]
    let_all_wait(world)
    async with world.db.transaction():
        # The lock of the handlers of relationships and of `update_profile`.
        await relationships.lock(world.db, ada.id, friend.id)
        answers = [asyncio.create_task(one.ask(frame)) for one, frame in zip(devices, frames, strict=True)]
        await waiting(world, len(frames))
        await change(world.db, ada.id, friend.id)
    created, added, invited, direct = [
        answer.code if isinstance(answer, Error) else answer.result for answer in await asyncio.gather(*answers)
    ]
    rows = await world.db.fetch(
        "SELECT p.status, c.type FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id"
        " WHERE p.user_id = $1", friend.id,
    )  # fmt: skip
    if CHANGES[change]:
        assert isinstance(created, OneConversation)
        assert (created.added, created.invited) == ([], [friend.id])
        assert added == Added(invited=[friend.id])
        assert sorted(map(tuple, rows)) == [
            ("active", "direct"), ("invited", "channel"), ("invited", "channel"), ("invited", "group"),
        ]  # fmt: skip
    else:
        assert {created, added, invited, direct} == {ErrorCode.NOT_FOUND}
        assert rows == []


async def test_user_is_not_added_or_invited_after_their_block_was_acknowledged(world: World) -> None:
    ada, friend = await world.users("Ada", "Friend")
    other = await world.connect(friend, 1)
    owners = [await world.connect(ada, number % 2) for number in range(4)]
    about = [await world.channel(owners[0]) for _ in range(20)]

    async def keep_adding(one: Client, kind: Callable[[ConversationId, UserSession], Frame]) -> None:
        for channel in about:
            answer = await one.ask(kind(channel, friend))
            if isinstance(answer, Error):
                assert answer.code is ErrorCode.NOT_FOUND
                return

    kinds: list[Callable[[ConversationId, UserSession], Frame]] = [
        adding, inviting, lambda _, who: group_of(who), adding,
    ]  # fmt: skip
    for wait in range(3):
        await world.db.execute("DELETE FROM user_relationship")
        await world.db.execute("DELETE FROM conversation_participant WHERE user_id = $1", friend.id)
        await world.befriend(ada, friend)
        working = [asyncio.create_task(keep_adding(*pair)) for pair in zip(owners, kinds, strict=True)]
        for _ in range(wait):
            await other.call(client.Ping())
        await other.call(client.Block(user_id=ada.id))
        there = await world.db.fetchval(ENTERED, friend.id)
        await asyncio.gather(*working)
        assert await world.db.fetchval(ENTERED, friend.id) == there


# ------------------------------------------------------------------------------------------------------------ bounds

INVITATIONS = """
WITH them AS (
    INSERT INTO "user" (name, email)
    SELECT 'Crowd', gen_random_uuid() || '@example.org' FROM generate_series(1, $1::int) RETURNING id
), made AS (
    INSERT INTO conversation (type, title, created_by, version, settings_version, created_at)
    SELECT 'channel', 'Spam', coalesce($3, id), 1, 1, now() - interval '2 days' FROM them RETURNING id, created_by
), numbered AS (SELECT id, row_number() OVER () AS n FROM them)
INSERT INTO conversation_participant (conversation_id, user_id, status, invited_by, version)
SELECT m.id, coalesce($2, t.id), 'invited', m.created_by, 1
FROM (SELECT *, row_number() OVER () AS n FROM made) m JOIN numbered t ON t.n = m.n
"""


async def add_invitations(
    world: World, count: int, to: UserSession | None = None, sender: UserSession | None = None
) -> None:
    """Insert pending invitations to one user or from one user, each to a different conversation."""
    await world.db.execute(INVITATIONS, count, None if to is None else to.id, None if sender is None else sender.id)


def codes(answers: list[Any]) -> list[ErrorCode | None]:
    return [answer.code if isinstance(answer, Error) else None for answer in answers]


async def test_pending_invitations_to_a_user_are_bounded(world: World) -> None:
    victim, friend = await world.users("Victim", "Friend")
    other = await world.connect(victim, 1)
    await add_invitations(world, MAX_INVITATIONS - 1, to=victim)
    strangers = [await world.connect(await world.user("Stranger"), number % 2) for number in range(6)]
    channels = [await world.channel(one) for one in strangers]
    frames: list[Frame] = [
        kind(channel, victim) for kind, channel in zip([adding, inviting] * 3, channels, strict=True)
    ]
    frames[4:] = [group_of(victim), group_of(victim)]
    answers = await asyncio.gather(*(one.ask(frame) for one, frame in zip(strangers, frames, strict=True)))
    assert sorted(map(str, codes(list(answers)))) == sorted([str(None), *[str(ErrorCode.CONFLICT)] * 5])
    (place,) = [number for number, code in enumerate(codes(list(answers))) if code is None]
    # A repeated invitation does not count.
    assert codes([await strangers[place].ask(frames[place])]) == [None]
    late = (place + 1) % 6
    assert codes([await strangers[late].ask(frames[late])]) == [ErrorCode.CONFLICT]

    # Invitations of strangers do not prevent those of friends.
    await world.befriend(victim, friend)
    known = await world.connect(friend)
    about = await world.channel(known)
    await known.call(inviting(about, victim))
    _, asked = await listed(other)
    assert len(asked) == MAX_INVITATIONS
    assert about in asked
    # An answered invitation frees its place.
    for one in list(asked - {about})[:2]:
        await other.call(client.Decline(conversation_id=one))
    assert codes([await strangers[late].ask(frames[late])]) == [None]


async def test_one_user_cannot_use_up_the_invitations_of_another(world: World) -> None:
    spammer, victim, honest = await world.users("Spammer", "Victim", "Honest")
    one = await world.connect(spammer)
    answers = [await one.ask(group_of(victim)) for _ in range(MAX_INVITATIONS_OF_PAIR + 2)]
    assert codes(answers) == [None] * MAX_INVITATIONS_OF_PAIR + [ErrorCode.CONFLICT] * 2
    assert codes([await (await world.connect(honest)).ask(group_of(victim))]) == [None]


async def test_pending_invitations_from_a_user_are_bounded(world: World) -> None:
    spammer, *them = await world.users("Spammer", *["Victim"] * 6)
    await add_invitations(world, MAX_INVITATIONS_SENT - 1, sender=spammer)
    devices = [await world.connect(spammer, number % 2) for number in range(6)]
    about = await world.channel(devices[0])
    frames: list[Frame] = [
        adding(about, them[0]), inviting(about, them[1]), group_of(them[2]),
        adding(about, them[3]), inviting(about, them[4]), group_of(them[5]),
    ]  # fmt: skip
    answers = await asyncio.gather(*(one.ask(frame) for one, frame in zip(devices, frames, strict=True)))
    assert sorted(map(str, codes(list(answers)))) == sorted([str(None), *[str(ErrorCode.CONFLICT)] * 5])
    assert len({answer.message for answer in answers if isinstance(answer, Error)}) == 1
    # Invitations to deleted conversations do not count, since users can neither join nor withdraw them.
    await world.db.execute("UPDATE conversation SET is_deleted = true, is_active = false WHERE title = 'Spam'")
    assert codes([await devices[0].ask(group_of(*them))]) == [None]


# -------------------------------------------------------------------------------------------------------------- cost


async def test_creating_a_group_of_strangers_takes_as_many_statements_as_one_of_friends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, friend, stranger = await world.users("Ada", "Friend", "Stranger")
    await world.befriend(ada, friend)
    session = await world.db.fetchval("SELECT id FROM session WHERE user_id = $1", ada.id)
    services = world.workers[0].app._services  # noqa: SLF001
    context = Context(services=services, user=User(id=ada.id, name="Ada"), session_id=session)
    task, asked = asyncio.current_task(), 0
    execute = asyncpg.Connection._execute  # type: ignore[attr-defined]  # noqa: SLF001

    async def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += asyncio.current_task() is task
        return await execute(self, *arguments, **options)

    monkeypatch.setattr(asyncpg.Connection, "_execute", counted)
    took = []
    for one in (friend, stranger):
        counts = []
        for _ in range(3):  # opening a connection would take statements, too
            asked = 0
            made = await conversations.create_group(context, group_of(one))
            assert (made.added, made.invited) == (([one.id], []) if one is friend else ([], [one.id]))
            counts.append(asked)
        took.append(min(counts))
    assert took[0] == took[1] > 0


async def test_group_with_a_taken_id_is_refused_in_the_same_words_for_all_participants(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(welcome, "MAX_INVITATIONS_OF_PAIR", 1)
    kinds = ("Active", "Invited", "Declined", "Banned", "Gone", "Elsewhere")
    them = dict(zip(kinds, await world.users(*kinds), strict=True))
    ada, member, barred, outsider = await world.users("Ada", "Member", "Barred", "Outsider")
    owner, *attackers = [await world.connect(who) for who in (ada, member, barred, outsider)]
    for who in (them["Active"], them["Banned"], them["Gone"], member, barred):
        await world.befriend(ada, who)
    about = group_of(*(one for kind, one in them.items() if kind != "Elsewhere"), member, barred)
    await owner.call(about)
    await (await world.connect(them["Declined"])).call(client.Decline(conversation_id=about.conversation_id))
    await (await world.connect(them["Gone"])).call(client.Leave(conversation_id=about.conversation_id))
    for who in (them["Banned"], barred):
        await owner.call(client.RemoveParticipant(conversation_id=about.conversation_id, user_id=who.id, ban=True))
    named = [[one.id] for one in them.values()] + [[UserId(uuid7())]]
    for attacker in attackers:
        # Each user has an invitation of the attacker, so that one more would exceed the limit.
        await attacker.call(group_of(*them.values()))
        answers = [await attacker.ask(msgspec.structs.replace(about, participants=ids)) for ids in named]
        assert [(one.code, one.path) for one in answers if isinstance(one, Error)] == [
            (ErrorCode.CONFLICT, "conversation_id")
        ] * len(named)
        assert len({one.message for one in answers if isinstance(one, Error)}) == 1


async def test_repeated_create_group_returns_what_its_creator_may_see_now(world: World) -> None:
    kinds = ("Active", "Invited", "Declined", "Banned", "Elsewhere")
    them = dict(zip(kinds, await world.users(*kinds), strict=True))
    ada, heir, friend, stranger = await world.users("Ada", "Heir", "Friend", "Stranger")
    maker, other = await world.connect(ada), await world.connect(heir)
    for who in (heir, friend):
        await world.befriend(ada, who)
    frame = group_of(heir, friend, stranger)
    first = await maker.call(frame, OneConversation)
    assert (first.added, first.invited) == ([heir.id, friend.id], [stranger.id])
    again = await maker.call(frame, OneConversation)
    assert (again.added, again.invited) == (first.added, first.invited), "repeats the lost reply"
    named = [msgspec.structs.replace(frame, participants=[one.id]) for one in them.values()]
    assert {one.code for each in named if isinstance(one := await maker.ask(each), Error)} == {ErrorCode.CONFLICT}
    where: dict[str, Any] = {"conversation_id": frame.conversation_id}
    await maker.call(client.TransferOwnership(**where, user_id=heir.id))
    await other.call(inviting(frame.conversation_id, *(one for kind, one in them.items() if kind != "Elsewhere")))
    await (await world.connect(them["Active"])).call(client.Join(**where))
    await (await world.connect(them["Declined"])).call(client.Decline(**where))
    await other.call(client.RemoveParticipant(**where, user_id=them["Banned"].id, ban=True))
    answers = [await maker.ask(each) for each in named]
    assert [isinstance(one, Error) for one in answers] == [False, False, False, False, True], "admins see all"
    await other.call(client.SetRole(**where, user_id=ada.id, role="member"))
    told = [await maker.call(each, OneConversation) for each in named]
    assert [(one.added, one.invited) for one in told] == [([them["Active"].id], [])] + [([], [])] * 4
    own = await maker.call(frame, OneConversation)
    assert (own.added, own.invited) == (first.added, first.invited), "the creator still sees whom they invited"
    await maker.call(client.Leave(**where))
    for each in (frame, *named, msgspec.structs.replace(frame, title="Other")):
        with refused(ErrorCode.NOT_FOUND, "conversation_id"):
            await maker.call(each)


async def test_refused_frame_does_not_lock_the_users_it_names(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames that name users, except those that only read and those about participants of a conversation."""
    monkeypatch.setattr(welcome, "MAX_INVITATIONS_OF_PAIR", 1)
    ada, charles, stranger, invited, banned = await world.users("Ada", "Charles", "Stranger", "Invited", "Banned")
    owner, adder = await world.connect(ada), await world.connect(charles)
    await world.befriend(ada, charles)
    about = (await owner.call(group_of(charles, banned), OneConversation)).view.conversation.id
    await owner.call(client.SetPermissions(conversation_id=about, user_id=charles.id, can_add_members=True))
    await owner.call(client.RemoveParticipant(conversation_id=about, user_id=banned.id, ban=True))
    await adder.call(group_of(invited))
    nobody, blocking = UserSession(UserId(uuid7()), "Nobody", ""), await world.user("Blocking")
    await relationships.put(world.db, blocking.id, charles.id, RelationshipChange("block", "active"), blocking.id)
    frames: list[tuple[Frame, ErrorCode]] = [
        (group_of(stranger, nobody), ErrorCode.NOT_FOUND), (group_of(stranger, invited), ErrorCode.CONFLICT)
    ]  # fmt: skip
    for make in (adding, inviting):
        frames += [(make(about, stranger, nobody), ErrorCode.NOT_FOUND)]
        frames += [(make(about, stranger, invited), ErrorCode.CONFLICT)]
        frames += [(make(about, stranger, banned), ErrorCode.FORBIDDEN)]
    mine = (await adder.call(group_of(ada), OneConversation)).view.conversation.id
    own = client.RemoveParticipant(conversation_id=mine, user_id=stranger.id, ban=True)
    frames += [(frame, ErrorCode.NOT_FOUND) for frame in (
        *(kind(user_id=blocking.id) for kind in (
            client.CreateDirect, client.RequestFriend, client.Block, client.Follow, client.Mute
        )),
        *(kind(user_id=stranger.id) for kind in (
            client.Unfriend, client.Unblock, client.Unfollow, client.Unmute
        )),
        client.AnswerFriend(user_id=stranger.id, accept=True),
        client.SetSwitches(user_id=stranger.id, can_see_profile=False),
        own,
    )]  # fmt: skip
    named = {frame for frame, route in ROUTES.items() if route.rate is Rate.WRITE and
             {"user_id", "participants"} & set(frame.__struct_fields__)}  # fmt: skip
    of_participants = {client.Unban, client.SetRole, client.SetPermissions, client.TransferOwnership}
    assert named == {type(frame) for frame, _ in frames} | of_participants
    async with world.db.transaction():
        await world.db.execute('SELECT FROM "user" WHERE id = ANY($1) FOR UPDATE', [stranger.id, blocking.id])
        for frame, code in frames:
            async with asyncio.timeout(2):
                answer = await adder.ask(frame)
            assert isinstance(answer, Error), frame
            assert (answer.code, answer.path) in {(code, "participants"), (code, "user_id")}, frame
