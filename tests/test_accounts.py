"""Accounts and sessions over HTTP: registration, login, cookies, and the end of sessions."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.routing import Route
from websockets import Subprotocol
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from protocol.client import Authenticate
from protocol.codec import encode
from protocol.errors import CloseCode
from protocol.http import LoggedIn
from protocol.server import Error, Ready
from prove.client import Client
from server.auth import passwords
from server.auth.sessions import Sessions
from server.core.config import Settings
from server.http.credentials import SAFE_METHODS
from server.hub.hub import Hub
from tests.world import World, http_client

ADA = {"name": "Ada", "email": "Ada@Example.org", "password": "correct horse"}
WITHOUT_SESSION = {"/v1/auth/register", "/v1/auth/login"}


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(world.url) as http:
        yield http


async def register(http: httpx.AsyncClient, **fields: Any) -> LoggedIn:
    response = await http.post("/v1/auth/register", json=ADA | fields)
    http.cookies.clear()
    assert response.status_code == 201, response.text
    return msgspec.json.decode(response.content, type=LoggedIn)


def bearer(logged_in: LoggedIn) -> dict[str, str]:
    return {"Authorization": f"Bearer {logged_in.token}"}


def refusal(response: httpx.Response) -> tuple[int, str, str | None]:
    error = msgspec.json.decode(response.content, type=Error)
    return response.status_code, error.code.value, error.path


async def test_register_and_login(http: httpx.AsyncClient, world: World) -> None:
    first = await register(http)
    response = await http.post("/v1/auth/login", json={"email": "ada@example.org", "password": ADA["password"]})
    second = msgspec.json.decode(response.content, type=LoggedIn)
    assert second.user == first.user
    assert second.token != first.token
    async with Client(world.url, second.token) as client:
        assert client.ready.user.name == "Ada"
        assert client.ready.limits.content_characters == 10_000


async def test_tokens_and_passwords_are_hashed_at_rest(http: httpx.AsyncClient, world: World) -> None:
    logged_in = await register(http)
    stored = str(await world.db.fetch("SELECT * FROM session, account"))
    assert logged_in.token not in stored
    assert ADA["password"] not in stored
    assert "$argon2id$" in stored


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"password": "short"}, "password"),
        ({"email": "nowhere"}, "email"),
        ({"email": "a\0@example.org"}, "email"),
        ({"name": ""}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"role": "admin"}, "role"),
    ],
)
async def test_invalid_registration_is_refused(http: httpx.AsyncClient, fields: dict[str, str], path: str) -> None:
    assert refusal(await http.post("/v1/auth/register", json=ADA | fields)) == (422, "invalid", path)


async def test_registration_with_a_taken_address_is_refused(http: httpx.AsyncClient) -> None:
    await register(http)
    assert refusal(await http.post("/v1/auth/register", json=ADA)) == (409, "conflict", "email")


async def test_login_does_not_reveal_whether_an_account_exists(http: httpx.AsyncClient) -> None:
    await register(http)
    wrong = await http.post("/v1/auth/login", json={"email": ADA["email"], "password": "wrong horse"})
    nobody = await http.post("/v1/auth/login", json={"email": "no@example.org", "password": "wrong horse"})
    assert refusal(wrong) == refusal(nobody) == (401, "unauthenticated", None)
    assert wrong.json() == nobody.json()


async def test_login_takes_the_same_time_for_an_unknown_account() -> None:
    """Measured in CPU time, as the median of five."""
    taken: dict[str | None, float] = {}
    for password_hash in (await passwords.hashed("correct horse"), None):
        times = []
        for _ in range(5):
            begun = time.process_time()
            assert not await passwords.matches("wrong horse", password_hash)
            times.append(time.process_time() - begun)
        taken[password_hash] = sorted(times)[2]
    known, unknown = taken.values()
    assert 1 / 3 < unknown / known < 3


async def test_a_token_in_the_url_is_not_read(http: httpx.AsyncClient, world: World) -> None:
    token = (await register(http)).token
    for name in ("token", "access_token", "authorization", "openchat_session"):
        response = await http.get("/v1/auth/sessions", params={name: token})
        assert refusal(response)[:2] == (401, "unauthenticated")
        client = Client(world.url, None, query=f"?{name}={token}")
        await client.open()
        await client.raw('{"type":"get_me"}')
        assert await client.closed() == CloseCode.UNAUTHENTICATED
    assert (await http.get("/v1/auth/sessions", headers={"Authorization": f"Bearer {token}"})).status_code == 200


async def test_malformed_and_large_bodies_are_refused(http: httpx.AsyncClient) -> None:
    assert refusal(await http.post("/v1/auth/login", content=b"{")) == (400, "bad_frame", None)
    big = b'{"name": "' + b"x" * 300_000
    assert refusal(await http.post("/v1/auth/register", content=big)) == (422, "invalid", None)


async def test_login_attempts_of_an_account_are_limited(
    http: httpx.AsyncClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    await register(http)
    wrong = {"email": ADA["email"], "password": "wrong horse"}
    for _ in range(settings.login_attempts):
        assert (await http.post("/v1/auth/login", json=wrong)).status_code == 401
    refused = await http.post("/v1/auth/login", json=wrong | {"password": ADA["password"]})
    assert refusal(refused)[:2] == (429, "rate_limited")
    assert 0 < int(refused.headers["retry-after"]) <= 300
    for _ in range(2):
        assert (await http.post("/v1/auth/login", json=wrong)).status_code == 429
    (line,) = [one.getMessage() for one in caplog.records if "login attempts of" in one.getMessage()]
    assert re.fullmatch(r"login attempts of one account reached \d+; refusing further ones for \d+ s", line), (
        "no account"
    )


async def test_login_attempts_of_an_address_are_limited(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        World(msgspec.structs.replace(settings, login_attempts_per_address=2), workers=2) as world,
        http_client() as http,
    ):
        statuses = [
            (await http.post(f"{world.workers[number % 2].url}/v1/auth/login", json=ADA)).status_code
            for number in range(4)
        ]
        assert statuses == [422, 422, 429, 429]
    assert [one.getMessage().partition(";")[0] for one in caplog.records if "attempts" in one.getMessage()] == [
        "login attempts of one address reached 2"
    ]


async def test_sessions_are_listed_and_revoked(http: httpx.AsyncClient, world: World) -> None:
    first = await register(http)
    login = await http.post("/v1/auth/login", json={"email": ADA["email"], "password": ADA["password"]})
    http.cookies.clear()
    second = msgspec.json.decode(login.content, type=LoggedIn)
    listed = (await http.get("/v1/auth/sessions", headers=bearer(first))).json()["sessions"]
    assert [(one["id"], one.get("is_current", False)) for one in listed] == [
        (str(second.session_id), False),
        (str(first.session_id), True),
    ]
    other = await Client(world.workers[1].url, second.token).__aenter__()
    revoked_at = time.monotonic()
    gone = await http.delete(f"/v1/auth/sessions/{second.session_id}", headers=bearer(first))
    assert gone.status_code == 204
    assert await other.closed() == CloseCode.SESSION_ENDED
    assert time.monotonic() - revoked_at < 5  # much less than the heartbeat, which would notice it, too
    again = await http.delete(f"/v1/auth/sessions/{second.session_id}", headers=bearer(first))
    assert refusal(again) == (404, "not_found", "session_id")
    strange = await http.delete("/v1/auth/sessions/not-an-id", headers=bearer(first))
    assert refusal(strange) == (404, "not_found", "session_id")


async def test_revoke_all_closes_every_socket(http: httpx.AsyncClient, world: World) -> None:
    logged_in = await register(http)
    sockets = [await Client(worker.url, logged_in.token).__aenter__() for worker in world.workers]
    assert (await http.delete("/v1/auth/sessions", headers=bearer(logged_in))).status_code == 204
    assert [await socket.closed() for socket in sockets] == [CloseCode.SESSION_ENDED] * 2
    assert refusal(await http.get("/v1/auth/sessions", headers=bearer(logged_in)))[0] == 401


async def test_revoked_sockets_are_closed_even_if_the_request_fails_after_its_commit(
    http: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the connection to PostgreSQL is lost during the commit."""
    logged_in = await register(http)
    sockets = [await Client(worker.url, logged_in.token).__aenter__() for worker in world.workers]

    def defect(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Hub, "notify", defect)
    assert (await http.delete("/v1/auth/sessions", headers=bearer(logged_in))).status_code == 500
    assert [await socket.closed() for socket in sockets] == [CloseCode.SESSION_ENDED] * 2


async def test_session_of_another_user_is_not_found(http: httpx.AsyncClient) -> None:
    ada = await register(http)
    mary = await register(http, name="Mary", email="mary@example.org")
    response = await http.delete(f"/v1/auth/sessions/{ada.session_id}", headers=bearer(mary))
    assert refusal(response) == (404, "not_found", "session_id")


async def test_logout_ends_the_session(http: httpx.AsyncClient) -> None:
    logged_in = await register(http)
    assert (await http.post("/v1/auth/logout", headers=bearer(logged_in))).status_code == 204
    assert refusal(await http.post("/v1/auth/logout", headers=bearer(logged_in)))[:2] == (401, "unauthenticated")


async def test_expired_session_is_refused(http: httpx.AsyncClient, world: World) -> None:
    logged_in = await register(http)
    await world.db.execute("UPDATE session SET expires_at = now() - interval '1 second'")
    assert refusal(await http.get("/v1/auth/sessions", headers=bearer(logged_in)))[:2] == (401, "unauthenticated")
    with pytest.raises(InvalidStatus) as refused:
        await Client(world.url, logged_in.token).open()
    assert refused.value.response.status_code == 401


async def test_use_of_a_session_extends_it(http: httpx.AsyncClient, world: World) -> None:
    logged_in = await register(http)
    await world.db.execute("UPDATE session SET expires_at = now() + interval '2 days'")
    async with Client(world.url, logged_in.token):
        while await world.db.fetchval("SELECT expires_at < now() + interval '29 days' FROM session"):
            await world.db.execute("SELECT pg_sleep(0.01)")


REMAINING = "SELECT expires_at - now() FROM session WHERE id = $1"


async def test_session_is_extended_for_every_session_lifetime(http: httpx.AsyncClient, world: World) -> None:
    logged_in = await register(http)
    app = world.workers[0].app
    for days in (1, 2, 3, 3650):
        sessions = Sessions(app._database, app._tickets, days=days)  # noqa: SLF001
        lasts = timedelta(days=days)
        least = max(lasts / 2, lasts - timedelta(days=1))
        for left, is_extended in ((least + timedelta(minutes=1), False), (least - timedelta(minutes=1), True)):
            await world.db.execute("UPDATE session SET expires_at = now() + $1", left)
            assert sessions.is_due((await sessions.authenticate(logged_in.token)).expires_at) == is_extended
            while is_extended and await world.db.fetchval(REMAINING, logged_in.session_id) < lasts - timedelta(
                minutes=1
            ):
                await world.db.execute("SELECT pg_sleep(0.01)")


async def test_open_socket_extends_its_session_and_is_closed_when_the_session_expires(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, session_days=1, heartbeat_seconds=0.2)
    async with World(settings, workers=1) as world:
        kept, lost = await world.users("Kept", "Lost")
        await world.db.execute("UPDATE session SET expires_at = now() + interval '1 second'")
        async with world.db.transaction():
            # A session whose row is locked is not extended.
            await world.db.execute("SELECT FROM session WHERE user_id = $1 FOR UPDATE", lost.id)
            one, other = await world.connect(kept), await world.connect(lost)
            assert await other.closed() == CloseCode.SESSION_ENDED
        await one.synced()
        left = {row[0]: row[1] for row in await world.db.fetch("SELECT user_id, expires_at - now() FROM session")}
        assert left[kept.id] > timedelta(hours=23)
        assert left[lost.id] < timedelta(0)


async def test_first_frame_authenticates(http: httpx.AsyncClient, world: World) -> None:
    logged_in = await register(http)
    client = Client(world.url, None)
    await client.open()
    await client.socket.send(encode(Authenticate(token=logged_in.token)).decode())
    assert (await client.event(Ready)).user == logged_in.user
    assert (await client.raw('{"type": "authenticate", "token": "again"}')).code == "invalid"
    await client.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ('{"type": "ping"}', "unauthenticated"),
        ('{"type": "authenticate", "token": "wrong"}', "unauthenticated"),
        ("garbage", "bad_frame"),
        (b'{"type": "authenticate", "token": "wrong"}', "bad_frame"),
    ],
)
async def test_bad_first_frame_closes_the_connection(world: World, first: str | bytes, code: str) -> None:
    client = Client(world.url, None)
    await client.open()
    assert (await client.raw(first)).code == code
    assert await client.closed() == CloseCode.UNAUTHENTICATED


async def test_connection_without_a_first_frame_is_closed_after_five_seconds(world: World) -> None:
    """The error explains where to put the token, also when it was sent in the wrong place."""

    async def closed(query: str = "", **headers: str) -> tuple[str, int | None]:
        url = world.url.replace("http", "ws", 1) + "/v1/ws" + query
        async with connect(url, additional_headers=headers, proxy=None) as socket:
            told = str(await socket.recv())
            await socket.wait_closed()
            return told, socket.close_code

    for told, code in await asyncio.gather(closed(), closed("?token=x"), closed(Authorization="Basic eDp5")):
        assert code == CloseCode.WITH_TOKEN
        assert "`Authorization: Bearer`" in told
        assert "`authenticate`" in told


async def test_cookie_needs_an_allowed_origin(http: httpx.AsyncClient, world: World) -> None:
    cookie = {"Cookie": f"openchat_session={(await register(http)).token}"}
    async with Client(world.url, None, headers=cookie, origin=world.url) as client:
        assert client.ready.user.name == "Ada"
    secure = world.url.replace("http:", "https:")
    near = [f"{world.url}.evil.example", f"{world.url}0", secure, world.url[:-1]]
    for origin in ("https://evil.example", None, *near):
        with pytest.raises(InvalidStatus) as refused:
            await Client(world.url, None, headers=cookie, origin=origin).open()
        assert refused.value.response.status_code == 403
        said = (refused.value.response.body or b"").decode()
        # Behind a TLS proxy that is not configured, the server does not recognize its own origin.
        named = "Bearer" if origin is None else "OPENCHAT_TRUSTED_PROXIES" if origin == secure else "OPENCHAT_ORIGINS"
        names = {one for one in ("Bearer", "OPENCHAT_TRUSTED_PROXIES", "OPENCHAT_ORIGINS") if one in said}
        assert names == {named}, (origin, said)
    page = await http.post("/v1/auth/login", json=ADA, headers={"Origin": secure.upper()})
    assert refusal(page) == (403, "forbidden", "origin")
    assert "its own pages at `http://`" in page.json()["message"]
    assert "X-Forwarded-Proto" in page.json()["message"]
    forged = await http.post("/v1/auth/logout", headers=cookie | {"Origin": "https://evil.example"})
    assert refusal(forged) == (403, "forbidden", "origin")


async def test_wrong_token_is_refused_before_the_socket_opens(world: World) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await Client(world.url, "wrong").open()
    assert refused.value.response.status_code == 401
    assert msgspec.json.decode(refused.value.response.body or b"", type=Error).code == "unauthenticated"


@pytest.mark.parametrize(
    ("path", "offered", "answer"),
    [
        ("/ws", ["openchat.v1.json"], (404, "not_found")),
        ("/v1/call", ["openchat.v1.json"], (404, "not_found")),
        ("/v1/ws", ["openchat.v9.json", "chat"], (400, "invalid")),
    ],
)
async def test_handshake_for_another_path_or_subprotocol_is_refused_in_json(
    http: httpx.AsyncClient, world: World, path: str, offered: list[Subprotocol], answer: tuple[int, str]
) -> None:
    bearing = bearer(await register(http))
    with pytest.raises(InvalidStatus) as refused:
        await connect(world.url.replace("http", "ws") + path, subprotocols=offered, additional_headers=bearing)
    error = msgspec.json.decode(refused.value.response.body or b"", type=Error)
    assert (refused.value.response.status_code, error.code) == answer
    url = world.url.replace("http", "ws") + "/v1/ws"
    ours = Subprotocol("openchat.v1.json")
    for some, chosen in (([Subprotocol("openchat.v9.json"), ours], ours), (None, None)):
        async with connect(url, subprotocols=some, additional_headers=bearing) as socket:
            assert socket.subprotocol == chosen


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://127.0.0.1:1", "https://é.example"])
async def test_requests_from_foreign_origins_change_nothing(http: httpx.AsyncClient, world: World, origin: str) -> None:
    """With the cookie that the browser adds, and also without it where no session is needed."""
    ada = await register(http)
    routes = [one for one in world.workers[0].app.starlette.routes if isinstance(one, Route)]
    changing = [(one.path, method) for one in routes for method in sorted((one.methods or set()) - SAFE_METHODS)]
    assert {("/v1/auth/login", "POST"), ("/v1/call", "POST"), ("/v1/auth/sessions", "DELETE")} <= set(changing)
    for path, method in changing:
        body = {key: ADA[key] for key in ("email", "password")} if path.endswith("login") else ADA
        for cookie in [
            {b"Cookie": b"openchat_session=" + ada.token.encode()},
            *([{}] if path in WITHOUT_SESSION else []),
        ]:
            url = path.format(session_id=ada.session_id)
            answer = await http.request(method, url, json=body, headers=cookie | {b"Origin": origin.encode("latin-1")})
            assert refusal(answer) == (403, "forbidden", "origin"), path
            assert "set-cookie" not in answer.headers
    assert len((await http.get("/v1/auth/sessions", headers=bearer(ada))).json()["sessions"]) == 1


async def test_own_and_allowed_origins_and_non_browsers_can_log_in(settings: Settings) -> None:
    async with (
        World(msgspec.structs.replace(settings, origins="https://chat.example"), workers=1) as world,
        http_client(world.url) as http,
    ):
        await register(http)
        login = {key: ADA[key] for key in ("email", "password")}
        for headers in ({}, {"Origin": world.url}, {"Origin": "https://chat.example"}):
            answer = await http.post("/v1/auth/login", json=login, headers=headers)
            assert answer.status_code == HTTPStatus.OK
            assert "set-cookie" in answer.headers


async def test_allowed_origins_may_read_responses(settings: Settings) -> None:
    theirs = {"Origin": "https://chat.example"}
    async with (
        World(msgspec.structs.replace(settings, origins="https://chat.example/"), workers=1) as world,
        http_client(world.url) as http,
    ):
        assert (await http.get("/healthz", headers=theirs)).headers["access-control-allow-origin"] == theirs["Origin"]
        other = await http.get("/healthz", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        cookie = {"Cookie": f"openchat_session={(await register(http)).token}"}
        async with Client(world.url, None, headers=cookie, origin=theirs["Origin"]) as client:
            assert client.ready.user.name == "Ada"


async def test_login_in_the_client_guide_works(world: World) -> None:
    page = (Path(__file__).parent.parent / "docs" / "clients.md").read_text()
    page = page.replace("localhost:8000", world.url.removeprefix("http://"))
    commands = re.findall(r"^curl -s (\S+/v1/auth/\S+) -d '(.*)'$", page, re.MULTILINE)
    (program,) = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    async with http_client(world.url) as http:
        answers = [await http.post(f"http://{url}", content=body) for url, body in commands]
    assert [answer.status_code for answer in answers] == [201, 200]
    found: dict[str, Any] = {}
    exec(program, found)  # noqa: S102 - it is our own
    for answer in answers:
        assert {"token", "session_id", "expires_at", "user"} == answer.json().keys()
        assert await found["main"](answer.json()["token"]) == "Ada"
