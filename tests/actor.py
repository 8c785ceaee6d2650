"""A user who acts at random, loses connections, comes back, and never gives up on what was not acknowledged."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

from protocol import client, server
from protocol.client import Frame
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, EditId, MessageId, uuid7
from tests.client import Client
from tests.mirror import Mirror
from tests.world import Somebody

EMOJI = ("👍", "🎉", "❤️")
TRANSIENT = {ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED}


class Actor:
    """One user with one connection at a time, to any of the workers."""

    def __init__(
        self, who: Somebody, urls: Callable[[], Sequence[str]], channels: Sequence[ConversationId], seed: int
    ) -> None:
        self.who = who
        self._urls = urls
        self._channels = channels
        self._random = random.Random(seed)
        self.mirror = Mirror()
        self.acknowledged: set[MessageId] = set()
        self.failure: BaseException | None = None
        self.client: Client | None = None
        self.reconnects = 0

    async def connect(self) -> None:
        """Connect somewhere and come up to date."""
        while True:
            fresh = Client(self._random.choice(self._urls()), self.who.token, query="?resume=1", open_timeout=10)
            fresh.on_event = self._hear
            try:
                async with asyncio.timeout(10):
                    await fresh.open()
                    ready = await fresh.event(server.Ready)
                    self.client = fresh
                    frame = client.Resume(epoch=self.mirror.epoch or ready.epoch, versions=self.mirror.versions)
                    self.mirror.epoch = ready.epoch
                    await self._until_done(fresh, frame)
                    await self._load()
            except (OSError, ConnectionClosed, InvalidHandshake, InvalidMessage, TimeoutError):
                self.client = None
                self._check()
                await asyncio.sleep(0.05)
                continue
            self.reconnects += 1
            return

    async def act(self, count: int) -> None:
        """Do `count` random things, each until it is acknowledged or refused."""
        for _ in range(count):
            self._check()
            if self._random.random() < 0.03 and self.client is not None:
                await self.client.drop()
                await self.connect()
            frame = self._frame()
            try:
                await self._surely(frame)
            except Refused as refused:
                assert refused.code in {ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN, ErrorCode.CONFLICT}, refused
            else:
                if isinstance(frame, client.Send):
                    self.acknowledged.add(frame.message_id)
            await self._load()

    async def settle(self, versions: Callable[[ConversationId], int]) -> None:
        """Wait until what was heard has reached the given clocks."""
        async with asyncio.timeout(30):
            while True:
                self._check()
                await self._connection()
                await self._load()
                if all(copy.version >= versions(one) for one, copy in self.mirror.copies.items()):
                    return
                await asyncio.sleep(0.02)

    def _hear(self, frame: server.ServerFrame) -> None:
        try:
            self.mirror.hear(frame)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def _check(self) -> None:
        if self.failure is not None:
            raise AssertionError(f"{self.who.name}: {self.failure}") from self.failure

    async def _surely(self, frame: Frame) -> None:
        """Repeat a frame, across connections, until it has an answer."""
        while True:
            connection = await self._connection()
            try:
                await self._until_done(connection, frame)
            except (OSError, TimeoutError):
                self._check()
                self.client = None
                continue
            return

    async def _connection(self) -> Client:
        while self.client is None or self.client.is_over:
            await self.connect()
        return self.client

    async def _until_done(self, connection: Client, frame: Frame) -> None:
        while True:
            try:
                await connection.call(frame)
            except Refused as refused:
                if refused.code not in TRANSIENT:
                    raise
                await asyncio.sleep((refused.retry_after_ms or 50) / 1000)
                continue
            return

    async def _load(self) -> None:
        """Read the history and the participants of conversations that are new, or begun over."""
        while self.mirror.unloaded and self.client is not None:
            one = next(iter(self.mirror.unloaded))
            with contextlib.suppress(KeyError):
                try:
                    await self._load_one(self.client, one)
                    self.mirror.unloaded.discard(one)
                except Refused as refused:
                    if refused.code not in TRANSIENT | {ErrorCode.NOT_FOUND}:
                        raise
                    await self.client.synced()
                except (OSError, TimeoutError):
                    self._check()
                    self.client = None

    async def _load_one(self, connection: Client, one: ConversationId) -> None:
        before: MessageId | None = None
        while True:
            page = await connection.call(
                client.History(conversation_id=one, before=before, limit=100), server.MessagePage
            )
            self.mirror.load(one, page)
            if not page.has_before:
                break
            before = page.messages[0].id
        after = None
        while True:
            participants = await connection.call(
                client.ListParticipants(conversation_id=one, after=after, limit=100), server.ParticipantPage
            )
            self.mirror.load_participants(one, participants.participants)
            if (after := participants.after) is None:
                return

    def _frame(self) -> Frame:
        mine = list(self.mirror.copies)
        channel = self._random.choice(self._channels)
        if channel not in mine:
            return client.Join(conversation_id=channel)
        messages = list(self.mirror.copies[channel].messages)[-30:]
        choices: list[tuple[int, Callable[[], Frame]]] = [
            (50, lambda: self._send(channel, messages)),
            (2, lambda: client.Leave(conversation_id=channel)),
            (2, lambda: client.UpdateConversation(conversation_id=channel, title=f"Title {self._random.random()}")),
        ]
        if messages:
            one = self._random.choice(messages)
            emoji = self._random.choice(EMOJI)
            edit_id = EditId(uuid7())
            place: dict[str, Any] = {"conversation_id": channel, "message_id": one}
            choices += [
                (
                    10,
                    lambda: client.Edit(
                        **place,
                        content=f"Edit {self._random.random()}",
                        edit_id=edit_id,
                    ),
                ),
                (5, lambda: client.Delete(**place)),
                (14, lambda: client.React(**place, emoji=emoji)),
                (8, lambda: client.Unreact(**place, emoji=emoji)),
                (9, lambda: client.Read(**place)),
            ]
        (make,) = self._random.choices([make for _, make in choices], [weight for weight, _ in choices])
        return make()

    def _send(self, channel: ConversationId, messages: list[MessageId]) -> client.Send:
        parent = self._random.choice(messages) if messages and self._random.random() < 0.3 else None
        return client.Send(
            conversation_id=channel,
            message_id=MessageId(uuid7()),
            content=f"Message {self._random.random()}",
            parent_message_id=parent,
        )
