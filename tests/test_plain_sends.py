"""Plain messages are stored by a statement that reads rights before it locks. It stores none whose rights changed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId
from protocol.server import Error
from protocol.values import ConversationSettings
from prove.truth import recount
from server.core.config import Settings
from server.queries import batches, sending
from server.queries.sending import Outgoing, Stored
from tests.world import World, message, refused

pytestmark = pytest.mark.new_database

# The statement waits for an advisory lock where it reads the rights, after its snapshot and before its lock.
PAUSE = """
ALTER FUNCTION obstacle_of(conversation, conversation_participant, boolean) RENAME TO obstacle_found;
CREATE FUNCTION obstacle_of(c conversation, p conversation_participant, is_here boolean) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    found text := obstacle_found(c, p, is_here);
BEGIN
    PERFORM pg_advisory_xact_lock_shared(84);
    RETURN found;
END $$
"""
SAID = "SELECT count(*) FROM message WHERE content = 'Meanwhile'"
PAUSED = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


class Stage:
    """A group and a direct conversation, in which Charles writes, and Ada changes what he may."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def begin(self) -> None:
        self.ada, self.charles = await self.world.users("Ada", "Charles")
        self.owner, self.member = await self.world.connect(self.ada), await self.world.connect(self.charles)
        settings = ConversationSettings(send_role="moderator")
        self.group = await self.world.group(self.owner, self.charles, title="Group", settings=settings)
        await promoted("moderator")(self)
        await self.owner.call(client.Follow(user_id=self.charles.id))
        frame = client.CreateDirect(user_id=self.ada.id)
        self.direct = (await self.member.call(frame, server.OneConversation)).view.conversation.id


Change = Callable[[Stage], Awaitable[object]]


def promoted(role: Literal["moderator", "member"]) -> Change:
    """Return a change of Charles's role in the group."""
    return lambda on: on.owner.call(client.SetRole(conversation_id=on.group, user_id=on.charles.id, role=role))


def updated(**changes: object) -> Change:
    """Return a change of the group."""
    return lambda on: on.owner.call(client.UpdateConversation(conversation_id=on.group, **changes))  # type: ignore[arg-type]


REFUSED: dict[str, tuple[ErrorCode, Change]] = {
    "removed": (
        ErrorCode.NOT_FOUND,
        lambda on: on.owner.call(client.RemoveParticipant(conversation_id=on.group, user_id=on.charles.id)),
    ),
    "banned": (
        ErrorCode.NOT_FOUND,
        lambda on: on.owner.call(client.RemoveParticipant(conversation_id=on.group, user_id=on.charles.id, ban=True)),
    ),
    "demoted": (ErrorCode.FORBIDDEN, promoted("member")),
    "only for admins": (ErrorCode.FORBIDDEN, updated(settings=ConversationSettings(send_role="admin"))),
    "archived": (ErrorCode.FORBIDDEN, updated(is_archived=True)),
    "deleted": (
        ErrorCode.NOT_FOUND,
        lambda on: on.owner.call(client.DeleteConversation(conversation_id=on.group)),
    ),
    "blocked": (ErrorCode.FORBIDDEN, lambda on: on.owner.call(client.Block(user_id=on.charles.id))),
    "switched off": (
        ErrorCode.FORBIDDEN,
        lambda on: on.owner.call(client.SetSwitches(user_id=on.charles.id, can_send_messages=False)),
    ),
}
IN_DIRECT = {"blocked", "switched off"}


@pytest.fixture
async def stage(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setattr(batches, "SHARED_LOCK_MS", 60_000)
    async with World(settings, workers=1) as world:
        stage = Stage(world)
        await stage.begin()
        yield stage


@asynccontextmanager
async def paused(stage: Stage, about: ConversationId) -> "AsyncIterator[asyncio.Task[server.Reply | Error]]":
    """Send a message, whose statement pauses between its snapshot and its lock while the context is entered."""
    await stage.world.db.execute(PAUSE)
    pause = await asyncpg.connect(stage.world.settings.database_url)
    try:
        await pause.execute("SELECT pg_advisory_lock(84)")
        sending_it = asyncio.create_task(stage.member.ask(message(about, "Meanwhile")))
        async with asyncio.timeout(10):
            while not await stage.world.db.fetchval(PAUSED):
                await asyncio.sleep(0.01)
            yield sending_it
    finally:
        await pause.close()


@pytest.mark.parametrize("name", REFUSED)
async def test_message_whose_right_ends_before_the_lock_is_refused(stage: Stage, name: str) -> None:
    code, change = REFUSED[name]
    async with paused(stage, stage.direct if name in IN_DIRECT else stage.group) as sending_it:
        await change(stage)
    answer = await sending_it
    assert isinstance(answer, Error)
    assert answer.code is code
    assert not await stage.world.db.fetchval(SAID)


@pytest.mark.parametrize("is_direct", [False, True])
async def test_message_is_stored_if_others_arrive_before_the_lock(stage: Stage, *, is_direct: bool) -> None:
    """Also by the paused statement itself, if no right changes in a group."""
    about = stage.direct if is_direct else stage.group
    other = Outgoing(stage.ada.id, message(about, "First"))
    async with paused(stage, about) as sending_it:
        assert isinstance((await sending.send(stage.world.db, [other]))[0], Stored)
    assert isinstance(await sending_it, server.Reply)
    assert await stage.world.db.fetchval(SAID) == 1
    assert await recount(stage.world.db) == []


async def test_slow_mode_that_begins_before_the_lock_counts_the_message(stage: Stage) -> None:
    async with paused(stage, stage.group) as sending_it:
        await promoted("member")(stage)
        await updated(settings=ConversationSettings(slow_mode_seconds=3_600))(stage)
    assert isinstance(await sending_it, server.Reply)
    with refused(ErrorCode.RATE_LIMITED, "conversation_id"):
        await stage.member.call(message(stage.group, "Too soon"))


async def test_sends_of_many_connections_to_the_database_keep_each_version_once(stage: Stage) -> None:
    """They pass each other's locks, and evaluate rows again that have changed."""
    own = [await asyncpg.connect(stage.world.settings.database_url) for _ in range(4)]

    async def send(db: "asyncpg.Connection[asyncpg.Record]") -> int:
        stored = 0
        for _ in range(50):
            batch = [Outgoing(stage.charles.id, message(about)) for about in (stage.group, stage.direct)]
            stored += sum(one is not None for one in await sending.send_plain(db, batch))
        return stored

    stored = await asyncio.gather(*map(send, own))
    for db in own:
        await db.close()
    assert sum(stored) == await stage.world.db.fetchval("SELECT count(*) FROM message WHERE NOT is_system_message")
    assert min(stored) > 0
    assert await recount(stage.world.db) == []
