"""Who is invited, has declined or is banned: each way to learn of it gives each viewer the same answer."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import asyncpg
import pytest

from protocol import client, server
from protocol.codec import encode
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, UserId, uuid7
from protocol.server import Error
from prove.client import Client
from tests.world import Somebody, World, heard, http_client, sent

VIEWERS = ("owner", "admin", "moderator", "member", "guest", "adder", "inviter")
"""All who take part. `adder` may add people; `inviter` could, and has invited somebody before losing that."""
BEFORE = ("stays", "leaves", "removed", "banned", "left, banned", "left, invited")
"""Targets who take part before anything happens; the last two leave before the viewers' copies begin."""
INVITED = ("invited", "declined", "accepted", "taken back", "invited, banned", "left, invited")
GONE = ("leaves", "removed", "banned")
"""Targets who end their part, or lose it, after the viewers' copies began."""
STATUSES: dict[str, set[str]] = {
    "active": {*VIEWERS, "stays", "accepted"},
    "invited": {"invited", "left, invited"},
    "declined": {"declined"},
    "banned": {"banned", "invited, banned", "left, banned"},
}
SEES = {
    **dict.fromkeys(("owner", "admin", "adder"), ("active", "invited", "declined", "banned")),
    "inviter": ("active", "invited", "declined"),
    **dict.fromkeys(("moderator", "member", "guest"), ("active",)),
    "stranger": (),
}
"""The statuses that each viewer sees of others."""
OWN = {
    **dict.fromkeys(("invited", "left, invited"), "invited"), "declined": "declined",
    **dict.fromkeys(("stays", "accepted"), "active"), **dict.fromkeys((*GONE, "left, banned"), "left"),
    **dict.fromkeys(("taken back", "invited, banned"), None),
}  # fmt: skip
"""What each target's own export says of their part."""


@pytest.fixture
async def reader(world: World) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    name = f"reader_{uuid7().hex}"
    await world.db.execute(f"CREATE ROLE {name} LOGIN")
    await world.db.execute("SELECT grant_reader($1)", name)
    db = await asyncpg.connect(world.settings.database_url)
    await db.execute(f"SET ROLE {name}")
    yield db
    await db.close()
    await world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def named(events: Iterable[Any], people: dict[str, Somebody]) -> set[str]:
    """Return which people's ids are anywhere in events that are not about the reader alone."""
    text = b"".join(encode(event) for event in events if not hasattr(event, "user_version")).decode()
    return {name for name, who in people.items() if str(who.id) in text}


def statuses(events: Iterable[Any]) -> set[str]:
    """Return the statuses that events give to participants."""
    return {event.participant.status for event in events if isinstance(event, server.ParticipantChanged)}


async def listed(one: Client, about: ConversationId, names: dict[UserId, str]) -> dict[str, set[str] | ErrorCode]:
    """Return whom `list_participants` lists with each status, or why it does not."""
    found: dict[str, set[str] | ErrorCode] = {}
    for status in STATUSES:
        answer = await one.ask(client.ListParticipants(conversation_id=about, status=status, limit=100))  # type: ignore[arg-type]
        if isinstance(answer, Error):
            found[status] = answer.code
        else:
            assert isinstance(answer.result, server.ParticipantPage)
            found[status] = {names[entry.participant.user_id] for entry in answer.result.participants}
    return found


async def test_each_way_tells_each_viewer_the_same_of_outsiders(
    world: World, reader: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    everyone = [*VIEWERS, "stranger", *BEFORE, *(name for name in INVITED if name not in BEFORE)]
    people = dict(zip(everyone, await world.users(*everyone), strict=True))
    names = {who.id: name for name, who in people.items()}
    targets = {name: people[name] for name in OWN}
    of = {name: await world.connect(people[name], number % 2) for number, name in enumerate(people)}
    owner = of["owner"]
    about = await world.channel(owner, is_public=True)
    for name in (*VIEWERS[1:], *BEFORE):
        await of[name].call(client.Join(conversation_id=about))
    for role in ("admin", "moderator", "guest"):
        await owner.call(client.SetRole(conversation_id=about, user_id=people[role].id, role=role))  # type: ignore[arg-type]
    may_add: dict[str, Any] = {"conversation_id": about, "can_add_members": True}
    for name in ("adder", "inviter"):
        await owner.call(client.SetPermissions(user_id=people[name].id, **may_add))
    question = await sent(of["member"], about, "Who is here?")
    for name in ("left, banned", "left, invited"):
        await of[name].call(client.Leave(conversation_id=about))
    last = await sent(owner, about, "From here on")
    base = (await heard(owner, last)).version
    starts = {}
    for name in VIEWERS:
        await heard(of[name], last)
        starts[name] = len(of[name].events)

    invite = client.Invite(conversation_id=about, participants=[people[name].id for name in INVITED])
    await of["inviter"].call(invite)
    await owner.call(
        client.SetPermissions(conversation_id=about, user_id=people["inviter"].id, can_add_members=False)
    )
    await of["declined"].call(client.Decline(conversation_id=about))
    await of["accepted"].call(client.Join(conversation_id=about))
    await of["leaves"].call(client.Leave(conversation_id=about))
    for name in ("removed", "taken back", "banned", "invited, banned", "left, banned"):
        await owner.call(
            client.RemoveParticipant(conversation_id=about, user_id=people[name].id, ban=name.endswith("banned"))
        )
    end = await sent(owner, about, "That was all")

    differences: list[Any] = []

    def expect(found: Any, expected: Any, *where: str) -> None:  # noqa: ANN401 - whatever a way tells
        if found != expected:
            differences.append((where, found, expected))

    for name, one in [(name, of[name]) for name in VIEWERS]:
        await heard(one, end)
        told = one.events[starts[name]:]
        expect(named(told, targets), {*GONE, "accepted"}, name, "live")
        expect(statuses(told), {"active"}, name, "live, statuses")
        for since in (base, 0):
            again = await world.connect(people[name], query="?resume=1")
            await again.call(client.Resume(epoch=again.ready.epoch, versions={about: since}))
            told = (await again.event(server.Changes)).events
            known = {*GONE, "accepted"} if since else {*BEFORE, "accepted"}
            expect(named(told, targets), known, name, f"resume from {since}")
            expect(statuses(told), {"active"}, name, f"resume from {since}, statuses")
    for name in (*VIEWERS, "stranger"):
        found = await listed(of[name], about, names)
        for status, members in STATUSES.items():
            refusal = ErrorCode.NOT_FOUND if name == "stranger" else ErrorCode.FORBIDDEN
            expect(found[status], members if status in SEES[name] else refusal, name, "list", status)
    for name, who in people.items():
        await reader.execute("SELECT set_config('openchat.user_id', $1, false)", str(who.id))
        rows = await reader.fetch("SELECT user_id, status FROM conversation_participant")
        seen = {(names[row["user_id"]], row["status"]) for row in rows}
        sees = SEES.get(name, ("active",) if name in STATUSES["active"] else ())
        allowed = {(member, status) for status in sees for member in STATUSES[status]}
        if OWN.get(name) in {"invited", "declined"}:
            allowed.add((name, str(OWN[name])))
        expect(seen, allowed, name, "policies")
    for name, status in OWN.items():
        async with http_client(world.url) as http:
            token = {"Authorization": f"Bearer {people[name].token}"}
            exported = (await http.get("/v1/auth/export", headers=token)).json()["conversations"]
        found = [part["participant"].get("status", "active") for part in exported]
        expect(found, [] if status is None else [status], name, "export")
        title = ["News"] if status in {"active", "invited"} else [None] if status else []
        expect([part["title"] for part in exported], title, name, "export, title")
    why = await of["member"].call(client.Why(conversation_id=about, message_id=question), server.Whereabouts)
    states = {names[one.user_id]: (one.state, one.at is None) for one in why.recipients}
    left = dict.fromkeys((*GONE, "left, banned", "left, invited"), ("left", False))
    expect({name: state for name, state in states.items() if name in OWN and name not in {"stays", "accepted"}},
        left, "why")  # fmt: skip
    assert not differences, "\n".join(map(str, differences))
    assert await asyncio.wait_for(of["stranger"].ask(client.Ping()), 5)
