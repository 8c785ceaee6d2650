"""Credentials are checked at each use, not only when they are issued: tickets, sessions, passwords, attempts."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from websockets.exceptions import InvalidStatus

from protocol import client, server
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.http import LoggedIn
from prove.client import Client
from server.auth import passwords
from server.auth.attempts import Attempts
from server.cli import admin, main
from server.core.config import Settings
from server.processes.embedded.reach import Reached
from server.queries import accounts
from tests.test_may_send import waiting
from tests.world import UserSession, World, http_client, refused

ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}
LOGIN = {"email": ADA["email"], "password": ADA["password"]}


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(world.url, timeout=30) as http:
        yield http


@pytest.fixture
async def ada(http: httpx.AsyncClient) -> LoggedIn:
    return await registered(http)


async def registered(http: httpx.AsyncClient, **fields: str) -> LoggedIn:
    answer = await http.post("/v1/auth/register", json=ADA | fields)
    http.cookies.clear()
    assert answer.status_code == 201, answer.text
    return msgspec.json.decode(answer.content, type=LoggedIn)


def bearer(token: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def administer(world: World, *arguments: str) -> admin.Answer:
    """Run a command of `openchat` on a separate connection."""
    begun: list[admin.Work] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admin, "start", lambda work, **_: begun.append(work))
        assert main.run(list(arguments)) == 0
    reach = Reached(world.settings.database_url, world.settings.redis_url, "")
    return await admin._run(reach, begun[0])  # noqa: SLF001


async def ticket_of(world: World, token: str) -> str:
    """Connect with a token to the first worker, and return the ticket that it sends when it drains."""
    one = Client(world.workers[0].url, token)
    await one.__aenter__()
    await one.settled()
    await world.workers[0].app.drain()
    ticket = (await one.event(server.GoingAway)).ticket
    await one.closed()
    assert ticket is not None
    return ticket


# -------------------------------------------------------------------------------------------------------- tickets

Ending = Callable[[World, httpx.AsyncClient, LoggedIn], Coroutine[Any, Any, object]]


async def revoked(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:
    answer = await http.delete(f"{world.workers[1].url}/v1/auth/sessions", headers=bearer(ada.token))
    assert answer.status_code == 204


async def left(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:
    answer = await http.post(
        f"{world.workers[1].url}/v1/auth/delete", headers=bearer(ada.token), json={"password": ADA["password"]}
    )
    assert answer.status_code == 204


NEW = "a longer horse"


async def changed(http: httpx.AsyncClient, token: str, old: str = ADA["password"], new: str = NEW) -> httpx.Response:
    return await http.post(
        "/v1/auth/password", headers=bearer(token), json={"password": old, "new_password": new}, timeout=30
    )


async def changed_elsewhere(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:  # noqa: ARG001
    token = (await http.post("/v1/auth/login", json=LOGIN)).json()["token"]
    http.cookies.clear()
    assert (await changed(http, token)).status_code == 204


async def expired(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:  # noqa: ARG001
    await world.db.execute("UPDATE session SET expires_at = now() - interval '1 second'")


def commanded(*arguments: str) -> Ending:
    async def ending(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:  # noqa: ARG001
        await administer(world, *arguments)

    return ending


ENDINGS: dict[str, Ending] = {
    "revoked": revoked,
    "deleted by its user": left,
    "expired": expired,
    "disabled": commanded("user", "disable", ADA["email"]),
    "password changed elsewhere": changed_elsewhere,
    "password reset": commanded("user", "reset-password", ADA["email"]),
    "revoked by an administrator": commanded("user", "sessions", ADA["email"], "--revoke"),
    "erased": commanded("erase", ADA["email"], "--yes"),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_ticket_of_an_ended_session_is_refused(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, ending: Ending
) -> None:
    ticket = await ticket_of(world, ada.token)
    await ending(world, http, ada)
    with pytest.raises(InvalidStatus, match="401"):
        await Client(world.workers[1].url, ticket).open()


async def test_refused_request_does_not_use_up_a_ticket_or_invite_code(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    ticket = await ticket_of(world, ada.token)
    connects = world.workers[1].app._connects  # noqa: SLF001
    connects.charge(ada.id, 1_000_000)
    for _ in range(2):
        with pytest.raises(InvalidStatus, match="429"):
            await Client(world.workers[1].url, ticket).open()
    connects._full_at.clear()  # noqa: SLF001
    async with Client(world.workers[1].url, ticket) as back:
        await back.settled()
        # The use of an invite code is rolled back with the transaction of a refused frame.
        group = await world.channel(back, max_participants=1)
        lasts = client.SetInviteCode(conversation_id=group, max_uses=1)
        invite = (await back.call(lasts, server.OneConversation)).view.invite
        assert invite is not None
        other = await world.connect(charles, 1)
        join = client.Join(invite_code=invite.code)
        with refused(ErrorCode.CONFLICT, "invite_code"):
            await other.call(join)
        await back.call(client.UpdateConversation(conversation_id=group, max_participants=2))
        await other.call(join)
    with pytest.raises(InvalidStatus, match="401"):
        await Client(world.workers[1].url, ticket).open()


@pytest.mark.parametrize(
    "call",
    [
        ("GET", "/v1/auth/export", None),
        ("GET", "/v1/auth/sessions", None),
        ("DELETE", "/v1/auth/sessions", None),
        ("POST", "/v1/auth/logout", None),
        ("POST", "/v1/auth/delete", {"password": ADA["password"]}),
        ("POST", "/v1/auth/password", {"password": ADA["password"], "new_password": "a longer horse"}),
        ("POST", "/v1/call", {"type": "get_me"}),
    ],
)
async def test_ticket_is_refused_over_http_and_stays_valid_for_the_socket(
    world: World, http: httpx.AsyncClient, call: tuple[str, str, dict[str, str] | None]
) -> None:
    method, path, body = call
    ada = await registered(http)
    ticket = await ticket_of(world, ada.token)
    answer = await http.request(method, f"{world.workers[1].url}{path}", headers=bearer(ticket), json=body)
    error = answer.json()
    # On an error that asks to log in again, a client would log its user out.
    assert (answer.status_code, error["code"], error["path"]) == (401, "unauthenticated", "ticket")
    assert "Log in" not in error["message"]
    back = await world.connect(UserSession(ada.user.id, "Ada", ticket), 1)
    assert back.ready.session_id == ada.session_id


async def test_export_stops_when_its_session_ends(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:
    one = await world.connect(UserSession(ada.user.id, "Ada", ada.token), 1)
    about = await world.channel(one)
    await world.db.execute("""
        INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT $1, $2, repeat('x', 9000), 1000 + n, 1000 + n FROM generate_series(1, 2000) n
    """, about, ada.user.id)  # fmt: skip
    read = bytearray()
    async with http.stream("GET", f"{world.workers[1].url}/v1/auth/export", headers=bearer(ada.token)) as answer:
        pieces = answer.aiter_bytes()
        read += await anext(pieces)
        await revoked(world, http, ada)
        async for piece in pieces:
            read += piece
    assert not read.endswith(b"]}\n")


async def test_revoked_session_is_not_restored_by_an_extension(world: World, ada: LoggedIn) -> None:
    await world.db.execute("DELETE FROM session")
    await world.workers[0].app.sessions._slide([ada.session_id])  # noqa: SLF001
    assert await world.db.fetchval("SELECT count(*) FROM session") == 0


# ------------------------------------------------------------------------------------- passwords and new sessions


@pytest.mark.usefixtures("ada")
async def test_no_session_of_the_old_password_survives_its_reset(world: World, http: httpx.AsyncClient) -> None:
    """A login in flight during the reset is refused, or gets a session that the reset ends."""
    outlived = 0
    refusals = 0
    password = ADA["password"]
    for _ in range(8):
        login = asyncio.create_task(http.post("/v1/auth/login", json=LOGIN | {"password": password}))
        # Both hash a password, so they commit at about the same time.
        reset = await administer(world, "user", "reset-password", ADA["email"])
        answer = await login
        http.cookies.clear()
        refusals += answer.status_code == 401
        if answer.status_code == 200:
            token = answer.json()["token"]
            outlived += (await http.get("/v1/auth/sessions", headers=bearer(token))).status_code == 200
        assert isinstance(reset, dict)
        password = reset["password"]
        assert (await http.post("/v1/auth/login", json=LOGIN | {"password": password})).status_code == 200
    assert outlived == 0


@pytest.mark.parametrize("command", ["reset-password", "disable", "erase"])
async def test_login_checked_before_a_reset_disable_or_erase_gets_no_session_afterwards(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The check of the password is delayed until the command is done."""
    checked, may_go_on = asyncio.Event(), asyncio.Event()
    matches = passwords.matches

    async def held(password: str, password_hash: str | None) -> bool:
        is_right = await matches(password, password_hash)
        if not checked.is_set():
            checked.set()
            await may_go_on.wait()
        return is_right

    monkeypatch.setattr(passwords, "matches", held)
    login = asyncio.create_task(http.post("/v1/auth/login", json=LOGIN))
    await checked.wait()
    await administer(
        world, *(("erase", ADA["email"], "--yes") if command == "erase" else ("user", command, ADA["email"]))
    )
    may_go_on.set()
    answer = await login
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert await world.db.fetchval("SELECT count(*) FROM session WHERE user_id = $1", ada.user.id) == 0


async def test_login_waits_for_an_uncommitted_reset_and_is_refused(
    world: World, http: httpx.AsyncClient, ada: LoggedIn
) -> None:
    """Without the lock of the user, the login would see the old hash, and the reset would miss the new session."""
    async with world.db.transaction():
        await world.db.execute('SELECT FROM "user" WHERE id = $1 FOR NO KEY UPDATE', ada.user.id)
        await world.db.execute("UPDATE account SET password = 'reset meanwhile' WHERE user_id = $1", ada.user.id)
        await world.db.execute("DELETE FROM session WHERE user_id = $1", ada.user.id)
        login = asyncio.create_task(http.post("/v1/auth/login", json=LOGIN))
        waits = asyncio.create_task(waiting(world, 1))
        await asyncio.wait([login, waits], return_when=asyncio.FIRST_COMPLETED)
        waits.cancel()
    assert (await login).status_code == 401
    assert await world.db.fetchval("SELECT count(*) FROM session WHERE user_id = $1", ada.user.id) == 0


async def test_login_during_deactivation_leaves_no_session_of_an_inactive_user(
    world: World, http: httpx.AsyncClient, ada: LoggedIn
) -> None:
    token = ada.token
    dead = 0
    answers: Counter[int] = Counter()
    for _ in range(12):
        leaving = http.post("/v1/auth/deactivate", headers=bearer(token), json={"password": ADA["password"]})
        login = http.post(f"{world.workers[1].url}/v1/auth/login", json=LOGIN)
        left, answer = await asyncio.gather(leaving, login)
        http.cookies.clear()
        answers[answer.status_code] += 1
        assert left.status_code == 204
        if answer.status_code == 200:
            token = answer.json()["token"]
            state = (await http.get("/v1/auth/sessions", headers=bearer(token))).status_code
            is_active = await world.db.fetchval('SELECT is_active FROM "user"')
            # The deactivation may end the new session, but an inactive user must not have one.
            dead += not is_active and await world.db.fetchval("SELECT count(*) FROM session") > 0
            if state == 200:
                continue
        token = (await http.post("/v1/auth/login", json=LOGIN)).json()["token"]
        http.cookies.clear()
    assert dead == 0, answers


async def test_rehash_does_not_overwrite_a_concurrent_reset(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passwords, "is_outdated", lambda _: True)
    hashed = passwords.hashed
    reset: list[str] = []

    async def reset_meanwhile(password: str) -> str:
        if not reset:
            reset.append("reset")
            await world.db.execute("UPDATE account SET password = 'reset meanwhile' WHERE user_id = $1", ada.user.id)
        return await hashed(password)

    monkeypatch.setattr(passwords, "hashed", reset_meanwhile)
    assert (await http.post("/v1/auth/login", json=LOGIN)).status_code == 401
    assert await world.db.fetchval("SELECT password FROM account") == "reset meanwhile"


async def test_outdated_hash_is_replaced_and_concurrent_logins_succeed(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await world.db.fetchval("SELECT password FROM account WHERE user_id = $1", ada.user.id)
    monkeypatch.setattr(passwords, "is_outdated", before.__eq__)
    answers = await asyncio.gather(*(http.post("/v1/auth/login", json=LOGIN) for _ in range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert await world.db.fetchval("SELECT password FROM account WHERE user_id = $1", ada.user.id) != before


async def test_failed_registration_leaves_no_user(world: World, http: httpx.AsyncClient) -> None:
    await world.db.execute("ALTER TABLE session ADD CONSTRAINT full_house CHECK (false)")
    answer = await http.post("/v1/auth/register", json=ADA)
    assert answer.status_code == 500
    assert await world.db.fetchval('SELECT count(*) FROM "user"') == 0


BODIES: dict[str, dict[str, str]] = {
    "/v1/call": {"type": "get_me"},
    "/v1/auth/password": {"password": ADA["password"], "new_password": "a stolen horse"},
    "/v1/auth/deactivate": {"password": ADA["password"]},
    "/v1/auth/delete": {"password": ADA["password"]},
}


@pytest.mark.parametrize("ending", [revoked, ENDINGS["password changed elsewhere"]], ids=["revoked", "changed"])
async def test_request_whose_session_ends_while_its_body_arrives_is_refused(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, ending: Ending
) -> None:
    host, _, port = world.url.removeprefix("http://").rpartition(":")
    waiting = []
    for path, body in BODIES.items():
        reader, writer = await asyncio.open_connection(host, int(port))
        data = msgspec.json.encode(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nAuthorization: Bearer {ada.token}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data[:-1])
        await writer.drain()
        waiting.append((path, reader, writer, data[-1:]))
    await ending(world, http, ada)
    for path, reader, writer, last in waiting:
        writer.write(last)
        assert (await reader.read()).startswith(b"HTTP/1.1 401"), path
        writer.close()
    assert await world.db.fetchval('SELECT bool_and(is_active AND NOT is_deleted) FROM "user"')


# --------------------------------------------------------------------------------------------- change of password


async def test_password_change_ends_all_other_sessions(world: World, http: httpx.AsyncClient, ada: LoggedIn) -> None:
    other = (await http.post("/v1/auth/login", json=LOGIN)).json()["token"]
    http.cookies.clear()
    here = await world.connect(UserSession(ada.user.id, "Ada", ada.token), 0)
    there = await world.connect(UserSession(ada.user.id, "Ada", other), 1)
    for wrong in ({"old": "wrong horse"}, {"new": "short"}, {"new": "x" * 2000}):
        answer = await changed(http, ada.token, **wrong)
        assert answer.status_code == (403 if "old" in wrong else 422)
        assert answer.json()["path"] == ("password" if "old" in wrong else "new_password")
    assert (await http.post("/v1/auth/login", json=LOGIN | {"password": NEW})).status_code == 401
    assert (await changed(http, "no token")).status_code == 401
    assert (await changed(http, ada.token)).status_code == 204
    assert await there.closed() == CloseCode.SESSION_ENDED
    await here.call(client.Ping())
    assert (await http.get("/v1/auth/sessions", headers=bearer(other))).status_code == 401
    (mine,) = (await http.get("/v1/auth/sessions", headers=bearer(ada.token))).json()["sessions"]
    assert mine["is_current"]
    assert (await http.post("/v1/auth/login", json=LOGIN)).status_code == 401
    assert (await http.post("/v1/auth/login", json=LOGIN | {"password": NEW})).status_code == 200


async def test_one_of_two_concurrent_password_changes_succeeds(
    world: World, http: httpx.AsyncClient, ada: LoggedIn
) -> None:
    tokens = [ada.token, (await http.post("/v1/auth/login", json=LOGIN)).json()["token"]]
    http.cookies.clear()
    url = world.workers[1].url
    async with httpx.AsyncClient(base_url=url, trust_env=False) as elsewhere:
        answers = await asyncio.gather(
            changed(http, tokens[0], new="the first horse"), changed(elsewhere, tokens[1], new="the second horse")
        )
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) in ([204, 401], [204, 403])
    holds = ["the first horse", "the second horse"][codes.index(204)]
    for password in ("the first horse", "the second horse"):
        answer = await http.post("/v1/auth/login", json=LOGIN | {"password": password})
        assert answer.status_code == (200 if password == holds else 401)


@pytest.mark.parametrize("ending", [revoked, expired, ENDINGS["disabled"], ENDINGS["password reset"]])
async def test_password_change_is_refused_if_its_session_or_password_ends_meanwhile(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = passwords.hashed

    async def ended_meanwhile(password: str) -> str:
        monkeypatch.setattr(passwords, "hashed", hashed)
        await ending(world, http, ada)
        return await hashed(password)

    monkeypatch.setattr(passwords, "hashed", ended_meanwhile)
    assert (await changed(http, ada.token)).status_code == 401
    assert (await http.post("/v1/auth/login", json=LOGIN | {"password": NEW})).status_code == 401


async def test_concurrent_rehash_does_not_fail_a_request_with_a_password(
    world: World, http: httpx.AsyncClient, ada: LoggedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login replaces a hash with outdated parameters. The password stays valid."""
    matches = passwords.matches

    async def matches_and_is_replaced(password: str, checked: str | None) -> bool:
        monkeypatch.setattr(passwords, "matches", matches)
        is_right = await matches(password, checked)
        await accounts.give_password(world.db, ada.user.id, await passwords.hashed(password))
        return is_right

    monkeypatch.setattr(passwords, "matches", matches_and_is_replaced)
    assert (await changed(http, ada.token)).status_code == 204
    for path in ("deactivate", "delete"):
        token = (await http.post("/v1/auth/login", json=LOGIN | {"password": NEW})).json()["token"]
        http.cookies.clear()
        monkeypatch.setattr(passwords, "matches", matches_and_is_replaced)
        answer = await http.post(f"/v1/auth/{path}", headers=bearer(token), json={"password": NEW})
        assert answer.status_code == 204


async def test_with_closed_registration_only_the_operator_creates_accounts(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, registration="closed", login_attempts_per_address=3)
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        for body in (ADA, {}):
            answer = await http.post("/v1/auth/register", json=body)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert await world.db.fetchval('SELECT count(*) FROM "user"') == 0
        made = await administer(world, "user", "create", "Ada", ADA["email"])
        assert isinstance(made, dict)
        assert (await http.post("/v1/auth/login", json=LOGIN | {"password": made["password"]})).status_code == 200
        assert (await http.post("/v1/auth/register", json=ADA)).status_code == 429


# ------------------------------------------------------------------------------------------------------- attempts


async def guess_concurrently(urls: list[str], count: int, last: str = "wrong horse") -> Counter[int]:
    """Log in `count` times concurrently, with `last` as the last password. Return the counts of statuses."""
    async with httpx.AsyncClient(trust_env=False, timeout=30, limits=httpx.Limits(max_connections=None)) as http:
        passwords = ["wrong horse"] * (count - 1) + [last]
        answers = await asyncio.gather(
            *(
                http.post(f"{urls[number % len(urls)]}/v1/auth/login", json=LOGIN | {"password": password})
                for number, password in enumerate(passwords)
            )
        )
    return Counter(answer.status_code for answer in answers)


async def test_ten_of_many_concurrent_guesses_are_checked(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, login_attempts_per_address=10_000)
    async with World(settings) as world:
        async with http_client(world.url, timeout=30) as http:
            await registered(http)
        urls = [worker.url for worker in world.workers]
        assert await guess_concurrently(urls, 60) == {401: settings.login_attempts, 429: 60 - settings.login_attempts}
        assert await guess_concurrently(urls[:1], 1, last=ADA["password"]) == {429: 1}


def without_redis(per_account: int) -> Attempts:
    """Return counters without a reachable Redis."""
    redis = Redis(unix_socket_path="/nowhere", retry=Retry(NoBackoff(), 0))
    return Attempts(redis, "one", per_account=per_account, per_address=100)


async def test_ten_of_many_concurrent_guesses_are_checked_without_redis() -> None:
    attempts = without_redis(10)
    tried = 0

    async def guess() -> ErrorCode:
        nonlocal tried
        try:
            async with attempts.at_account("ada@example.org"):
                tried += 1
                await asyncio.sleep(0)
                raise Refused(ErrorCode.UNAUTHENTICATED, "Wrong")
        except Refused as refused:
            return refused.code

    codes = Counter(await asyncio.gather(*(guess() for _ in range(80))))
    assert (tried, codes) == (10, {ErrorCode.UNAUTHENTICATED: 10, ErrorCode.RATE_LIMITED: 70})


async def test_attempt_that_fails_with_another_error_is_not_counted() -> None:
    attempts = without_redis(1)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            async with attempts.at_account("ada@example.org"):
                raise ConnectionError
    async with attempts.at_account("ada@example.org"):
        pass


async def test_attempts_are_counted_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.auth.attempts.MAX_COUNTED_HERE", 50)
    attempts = without_redis(1)
    for number in range(200):
        await attempts.of_address(f"address {number}")
    assert len(attempts._here) <= 50  # noqa: SLF001


async def test_passwords_waiting_to_be_hashed_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "MAX_WAITING", 4)
    answers = await asyncio.gather(*(passwords.hashed("correct horse") for _ in range(20)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    assert len(refused) == 16
    assert {(one.code, one.retry_after_ms) for one in refused} == {(ErrorCode.UNAVAILABLE, passwords.RETRY_AFTER_MS)}
    assert await passwords.matches("correct horse", str(answers[0]))


@pytest.mark.usefixtures("ada")
async def test_concurrent_logins_of_the_account_owner_succeed(world: World, http: httpx.AsyncClient) -> None:
    urls = [worker.url for worker in world.workers]
    answers = await asyncio.gather(*(http.post(f"{urls[n % 2]}/v1/auth/login", json=LOGIN) for n in range(20)))
    assert Counter(answer.status_code for answer in answers) == {200: 20}


async def test_concurrent_guesses_with_a_session_are_counted_before_checking(
    world: World, http: httpx.AsyncClient, ada: LoggedIn
) -> None:
    """A stolen session must not help to guess the password by deactivating the account."""
    wrong = {"password": "wrong horse"}
    bodies = {"deactivate": wrong, "delete": wrong, "password": wrong | {"new_password": NEW}}
    asked = [(f"{worker.url}/v1/auth/{what}", body) for worker in world.workers for what, body in bodies.items()]
    answers = await asyncio.gather(
        *(http.post(path, headers=bearer(ada.token), json=body) for path, body in (asked * 7)[:40])
    )
    assert Counter(answer.status_code for answer in answers) == {403: 10, 429: 30}
    # Logins share the counter of the account.
    assert await guess_concurrently([worker.url for worker in world.workers], 2) == {429: 2}


async def test_concurrent_registrations_from_an_address_are_counted_before_hashing(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, login_attempts_per_address=5)
    async with World(settings, workers=1) as world, http_client(world.url) as http:
        answers = await asyncio.gather(
            *(http.post("/v1/auth/register", json=ADA | {"email": f"{n}@example.org"}) for n in range(20))
        )
        assert Counter(answer.status_code for answer in answers) == {201: 5, 429: 15}
