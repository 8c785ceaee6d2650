"""Health, readiness, metrics and generated documents."""

import asyncio
import gc
import re
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus

from protocol import client
from prove.client import Client
from server.core import metrics
from server.core.config import Settings
from server.core.proxies import Proxies
from server.gateway import http_protocol
from server.http.endpoints import FORWARDING
from tests.world import World, http_client, sent, until

ROOT = Path(__file__).parent.parent


async def get(world: World, path: str, worker: int = 0) -> httpx.Response:
    async with http_client(world.workers[worker].url) as http:
        return await http.get(path)


async def test_health_and_readiness_are_reported(world: World) -> None:
    assert (await get(world, "/healthz")).text == "alive\n"
    ready = await get(world, "/readyz")
    assert (ready.status_code, ready.json()) == (200, {"database": True, "bus": True, "accepting": True})


async def test_a_draining_worker_is_not_ready(world: World) -> None:
    await world.workers[0].app.drain()
    ready = await get(world, "/readyz")
    assert (ready.status_code, ready.json()["accepting"]) == (503, False)


async def test_worker_with_an_unknown_schema_is_not_ready(world: World) -> None:
    await world.db.execute("INSERT INTO schema_migration (number, name) VALUES (999, 'from the future')")
    ready = await get(world, "/readyz")
    assert (ready.status_code, ready.json()["database"]) == (503, False)


def test_metrics_are_cached_for_a_moment(tmp_path: Path) -> None:
    now, made = 100.0, 0

    def values() -> dict[str, float]:
        nonlocal now, made
        now += 0.5
        made += 1
        return {"connections": made}

    numbers = metrics.Metrics(tmp_path, 1, clock=lambda: now)
    numbers.values = values
    first = numbers.page()
    assert b'openchat_connections{worker="1"} 1.0' in first
    now += 0.5 * metrics.RENDER_PAUSE_FACTOR - 0.1
    assert (numbers.page(), made) == (first, 1)
    now += 0.1
    assert b'openchat_connections{worker="1"} 2.0' in numbers.page()


async def test_every_worker_reports_the_metrics_of_all(world: World) -> None:
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


async def test_metrics_show_the_garbage_collector_tasks_and_waits_for_connections(world: World) -> None:
    app = world.workers[0].app
    before = app.metrics.collector.values()
    gc.collect()
    after = app.metrics.collector.values()
    assert after["gc_collections"] > before["gc_collections"]
    assert after["gc_seconds"] > before["gc_seconds"]
    pool = app._database._state.sending  # noqa: SLF001
    taken = [await pool.take() for _ in range(pool._most)]  # noqa: SLF001
    waiting = asyncio.create_task(pool.take())
    await until(lambda: app._values()["database_waiting"] == 1)  # noqa: SLF001
    assert app._values()["tasks"] >= len({waiting, asyncio.current_task()})  # noqa: SLF001
    for one in taken:
        pool.give(one, is_usable=True)
    pool.give(await waiting, is_usable=True)
    assert app._values()["database_waiting"] == 0  # noqa: SLF001


async def test_metrics_are_for_loopback_and_not_for_clients_of_a_proxy(world: World) -> None:
    assert Settings().metrics_from == world.settings.metrics_from
    async with httpx.AsyncClient(base_url=world.url, trust_env=False) as http:
        nowhere = await http.get("/nowhere")
        for name in sorted(FORWARDING):
            answer = await http.get("/metrics", headers={name: "127.0.0.1"})
            assert (answer.status_code, answer.content) == (404, nowhere.content), name
        assert (await http.get("/metrics")).status_code == 200


FOREIGN_HOSTS = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil", "localhost@evil", "[::1", "",
    "127.0.0.1,evil.example", "127.0.0.1 evil.example", "0x7f.1", "evil-localhost", "xlocalhost",
]  # fmt: skip
"""Values of `Host` from pages whose name was rebound to this address (DNS rebinding), and values that are no names."""


async def test_metrics_are_protected_against_dns_rebinding(settings: Settings) -> None:
    async with (
        World(msgspec.structs.replace(settings, metrics_hosts="Chat-1, chat.example"), workers=1) as world,
        httpx.AsyncClient(base_url=world.url, trust_env=False) as http,
    ):
        nowhere = await http.get("/nowhere")
        for host in FOREIGN_HOSTS:
            for name in (host, f"{host}:8000"):
                answer = await http.get("/metrics", headers={"Host": name})
                assert answer.status_code in {400, 404}, name
                assert answer.status_code == 400 or answer.content == nowhere.content, name
        here = ("localhost", "one.localhost", "127.0.0.1:8000", "10.1.2.3", "[::1]:9", "chat-1:80", "CHAT.example")
        for host in here:
            assert (await http.get("/metrics", headers={"Host": host})).status_code == 200, host
        for origin in ("https://evil.example", "null", world.url):
            answer = await http.get("/metrics", headers={"Origin": origin})
            assert (answer.status_code, answer.content) == (404, nowhere.content), origin


def test_only_metrics_depend_on_the_address_of_the_client() -> None:
    """Any page in a browser on that machine has the same address, so each such answer must check `Host`, too."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "server").rglob("*.py")
        if re.search(r"(request|handshake|self|scope)(\.client\b|\[\"client\"\])|peername", path.read_text())
    }
    assert found == {
        "server/limits/per_address.py",  # limits by address
        "server/gateway/http_protocol.py",  # limits by address
        "server/http/forwarded.py",  # decides which proxies are trusted
        "server/http/endpoints.py",  # the metrics
    }


async def test_failed_logins_are_counted_without_names(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, login_attempts=2), workers=1) as world:
        ada = await world.user("Ada")
        async with http_client(world.url) as http:
            for status in (401, 401, 429):
                answer = await http.post("/v1/auth/login", json={"email": "ada@example.org", "password": "wrong horse"})
                assert answer.status_code == status
            assert (await http.get("/v1/nothing/ada@example.org")).status_code == 404
        with pytest.raises(InvalidStatus, match="401"):
            await Client(world.url, "made-up").open()
        one = Client(world.url, None)
        await one.open()
        await one.raw('{"type": "authenticate", "token": "made-up"}')
        assert await one.closed() == 4001
        page = (await get(world, "/metrics")).text
        for line in (
            'openchat_logins_total{result="ok",worker="1"} 0.0', 'openchat_logins_total{result="wrong",worker="1"} 2.0',
            'openchat_logins_total{result="limited",worker="1"} 1.0',
            'openchat_http_answers_total{path="/v1/auth/login",status="401",worker="1"} 2.0',
            'openchat_http_answers_total{path="other",status="404",worker="1"} 1.0',
            'openchat_http_answers_total{path="/v1/ws",status="401",worker="1"} 1.0',
            'openchat_closed_total{code="4001",worker="1"} 1.0',
        ):  # fmt: skip
            assert line in page
        assert "ada@" not in page
        assert str(ada.id) not in page


UPGRADE = b"GET /v1/ws HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
IN_PLACE = (
    (b"GET / HTTP/1.1\r\nHost:", 408),
    (b"POST /v1/auth/login HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n{", 408),
    (b"GET / HTTP/1.1\r\nx: " + b"x" * 140_000, 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"no HTTP\r\n\r\n", 400),
    (UPGRADE, 400),
)
"""Requests that never reach the application, with the status of the answer."""


async def test_answers_sent_before_the_application_are_counted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.5)

    async def status(world: World, data: bytes) -> int:
        host, _, port = world.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        line = await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        return int(line.split()[1])

    async with World(settings, workers=1) as world:
        found = await asyncio.gather(*(status(world, data) for data, _ in IN_PLACE))
        assert found == [expected for _, expected in IN_PLACE]
        page = (await get(world, "/metrics")).text
    counted = re.findall(r'openchat_http_answers_total\{path="(.*)",status="(\d+)",worker="1"\} (\d+)', page)
    assert sorted(counted) == [("other", "400", "3"), ("other", "408", "2"), ("other", "431", "1")], (
        "answers to closed connections are not sent"
    )


@pytest.mark.parametrize(("metrics_from", "status"), [("", 404), ("10.0.0.0/8", 404), ("10.0.0.0/8,127.0.0.1/32", 200)])
async def test_metrics_are_for_the_configured_networks(settings: Settings, metrics_from: str, status: int) -> None:
    changes = {"metrics_from": metrics_from, "trusted_proxies": "127.0.0.0/8"}
    async with World(msgspec.structs.replace(settings, **changes), workers=1) as world:
        assert (await get(world, "/metrics")).status_code == status
        assert (await get(world, "/healthz")).status_code == 200
        async with httpx.AsyncClient(base_url=world.url, trust_env=False) as http:
            assert (await http.get("/metrics", headers={"X-Forwarded-For": "10.0.0.1"})).status_code == 404


def test_shipped_composition_trusts_only_its_own_proxy() -> None:
    """`docker compose up` starts one nginx, so an entry that a client wrote must not be believed."""
    setting = re.search(
        r'OPENCHAT_TRUSTED_PROXIES: "?\$\{OPENCHAT_TRUSTED_PROXIES:-(\d)\}', (ROOT / "compose.yaml").read_text()
    )
    assert setting is not None
    found = Proxies.read(setting[1]).client("172.18.0.9", ["203.0.113.66", "198.51.100.7"])
    assert found.host == "198.51.100.7"
    assert "location = /metrics { return 404; }" in (ROOT / "deploy" / "nginx.conf").read_text()


async def test_protocol_documents_are_served(world: World) -> None:
    assert (await get(world, "/v1/asyncapi.json")).json()["asyncapi"] == "3.0.0"
    assert (await get(world, "/v1/openapi.json")).json()["openapi"] == "3.1.0"
    for path in ("/v1/nowhere", "/"):
        assert (await get(world, path)).status_code == 404


def test_login_results_and_the_crowd_limit_are_documented() -> None:
    guide = " ".join((ROOT / "docs" / "operations.md").read_text().split())
    listed = re.search(r"`openchat_logins_total` by `result` \(([^)]*)\)", guide)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == {*metrics.LOGINS.values(), metrics.OTHER}
    limit = f"{Settings().write_rate:g} writing frames a second"
    assert limit in (ROOT / "docs" / "load.md").read_text()
    assert limit in (ROOT / "loadtest" / "command.py").read_text()
