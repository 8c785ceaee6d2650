"""Commands of the operator reach open sockets over the bus, before a worker compares versions."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest
from redis.asyncio import Redis

from protocol import server
from protocol.errors import CloseCode
from prove.client import Client
from server.app import command_news
from server.cli import conversations, users
from server.db import epoch
from server.db.epoch import epoch_id
from server.domain.presence_entries import WORKER
from server.hub import comparisons
from tests.test_administration import Shell, shell
from tests.test_credentials import administer
from tests.world import Worker, World, http_client

__all__ = ("shell",)

Effect: TypeAlias = Callable[[Client], Awaitable[None]]


@pytest.fixture(autouse=True)
def _never_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "COMPARE_SECONDS", 3600.0)
    monkeypatch.setattr(comparisons, "COMPARE_USERS_SECONDS", 3600.0)


async def _ended(socket: Client) -> None:
    assert await socket.closed() == CloseCode.SESSION_ENDED


def _is_admin(*, expected: bool) -> Effect:
    async def seen(socket: Client) -> None:
        await socket.event(server.MeChanged, lambda event: event.me.is_admin is expected)

    return seen


async def _left(socket: Client) -> None:
    await socket.event(server.ConversationLeft)


CHANGES: dict[str, tuple[Effect, ...]] = {
    "user promote": (_is_admin(expected=True),),
    "user demote": (_is_admin(expected=False),),
    "conversation delete --yes": (_left,),
    "user sessions --revoke": (_ended,),
    "user reset-password": (_ended,),
    "user disable": (_ended,),
    "user enable": (),
    "erase --yes": (_ended,),
}
"""The effect of each command that changes rights on an open socket. A disabled account has no open socket."""
READS = {
    "user create", "user list", "user show", "user sessions", "conversation list", "conversation show",
    "conversation export", "conversation audit",
}  # fmt: skip
"""Commands that change nothing for an open socket."""


def _commands() -> Iterator[str]:
    yield "erase"
    for group in (users.user, conversations.conversation):
        yield from (f"{group.name} {name}" for name in group.commands)


def test_every_command_is_listed_with_its_effect_on_sockets() -> None:
    assert {name.split(" --")[0] for name in CHANGES} | READS == set(_commands())


@pytest.fixture
async def alone(world: World) -> int:
    """The index of a worker that is the only one of its server, as in an embedded installation."""
    world.workers.append(Worker(world.settings, world.folder, 3, is_alone=True))
    await world.workers[-1].start()
    return len(world.workers) - 1


async def test_command_that_changes_rights_reaches_open_sockets(shell: Shell, alone: int) -> None:
    missed: list[str] = []
    for command, sees in CHANGES.items():
        who = await shell.world.user("Ada")
        sockets = [await shell.world.connect(who, worker) for worker in (1, alone)]
        subject = str(who.id)
        if command.startswith("conversation"):
            subject = str(await shell.world.channel(sockets[0]))
            shell.world.workers[alone].app.hub.online_users.recheck(who.id)  # a real one would be the only worker
            await sockets[1].event(server.ConversationJoined)
        _, err = await shell.both(*command.split(), subject)
        assert err == "", command
        for socket in sockets:
            try:
                for seen in sees:
                    await seen(socket)
            except TimeoutError:
                missed.append(command)
    assert missed == []


@pytest.mark.parametrize(
    ("redis_url", "reason"), [("unix:///nowhere/valkey.sock", "Check REDIS_URL"), ("", "set REDIS_URL")]
)
async def test_command_reports_that_no_server_was_notified(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str, reason: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("OPENCHAT_DATA_DIR", str(tmp_path))
    who = await shell.world.user("Ada")
    out, err = await shell.both("user", "disable", str(who.id), "--json")
    assert json.loads(out)["state"] == "disabled"
    assert "no server was notified" in err
    assert reason in err
    assert f"within {command_news.BOUND_SECONDS:.0f} seconds" in err


async def test_command_reports_that_no_server_uses_the_redis(shell: Shell) -> None:
    """This is the case with the Redis of another installation, whose workers use other channels."""
    subjects = {}
    for command in CHANGES:
        who = await shell.world.user("Ada")
        is_about_user = not command.startswith("conversation")
        subjects[command] = who.id if is_about_user else await shell.world.channel(await shell.world.connect(who))
    await asyncio.gather(*(worker.stop() for worker in shell.world.workers))
    shell.world.workers.clear()
    async with Redis.from_url(shell.world.settings.redis_url) as redis:
        # The key that shows that a worker runs may outlive it by some seconds.
        async for key in redis.scan_iter(f"{WORKER}{await epoch_id(shell.world.db)}:*"):
            await redis.delete(key)
    for command, subject in subjects.items():
        _, err = await shell.both(*command.split(), str(subject))
        assert f"no server was notified: {command_news.NO_SERVER}. Open sockets see it within" in err, command


async def test_reset_password_clears_failed_logins(shell: Shell) -> None:
    who = await shell.world.user("Ada")
    login = {"email": (await shell.json("user", "show", str(who.id)))["email"], "password": "no idea of it"}
    async with http_client(shell.world.url) as http:
        for _ in range(shell.world.settings.login_attempts):
            assert (await http.post("/v1/auth/login", json=login)).status_code == 401
        assert (await http.post("/v1/auth/login", json=login)).status_code == 429
        login["password"] = (await shell.json("user", "reset-password", str(who.id)))["password"]
        assert (await http.post("/v1/auth/login", json=login)).status_code == 200


async def test_command_that_cannot_read_the_epoch_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ada,) = await world.users("Ada")
    monkeypatch.setattr(epoch, "EPOCH", "SELECT 1 / 0")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await administer(world, "user", "disable", str(ada.id))
    assert not await world.db.fetchval('SELECT is_disabled FROM "user" WHERE id = $1', ada.id)
