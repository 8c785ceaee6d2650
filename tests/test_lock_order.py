"""All writes lock rows in one order (server/queries/__init__.py), so that transactions do not deadlock.

Handlers run as `Dispatch` runs them, on the same few rows, on several connections of the same users. The server
retries deadlocks, which hides them, so the tests read PostgreSQL's own count.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest
from argon2 import PasswordHasher

from protocol import client
from protocol.codec import now
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, MessageId, ReportId, SessionId, UserId, uuid7
from protocol.payloads import Poll
from protocol.server import OneConversation
from protocol.values import User
from prove.writes import PUSH_POINT
from server.app.app import App
from server.auth import passwords
from server.auth.tokens import new_token, token_hash
from server.context import Context
from server.core.config import Settings
from server.db.database import Db
from server.fairness.lock_queue import until_free
from server.gateway.dispatch import Rate
from server.queries import accounts, presence, sessions
from server.queries.presence import Transition
from server.routes import ROUTES
from tests.test_credentials import administer
from tests.world import World, all_sent, http_client, message

Act = Callable[[], Coroutine[Any, Any, object]]

PASSWORD = "correct horse"
CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
DELETE = "delete the group"
NOT_NOW = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL})


class ConflictingWrites:
    """Ada and Charles, who share a group and a direct conversation, and all writes that can affect them."""

    def __init__(self, world: World, http: httpx.AsyncClient) -> None:
        self.world, self.http = world, http
        self.group: ConversationId
        self.direct: ConversationId
        self.ada: UserId
        self.charles: UserId
        self._said: list[MessageId] = []
        self._poll: MessageId
        self._root: MessageId

    async def begin(self) -> None:
        ada, charles = await self.world.users("Ada", "Charles")
        self.ada, self.charles = ada.id, charles.id
        await self.world.db.execute("UPDATE account SET password = $1", CHEAP.hash(PASSWORD))
        self.sessions = {row[1]: row[0] for row in await self.world.db.fetch("SELECT id, user_id FROM session")}
        self.email = await self.world.db.fetchval('SELECT email FROM "user" WHERE id = $1', self.charles)
        made = await self.run(self.ada, client.CreateDirect(user_id=self.charles))
        assert isinstance(made, OneConversation)
        self.direct = made.view.conversation.id
        await self.fill_group()

    async def fill_group(self) -> None:
        """Make a group for all later writes. Both have a draft, a star and a thread in which they replied."""
        group = ConversationId(uuid7())
        await self.run(self.ada, client.CreateGroup(conversation_id=group, title="Engines", is_public=True,
                                                       participants=[]))  # fmt: skip
        await self.run(self.charles, client.Join(conversation_id=group))
        said = [message(group), message(group), message(group, payload=Poll(options=["Yes", "No"])), message(group)]
        for frame in said:
            await self.run(self.ada, frame)
        ids = [frame.message_id for frame in said]
        for who in (self.ada, self.charles):
            await self.run(who, message(group, parent_message_id=ids[0]))
            await self.run(who, client.SetDraft(conversation_id=group, content="I thi"))
            await self.run(who, client.Star(conversation_id=group, message_id=ids[1]))
        self.group, self._said, self._root, self._poll = group, ids, ids[0], ids[2]

    def _group(self, group: ConversationId) -> client.CreateGroup:
        return client.CreateGroup(conversation_id=group, title="Engines", participants=[self.charles], is_public=True)

    async def run(self, who: UserId, frame: client.Frame) -> object:
        """Run a frame of a user on either worker. A refusal is ignored, but a failure is not."""
        user = User(id=who, name="UserSession")
        services = self.app._services  # noqa: SLF001
        context = Context(services=services, user=user, session_id=self.sessions[who], lock_ms=60_000)
        try:
            attempt = partial(ROUTES[type(frame)].handler, context, frame)
            return await until_free(attempt, since=asyncio.get_running_loop().time(), patience=60)
        except Refused as refused:
            assert refused.code not in NOT_NOW, refused
        except asyncpg.TransactionRollbackError:
            pass  # PostgreSQL counted it
        return None

    def frames(self) -> list[client.Frame]:
        """Return every frame that writes, for the same few rows."""
        one: Any = {"conversation_id": self.group, "message_id": self._said[1]}
        root: Any = {"conversation_id": self.group, "message_id": self._root}
        poll: Any = {"conversation_id": self.group, "message_id": self._poll}
        other: Any = {"conversation_id": self.group, "message_id": self._said[3]}
        here: Any = {"conversation_id": self.group}
        later = now() + timedelta(days=1)
        return [
            self._group(ConversationId(uuid7())),
            client.CreateChannel(conversation_id=ConversationId(uuid7()), title="News"),
            client.CreateDirect(user_id=self.charles),
            client.UpdateConversation(conversation_id=self.group, title=uuid7().hex),
            client.SetPreferences(conversation_id=self.group, is_muted=True),
            client.Join(conversation_id=self.group),
            client.Leave(conversation_id=self.group),
            client.AddParticipants(conversation_id=self.group, participants=[self.charles, self.ada]),
            client.Invite(conversation_id=self.group, participants=[self.ada, self.charles]),
            client.Decline(conversation_id=self.group),
            client.SetInviteCode(conversation_id=self.group, is_open=True),
            client.RemoveParticipant(conversation_id=self.group, user_id=self.charles),
            client.Unban(conversation_id=self.group, user_id=self.charles),
            client.SetRole(conversation_id=self.group, user_id=self.charles, role="admin"),
            client.SetPermissions(conversation_id=self.group, user_id=self.charles, can_pin_messages=True),
            client.TransferOwnership(conversation_id=self.group, user_id=self.charles),
            message(self.group, parent_message_id=self._root),
            client.Forward(**here, message_id=self._root, to_conversation_id=self.direct,
                           new_message_id=MessageId(uuid7())),
            client.Edit(**one, content=uuid7().hex),
            client.Delete(conversation_id=self.group, message_id=self._said[1]),
            client.React(**root, emoji="👍"),
            client.Unreact(**root, emoji="👍"),
            client.Pin(**root),
            client.Unpin(**root),
            client.Star(**poll),
            client.Unstar(**one),
            client.Vote(**poll, options=[random.randrange(2)]),
            client.ClosePoll(conversation_id=self.direct, message_id=self._poll),
            client.FollowThread(**poll),
            client.UnfollowThread(**one),
            client.ReadThread(**other, thread_order=1),
            client.MarkUnread(**root),
            client.Read(**poll),
            client.SetDraft(**here, content="I thi"),
            client.Schedule(**here, message_id=self._root, content="Later", send_at=later),
            client.CancelScheduled(**here, message_id=self._root),
            client.SeeFeed(),
            client.RegisterPush(endpoint="https://push.example/1", p256dh=PUSH_POINT, auth="A" * 22),
            client.UnregisterPush(endpoint="https://push.example/1"),
            client.Moderate(**root, reason=uuid7().hex),
            client.Unmoderate(**root),
            client.ReportMessage(**root, reason="Rude"),
            client.DismissReport(**here, report_id=ReportId(uuid7())),
            client.UpdateProfile(bio=uuid7().hex),
            client.SetPresence(status=random.choice(["online", "busy"])),
            client.Delivered(**poll),
            client.RequestFriend(user_id=self.charles),
            client.AnswerFriend(user_id=self.charles, accept=True),
            client.Unfriend(user_id=self.charles),
            client.Block(user_id=self.charles),
            client.Unblock(user_id=self.charles),
            client.Follow(user_id=self.charles),
            client.Unfollow(user_id=self.charles),
            client.Mute(user_id=self.charles),
            client.Unmute(user_id=self.charles),
            client.SetSwitches(user_id=self.charles, can_see_profile=True),
        ]  # fmt: skip

    def acts(self) -> dict[str, Act]:
        """Return all writes by name: frames of either user, accounts, administration and jobs."""

        def framed(who: UserId, index: int) -> Act:
            other = {self.ada: self.charles, self.charles: self.ada}

            async def act() -> object:
                frame = self.frames()[index]
                if who == self.charles and getattr(frame, "user_id", None) == self.charles:
                    msgspec.structs.force_setattr(frame, "user_id", other[who])
                return await self.run(who, frame)

            return act

        acts: dict[str, Act] = {}
        for index, frame in enumerate(self.frames()):
            for who, name in ((self.ada, "ada"), (self.charles, "charles")):
                acts[f"{name} {type(frame).__name__}"] = framed(who, index)
        user = str(self.charles)
        return acts | {
            "logout": self.log_out,
            "revoke all": self.revoke_all,
            "deactivate": self.deactivate,
            "log in": self.log_in,
            "erase": self.erase,
            "disable": lambda: self.run_command("user", "disable", user),
            "enable": lambda: self.run_command("user", "enable", user),
            "reset-password": self.reset_password,
            "sessions --revoke": lambda: self.run_command("user", "sessions", user, "--revoke"),
            "promote": lambda: self.run_command("user", "promote", user),
            "seen": self.seen,
            "jobs": self.jobs,
            DELETE: self.delete,
        }

    async def delete(self) -> None:
        """Delete the group and create another one."""
        group = self.group
        for who in (self.ada, self.charles):  # one of them owns the group
            await self.run(who, client.DeleteConversation(conversation_id=group))
        await self.fill_group()

    async def reconcile(self) -> None:
        """Undo what could prevent either user from acting in a new group."""
        await self.world.db.execute("DELETE FROM user_relationship")
        await self.world.db.execute("UPDATE conversation SET created_at = '2000-01-01'")
        await self.fill_group()

    # ------------------------------------------------------------------------------------------------ accounts

    async def session(self) -> dict[str, str]:
        token = new_token()
        device = (None, None)

        async def made(db: Db) -> object:
            return await sessions.create(db, self.charles, token_hash(token), timedelta(days=1), device)

        await self.on_database(made)
        return {"authorization": f"Bearer {token}"}

    async def log_out(self) -> None:
        await self.http.post("/v1/auth/logout", headers=await self.session())

    async def revoke_all(self) -> None:
        await self.http.delete("/v1/auth/sessions", headers=await self.session())

    async def deactivate(self) -> None:
        await self.http.post("/v1/auth/deactivate", headers=await self.session(), json={"password": PASSWORD})
        await self.log_in()

    async def log_in(self) -> None:
        await self.http.post("/v1/auth/login", json={"email": self.email, "password": PASSWORD})
        self.http.cookies.clear()

    # ------------------------------------------------------------------------------------------ administration

    async def run_command(self, *arguments: str) -> None:
        with contextlib.suppress(asyncpg.TransactionRollbackError):
            await administer(self.world, *arguments)

    async def reset_password(self) -> None:
        await self.run_command("user", "reset-password", str(self.charles))
        await self.on_database(lambda db: accounts.give_password(db, self.charles, CHEAP.hash(PASSWORD)))

    async def erase(self) -> None:
        """Erase a new user who takes part in the group and in a thread there."""
        guests: list[UserId] = []

        async def made(db: Db) -> None:
            guests.append(await accounts.register(db, "Guest", f"{uuid7()}@example.org", "no password"))

        await self.on_database(made)
        await self.run(self.ada, client.AddParticipants(conversation_id=self.group, participants=guests))
        await self.run_command("erase", str(guests[0]), "--yes")

    # ---------------------------------------------------------------------------------------------------- jobs

    @property
    def app(self) -> App:
        """Return one of the workers."""
        return random.choice(self.world.workers).app

    async def on_database(self, work: Callable[[Db], Awaitable[object]]) -> None:
        with contextlib.suppress(asyncpg.TransactionRollbackError):
            async with self.app._database.connection() as db:  # noqa: SLF001
                await work(db)

    async def seen(self) -> None:
        there = random.sample([self.ada, self.charles], 2)
        await self.on_database(lambda db: presence.seen(db, {one: Transition(is_online=True) for one in there}))

    async def jobs(self) -> None:
        async def slid(db: Db) -> None:
            ids = [SessionId(row[0]) for row in await db.fetch("SELECT id FROM session ORDER BY random() LIMIT 20")]
            await sessions.slide(db, ids, timedelta(days=30))

        await self.on_database(slid)
        with contextlib.suppress(asyncpg.TransactionRollbackError):
            await self.app.background.clear_expired()
            await self.app.background.expire_due()
            scheduler = self.app.scheduler
            await scheduler.send_due()
            await all_sent(scheduler)


@pytest.fixture
async def conflicting(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ConflictingWrites]:
    monkeypatch.setattr(passwords, "is_outdated", lambda _: False)
    monkeypatch.setattr(passwords, "hashed", _cheap)
    admin = await asyncpg.connect(settings.database_url)
    name = await admin.fetchval("SELECT current_database()")
    # PostgreSQL detects a deadlock immediately, so that the rest does not wait.
    await admin.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '5ms'")
    settings = msgspec.structs.replace(settings, login_attempts_per_address=1_000_000, login_attempts=1_000_000)
    async with World(settings) as world, http_client(world.url, timeout=30) as http:
        # One worker adds the users that the other one invites, so that both branches run.
        invites = world.workers[1].app
        invites._services = msgspec.structs.replace(invites._services, anyone_adds=False)  # noqa: SLF001
        conflicting = ConflictingWrites(world, http)
        await conflicting.begin()
        yield conflicting
    # The connections are closed, so that their processes have reported their counts.
    for _ in range(200):
        if not await admin.fetchval(OTHERS):
            break
        await asyncio.sleep(0.01)
    deadlocks = await admin.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = $1", name)
    await admin.close()
    assert deadlocks == 0


RANKS = [
    ["conversation"],
    ['"user"'],
    ["conversation_participant", "session", "account", "draft", "message_star", "thread_follow", "user_relationship",
     "push_endpoint", "scheduled_message", "approach"],
    ["database_epoch"],
]  # fmt: skip
"""Tables by the rank of their rows (server/queries/__init__.py)."""
AS_BEFORE = """
SELECT count(*) = 2 AND NOT EXISTS (SELECT FROM user_relationship WHERE type = 'block' AND status = 'active')
FROM conversation_participant WHERE conversation_id = $1 AND status = 'active'
"""
STATE = """
SELECT array_agg(pid ORDER BY pid) FILTER (WHERE wait_event_type = 'Lock'),
    bool_or(wait_event_type = 'Lock' AND $1 = ANY(pg_blocking_pids(pid))),
    count(*) FILTER (WHERE backend_xid IS NOT NULL AND wait_event_type IS DISTINCT FROM 'Lock'),
    pg_snapshot_xmax(pg_current_snapshot())::text
FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> $1
"""
"""Ids of the backends that wait for locks, and whether one of them waits for connection $1.

Also the number of other backends that are in a write, and the latest finished transaction.
"""


def locked_rows(table: str) -> str:
    """Return a subquery that counts the rows of a table that other transactions have locked."""
    return f"(SELECT count(*) FROM {table}) - (SELECT count(*) FROM (SELECT FROM {table} FOR UPDATE SKIP LOCKED) free)"


WAITS = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"


async def locked_by_waiting_backends(
    conflicting: ConflictingWrites, connection: asyncpg.Connection, later: list[str]
) -> list[str] | None:
    """Return the tables with rows that are locked while a backend waits for a connection.

    Return None if no backend waits, or if it is uncertain. A job may lock rows for a moment without waiting.
    """
    before = await conflicting.world.db.fetchrow(STATE, connection.get_server_pid())
    assert before is not None
    if not before[1] or before[2]:
        return None
    probe = connection.transaction()
    await probe.start()
    counts = await connection.fetchrow(f"SELECT {', '.join(locked_rows(table) for table in later)}") or ()
    after = await conflicting.world.db.fetchrow(STATE, connection.get_server_pid())
    await probe.rollback()
    return [table for table, count in zip(later, counts, strict=True) if count] if after == before else None


@pytest.mark.parametrize(
    ("rank", "mode"),
    [(0, "UPDATE"), (1, "NO KEY UPDATE"), pytest.param(0, "NO KEY UPDATE", marks=pytest.mark.long)],
)
async def test_lock_order_is_respected_while_waiting(conflicting: ConflictingWrites, rank: int, mode: str) -> None:
    """Each write meets a transaction that locks all rows of a rank, as a deletion locks its conversation."""
    connection = await asyncpg.connect(conflicting.world.settings.database_url)
    later = [table for tables in RANKS[rank + 1 :] for table in tables]
    if mode == "NO KEY UPDATE" and rank == 0:
        later.append("conversation")  # an insert takes FOR KEY SHARE, which is compatible with `NO KEY UPDATE`
    wrong: dict[str, list[str]] = {}
    met = 0
    for name, act in conflicting.acts().items():
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"SELECT FROM {RANKS[rank][0]} FOR {mode}")
        task = asyncio.create_task(act())
        rows = None
        while not task.done() and (rows := await locked_by_waiting_backends(conflicting, connection, later)) is None:
            await asyncio.sleep(0)
        if rows:
            wrong[name] = rows
        met += rows is not None
        await transaction.rollback()
        await task
        if not await conflicting.world.db.fetchval(AS_BEFORE, conflicting.group):
            await conflicting.reconcile()
    await connection.close()
    assert not wrong
    assert met > 50, "too few writes waited for the lock"


@pytest.mark.parametrize("waits_for_connection", [True, False])
async def test_only_locks_of_backends_that_wait_for_the_connection_are_reported(
    conflicting: ConflictingWrites, *, waits_for_connection: bool
) -> None:
    """A backend has locked a session, and the test has locked all conversations.

    The backend either waits for a conversation, which is reported, or another backend waits for the session, which is
    not.
    """
    url = conflicting.world.settings.database_url
    connection, holder, waiter = [await asyncpg.connect(url) for _ in range(3)]
    holds_all, holds = connection.transaction(), holder.transaction()
    await holds_all.start()
    await holds.start()
    await connection.execute("SELECT FROM conversation FOR UPDATE")
    await holder.execute("SELECT FROM session FOR UPDATE")
    rest = holder if waits_for_connection else waiter
    task = asyncio.create_task(
        rest.execute(f"SELECT FROM {'conversation' if waits_for_connection else 'session'} FOR UPDATE")
    )
    while not await conflicting.world.db.fetchval(WAITS):
        await asyncio.sleep(0)
    found = [await locked_by_waiting_backends(conflicting, connection, ["session", "account"]) for _ in range(20)]
    assert {tuple(one) for one in found if one is not None} == ({("session",)} if waits_for_connection else set())
    await holds_all.rollback()
    if waits_for_connection:
        await task
    await holds.rollback()
    await task
    for one in (connection, holder, waiter):
        await one.close()


async def _cheap(password: str) -> str:
    return CHEAP.hash(password)


async def test_every_writing_frame_is_covered(conflicting: ConflictingWrites) -> None:
    assert {one.app._services.anyone_adds for one in conflicting.world.workers} == {True, False}  # noqa: SLF001
    writing = {kind for kind, route in ROUTES.items() if route.rate is Rate.WRITE}
    assert writing - {client.DeleteConversation} <= {type(frame) for frame in conflicting.frames()}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
async def test_no_deadlock_when_all_writes_run_concurrently(conflicting: ConflictingWrites, seed: int) -> None:
    """Four connections run all writes, each in another order."""
    random.seed(seed)
    acts = list(conflicting.acts().values())

    async def run_all() -> None:
        for act in random.sample(acts, len(acts)):
            await act()

    await asyncio.gather(*(run_all() for _ in range(4)))


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_no_deadlock_between_any_two_writes(conflicting: ConflictingWrites) -> None:
    """All pairs run, several of each concurrently."""
    acts = conflicting.acts()
    for (name, one), (_, other) in itertools.combinations_with_replacement(reversed(acts.items()), 2):
        if name == DELETE:
            await conflicting.reconcile()
        await asyncio.gather(*(act() for act in (one, other, one, other)))
