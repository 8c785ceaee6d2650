"""Roles and membership are checked under the lock, so a user who loses them while a frame waits is refused.

A frame that requires a role waits for the conversation's row, which is locked by the transaction that demotes, removes
or bans its sender. A frame that only reads waits in the same way for the table that it reads.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, EditId, MessageId, UserId, uuid7
from protocol.payloads import Poll
from protocol.server import Error
from prove.client import Client
from server.core.config import Settings
from server.db.database import Db
from server.gateway.dispatch import Rate
from server.queries import conversations, participants
from server.routes import ROUTES
from tests.test_may_send import let_all_wait, waiting
from tests.test_security import LEAST
from tests.world import UserSession, World, message, sent


class Stage(NamedTuple):
    """A channel whose admin sends frames while the admin's role changes."""

    about: ConversationId
    admin: UserSession
    acting: Client
    people: dict[str, UserId]
    said: dict[str, MessageId]
    report: Any

    def at(self, which: str) -> dict[str, Any]:
        return {"conversation_id": self.about, "message_id": self.said[which]}


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers with enough connections for all frames that wait in them."""
    async with World(msgspec.structs.replace(settings, database_connections=28)) as world:
        yield world


async def stage(world: World) -> Stage:
    names = ("Owner", "Admin", "Member", "Banned", "Invited", "New", "Newer")
    people = dict(zip(names, await world.users(*names), strict=True))
    owner, admin = await world.connect(people["Owner"]), await world.connect(people["Admin"], 1)
    member = await world.connect(people["Member"])
    about = await world.channel(owner, is_public=True)
    here: dict[str, Any] = {"conversation_id": about}
    for one in (admin, member, await world.connect(people["Banned"])):
        await one.call(client.Join(**here))
    await owner.call(client.SetRole(**here, user_id=people["Admin"].id, role="admin"))
    await owner.call(client.RemoveParticipant(**here, user_id=people["Banned"].id, ban=True))
    await owner.call(client.Invite(**here, participants=[people["Invited"].id]))
    plain = ("deleted", "hidden", "shown", "pinned", "unpinned", "reported")
    said = {name: await sent(member, about, name.capitalize()) for name in plain}
    said["closed"] = await sent(member, about, "Tea?", payload=Poll(options=["Yes", "No"]))
    said["mine"] = await sent(admin, about, "Mine")
    await owner.call(client.Moderate(**here, message_id=said["shown"], reason="Rude"))
    await owner.call(client.Pin(**here, message_id=said["unpinned"]))
    await owner.call(client.ReportMessage(**here, message_id=said["reported"], reason="Rude"))
    report = (await owner.call(client.ListReports(**here), server.ReportPage)).reports[0].id
    ids = {name: one.id for name, one in people.items()}
    return Stage(about, people["Admin"], admin, ids, said, report)


def frames_of_admins(on: Stage) -> list[Frame]:
    """Return every writing frame that requires a role and that an admin may send."""
    here: dict[str, Any] = {"conversation_id": on.about}
    people = on.people
    return [
        client.UpdateConversation(**here, title="Mine now"),
        client.AddParticipants(**here, participants=[people["New"]]),
        client.Invite(**here, participants=[people["Newer"]]),
        client.SetInviteCode(**here, is_open=True),
        client.RemoveParticipant(**here, user_id=people["Invited"]),
        client.Unban(**here, user_id=people["Banned"]),
        client.SetRole(**here, user_id=people["Member"], role="guest"),
        client.SetPermissions(**here, user_id=people["Member"], can_pin_messages=True),
        client.Pin(**on.at("pinned")),
        client.Unpin(**on.at("unpinned")),
        client.Delete(**on.at("deleted")),
        client.ClosePoll(**on.at("closed")),
        client.Moderate(**on.at("hidden"), reason="Rude"),
        client.Unmoderate(**on.at("shown")),
        client.DismissReport(**here, report_id=on.report),
    ]


def frames_of_owners(on: Stage) -> list[Frame]:
    """Return the writing frames that only an owner may send."""
    return [
        client.TransferOwnership(conversation_id=on.about, user_id=on.people["Member"]),
        client.DeleteConversation(conversation_id=on.about),
    ]


async def test_every_writing_frame_that_requires_a_role_is_covered(world: World) -> None:
    on = await stage(world)
    privileged = {kind for kind, least in LEAST.items() if least not in {None, "guest"}}
    writing = {kind for kind in privileged if ROUTES[kind].rate is Rate.WRITE}
    assert {type(frame) for frame in frames_of_admins(on) + frames_of_owners(on)} == writing
    reading = {type(frame) for frame, _ in reads(on)}
    assert reading >= privileged - writing
    for frame in frames_of_admins(on):
        await on.acting.call(frame)


async def demoted(db: Db, on: Stage) -> None:
    await lower(db, on, role="member")


async def removed(db: Db, on: Stage) -> None:
    await lower(db, on, status="removed")


async def banned(db: Db, on: Stage) -> None:
    await lower(db, on, status="banned")


async def lower(db: Db, on: Stage, **becomes: Any) -> None:
    them = await participants.get(db, on.about, on.admin.id)
    assert them is not None
    await participants.change(db, them, **becomes)


CHANGES: dict[Callable[[Any, Stage], Awaitable[None]], ErrorCode] = {
    demoted: ErrorCode.FORBIDDEN, removed: ErrorCode.NOT_FOUND, banned: ErrorCode.NOT_FOUND,
}  # fmt: skip


async def answers_after(
    world: World, on: Stage, frames: list[Frame], change: Callable[[Any, Stage], Awaitable[None]]
) -> list[ErrorCode | None]:
    """Send frames, each from its own device, and change the sender's rights while they wait for the conversation.

    Return the error codes of the answers.
    """
    devices = [await world.connect(on.admin, number % 2) for number in range(len(frames))]
    let_all_wait(world)
    async with world.db.transaction():
        await conversations.lock(world.db, on.about)
        asked = [asyncio.create_task(one.ask(frame)) for one, frame in zip(devices, frames, strict=True)]
        until_all_wait = asyncio.create_task(waiting(world, len(frames)))
        await asyncio.wait([until_all_wait, *asked], return_when=asyncio.FIRST_COMPLETED)
        early = [type(frame).__name__ for frame, task in zip(frames, asked, strict=True) if task.done()]
        until_all_wait.cancel()
        assert not early, f"answered without the lock: {early}"
        await change(world.db, on)
    return [answer.code if isinstance(answer, Error) else None for answer in await asyncio.gather(*asked)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
async def test_role_of_the_sender_is_checked_after_the_wait_for_the_lock(
    world: World, change: Callable[[Any, Stage], Awaitable[None]]
) -> None:
    on = await stage(world)
    frames = frames_of_admins(on)
    if change is not demoted:
        frames.append(client.ReportMessage(**on.at("shown"), reason="Rude"))
    got = await answers_after(world, on, frames, change)
    names = [type(frame).__name__ for frame in frames]
    assert dict(zip(names, got, strict=True)) == dict.fromkeys(names, CHANGES[change])


async def test_former_owner_cannot_use_the_rights_of_an_owner(world: World) -> None:
    on = await stage(world)
    await world.db.execute(
        "UPDATE conversation_participant SET role = CASE user_id WHEN $2 THEN 'owner' ELSE 'admin' END"
        " WHERE conversation_id = $1 AND role IN ('owner', 'admin')", on.about, on.admin.id,
    )  # fmt: skip
    assert await answers_after(world, on, frames_of_owners(on), demoted) == [ErrorCode.FORBIDDEN] * 2


async def test_mention_of_everyone_by_a_former_moderator_notifies_nobody(world: World) -> None:
    on = await stage(world)
    say = message(on.about, "Listen, @everyone")
    edit = client.Edit(**on.at("mine"), content="Listen, @everyone", edit_id=EditId(uuid7()))
    assert await answers_after(world, on, [say, edit], demoted) == [None, None]
    for message_id in (say.message_id, on.said["mine"]):
        place: dict[str, Any] = {"conversation_id": on.about, "message_id": message_id}
        found = (await on.acting.call(client.GetMessage(**place), server.OneMessage)).message
        assert (found.content, found.loud_mentions) == ("Listen, @everyone", [])
    await on.acting.synced()
    told = [event.message for event in on.acting.events if isinstance(event, server.MessageSent | server.MessageEdited)]
    assert all(one.loud_mentions == [] for one in told)


# ------------------------------------------------------------------------------------------------------- reading


def reads(on: Stage) -> list[tuple[Frame, str]]:
    """Return the frames that read with a role or in more than one statement, each with a table that it reads."""
    return [
        (client.ListReports(conversation_id=on.about), "report"),
        (client.ListAudit(conversation_id=on.about), "audit_entry"),
        (client.Why(**on.at("closed")), "user_relationship"),
        (client.ListVotes(**on.at("closed")), "poll_vote"),
    ]


@pytest.mark.parametrize("change", [demoted, banned], ids=lambda one: one.__name__)
async def test_role_is_checked_for_reads_that_waited(
    world: World, change: Callable[[Any, Stage], Awaitable[None]]
) -> None:
    on = await stage(world)
    for number, (frame, table) in enumerate(reads(on)):
        if change is demoted and isinstance(frame, client.ListVotes):
            continue  # every participant may read it
        await on.acting.call(frame)
        async with world.db.transaction():
            await world.db.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            asked = asyncio.create_task(on.acting.ask(frame))
            await waiting(world, 1)
            await change(world.db, on)
        answer = await asked
        assert isinstance(answer, Error), (number, frame)
        assert answer.code is CHANGES[change]
        await world.db.execute(
            "UPDATE conversation_participant SET role = 'admin', status = 'active'"
            " WHERE conversation_id = $1 AND user_id = $2", on.about, on.admin.id,
        )  # fmt: skip
