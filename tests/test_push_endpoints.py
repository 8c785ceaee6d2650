"""Push endpoints of one user whose devices register, unregister and log out concurrently, on two workers."""

import asyncio
import random
from datetime import timedelta
from typing import Any

import asyncpg
import httpx

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_PUSH_ENDPOINTS
from protocol.server import Done
from prove.writes import PUSH_POINT
from server.auth.tokens import new_token, token_hash
from server.queries import sessions
from tests.world import UserSession, World, http_client, refused

HISTORY = """
CREATE TABLE history (number bigserial, endpoint text, is_there boolean, by bigint);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO history (endpoint, is_there, by) VALUES (coalesce(NEW.endpoint, OLD.endpoint), NEW IS NOT NULL,
        txid_current());
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON push_endpoint FOR EACH ROW EXECUTE FUNCTION note()
"""
"""All changes of endpoints, in the order of the user's lock."""
STORED_AND_DELETED = """
SELECT count(*) FROM history made JOIN history gone USING (by, endpoint) WHERE made.is_there AND NOT gone.is_there
"""
ENDPOINTS = "SELECT endpoint FROM push_endpoint WHERE user_id = $1"
NEWEST = "SELECT endpoint FROM history WHERE is_there ORDER BY number DESC LIMIT $1"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def registration(name: object) -> client.RegisterPush:
    return client.RegisterPush(endpoint=f"https://push.example/{name}", p256dh=PUSH_POINT, auth="A" * 22)


async def devices(world: World, user: UserSession, count: int) -> list[UserSession]:
    """Return further sessions of a user."""
    made = [UserSession(user.id, user.name, new_token()) for _ in range(count)]
    for one in made:
        await sessions.create(world.db, user.id, token_hash(one.token), timedelta(days=30), (None, None))
    return made


async def endpoints(world: World, user_id: UserId) -> set[str]:
    return {row[0] for row in await world.db.fetch(ENDPOINTS, user_id)}


async def test_concurrent_registrations_keep_the_newest_endpoints(world: World) -> None:
    await world.db.execute(HISTORY)
    user = await world.user("Ada")
    here = [await world.connect(one, number % 2) for number, one in enumerate(await devices(world, user, 6))]
    await asyncio.gather(*(random.choice(here).call(registration(name)) for name in range(60)))
    assert await world.db.fetchval(STORED_AND_DELETED) == 0
    newest = {row[0] for row in await world.db.fetch(NEWEST, MAX_PUSH_ENDPOINTS)}
    assert await endpoints(world, user.id) == newest
    assert len(newest) == MAX_PUSH_ENDPOINTS


async def test_registrations_beside_unregistrations_and_logouts_are_stored_or_refused(world: World) -> None:
    await world.db.execute(HISTORY)
    user = await world.user("Ada")
    made = await devices(world, user, 8)
    leaving = set(made[4:])
    clients = {one: await world.connect(one, number % 2) for number, one in enumerate(made)}
    unregistered: set[str] = set()

    async def register(who: UserSession, name: int) -> None:
        try:
            assert await clients[who].call(registration(name)) == Done()
            if name % 3 == 0:
                endpoint = registration(name).endpoint
                await clients[who].call(client.UnregisterPush(endpoint=endpoint))
                unregistered.add(endpoint)
        except Refused as error:
            assert (error.code, who in leaving) == (ErrorCode.UNAUTHENTICATED, True)
        except ConnectionError:
            assert who in leaving

    async def log_out(http: httpx.AsyncClient, who: UserSession) -> None:
        response = await http.post("/v1/auth/logout", headers={"Authorization": f"Bearer {who.token}"})
        assert response.status_code == 204

    async with http_client(world.url) as http:
        acts = [register(made[name % 8], name) for name in range(72)] + [log_out(http, one) for one in leaving]
        random.shuffle(acts)
        await asyncio.gather(*acts)
    assert await world.db.fetchval(STORED_AND_DELETED) == 0
    left = await endpoints(world, user.id)
    assert len(left) <= MAX_PUSH_ENDPOINTS
    assert left.isdisjoint(unregistered)
    assert unregistered


async def test_registration_that_waits_for_the_logout_of_its_session_is_refused(world: World) -> None:
    user = await world.user("Ada")
    (leaving,) = await devices(world, user, 1)
    here, ends = await world.connect(user), await world.connect(leaving, 1)
    holder = await asyncpg.connect(world.settings.database_url)
    async with holder.transaction():
        await holder.execute('SELECT FROM "user" WHERE id = $1 FOR NO KEY UPDATE', user.id)
        answers: list[asyncio.Task[Any]] = [
            asyncio.create_task(one.call(registration(name))) for name, one in enumerate((here, ends))
        ]
        async with asyncio.timeout(5):
            while await world.db.fetchval(WAITING) < 2:
                await asyncio.sleep(0.01)
        await holder.execute("DELETE FROM session WHERE token = $1", token_hash(leaving.token))
    await holder.close()
    assert await answers[0] == Done()
    with refused(ErrorCode.UNAUTHENTICATED, None):
        await answers[1]
    assert await endpoints(world, user.id) == {registration(0).endpoint}


async def test_endpoint_that_another_user_takes_over_keeps_no_old_one(world: World) -> None:
    """Locked endpoints used to be left out of the count, so that each kept one of the oldest."""
    ada, charles = await world.users("Ada", "Charles")
    hers, his = await world.connect(ada), await world.connect(charles, 1)
    for name in range(MAX_PUSH_ENDPOINTS):
        await hers.call(registration(name))
    holder = await asyncpg.connect(world.settings.database_url)
    async with holder.transaction():
        newest = [registration(name).endpoint for name in range(MAX_PUSH_ENDPOINTS - 2, MAX_PUSH_ENDPOINTS)]
        await holder.execute("SELECT FROM push_endpoint WHERE endpoint = ANY($1) FOR UPDATE", newest)
        await hers.call(registration("new"))
    await holder.close()
    assert len(await endpoints(world, ada.id)) == MAX_PUSH_ENDPOINTS
    assert registration(0).endpoint not in await endpoints(world, ada.id)
    await his.call(registration("new"))
    assert registration("new").endpoint in await endpoints(world, charles.id)
    assert len(await endpoints(world, ada.id)) == MAX_PUSH_ENDPOINTS - 1
