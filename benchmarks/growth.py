"""The cost of history, by the same frames in a conversation of 10,000 messages and in one of 10,000,000."""

import random
from collections.abc import Callable, Iterator
from typing import ClassVar
from uuid import UUID

import asyncpg
import websockets
from rich.progress import track
from websockets import Subprotocol
from websockets.asyncio.client import ClientConnection

from benchmarks.servers import OpenChat, Server
from loadtest.connection import User
from loadtest.target import Unusable
from protocol import SUBPROTOCOL, client
from protocol.client import Frame
from protocol.codec import decode_server, encode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.server import Error, Ready, Reply
from server.auth.tokens import new_token

FRAMES = 2_000
"""Frames of each kind. The kernel counts CPU time in hundredths of a second, so it is then exact to two per cent."""
MISSED = 10
COPIED_AT_ONCE = 100_000
US = 1e6
BEGAN_MS = 1_700_000_000_000
"""Time of the first message, in November 2023. One more follows each millisecond."""
TOKEN = new_token()
ABOUT, READER, WRITER = ConversationId(uuid7()), UserId(uuid7()), UserId(uuid7())


class Short(OpenChat):
    """A server with a short history."""

    name = "10,000 messages"
    messages: ClassVar[int] = 10_000


class Long(Short):
    """A server with a long history."""

    name = "10,000,000 messages"
    messages: ClassVar[int] = 10_000_000


async def measure(server: Server, seconds: float) -> dict[str, float]:  # noqa: ARG001 - the number of frames is fixed
    """Return the cost of each kind of frame. Raises Unusable if one is refused."""
    assert isinstance(server, Short)  # noqa: S101 - according to WORKLOADS
    db = await asyncpg.connect(server.database())
    await fill(server, db)
    await db.close()
    costs = {}
    url = f"ws://{server.host}:{server.port}/v1/ws?resume=1"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with websockets.connect(
        url, additional_headers=headers, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None, max_size=None
    ) as socket:
        ready = decode_server(await socket.recv())
        assert isinstance(ready, Ready)  # noqa: S101 - the first frame
        for name, frame in frames(server.messages, ready.epoch).items():
            before = server.machine.usage().seconds
            for _ in range(FRAMES):
                await call(socket, frame())
            costs[f"µs CPU per {name}"] = (server.machine.usage().seconds - before) / FRAMES * US
    return costs


def frames(messages: int, epoch: str) -> dict[str, Callable[[], Frame]]:
    """Return a factory for each kind of frame, by its name."""
    rng = random.Random(messages)  # noqa: S311 - pages, not secrets
    return {
        "resume": lambda: client.Resume(epoch=epoch, versions={ABOUT: 2 + messages - MISSED}),
        "history page": lambda: client.History(conversation_id=ABOUT, around=message_id(rng.randrange(messages))),
        "unread count": lambda: client.GetConversation(conversation_id=ABOUT),
        "send": lambda: client.Send(conversation_id=ABOUT, message_id=MessageId(uuid7()), content="Hello"),
    }


async def call(socket: ClientConnection, frame: Frame) -> None:
    """Send a frame and wait for its answer. Raises Unusable if the answer is an error."""
    frame.id = 1
    await socket.send(encode(frame).decode())
    while not isinstance(answer := decode_server(await socket.recv()), Reply):
        if isinstance(answer, Error):
            raise Unusable(answer.message)


async def fill(server: Short, db: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Insert the conversation if it is missing. Vacuum and checkpoint, so that neither runs during measurements."""
    if await db.fetchval("SELECT true FROM conversation WHERE id = $1", ABOUT):
        return
    people = [
        User(token=token, user_id=str(user_id), source="", conversations=[], talks=False)
        for token, user_id in ((new_token(), WRITER), (TOKEN, READER))
    ]
    await server.store(db, people, {str(ABOUT): [one.user_id for one in people]})
    await db.execute(
        "UPDATE conversation SET version = 2 + $2::int, message_count = $2 WHERE id = $1", ABOUT, server.messages
    )
    # The foreign keys are correct by construction, and checking them takes half of the time.
    await db.execute("SET session_replication_role = replica")
    messages = server.messages
    starts = range(0, messages, COPIED_AT_ONCE)
    for start in track(starts, f"writing {messages:,} messages") if len(starts) > 1 else starts:
        await db.copy_records_to_table(
            "message",
            records=rows(range(start, min(start + COPIED_AT_ONCE, messages))),
            columns=["id", "conversation_id", "sender_id", "content", "sent_version", "version"],
        )
    await db.execute("VACUUM (FREEZE, ANALYZE) message")
    await db.execute("CHECKPOINT")


def rows(numbers: range) -> Iterator[tuple[MessageId, ConversationId, UserId, str, int, int]]:
    """Yield messages as rows for COPY."""
    for number in numbers:
        text = f"This is message {number:,} of a long conversation, and not the last one."
        yield message_id(number), ABOUT, WRITER, text, 3 + number, 3 + number


def message_id(number: int) -> MessageId:
    """Return the id of a message, a UUIDv7 in the order of messages."""
    return MessageId(UUID(int=(BEGAN_MS + number) << 80 | 7 << 76 | 2 << 62 | number))
