"""`openchat import` for Slack and Mattermost exports: the mapping of accounts, untrusted archives, and bounds."""

import gc
import hashlib
import json
import random
import re
import shutil
import stat
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

import msgspec
import pytest
from msgspec import Meta

from protocol import client, limits
from protocol.ids import ConversationId, MessageId
from server.cli import maintenance
from server.core.terminal import plain
from server.ops.progress import Progress
from server.ops.transfer import load, plan, reading
from server.ops.transfer.mattermost import read as mattermost_read
from server.ops.transfer.origin import Origin
from server.ops.transfer.slack import read as slack_read
from server.queries.audit import Deed
from tests.test_administration import Shell
from tests.test_upkeep import SAMPLES, shell
from tests.world import UserSession, World, http_client

__all__ = ["shell"]
DIRECT = "SELECT count(*) FROM conversation_participant WHERE user_id = $1"


async def with_address(world: World, name: str, address: str) -> UserSession:
    """Return a user with an unverified email address."""
    who = await world.user(name)
    await world.db.execute('UPDATE "user" SET email = $2 WHERE id = $1', who.id, address)
    return who


@pytest.mark.parametrize("kind", ["slack", "mattermost"])
async def test_account_with_an_imported_address_does_not_get_imported_data(
    shell: Shell, world: World, kind: str
) -> None:
    path = str(SAMPLES / ("slack" if kind == "slack" else "mattermost.jsonl"))
    mallory = await with_address(world, "Mallory\x1b[2J", "ada@example.org")
    refused = await shell.run("import", kind, path, status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0
    # The list has the account's id, and its name is escaped.
    assert f"ada@example.org ({mallory.id})" in refused
    assert "Mallory\\x1b[2J" in refused
    assert "\x1b" not in refused
    await shell.run("import", kind, path, "--match-accounts", "none")
    assert await world.db.fetchval(DIRECT, mallory.id) == 0
    assert await world.db.fetchval("""SELECT count(*) FROM "user" WHERE email LIKE '%@invalid'""") >= 1
    assert [line for line in await shell.json("check") if not line["is_good"]] == []
    # Imported users that were mapped to an account stay mapped.
    await shell.run("import", kind, path)
    assert await world.db.fetchval(DIRECT, mallory.id) == 0


async def test_operator_confirms_exactly_the_listed_accounts(shell: Shell, world: World) -> None:
    path = str(SAMPLES / "slack")
    ada = await with_address(world, "Ada", "ada@example.org")
    code = re.findall(r"--match-accounts ([0-9a-f]{12})", await shell.run("import", "slack", path, status=1))[0]
    for wrong in ("0" * 12, "bad", ""):
        said = await shell.run("import", "slack", path, "--match-accounts", wrong, status=1)
        assert f"`--match-accounts {wrong}` is not the code of this list. " in said
        assert "Nothing was imported" in said
    assert "is not the code" not in await shell.run("import", "slack", path, status=1)
    # An account that takes an address after the list was printed is not covered by the confirmation.
    mallory = await with_address(world, "Mallory", "charles@example.org")
    refused = await shell.run("import", "slack", path, "--match-accounts", code, status=1)
    assert str(mallory.id) in refused
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0
    await world.db.execute("""UPDATE "user" SET email = 'mallory@example.org' WHERE id = $1""", mallory.id)
    await shell.run("import", "slack", path, "--match-accounts", code)
    assert await world.db.fetchval(DIRECT, ada.id) > 0
    assert await world.db.fetchval(DIRECT, mallory.id) == 0
    # The mapping is stored: a second import needs no confirmation, and other answers create no users.
    people = 'SELECT array_agg(id ORDER BY id) FROM "user"'
    before = await world.db.fetchval(people)
    for again in ((), ("--match-accounts", "none"), ("--match-accounts", code)):
        await shell.run("import", "slack", path, *again)
        assert await world.db.fetchval(people) == before, again
    # Another account that takes the address needs a new confirmation.
    await world.db.execute("""UPDATE "user" SET email = 'free@example.org' WHERE id = $1""", ada.id)
    await with_address(world, "Mallory", "ada@example.org")
    assert "Nothing was imported" in await shell.run("import", "slack", path, status=1)


async def test_import_of_a_missing_path_is_refused(shell: Shell, tmp_path: Path) -> None:
    for kind in ("slack", "mattermost", "openchat"):
        said = await shell.run("import", kind, str(tmp_path / "nonexistent"), status=1)
        assert "nonexistent cannot be read: No such file or directory. Nothing was imported." in said, kind


async def test_confirmation_does_not_cover_another_account_with_the_same_address(shell: Shell, world: World) -> None:
    path = str(SAMPLES / "slack")
    ada = await with_address(world, "Ada", "ada@example.org")
    code = re.findall(r"--match-accounts ([0-9a-f]{12})", await shell.run("import", "slack", path, status=1))[0]
    await world.db.execute("""UPDATE "user" SET email = 'free@example.org' WHERE id = $1""", ada.id)
    mallory = await with_address(world, "Ada", "ada@example.org")
    refused = await shell.run("import", "slack", path, "--match-accounts", code, status=1)
    assert f"ada@example.org ({mallory.id})" in refused
    assert f"use --match-accounts {code}" not in refused
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


async def test_account_with_a_generated_address_does_not_block_an_import(shell: Shell, world: World) -> None:
    squat = hashlib.sha256(b"slack U3").hexdigest()[:24]
    await with_address(world, "Mallory", f"{squat}@invalid")
    await shell.run("import", "slack", str(SAMPLES / "slack"))
    assert await world.db.fetchval("""SELECT count(*) FROM "user" WHERE name = 'Mary Somerville'""") == 1


async def test_imported_users_log_in_with_a_password_set_by_an_operator(shell: Shell, world: World) -> None:
    await shell.run("import", "slack", str(SAMPLES / "slack"))
    people = await world.db.fetch("""SELECT id, email FROM "user" WHERE name ~ '^(Ada|Mary)'""")
    login: dict[str, str] = {}
    async with http_client(world.url) as http:
        # Users imported without an address have a generated one to log in with.
        for who in people:
            given = await shell.json("user", "reset-password", str(who["id"]))
            assert given["email"] == who["email"]
            login = {"email": who["email"], "password": given["password"]}
            assert (await http.post("/v1/auth/login", json=login)).status_code == 200
        refused = await http.post("/v1/auth/login", json=login | {"password": "something else"})
        assert refused.status_code == 401
    assert len(people) == 2
    assert [line for line in await shell.json("check") if not line["is_good"]] == []


def slack(tmp_path: Path) -> Path:
    """Return a copy of an export, for a test to change."""
    return Path(shutil.copytree(SAMPLES / "slack", tmp_path / "slack"))


def zipped(tmp_path: Path) -> Path:
    return Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", SAMPLES / "slack"))


OWNERS = """
SELECT c.title, u.name FROM conversation c
JOIN conversation_participant p ON p.conversation_id = c.id AND p.status = 'active' AND p.role = 'owner'
JOIN "user" u ON u.id = p.user_id ORDER BY 1
"""


async def test_owner_of_an_imported_conversation_is_an_active_account(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    ada = await with_address(world, "Ada", "ada@example.org")
    await world.db.execute('UPDATE "user" SET is_active = false, email_verified = true WHERE id = $1', ada.id)
    path = slack(tmp_path)
    (path / "channels.json").write_text(json.dumps([
        {"id": f"C{number}", "name": f"{number}", "created": 1700000000, "creator": creator, "members": members}
        for number, (creator, members) in enumerate([
            ("U2", ["U3", "U2"]), ("U3", ["U3", "U1", "U2"]), ("U1", ["U3", "U1", "U2"]), ("U3", ["U1", "U3"]),
        ])
    ]))  # fmt: skip
    await shell.run("import", "slack", str(path))
    # Mary has left this conversation, and Ada has left that one. The last conversation has no active account.
    assert [row[1] for row in await world.db.fetch(OWNERS) if row[0] in set("0123")] == [
        "Charles Babbage", "Charles Babbage", "Charles Babbage", "Mary Somerville",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../users.json", "general/../../x.json", "..\\x.json", "C:\\x.json", "c:x.json", "a//b",
     "users.json", "nul\0.json", "./x.json"],
)  # fmt: skip
async def test_zip_entries_with_unsafe_names_are_refused(shell: Shell, tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as file:  # for a duplicate name
        entry = zipfile.ZipInfo("x" * len(name))
        entry.filename = name  # the constructor would truncate it
        file.writestr(entry, "[]")
    refused = await shell.run("import", "slack", str(path), status=1)
    assert "cannot be imported" in refused
    assert "\n" not in refused.strip()


async def test_links_are_not_followed(shell: Shell, world: World, tmp_path: Path) -> None:
    path = slack(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    stolen = [{"type": "message", "user": "U1", "ts": "1700000009.0", "text": "Stolen"}]
    (tmp_path / "elsewhere" / "2023.json").write_text(json.dumps(stolen))
    (path / "general" / "2024.json").symlink_to(tmp_path / "elsewhere" / "2023.json")
    assert "is a symbolic link" in await shell.run("import", "slack", str(path), status=1)
    (path / "general" / "2024.json").unlink()
    for outside in ("../elsewhere", str(tmp_path / "elsewhere"), ".."):
        channels = json.loads((path / "channels.json").read_text())
        channels[0]["name"] = outside
        (path / "channels.json").write_text(json.dumps(channels))
        assert "is not a valid file name" in await shell.run("import", "slack", str(path), status=1)
    link = zipfile.ZipInfo("general/2024.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = zipped(tmp_path)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, "../../elsewhere/2023.json")
    assert "is a symbolic link" in await shell.run("import", "slack", str(archive), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM message") == 0


async def test_folders_that_are_not_part_of_an_export_are_not_read(shell: Shell, world: World, tmp_path: Path) -> None:
    path = slack(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2023.json").write_text("[]")
    (path / "latest").symlink_to(tmp_path / "elsewhere")
    (path / "C:").symlink_to(path)
    (path / "nowhere").symlink_to(tmp_path / "missing")
    for name in ("a\\b", "c:d"):
        (path / name).mkdir()
        (path / name / "2023.json").write_text("[]")
    (path / "lost+found").mkdir(mode=0)
    printed = await shell.run("import", "slack", str(path))
    assert "no conversation has this folder" not in printed
    assert await world.db.fetchval("SELECT count(*) FROM message") > 0


@pytest.mark.parametrize("bound", ["MAX_FILE", "MAX_TOTAL", "MAX_FILES", "RATIO_FROM"])
async def test_unpacked_size_of_a_zip_file_is_bounded(
    shell: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    path = zipped(tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("general/2024.json", "[" + 200_000 * " " + "]")
    monkeypatch.setattr(reading, bound, {"MAX_FILES": 3, "MAX_TOTAL": 2_000}.get(bound, 100_000))
    assert "cannot be imported" in await shell.run("import", "slack", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM message") == 0
    monkeypatch.undo()
    monkeypatch.setenv("DATABASE_URL", world.settings.database_url)
    await shell.run("import", "slack", str(path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("users.json", "{"),
        ("users.json", "[1]"),
        ("users.json", '[{"name": "x"}]'),
        ("channels.json", '{"a": 1}'),
        ("general/2024.json", "[7]"),
        ("general/2024.json", '[{"type": "message", "user": "U1", "ts": "never"}]'),
        ("general/2024.json", '[{"type": "message", "user": "U1", "text": "x", "ts": "99999999999999.0"}]'),
        ("general/2024.json", 100_000 * "["),
    ],
)
async def test_error_about_a_malformed_file_names_it(
    shell: Shell, world: World, tmp_path: Path, file: str, text: str
) -> None:
    path = slack(tmp_path)
    (path / file).write_text(text)
    assert f"{file}: " in await shell.run("import", "slack", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"type": "post", "post": {}}', '{"type": "user", "user": 3}', 9_999 * "["]
)
async def test_error_about_a_malformed_line_names_it(shell: Shell, world: World, tmp_path: Path, line: str) -> None:
    path = tmp_path / "mattermost.jsonl"
    lines = (SAMPLES / "mattermost.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    assert "line 4: " in await shell.run("import", "mattermost", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


ADA = '{"type": "message", "user": "U1", '


async def test_second_import_reports_the_skipped_messages_of_each_conversation(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    shutil.copytree(SAMPLES / "slack", path := tmp_path / "slack")
    left_out = "messages without text, of bots, or of people who are not in the export were left out"
    assert (await shell.run("import", "slack", str(path))).count(f"channels.json: C1: {left_out}: 1\n") == 1
    again = await shell.run("import", "slack", str(path))
    assert again.count("exists already and was not changed\n") == 3
    assert "left out" not in again
    said = [f'{ADA}"ts": "{1700200000 + second}.0", "text": "Later"}}' for second in range(2)]
    bot = '{"type": "message", "subtype": "bot_message", "text": "x", "ts": "1700200009.0"}'
    (path / "general" / "2023-11-17.json").write_text(f"[{', '.join([*said, bot])}]")
    (path / "D1" / "2023-11-17.json").write_text(f"[{said[0]}]")
    later = await shell.run("import", "slack", str(path))
    left_out = "exists already and was not changed. Messages that it lacks, and that were left out:"
    assert f"channels.json: C1: this conversation {left_out} 2\n" in later
    assert f"dms.json: D1: this conversation {left_out} 1\n" in later
    assert "groups.json: G1: this conversation exists already and was not changed\n" in later
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE content = 'Later'") == 0
    # Another export of the same two users gives their conversation another key.
    await world.db.execute('UPDATE "user" SET email_verified = true')
    for file in path.rglob("*.json"):
        file.write_text(file.read_text().replace('"U1"', '"V1"').replace('"U2"', '"V2"'))
    other = await shell.run("import", "slack", str(path), "--source", "other")
    assert f"dms.json: D1: a direct conversation of these two users {left_out} 3\n" in other


async def test_every_message_of_an_archive_is_imported_or_counted_as_skipped(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    """Messages without a conversation and messages with a duplicate id are counted."""
    path = slack(tmp_path)
    at = '"ts": "1700300000.000100"'
    said = [f'{ADA}{at}, "text": "First"}}', f'{ADA}{at}, "text": "First"}}', f'{ADA}{at}, "text": "Second"}}']
    (path / "general" / "2023-11-18.json").write_text(f"[{', '.join(said)}]")
    (path / "gone").mkdir()
    (path / "gone" / "2023-11-18.json").write_text(f"[{said[0]}]")
    (path / "empty").mkdir()
    for source in (path, Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", path))):
        printed = await shell.run("import", "slack", str(source))
        assert "gone: no conversation has this folder. Its files were left out\n" in printed
        assert ("C1: messages with the id of another message were left out: 1\n" in printed) == (source == path)
        assert "empty: " not in printed
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE content IN ('First', 'Second')") == 1
    lines = [user("ada", "ada@elsewhere.org", "kept", "gone"), *channel("kept", "Kept"), channel("gone", "Gone")[1]]
    printed = await shell.run("import", "mattermost", mattermost(tmp_path / "m.jsonl", *lines))
    assert "line 5: no line defines the channel town/gone. Its messages were left out: 1\n" in printed
    assert await world.db.fetchval("SELECT array_agg(content) FROM message WHERE content IN ('Kept', 'Gone')") == [
        "Kept"
    ]


async def test_two_conversations_with_one_folder_are_refused(shell: Shell, tmp_path: Path) -> None:
    path = slack(tmp_path)
    (path / "groups.json").write_text('[{"id": "G9", "name": "general"}]')
    said = await shell.run("import", "slack", str(path), status=1)
    assert "groups.json: entry 1: G9 and C1 are different conversations with the same folder 'general'" in said


def test_time_to_read_a_conversation_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """An archive of 28 MB took three hours: for each of 500,000 conversations, all 300,000 files were scanned."""

    def steps(files: int) -> int:
        """Return the number of lines of code that run to read ten conversations in an archive."""
        path = tmp_path / f"{files}.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("users.json", '[{"id": "U1"}]')
            file.writestr("channels.json", json.dumps([{"id": f"C{number}"} for number in range(10)]))
            for number in range(files):
                file.writestr(f"C{number}/2024.json", "[]")
        places = slack_read(path).places
        count = 0

        def trace(_: FrameType, event: str, __: object) -> Callable[..., Any]:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        gc.collect()
        gc.disable()  # it would run finalizers of other tests, whose lines count
        sys.settrace(trace)
        for place in places:
            assert place.posts() == []
        sys.settrace(before)
        gc.enable()
        return count

    assert steps(500) == steps(10)


FOUND = [
    ("users.json", "[]", "users.json: the file has no users"),
    ("users.json", '[{"id": "U1", "name": "Ada", "team_id": [1]}]', "users.json: entry 1: [1] is not an id"),
    ("users.json", '[{"id": "U1", "name": "Ada"}, {"name": "x"}]', "users.json: entry 2: 'id' is missing"),
    ("channels.json", '[{"id": "C1", "name": "general"}, 1]', "channels.json: entry 2: "),
    ("general/2024.json", f'[{ADA}"ts": "1.0"}}, {ADA}"text": "x"}}]', "general/2024.json: entry 2: 'ts' is missing"),
    ("channels.json", '[{"id": "C7", "name": "x", "members": ["U1", 7]}]', "channels.json: entry 1: 7 is not an id"),
    ("channels.json", '[{"id": "C\\u202e", "name": "general"}]', "channels.json: entry 1: 'C\\u202e' is not an id"),
    ("users.json", '[{"id": "U1", "name": "a"}, {"id": "U1", "name": "b"}]',
     "users.json: U1: U1 and U1 (users.json: U1) are different people with the same U1"),
]  # fmt: skip


async def test_errors_about_a_slack_export_name_the_place(shell: Shell, world: World, tmp_path: Path) -> None:
    for number, (file, text, place) in enumerate(FOUND):
        path = slack(tmp_path / str(number))
        (path / file).write_text(text)
        assert place in await shell.run("import", "slack", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


async def test_errors_about_a_mattermost_export_name_the_place(shell: Shell, world: World, tmp_path: Path) -> None:
    path = tmp_path / "mattermost.jsonl"
    lines = (SAMPLES / "mattermost.jsonl").read_text().splitlines()
    number = next(at for at, line in enumerate(lines) if '"type": "channel"' in line)
    one = json.loads(lines[number])
    one["channel"]["purpose"] = 7
    path.write_text("\n".join([*lines[:number], json.dumps(one), *lines[number + 1 :]]))
    said = await shell.run("import", "mattermost", str(path), status=1)
    assert f"line {number + 1}: 7 is not a text" in said
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


async def test_a_file_with_too_many_values_or_messages_is_refused(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_VALUES", 1_000)
    text = "[" + ",".join(1_000 * ["{}"]) + "]"
    folder, lines = slack(tmp_path), tmp_path / "mattermost.jsonl"
    (folder / "general" / "2024.json").write_text(text)
    lines.write_text(text)
    for kind, path, place in (("slack", folder, "general/2024.json"), ("mattermost", lines, "line 1")):
        said = await shell.run("import", kind, str(path), status=1)
        assert f"{place}: the JSON has more than 1,000 values" in said
    monkeypatch.setattr(reading, "MAX_VALUES", 1_000_000)
    many = [user("ada", "ada@example.org"), *(line for name in "abc" for line in channel(name, name)), direct("d")]
    for most, what in ((0, "people"), (2, "conversations"), (3, "conversations")):
        monkeypatch.setattr(reading, "MAX_THINGS", most)
        export = mattermost(tmp_path / "many.jsonl", *many)
        said = await shell.run("import", "mattermost", export, status=1)
        assert re.search(rf"line \d+: there are more than {most} {what} up to here", said)
    for most, place in (
        (2, "users.json: there are more than 2 people"),
        (3, "json: there are more than 3 conversations"),
    ):
        monkeypatch.setattr(reading, "MAX_THINGS", most)
        more = slack(tmp_path / str(most))
        (more / "mpims.json").write_text('[{"id": "G7"}, {"id": "G8"}]')
        assert place in await shell.run("import", "slack", str(more), status=1)
    monkeypatch.setattr(reading, "MAX_THINGS", 500_000)
    monkeypatch.setattr(reading, "MAX_POSTS", 0)
    said = await shell.run("import", "mattermost", str(SAMPLES / "mattermost.jsonl"), status=1)
    assert re.search(r"line \d+: there are more than 0 messages in engines/town-square up to here", said)
    said = await shell.run("import", "slack", str(slack(tmp_path / "again")), status=1)
    assert "general/2023-11-14.json: there are more than 0 messages in general" in said


# ------------------------------------------------------------------------------------------------- ownership


def user(name: str, email: str, *channels: str) -> dict[str, Any]:
    teams = [{"name": "town", "channels": [{"name": channel} for channel in channels]}]
    return {"type": "user", "user": {"username": name, "email": email, "teams": teams}}


def channel(name: str, said: str, *, at_ms: int = 1700000000000) -> list[dict[str, Any]]:
    return [
        {"type": "channel", "channel": {"team": "town", "name": name, "type": "P"}},
        {"type": "post", "post": {
            "team": "town", "channel": name, "user": "ada", "message": said, "create_at": at_ms}},
    ]  # fmt: skip


def direct(said: str) -> dict[str, Any]:
    post = {"channel_members": ["ada", "bob"], "user": "bob", "message": said, "create_at": 1700000005000}
    return {"type": "direct_post", "direct_post": post}


def mattermost(path: Path, *lines: dict[str, Any]) -> str:
    """Write an export and return its path."""
    path.write_text("\n".join(json.dumps(line) for line in ({"type": "version", "version": 1}, *lines)))
    return str(path)


READS = """
SELECT array_agg(m.content ORDER BY m.content) FROM message m
JOIN conversation_participant p ON p.conversation_id = m.conversation_id AND p.status = 'active'
JOIN "user" u ON u.id = p.user_id WHERE u.email = $1
"""


async def test_users_of_another_server_are_other_users_even_with_equal_names(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    first = mattermost(tmp_path / "a", user("ada", "ada@a.example", "square"), *channel("square", "Of A"))
    theirs = [user("ada", "ada@b.example", "board"), user("bob", "bob@b.example"), *channel("board", "Of B"),
              direct("To Ada of B")]  # fmt: skip
    await shell.run("import", "mattermost", first)
    await shell.run("import", "mattermost", mattermost(tmp_path / "b", *theirs))
    assert await world.db.fetchval(READS, "ada@a.example") == ["Of A"]
    assert await world.db.fetchval(READS, "ada@b.example") == ["Of B", "To Ada of B"]
    # With a conversation of the same name, the import cannot tell whether it is the same server.
    both = [user("ada", "ada@c.example", "square"), *channel("square", "Of C", at_ms=1700000009000)]
    third = mattermost(tmp_path / "c", *both)
    refused = await shell.run("import", "mattermost", third, status=1)
    assert "line 3: an earlier import has a conversation town/square, too" in refused
    assert "use --source mattermost; otherwise" in refused
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 3
    said = ""
    for _ in range(2):
        said = await shell.run("import", "mattermost", third, "--source", "c")
        assert await world.db.fetchval(READS, "ada@c.example") == ["Of C"]
    assert "line 3: this conversation exists already and was not changed" in said
    # The same export needs no server name. The operator may state that it is the same server.
    await shell.run("import", "mattermost", first)
    assert "was not changed" in await shell.run(
        "import", "mattermost", third, "--source", "mattermost", "--match-accounts", "none"
    )
    assert await world.db.fetchval(READS, "ada@a.example") == ["Of A"]
    assert [line for line in await shell.json("check") if not line["is_good"]] == []


async def test_user_without_an_address_gets_no_data_of_another_workspace(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    def workspace(name: str, team: str | None, group: str) -> str:
        path = tmp_path / name
        (path / group).mkdir(parents=True)
        (path / "users.json").write_text(
            json.dumps([{"id": "U1", "name": "bot"} | ({"team_id": team} if team else {})])
        )
        groups = [{"id": group, "name": group, "created": 1700000000, "members": ["U1"]}]
        (path / "groups.json").write_text(json.dumps(groups))
        said = [{"type": "message", "user": "U1", "ts": "1700000001.0", "text": group}]
        (path / group / "2023.json").write_text(json.dumps(said))
        return str(path)

    await shell.run("import", "slack", workspace("a", None, "G1"))
    other = workspace("b", None, "G2")
    assert "U1 has no e-mail address" in await shell.run("import", "slack", other, status=1)
    await shell.run("import", "slack", workspace("c", "T3", "G3"))
    await shell.run("import", "slack", workspace("d", "T4", "G4"))
    await shell.run("import", "slack", other, "--source", "slack")
    said = [sorted(row[0]) for row in await world.db.fetch("SELECT array_agg(content) FROM message GROUP BY sender_id")]
    assert sorted(said) == [["G1", "G2"], ["G3"], ["G4"]]


async def test_client_cannot_block_an_import_by_taking_its_ids(shell: Shell, world: World) -> None:
    """When ids depended on the archive alone, a client could take the id of a channel to be imported."""

    def predicted_id(at_ms: int, *parts: str) -> UUID:
        random = int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:10])
        return UUID(int=at_ms << 80 | 7 << 76 | (random >> 68) << 64 | 2 << 62 | random & 0x3FFF_FFFF_FFFF_FFFF)

    mallory = await world.connect(await world.user("Mallory"))
    channel_id = ConversationId(predicted_id(1700000000000, "slack", "C1"))
    await mallory.call(client.CreateChannel(conversation_id=channel_id, title="Mine"))
    message_id = MessageId(predicted_id(1700000002000, "slack", "C1", "1700000002.000100"))
    await mallory.call(client.Send(conversation_id=channel_id, message_id=message_id, content="Mine"))
    await shell.run("import", "slack", str(SAMPLES / "slack"))
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 4
    assert await world.db.fetchval("SELECT count(*) FROM message") == 8
    assert [line for line in await shell.json("check") if not line["is_good"]] == []


async def test_import_that_violates_a_constraint_imports_nothing_and_names_the_place(
    shell: Shell, world: World
) -> None:
    mallory = await world.connect(await world.user("Mallory"))
    origin = await Origin.of(world.db, "slack", "slack")
    own = await world.channel(mallory)
    taken = MessageId(origin.made_id(1700000110000, "G1", "1700000110.000000"))
    await mallory.call(client.Send(conversation_id=own, message_id=taken, content="Mine"))
    refused = await shell.run("import", "slack", str(SAMPLES / "slack"), status=1)
    assert "secret/2023-11-14.json: 1700000110.000000: this row of message was refused: its id" in refused
    assert await world.db.fetchval("SELECT count(*) FROM message") == 1
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 1


async def test_erased_user_is_not_imported_again(shell: Shell, world: World, tmp_path: Path) -> None:
    people = [user("ada", "ada@a.example", "one", "two"), user("bob", "bob@a.example", "one", "two", "three")]
    one, two = channel("one", "First"), channel("two", "Second")
    await shell.run("import", "mattermost", mattermost(tmp_path / "a", *people, *one))
    ada = await world.db.fetchval("""SELECT id FROM "user" WHERE email = 'ada@a.example'""")
    await shell.run("erase", str(ada), "--yes")
    await shell.run("import", "mattermost", mattermost(tmp_path / "b", *people, *one, *two, direct("To Ada")))
    parts = await world.db.fetch(
        "SELECT m.content, p.role, p.status FROM conversation_participant p"
        " JOIN message m ON m.conversation_id = p.conversation_id WHERE p.user_id = $1", ada
    )  # fmt: skip
    assert sorted(map(tuple, parts)) == [
        ("First", "owner", "left"), ("Second", "member", "left"), ("To Ada", "member", "left"),
    ]  # fmt: skip
    assert await world.db.fetchval(READS, "bob@a.example") == ["First", "Second", "To Ada"]
    assert [line for line in await shell.json("check") if not line["is_good"]] == []
    # A user who is erased between the plan and the import is not imported either.
    found = mattermost_read(Path(mattermost(tmp_path / "c", *people, *channel("three", "Third"))))
    planned = await plan.plan(world.db, found)
    bob = await world.db.fetchval("""SELECT id FROM "user" WHERE email = 'bob@a.example'""")
    await shell.run("erase", str(bob), "--yes")
    with pytest.raises(ValueError, match="a user was erased during the import"):
        await load.load(world.db, planned.rows, Progress(is_on=False), is_whole=False, deed=Deed(None, "import"))
    said = await shell.run("import", "mattermost", mattermost(tmp_path / "d", *people, *channel("four", "Alone")))
    assert "line 4: all participants are erased, so the conversation was left out" in said
    assert [line for line in await shell.json("check") if not line["is_good"]] == []


# ---------------------------------------------------------------------------------------------- contents


def test_zip_file_over_a_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr("users.json", "[]" + 500 * " ")
        with pytest.raises(ValueError, match=r"'users.json' is not compressed with deflate"):
            slack_read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("users.json", "[]")
    packed = bytearray(path.read_bytes())
    packed[packed.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"'users.json' is encrypted. Create the zip file without a password"):
        slack_read(path)


def test_broken_zip_file_is_refused_with_a_clear_error(tmp_path: Path) -> None:
    whole, path, chance = zipped(tmp_path).read_bytes(), tmp_path / "a.zip", random.Random(5)
    refused = 0
    for _ in range(150):
        broken = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.choice([1, 1, 2, 5])):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            for place in slack_read(path).places:
                place.posts()
        except (*maintenance.NOT_UNDERSTOOD, OSError):
            refused += 1
    assert refused > 30


async def test_error_about_a_duplicate_address_names_both_users(shell: Shell, tmp_path: Path) -> None:
    twice = mattermost(tmp_path / "a", user("ada", "Ada@a.example"), user("bob", "ada@A.example"))
    refused = await shell.run("import", "mattermost", twice, status=1)
    assert "line 3: bob and ada (line 2) are different people with the same ada@a.example" in refused


async def test_timestamps_in_the_future_are_refused(shell: Shell, tmp_path: Path) -> None:
    for at_ms in (int(time.time() * 1000) + 7_200_000, 140_000_000_000_000, 1 << 60):
        late = mattermost(tmp_path / "a", user("ada", "ada@a.example"), *channel("one", "Late", at_ms=at_ms))
        assert f"line 4: {at_ms} is not a time" in await shell.run("import", "mattermost", late, status=1)


async def test_number_of_conversations_per_user_is_bounded(
    shell: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "MAX_MEMBERSHIPS", 1)
    one = [user("ada", "ada@a.example", "one"), *channel("one", "First")]
    await shell.run("import", "mattermost", mattermost(tmp_path / "a", *one))
    more = mattermost(tmp_path / "b", user("ada", "ada@a.example", "one", "two"), *one[1:], *channel("two", "Second"))
    refused = await shell.run("import", "mattermost", more, status=1)
    assert "ada would participate in more than 1 conversations" in refused
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 1


HIDDEN = "\u202e\x1b[2J\n\0\u200b"
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Moment: TypeAlias = Annotated[str, Meta(pattern=r"^(19[7-9]|20[0-2])\d-")]
WRITTEN: dict[str, Any] = {
    "user": {"id": UUID, "name": limits.Name, "display_name": limits.Name | None, "email": limits.KnownEmail,
             "is_active": bool},
    "conversation": {
        "id": UUID, "type": Literal["channel", "group", "direct"], "title": limits.Title | None,
        "description": limits.Description | None, "is_public": bool, "is_archived": bool, "is_active": bool,
        "created_by": UUID, "participant_count": Count, "message_count": Count, "direct_low": UUID | None,
        "direct_high": UUID | None, "version": Count, "access_version": Count, "settings_version": Count,
        "created_at": Moment, "last_activity_at": Moment, "last_message_at": Moment | None},
    "conversation_participant": {
        "id": UUID, "conversation_id": UUID, "user_id": UUID, "role": Literal["owner", "member"],
        "status": Literal["active", "left"], "version": Count, "joined_version": Count, "left_version": Count,
        "last_read_version": Count},
    "message": {
        "id": UUID, "conversation_id": UUID, "sender_id": UUID, "content": limits.Content,
        "mentions": Annotated[list[UUID], Meta(max_length=limits.MAX_MENTIONS)],
        "hashtags": Annotated[list[str], Meta(max_length=limits.MAX_HASHTAGS)],
        "reactions": Annotated[dict[limits.Emoji, Count], Meta(max_length=limits.MAX_EMOJI_PER_MESSAGE)],
        "parent_message_id": UUID | None, "thread_root_id": UUID | None, "thread_order": Count, "reply_count": Count,
        "status": Literal["sent", "edited"], "edited_at": Moment | None, "sent_version": Count, "version": Count,
        "created_at": Moment},
    "message_reaction": {
        "message_id": UUID, "user_id": UUID, "emoji": limits.Emoji, "conversation_id": UUID, "version": Count,
        "author_id": UUID, "created_at": Moment},
    "thread_follow": {
        "root_id": UUID, "user_id": UUID, "conversation_id": UUID, "has_replied": bool, "is_following": bool,
        "last_read_order": Count},
}  # fmt: skip
"""Every column that an import writes, with the bounds that client frames have for it."""


async def test_imported_fields_have_the_bounds_of_client_frames(world: World, tmp_path: Path) -> None:
    long = HIDDEN + 20_000 * "x"
    path = tmp_path / "slack"
    (path / "C1").mkdir(parents=True)
    people = [{"id": f"U{number}", "real_name": name, "profile": {"email": email, "display_name": name}}
              for number, (name, email) in enumerate([(long, f"{long}@a.example"), (HIDDEN, "a\u202e@a.example"),
                                                      ("Ada", "ada@a.invalid"), ("", "ada@a.example")])]  # fmt: skip
    (path / "users.json").write_text(json.dumps(people))
    channels = [{"id": "C1", "name": "C1", "members": ["U0", "U1"], "purpose": {"value": long}},
                {"id": "C2", "name": HIDDEN.replace("\0", "x"), "members": ["U0"], "created": 1700000000}]  # fmt: skip
    (path / "channels.json").write_text(json.dumps(channels))
    (path / "mpims.json").write_text(json.dumps([{"id": "G1", "name": "\u202e", "members": ["U0", "U1", "U2"]}]))
    reactions = [{"name": name, "users": ["U0", "U1"]} for name in ("tada", long, HIDDEN, *map(str, range(50)))]
    said = [{"type": "message", "user": "U0", "ts": f"170000000{number}.0", "text": words, "thread_ts": "1700000002.0",
             "reactions": reactions, "edited": {"ts": "1700000009.0"}}
            for number, words in enumerate(["\0", "", long, "<@U1> " + "#a1 " * 99 + long, "\0<@U9>"])]  # fmt: skip
    (path / "C1" / "2023.json").write_text(json.dumps(said))
    planned = await plan.plan(world.db, slack_read(path))
    seen = set()
    for line in planned.rows:
        row = msgspec.json.decode(line.row.row)
        assert row.keys() == WRITTEN[line.row.table].keys()
        for column, value in row.items():
            msgspec.convert(value, WRITTEN[line.row.table][column], strict=False)
        seen.add(line.row.table)
    assert seen == WRITTEN.keys()
    assert [note for note in planned.notes if "address" in note] == [
        f"users.json: U{number}: the e-mail address is invalid and was left out" for number in range(3)
    ]


def test_nesting_depth_ignores_brackets_in_strings() -> None:
    assert reading.depth(b'{"a": [[1], "[[[[\\"[["]}') == 3
    assert plain("Zoë 🎉") == "Zoë 🎉"
