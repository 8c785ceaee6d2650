"""The address of the client behind proxies, which append to X-Forwarded-For, when clients can forge entries."""

import asyncio
import ipaddress
from http import HTTPStatus

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from protocol import client
from protocol.errors import Refused
from prove.client import Client
from server.core import config
from server.core.addresses import limit_key, parsed
from server.core.config import Settings
from server.core.errors import Fatal
from server.core.proxies import Proxies
from server.http.forwarded import DIRECT, _is_near
from tests.world import World, http_client

ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}
PEER = "10.0.0.9"
GARBAGE = [
    "<script>",
    "",
    "unknown",
    "1.2.3.4:80",
    "[2001:db8::1]:80",
    "fe80::1%eth0",
    "1.2.3.4, ",
    "0x7f.1",
    "01.2.3.4",
]

v4 = st.ip_addresses(v=4, network="198.51.0.0/16").map(str)
v6 = st.ip_addresses(v=6, network="2001:db8::/32").map(str)
proxies = st.ip_addresses(v=4, network="10.0.0.0/8").map(str)
anything = st.lists(v4 | v6 | proxies | st.sampled_from(GARBAGE) | st.text(max_size=10), max_size=5)


@given(forged=anything, who=v4 | v6, chain=st.lists(proxies, max_size=3))
def test_client_address_is_the_peer_of_the_first_trusted_proxy(forged: list[str], who: str, chain: list[str]) -> None:
    """Each proxy appends its peer's address: the first one the client's, the others the previous proxy's."""
    entries = [*forged, who, *chain]
    for setting in (str(len(chain) + 1), "10.0.0.0/8, fd00::/8"):
        found = Proxies.read(setting).client(PEER, entries)
        assert found == (str(ipaddress.ip_address(who)), len(chain) + 1)


@given(forged=anything, peer=v4 | v6 | st.none())
def test_only_trusted_proxies_are_believed(forged: list[str], peer: str | None) -> None:
    assert Proxies.read("10.0.0.0/8").client(peer, forged) == (None, 0)
    assert Proxies().client(PEER, forged) == (None, 0)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("setting", ["1", "10.0.0.0/8"])
def test_invalid_address_is_refused_only_in_the_entry_that_counts(garbage: str, setting: str) -> None:
    with pytest.raises(Refused, match="IP address"):
        Proxies.read(setting).client(PEER, ["198.51.100.7", garbage])
    assert Proxies.read(setting).client(PEER, [garbage, "198.51.100.7"]).host == "198.51.100.7"


def test_peer_address_counts_if_there_are_fewer_entries_than_proxies() -> None:
    """With fewer entries, the client bypassed a proxy and may have written every entry."""
    for entries in ([], ["198.51.100.7"], ["<script>"]):
        assert Proxies.read("2").client(PEER, entries) == (None, 0)
    assert Proxies.read("10.0.0.0/8").client(PEER, ["10.1.1.1", "10.2.2.2"]).host == "10.1.1.1"


def test_old_setting_is_refused_with_the_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCHAT_BEHIND_PROXY", "true")
    with pytest.raises(Fatal, match="Set OPENCHAT_TRUSTED_PROXIES"):
        config.read()


@pytest.mark.parametrize("setting", ["true", "-1", "11", "1.5", "10.0.0.0/33", "10.0.0.1/8", "1,", "example.org", "*"])
def test_invalid_setting_stops_the_start_with_one_line(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCHAT_TRUSTED_PROXIES", setting)
    with pytest.raises(Fatal, match=r"^OPENCHAT_TRUSTED_PROXIES must be a number from 0 to 10, or networks [^\n]*\.$"):
        config.read()


@given(v6, st.integers(0, 2**64 - 1))
def test_limits_treat_an_ipv6_network_as_one_address(address: str, other: int) -> None:
    number = int(ipaddress.ip_address(address))
    neighbour = ipaddress.IPv6Address(number >> 64 << 64 | other)
    assert limit_key(str(neighbour)) == limit_key(address)
    assert limit_key(str(ipaddress.IPv6Address(number ^ 1 << 64))) != limit_key(address)


@given(st.ip_addresses(v=4))
def test_limits_treat_ipv4_mapped_addresses_as_ipv4(address: ipaddress.IPv4Address) -> None:
    assert limit_key(f"::ffff:{address}") == limit_key(str(address)) == str(address) == str(parsed(f"::ffff:{address}"))


@pytest.mark.parametrize(
    ("setting", "appended"), [("1", ""), ("2", ", 10.9.9.9"), ("127.0.0.0/8,10.0.0.0/8", ", 10.9.9.9")]
)
async def test_all_address_limits_use_the_forwarded_address(settings: Settings, setting: str, appended: str) -> None:
    changes = {"trusted_proxies": setting, "login_attempts_per_address": 3, "connections_per_address": 2}
    settings = msgspec.structs.replace(settings, **changes)

    def of(address: str, forged: int) -> dict[str, str]:
        return {"X-Forwarded-For": f"198.51.100.{forged}, {address}{appended}", "X-Forwarded-Proto": "https"}

    async with World(settings, workers=1) as world, http_client(world.url) as http:
        registered = await http.post("/v1/auth/register", json=ADA, headers=of("2001:db8::1", 1))
        assert "secure" in registered.headers["set-cookie"].lower()
        token = registered.json()["token"]
        assert await world.db.fetchval("SELECT ip_address FROM session") == "2001:db8::1"

        # Each request has another forged entry, and another address of the same network.
        wrong = {"email": ADA["email"], "password": "wrong horse"}
        codes = [
            (await http.post("/v1/auth/login", json=wrong, headers=of(f"2001:db8::{number}", number))).status_code
            for number in range(2, 6)
        ]
        assert codes == [401, 401, 429, 429]
        assert (await http.post("/v1/auth/login", json=wrong, headers=of("2001:db8:0:1::1", 1))).status_code == 401

        sockets = [Client(world.url, token, headers=of(f"2001:db8::{number}", number)) for number in range(3)]
        await asyncio.gather(*(one.open() for one in sockets[:2]))
        with pytest.raises(InvalidStatus, match="429"):
            await sockets[2].open()
        other = Client(world.url, token, headers=of("203.0.113.5", 1))
        await other.open()
        await other.call(client.Ping())
        for one in (*sockets[:2], other):
            await one.close()

        refused = await http.get("/v1/auth/sessions", headers={"X-Forwarded-For": "<script>" + appended})
        assert refused.status_code == HTTPStatus.BAD_REQUEST
        assert (refused.json()["code"], refused.json()["path"]) == ("invalid", "x-forwarded-for")
        with pytest.raises(InvalidStatus, match="400"):
            await Client(world.url, token, headers={"X-Forwarded-For": "<script>" + appended}).open()


async def test_headers_are_ignored_without_trusted_proxies(settings: Settings) -> None:
    forged = {"X-Forwarded-For": "<script>", "X-Forwarded-Proto": "https"}
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        registered = await http.post("/v1/auth/register", json=ADA, headers=forged)
        assert registered.status_code == HTTPStatus.CREATED
        assert "secure" not in registered.headers["set-cookie"].lower()
        assert await world.db.fetchval("SELECT ip_address FROM session") == "127.0.0.1"


async def test_client_that_bypasses_a_proxy_is_limited_by_its_socket_address(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = msgspec.structs.replace(settings, trusted_proxies="2", login_attempts_per_address=3)
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        forged = {"X-Forwarded-For": "198.51.100.1", "X-Forwarded-Proto": "https"}
        registered = await http.post("/v1/auth/register", json=ADA, headers=forged)
        assert "secure" not in registered.headers["set-cookie"].lower()
        assert await world.db.fetchval("SELECT ip_address FROM session") == "127.0.0.1"
        wrong = {"email": ADA["email"], "password": "wrong horse"}
        codes = [
            (await http.post("/v1/auth/login", json=wrong, headers={"X-Forwarded-For": f"198.51.100.{n}"})).status_code
            for n in range(4)
        ]
        assert codes == [401, 401, 429, 429]
    assert sum("1 of the 2 entries" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("setting", "headers", "outcome"),
    [
        ("1", {}, (200, "X-Forwarded-For has 0 of the 1 entries")),
        ("2", {}, (200, "X-Forwarded-For has 0 of the 2 entries")),
        ("2", {"X-Forwarded-For": "203.0.113.7"}, (200, "X-Forwarded-For has 1 of the 2 entries")),
        ("1", {"X-Forwarded-For": "203.0.113.7:4711"}, (400, "refusing requests with 400")),
        ("127.0.0.0/8", {"X-Forwarded-For": "203.0.113.7:4711"}, (400, "refusing requests with 400")),
        ("1", {"X-Forwarded-For": "203.0.113.7"}, (200, None)),
    ],
)
async def test_wrong_number_of_entries_is_logged_once(
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    headers: dict[str, str],
    outcome: tuple[int, str | None],
) -> None:
    status, said = outcome
    settings = msgspec.structs.replace(settings, trusted_proxies=setting)
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        for path in DIRECT:
            assert (await http.get(path)).status_code == HTTPStatus.OK
        assert "X-Forwarded-For" not in caplog.text
        for _ in range(3):
            assert (await http.get("/v1/asyncapi.json", headers=headers)).status_code == status
    found = [record.getMessage() for record in caplog.records if "X-Forwarded-For" in record.getMessage()]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    assert "4711" not in caplog.text, "text from a client is not quoted"


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
@pytest.mark.parametrize(("setting", "times"), [("", 1), ("10.9.0.0/16", 1), ("127.0.0.0/8", 0)])
async def test_proxy_missing_from_the_setting_is_logged_once(
    settings: Settings, caplog: pytest.LogCaptureFixture, header: str, setting: str, times: int
) -> None:
    settings = msgspec.structs.replace(settings, trusted_proxies=setting)
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        await http.get("/healthz")
        assert "OPENCHAT_TRUSTED_PROXIES" not in caplog.text
        for _ in range(3):
            await http.get("/v1/asyncapi.json", headers={header: "203.0.113.7"})
    assert caplog.text.count("a proxy at 127.0.0.1 that OPENCHAT_TRUSTED_PROXIES does not include") == times


def test_public_address_is_not_taken_for_a_proxy() -> None:
    assert not any(map(_is_near, ["1.2.3.4", "2a00::1"]))
    assert all(map(_is_near, ["127.0.0.1", "10.1.2.3", "172.18.0.2", "100.64.0.1", "::1", "fd00::1", None]))


async def test_repeated_headers_are_joined_into_one_list(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, trusted_proxies="2")
    lines = [("X-Forwarded-For", line) for line in ("6.6.6.6", "198.51.100.1 ,203.0.113.5", "10.9.9.9")]
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        await http.post("/v1/auth/register", json=ADA, headers=lines)
        assert await world.db.fetchval("SELECT ip_address FROM session") == "203.0.113.5"
