"""Commands of administrators, on a database that a server is using."""

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import CloseCode, ErrorCode
from protocol.ids import ConversationId
from prove.client import Client
from server.cli import main
from server.core.config import Settings, without_password
from server.core.errors import Fatal
from server.processes.embedded.reach import reached
from server.queries import conversation_cards, export
from tests.world import World, http_client, refused, sent


class Shell:
    """Runs commands in a separate thread, as a shell would in a separate process."""

    def __init__(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        self.world = world
        self._capsys = capsys

    async def run(self, *arguments: str, status: int = 0, is_output: bool = False) -> str:
        """Run a command and return its standard output. If it is to fail and not `is_output`, return standard error."""
        out, err = await self.both(*arguments, status=status)
        return err if status and not is_output else out

    async def both(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Run a command and return its standard output and standard error."""
        self._capsys.readouterr()
        ended = await asyncio.to_thread(main.run, list(arguments))
        out, err = self._capsys.readouterr()
        assert ended == status, (out, err)
        return out, err

    async def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(await self.run(*arguments, "--json", status=status, is_output=True))


@pytest.fixture
def shell(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("DATABASE_URL", world.settings.database_url)
    monkeypatch.setenv("REDIS_URL", world.settings.redis_url)
    return Shell(world, capsys)


async def test_new_epoch_names_the_database_and_needs_confirmation(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = "SELECT epoch FROM database_epoch"
    before = await shell.world.db.fetchval(epoch)
    name = without_password(shell.world.settings.database_url)
    assert await asyncio.to_thread(main.run, ["new-epoch"]) == 1
    assert f"database {name} would start over. To confirm, use --yes" in capsys.readouterr().err
    assert await shell.world.db.fetchval(epoch) == before
    assert await asyncio.to_thread(main.run, ["new-epoch", "--yes"]) == 0
    assert name in capsys.readouterr().out
    assert await shell.world.db.fetchval(epoch) != before
    assert f"Checking {name}." in await shell.run("check")


def test_name_of_a_database_holds_no_password() -> None:
    for url, name in (
        ("postgresql://ada:s:e@c@db:5432/chat?sslmode=require&password=s", "postgresql://ada@db:5432/chat"),
        ("postgresql://db/chat", "postgresql://db/chat"),
        ("postgresql://ada@/chat?host=/run/pg&passfile=s&port=5", "postgresql://ada@/chat?host=/run/pg&port=5"),
        ("postgresql:///chat?user=ada&sslpassword=s", "postgresql:///chat?user=ada"),
    ):
        assert without_password(url) == name


async def test_invalid_fields_of_an_account_are_refused_with_advice(shell: Shell) -> None:
    for name, email, sentence in (
        ("Eve", "bad", "`bad` cannot be an e-mail address. Give an e-mail address such as ada@example.org"),
        ("", "eve@example.org", "`` cannot be a name. Give at least 1 character."),
        ("E" * 256, "eve@example.org", "Give at most 255 characters."),
    ):
        said = await shell.run("user", "create", name, email, status=1)
        assert sentence in said
        assert "regex" not in said


async def test_accounts_are_created_shown_disabled_and_enabled(shell: Shell) -> None:
    made = await shell.json("user", "create", "Ada", "ADA@example.org")
    login = {"email": "ada@example.org", "password": made["password"]}
    async with http_client(shell.world.url) as http:
        token = (await http.post("/v1/auth/login", json=login)).json()["token"]
        assert "another account" not in await shell.run("user", "create", "Ada", "ada@example.org", status=1)
        assert "cannot be an e-mail address" in await shell.run("user", "create", "Ada", "no address", status=1)
        shown = await shell.run("user", "show", "ada@example.org")
        assert "state          active" in shown
        assert made["id"] in shown
        async with Client(shell.world.url, token) as one:
            await one.settled()
            assert (await shell.json("user", "disable", made["id"]))["state"] == "disabled"
            shell.world.workers[0].app.hub.comparisons.soon()
            assert await one.closed() == CloseCode.SESSION_ENDED
        assert (await http.post("/v1/auth/login", json=login)).status_code == 401
        await shell.run("user", "enable", made["id"])
        assert (await http.post("/v1/auth/login", json=login)).status_code == 200
        again = await shell.json("user", "reset-password", "ada@example.org")
        assert (await http.post("/v1/auth/login", json=login)).status_code == 401
        login["password"] = again["password"]
        assert (await http.post("/v1/auth/login", json=login)).status_code == 200
        assert [one.get("state") for one in await shell.json("user", "sessions", made["id"])] == [None]
        assert [one["state"] for one in await shell.json("user", "sessions", made["id"], "--revoke")] == ["ended"]
        assert await shell.run("user", "sessions", made["id"]) == "none\n"
    assert "there is no user" in await shell.run("user", "show", "nobody@example.org", status=1)


async def test_promotion_and_demotion_of_administrators_are_audited(shell: Shell) -> None:
    who = await shell.world.user("Ada")
    ada = await shell.world.connect(who)
    assert (await shell.json("user", "promote", str(who.id)))["is_admin"] is True
    noted = await ada.call(client.ListAudit(), server.AuditPage)
    (entry,) = noted.entries
    assert (entry.action, entry.user_id, entry.actor_id) == ("promote_user", who.id, None)
    assert (await shell.json("user", "demote", str(who.id)))["is_admin"] is False
    log = await shell.json("conversation", "audit", str(UUID(int=0)))
    assert [entry["action"] for entry in log] == ["promote_user", "demote_user"]


async def test_conversations_are_shown_exported_and_deleted(shell: Shell) -> None:
    ada = await shell.world.connect(await shell.world.user("Ada"))
    about = await shell.world.channel(ada, title="Engines")
    for number in range(3):
        await sent(ada, about, f"Message {number}")
    shown = await shell.json("conversation", "show", str(about))
    assert (shown["title"], shown["messages"], shown["owner"]) == ("Engines", 3, str(ada.ready.user.id))
    lines = (await shell.run("conversation", "export", str(about))).splitlines()
    assert [json.loads(line)["message"]["content"] for line in lines] == ["Message 0", "Message 1", "Message 2"]
    assert (await shell.json("conversation", "audit", str(about), "--verify"))["tampered_with"] is False
    asked = await shell.run("conversation", "delete", str(about), status=1)
    assert f"this deletes the channel `Engines` ({about}) and its 1 participants lose it." in asked
    assert "To confirm, use --yes" in asked
    assert (await shell.json("conversation", "show", str(about))).get("is_deleted", False) is False
    deleted = {"id": str(about), "title": "Engines", "state": "deleted"}
    assert await shell.json("conversation", "delete", str(about), "--yes") == deleted
    assert await shell.json("conversation", "delete", str(about)) == deleted, "repeating it succeeds"
    shell.world.workers[0].app.hub.comparisons.soon()
    await ada.event(server.ConversationLeft)
    assert "does not exist" in await shell.run("conversation", "show", str(UUID(int=1)), status=1)
    await shell.world.db.execute("UPDATE audit_entry SET action = 'nothing'")
    assert "tampered with" in await shell.run("conversation", "audit", str(UUID(int=0)), "--verify", status=1)


async def test_direct_conversation_cannot_be_deleted_by_command(shell: Shell) -> None:
    ada, charles = await shell.world.users("Ada", "Charles")
    one = await shell.world.connect(ada)
    asked = client.CreateDirect(user_id=charles.id)
    about = (await one.call(asked, server.OneConversation)).view.conversation.id
    for yes in ((), ("--yes",)):
        assert "cannot be deleted" in await shell.run("conversation", "delete", str(about), *yes, status=1)
    assert (await one.call(asked, server.OneConversation)).view.conversation.id == about
    await shell.run("erase", str(charles.id), "--yes")
    assert (await one.call(asked, server.OneConversation)).view.conversation.id == about, "it has messages"
    # The state that an earlier version left behind.
    await shell.world.db.execute("UPDATE conversation SET is_deleted = true, is_active = false WHERE id = $1", about)
    with refused(ErrorCode.CONFLICT, "user_id"):
        await one.call(asked)


async def test_accounts_and_conversations_are_found_and_listed_in_pages(shell: Shell) -> None:
    ada, charles, mary = await shell.world.users("Ada", "Charles", "Mary")
    await shell.world.db.execute('UPDATE "user" SET display_name = $2 WHERE id = $1', mary.id, "Somerville")
    await shell.run("user", "disable", str(charles.id))
    client_of_ada = await shell.world.connect(ada)
    made = [str(await shell.world.group(client_of_ada, mary, title=title)) for title in ("Engines", "Tea", "Steam")]
    await client_of_ada.call(client.DeleteConversation(conversation_id=ConversationId(UUID(made[1]))))
    everybody = await shell.json("user", "list")
    assert [one["name"] for one in everybody] == ["Ada", "Charles", "Mary"], "ordered by e-mail address"
    assert [one["state"] for one in everybody] == ["active", "disabled", "active"]
    for part in ("somerVILLE", "mary", everybody[2]["email"].upper()):
        assert [one["id"] for one in await shell.json("user", "list", part)] == [str(mary.id)]
    assert await shell.run("user", "list", "_") == "none\n", "`_` is not a wildcard"
    found = await shell.json("conversation", "list")
    assert [one["id"] for one in found] == made[::-1], "newest first"
    assert [one["is_deleted"] for one in found] == [False, True, False]
    assert (found[0]["title"], found[0]["participants"], found[0]["owner"]) == ("Steam", 2, str(ada.id))
    assert [one["title"] for one in await shell.json("conversation", "list", "GIN")] == ["Engines"]
    assert await shell.json("conversation", "list", "--user", everybody[2]["email"]) == found
    assert await shell.json("conversation", "list", "--user", str(charles.id)) == []
    assert "there is no user" in await shell.run("conversation", "list", "--user", "nobody", status=1)
    for group, whole, key in (("user", everybody, "email"), ("conversation", found, "id")):
        shown, after = await shell.both(group, "list", "--limit", "2")
        assert shown.splitlines()[0].split()[0] == "id"
        assert len(shown.splitlines()) == 3
        assert after == f"openchat: there are more. To continue, use --after {whole[1][key]}\n"
        rest, nothing = await shell.both(group, "list", "--after", whole[1][key], "--json")
        assert (json.loads(rest), nothing) == (whole[2:], "")
    log = await shell.json("conversation", "audit", str(UUID(int=0)))
    assert log[-1]["action"] == "list_conversations"


async def test_conversation_is_exported_in_small_batches(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await shell.world.connect(await shell.world.user("Ada"))
    about = await shell.world.channel(ada)
    await shell.world.db.execute(
        """INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT $1, $2, repeat(U&'\\0001', 10000), 100 + n, 100 + n FROM generate_series(1, 120) n""",
        about, ada.ready.user.id,
    )  # fmt: skip
    held: list[int] = []
    fetch = asyncpg.Connection.fetch

    async def fetched(db: Any, query: str, *args: Any, **options: Any) -> Any:
        rows = await fetch(db, query, *args, **options)
        if query == conversation_cards.EVERYTHING:
            held.append(sum(len(row[0]) for row in rows))
        return rows

    monkeypatch.setattr(asyncpg.Connection, "fetch", fetched)
    lines = (await shell.run("conversation", "export", str(about))).splitlines()
    assert [json.loads(line)["message"]["sent_version"] for line in lines] == list(range(101, 221))
    assert max(held) < (export.ROWS_PER_PAGE + 1) * 62_000


async def test_user_is_exported_and_erased_without_a_trace(shell: Shell) -> None:
    who = await shell.world.user("Adelaide")
    one = await shell.world.connect(who)
    about = await shell.world.channel(one)
    await sent(one, about, "It is Adelaide")
    export = json.loads(await shell.run("export", "--user", str(who.id)))
    assert [entry["message"]["content"] for entry in export["messages"]] == ["It is Adelaide"]
    assert "--yes" in await shell.run("erase", str(who.id), status=1)
    erased = await shell.json("erase", str(who.id), "--yes", "--verify")
    assert erased["traces"] == 0
    assert "message.content (1)" in erased["people_say_the_same_in"]
    assert (await shell.json("erase", str(who.id), "--verify"))["traces"] == 0
    assert (await shell.json("user", "show", str(who.id)))["state"] == "erased"
    await shell.world.db.execute('UPDATE "user" SET bio = $2 WHERE id = $1', who.id, "Something")
    assert "data of the user remains" in await shell.run("erase", str(who.id), "--verify", status=1)


def test_embedded_database_is_reached_with_and_without_a_running_server() -> None:
    folder = Path(tempfile.mkdtemp(prefix="openchat-tests-"))
    folder.rmdir()
    settings = Settings(data_dir=str(folder))
    with pytest.raises(Fatal, match="there is no database"), reached(settings):
        pytest.fail("a mistyped --data-dir created a database")
    assert not folder.exists()
    with reached(settings, may_create=True) as first, reached(settings) as second:
        assert first == second
        assert first.redis_url is None
    with reached(settings):
        pass
    shutil.rmtree(folder)
