"""Two installations that share a Redis do not affect each other, even if all ids are the same."""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from protocol import client, server
from prove.client import Client
from server.core.config import Settings
from server.db.epoch import epoch_id
from tests.conftest import Servers
from tests.test_credentials import ADA, LOGIN, registered
from tests.world import UserSession, World, http_client, sent

pytestmark = pytest.mark.new_database


class Twins(NamedTuple):
    """A world and one whose database is a copy, with the same users, sessions and conversations."""

    one: World
    copy: World
    people: list[UserSession]


@pytest.fixture
async def twins(servers: Servers, settings: Settings) -> AsyncIterator[Twins]:
    async with World(settings, workers=1) as one:
        people = await one.users("Ada", "Charles")
        async with http_client(one.url) as http:
            await registered(http)
        ada = await one.connect(people[0])
        await one.group(ada, people[1])
        name = await one.db.fetchval("SELECT current_database()")
    admin = await asyncpg.connect(servers.postgres.url("postgres"))
    await admin.execute(f"CREATE DATABASE {name}_copy TEMPLATE {name} STRATEGY file_copy")
    copied = msgspec.structs.replace(settings, database_url=servers.postgres.url(f"{name}_copy"))
    try:
        async with World(settings) as one, World(copied) as copy:
            yield Twins(one, copy, people)
    finally:
        await admin.execute(f"DROP DATABASE {name}_copy WITH (FORCE)")
        await admin.close()


async def seen(one: Client, who: UserSession) -> str:
    watched = await one.call(client.Watch(user_ids=[who.id]), server.PresenceList)
    return watched.presences[0].status


async def test_no_event_of_one_installation_reaches_another_on_the_same_redis(twins: Twins) -> None:
    ada, charles = twins.people
    here, there = [await world.connect(ada) for world in (twins.one, twins.copy)]
    twin = await twins.copy.connect(charles, 1)
    group = await twins.one.db.fetchval("SELECT id FROM conversation")
    said = await sent(twin, group, "In the copy")
    await there.event(server.MessageSent, lambda event: event.message.id == said)
    async with asyncio.timeout(15):
        while await seen(there, charles) != "online":
            await asyncio.sleep(0.01)
    assert await seen(here, charles) == "offline"
    other = await twins.one.connect(charles, 1)
    assert await seen(here, charles) == "online"
    await twin.call(client.SetPresence(status="busy"))
    await there.event(server.PresenceChanged, lambda event: event.presence.status == "busy")
    # The next message of the original has the version that the copy's message had.
    mine = await sent(other, group, "In the original")
    await here.event(server.MessageSent, lambda event: event.message.id == mine)
    got = [event.message.content for event in here.events if isinstance(event, server.MessageSent)]
    assert got == ["In the original"]
    assert not [event for event in here.events if getattr(getattr(event, "presence", None), "status", "") == "busy"]


async def test_failed_logins_at_one_installation_do_not_lock_accounts_of_another(twins: Twins) -> None:
    wrong = {"email": ADA["email"], "password": "wrong horse"}
    async with http_client(twins.copy.url) as http:
        codes = {(await http.post("/v1/auth/login", json=wrong)).status_code for _ in range(12)}
    assert codes == {401, 429}
    async with http_client(twins.one.url) as http:
        assert (await http.post("/v1/auth/login", json=LOGIN)).status_code == 200


async def test_every_key_and_channel_has_the_id_of_its_installation(twins: Twins) -> None:
    """The copy has another id than the original."""
    ids = [await epoch_id(world.db) for world in (twins.one, twins.copy)]
    assert len(set(ids)) == 2
    for world in (twins.one, twins.copy):
        await world.connect(twins.people[0])
    async with Redis.from_url(twins.one.settings.redis_url, decode_responses=True) as redis:
        keys = [key async for key in redis.scan_iter("*")]
        channels = await redis.pubsub_channels()
    for names, place in ((keys, 2), (channels, 0)):
        assert {str(name).split(":")[place] for name in names} == set(ids)
