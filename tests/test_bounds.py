"""Bounds on the data of a user hold for concurrent frames on connections to two workers."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import msgspec
import pytest

from protocol import client, server
from protocol.errors import CloseCode, ErrorCode
from protocol.http import LoggedIn
from protocol.ids import ConversationId, EditId, uuid7
from protocol.limits import MAX_EMOJI_OF_USER, MAX_SESSIONS, MAX_SHARED_PARTICIPANTS
from protocol.server import Error
from prove.client import Client
from server.handlers import messages
from server.queries import bounds, conversations, drafts, joins, participants, sessions, users
from tests.test_credentials import administer
from tests.test_may_send import waiting
from tests.world import Room, UserSession, World, http_client, refused, sent

LIMIT, FRAMES = 5, 15


async def refusals(who: UserSession, world: World, frames: Sequence[client.Frame]) -> list[ErrorCode]:
    """Send frames concurrently, each on its own connection, and return the codes of the errors.

    Frames that a busy worker refuses with `unavailable` (docs/limits.md) are sent again.
    """
    connections: list[Client] = [await world.connect(who, number % 2) for number in range(len(frames))]

    async def reply_to(connection: Client, frame: client.Frame) -> object:
        while isinstance(answer := await connection.ask(frame), Error) and answer.code == ErrorCode.UNAVAILABLE:
            await asyncio.sleep((answer.retry_after_ms or 0) / 1000)
        return answer

    answers = await asyncio.gather(*(reply_to(one, frame) for one, frame in zip(connections, frames, strict=True)))
    refused = [answer for answer in answers if isinstance(answer, Error)]
    assert all(answer.path is not None for answer in refused if answer.code == ErrorCode.RATE_LIMITED)
    return [answer.code for answer in refused]


def channels() -> list[client.Frame]:
    return [client.CreateChannel(conversation_id=ConversationId(uuid7()), title="News") for _ in range(FRAMES)]


async def test_conversations_created_in_a_day_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_CONVERSATIONS_A_DAY", LIMIT)
    ada, charles = await world.users("Ada", "Charles")
    assert await refusals(ada, world, channels()) == [ErrorCode.RATE_LIMITED] * (FRAMES - LIMIT)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == LIMIT
    await world.channel(await world.connect(charles))
    await world.db.execute("UPDATE conversation SET created_at = now() - interval '2 days'")
    await world.channel(await world.connect(ada))


async def test_memberships_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_MEMBERSHIPS", LIMIT)
    monkeypatch.setattr(joins.FUNCTION, "_limits", (MAX_SHARED_PARTICIPANTS, LIMIT))
    ada, charles, mary = await world.users("Ada", "Charles", "Mary")
    owner = await world.connect(ada)
    await refusals(ada, world, channels())
    taking_part = "SELECT count(*) FROM conversation_participant WHERE user_id = $1 AND status = 'active'"
    assert await world.db.fetchval(taking_part, ada.id) == LIMIT
    other = await world.connect(charles)
    public = [await world.channel(other, is_public=True) for _ in range(LIMIT)]
    joining = [client.Join(conversation_id=one) for one in public]
    assert await refusals(ada, world, joining) == [ErrorCode.CONFLICT] * LIMIT
    await refusals(mary, world, joining)
    assert await world.db.fetchval(taking_part, mary.id) == LIMIT
    answer = await other.ask(client.AddParticipants(conversation_id=public[0], participants=[ada.id]))
    assert isinstance(answer, Error)
    assert (answer.code, answer.path) == (ErrorCode.CONFLICT, "participants")
    (left,) = await world.db.fetch(
        "SELECT conversation_id FROM conversation_participant WHERE user_id = $1 LIMIT 1", ada.id
    )
    await owner.call(client.Leave(conversation_id=left[0]))
    await owner.call(joining[0])


async def test_deleted_conversations_do_not_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_MEMBERSHIPS", 2)
    ada, charles = await world.users("Ada", "Charles")
    owner = await world.connect(ada)
    for _ in range(3):
        group = await world.group(owner, charles)
        await owner.call(client.DeleteConversation(conversation_id=group))
    group = await world.group(owner, charles)
    page = await owner.call(client.ListConversations(), server.ConversationPage)
    assert [view.conversation.id for view in page.conversations] == [group]


async def test_stars_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_STARS", LIMIT)
    ada = await world.user("Ada")
    one = await world.connect(ada)
    about = await world.channel(one)
    said = [await sent(one, about) for _ in range(FRAMES)]
    frames = [client.Star(conversation_id=about, message_id=message_id) for message_id in said]
    assert await refusals(ada, world, frames) == [ErrorCode.CONFLICT] * (FRAMES - LIMIT)
    assert await world.db.fetchval("SELECT count(*) FROM message_star") == LIMIT


async def test_relationships_of_each_kind_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_RELATIONSHIPS", LIMIT)
    ada = await world.user("Ada")
    others = await world.users(*(f"User {number}" for number in range(FRAMES)))
    for kind in (client.Block, client.RequestFriend):
        wanted: list[client.Frame] = [kind(user_id=other.id) for other in others]
        assert len(await refusals(ada, world, wanted)) >= FRAMES - LIMIT
    counts = await world.db.fetch(
        "SELECT count(*) FROM user_relationship WHERE from_user_id = $1 GROUP BY type", ada.id
    )
    assert [row[0] for row in counts] == [LIMIT, LIMIT]


async def test_ended_blocks_do_not_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_RELATIONSHIPS", 2)
    ada, *others = await world.users("Ada", *(f"User {number}" for number in range(5)))
    one = await world.connect(ada)
    for kind, ending in (
        (client.Block, client.Unblock),
        (client.Follow, client.Unfollow),
        (client.Mute, client.Unmute),
    ):
        for other in others[:3]:
            await one.call(kind(user_id=other.id))
            await one.call(ending(user_id=other.id))
        for other in others[:2]:
            await one.call(kind(user_id=other.id))
        with refused(ErrorCode.CONFLICT, "user_id"):
            await one.call(kind(user_id=others[3].id))
        for other in others[:2]:
            await one.call(ending(user_id=other.id))


async def test_friend_requests_sent_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_REQUESTS_SENT", LIMIT)
    ada = await world.user("Ada")
    others = await world.users(*(f"User {number}" for number in range(FRAMES)))
    requests: list[client.Frame] = [client.RequestFriend(user_id=other.id) for other in others]
    assert await refusals(ada, world, requests) == [ErrorCode.CONFLICT] * (FRAMES - LIMIT)
    pending = await world.db.fetch("SELECT to_user_id FROM user_relationship WHERE status = 'pending'")
    assert len(pending) == LIMIT
    await (await world.connect(ada)).call(client.Unfriend(user_id=pending[0][0]))
    assert await refusals(ada, world, [client.RequestFriend(user_id=pending[0][0])]) == []


async def test_friend_requests_received_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_REQUESTS_RECEIVED", LIMIT)
    ada = await world.user("Ada")
    others = await world.users(*(f"User {number}" for number in range(FRAMES)))
    asked = await asyncio.gather(*(refusals(other, world, [client.RequestFriend(user_id=ada.id)]) for other in others))
    assert [code for codes in asked for code in codes] == [ErrorCode.CONFLICT] * (FRAMES - LIMIT)
    (first,) = await world.db.fetch("SELECT from_user_id FROM user_relationship LIMIT 1")
    await (await world.connect(ada)).call(client.AnswerFriend(user_id=first[0], accept=False))
    refusing = await world.db.fetchval(
        """SELECT id FROM "user" u
        WHERE u.id <> $1 AND NOT EXISTS (SELECT FROM user_relationship WHERE from_user_id = u.id) LIMIT 1""",
        ada.id,
    )
    (one,) = [other for other in others if other.id == refusing]
    assert await refusals(one, world, [client.RequestFriend(user_id=ada.id)]) == []


async def test_reports_made_in_a_day_are_bounded(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_REPORTS_A_DAY", LIMIT)
    said = [await sent(room.ada, room.group) for _ in range(FRAMES)]
    reports: list[client.Frame] = [client.ReportMessage(**room.at(one), reason="Rude") for one in said]
    assert await refusals(room.users[1], world, reports) == [ErrorCode.RATE_LIMITED] * (FRAMES - LIMIT)
    assert await world.db.fetchval("SELECT count(*) FROM report") == LIMIT
    await world.db.execute("UPDATE report SET created_at = now() - interval '2 days'")
    for report in reports:
        await room.charles.ask(report)
    assert await world.db.fetchval("SELECT count(*) FROM report") == 2 * LIMIT


async def test_edits_of_a_message_are_bounded(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_EDITS", LIMIT)
    said = await sent(room.ada, room.group)
    edits = [client.Edit(**room.at(said), content=f"{number}", edit_id=EditId(uuid7())) for number in range(FRAMES)]
    assert await refusals(room.users[0], world, edits) == [ErrorCode.CONFLICT] * (FRAMES - LIMIT)
    page = await room.ada.call(client.ListEdits(**room.at(said)), server.EditPage)
    assert len(page.edits) == LIMIT
    # A repeated edit is acknowledged, and the message can be deleted.
    (made,) = [edit for edit in edits if edit.edit_id == page.edits[0].id]
    await room.ada.call(made)
    await room.ada.call(client.Delete(**room.at(said)))


async def test_followed_threads_are_bounded(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_THREAD_FOLLOWS", LIMIT)
    said = [await sent(room.ada, room.group) for _ in range(FRAMES)]
    rows = "SELECT count(*) FROM thread_follow WHERE user_id = $1"
    reads: list[client.Frame] = [client.ReadThread(**room.at(one), thread_order=0) for one in said]
    assert await refusals(room.users[1], world, reads) == []
    assert await world.db.fetchval(rows, room.users[1].id) <= LIMIT
    follows: list[client.Frame] = [client.FollowThread(**room.at(one)) for one in said]
    assert await refusals(room.users[1], world, follows) == [ErrorCode.CONFLICT] * (FRAMES - LIMIT)
    assert await world.db.fetchval(rows, room.users[1].id) == LIMIT
    assert await refusals(room.users[1], world, reads) == []
    assert await world.db.fetchval(rows, room.users[1].id) == LIMIT
    await sent(room.charles, room.group, parent_message_id=said[-1])


async def test_author_who_unfollowed_a_thread_stays_unfollowed_at_the_bound(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_THREAD_FOLLOWS", 1)
    begun = await sent(room.ada, room.group)
    await room.ada.call(client.UnfollowThread(**room.at(begun)))
    await room.charles.call(client.UnfollowThread(**room.at(begun)))
    for _ in range(3):
        other = await sent(room.charles, room.group)
        assert await refusals(room.users[0], world, [client.ReadThread(**room.at(other), thread_order=0)]) == []
    told = await world.db.fetch("SELECT user_id FROM thread_follow WHERE root_id = $1", begun)
    assert [row[0] for row in told if row[0] == room.users[0].id] == [room.users[0].id]


async def test_emoji_of_a_user_on_a_message_are_bounded(room: Room, world: World) -> None:
    said = await sent(room.ada, room.group)
    await world.db.execute(
        """INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id, is_removed)
        SELECT $1, $2, ':e' || n || ':', $3, 1, $2, true FROM generate_series(1, $4) n""",
        said, room.users[0].id, room.group, MAX_EMOJI_OF_USER - LIMIT,
    )  # fmt: skip
    put: list[client.Frame] = [client.React(**room.at(said), emoji=f":new{number}:") for number in range(FRAMES)]
    assert await refusals(room.users[0], world, put) == [ErrorCode.CONFLICT] * (FRAMES - LIMIT)
    assert await world.db.fetchval("SELECT count(*) FROM message_reaction") == MAX_EMOJI_OF_USER
    with refused(ErrorCode.CONFLICT, "emoji"):
        await room.ada.call(client.React(**room.at(said), emoji=":other:"))
    await room.ada.call(client.React(**room.at(said), emoji=":e1:"))
    await room.charles.call(client.React(**room.at(said), emoji=":other:"))


@pytest.mark.parametrize("frame", ["leave", "remove", "delete", "openchat conversation delete"])
async def test_draft_is_deleted_with_its_conversation(room: Room, world: World, frame: str) -> None:
    """The user's other devices get an event, and the row is emptied."""
    other = await world.connect(room.users[1], 1)
    await room.charles.call(client.SetDraft(conversation_id=room.group, content="I thi"))
    await other.event(server.DraftChanged, lambda event: event.draft.content == "I thi")
    match frame:
        case "leave":
            await room.charles.call(client.Leave(conversation_id=room.group))
        case "remove":
            await room.ada.call(client.RemoveParticipant(conversation_id=room.group, user_id=room.users[1].id))
        case "delete":
            await room.ada.call(client.DeleteConversation(conversation_id=room.group))
        case _:
            await administer(world, "conversation", "delete", str(room.group), "--yes")
            world.workers[1].app.hub.comparisons.soon()
    await other.event(server.DraftChanged, lambda event: event.draft.content == "")
    assert await world.db.fetchval("SELECT count(*) FROM draft WHERE content <> ''") == 0
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await room.charles.call(client.SetDraft(conversation_id=room.group, content="I think"))


async def test_draft_set_during_the_deletion_of_its_conversation_is_deleted(room: Room, world: World) -> None:
    charles = room.users[1].id
    async with world.db.transaction():
        # The locks and the statement of `set_draft`.
        await conversations.keep(world.db, room.group, charles)
        await users.lock(world.db, [charles])
        assert await drafts.put(world.db, client.SetDraft(conversation_id=room.group, content="I thi"), charles)
        asked = asyncio.create_task(room.ada.ask(client.DeleteConversation(conversation_id=room.group)))
        await waiting(world, 1)
    assert not isinstance(await asked, Error)
    await room.charles.event(server.DraftChanged, lambda event: event.draft.content == "")
    # Reads hide the draft before the job has emptied it, so the event may precede that.
    async with asyncio.timeout(10):
        while await world.db.fetchval("SELECT count(*) FROM draft WHERE content <> ''"):
            await asyncio.sleep(0.01)
    assert await world.db.fetchval("SELECT count(*) FROM draft WHERE content <> ''") == 0


async def test_deletion_of_a_conversation_does_not_wait_for_users_with_drafts(room: Room, world: World) -> None:
    await room.charles.call(client.SetDraft(conversation_id=room.group, content="I thi"))
    async with world.db.transaction():
        await users.lock(world.db, [room.users[1].id])
        await room.ada.call(client.DeleteConversation(conversation_id=room.group))
        deleted = await world.db.fetchval("SELECT is_deleted FROM conversation WHERE id = $1", room.group)
    assert deleted


async def test_draft_that_waits_while_its_author_is_removed_is_refused(room: Room, world: World) -> None:
    charles = room.users[1].id
    async with world.db.transaction():
        await users.lock(world.db, [charles])
        asked = asyncio.create_task(room.charles.ask(client.SetDraft(conversation_id=room.group, content="I thi")))
        await waiting(world, 1)
        them = await participants.get(world.db, room.group, charles)
        assert them is not None
        await participants.change(world.db, them, status="removed")
    answer = await asked
    assert isinstance(answer, Error)
    assert answer.code is ErrorCode.NOT_FOUND
    assert await world.db.fetchval("SELECT count(*) FROM draft") == 0


async def test_least_recently_used_session_ends_at_the_bound(world: World) -> None:
    ada = {"email": "ada@example.org", "password": "correct horse"}
    async with http_client() as http:
        registered = await http.post(f"{world.url}/v1/auth/register", json=ada | {"name": "Ada"})
        first = msgspec.json.decode(registered.content, type=LoggedIn)
        for number in range(MAX_SESSIONS - 1):
            await sessions.create(world.db, first.user.id, f"{number}", timedelta(days=1), (None, None))
        await world.db.execute(
            "UPDATE session SET updated_at = now() - interval '1 hour' WHERE id = $1", first.session_id
        )
        oldest = await world.connect(UserSession(first.user.id, "Ada", first.token), 1)
        answers = await asyncio.gather(
            *(http.post(f"{world.workers[number % 2].url}/v1/auth/login", json=ada) for number in range(4))
        )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert await oldest.closed() == CloseCode.SESSION_ENDED
    assert await world.db.fetchval("SELECT count(*) FROM session") == MAX_SESSIONS
    left = {row[0] for row in await world.db.fetch("SELECT id FROM session")}
    assert {msgspec.json.decode(answer.content, type=LoggedIn).session_id for answer in answers} < left
