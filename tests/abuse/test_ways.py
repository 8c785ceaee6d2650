"""Attacks from an account that stays within its rate limits do not delay other users. `ATTACKS` lists the attacks.

Other files test searches (test_searching), 3,000 silent sockets (test_silence), each kind of flood (test_floods) and
deadlocks (test_lock_order). Others test push services that never respond
(`test_silent_endpoints_delay_no_other_users` of test_notifications) and hostile values (test_hostile_values).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from protocol import client
from protocol.errors import Refused
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.limits import MAX_JSON_VALUES, MAX_PAGE
from prove.client import Client
from tests.abuse.conftest import Scene
from tests.bystander import resident_bytes
from tests.test_floods import FLOODS, shake
from tests.world import message, sent

pytestmark = [pytest.mark.more, pytest.mark.timeout(300)]

CONNECTIONS = 8
MAX_GROWTH_BYTES = 64 * 1024 * 1024
"""Max growth of a worker during an attack, bytes, for caches and memory that the allocator keeps."""
FORGED = {"origin": "https://elsewhere.example", "x-forwarded-for": "<script>, 8.8.8.8"}
PAUSE = 0.01
"""Interval between refused frames, seconds, within the rate limit of a connection."""

Attack = Callable[[Scene, Client, ConversationId], Awaitable[None]]


async def ask(one: Client, frame: client.Frame) -> None:
    """Send a frame, and wait for `retry_after_ms` if it is refused."""
    try:
        await one.call(frame)
    except Refused as error:
        await asyncio.sleep((error.retry_after_ms or 20) / 1_000)


def markdown(scrap: str) -> Attack:
    async def attack(_: Scene, one: Client, about: ConversationId) -> None:
        content = (scrap * 10_000)[:10_000]
        while True:
            await ask(one, message(about, content, is_markdown=True))

    return attack


async def unchanged_edits(_: Scene, one: Client, about: ConversationId) -> None:
    content = "**a *b " * 1_400
    message_id = await sent(one, about, content, is_markdown=True)
    edit = client.Edit(conversation_id=about, message_id=message_id, content=content, is_markdown=True)
    while True:
        await ask(one, edit)


def metadata(json: str, *, pause: float) -> Attack:
    """Send raw frames with `json` as metadata, as fast as the user's rate limit allows if `pause` is 0."""

    async def attack(_: Scene, one: Client, about: ConversationId) -> None:
        while True:
            error = await one.raw(
                f'{{"type":"send","conversation_id":"{about}","message_id":"{uuid7()}","content":"x","metadata":{json}}}'
            )
            await asyncio.sleep(max(pause, (error.retry_after_ms or 0) / 1_000))

    return attack


async def many_in_flight(_: Scene, one: Client, about: ConversationId) -> None:
    while True:
        await asyncio.gather(*(ask(one, message(about, "x" * 1_000)) for _ in range(100)))


async def too_many_connections(scene: Scene, _: Client, __: ConversationId) -> None:
    while True:
        async with AsyncExitStack() as stack:
            others = [Client(scene.url, scene.attacker.token) for _ in range(15)]
            await asyncio.gather(*(stack.enter_async_context(one) for one in others), return_exceptions=True)
        await asyncio.sleep(1.0)


async def silent_sockets(scene: Scene, _: Client, __: ConversationId) -> None:
    host, _colon, port = scene.url.removeprefix("http://").rpartition(":")
    connections = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _number in range(100)))
    try:
        await asyncio.sleep(60)
    finally:
        for _reader, writer in connections:
            writer.close()


def flood(name: str) -> Attack:
    """Flood connections, each until it is closed."""

    async def attack(scene: Scene, _: Client, __: ConversationId) -> None:
        while True:
            wire = await shake(scene.url, scene.attacker)
            try:
                while not wire.writer.is_closing():
                    wire.writer.write(FLOODS[name] * 50)
                    await wire.writer.drain()
                    await asyncio.sleep(PAUSE)
            except (ConnectionError, RuntimeError):
                pass  # uvloop raises RuntimeError if the server has closed meanwhile
            finally:
                wire.writer.transport.abort()
            await asyncio.sleep(0.2)

    return attack


async def pages_of_metadata(_: Scene, one: Client, about: ConversationId) -> None:
    for _number in range(1 + MAX_PAGE // CONNECTIONS):
        await ask(one, message(about, "x", metadata={"a": [[] for _value in range(MAX_JSON_VALUES - 2)]}))
    while True:
        await ask(one, client.History(conversation_id=about, limit=MAX_PAGE))


async def documents(scene: Scene, _: Client, __: ConversationId) -> None:
    async with httpx.AsyncClient(base_url=scene.url, trust_env=False) as http:
        while True:
            await http.get("/v1/asyncapi.json")
            await asyncio.sleep(0.1)


async def foreign_origins(scene: Scene, _: Client, __: ConversationId) -> None:
    async with httpx.AsyncClient(base_url=scene.url, trust_env=False) as http:
        while True:
            await http.post("/v1/auth/login", json={"email": "a@b.c", "password": "wrong"}, headers=FORGED)
            await asyncio.sleep(0.02)


async def invalid_credentials(scene: Scene, _: Client, __: ConversationId) -> None:
    async with httpx.AsyncClient(base_url=scene.url, trust_env=False) as http:
        while True:
            await http.post(
                "/v1/call", json={"type": "get_me"}, headers={"authorization": f"Bearer {scene.attacker.token[::-1]}"}
            )
            await asyncio.sleep(0.02)


async def invitations(scene: Scene, one: Client, about: ConversationId) -> None:
    while True:
        await ask(one, client.Invite(conversation_id=about, participants=[scene.bystander.user_id]))


async def creating_until_refused(_: Scene, one: Client, __: ConversationId) -> None:
    while True:
        await ask(one, client.CreateChannel(conversation_id=ConversationId(uuid7()), title="One of many"))


async def starring(_: Scene, one: Client, about: ConversationId) -> None:
    message_id: MessageId = await sent(one, about, "A star")
    while True:
        await ask(one, client.Star(conversation_id=about, message_id=message_id))
        await ask(one, client.Unstar(conversation_id=about, message_id=message_id))


async def badges(_: Scene, one: Client, __: ConversationId) -> None:
    while True:
        await ask(one, client.GetBadge())
        await ask(one, client.ListThreads())


async def searches(_: Scene, one: Client, __: ConversationId) -> None:
    while True:
        await ask(one, client.Search(text="a b c d e f g h i j", limit=100))


LARGE = 250_000
ATTACKS: dict[str, Attack] = {
    "Markdown whose HTML is too long": markdown("a\n\n* * *\n"),
    "Markdown of entities": markdown("&"),
    "Markdown of nested emphasis": markdown("**a *b "),
    "edits that change nothing": unchanged_edits,
    "metadata that is nested too deeply": metadata("[" * 900 + "]" * 900, pause=0.6),
    "metadata of many objects": metadata("[" + "{}," * (LARGE // 3) + "1]", pause=0.6),
    "metadata of extreme numbers": metadata("[" + "1e-307," * (LARGE // 7) + "1]", pause=0.6),
    "pages of metadata of many arrays": pages_of_metadata,
    "many frames in flight": many_in_flight,
    "120 concurrent connections": too_many_connections,
    "silent sockets": silent_sockets,
    "pings": flood("pings"),
    "continuation frames": flood("messages of two fragments"),
    "API documents without an account": documents,
    "logins from foreign origins with forged addresses": foreign_origins,
    "invalid credentials": invalid_credentials,
    "invitations of a stranger": invitations,
    "conversations created up to the bound": creating_until_refused,
    "stars set and removed": starring,
    "badges and lists of threads": badges,
    "searches": searches,
}
FEWER_CONNECTIONS = {"pings": 1, "continuation frames": 1}
"""Connections of attacks that would exceed the limit of an address with more."""


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack_within_rate_limits_does_not_delay_other_users(scene: Scene, name: str) -> None:
    assert scene.worker.process is not None
    async with AsyncExitStack() as stack:
        attackers = [
            await stack.enter_async_context(Client(scene.url, scene.attacker.token))
            for _ in range(FEWER_CONNECTIONS.get(name, CONNECTIONS))
        ]
        about = await scene.world.channel(attackers[0])
        memory = resident_bytes(scene.worker.process.pid)

        async def attack() -> None:
            async with asyncio.TaskGroup() as group:
                for one in attackers:
                    group.create_task(until_closed(ATTACKS[name](scene, one, about)))

        await scene.bystander.is_unaffected(attack)
    assert resident_bytes(scene.worker.process.pid) < memory + MAX_GROWTH_BYTES


async def until_closed(attack: Awaitable[None]) -> None:
    """Attack until the server closes the connection."""
    with contextlib.suppress(ConnectionError, ConnectionClosed):
        await attack
