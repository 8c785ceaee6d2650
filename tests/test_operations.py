"""What an operator looks at: health, readiness, numbers, documents."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from protocol import client
from tests.world import World, sent


async def get(world: World, path: str, worker: int = 0) -> httpx.Response:
    async with httpx.AsyncClient(base_url=world.workers[worker].url, trust_env=False) as http:
        return await http.get(path)


async def test_health_and_readiness(world: World) -> None:
    assert (await get(world, "/healthz")).text == "alive\n"
    ready = await get(world, "/readyz")
    assert (ready.status_code, ready.json()) == (200, {"database": True, "bus": True, "accepting": True})


async def test_a_draining_worker_is_not_ready(world: World) -> None:
    await world.workers[0].app.drain()
    ready = await get(world, "/readyz")
    assert (ready.status_code, ready.json()["accepting"]) == (503, False)


async def test_an_unknown_schema_is_not_ready(world: World) -> None:
    await world.db.execute("INSERT INTO schema_migration (number, name) VALUES (999, 'from the future')")
    ready = await get(world, "/readyz")
    assert (ready.status_code, ready.json()["database"]) == (503, False)


async def test_any_worker_tells_the_numbers_of_all(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    one, other = await world.connect(ada, 0), await world.connect(charles, 1)
    channel = await world.channel(one, is_public=True)
    await other.call(client.Join(conversation_id=channel))
    await sent(one, channel)
    await one.ask(client.GetConversation(conversation_id=channel))
    await one.raw("nonsense")
    world.workers[1].app.metrics.write_once()
    page = (await get(world, "/metrics")).text
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    for worker in ("1", "2"):
        assert found["openchat_connections", ("worker", worker)] == 1
        assert found["openchat_bus_up", ("worker", worker)] == 1
    assert found["openchat_frames_total", ("type", "send"), ("worker", "1")] == 1
    assert found["openchat_refusals_total", ("code", "bad_frame"), ("worker", "1")] == 1
    assert found["openchat_deliveries_total", ("worker", "1")] >= 1
    assert found["openchat_frame_seconds_count", ("worker", "1")] >= 3


async def test_the_wire_is_described_where_it_is_served(world: World) -> None:
    assert (await get(world, "/v1/asyncapi.json")).json()["asyncapi"] == "3.0.0"
    assert (await get(world, "/v1/openapi.json")).json()["openapi"] == "3.1.0"
    for path in ("/v1/nowhere", "/"):
        assert (await get(world, path)).status_code == 404
