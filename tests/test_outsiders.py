"""Invited, declined and banned users: every way to learn of them gives each viewer the same answer."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

from protocol import client, server
from protocol.client import Frame
from protocol.codec import encode
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, UserId
from protocol.server import Error
from prove.client import Client
from tests.world import Reader, UserSession, World, http_client, received_message, sent

VIEWERS = ("owner", "admin", "moderator", "member", "guest", "adder", "remover", "inviter")
"""All participants.

`adder` may add people, `remover` may remove them. `inviter` invited people and lost the right to.
"""
BEFORE = ("stays", "leaves", "removed", "banned", "left, banned", "left, invited")
"""Targets who take part at the start. The last two leave before the viewers' state begins."""
INVITED = ("invited", "declined", "accepted", "taken back", "invited, banned", "left, invited")
GONE = ("leaves", "removed", "banned")
"""Targets whose membership ends after the viewers' state began."""
Status = Literal["active", "invited", "declined", "banned"]
STATUSES: dict[Status, set[str]] = {
    "active": {*VIEWERS, "stays", "accepted"},
    "invited": {"invited", "left, invited"},
    "declined": {"declined"},
    "banned": {"banned", "invited, banned", "left, banned"},
}
SEES: dict[str, tuple[Status, ...]] = {
    **dict.fromkeys(("owner", "admin", "adder", "remover"), ("active", "invited", "declined", "banned")),
    "inviter": ("active", "invited", "declined"),
    **dict.fromkeys(("moderator", "member", "guest"), ("active",)),
    "stranger": (),
}
"""The statuses of others that each viewer sees."""
OWN = {
    **dict.fromkeys(("invited", "left, invited"), "invited"), "declined": "declined",
    **dict.fromkeys(("stays", "accepted"), "active"), **dict.fromkeys((*GONE, "left, banned"), "left"),
    **dict.fromkeys(("taken back", "invited, banned"), None),
}  # fmt: skip
"""The membership that each target's own export states."""


Findings: TypeAlias = list[tuple[str, object, object]]
"""Tuples of a source and viewer, the value that the source returned, and the expected value."""


class Scene:
    """A channel with a user for each kind of membership."""

    def __init__(
        self, world: World, people: dict[str, UserSession], of: dict[str, Client], about: ConversationId
    ) -> None:
        self.world = world
        self.people = people
        self.of = of
        self.about = about
        self.names = {who.id: name for name, who in people.items()}
        self.question: MessageId
        self.base = 0
        self.starts: dict[str, int] = {}

    async def call(self, name: str, frame: Frame) -> None:
        await self.of[name].call(frame)

    async def gather(self) -> None:
        """Add the first participants, and note the versions that the viewers have then."""
        for name in (*VIEWERS[1:], *BEFORE):
            await self.call(name, client.Join(conversation_id=self.about))
        roles: tuple[Literal["admin", "moderator", "guest"], ...] = ("admin", "moderator", "guest")
        for role in roles:
            await self.call("owner", client.SetRole(conversation_id=self.about, user_id=self.id(role), role=role))
        for name in ("adder", "inviter"):
            await self._permit(name, can_add_members=True)
        await self._permit("remover", can_remove_members=True)
        self.question = await sent(self.of["member"], self.about, "Who is here?")
        for name in ("left, banned", "left, invited"):
            await self.call(name, client.Leave(conversation_id=self.about))
        last = await sent(self.of["owner"], self.about, "From here on")
        for name in VIEWERS:
            self.base = (await received_message(self.of[name], last)).version
            self.starts[name] = len(self.of[name].events)

    async def happen(self) -> None:
        """Change all memberships, and wait until all viewers have the events."""
        invited = [self.id(name) for name in INVITED]
        await self.call("inviter", client.Invite(conversation_id=self.about, participants=invited))
        await self._permit("inviter", can_add_members=False)
        await self.call("declined", client.Decline(conversation_id=self.about))
        await self.call("accepted", client.Join(conversation_id=self.about))
        await self.call("leaves", client.Leave(conversation_id=self.about))
        for name in ("removed", "taken back", "banned", "invited, banned", "left, banned"):
            ban = name.endswith("banned")
            frame = client.RemoveParticipant(conversation_id=self.about, user_id=self.id(name), ban=ban)
            await self.call("owner", frame)
        end = await sent(self.of["owner"], self.about, "That was all")
        for name in VIEWERS:
            await received_message(self.of[name], end)

    async def _permit(self, name: str, **permissions: bool) -> None:
        await self.call(
            "owner", client.SetPermissions(conversation_id=self.about, user_id=self.id(name), **permissions)
        )

    def id(self, name: str) -> UserId:
        return self.people[name].id

    def named(self, events: Iterable[Any], among: Iterable[str] = OWN) -> set[str]:
        """Return the users whose ids occur in events that do not concern the reader alone."""
        text = b"".join(encode(event) for event in events if not hasattr(event, "user_version")).decode()
        return {name for name in among if str(self.id(name)) in text}


def told_by(scene: Scene, events: Sequence[Any]) -> tuple[set[str], set[str], set[str]]:
    """Return the users that events name, those that left by them, and the statuses of participants in them."""
    left = [event.user_id for event in events if isinstance(event, server.ParticipantLeft)]
    statuses = {str(event.participant.status) for event in events if isinstance(event, server.ParticipantChanged)}
    assert len(left) == len(set(left))
    return scene.named(events), {scene.names[user_id] for user_id in left}, statuses


async def by_events(scene: Scene) -> Findings:
    told: Findings = []
    for name in VIEWERS:
        live = scene.of[name].events[scene.starts[name] :]
        told.append((f"{name}, live", told_by(scene, live), ({*GONE, "accepted"}, {*GONE}, {"active"})))
        for since, known in ((scene.base, {*GONE}), (0, {*BEFORE})):
            again = await scene.world.connect(scene.people[name], query="?resume=1")
            await again.call(client.Resume(epoch=again.ready.epoch, versions={scene.about: since}))
            missed = (await again.event(server.Changes)).events
            expected = (known | {"accepted"}, known - {"stays"}, {"active"})
            told.append((f"{name}, resume from {since}", told_by(scene, missed), expected))
    stranger = scene.of["stranger"]
    await stranger.synced()
    return [*told, ("stranger, live", scene.named(stranger.events, set(scene.people) - {"stranger"}), set())]


async def by_lists(scene: Scene) -> Findings:
    told: Findings = []
    for name in (*VIEWERS, "stranger"):
        refusal = ErrorCode.NOT_FOUND if name == "stranger" else ErrorCode.FORBIDDEN
        for status, members in STATUSES.items():
            frame = client.ListParticipants(conversation_id=scene.about, status=status, limit=100)
            answer = await scene.of[name].ask(frame)
            found: set[str] | ErrorCode
            if isinstance(answer, Error):
                found = answer.code
            else:
                assert isinstance(answer.result, server.ParticipantPage)
                found = {scene.names[entry.participant.user_id] for entry in answer.result.participants}
            told.append((f"{name}, list of {status}", found, members if status in SEES[name] else refusal))
    return told


async def by_policies(scene: Scene, reader: Reader) -> Findings:
    told: Findings = []
    for name, who in scene.people.items():
        await reader.db.execute("SELECT set_config('openchat.user_id', $1, false)", str(who.id))
        rows = await reader.db.fetch("SELECT user_id, status FROM conversation_participant")
        sees = SEES.get(name, ("active",) if name in STATUSES["active"] else ())
        shown: set[tuple[str, str]] = {(member, status) for status in sees for member in STATUSES[status]}
        own = OWN.get(name)
        if own in {"invited", "declined"}:
            shown.add((name, str(own)))
        told.append((f"{name}, policies", {(scene.names[row["user_id"]], row["status"]) for row in rows}, shown))
    return told


async def by_export(scene: Scene) -> Findings:
    told: Findings = []
    async with http_client(scene.world.url) as http:
        for name, own in OWN.items():
            answer = await http.get("/v1/auth/export", headers={"Authorization": f"Bearer {scene.people[name].token}"})
            parts = answer.json()["conversations"]
            found = [(part["participant"].get("status", "active"), part["title"]) for part in parts]
            title = "News" if own in {"active", "invited"} else None
            told.append((f"{name}, export", found, [] if own is None else [(own, title)]))
    return told


async def by_why(scene: Scene) -> Findings:
    frame = client.Why(conversation_id=scene.about, message_id=scene.question)
    why = await scene.of["member"].call(frame, server.DeliveryReport)
    found = {scene.names[one.user_id]: (one.state, one.at is None) for one in why.recipients}
    gone = dict.fromkeys((*GONE, "left, banned", "left, invited"), ("left", False))
    return [("member, why", {name: found[name] for name in found.keys() & OWN.keys() - STATUSES["active"]}, gone)]


async def test_every_source_gives_each_viewer_the_same_list_of_outsiders(world: World, reader: Reader) -> None:
    everyone = [*VIEWERS, "stranger", *BEFORE, *(name for name in INVITED if name not in BEFORE)]
    people = dict(zip(everyone, await world.users(*everyone), strict=True))
    of = {name: await world.connect(who, number % 2) for number, (name, who) in enumerate(people.items())}
    scene = Scene(world, people, of, await world.channel(of["owner"], is_public=True))
    await scene.gather()
    await scene.happen()
    told = [
        *await by_events(scene), *await by_lists(scene), *await by_policies(scene, reader), *await by_export(scene),
        *await by_why(scene),
    ]  # fmt: skip
    assert [line for line in told if line[1] != line[2]] == []
    assert len(told) > 70


GONE_VERSION = "SELECT gone_version(json_populate_record(NULL::conversation_participant, $1::json))"


async def test_departure_recorded_by_an_older_worker_has_its_own_version(world: World) -> None:
    """Workers before migration 0030 do not reset `left_version` on joining, and do not set it on leaving."""
    table = [
        # status, joined_version, left_version, version, has left_at -> gone_version
        ("active", 5, 0, 5, False, 0), ("active", 5, 3, 5, False, 0),
        ("left", 2, 4, 4, True, 4), ("invited", 2, 4, 6, True, 4), ("banned", 2, 4, 6, True, 4),
        ("left", 5, 3, 7, True, 7), ("removed", 5, 3, 7, True, 7), ("banned", 5, 3, 7, True, 7),
        ("left", 5, 0, 7, True, 7), ("invited", 0, 0, 3, False, 0), ("banned", 0, 0, 3, False, 0),
    ]  # fmt: skip
    wrong = []
    for status, joined, left, version, has_left, expected in table:
        row = {"status": status, "joined_version": joined, "left_version": left, "version": version,
               "left_at": "2026-01-01T00:00:00Z" if has_left else None}  # fmt: skip
        if (found := await world.db.fetchval(GONE_VERSION, encode(row).decode())) != expected:
            wrong.append((row, found, expected))
    assert wrong == []
    # A user who was away receives the last departure once, by its version.
    ada, charles = await world.users("Ada", "Charles")
    hers, his = await world.connect(ada), await world.connect(charles)
    about = await world.channel(hers, is_public=True)
    for frame in (client.Join, client.Leave, client.Join, client.Leave):
        await his.call(frame(conversation_id=about))
    stale = """UPDATE conversation_participant p SET left_version = p.joined_version - 1
        WHERE p.conversation_id = $1 AND p.user_id = $2 RETURNING p.version"""
    version = await world.db.fetchval(stale, about, charles.id)
    again = await world.connect(ada, query="?resume=1")
    await again.call(client.Resume(epoch=again.ready.epoch, versions={about: 0}))
    missed = (await again.event(server.Changes)).events
    assert [one.version for one in missed if isinstance(one, server.ParticipantLeft)] == [version]
