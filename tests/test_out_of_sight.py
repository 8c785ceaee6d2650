"""Exports and row-level security reveal nothing of what others do with messages that the user may no longer see."""

import json
from typing import Any

from protocol import client
from protocol.client import Frame
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId
from protocol.payloads import Poll
from protocol.values import ConversationSettings
from prove.client import Client
from server.describe.columns import granted
from tests.world import Reader, UserSession, World, http_client, refused, sent

POLL = Poll(options=["Yes", "No"])
SAID = ("hidden", "deleted", "edited, deleted", "moderated", "moderated, shown", "pinned", "replied to", "reacted to")
WAYS = ("stays", "leaves", "is removed", "is banned", "comes back")
"""How a user's access to the earlier messages changes. After `comes back`, the user sees only later ones."""


class Scene:
    """A channel of an owner, a friend of the owner, and users who each sent the same messages."""

    def __init__(self, world: World, owner: Client, other: Client, people: dict[str, UserSession]) -> None:
        self.world, self.owner, self.other, self.people = world, owner, other, people
        self.about: ConversationId
        self.clients: dict[str, Client] = {}
        self.said: dict[str, dict[str, MessageId]] = {}

    async def begin(self) -> None:
        self.about = await self.world.channel(
            self.owner, is_public=True, settings=ConversationSettings(history="from_joining", system_messages=False)
        )
        await self.other.call(client.Join(conversation_id=self.about))
        for name, who in self.people.items():
            one = self.clients[name] = await self.world.connect(who, 1)
            await one.call(client.Join(conversation_id=self.about))
            theirs = await sent(self.other, self.about, f"Theirs, for {name}")
            said = {each: await sent(one, self.about, f"{each} #{name}") for each in SAID}
            said["poll"] = await sent(one, self.about, "Which?", payload=POLL)
            said["answer"] = await sent(one, self.about, "An answer", parent_message_id=theirs)
            said["theirs"] = theirs
            self.said[name] = said
            await one.call(client.Edit(**self.at(name, "edited, deleted"), content="edited"))
            await one.call(client.ReportMessage(**self.at(name, "theirs"), reason="Rude"))
            await one.call(client.React(**self.at(name, "theirs"), emoji="👍"))
            await one.call(client.Star(**self.at(name, "theirs")))
            await self.owner.call(client.Moderate(**self.at(name, "moderated, shown"), reason="Rude"))

    def at(self, name: str, each: str) -> dict[str, Any]:
        return {"conversation_id": self.about, "message_id": self.said[name][each]}

    async def part(self) -> None:
        for name in ("leaves", "comes back"):
            await self.clients[name].call(client.Leave(conversation_id=self.about))
        await self.clients["comes back"].call(client.Join(conversation_id=self.about))
        for name in ("is removed", "is banned"):
            ban = name == "is banned"
            frame = client.RemoveParticipant(conversation_id=self.about, user_id=self.people[name].id, ban=ban)
            await self.owner.call(frame)

    async def happen(self) -> None:
        """Do all that others can do with the users' messages."""
        for name in self.people:
            frames: list[tuple[Client, Frame]] = [
                (self.owner, client.Moderate(**self.at(name, "hidden"), reason="SECRET")),
                (self.owner, client.Delete(**self.at(name, "deleted"))),
                (self.owner, client.Delete(**self.at(name, "edited, deleted"))),
                (self.owner, client.Moderate(**self.at(name, "moderated"), reason="SECRET")),
                (self.owner, client.Delete(**self.at(name, "moderated"))),
                (self.owner, client.Unmoderate(**self.at(name, "moderated, shown"))),
                (self.owner, client.Pin(**self.at(name, "pinned"))),
                (self.other, client.React(**self.at(name, "reacted to"), emoji="👎")),
                (self.owner, client.Vote(**self.at(name, "poll"), options=[1])),
                (self.owner, client.ClosePoll(**self.at(name, "poll"))),
                (self.owner, client.Moderate(**self.at(name, "theirs"), reason="Upheld")),
            ]
            for one, frame in frames:
                await one.call(frame)
            reply = self.said[name]["replied to"]
            await sent(self.other, self.about, "About them", parent_message_id=reply)
        await self.owner.call(client.UpdateConversation(conversation_id=self.about, title="Renamed"))

    async def export(self, name: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.people[name].token}"}
        async with http_client(self.world.url) as http:
            data = (await http.get("/v1/auth/export", headers=headers)).json()
        if name == "comes back":  # and takes part, so that they may see the title
            for one in data["conversations"]:
                del one["title"]
        return {key: value for key, value in data.items() if key not in {"me", "sessions"}}


async def test_acts_of_others_on_messages_out_of_sight_are_not_revealed(world: World, reader: Reader) -> None:
    owner, other, *people = await world.users("Owner", "Other", *WAYS)
    scene = Scene(world, await world.connect(owner), await world.connect(other), dict(zip(WAYS, people, strict=True)))
    await scene.begin()
    await scene.part()
    gone = [name for name in WAYS if name != "stays"]

    async def told(name: str) -> dict[str, Any]:
        await reader.db.execute("SELECT set_config('openchat.user_id', $1, false)", str(scene.people[name].id))
        rows = {}
        for table, names in granted().items():
            # A user who came back sees the conversation and later messages.
            if name != "comes back" or table not in {"conversation", "conversation_participant", "message"}:
                query = f'SELECT {", ".join(names) or "*"} FROM "{table}"'
                rows[table] = sorted(map(repr, await reader.db.fetch(query)))
        return {"export": await scene.export(name), "rows": rows}

    before = {name: await told(name) for name in WAYS}
    for name in WAYS:
        mine = {row["message"]["id"]: row for row in before[name]["export"]["messages"]}
        contents = {each: mine[str(scene.said[name][each])]["message"].get("content") for each in (*SAID, "poll")}
        expected = {each: f"{each} #{name}" for each in SAID} | {"edited, deleted": "edited", "poll": "Which?"}
        if name == "stays":
            expected["moderated, shown"] = ""
        assert contents == expected
        assert mine[str(scene.said[name]["poll"])]["message"]["payload"]["options"] == POLL.options
        (edit,) = mine[str(scene.said[name]["edited, deleted"])]["edits"]
        assert edit["content"] == f"edited, deleted #{name}"
    await scene.happen()
    after = {name: await told(name) for name in WAYS}
    for name in gone:
        with refused(ErrorCode.NOT_FOUND, "message_id"):
            await scene.clients[name].call(client.GetMessage(**scene.at(name, "hidden")))
        for part, was in before[name]["export"].items():
            assert after[name]["export"][part] == was, (name, part)
        for table, rows in before[name]["rows"].items():
            assert after[name]["rows"][table] == rows, (name, table)
    # Users who may see the messages see the acts.
    shown = json.dumps(after["stays"]["export"], ensure_ascii=False)
    assert all(word in shown for word in ("SECRET", "👎", '"poll_voters": 1', '"is_pinned": true', "upheld"))
    assert len(after["stays"]["rows"]["thread_follow"]) == len(before["stays"]["rows"]["thread_follow"]) + 1
    # The end of the conversation is not revealed either.
    await scene.owner.call(client.DeleteConversation(conversation_id=scene.about))
    for name in ("leaves", "is removed", "is banned"):
        assert await told(name) == before[name], name
