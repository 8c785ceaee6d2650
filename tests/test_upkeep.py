"""`check`, `why`, `reindex`, `export` and `import` on databases in use."""

import asyncio
import json
import random
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from protocol import client, server
from protocol.ids import MessageId, uuid7
from protocol.payloads import Poll
from prove.truth import recount
from server.db import migrate
from server.db.epoch import epoch_id
from server.queries import checks, export
from server.queries.checks import CHECKS, Slices
from tests.conftest import Servers
from tests.test_administration import Shell
from tests.world import Room, World, message, sent

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture
def shell(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("DATABASE_URL", world.settings.database_url)
    return Shell(world, capsys)


@pytest.fixture
async def elsewhere(servers: Servers) -> AsyncIterator[str]:
    """Return the URL of another, empty installation."""
    administration = await asyncpg.connect(servers.postgres.url("postgres"))
    name = f"elsewhere_{uuid7().hex}"
    await administration.execute(f"CREATE DATABASE {name}")
    url = servers.postgres.url(name)
    await migrate.migrate(url)
    yield url
    await administration.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await administration.close()


async def busy(room: Room, world: World) -> MessageId:
    """Create at least one row of each kind, and return the id of a message."""
    mary = await world.user("Mary")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[mary.id]))
    hers = await world.connect(mary)
    root = await sent(room.ada, room.group, "Root for @charles #loom")
    for number in range(3):
        await sent(room.charles, room.group, f"Reply {number}", parent_message_id=root)
    poll = await sent(room.ada, room.group, "Tea?", payload=Poll(options=["Yes", "No"]))
    chance = random.Random(1)
    for one in (room.ada, room.charles, hers):
        await one.call(client.Vote(**room.at(poll), options=[chance.randrange(2)]))
        await one.call(client.React(**room.at(root), emoji="👍"))
        await one.call(client.Star(**room.at(root)))
        await one.call(client.SetDraft(conversation_id=room.group, content="I thi"))
    await room.ada.call(client.Edit(**room.at(root), content="Root, edited, for @charles #loom"))
    gone = await sent(hers, room.group, "Gone")
    await hers.call(client.Delete(**room.at(gone)))
    await room.ada.call(client.Moderate(**room.at(await sent(hers, room.group, "Rude")), reason="Rude"))
    await room.charles.call(client.Read(**room.at(poll)))
    await hers.call(client.RequestFriend(user_id=room.users[0].id))
    await room.ada.call(client.AnswerFriend(user_id=mary.id, accept=True))
    await room.ada.call(client.Pin(**room.at(root)))
    await room.ada.call(client.CreateDirect(user_id=mary.id))
    await world.indexed()
    return root


async def test_check_passes_and_detects_each_kind_of_damage(
    shell: Shell, room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await busy(room, world)
    lines = await shell.json("check")
    assert len(lines) == len(CHECKS) + 1
    assert lines[0].keys() == {"check", "seconds", "is_good", "wrong", "some"}, "the output has only these fields"
    assert [line["check"] for line in lines if not line["is_good"]] == []
    printed = await shell.run("check")
    assert "all is well" in printed
    assert len(re.findall(r"^ok +\d+\.\d s  \w", printed, re.MULTILINE)) == len(lines)
    assert [line for line in printed.splitlines()[1:] if len(line) > 80] == [], "the lines fit 80 columns"
    assert f"\n{len(lines)} checks in " in printed
    with monkeypatch.context() as patch:
        patch.setattr(checks, "MAY_MAKE_ROLES", "SELECT false")
        printed = await shell.run("check")
    assert re.search(rf"\n{len(lines) - 1} checks, 1 skipped, in [0-9.]+ s: all is well\.", printed)
    assert "skipped: needs CREATEROLE\n" in printed
    # Running workers would repair some of the damage.
    await asyncio.gather(*(worker.stop() for worker in world.workers))
    world.workers.clear()
    wrong: set[str] = set()
    for statement in DAMAGE:
        await world.db.execute("BEGIN")
        await world.db.execute("SET session_replication_role = replica")
        status = await world.db.execute(statement, *([root] if "$1" in statement else []))
        assert not status.endswith(" 0"), f"no row is damaged by {statement}"
        await world.db.execute("COMMIT")
        await world.db.execute("SET session_replication_role = origin")
        found = {line["check"] for line in await shell.json("check", status=1) if not line["is_good"]}
        assert found - wrong, f"no check detects {statement}"
        wrong |= found
    sampled = {"the search index matches the messages (one in a hundred)"}
    assert wrong | sampled >= {check.name for check in CHECKS}
    assert "WRONG" in await shell.run("check", status=1, is_output=True)


DAMAGE = (
    "GRANT CREATE ON SCHEMA public TO PUBLIC",
    """GRANT SELECT ON user_profile TO pg_monitor; ALTER TABLE message ALTER COLUMN content SET STATISTICS 10;
    ANALYZE message""",
    "DELETE FROM message_search WHERE message_id = $1",
    "UPDATE message_search SET message_id = gen_random_uuid() WHERE message_id <> $1",
    "UPDATE conversation SET participant_count = participant_count + 1",
    "UPDATE conversation SET message_count = message_count - 1",
    "UPDATE message SET reply_count = reply_count + 1 WHERE id = $1",
    "UPDATE message SET thread_order = thread_order + 5 WHERE thread_root_id = $1",
    """UPDATE message SET reactions = '{"👍": 99}' WHERE id = $1""",
    "UPDATE message SET poll_voters = poll_voters + 1 WHERE poll_counts IS NOT NULL",
    "UPDATE conversation SET version = version + 1",
    "UPDATE conversation_participant SET version = (SELECT sent_version FROM message WHERE id = $1)",
    "UPDATE message SET version = sent_version - 1 WHERE id = $1",
    'UPDATE "user" SET version = 0',
    "UPDATE conversation_participant SET last_read_version = 1 WHERE last_read_message_id IS NOT NULL",
    "DELETE FROM thread_follow WHERE root_id = $1",
    "UPDATE message_reaction SET author_id = user_id WHERE message_id = $1",
    "UPDATE message SET thread_root_id = id WHERE thread_root_id = $1",
    "UPDATE message SET mentions = ARRAY[gen_random_uuid()] WHERE id = $1",
    "UPDATE conversation_participant SET role = 'owner'",
    "UPDATE conversation SET direct_low = id, direct_high = NULL WHERE type = 'direct'",
    "UPDATE user_relationship SET status = 'pending' WHERE id = (SELECT max(id::text)::uuid FROM user_relationship)",
    "UPDATE message SET content = 'Still here' WHERE is_deleted",
    "UPDATE message SET expires_at = now() - interval '1 day' WHERE id = $1",
    "UPDATE conversation SET is_active = false WHERE type = 'group'",
    """UPDATE conversation_participant SET status = 'invited' WHERE id = (SELECT max(p.id::text)::uuid
    FROM conversation_participant p JOIN conversation c ON c.id = p.conversation_id WHERE NOT c.is_active)""",
    'UPDATE "user" SET is_disabled = true',
    """UPDATE "user" SET is_deleted = true, deleted_at = now() - interval '32 days'""",
    'UPDATE "user" SET erased_at = now()',
    "UPDATE audit_entry SET details = '{}'",
    "DROP POLICY message_access ON message",
)


async def test_checks_find_the_same_in_slices_of_any_size(room: Room, world: World) -> None:
    """Each slice is a transaction of its own, so that a large database is not read in a single one."""
    await busy(room, world)
    await asyncio.gather(*(worker.stop() for worker in world.workers))
    world.workers.clear()
    await world.db.execute("UPDATE conversation SET participant_count = participant_count + 1")
    await world.db.execute("UPDATE message SET version = sent_version - 1")
    small = await checks.slices(world.db, rows=1, pages=1)
    conversations = await world.db.fetchval("SELECT count(*) FROM conversation")
    assert len(small[Slices.CONVERSATIONS]) == conversations > 1
    assert len(small[Slices.PAGES]) > len((await checks.slices(world.db))[Slices.PAGES]) == 1
    for check in CHECKS:
        parts = [await checks.run(world.db, check, part) for part in small[check.by]]
        assert sum(part.number for part in parts) == (await checks.run_all(world.db, check)).number, check.name


async def test_check_detects_a_policy_that_shows_too_much(shell: Shell, room: Room, world: World) -> None:
    await busy(room, world)
    await world.db.execute("DROP POLICY message_access ON message")
    await world.db.execute("CREATE POLICY message_access ON message FOR SELECT USING (true)")
    stranger = await world.user("Stranger")
    assert stranger
    found = [line for line in await shell.json("check", status=1) if not line["is_good"]]
    assert [line["check"] for line in found] == ["no user can read hidden messages (a sample)"]
    assert await world.db.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = 'openchat_check'") == 0


async def test_why_command_shows_the_delivery_report(shell: Shell, room: Room) -> None:
    message_id = await sent(room.ada, room.group)
    await room.charles.call(client.Mute(user_id=room.users[0].id))
    printed = await shell.run("why", str(message_id))
    assert "as version" in printed
    assert "muted" in printed
    assert "Charles" in printed
    assert (await shell.json("why", str(message_id)))["recipients"][0]["state"] == "muted"
    assert "no message" in await shell.run("why", str(uuid7()), status=1)


async def test_reindex_changes_the_language(
    shell: Shell, room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await busy(room, world)
    before = await world.db.fetchval("SELECT count(*) FROM message_search")
    monkeypatch.setenv("OPENCHAT_SEARCH_LANGUAGE", "english")
    assert f"{before} messages are in the search index" in await shell.run("reindex")
    assert await world.db.fetchval("SELECT count(*) FROM message_search WHERE words @@ 'repli'::tsquery") == 3
    assert [line for line in await shell.json("check") if not line["is_good"]] == []
    monkeypatch.setenv("OPENCHAT_SEARCH_LANGUAGE", "klingon")
    assert "OPENCHAT_SEARCH_LANGUAGE" in await shell.run("reindex", status=1)


# --------------------------------------------------------------------------------------------- export and import


async def test_installation_is_exported_and_imported(
    shell: Shell, room: Room, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = shell.world
    root = await busy(room, world)
    await room.charles.call(client.Schedule(
        conversation_id=room.group, message_id=MessageId(uuid7()), content="Later",
        send_at=(await room.ada.call(client.Ping(), server.Pong)).server_time.replace(year=2027),
    ))  # fmt: skip
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    await shell.run("export", str(first))
    assert first.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("DATABASE_URL", elsewhere)
    there = await asyncpg.connect(elsewhere)
    before = await epoch_id(there)
    await shell.run("import", "openchat", str(first))
    assert await epoch_id(there) != before
    await shell.run("export", str(second))
    lines = [json.loads(line) for path in (first, second) for line in path.read_text().splitlines()[1:-1]]
    moves = [one for one in lines if one["table"] == "audit_entry" and one["row"]["action"] in {"export", "import"}]
    assert [one["row"]["action"] for one in moves] == ["export", "export", "import", "export"]
    kept = [one for one in lines if one not in moves]
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :]
    assert (await shell.json("conversation", "audit", str(UUID(int=0)), "--verify"))["tampered_with"] is False
    assert [line for line in await shell.json("check") if not line["is_good"]] == []
    here_words = await world.db.fetch("SELECT message_id, words::text FROM message_search ORDER BY message_id")
    assert await there.fetch("SELECT message_id, words::text FROM message_search ORDER BY message_id") == here_words
    assert await there.fetchval("SELECT content FROM message WHERE id = $1", root) == "Root, edited, for @charles #loom"
    await there.close()
    assert "the database has users already" in await shell.run("import", "openchat", str(first), status=1)


async def test_broken_export_imports_nothing(
    shell: Shell, room: Room, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sent(room.ada, room.group, "Whole")
    path = tmp_path / "whole.jsonl"
    await shell.run("export", str(path))
    lines = path.read_text().splitlines(keepends=True)
    monkeypatch.setenv("DATABASE_URL", elsewhere)
    for broken, why in (
        (lines[:-1], "the last line is missing"),
        ([line.replace("Whole", "Other") for line in lines], "do not match the lines before"),
        ([lines[0].replace('"version":1', '"version":2'), *lines[1:]], "the format is openchat 2"),
        ([lines[0].replace('"schema":', '"schema":9'), *lines[1:]], "the schema of step"),
        (['{"table": "user"}\n'], "first line"),
        ([lines[0], '{"table":"pg_authid","row":{}}\n'], "line 2: the table 'pg_authid' does not exist"),
        (
            [lines[0], '{"table":"server_key","row":{"name":"vapid"}}\n'],
            "line 2: the columns are not those of the table server_key",
        ),
        (
            [lines[0], lines[1].replace('"row":{', '"row":{"other":1,')],
            "line 2: the columns are not those of the table user",
        ),
        ([lines[0], "{\n"], "line 2: "),
        ([lines[0], '{"table":"message","row":' + 100 * "[" + 100 * "]" + "}\n"], "line 2: Expected `object`"),
        ([*lines[:1], lines[1], *lines[1:]], "line 3: this row of user was refused"),
        ([*lines[:2], re.sub('"created_at": ?"', '"created_at":"x', lines[2]), *lines[3:]], "line 3: this row of user"),
        ([], "first line"),
    ):
        path.write_text("".join(broken))
        said = await shell.run("import", "openchat", str(path), status=1)
        assert why in said
        assert re.fullmatch(rf"openchat: {path} cannot be imported: (after )?line \d+: [^\n]+\n", said)
    there = await asyncpg.connect(elsewhere)
    assert await there.fetchval('SELECT count(*) FROM "user"') == 0
    await there.close()


async def imported(world: World) -> dict[str, Any]:
    """Return the imported conversations by name."""
    assert await recount(world.db) == []
    rows = await world.db.fetch("""
        SELECT coalesce(c.title, 'direct') AS title, c.type, c.is_public, ARRAY(
            SELECT u.name || ': ' || m.content FROM message m JOIN "user" u ON u.id = m.sender_id
            WHERE m.conversation_id = c.id ORDER BY m.sent_version
        ) AS said, ARRAY(SELECT r.emoji || r.n FROM (
            SELECT emoji, count(*) AS n FROM message_reaction r WHERE r.conversation_id = c.id GROUP BY 1 ORDER BY 1
        ) r) AS reactions
        FROM conversation c ORDER BY 1
    """)
    return {row["title"]: (row["type"], row["is_public"], row["said"], row["reactions"]) for row in rows}


@pytest.mark.parametrize("is_zip", [False, True])
async def test_slack_export_is_imported(shell: Shell, world: World, tmp_path: Path, *, is_zip: bool) -> None:
    ada = await world.user("Countess")
    await world.db.execute(
        """UPDATE "user" SET email = 'ada@example.org', email_verified = true WHERE id = $1""", ada.id
    )
    path = SAMPLES / "slack"
    if is_zip:
        path = Path(shutil.make_archive(str(tmp_path / "slack"), "zip", path))
    online = await world.connect(ada)
    await shell.run("import", "slack", str(path))
    world.workers[0].app.hub.comparisons.soon()
    await online.event(server.ConversationJoined, lambda event: event.view.conversation.title == "secret")
    mentioned = await world.db.fetchval("""SELECT id FROM "user" WHERE email = 'charles@example.org'""")
    general = [
        f"Countess: Look, <@{mentioned}>: the engine (https://example.org/engine) & its #general notes #loom",
        "Charles Babbage: A reply", "Mary Somerville: From who has left",
        "Countess: @everyone the next day\nplan.pdf: https://files.example.org/plan.pdf",
    ]  # fmt: skip
    there = await imported(world)
    assert there == {
        "general": ("channel", True, general, [":shipit:1", "🎉2", "👀1", "👋🏻1"]),
        "secret": ("group", False, ["Charles Babbage: Psst"], []),
        "direct": ("direct", False, ["Countess: Just us", "Charles Babbage: Yes"], []),
    }
    first = await world.db.fetchrow("SELECT * FROM message WHERE thread_order = 2 AND thread_root_id IS NULL")
    assert first is not None
    assert (first["reply_count"], first["mentions"], first["hashtags"]) == (2, [mentioned], ["general", "loom"])
    assert first["created_at"].timestamp() == pytest.approx(1700000002)
    assert [line for line in await shell.json("check") if not line["is_good"]] == []
    # A user who had left by then finds the conversation in their own data.
    mary = await world.db.fetchval("""SELECT id FROM "user" WHERE name = 'Mary Somerville'""")
    (hers,) = json.loads(await export.head(world.db, mary))["conversations"]
    assert (hers["participant"]["status"], hers["title"]) == ("left", None)
    assert 0 < hers["participant"]["version"] < first["sent_version"]
    # A second import changes nothing, and users can continue.
    await shell.run("import", "slack", str(path))
    assert await imported(world) == there
    one = await world.connect(ada)
    mine = await one.call(client.ListConversations(conversation_type="channel"), server.ConversationPage)
    (view,) = mine.conversations
    assert (view.unread_count, view.me.role) == (0, "owner")
    await one.call(message(view.conversation.id, "Going on"))
    page = await one.call(client.Search(text="engine"), server.SearchPage)
    assert len(page.hits) == 1


async def test_mattermost_export_is_imported(shell: Shell, world: World) -> None:
    await shell.run("import", "mattermost", str(SAMPLES / "mattermost.jsonl"))
    assert await imported(world) == {
        "Town Square": ("channel", True, ["Ada Lovelace: Hello #loom", "charles: A reply", "Ada Lovelace: Another"],
            ["🎉1"]),
        "The board": ("channel", False, ["Ada Lovelace: Alone here\n2023/plan.pdf"], []),
        "direct": ("direct", False, ["charles: Just us"], []),
    }  # fmt: skip
    assert [line for line in await shell.json("check") if not line["is_good"]] == []


async def test_files_that_are_not_exports_are_refused(shell: Shell, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.zip"
    nothing.write_text("PK no")
    missing = tmp_path / "missing"
    for kind, path in (("slack", tmp_path), ("slack", nothing), ("mattermost", nothing), ("mattermost", missing)):
        said = await shell.run("import", kind, str(path), status=1)
        assert ("cannot be read: No such file" if path == missing else "cannot be imported") in said
        assert "Errno" not in said


def test_sample_lines_are_json() -> None:
    assert all(json.loads(line) for line in (SAMPLES / "mattermost.jsonl").read_text().splitlines())
