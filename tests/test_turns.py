"""One user cannot hold all connections of a worker to the database."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect
from starlette.routing import Route, WebSocketRoute

from protocol import client, server
from protocol.codec import now
from protocol.errors import ErrorCode, Refused
from protocol.ids import MessageId, SessionId, UserId, uuid7
from server.core.config import Settings
from server.core.deadlines import Deadlines
from server.core.faults import Away, Exhausted
from server.db.database import Database, Db
from server.db.pool import OfSessions, Pool, UserPool
from server.db.reconnecting import RETRY_MOST_SECONDS, RETRY_SECONDS, Reconnecting
from server.fairness.turns import Turns
from server.gateway.connection import Connection
from server.gateway.dispatch import Rate
from server.hub.hub import Hub
from server.routes import ROUTES
from tests.conftest import Lines
from tests.test_hostile_values import valid
from tests.test_may_send import let_all_wait
from tests.world import World, http_client, message, sent, until

CONNECTIONS = 4
"""Connections of a worker to the database, in tests. One user holds at most two of them."""


async def test_user_whose_frames_wait_for_a_lock_leaves_connections_to_others(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    asker, other = await world.connect(ada), await world.connect(charles)
    busy, quiet = await world.channel(asker), await world.channel(other)
    about = await sent(asker, busy)
    more = [await world.connect(ada) for _ in range(2 * CONNECTIONS)]
    let_all_wait(world)
    pool = world.workers[0].app._database._state.pool  # noqa: SLF001
    holding = await asyncpg.connect(world.settings.database_url)
    try:
        await holding.execute("BEGIN")
        await holding.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", busy)
        frame = client.Pin(conversation_id=busy, message_id=about)
        asking: list[asyncio.Future[server.Result]] = [asyncio.ensure_future(one.call(frame)) for one in more]
        await until(lambda: pool._turns._waiting.get(ada.id) is not None)  # noqa: SLF001
        async with asyncio.timeout(5):
            await other.call(message(quiet))
            await other.call(client.History(conversation_id=quiet), server.MessagePage)
            # A new socket and a call over HTTP read the database, too.
            await world.connect(charles)
        assert not any(one.done() for one in asking)
        await until(lambda: len(pool._taken) <= CONNECTIONS // 2)  # noqa: SLF001 - a job may hold one for a moment
        # Other frames of the same user cannot run either, and are refused with a retry time.
        pool._turns._patience = 0.01  # noqa: SLF001
        refusal = await (await world.connect(ada, query="?resume=1")).ask(client.GetMe())
        assert isinstance(refusal, server.Error)
        assert (refusal.code, bool(refusal.retry_after_ms)) == (ErrorCode.UNAVAILABLE, True)
    finally:
        await holding.close()
    await asyncio.gather(*asking)
    assert (pool._turns._taken, pool._turns._waiting) == ({}, {})  # noqa: SLF001


def waiting_count(turns: Turns[Any], key: object) -> int:
    """Return the number of tasks that wait for a turn of a key."""
    there = turns._waiting.get(key)  # noqa: SLF001
    return 0 if there is None else sum(map(len, there._lines.values()))  # noqa: SLF001


AS_FRAMES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/call"): {"type": "get_me"},
    ("GET", "/v1/auth/export"): None,
}
"""Routes that are limited like frames, with bodies for them."""
OF_SESSIONS: dict[tuple[str, str], Any] = {
    ("GET", "/v1/auth/sessions"): None,
    ("POST", "/v1/auth/password"): {"password": "correct horse", "new_password": "another horse"},
    ("POST", "/v1/auth/deactivate"): {"password": "correct horse"},
    ("POST", "/v1/auth/delete"): {"password": "correct horse"},
    ("POST", "/v1/auth/logout"): None,
    ("DELETE", "/v1/auth/sessions/{session_id}"): None,
    ("DELETE", "/v1/auth/sessions"): None,
}
"""Routes by which users end sessions, with their own rate and connection."""
IN_TURN = AS_FRAMES | OF_SESSIONS
OF_NOBODY = {
    ("POST", "/v1/auth/register"),
    ("POST", "/v1/auth/login"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/ws"),
    ("GET", "/v1/asyncapi.json"),
    ("GET", "/v1/openapi.json"),
}
"""Routes that read no session. They are limited by address and by account."""
AT_THE_DOOR = {"/v1/ws"}
"""The socket, with the limits of connections and of frames."""
REVOKING = ("DELETE", "/v1/auth/sessions/{session_id}")


def routes_of(world: World) -> set[tuple[str, str]]:
    routes = [one for one in world.workers[0].app.starlette.routes if isinstance(one, Route)]
    return {(method, one.path) for one in routes for method in (one.methods or set()) - {"HEAD"}}


async def ask(http: httpx.AsyncClient, token: str, route: tuple[str, str], about: object = "") -> httpx.Response:
    method, path = route
    headers = {"Authorization": f"Bearer {token}"}
    return await http.request(method, path.format(session_id=about), headers=headers, json=IN_TURN[route])


async def created_sessions(world: World, user_id: UserId, count: int) -> list[object]:
    """Create sessions and return their ids."""
    made = await world.db.fetch(
        "INSERT INTO session (user_id, token, expires_at)"
        " SELECT $1, n, now() + '1 day' FROM generate_series(1, $2::int) n RETURNING id",
        user_id,
        count,
    )
    return [row[0] for row in made]


async def test_every_route_of_a_user_is_rate_limited(world: World) -> None:
    app = world.workers[0].app
    assert routes_of(world) == IN_TURN.keys() | OF_NOBODY
    assert {one.path for one in app.starlette.routes if isinstance(one, WebSocketRoute)} == AT_THE_DOOR
    ada, charles = await world.users("Ada", "Charles")
    (other,) = await created_sessions(world, ada.id, 1)
    session_id = await world.db.fetchval("SELECT id FROM session WHERE user_id = $1 AND id <> $2", ada.id, other)
    before = await world.db.fetch("SELECT * FROM session ORDER BY id")
    reads: Deadlines[Any, int] = app._rate_limits[Rate.READ]._bucket._full_at  # noqa: SLF001
    requests: Deadlines[Any, int] = app.accounts._requests._full_at  # noqa: SLF001
    async with http_client(world.url) as http:
        for full_at, key, name, routes in (
            (reads, ada.id, "`reads` of your user", AS_FRAMES),
            (requests, session_id, "account requests of your session", OF_SESSIONS),
        ):
            # Other rate limits have tokens left, and the refusal names the one that is exhausted.
            full_at.put(key, 2**62, 0)
            for route in routes:
                answer = await ask(http, ada.token, route, other)
                assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited"), route
                assert name in answer.json()["message"], route
                assert int(answer.headers["retry-after"]) > 0
                assert (await ask(http, charles.token, ("GET", "/v1/auth/sessions"))).status_code == 200
            full_at.clear()
        assert await world.db.fetch("SELECT * FROM session ORDER BY id") == before
        assert (await ask(http, ada.token, REVOKING, other)).status_code == 204


async def test_flood_of_frames_does_not_block_account_requests_of_the_user(world: World) -> None:
    """A stolen session may use up the rate limits of frames. The owner can still log in and end it."""
    app = world.workers[0].app
    turns = app._database._state.pool._turns  # noqa: SLF001
    account = {"email": "ada@example.org", "password": "correct horse"}
    answered = []
    async with http_client(world.url) as http:
        ada = UserId(UUID((await http.post("/v1/auth/register", json=account | {"name": "Ada"})).json()["user"]["id"]))
        turns._patience = 0.01  # noqa: SLF001
        for _ in range(turns._most):  # noqa: SLF001
            await turns.take(ada)
        for rate_limit in app._rate_limits.values():  # noqa: SLF001
            rate_limit._bucket._full_at.put(ada, 2**62, 0)  # noqa: SLF001
        for route in reversed(IN_TURN):
            welcome = await http.post("/v1/auth/login", json=account)
            answer = welcome if welcome.is_error else await ask(http, welcome.json()["token"], route, uuid7())
            if answer.is_success and route[1] == "/v1/auth/password":
                account["password"] = "another horse"
            answered.append((route, answer.status_code))
    assert [route for route, status in answered if status in {429, 503}] == [*reversed(AS_FRAMES)], answered
    assert {status for route, status in answered if route in OF_SESSIONS} == {200, 204, 404}
    for _ in range(turns._most):  # noqa: SLF001
        turns.give(ada)


TAKEN = """INSERT INTO "user" (name, email) VALUES ('Ada', 'ada@example.org')"""


async def test_registrations_that_wait_for_an_import_do_not_take_all_connections(world: World) -> None:
    """An import locks the addresses of its users until it commits."""
    bob = await world.connect(await world.user("Bob"))
    pool = world.workers[0].app._database._state.pool  # noqa: SLF001
    account = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}
    async with http_client(world.url, timeout=30) as http, asyncio.TaskGroup() as tasks:
        async with world.db.transaction():
            await world.db.execute(TAKEN)
            waiting = [
                tasks.create_task(http.post("/v1/auth/register", json=account))
                for _ in range(2 * pool._most)  # noqa: SLF001
            ]
            await until(lambda: len(pool._turns._taken) == 1)  # noqa: SLF001
            while not all(one.done() for one in waiting):
                assert len(pool._taken) < pool._most  # noqa: SLF001
                await bob.call(client.GetMe(), server.OneMe)
                await asyncio.sleep(0.05)
        answers = [one.result() for one in waiting]
        assert {answer.status_code for answer in answers} == {503}
        assert all(answer.headers["retry-after"] for answer in answers)
        assert (await http.post("/v1/auth/register", json=account)).status_code == 409


async def test_every_route_of_a_user_takes_turns_with_the_users_frames(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames and requests hold at most half of the connections, and routes that end sessions one more."""
    monkeypatch.setattr("server.db.database.RETRY_LOCK_MS", 60_000)
    ada, charles = await world.users("Ada", "Charles")
    app = world.workers[0].app
    pool = app._database._state.pool  # noqa: SLF001
    own = pool._sessions_turns  # noqa: SLF001
    poked: list[UserId] = []
    poke = Hub.notify

    def noted(hub: Hub, user_ids: Iterable[UserId], **options: bool) -> None:
        poked.extend(user_ids)
        poke(hub, poked, **options)

    monkeypatch.setattr(Hub, "notify", noted)
    made = await created_sessions(world, ada.id, CONNECTIONS)
    holding = await asyncpg.connect(world.settings.database_url)
    async with http_client(world.url) as http:
        try:
            await holding.execute("BEGIN")
            await holding.execute('SELECT FROM "user" WHERE id = $1 FOR UPDATE', ada.id)
            # A request that ends no session waits for no lock and notifies no worker.
            async with asyncio.timeout(5):
                assert (await ask(http, ada.token, REVOKING, uuid7())).status_code == 404
            assert poked == []
            ending = [asyncio.ensure_future(ask(http, ada.token, REVOKING, one)) for one in made]
            await until(lambda: waiting_count(own, OfSessions(ada.id)) == len(made) - 1)
            for _ in range(pool._turns._most):  # noqa: SLF001
                await pool._turns.take(ada.id)  # noqa: SLF001
            asking = {route: asyncio.ensure_future(ask(http, ada.token, route, uuid7())) for route in IN_TURN}
            # An export responds before it reads.
            await until(lambda: waiting_count(pool._turns, ada.id) == len(AS_FRAMES))  # noqa: SLF001
            await until(lambda: waiting_count(own, OfSessions(ada.id)) == len(made) - 1 + len(OF_SESSIONS))
            assert (own._taken, own._most) == ({OfSessions(ada.id): 1}, 1)  # noqa: SLF001
            async with asyncio.timeout(5):
                for route in IN_TURN:
                    answer = await ask(http, charles.token, route, uuid7())
                    assert answer.status_code in {200, 204, 403, 404}, route
                    if route == ("POST", "/v1/auth/logout"):
                        break
            assert not any(one.done() for one in (*ending, *asking.values()))
        finally:
            await holding.close()
        for _ in range(pool._turns._most):  # noqa: SLF001
            pool._turns.give(ada.id)  # noqa: SLF001
        assert [(await one).status_code for one in ending] == [204] * len(ending)
        answers = {route: (await one).status_code for route, one in asking.items()}
        assert max(answers.values()) < 500, answers
    assert set(poked) == {ada.id, charles.id}
    await until(lambda: not (pool._turns._taken or own._taken))  # noqa: SLF001


NO_STATEMENT = {"ping", "unwatch", "get_push_key"}
"""Frames that do not query the database."""
IN_BATCHES = {"react", "unreact", "vote"}
"""Frames that only run in statements for many users, where one of each user is next in turn."""
FURTHER_FIELDS = {"join": {"invite_code": "none"}, "search": {"text": "words"}}
"""Fields without which a frame is refused before it queries the database."""


async def test_every_frame_takes_a_turn_of_its_user(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    asker = await world.connect(ada)
    about = await world.group(asker, charles)
    said = await sent(asker, about)
    named = {"conversation_id": about, "to_conversation_id": about, "message_id": said, "user_id": charles.id}
    ids = {name: str(one) for name, one in named.items()}
    (one,) = world.workers[0].app.hub.online_users.sockets(ada.id)
    assert isinstance(one, Connection)
    turns = world.workers[0].app._database._state.pool._turns  # noqa: SLF001
    for _ in range(turns._most):  # noqa: SLF001
        await turns.take(ada.id)
    turns._patience = 0.0  # noqa: SLF001
    answered: dict[str, object] = {}
    for kind in ROUTES:
        frame = valid(inspect.type_info(kind), "", ids)
        frame |= FURTHER_FIELDS.get(frame["type"], {})
        answer = await one._deps.dispatch.run(one.context, json.dumps(frame).encode())  # noqa: SLF001
        if not isinstance(answer, server.Error) or answer.code is not ErrorCode.UNAVAILABLE:
            answered[frame["type"]] = answer
    for _ in range(turns._most):  # noqa: SLF001
        turns.give(ada.id)
    assert answered.keys() == NO_STATEMENT | IN_BATCHES, answered


async def test_due_messages_need_no_turn_of_their_senders(world: World) -> None:
    """The job sends messages one by one, so that one that waited would delay those of others."""
    ada, charles = await world.users("Ada", "Charles")
    asker, other = await world.connect(ada), await world.connect(charles)
    abouts = await world.channel(asker), await world.channel(other)
    every_turns = [worker.app._database._state.pool._turns for worker in world.workers]  # noqa: SLF001
    for by, about in zip((asker, other), abouts, strict=True):
        await by.call(
            client.Schedule(
                conversation_id=about, message_id=MessageId(uuid7()), content="Now", send_at=now() + timedelta(hours=1)
            )
        )
    for turns in every_turns:
        turns._patience = 60.0  # noqa: SLF001
        for _ in range(turns._most):  # noqa: SLF001
            await turns.take(ada.id)
    await world.db.execute("UPDATE scheduled_message SET send_at = now()")
    async with asyncio.timeout(10):
        for by, about in zip((asker, other), abouts, strict=True):
            assert (await by.event(server.MessageSent)).message.conversation_id == about
    for turns in every_turns:
        for _ in range(turns._most):  # noqa: SLF001
            turns.give(ada.id)


async def test_user_who_waits_for_a_turn_holds_no_part_of_a_share(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    database = world.workers[0].app._database  # noqa: SLF001
    pool, state = database._state.pool, database._state  # noqa: SLF001
    mine, others = database.of(ada.id), database.of(charles.id)

    async def use(borrowed: AbstractAsyncContextManager[Db]) -> int:
        async with borrowed as db:
            return int(await db.fetchval("SELECT 1"))

    shares = (state.counts, state.searches, state.catching_up)
    for _ in range(pool._turns._most):  # noqa: SLF001
        await pool._turns.take(ada.id)  # noqa: SLF001
    ways = (Database.counting, Database.searching, Database.catching_up)
    waiting = [asyncio.ensure_future(use(way(mine))) for way in ways for _ in range(CONNECTIONS)]
    await until(lambda: waiting_count(pool._turns, ada.id) == len(waiting))  # noqa: SLF001
    assert [(share._turns.locked(), share._waiting) for share in shares] == [(False, 0)] * len(shares)  # noqa: SLF001
    async with asyncio.timeout(5):
        assert [await use(way(others)) for way in ways] == [1] * len(ways)
    assert not any(one.done() for one in waiting)
    # A user who gets no part of a share returns the turn.
    for share in shares:
        share._most_waiting = 0  # noqa: SLF001
        async with share.hold(nullcontext()):
            with pytest.raises(Refused):
                await use(ways[shares.index(share)](others))
        share._most_waiting = len(waiting)  # noqa: SLF001
    assert charles.id not in pool._turns._taken  # noqa: SLF001
    for _ in range(pool._turns._most):  # noqa: SLF001
        pool._turns.give(ada.id)  # noqa: SLF001
    assert await asyncio.gather(*waiting) == [1] * len(waiting)
    assert (pool._turns._taken, pool._turns._waiting) == ({}, {})  # noqa: SLF001
    await until(lambda: not pool._taken)  # noqa: SLF001 - jobs borrow connections, too


@given(most=st.integers(1, 3), steps=st.lists(st.tuples(st.sampled_from("ABC"), st.booleans()), max_size=60))
def test_turns_are_granted_in_order_and_none_is_lost(most: int, steps: list[tuple[str, bool]]) -> None:
    """`True` requests a turn. `False` ends one, or cancels the latest request if there is none."""

    async def run() -> None:
        turns: Turns[str] = Turns(most, patience=60)
        asked: dict[str, list[asyncio.Task[None]]] = {key: [] for key in "ABC"}
        for key, is_asking in steps:
            mine = asked[key]
            if is_asking:
                mine.append(asyncio.create_task(turns.take(key)))
            elif mine and mine[0].done():
                mine.pop(0)
                turns.give(key)
            elif mine:
                mine.pop().cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            for ones in asked.values():
                has_turn = [one.done() for one in ones]
                assert has_turn == [number < most for number in range(len(ones))]
        for key, ones in asked.items():
            for one in ones:
                await one
                turns.give(key)
        assert (turns._taken, turns._waiting) == ({}, {})  # noqa: SLF001

    asyncio.run(run())


async def test_turn_granted_to_a_cancelled_request_passes_to_the_next() -> None:
    turns: Turns[str] = Turns(1, patience=60)
    await turns.take("A")
    late, following = asyncio.create_task(turns.take("A")), asyncio.create_task(turns.take("A"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    turns.give("A")
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    await following
    turns.give("A")
    assert (turns._taken, turns._waiting) == ({}, {})  # noqa: SLF001


class Stub:
    """The part of a connection that a pool uses."""

    is_open = True

    def is_closed(self) -> bool:
        return not self.is_open

    def terminate(self) -> None:
        self.is_open = False


async def _connect() -> Any:
    await asyncio.sleep(0)
    return Stub()


async def test_connections_are_granted_in_order_with_turns_per_user() -> None:
    ada, charles, mary = (UserId(uuid7()) for _ in range(3))
    pool = Pool(_connect, most=1, patience=60)
    held = await pool.take(ada)
    order: list[UserId | None] = []

    async def use(user_id: UserId | None, *, is_usable: bool) -> None:
        connection = await pool.take(user_id)
        order.append(user_id)
        await asyncio.sleep(0)
        pool.give(connection, is_usable=is_usable)

    asking = [
        asyncio.create_task(use(one, is_usable=one is not charles))
        for one in (ada, ada, ada, None, charles, None, mary, charles, None)
    ]
    await asyncio.sleep(0)
    pool.give(held, is_usable=True)
    await use(mary, is_usable=True)  # a newcomer, before any waiting task has run
    await asyncio.gather(*asking)
    assert order == [ada, None, charles, None, mary, None, ada, charles, mary, ada]


async def test_cancelled_requests_cost_no_turn_and_leave_one_place() -> None:
    ada, charles = (UserId(uuid7()) for _ in range(2))
    pool = Pool(_connect, most=1, patience=60)
    part = pool.of(ada)
    held = await part.take()
    waiting = [asyncio.create_task(pool.take(one)) for one in (ada, ada, ada, charles, charles, None, None)]
    for way in ("cancelled", "late"):
        for gone in (pool, pool._turns):  # noqa: SLF001
            gone._patience = 60 if way == "cancelled" else 0.0  # noqa: SLF001
        more = [asyncio.create_task(one.take()) for one in (pool.of(ada), pool.of_sessions(ada, None), pool)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if way == "cancelled":
            for one in more:
                one.cancel()
        assert {type(one) for one in await asyncio.gather(*more, return_exceptions=True)} == {
            asyncio.CancelledError if way == "cancelled" else Exhausted
        }
    # No connection was returned, and the cancelled requests leave only one place for sessions.
    lines = pool._waiting._lines  # noqa: SLF001
    assert sorted(len(line) for line in lines.values()) == [0, 1, 1, 2, 3]
    assert (pool._turns._waiting, pool._sessions_turns._waiting) == ({}, {})  # noqa: SLF001
    # Requests cancelled in the turn of the loop in which a connection returns are still queued.
    for number in (0, 1, 5):
        waiting[number].cancel()
    part.give(held, is_usable=True)
    for number in (2, 3, 6, 4):
        connection = await asyncio.wait_for(waiting[number], 5)
        assert not any(one.done() for one in waiting[2:5] if one not in waiting[2 : number + 1]), number
        pool.give(connection, is_usable=True)
    assert (lines, bool(pool._waiting)) == ({}, False)  # noqa: SLF001


async def test_requests_about_sessions_do_not_wait_for_frames_of_the_user() -> None:
    ada, *others = (UserId(uuid7()) for _ in range(6))
    pool = Pool(_connect, most=CONNECTIONS, patience=60)
    held, *_ = [await pool.take() for _ in range(CONNECTIONS)]
    order: list[str] = []

    async def use(name: str, part: UserPool) -> None:
        connection = await part.take()
        order.append(name)
        part.give(connection, is_usable=True)

    asking = [
        asyncio.create_task(use(name, part))
        for name, part in (
            *(("frame", pool.of(ada)) for _ in range(CONNECTIONS)),
            *(("other", pool.of(one)) for one in others),
            ("sessions", pool.of_sessions(ada, None)),
        )
    ]
    await until(lambda: len(pool._waiting._next) == len(others) + 2)  # noqa: SLF001
    pool.give(held, is_usable=True)
    await asyncio.gather(*asking)
    # In one round, each user has one turn before the owner of the sessions.
    assert order[: len(others) + 2] == ["frame", *(["other"] * len(others)), "sessions"]


async def test_sessions_of_a_user_take_turns() -> None:
    """A stolen session sends requests at its full rate. The owner waits only for the one in progress."""
    ada, (stolen, own) = UserId(uuid7()), (SessionId(uuid7()) for _ in range(2))
    pool = Pool(_connect, most=CONNECTIONS, patience=60)
    order: list[str] = []

    async def ask(name: str, session_id: SessionId | None) -> None:
        part = pool.of_sessions(ada, session_id)
        connection = await part.take()
        order.append(name)
        part.give(connection, is_usable=True)

    first = pool.of_sessions(ada, stolen)
    answered = await first.take()
    flood = [asyncio.create_task(ask("stolen", stolen)) for _ in range(3)]
    await until(lambda: waiting_count(pool._sessions_turns, OfSessions(ada)) == len(flood))  # noqa: SLF001
    owners = [asyncio.create_task(ask(*one)) for one in (("own", own), ("own", own), ("login", None))]
    await until(lambda: waiting_count(pool._sessions_turns, OfSessions(ada)) == len(flood + owners))  # noqa: SLF001
    first.give(answered, is_usable=True)
    await asyncio.gather(*flood, *owners)
    assert order == ["own", "login", "stolen", "own", "stolen", "stolen"]
    assert (pool._sessions_turns._taken, pool._sessions_turns._waiting) == ({}, {})  # noqa: SLF001


@given(
    most=st.integers(1, 3),
    steps=st.lists(
        st.tuples(st.sampled_from(["A", "B", None]), st.sampled_from(["take", "give", "break", "cancel"])), max_size=60
    ),
)
def test_no_connection_of_a_pool_is_lost_or_used_twice(most: int, steps: list[tuple[Any, str]]) -> None:
    async def run() -> None:
        pool = Pool(_connect, most=most, patience=60)
        asked: dict[Any, list[asyncio.Task[Any]]] = {key: [] for key in ("A", "B", None)}
        for key, what in steps:
            mine = asked[key]
            if what == "take":
                mine.append(asyncio.create_task(pool.take(key)))
            elif what == "cancel" and mine and not mine[-1].done():
                mine.pop().cancel()
            elif mine and mine[0].done():
                pool.give(mine.pop(0).result(), is_usable=what == "give")
            if len(asked["A"]) % 2:  # sometimes several events happen in one turn of the loop
                await asyncio.sleep(0)
            held = [one.result() for ones in asked.values() for one in ones if one.done()]
            assert len(held) == len(set(held)) <= len(pool._taken) <= most  # noqa: SLF001
        left = [one for ones in asked.values() for one in ones]
        for one in left:
            one.add_done_callback(lambda one: pool.give(one.result(), is_usable=True))
        await asyncio.gather(*left)
        await asyncio.sleep(0)
        assert (pool._taken, pool._opening, bool(pool._waiting)) == (set(), 0, False)  # noqa: SLF001
        pool.close()

    asyncio.run(asyncio.wait_for(run(), 20))


async def test_requests_that_wait_for_a_closed_pool_fail() -> None:
    pool = Pool(_connect, most=1, patience=60)
    await pool.take()
    waiting = asyncio.create_task(pool.take())
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(asyncpg.InterfaceError, match="closed"):
        await waiting


PAUSES = (RETRY_SECONDS, 2 * RETRY_SECONDS, 4 * RETRY_SECONDS)


async def test_few_tasks_connect_during_an_outage_and_the_others_fail_immediately(
    settings: Settings, lines: Lines
) -> None:
    at, tries, is_away = 0.0, 0, True

    async def connect(session: Mapping[str, str]) -> Db:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0)
        if is_away:
            raise asyncpg.CannotConnectNowError("the database system is starting up")
        return await asyncpg.connect(settings.database_url, server_settings=dict(session))

    again = Reconnecting(connect, clock=lambda: at)
    pool = Pool(partial(again.connect, {}), most=CONNECTIONS, patience=60)

    async def many() -> "list[Db | BaseException]":
        return await asyncio.gather(*(pool.take() for _ in range(100)), return_exceptions=True)

    refused = await many()
    assert tries <= CONNECTIONS, "only attempts that had created_sessions"
    for pause in (*PAUSES, *[RETRY_MOST_SECONDS] * 8):
        before = tries
        refused += await many()
        at += pause - 0.001
        refused += await many()
        assert tries == before
        at += 0.001
        refused += await many()
        assert tries == before + 1
    assert {type(error) for error in refused} == {Away}
    assert {str(error) for error in refused} == {"the database system is starting up"}
    is_away = False
    at += RETRY_MOST_SECONDS
    first = await pool.take()
    await asyncio.gather(*(pool.take() for _ in range(CONNECTIONS - 1)))
    pool.give(first, is_usable=True)
    pool.close()
    assert [line.split(" worker 1 ")[1] for line in lines.text.splitlines()] == [
        "WARNING connecting to PostgreSQL failed, database lost (57P03): the database system is starting up",
        "INFO PostgreSQL can be reached again",
    ]


async def test_turns_are_returned_if_a_connection_cannot_be_opened() -> None:
    async def fail() -> Db:
        raise ConnectionRefusedError

    pool = Pool(fail, most=CONNECTIONS, patience=60)
    part = pool.of(UserId(uuid7()))
    for _ in range(CONNECTIONS):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.wait_for(part.take(), 5)
    assert (pool._turns._taken, pool._turns._waiting) == ({}, {})  # noqa: SLF001
