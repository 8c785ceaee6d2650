"""Users who may not send may not edit, react, pin, vote or type either.

Each frame meets each obstacle twice. The obstacle may be in place before the frame arrives. Or it arises while the
frame waits for the conversation's row, which the transaction of the change has locked.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, EditId, MessageId, UserId, uuid7
from protocol.payloads import Poll
from protocol.server import Error
from protocol.values import ConversationSettings
from prove.client import Client
from server.app.app import App
from server.core.config import Settings
from server.db.database import Db
from server.fairness.lock_queue import Places
from server.gateway.dispatch import Rate
from server.queries import accounts, conversations, erasure, participants, relationships, sessions
from server.queries.relationships import RelationshipChange
from server.routes import ROUTES
from tests.world import UserSession, World, events_of, message, received_message, refused, sent, until

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


IN_LANES = {"send", "forward", "react", "vote"}
"""Frames that wait in lanes, whose statements pause between two attempts."""
WAITING_ALONE = f"{WAITING} AND query NOT LIKE 'SELECT * FROM %($1%'"
"""The number of transactions of other frames that wait for a lock."""


class Stage(NamedTuple):
    """A conversation of a member, who is about to lose the right to send, and of a user who can remove it."""

    world: World
    about: ConversationId
    member: Client
    who: UserSession
    keeper: Client
    keeper_id: UserId
    said: dict[str, MessageId]

    def at(self, which: str = "mine") -> dict[str, Any]:
        return {"conversation_id": self.about, "message_id": self.said[which]}


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers with enough connections for all frames that wait in them."""
    async with World(msgspec.structs.replace(settings, database_connections=18)) as world:
        yield world


async def waiting(world: World, count: int, query: str = WAITING) -> None:
    """Return when `count` statements wait for a lock."""
    # Within a transaction, the statistics would not change.
    watch = await asyncpg.connect(world.settings.database_url)
    async with asyncio.timeout(10):
        while await watch.fetchval(query) < count:
            await asyncio.sleep(0.01)
    await watch.close()


def lanes_in_use(app: App) -> int:
    return sum(len(lanes._lanes) for lanes in (app._sends.lanes, app._reactions, app._votes))  # noqa: SLF001


def let_all_wait(world: World) -> None:
    """Make frames wait for locks concurrently, and for long, without a brief first attempt."""
    for worker in world.workers:
        lock_queue = worker.app._lock_queue  # noqa: SLF001 - no client can do that
        lock_queue.lock_ms = 60_000
        lock_queue._of_key._most = lock_queue._of_client._most = 1_000  # noqa: SLF001
        lock_queue._places = Places(1_000, patience=60)  # noqa: SLF001
        lock_queue.has = lambda key: True  # type: ignore[method-assign]  # noqa: ARG005 - the name of the parameter


async def stage(world: World, *, is_direct: bool) -> Stage:
    keeper, member = await world.users("Keeper", "Member")
    theirs, mine = await world.connect(keeper), await world.connect(member, 1)
    if is_direct:
        made = await mine.call(client.CreateDirect(user_id=keeper.id), server.OneConversation)
        about = made.view.conversation.id
    else:
        about = await world.group(theirs, member)
        await theirs.call(client.SetPermissions(conversation_id=about, user_id=member.id, can_pin_messages=True))
    await mine.event(server.ConversationJoined)
    said = {
        "theirs": await sent(theirs, about, "Hello"),
        "mine": await sent(mine, about, "Hello"),
        "reacted": await sent(mine, about, "Liked"),
        "pinned": await sent(mine, about, "Important"),
        "poll": await sent(mine, about, "When?", payload=Poll(options=["Now", "Later"])),
        "voted": await sent(mine, about, "Where?", payload=Poll(options=["Here", "There"])),
    }
    here = Stage(world, about, mine, member, theirs, keeper.id, said)
    await mine.call(client.React(**here.at("reacted"), emoji="👍"))
    await mine.call(client.Pin(**here.at("pinned")))
    await mine.call(client.Vote(**here.at("voted"), options=[0]))
    # They are connected to the other worker. No earlier event arrives later.
    await until(lambda: bool(events_of(theirs, server.PollVoted)))
    return here


def frames_that_reach_others(on: Stage) -> dict[str, Frame]:
    """Return every frame that reaches others as a message does, each with a new id."""
    later = datetime.now(UTC) + timedelta(hours=1)
    return {
        "send": message(on.about),
        "forward": client.Forward(
            **on.at(), to_conversation_id=on.about, new_message_id=MessageId(uuid7())
        ),
        "edit": client.Edit(**on.at(), content=f"Edited {uuid7()}", edit_id=EditId(uuid7())),
        "react": client.React(**on.at("theirs"), emoji="🎉"),
        "pin": client.Pin(**on.at("theirs")),
        "unpin": client.Unpin(**on.at("pinned")),
        "vote": client.Vote(**on.at("poll"), options=[1]),
        "close_poll": client.ClosePoll(**on.at("poll")),
        "typing": client.Typing(conversation_id=on.about, active=True),
        "schedule": client.Schedule(
            conversation_id=on.about, message_id=MessageId(uuid7()), content="Later", send_at=later
        ),
    }  # fmt: skip


def frames_that_reach_no_others(on: Stage) -> list[Frame]:
    """Return the frames that delete or undo, read, concern only the sender, or repeat an earlier frame."""
    return [
        client.React(**on.at("reacted"), emoji="👍"),
        client.Unreact(**on.at("reacted"), emoji="👍"),
        client.Pin(**on.at("pinned")),
        client.Vote(**on.at("voted"), options=[0]),
        client.Vote(**on.at("voted"), options=[]),
        client.Read(**on.at("poll")),
        client.Delivered(**on.at("poll")),
        client.MarkUnread(**on.at("poll")),
        client.Star(**on.at()),
        client.FollowThread(**on.at()),
        client.SetDraft(conversation_id=on.about, content="Wait until"),
        client.ReportMessage(**on.at("theirs"), reason="Rude"),
        client.SetPreferences(conversation_id=on.about, is_muted=True),
        client.Delete(**on.at()),
    ]


REACH_NO_OTHERS = {
    client.Unreact, client.Delete, client.Read, client.ReadThread, client.MarkUnread, client.Star, client.Unstar,
    client.FollowThread, client.UnfollowThread, client.SetDraft, client.CancelScheduled, client.ReportMessage,
    client.SetPreferences, client.SeeFeed, client.RegisterPush, client.UnregisterPush, client.UpdateProfile,
}  # fmt: skip
"""Writing frames that reach no other user, or only delete or undo."""
OTHERS = {
    client.CreateDirect, client.CreateGroup, client.CreateChannel, client.UpdateConversation,
    client.DeleteConversation, client.Join, client.Leave, client.AddParticipants, client.Invite, client.Decline,
    client.SetInviteCode, client.RemoveParticipant, client.Unban, client.SetRole, client.SetPermissions,
    client.TransferOwnership, client.Moderate, client.Unmoderate, client.DismissReport, client.RequestFriend,
    client.AnswerFriend, client.Unfriend, client.Block, client.Unblock, client.Follow, client.Unfollow, client.Mute,
    client.Unmute, client.SetSwitches,
}  # fmt: skip
"""Writing frames about membership or relationships, for which see docs/roles.md and docs/privacy.md."""


async def test_every_writing_frame_is_classified(world: World) -> None:
    says = {type(frame) for frame in frames_that_reach_others(await stage(world, is_direct=False)).values()} - {
        client.Typing
    }
    writing = {frame for frame, route in ROUTES.items() if route.rate is Rate.WRITE}
    assert writing == says | REACH_NO_OTHERS | OTHERS


# ------------------------------------------------------------------------------------------------- the obstacles


async def archive(on: Stage) -> None:
    await on.keeper.call(client.UpdateConversation(conversation_id=on.about, is_archived=True))


async def ask_for_moderators(on: Stage) -> None:
    settings = ConversationSettings(send_role="moderator")
    await on.keeper.call(client.UpdateConversation(conversation_id=on.about, settings=settings))


async def slow_down(on: Stage) -> None:
    settings = ConversationSettings(slow_mode_seconds=3_600)
    await on.keeper.call(client.UpdateConversation(conversation_id=on.about, settings=settings))
    await received_message(on.keeper, await sent(on.member, on.about, "The last one for an hour"))


async def block(on: Stage) -> None:
    await on.keeper.call(client.Block(user_id=on.who.id))


async def be_blocked(on: Stage) -> None:
    await on.member.call(client.Block(user_id=on.keeper_id))


async def be_disabled(on: Stage) -> None:
    """As for a socket whose worker was not notified yet."""
    await on.world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', on.who.id)


OBSTACLES: dict[Callable[[Stage], Awaitable[None]], tuple[bool, ErrorCode]] = {
    archive: (False, ErrorCode.FORBIDDEN),
    ask_for_moderators: (False, ErrorCode.FORBIDDEN),
    slow_down: (False, ErrorCode.RATE_LIMITED),
    block: (True, ErrorCode.FORBIDDEN),
    be_blocked: (True, ErrorCode.FORBIDDEN),
    be_disabled: (False, ErrorCode.UNAUTHENTICATED),
}
"""Obstacles to sending, whether each is one in a direct conversation, and the error code."""


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda one: one.__name__)
async def test_user_who_may_not_send_is_refused_every_frame_that_reaches_others(
    world: World, obstacle: Callable[[Stage], Awaitable[None]]
) -> None:
    is_direct, code = OBSTACLES[obstacle]
    on = await stage(world, is_direct=is_direct)
    frames = frames_that_reach_others(on)
    await obstacle(on)
    await on.keeper.synced()
    seen = len(on.keeper.events)
    answers = {name: await on.member.ask(frame) for name, frame in frames.items()}
    # A scheduled message is postponed by slow mode, too.
    expected = dict.fromkeys(frames, code) | ({"schedule": None} if obstacle is slow_down else {})
    assert {name: answer.code if isinstance(answer, Error) else None for name, answer in answers.items()} == expected
    paths = {answer.path for answer in answers.values() if isinstance(answer, Error) and code != "unauthenticated"}
    assert paths <= {"conversation_id", "to_conversation_id"}
    if obstacle is slow_down:
        waits = [answer.retry_after_ms for answer in answers.values() if isinstance(answer, Error)]
        assert all(wait is not None and 3_500_000 < wait <= 3_600_000 for wait in waits)
    for frame in frames_that_reach_no_others(on):
        if obstacle is not be_disabled:
            await on.member.call(frame)
    await on.keeper.synced()
    reached = {type(event) for event in on.keeper.events[seen:] if hasattr(event, "conversation_id")}
    assert reached <= {server.MessageUnreacted, server.PollVoted, server.MessageDeleted, server.MessageRead,
                       server.MessageDelivered}  # fmt: skip


@pytest.mark.parametrize("is_direct", [False, True], ids=["group", "direct"])
async def test_user_who_may_send_can_use_every_frame_that_reaches_others(world: World, *, is_direct: bool) -> None:
    on = await stage(world, is_direct=is_direct)
    for frame in frames_that_reach_others(on).values():
        await on.member.call(frame)


async def test_slow_mode_applies_to_edits_and_exempts_moderators(world: World) -> None:
    on = await stage(world, is_direct=False)
    settings = ConversationSettings(slow_mode_seconds=3_600)
    await on.keeper.call(client.UpdateConversation(conversation_id=on.about, settings=settings))
    await on.member.call(client.Edit(**on.at(), content="Said again"))
    with refused(ErrorCode.RATE_LIMITED, "conversation_id"):
        await sent(on.member, on.about, "And more")
    await on.keeper.call(client.SetRole(conversation_id=on.about, user_id=on.who.id, role="moderator"))
    for frame in frames_that_reach_others(on).values():
        await on.member.call(frame)


# ------------------------------------------------------------------------------- changes while a frame waits


async def archiving(db: Db, on: Stage) -> None:
    await conversations.update(db, on.about, {"is_archived": True})


async def asking_for_moderators(db: Db, on: Stage) -> None:
    await conversations.update(db, on.about, {"settings": ConversationSettings(send_role="moderator")})


async def slowing_down(db: Db, on: Stage) -> None:
    await conversations.update(db, on.about, {"settings": ConversationSettings(slow_mode_seconds=3_600)})
    await db.execute("UPDATE conversation_participant SET last_sent_at = now() WHERE user_id = $1", on.who.id)


async def blocking(db: Db, on: Stage) -> None:
    await relationships.put(db, on.keeper_id, on.who.id, RelationshipChange("block", "active"), on.keeper_id)


async def switching_off(db: Db, on: Stage) -> None:
    await relationships.put(db, on.keeper_id, on.who.id, RelationshipChange("follow", "active"), on.keeper_id)
    await relationships.switch(db, on.keeper_id, on.who.id, {"can_send_messages": False})


async def removing(db: Db, on: Stage) -> None:
    them = await participants.get(db, on.about, on.who.id)
    assert them is not None
    await participants.change(db, them, status="removed")


async def disabling(db: Db, on: Stage) -> None:
    await accounts.disable(db, on.who.id, is_disabled=True)
    await sessions.revoke(db, on.who.id, None)


async def deactivating(db: Db, on: Stage) -> None:
    await leaving(db, on, is_for_good=False)


async def deleting(db: Db, on: Stage) -> None:
    await leaving(db, on, is_for_good=True)


async def leaving(db: Db, on: Stage, *, is_for_good: bool) -> None:
    # A session without a socket, as for a request from another device.
    begun = await sessions.create(db, on.who.id, f"of {on.who.id}", timedelta(days=1), (None, None))
    assert begun is not None
    there = await accounts.password_hash(db, on.who.id)
    assert await accounts.leave(db, on.who.id, there, session_id=begun.session_id, is_for_good=is_for_good)


async def erasing(db: Db, on: Stage) -> None:
    assert await erasure.shut_out(db, on.who.id, None)


CHANGES: dict[Callable[[Any, Stage], Awaitable[None]], tuple[bool, ErrorCode]] = {
    archiving: (False, ErrorCode.FORBIDDEN),
    asking_for_moderators: (False, ErrorCode.FORBIDDEN),
    slowing_down: (False, ErrorCode.RATE_LIMITED),
    removing: (False, ErrorCode.NOT_FOUND),
    blocking: (True, ErrorCode.FORBIDDEN),
    switching_off: (True, ErrorCode.FORBIDDEN),
}
OF_ACCOUNTS: dict[Callable[[Any, Stage], Awaitable[None]], bool] = {
    disabling: False, deactivating: True, deleting: False, erasing: True,
}  # fmt: skip
"""Changes that end the sender's account, and whether the sender writes in a direct conversation."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
async def test_permission_is_checked_after_waiting_for_the_lock(
    world: World, change: Callable[[Any, Stage], Awaitable[None]]
) -> None:
    is_direct, code = CHANGES[change]
    await assert_frames_are_refused_after(world, change, code, is_direct=is_direct)


async def test_frame_that_waits_while_its_senders_account_ends_is_refused(world: World) -> None:
    for change, is_direct in OF_ACCOUNTS.items():
        await assert_frames_are_refused_after(world, change, ErrorCode.UNAUTHENTICATED, is_direct=is_direct)


async def assert_frames_are_refused_after(
    world: World, change: Callable[[Any, Stage], Awaitable[None]], code: ErrorCode, *, is_direct: bool
) -> None:
    """Make a change while every frame that reaches others waits for the conversation."""
    on = await stage(world, is_direct=is_direct)
    let_all_wait(world)
    # `typing` takes no lock and does not wait. It is handled before the change or after it.
    frames = {name: frame for name, frame in frames_that_reach_others(on).items() if name != "typing"}
    async with on.world.db.transaction():
        if is_direct:
            await relationships.lock(on.world.db, on.keeper_id, on.who.id)
        else:
            await conversations.lock(on.world.db, on.about)
        answers = []
        for number, frame in enumerate(frames.values(), start=1):
            # A connection handles one frame at a time, and a worker has four connections to the database.
            device = await world.connect(on.who, number % 2)
            answers.append(asyncio.create_task(device.ask(frame)))
        await waiting(world, len(frames.keys() - IN_LANES), WAITING_ALONE)
        await until(lambda: sum(lanes_in_use(worker.app) for worker in world.workers) == len(IN_LANES))
        await change(on.world.db, on)
        version = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", on.about)
    got: list[ErrorCode | None] = []
    for answer in answers:
        try:
            said = await answer
            got.append(said.code if isinstance(said, Error) else None)
        except ConnectionError:  # its session has ended, too, and the worker was notified
            got.append(ErrorCode.UNAUTHENTICATED)
    # A scheduled message is postponed by slow mode.
    expected = dict.fromkeys(frames, code) | ({"schedule": None} if change is slowing_down else {})
    assert (change.__name__, dict(zip(frames, got, strict=True))) == (change.__name__, expected)
    assert await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", on.about) == version


async def test_message_sent_while_expiry_is_turned_on_expires(world: World) -> None:
    on = await stage(world, is_direct=False)
    async with on.world.db.transaction():
        await conversations.lock(on.world.db, on.about)
        saying = asyncio.create_task(sent(on.member, on.about, "Not for ever"))
        await waiting(world, 1)
        await conversations.update(
            on.world.db, on.about, {"settings": ConversationSettings(expire_after_seconds=3_600)}
        )
    assert await on.world.db.fetchval("SELECT expires_at IS NOT NULL FROM message WHERE id = $1", await saying)


async def test_no_message_arrives_after_a_block_is_acknowledged(world: World) -> None:
    """The sender has several messages in flight when the other user blocks them."""
    on = await stage(world, is_direct=True)
    for _ in range(5):
        saying = asyncio.create_task(keep_sending(on))
        await sent(on.member, on.about, "Before")
        await on.keeper.call(client.Block(user_id=on.who.id))
        newest = await on.world.db.fetchval("SELECT version FROM conversation WHERE id = $1", on.about)
        await saying
        assert await on.world.db.fetchval("SELECT version FROM conversation WHERE id = $1", on.about) == newest
        await on.keeper.call(client.Unblock(user_id=on.who.id))


async def keep_sending(on: Stage) -> None:
    """Send messages until one is refused."""
    try:
        while True:
            await sent(on.member, on.about, "Again")
    except Refused as refusal:
        assert refusal.code is ErrorCode.FORBIDDEN
