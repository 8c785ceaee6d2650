"""Twins: environments, each with a viewer, that differ in one fact about another user.

Replies and events that the viewer receives in one are compared byte by byte with those in the other. Ids, names and
times are replaced before.
"""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from argon2 import PasswordHasher

from protocol import client, server
from protocol.client import Frame
from protocol.codec import now
from protocol.ids import ConversationId, EditId, MessageId, ReportId, UserId, uuid7
from protocol.payloads import Poll
from protocol.server import Error
from protocol.values import PresenceStatus
from prove.client import Client
from prove.writes import PUSH_POINT
from server.auth.tokens import new_token, token_hash
from server.queries import push, sessions
from tests.world import UserSession, World, http_client, message, sent

VIEWER, XAVER, COMPANION, MARKER = "Viewer", "Xaver", "Companion", "Marker"
ADD = """INSERT INTO "user" (id, name, display_name, email, bio, last_seen_at) VALUES ($1, $2, $2, $3, 'Bio', $4)"""
ACCOUNT = """
INSERT INTO account (user_id, provider_id, account_id, password) VALUES ($1, 'credential', $2, $3)
"""
WORDS = "correct horse"
CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
READ_AT = re.compile(r'"revision":(\d{16})\b')
"""The revision of a presence, which is the time at which the server read it, in microseconds."""
TIME = re.compile(r'"(\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|[+-][0-9:]+))"')
RANDOM = re.compile(r'"(token|ip_address|user_agent|email|account_id|hash|previous_hash)":"[^"]*"')


class Twin:
    """One of the environments: users with this label, in the same database as the others."""

    def __init__(self, world: World, label: str) -> None:
        self.world, self.label = world, label
        self.users: dict[str, UserSession] = {}
        self.names: dict[str, str] = {}
        self.group = self.direct = ConversationId(uuid7())
        self.other = ConversationId(uuid7())
        self.messages: dict[str, MessageId] = {}
        self.viewer: Client
        self.xaver: Client | None = None
        self.companion: Client
        self.began: datetime
        self.received: dict[str, list[str]] = {}

    async def begin(self, *, have_met: bool, are_friends: bool) -> None:
        """Create the users, their relationships and messages, and let the viewer watch them."""
        for rank, name in enumerate((VIEWER, XAVER, COMPANION, MARKER)):
            # Lists ordered by id have the same order in each twin.
            user_id = UserId(
                UUID(int=(rank << 96) | (int.from_bytes(self.label.encode()) << 24) | (4 << 76) | (8 << 60))
            )
            called = f"{name}{self.label}"
            await self.world.db.execute(ADD, user_id, called, f"{called.lower()}@example.org", LONG_AGO)
            await self.world.db.execute(ACCOUNT, user_id, f"{called.lower()}@example.org", CHEAP.hash(WORDS))
            token = new_token()
            await sessions.create(self.world.db, user_id, token_hash(token), timedelta(days=1), (None, None))
            self.users[name] = UserSession(user_id, called, token)
        self.viewer = await self.world.connect(self.users[VIEWER])
        self.companion = await self.world.connect(self.users[COMPANION])
        xaver = self.xaver = await self.world.connect(self.users[XAVER])
        if have_met:
            await self._meet(xaver)
        if are_friends:
            await xaver.call(client.RequestFriend(user_id=self.id(VIEWER)))
            await self.viewer.call(client.AnswerFriend(user_id=self.id(XAVER), accept=True))
            await xaver.call(client.Follow(user_id=self.id(VIEWER)))
        else:
            await self.viewer.call(client.RequestFriend(user_id=self.id(XAVER)))
        await self.viewer.call(client.Follow(user_id=self.id(XAVER)))
        self.other = await self.world.group(self.viewer, self.users[COMPANION], title=f"Other{self.label}")
        watch = client.Watch(user_ids=[self.id(name) for name in (XAVER, COMPANION, MARKER)])
        await self.viewer.call(watch)
        await self.settle()
        # Ignore the events so far.
        self.start = len(self.viewer.events)
        self.began = now()

    async def _meet(self, xaver: Client) -> None:
        self.group = await self.world.group(
            self.companion, self.users[VIEWER], self.users[XAVER], title=f"Circle{self.label}", is_public=True
        )
        here: dict[str, Any] = {"conversation_id": self.group}
        await self.companion.call(client.SetRole(**here, user_id=self.id(VIEWER), role="admin"))
        made = await self.viewer.call(client.CreateDirect(user_id=self.id(XAVER)), server.OneConversation)
        self.direct = made.view.conversation.id
        mention = f"Hello <@{self.id(VIEWER)}>"
        self.messages["poll"] = await sent(xaver, self.group, "Tea?", payload=Poll(options=["Yes", "No"]))
        self.messages["theirs"] = await sent(xaver, self.group, mention)
        self.messages["mine"] = await sent(self.viewer, self.group, "Mine")
        self.messages["reply"] = await sent(xaver, self.group, "Reply", parent_message_id=self.messages["mine"])
        self.messages["direct"] = await sent(xaver, self.direct, "Direct")
        self.messages["my direct"] = await sent(self.viewer, self.direct, "My direct")
        await xaver.call(client.React(**here, message_id=self.messages["mine"], emoji="👍"))
        await xaver.call(client.Vote(**here, message_id=self.messages["poll"], options=[0]))
        await xaver.call(client.Read(**here, message_id=self.messages["reply"]))
        await self.companion.call(client.Pin(**here, message_id=self.messages["theirs"]))
        await self.companion.call(client.ReportMessage(**here, message_id=self.messages["theirs"], reason="Rude"))

    def id(self, name: str) -> UserId:
        return self.users[name].id

    def at(self, which: str) -> dict[str, Any]:
        place = self.direct if which.endswith("direct") else self.group
        return {"conversation_id": place, "message_id": self.messages.get(which, MessageId(UUID(int=1)))}

    # --------------------------------------------------------------------------------------------------- acts of Xaver

    async def settle(self) -> None:
        """Wait until all changes of presence are published, by connecting and closing another user after them."""
        seen = len(self.viewer.events)
        marker = await self.world.connect(self.users[MARKER])
        await marker.close()
        marked = self.id(MARKER)
        await self.viewer.event(
            server.PresenceChanged,
            lambda event: (event.presence.user_id, event.presence.status) == (marked, "offline"),
            start=seen,
        )
        await self.world.workers[0].app.presence._record()  # noqa: SLF001
        await self.caught_up()
        await self.viewer.synced()

    async def behave(self, *statuses: PresenceStatus) -> None:
        """Act as a client does by itself: connect, close, confirm deliveries and change the presence."""
        for _ in range(2):
            if self.xaver is None:
                self.xaver = await self.world.connect(self.users[XAVER])
                # Otherwise the arrival would share an event with the next act of Xaver.
                await self.settle()
            for which in ("reply", "my direct"):
                await self.xaver.ask(client.Delivered(**self.at(which)))
            for status in statuses or ("away", "online"):
                await self.xaver.call(client.SetPresence(status=status))
            await self.settle()
            await self.leave()
        self.xaver = await self.world.connect(self.users[XAVER])
        await self.settle()

    async def leave(self) -> None:
        """Close Xaver's connection and wait until that is published."""
        assert self.xaver is not None
        await self.xaver.close()
        self.xaver = None
        await self.settle()

    async def act(self) -> None:
        """Act visibly: send a message, react, read, and change the name."""
        one = self.xaver or await self.world.connect(self.users[XAVER])
        if self.messages:
            await sent(one, self.group, "Afterwards")
            await one.call(client.React(**self.at("theirs"), emoji="🎉"))
            await one.call(client.Read(**self.at("reply")))
        await one.call(client.UpdateProfile(display_name=f"Xaver{self.label} II"))

    # --------------------------------------------------------------------------------------------- frames of the viewer

    def reads(self) -> list[Frame]:
        """Return every frame that reads, about Xaver if the frame can be about a user."""
        here: dict[str, Any] = {"conversation_id": self.group}
        them: dict[str, Any] = {"user_id": self.id(XAVER)}
        name = f"Xaver{self.label}"
        frames: list[Frame] = [
            client.GetUsers(user_ids=[one.id for one in self.users.values()]),
            client.GetProfile(**them),
            client.SearchUsers(text=name),
            client.ListParticipants(**here),
            client.ListParticipants(**here, status="invited"),
            client.History(**here, with_replies=True),
            client.History(conversation_id=self.direct),
            *(client.GetMessage(**self.at(which)) for which in ("theirs", "mine", "my direct")),
            *(client.ListReaders(**self.at(which)) for which in ("theirs", "mine", "my direct")),
            *(client.Why(**self.at(which)) for which in ("theirs", "mine", "my direct")),
            client.ListEdits(**self.at("mine")),
            client.ListPins(**here),
            client.ListStars(),
            client.ListVotes(**self.at("poll")),
            client.GetThread(**self.at("mine")),
            client.ListReplies(**self.at("mine")),
            client.ListThreads(),
            client.ListReports(**here),
            client.ListAudit(**here),
            client.Search(text="Hello", conversation_id=self.group),
            client.Search(mentions_me=True),
            client.FindConversations(text=f"Circle{self.label}"),
            client.ListConversations(),
            client.GetConversation(**here),
            client.GetConversation(conversation_id=self.direct),
            client.ListFeed(),
            client.GetBadge(),
            client.ListRelationships(limit=100),
            client.ListInvitations(),
            client.ListDrafts(),
            client.ListScheduled(),
            client.GetPushKey(),
            client.GetMe(),
            client.Resume(epoch="another", user_version=0, versions={}),
        ]
        return [*frames, client.Watch(user_ids=[self.id(XAVER), self.id(COMPANION)])]

    def writes(self) -> list[Frame]:
        """Return all other frames, about Xaver if they can be about a user. The last ones delete or leave."""
        here: dict[str, Any] = {"conversation_id": self.group}
        other: dict[str, Any] = {"conversation_id": self.other}
        them: dict[str, Any] = {"user_id": self.id(XAVER)}
        name, user = f"Xaver{self.label}", self.id(XAVER)
        new = [MessageId(uuid7()) for _ in range(6)]
        endpoint = f"https://push.example/{self.label}"
        return [
            client.Ping(),
            message(self.group, f"Hello <@{user}>"),
            message(self.group, f"Hello @{name}"),
            message(self.group, "Reply", parent_message_id=self.messages.get("reply")),
            message(self.direct, "Are you there?"),
            client.Edit(**self.at("mine"), content=f"Mine, <@{user}>", edit_id=EditId(uuid7())),
            client.Edit(**self.at("my direct"), content="Edited", edit_id=EditId(uuid7())),
            *(client.React(**self.at(which), emoji="❤️") for which in ("theirs", "direct")),
            *(client.Unreact(**self.at(which), emoji="❤️") for which in ("theirs", "direct")),
            *(client.Pin(**self.at(which)) for which in ("mine", "direct")),
            *(client.Unpin(**self.at(which)) for which in ("mine", "direct")),
            client.Vote(**self.at("poll"), options=[1]),
            client.Typing(**here), client.Typing(conversation_id=self.direct),
            *(client.Delivered(**self.at(which)) for which in ("theirs", "direct")),
            *(client.Read(**self.at(which)) for which in ("theirs", "direct")),
            client.MarkUnread(**self.at("direct")),
            client.Star(**self.at("theirs")), client.Unstar(**self.at("theirs")),
            client.FollowThread(**self.at("mine")), client.ReadThread(**self.at("mine"), thread_order=1),
            client.UnfollowThread(**self.at("mine")),
            client.Forward(**self.at("theirs"), to_conversation_id=self.direct, new_message_id=new[0]),
            client.Forward(**self.at("direct"), to_conversation_id=self.other, new_message_id=new[1]),
            client.SetDraft(conversation_id=self.direct, content="Dear"),
            client.Schedule(conversation_id=self.direct, message_id=new[2], content="Later",
                            send_at=now() + timedelta(days=1)),
            client.CancelScheduled(conversation_id=self.direct, message_id=new[2]),
            client.CreateDirect(**them),
            client.CreateGroup(conversation_id=ConversationId(uuid7()), title="Us", participants=[user]),
            client.CreateChannel(conversation_id=ConversationId(uuid7()), title="News"),
            client.AddParticipants(**other, participants=[user]), client.Invite(**other, participants=[user]),
            client.SetPreferences(conversation_id=self.direct, is_muted=True),
            client.UpdateConversation(**other, title="Another title"), client.SetInviteCode(**other),
            client.SetRole(**here, user_id=user, role="guest"),
            client.SetPermissions(**here, user_id=user, can_pin_messages=True),
            client.TransferOwnership(**other, user_id=self.id(COMPANION)),
            client.Moderate(**self.at("theirs"), reason="Rude"), client.Unmoderate(**self.at("theirs")),
            client.ReportMessage(**self.at("theirs"), reason="Rude"),
            client.DismissReport(**here, report_id=ReportId(UUID(int=1))),
            client.ClosePoll(**self.at("poll")), client.Delete(**self.at("theirs")),
            client.RequestFriend(**them), client.AnswerFriend(**them, accept=True), client.Unfriend(**them),
            client.Follow(**them), client.Unfollow(**them), client.Mute(**them), client.Unmute(**them),
            client.SetSwitches(**them, can_see_profile=True),
            client.SeeFeed(), client.SetPresence(status="busy"), client.UpdateProfile(bio="Mine"),
            client.RegisterPush(endpoint=endpoint, p256dh=PUSH_POINT, auth="A" * 22),
            client.UnregisterPush(endpoint=endpoint),
            client.Decline(conversation_id=self.group), client.Join(conversation_id=self.group),
            client.Block(**them), client.Unblock(**them),
            client.RemoveParticipant(**here, user_id=user, ban=True), client.Unban(**here, user_id=user),
            client.Unwatch(user_ids=[user]), client.Leave(**here), client.DeleteConversation(**other),
        ]  # fmt: skip

    async def ask(self, one: Client, kind: str, frames: list[Frame]) -> None:
        answers = self.received.setdefault(kind, [])
        for number, frame in enumerate(frames):
            answer = await one.ask(frame)
            found: object = msgspec.structs.replace(answer, re=None) if isinstance(answer, Error) else answer.result
            if isinstance(found, server.RelationshipPage):
                found.relationships.sort(key=lambda entry: (entry.relationship.kind, entry.relationship.is_outgoing))
            if isinstance(found, server.UserList):
                found.users.sort(key=lambda face: face.id)
            answers.append(f"{number} {type(frame).__name__} {self.plain(found)}")
            if kind == "writes":
                await self.caught_up()

    async def caught_up(self) -> None:
        """Wait until the viewer's connections have received all changes of the viewer's own data."""
        online_users = self.world.workers[0].app.hub.online_users
        async with asyncio.timeout(10):
            while True:
                version = await self.world.db.fetchval('SELECT version FROM "user" WHERE id = $1', self.id(VIEWER))
                sockets = online_users.sockets(self.id(VIEWER))
                if all(socket.user_version == version for socket in sockets):
                    break
                await asyncio.sleep(0.002)

    async def collect(self, *, writes: bool) -> None:
        """Send all frames of the viewer, on the open connection, a new one, one that resumes, and over HTTP. Record all
        replies and events.
        """
        await self.ask(self.viewer, "reads", self.reads())
        again = await self.world.connect(self.users[VIEWER])
        back = await self.world.connect(self.users[VIEWER], query="?resume=1")
        versions = dict.fromkeys((self.group, self.direct), 1) if self.messages else {}
        epoch = self.viewer.ready.epoch
        resumed = await back.call(client.Resume(epoch=epoch, user_version=0, versions=versions), server.Resumed)
        self.received["resumed"] = [self.plain(resumed)]
        async with http_client(self.world.url) as http:
            headers = {"authorization": f"Bearer {self.users[VIEWER].token}"}
            export = (await http.get("/v1/auth/export", headers=headers)).json()
        export["relationships"].sort(key=lambda one: one["kind"])
        for key in ("conversations", "stars", "threads", "sessions"):
            export[key].sort(key=lambda one: json.dumps(self._cut(json.dumps(one)), sort_keys=True))
        self.received["export"] = [self._cut(json.dumps(export, separators=(",", ":"), ensure_ascii=False))]
        queued = []
        for name, here in (("theirs", self.group), ("reply", self.group), ("direct", self.direct)):
            if name in self.messages:
                page = push.PushPage(here, push.FIRST, (self.messages[name],))
                queued += (await push.due(self.world.db, [page], 100)).posts
        self.received["pushed"] = [self.plain(one) for one in await push.notices(self.world.db, queued)]
        if writes:
            await self.ask(self.viewer, "writes", self.writes())
        await self.settle()
        for name, one in {"first": self.viewer, "again": again, "back": back}.items():
            await one.synced()
            start = self.start if one is self.viewer else 0
            events = [self.plain(event) for event in one.events[start:] if not isinstance(event, server.Heartbeat)]
            # Events about different objects have no order.
            self.received[f"events {name}"] = sorted(event for event in events if MARKER not in event)

    def plain(self, told: object) -> str:
        if isinstance(told, server.Conversations):
            told.conversations.sort(key=lambda view: (view.conversation.type, view.conversation.title or ""))
        return self._cut(msgspec.json.encode(told, enc_hook=str).decode())

    def _cut(self, text: str) -> str:
        """Return a text without ids, times and names, which always differ between twins."""
        known: dict[str, str] = {str(one.id): name for name, one in self.users.items()}
        known |= {str(one): name for name, one in self.messages.items()}
        known |= {str(self.group): "group", str(self.direct): "direct", str(self.other): "other"}
        text = ID.sub(lambda found: known.get(found[0], "id"), text)
        text = READ_AT.sub(self._when_read, text)
        # Delivery times of neighbouring versions may be one (`DeliveryTimes`), before or after `began`.
        text = re.sub(r'"published_at":"[^"]*"', '"published_at":""', text)
        text = TIME.sub(self._when, text)
        text = re.sub(r'"invite":{"code":"[^"]*"', '"invite":{"code":""', text)
        return RANDOM.sub(r'"\1":""', text.replace(self.label, ""))

    def _when_read(self, found: re.Match[str]) -> str:
        return '"revision":' + ("0" if int(found[1]) < 1e6 * self.began.timestamp() else "1")

    def _when(self, found: re.Match[str]) -> str:
        at = datetime.fromisoformat(found[1])
        return '"before"' if at < self.began else '"after"'
