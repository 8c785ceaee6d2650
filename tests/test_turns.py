"""One user does not hold all connections to the database of a worker, whatever they do."""

import asyncio
from contextlib import AbstractAsyncContextManager

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import client, server
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId, uuid7
from server.database import Database
from server.pool import Connection, Pool
from server.turns import Turns
from tests.world import World, message, sent, until

CONNECTIONS = 4
"""Connections of a worker to the database, in tests; one user holds two of them at most."""


async def test_a_user_whose_frames_wait_for_a_lock_leaves_connections_to_others(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    asker, other = await world.connect(ada), await world.connect(charles)
    busy, quiet = await world.channel(asker), await world.channel(other)
    about = await sent(asker, busy)
    more = [await world.connect(ada) for _ in range(2 * CONNECTIONS)]
    pool = world.workers[0].app._database._shared.pool  # noqa: SLF001
    holding = await asyncpg.connect(world.settings.database_url)
    try:
        await holding.execute("BEGIN")
        await holding.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", busy)
        frame = client.React(conversation_id=busy, message_id=about, emoji="👍")
        asking: list[asyncio.Future[server.Result]] = [asyncio.ensure_future(one.call(frame)) for one in more]
        await until(lambda: pool._turns._waiting.get(ada.id) is not None)  # noqa: SLF001
        async with asyncio.timeout(5):
            await other.call(message(quiet))
            await other.call(client.History(conversation_id=quiet), server.MessagePage)
            # A connection begins, which reads the database, and so does a call by HTTP.
            await world.connect(charles)
        assert not any(one.done() for one in asking)
        assert len(pool._taken) <= CONNECTIONS // 2  # noqa: SLF001
        # Nor can one who waits for themselves: they are told to come back.
        pool._turns._patience = 0.01  # noqa: SLF001
        refusal = await (await world.connect(ada, query="?resume=1")).ask(client.GetMe())
        assert isinstance(refusal, server.Error)
        assert (refusal.code, bool(refusal.retry_after_ms)) == (ErrorCode.UNAVAILABLE, True)
    finally:
        await holding.close()
    await asyncio.gather(*asking)
    assert (pool._turns._taken, pool._turns._waiting) == ({}, {})  # noqa: SLF001


async def test_a_user_who_waits_for_a_turn_of_their_own_holds_no_part_of_a_share(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    database = world.workers[0].app._database  # noqa: SLF001
    pool, shared = database._shared.pool, database._shared  # noqa: SLF001
    mine, others = database.of(ada.id), database.of(charles.id)

    async def use(borrowed: AbstractAsyncContextManager[Connection]) -> int:
        async with borrowed as db:
            return int(await db.fetchval("SELECT 1"))

    shares = (shared.counts, shared.searches, shared.catching_up)
    for _ in range(pool._turns._most):  # noqa: SLF001
        await pool._turns.take(ada.id)  # noqa: SLF001
    ways = (Database.counting, Database.searching, Database.catching_up)
    waiting = [asyncio.ensure_future(use(way(mine))) for way in ways for _ in range(CONNECTIONS)]
    await until(lambda: len(pool._turns._waiting.get(ada.id, ())) == len(waiting))  # noqa: SLF001
    assert [(share._turns.locked(), share._waiting) for share in shares] == [(False, 0)] * len(shares)  # noqa: SLF001
    async with asyncio.timeout(5):
        assert [await use(way(others)) for way in ways] == [1] * len(ways)
    assert not any(one.done() for one in waiting)
    # Who gets no part of a share gives the turn back.
    for share in shares:
        share._most_waiting = 0  # noqa: SLF001
        async with share.turn():
            with pytest.raises(Refused):
                await use(ways[shares.index(share)](others))
        share._most_waiting = len(waiting)  # noqa: SLF001
    assert charles.id not in pool._turns._taken  # noqa: SLF001
    for _ in range(pool._turns._most):  # noqa: SLF001
        pool._turns.give(ada.id)  # noqa: SLF001
    assert await asyncio.gather(*waiting) == [1] * len(waiting)
    assert (pool._turns._taken, pool._turns._waiting, pool._taken) == ({}, {}, set())  # noqa: SLF001


@given(most=st.integers(1, 3), steps=st.lists(st.tuples(st.sampled_from("ABC"), st.booleans()), max_size=60))
def test_turns_are_given_in_order_and_none_is_lost(most: int, steps: list[tuple[str, bool]]) -> None:
    """`True` asks for a turn; `False` ends one, or gives up the wait of the one asked for last if there is none."""

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


async def test_a_turn_that_comes_as_its_wait_ends_goes_to_the_next() -> None:
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


async def test_turns_of_a_user_whose_connections_cannot_be_opened_are_given_back() -> None:
    async def fail() -> Connection:
        raise ConnectionRefusedError

    pool = Pool(fail, most=CONNECTIONS, patience=60)
    part = pool.of(UserId(uuid7()))
    for _ in range(CONNECTIONS):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.wait_for(part.take(), 5)
    assert (pool._turns._taken, pool._turns._waiting) == ({}, {})  # noqa: SLF001
