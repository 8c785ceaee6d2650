"""A simulated user. It acts at random, loses connections, reconnects, and repeats each frame until it is answered."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol
from uuid import UUID

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus

from protocol import client, server
from protocol.client import Frame
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, EditId, MessageId, UserId, uuid7
from protocol.limits import MAX_RESUMED
from protocol.payloads import Poll
from protocol.values import PresenceStatus
from prove.client import Answer, Client
from prove.mirror import Mirror

EMOJI = ("👍", "🎉", "❤️")
TRANSIENT = {ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED}
EXPECTED = {ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN, ErrorCode.CONFLICT, ErrorCode.RATE_LIMITED}
"""Errors that random actions cause: another user was faster, has a higher role, or a daily limit was reached."""
MAX_RETRY_MS = 60_000
"""Max delay of a retry, in milliseconds. A user who has reached a daily limit would wait for hours."""
CONNECT_SECONDS = 5.0
RETRY_SECONDS = 0.05
POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0
"""Max wait for an answer, in seconds. After that, the client drops the connection and repeats the frame."""
SILENT_HEARTBEATS = 2.5
"""Max heartbeat periods without any frame. After that, the connection counts as half-open and is dropped."""
UNAUTHORIZED = 401
DROPS, JOINS, GLOBAL, STARTS_TYPING, REPLIES, LONG_ONES = 0.01, 0.5, 0.05, 0.7, 0.3, 0.2
"""Probabilities, per opportunity, that a connection drops and that one of these actions is chosen."""
INVITES = 0.7
POLLS, ANONYMOUS, MARKDOWN, IN_BOTH, QUOTES = 0.1, 0.3, 0.1, 0.3, 0.1
SCHEDULED_SECONDS = (0.0, 0.5, 86_400.0)
"""Delays of scheduled messages, in seconds: none, short, or until long after the run."""
ROLES: tuple[Literal["admin", "moderator", "member", "guest"], ...] = ("admin", "moderator", "member", "guest")
LONG = 8_000
"""Characters of a long message."""


class Identity(Protocol):
    """An account."""

    @property
    def id(self) -> UserId:
        """The user's id."""

    @property
    def name(self) -> str:
        """The name in reports."""

    @property
    def token(self) -> str:
        """The token of a session."""


class Tally:
    """Counts of an actor's actions in one phase. Waits are in seconds, from the first attempt to the answer."""

    def __init__(self) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.messages: set[MessageId] = set()
        self.edits: set[EditId] = set()
        self.scheduled: set[MessageId] = set()
        self.longest_wait = 0.0
        self.reconnects = 0
        self.unexpected: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        """Why connections ended: the server's close code, or the client's own reason."""


class Actor:
    """One user with one connection at a time, to any worker."""

    def __init__(
        self,
        account: Identity,
        urls: Callable[[], Sequence[str]],
        channels: Sequence[ConversationId],
        seed: int,
        *,
        log_in: Callable[[], Awaitable[str]] | None = None,
        sets_presence: bool = True,
    ) -> None:
        """`log_in` returns a new token. It is called when a session has ended."""
        self.account = account
        self._token = account.token
        self._urls = urls
        self._channels = channels
        self._log_in = log_in
        self._sets_presence = sets_presence
        self._random = random.Random(seed)
        self.others: list[UserId] = []
        """The users whom it may add, write to and watch."""
        self._watched: list[UserId] = []
        self.mirror = Mirror()
        self.tally = Tally()
        self.client: Client | None = None
        self.asked_at = 0.0
        """When the frame was sent that waits for an answer, or 0."""
        self._status: PresenceStatus = "online"
        self._received_at = 0.0
        self._back_at = 0.0
        self._ticket: str | None = None
        self._is_behind = False
        self.noticed_losses = 0
        """How often a heartbeat revealed a lost event."""

    def another_device(self, seed: int) -> "Actor":
        """Return a further device of the user, which leaves the presence to this one. It begins with a copy of this
        mirror, because reading every conversation again would use up the user's rate limits.
        """
        device = Actor(self.account, self._urls, self._channels, seed, log_in=self._log_in, sets_presence=False)
        device._token = self._token
        device.others = self.others
        device.mirror = deepcopy(self.mirror)
        device.mirror.wrong, device.mirror.shown = Counter(), set()
        return device

    # -------------------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        """Connect to any worker and resume."""
        while True:
            await asyncio.sleep(max(0.0, self._back_at - time.monotonic()))
            token, self._ticket = self._ticket or self._token, None
            fresh = Client(self._random.choice(self._urls()), token, query="?resume=1", open_timeout=CONNECT_SECONDS)
            fresh.on_event = self._receive
            # Before the connection is open, because the server may send events on it before `resume`.
            self.mirror.begin_resume()
            try:
                async with asyncio.timeout(2 * CONNECT_SECONDS):
                    await fresh.open()
                    fresh.ready = ready = await fresh.event(server.Ready)
                    self._received_at = time.monotonic()
                    self.client = fresh
                    for frame in self._resumes():
                        await self._until_done(fresh, frame)
                    self.mirror.epoch = ready.epoch
                    self._is_behind = False
                    await self._watch(fresh)
                    await self._load()
            except InvalidStatus as error:
                self.client = None
                self.tally.ends[f"HTTP {error.response.status_code}"] += 1
                is_over = error.response.status_code == UNAUTHORIZED and token == self._token
                if is_over and self._log_in is not None:
                    self._token = await self._log_in()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except (OSError, ConnectionClosed, InvalidHandshake, InvalidMessage, TimeoutError, Refused) as error:
                self.client = None
                self.tally.ends[f"{type(error).__name__} while connecting"] += 1
                await fresh.drop()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.tally.reconnects += 1
            return

    def _resumes(self) -> Iterator[client.Resume]:
        """Yield the frames of a `resume`. Each names the versions that the client has when the frame is sent."""
        every = list(self.mirror.versions)
        size = self._random.choice((1, 3, MAX_RESUMED))
        user_version: int | None = self.mirror.user_version
        for start in range(0, max(1, len(every)), size):
            versions = self.mirror.versions
            named = {one: versions[one] for one in every[start : start + size] if one in versions}
            yield client.Resume(
                epoch=self.mirror.epoch,
                versions=named,
                user_version=user_version,
                is_last=start + size >= len(every),
            )
            user_version = None

    async def leave(self) -> None:
        """Disconnect with a close handshake."""
        if self.client is not None:
            await self.client.close()
            self.client = None

    async def act(
        self, count: int | None = None, *, rate: float = 0.0, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Perform random actions, each until it is acknowledged or refused. Ends after `count` of them, or when
        `is_over` returns true. `rate` is the number per second; 0 means without pauses.
        """
        due = time.monotonic() + self._random.random() / rate if rate else 0.0
        while not is_over() and count != 0:
            if rate and not await self._rest(due, is_over):
                return
            due += 1 / rate if rate else 0.0
            count = None if count is None else count - 1
            if self._chance(DROPS) and self.client is not None:
                await self.client.drop()
            await self._do(self.frame())
            await self._load()
            if self.client is not None:
                self.client.events.clear()

    async def connected(self) -> Client:
        """Return the connection. Reconnect first if it has ended, is silent or has lost an event."""
        while self.client is None or self.client.is_over or self._is_behind or self._is_silent(self.client):
            if self.client is not None:
                self.tally.ends[self._end_of(self.client)] += 1
                await self._give_up(self.client)
            await self.connect()
        return self.client

    async def ask(self, frame: Frame, kind: type[Answer] | None = None) -> Answer:
        """Send a frame until it is answered, and return its result. Raises Refused."""
        while True:
            connection = await self.connected()
            try:
                return await self._until_done(connection, frame, kind)
            except (OSError, TimeoutError):
                await self._give_up(connection)

    @property
    def is_visible(self) -> bool:
        """Whether others should see this user as connected."""
        return self._status not in {"invisible", "offline"}

    async def watch(self, user_ids: Sequence[UserId]) -> None:
        """Watch users, on this connection and on later ones."""
        self._watched = list(user_ids)
        await self._watch(await self.connected())

    async def try_to(self, frame: Frame) -> ErrorCode | None:
        """Send a frame until it is answered, and return the code of the refusal, if it was refused."""
        try:
            await self.ask(frame)
        except Refused as refused:
            return refused.code
        return None

    async def settle(self, version: Callable[[ConversationId], int], *, seconds: float = 30.0) -> bool:
        """Wait until the mirror has reached the given versions. Return whether it has."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            connection = await self.connected()
            await self._load()
            if not self.mirror.unloaded and all(
                copy.version >= version(one) for one, copy in self.mirror.copies.items()
            ):
                return True
            if connection is self.client:
                await asyncio.sleep(0.02)
        return False

    async def _rest(self, until: float, is_over: Callable[[], bool]) -> bool:
        """Wait, and reconnect if the connection ends or is silent, as clients do. Return whether to continue."""
        while (left := until - time.monotonic()) > 0 and not is_over():
            await self.connected()
            await asyncio.sleep(min(left, POLL_SECONDS))
        return not is_over()

    async def _do(self, frame: Frame) -> None:
        self.asked_at = began = time.monotonic()
        self.tally.sent += 1
        try:
            self.mirror.read(await self.ask(frame))
        except Refused as refused:
            if refused.code not in EXPECTED:
                self.tally.unexpected[f"{type(frame).__name__}: {refused.code} {refused.message}"] += 1
                return
        else:
            if isinstance(frame, client.Send):
                self.tally.messages.add(frame.message_id)
            elif isinstance(frame, client.Forward):
                self.tally.messages.add(frame.new_message_id)
            elif isinstance(frame, client.Schedule):
                self.tally.scheduled.add(frame.message_id)
            elif isinstance(frame, client.Edit) and frame.edit_id is not None:
                self.tally.edits.add(frame.edit_id)
            elif isinstance(frame, client.Unwatch):
                self.mirror.unwatch(frame.user_ids)
            elif isinstance(frame, client.SetPresence) and frame.status != "away":  # belongs to the device
                self._status = frame.status
        finally:
            self.asked_at = 0.0
        self.tally.acknowledged += 1
        self.tally.longest_wait = max(self.tally.longest_wait, time.monotonic() - began)

    def _receive(self, frame: server.ServerFrame) -> None:
        self._received_at = time.monotonic()
        if isinstance(frame, server.Heartbeat) and self.mirror.is_behind(frame):
            self.noticed_losses += 1
            self._is_behind = True
        elif isinstance(frame, server.GoingAway):
            self._ticket = frame.ticket
            self._back_at = self._received_at + frame.reconnect_after_ms / 1000
        self.mirror.receive(frame)

    async def _watch(self, connection: Client) -> None:
        self.mirror.forget_presences()
        if self._watched:
            frame = client.Watch(user_ids=self._watched)
            self.mirror.show((await self._until_done(connection, frame, server.PresenceList)).presences)

    def _end_of(self, connection: Client) -> str:
        if connection.is_over:
            code = connection.socket.close_code
            return CloseCode(code).name.lower() if code in set(CloseCode) else f"code {code}"
        return "behind" if self._is_behind else "silent"

    def _is_silent(self, connection: Client) -> bool:
        period = connection.ready.heartbeat_ms / 1000
        return time.monotonic() - self._received_at > SILENT_HEARTBEATS * period

    async def _give_up(self, connection: Client) -> None:
        await connection.drop()
        if self.client is connection:
            self.client = None

    async def _until_done(self, connection: Client, frame: Frame, kind: type[Answer] | None = None) -> Answer:
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await connection.call(frame, kind)
            except Refused as refused:
                if refused.code not in TRANSIENT or (refused.retry_after_ms or 0) > MAX_RETRY_MS:
                    raise
                await asyncio.sleep((refused.retry_after_ms or 50) / 1000)

    # ----------------------------------------------------------------------------------------------------- loading

    async def _load(self) -> None:
        """Read the history and the participants of conversations that are new or start over."""
        while self.mirror.unloaded and self.client is not None:
            one = next(iter(self.mirror.unloaded))
            connection = self.client
            try:
                await self._load_one(connection, one)
                self.mirror.loaded(one)
            except KeyError:
                continue  # The user has left the conversation meanwhile.
            except Refused as refused:
                if refused.code is ErrorCode.NOT_FOUND:
                    # The user is no longer a participant. The event about it has not arrived yet.
                    await self._wait_out(connection, one)
                elif refused.code in TRANSIENT:
                    await asyncio.sleep((refused.retry_after_ms or 50) / 1000)
                else:
                    raise
            except (OSError, TimeoutError):
                await self._give_up(connection)

    async def _wait_out(self, connection: Client, one: ConversationId) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while one in self.mirror.unloaded and time.monotonic() < deadline and not connection.is_over:  # noqa: ASYNC110
            await asyncio.sleep(RETRY_SECONDS)
        if one in self.mirror.unloaded:
            await self._give_up(connection)

    async def _load_one(self, connection: Client, one: ConversationId) -> None:
        before: MessageId | None = None
        while True:
            page = await connection.call(
                client.History(conversation_id=one, before=before, with_replies=True, limit=100), server.MessagePage
            )
            self.mirror.load(one, page)
            if not page.has_before:
                break
            before = page.messages[0].id
        after: UserId | None = None
        while True:
            participants = await connection.call(
                client.ListParticipants(conversation_id=one, after=after, limit=100), server.ParticipantPage
            )
            self.mirror.load_participants(one, participants.participants)
            if (after := participants.after) is None:
                return

    # ------------------------------------------------------------------------------------------------------ frames

    def frame(self) -> Frame:
        """Return a random frame. Frames that people send often have higher weights."""
        mine = list(self.mirror.copies)
        channel = self._random.choice(self._channels)
        if channel not in mine and self._chance(JOINS):
            return client.Join(conversation_id=channel)
        if not mine or self._chance(GLOBAL):
            return self._global_frame()
        about = self._random.choice(mine)
        messages = list(self.mirror.copies[about].messages)[-30:]
        choices = self._in_conversation(about, messages)
        if messages:
            choices += self._about_message({"conversation_id": about, "message_id": self._random.choice(messages)})
        (make,) = self._random.choices([make for _, make in choices], [weight for weight, _ in choices])
        return make()

    def _in_conversation(
        self, about: ConversationId, messages: list[MessageId]
    ) -> list[tuple[int, Callable[[], Frame]]]:
        choices: list[tuple[int, Callable[[], Frame]]] = [
            (50, lambda: self._send(about, messages)),
            (2, lambda: client.Leave(conversation_id=about)),
            (2, lambda: client.UpdateConversation(conversation_id=about, title=f"Title {self._random.random()}")),
            (5, lambda: client.Typing(conversation_id=about, active=self._chance(STARTS_TYPING))),
            (2, lambda: client.GetConversation(conversation_id=about)),
            (2, lambda: client.History(conversation_id=about, limit=self._random.randint(1, 100))),
            (1, lambda: client.ListParticipants(conversation_id=about)),
            (1, lambda: client.ListReports(conversation_id=about)),
            (1, lambda: client.ListAudit(conversation_id=about)),
            (1, lambda: client.SetInviteCode(conversation_id=about, is_open=self._chance(INVITES))),
            (2, lambda: client.SetPreferences(conversation_id=about, pin_order=self._random.randint(0, 9))),
            (2, lambda: client.SetDraft(conversation_id=about, content=self._random.choice(("", "I thi", "I think")))),
            (2, lambda: self._schedule(about)),
            (1, lambda: client.ListPins(conversation_id=about)),
            (1, lambda: client.Search(text="message", conversation_id=about)),
        ]
        if self.others:
            other = self._random.choice(self.others)
            choices += [
                (2, lambda: client.AddParticipants(conversation_id=about, participants=[other])),
                (1, lambda: client.RemoveParticipant(conversation_id=about, user_id=other)),
                (1, lambda: client.SetRole(conversation_id=about, user_id=other, role=self._random.choice(ROLES))),
                (1, lambda: client.SetPermissions(conversation_id=about, user_id=other, can_add_members=True)),
                (1, lambda: client.TransferOwnership(conversation_id=about, user_id=other)),
                (1, lambda: client.Invite(conversation_id=about, participants=[other])),
                (1, lambda: client.Unban(conversation_id=about, user_id=other)),
            ]
        return choices

    def _about_message(self, place: dict[str, Any]) -> list[tuple[int, Callable[[], Frame]]]:
        emoji = self._random.choice(EMOJI)
        return [
            (10, lambda: client.Edit(**place, content=f"Edit {self._random.random()}", edit_id=EditId(uuid7()))),
            (5, lambda: client.Delete(**place)),
            (14, lambda: client.React(**place, emoji=emoji)),
            (8, lambda: client.Unreact(**place, emoji=emoji)),
            (9, lambda: client.Read(**place)),
            (2, lambda: client.GetMessage(**place)),
            (2, lambda: client.Pin(**place)),
            (1, lambda: client.Unpin(**place)),
            (2, lambda: client.Star(**place)),
            (1, lambda: client.Unstar(**place)),
            (6, lambda: client.Vote(**place, options=[self._random.randrange(3)])),
            (2, lambda: client.Vote(**place, options=[])),
            (1, lambda: client.ClosePoll(**place)),
            (1, lambda: client.ListVotes(**place)),
            (2, lambda: client.GetThread(**place)),
            (2, lambda: client.ListReplies(**place)),
            (1, lambda: client.FollowThread(**place)),
            (1, lambda: client.UnfollowThread(**place)),
            (2, lambda: client.ReadThread(**place, thread_order=self._random.randint(0, 5))),
            (4, lambda: client.Delivered(**place)),
            (2, lambda: client.MarkUnread(**place)),
            (1, lambda: client.ListReaders(**place)),
            (1, lambda: client.Why(**place)),
            (2, lambda: self._forward(place)),
            (1, lambda: client.ListEdits(**place)),
            (2, lambda: client.Moderate(**place, reason="Rude")),
            (1, lambda: client.Unmoderate(**place)),
            (2, lambda: client.ReportMessage(**place, reason="Rude")),
        ]

    def _global_frame(self) -> Frame:
        others = self.others or [UserId(UUID(int=0))]
        other = self._random.choice(others)
        made = ConversationId(uuid7())
        makes: list[Callable[[], Frame]] = [
            client.Ping,
            client.ListConversations,
            lambda: client.Watch(user_ids=[other]),
            lambda: client.Unwatch(user_ids=[other]),
            lambda: client.GetUsers(user_ids=[other]),
            lambda: client.CreateDirect(user_id=other),
            lambda: client.CreateGroup(conversation_id=made, title="A group", participants=[other]),
            client.GetMe,
            client.ListInvitations,
            client.ListRelationships,
            client.ListFeed,
            client.SeeFeed,
            client.GetBadge,
            client.ListThreads,
            client.ListStars,
            client.ListDrafts,
            client.ListScheduled,
            client.GetPushKey,
            lambda: client.Search(text="message", order="relevance"),
            lambda: client.UpdateProfile(bio=f"Bio {self._random.random()}"),
            lambda: client.UpdateProfile(display_name=f"Person {self._random.random()}"),
            lambda: client.GetProfile(user_id=other),
            lambda: client.SearchUsers(text="person"),
            lambda: client.FindConversations(text="channel"),
            lambda: client.RequestFriend(user_id=other),
            lambda: client.AnswerFriend(user_id=other, accept=self._chance(INVITES)),
            lambda: client.Unfriend(user_id=other),
            lambda: self._random.choice((client.Block, client.Unblock, client.Unblock))(user_id=other),
            lambda: self._random.choice((client.Follow, client.Unfollow))(user_id=other),
            lambda: self._random.choice((client.Mute, client.Unmute))(user_id=other),
        ]
        if self._sets_presence:
            makes.append(
                lambda: client.SetPresence(status=self._random.choice(("online", "away", "busy", "invisible")))
            )
        if self.mirror.invitations:
            invited = next(iter(self.mirror.invitations))
            makes += [
                lambda: client.Join(conversation_id=invited),
                lambda: client.Decline(conversation_id=invited),
            ]
        return self._random.choice(makes)()

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _send(self, channel: ConversationId, messages: list[MessageId]) -> client.Send:
        parent = self._random.choice(messages) if messages and self._chance(REPLIES) else None
        content = f"Message {self._random.random()} #tag @everyone"
        if self.others:
            content += f" <@{self._random.choice(self.others)}>"
        if self._chance(LONG_ONES):
            content = content.ljust(LONG, ".")
        is_poll = self._chance(POLLS)
        return client.Send(
            conversation_id=channel,
            message_id=MessageId(uuid7()),
            content=content,
            payload=Poll(options=["Yes", "No", "Later"], is_anonymous=self._chance(ANONYMOUS)) if is_poll else None,
            is_markdown=self._chance(MARKDOWN),
            parent_message_id=parent,
            also_in_conversation=parent is not None and self._chance(IN_BOTH),
            quoted_message_id=self._random.choice(messages) if messages and self._chance(QUOTES) else None,
        )

    def _schedule(self, about: ConversationId) -> client.Schedule:
        now = datetime.now(UTC)
        return client.Schedule(
            conversation_id=about,
            message_id=MessageId(uuid7()),
            content=f"Message {self._random.random()}",
            send_at=now + timedelta(seconds=self._random.choice(SCHEDULED_SECONDS)),
        )

    def _forward(self, place: dict[str, Any]) -> client.Forward:
        return client.Forward(
            **place,
            to_conversation_id=self._random.choice(list(self.mirror.copies)),
            new_message_id=MessageId(uuid7()),
        )
