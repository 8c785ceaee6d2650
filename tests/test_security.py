"""Promises of SECURITY.md that other files do not test."""

import ast
import logging
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import pytest
from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import default_settings
from websockets.exceptions import InvalidStatus

from protocol import client
from protocol.client import Frame
from protocol.codec import now
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, ReportId, UserId, uuid7
from protocol.payloads import Poll
from protocol.server import Error
from prove.client import Client
from prove.writes import PUSH_POINT
from server.core.config import Settings
from server.describe import DOCUMENTS
from server.describe.handbook import is_for_participants
from server.routes import ROUTES
from tests.trees import parsed
from tests.world import UserSession, World, http_client, message, sent

ROOT = Path(__file__).parent.parent
CODE = ("server", "protocol", "prove", "loadtest", "benchmarks")
ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


# ----------------------------------------------------------------------------------------------- authorization

OK, NO, NOTHING = None, ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND
IN, OUT = ("owner", "admin", "moderator", "member", "guest"), ("left", "removed", "banned", "outsider")
LEAST: dict[type[Frame], str | None] = {
    client.GetConversation: "guest",
    client.UpdateConversation: "admin",
    client.Leave: "guest",
    client.AddParticipants: "admin",
    client.RemoveParticipant: "admin",
    client.SetRole: "admin",
    client.SetPreferences: "guest",
    client.Invite: "admin",
    client.SetInviteCode: "admin",
    client.Unban: "admin",
    client.SetPermissions: "admin",
    client.TransferOwnership: "owner",
    client.Moderate: "moderator",
    client.Unmoderate: "moderator",
    client.ReportMessage: "guest",
    client.ListReports: "moderator",
    client.ListAudit: "admin",
    client.ListParticipants: "guest",
    client.Send: "guest",
    client.Edit: None,  # only its sender
    client.Forward: "guest",
    client.Pin: "moderator",
    client.Unpin: "moderator",
    client.ListPins: "guest",
    client.Star: "guest",
    client.Vote: "guest",
    client.ListVotes: "guest",
    client.ClosePoll: "moderator",
    client.Why: "moderator",
    client.GetThread: "guest",
    client.ListReplies: "guest",
    client.FollowThread: "guest",
    client.UnfollowThread: "guest",
    client.ReadThread: "guest",
    client.Delivered: "guest",
    client.MarkUnread: "guest",
    client.ListReaders: "guest",
    client.SetDraft: "guest",
    client.Schedule: "guest",
    client.CancelScheduled: "guest",
    client.React: "guest",
    client.Unreact: "guest",
    client.Read: "guest",
    client.History: "guest",
    client.GetMessage: "guest",
    client.ListEdits: "guest",
    client.Typing: "guest",
    client.Delete: "moderator",
    client.DismissReport: "moderator",
    client.DeleteConversation: "owner",
}
"""The lowest role for each frame about another user's message, or about a participant of the lowest role."""


def test_table_of_roles_has_every_frame() -> None:
    assert LEAST.keys() == set(filter(is_for_participants, ROUTES))


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Two workers with the default of OPENCHAT_ADD_PEOPLE."""
    async with World(msgspec.structs.replace(settings, add_people=Settings().add_people)) as world:
        yield world


@pytest.mark.parametrize("role", [*IN, *OUT])
async def test_every_frame_is_tried_in_every_role(world: World, role: str) -> None:
    ada, charles, mary, grace = await world.users("Ada", "Charles", "Mary", "Grace")
    await world.befriend(ada, mary)
    owner = await world.connect(ada)
    channel = await world.channel(owner, is_public=True)
    for one in (charles, mary, grace):
        await (await world.connect(one)).call(client.Join(conversation_id=channel))
    poll = Poll(options=["Yes", "No"])
    said = await sent(await world.connect(grace, 1), channel, "Grace's", payload=poll)
    actor = owner if role == "owner" else await world.connect(charles, 1)
    await become(world, owner, channel, charles, role)
    for kind, least in LEAST.items():
        await world.db.execute("UPDATE conversation_participant SET role = 'guest' WHERE user_id = $1", mary.id)
        answer = await actor.ask(frame(kind, channel, said, mary.id))
        code = answer.code if isinstance(answer, Error) else None
        if role in OUT:
            assert code is NOTHING, kind
        else:
            is_allowed = least is not None and IN.index(role) <= IN.index(least)
            is_not_there = kind in {client.DismissReport, client.CancelScheduled} and is_allowed
            assert code is (NOTHING if is_not_there else OK if is_allowed else NO), (kind, answer)
        if kind is client.TransferOwnership and code is None:
            await world.db.execute(
                "UPDATE conversation_participant SET role = CASE user_id WHEN $1 THEN 'guest' ELSE 'owner' END"
                " WHERE user_id = $1 OR role = 'admin'", mary.id,
            )  # fmt: skip
        if kind is client.Leave and code is None:
            await world.db.execute(
                "UPDATE conversation_participant SET status = 'active', role = $2 WHERE user_id = $1",
                actor.ready.user.id, role,
            )  # fmt: skip
        if kind is client.RemoveParticipant and code is None:
            await owner.call(client.AddParticipants(conversation_id=channel, participants=[mary.id]))


async def become(world: World, owner: Client, channel: ConversationId, who: UserSession, role: str) -> None:
    """Give a user a role, or put them outside in one of the possible ways."""
    if role in {"admin", "moderator", "member", "guest"}:
        frame = client.SetRole(conversation_id=channel, user_id=who.id, role=role)  # type: ignore[arg-type]
        await owner.call(frame)
    elif role == "left":
        await (await world.connect(who)).call(client.Leave(conversation_id=channel))
    elif role in {"removed", "banned"}:
        await owner.call(client.RemoveParticipant(conversation_id=channel, user_id=who.id, ban=role == "banned"))
    elif role == "outsider":
        await world.db.execute("DELETE FROM conversation_participant WHERE user_id = $1", who.id)


def frame(kind: type[Frame], about: ConversationId, said: MessageId, other: UserId) -> Frame:
    """Return a frame of a type about a conversation, a message of another user, and a participant."""
    fields: dict[str, Any] = {
        "conversation_id": about, "message_id": said, "user_id": other, "participants": [other], "content": "Words",
        "emoji": "👍", "role": "guest", "title": "A title", "reason": "Rude", "can_pin_messages": True,
        "is_muted": True, "to_conversation_id": about, "new_message_id": uuid7(), "options": [0], "thread_order": 1,
        "send_at": now() + timedelta(days=1),
    }  # fmt: skip
    if kind is client.Send:
        return message(about)
    if kind is client.DismissReport:
        return client.DismissReport(conversation_id=about, report_id=ReportId(said))
    if kind is client.Schedule:
        fields["message_id"] = uuid7()
    wanted = {name: fields[name] for name in kind.__struct_fields__ if name in fields}
    if kind is client.AddParticipants:
        wanted["role"] = "member"
    return kind(**wanted)


# ------------------------------------------------------------------------------------------------- over HTTP


async def test_answers_have_security_headers(world: World) -> None:
    async with http_client(world.url) as http:
        for path in ("/healthz", "/nowhere", "/v1/auth/sessions"):
            headers = (await http.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
            assert headers["referrer-policy"] == "no-referrer"
            assert "server" not in headers


async def test_cookie_is_inaccessible_to_scripts_and_other_sites(world: World) -> None:
    async with http_client(world.url) as http:
        cookie = (await http.post("/v1/auth/register", json=ADA)).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "path=/" in cookie
    assert f"max-age={400 * 86_400};" in cookie, "a session in use outlasts its first OPENCHAT_SESSION_DAYS"


BEHIND_TLS = {"X-Forwarded-For": "198.51.100.1", "X-Forwarded-Proto": "https"}


HOST_COOKIE = "__Host-openchat_session"
"""A prefix with which browsers accept the cookie only from this host and over TLS (RFC 6265bis)."""


async def test_cookie_behind_tls_is_bound_to_this_host(settings: Settings) -> None:
    async with (
        World(msgspec.structs.replace(settings, trusted_proxies="1"), workers=1) as world,
        http_client(world.url) as http,
    ):
        ada, eve = await world.users("Ada", "Eve")

        async def seen(cookie: str, **headers: str) -> object:
            answer = await http.get("/v1/auth/sessions", headers={"Cookie": cookie} | headers)
            return answer.json().get("code") or [one["user_agent"] for one in answer.json()["sessions"]]

        made = await http.post("/v1/auth/register", json=ADA, headers=BEHIND_TLS | {"User-Agent": "hers"})
        name, _, rest = made.headers["set-cookie"].partition("=")
        token, *attributes = rest.lower().split("; ")
        assert (name, token) == (HOST_COOKIE, made.json()["token"].lower())
        assert {"secure", "path=/", "httponly", "samesite=lax"} <= set(attributes)
        assert not [one for one in attributes if one.startswith("domain")]
        token = made.json()["token"]
        http.cookies.clear()
        # A page on a sibling subdomain has set a cookie that it knows.
        for planted in (
            f"openchat_session={eve.token}",
            f"openchat_session={token}",
            f"__host-openchat_session={token}",
        ):
            assert await seen(planted, **BEHIND_TLS) == "unauthenticated", planted
            assert await seen(f"{planted}; {HOST_COOKIE}={token}", **BEHIND_TLS) == ["hers"]
        # Without TLS, the name has no prefix.
        assert await seen(f"{HOST_COOKIE}={token}") == "unauthenticated"
        assert await seen(f"openchat_session={token}; {HOST_COOKIE}={ada.token}") == ["hers"]
        # The answer that deletes the cookie has the attributes that a browser requires.
        page = {"Origin": world.url.replace("http:", "https:"), "Cookie": f"{HOST_COOKIE}={token}"}
        gone = (await http.post("/v1/auth/logout", headers=BEHIND_TLS | page)).headers["set-cookie"].lower()
        assert gone.startswith(f'{HOST_COOKIE.lower()}="";')
        assert {"secure", "path=/", "max-age=0"} <= set(gone.split("; "))


async def test_two_different_session_cookies_are_refused(world: World) -> None:
    """Browsers send the one with the longer path first, then the older one, and send no attributes."""
    ada, eve = await world.users("Ada", "Eve")
    one, other = (f"openchat_session={who.token}" for who in (ada, eve))
    async with http_client(world.url) as http:
        for lines in ([f"{one}; {other}"], [f"{other};{one}"], [one, other], [f"{one}; a=b; openchat_session="]):
            answer = await http.get("/v1/auth/sessions", headers=[("Cookie", line) for line in lines])
            assert (answer.status_code, answer.json()["path"]) == (401, "cookie"), lines
        for lines in ([one], [f"{one}; {one}"], [f"a=b; {one}", "c"]):
            answer = await http.get("/v1/auth/sessions", headers=[("Cookie", line) for line in lines])
            assert answer.status_code == 200, lines
        both = [("Cookie", f"{one}; {other}"), ("Authorization", f"Bearer {ada.token}")]
        assert (await http.get("/v1/auth/sessions", headers=both)).status_code == 200
    with pytest.raises(InvalidStatus) as refused:
        await Client(world.url, None, headers={"Cookie": f"{one}; {other}"}, origin=world.url).open()
    assert refused.value.response.status_code == 401


async def test_login_always_creates_a_new_session(world: World) -> None:
    async with http_client(world.url) as http:
        await http.post("/v1/auth/register", json=ADA)
        planted = http.cookies["openchat_session"]
        login = {key: ADA[key] for key in ("email", "password")}
        token = (await http.post("/v1/auth/login", json=login)).json()["token"]
        assert token != planted
        http.cookies.set("openchat_session", "planted-by-somebody-else")
        assert (await http.post("/v1/auth/login", json=login)).json()["token"] not in {planted, token}


async def test_path_traversal_is_not_possible(world: World) -> None:
    async with http_client(world.url) as http:
        for path in ("/../schema.sql", "/%2e%2e/%2e%2e/etc/passwd", "/v1/..%2f..%2fetc/passwd", "//etc/passwd"):
            assert (await http.get(path)).status_code == HTTPStatus.NOT_FOUND


async def test_tokens_and_passwords_are_never_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)  # as in server/core/log.py
    async with http_client(world.url) as http:
        token = (await http.post("/v1/auth/register", json=ADA)).json()["token"]
        await http.post("/v1/auth/login", json={"email": ADA["email"], "password": "wrong horse"})
        await http.post("/v1/auth/login", content=b'{"password": "broken horse"')
    async with Client(world.url, token) as one:
        await one.raw(msgspec.json.encode({"type": "authenticate", "token": token}).decode())
    ours = [record for record in caplog.records if not record.name.startswith(("websockets", "httpx", "httpcore"))]
    said = "\n".join(record.getMessage() for record in ours)
    for secret in (token, ADA["password"], "wrong horse", "broken horse"):
        assert secret not in said


# ------------------------------------------------------------------------------------------------- the source code


def test_statements_are_constants_and_values_are_parameters() -> None:
    """Each statement is a constant in capitals, or a literal without interpolation."""
    found = []
    for path in sources("server"):
        for node in ast.walk(parsed(path)):
            is_query = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"execute", "executemany", "fetch", "fetchrow", "fetchval", "prepare"}
                and node.args
            )
            if not is_query:
                continue
            assert isinstance(node, ast.Call)
            statement = node.args[0]
            is_constant = isinstance(statement, ast.Name) and statement.id.isupper()
            is_literal = isinstance(statement, ast.Constant) and isinstance(statement.value, str)
            if not (is_constant or is_literal):
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(statement)}")
    assert set(found) == KNOWN_STATEMENTS


KNOWN_STATEMENTS = {
    "server/db/migrate.py: (ROOT / 'schema.sql').read_text()",
    "server/db/database.py: begin(self._lock_ms)",
    "server/db/migrate.py: text",
    "server/db/migrate.py: f'DROP INDEX CONCURRENTLY {index}'",
    "server/db/migrate.py: statement[0]",
    "server/db/migrate.py: ALIKE.format(table=table, key=key, where=statement['where'] or '')",
    "server/processes/embedded/postgres.py: f'CREATE DATABASE {NAME}'",
    "server/describe/columns.py: f'DROP FUNCTION pg_temp.{name}'",
    "server/describe/columns.py: COPY.format(name=name, arguments=every, body=statement)",
    "server/describe/columns.py: text",
    "server/queries/messages.py: query",
    "server/queries/checks.py: check.FINDS",
}
"""Statements from our own files, constants, items of a list, and statements of `make docs` on its own database."""


def test_server_sends_http_requests_in_one_module() -> None:
    """The module does not connect to private addresses, see tests/test_outbound.py."""
    for path in sources("server"):
        if path.name == "safe_http.py":
            continue
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [
                name for name in names if re.match(r"(httpx|aiohttp|requests|urllib\.request|http\.client)", name)
            ]


EXAMPLES = {"correct horse", PUSH_POINT}
WORDS = re.compile(r"[a-z_]+( [a-z_]+)*")
"""Passwords that tests use. A real one would look different."""


@pytest.mark.more
def test_code_contains_no_secrets() -> None:
    found = SecretsCollection(root=str(ROOT))
    files = sources(*CODE, "tests")
    files += [
        path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".yaml", ".sql"} or path.name == "Dockerfile"
    ]
    files += [
        path
        for folder in ("docs", "deploy", "migrations")
        for path in (ROOT / folder).rglob("*.*")
        if path.name not in DOCUMENTS  # from code, which is checked itself
    ]
    with default_settings():
        for path in files:
            found.scan_file(str(path.relative_to(ROOT)))
    assert not [
        (file, secret.line_number)
        for file, secret in found
        if (value := secret.secret_value or "") not in EXAMPLES
        and not (file.startswith("tests/") and WORDS.fullmatch(value))
    ]
