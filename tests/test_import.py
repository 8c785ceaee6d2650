"""Bringing in what another chat has exported: who becomes whom, and what an archive may be called and unpack to."""

import hashlib
import json
import re
import shutil
import stat
import warnings
import zipfile
from pathlib import Path

import pytest

from server.terminal import plain
from server.transfer import reading
from tests.test_administration import Shell
from tests.test_upkeep import SAMPLES, shell
from tests.world import Somebody, World, http_client

__all__ = ["shell"]
DIRECT = "SELECT count(*) FROM conversation_participant WHERE user_id = $1"


async def with_address(world: World, name: str, address: str) -> Somebody:
    """Return somebody who has registered an address, which nobody has verified."""
    who = await world.user(name)
    await world.db.execute('UPDATE "user" SET email = $2 WHERE id = $1', who.id, address)
    return who


@pytest.mark.parametrize("kind", ["slack", "mattermost"])
async def test_who_registers_an_address_gets_nothing_of_the_person_who_has_it(
    shell: Shell, world: World, kind: str
) -> None:
    path = str(SAMPLES / ("slack" if kind == "slack" else "mattermost.jsonl"))
    mallory = await with_address(world, "Mallory\x1b[2J", "ada@example.org")
    refused = await shell.run("import", kind, path, status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0
    # The list shows whom it is about, and what the names hold.
    assert f"ada@example.org ({mallory.id})" in refused
    assert "Mallory\\x1b[2J" in refused
    assert "\x1b" not in refused
    await shell.run("import", kind, path, "--match-accounts", "none")
    assert await world.db.fetchval(DIRECT, mallory.id) == 0
    assert await world.db.fetchval("""SELECT count(*) FROM "user" WHERE email LIKE '%@invalid'""") >= 1
    assert [line for line in await shell.json("check") if not line["is_good"]] == []
    # Who came in as somebody else has been decided about.
    await shell.run("import", kind, path)
    assert await world.db.fetchval(DIRECT, mallory.id) == 0


async def test_an_operator_confirms_the_list_that_was_shown(shell: Shell, world: World) -> None:
    path = str(SAMPLES / "slack")
    ada = await with_address(world, "Ada", "ada@example.org")
    code = re.findall(r"--match-accounts ([0-9a-f]{12})", await shell.run("import", "slack", path, status=1))[0]
    assert "Nothing was brought in" in await shell.run("import", "slack", path, "--match-accounts", "0" * 12, status=1)
    # Somebody takes another address meanwhile: they are not on the list that was confirmed.
    mallory = await with_address(world, "Mallory", "charles@example.org")
    refused = await shell.run("import", "slack", path, "--match-accounts", code, status=1)
    assert str(mallory.id) in refused
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0
    await world.db.execute("""UPDATE "user" SET email = 'mallory@example.org' WHERE id = $1""", mallory.id)
    await shell.run("import", "slack", path, "--match-accounts", code)
    assert await world.db.fetchval(DIRECT, ada.id) > 0
    assert await world.db.fetchval(DIRECT, mallory.id) == 0


async def test_another_account_with_the_same_address_is_not_the_one_that_was_confirmed(
    shell: Shell, world: World
) -> None:
    path = str(SAMPLES / "slack")
    ada = await with_address(world, "Ada", "ada@example.org")
    code = re.findall(r"--match-accounts ([0-9a-f]{12})", await shell.run("import", "slack", path, status=1))[0]
    await world.db.execute("""UPDATE "user" SET email = 'free@example.org' WHERE id = $1""", ada.id)
    mallory = await with_address(world, "Ada", "ada@example.org")
    refused = await shell.run("import", "slack", path, "--match-accounts", code, status=1)
    assert f"ada@example.org ({mallory.id})" in refused
    assert code not in refused
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


async def test_address_of_somebody_stops_no_import(shell: Shell, world: World) -> None:
    squat = hashlib.sha256(b"slack U3").hexdigest()[:24]
    await with_address(world, "Mallory", f"{squat}@invalid")
    await shell.run("import", "slack", str(SAMPLES / "slack"))
    assert await world.db.fetchval("""SELECT count(*) FROM "user" WHERE name = 'Mary Somerville'""") == 1


async def test_password_that_an_operator_gives_lets_imported_people_in(shell: Shell, world: World) -> None:
    await shell.run("import", "slack", str(SAMPLES / "slack"))
    people = await world.db.fetch('SELECT id, email FROM "user" ORDER BY name')
    async with http_client(world.url) as http:
        # Also who was imported without an address has one to log in with.
        for who in people:
            given = await shell.json("user", "reset-password", str(who["id"]))
            assert given["email"] == who["email"]
            for password, status in (("something else", 401), (given["password"], 200)):
                login = {"email": who["email"], "password": password}
                assert (await http.post("/v1/auth/login", json=login)).status_code == status
    assert len(people) == 3
    assert [line for line in await shell.json("check") if not line["is_good"]] == []


def slack(tmp_path: Path) -> Path:
    """Return a copy of an export, to be spoiled."""
    return Path(shutil.copytree(SAMPLES / "slack", tmp_path / "slack"))


def zipped(tmp_path: Path) -> Path:
    return Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", SAMPLES / "slack"))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../users.json", "general/../../x.json", "..\\x.json", "C:\\x.json", "c:x.json", "a//b",
     "users.json", "nul\0.json", "./x.json"],
)  # fmt: skip
async def test_names_that_lead_out_of_a_zip_file_are_refused(shell: Shell, tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as file:  # of a name that is twice in it
        entry = zipfile.ZipInfo("x" * len(name))
        entry.filename = name  # the constructor would cut it
        file.writestr(entry, "[]")
    refused = await shell.run("import", "slack", str(path), status=1)
    assert "is not understood" in refused
    assert "\n" not in refused.strip()


async def test_links_are_not_followed(shell: Shell, world: World, tmp_path: Path) -> None:
    path = slack(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    stolen = [{"type": "message", "user": "U1", "ts": "1700000009.0", "text": "Stolen"}]
    (tmp_path / "elsewhere" / "2023.json").write_text(json.dumps(stolen))
    (path / "general" / "2024.json").symlink_to(tmp_path / "elsewhere" / "2023.json")
    assert "is a link" in await shell.run("import", "slack", str(path), status=1)
    (path / "general" / "2024.json").unlink()
    for outside in ("../elsewhere", str(tmp_path / "elsewhere"), ".."):
        channels = json.loads((path / "channels.json").read_text())
        channels[0]["name"] = outside
        (path / "channels.json").write_text(json.dumps(channels))
        assert "is not the name of a file in it" in await shell.run("import", "slack", str(path), status=1)
    link = zipfile.ZipInfo("general/2024.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = zipped(tmp_path)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, "../../elsewhere/2023.json")
    assert "is a link" in await shell.run("import", "slack", str(archive), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM message") == 0


@pytest.mark.parametrize("bound", ["MAX_FILE", "MAX_TOTAL", "MAX_FILES", "RATIO_FROM"])
async def test_what_a_zip_file_becomes_is_bounded(
    shell: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    path = zipped(tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("general/2024.json", "[" + 200_000 * " " + "]")
    monkeypatch.setattr(reading, bound, {"MAX_FILES": 3, "MAX_TOTAL": 2_000}.get(bound, 100_000))
    assert "is not understood" in await shell.run("import", "slack", str(path), status=1)
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
async def test_a_malformed_file_is_named(shell: Shell, world: World, tmp_path: Path, file: str, text: str) -> None:
    path = slack(tmp_path)
    (path / file).write_text(text)
    assert f"{file}: " in await shell.run("import", "slack", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"type": "post", "post": {}}', '{"type": "user", "user": 3}', 9_999 * "["]
)
async def test_a_malformed_line_is_named(shell: Shell, world: World, tmp_path: Path, line: str) -> None:
    path = tmp_path / "mattermost.jsonl"
    lines = (SAMPLES / "mattermost.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    assert "line 4: " in await shell.run("import", "mattermost", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


ADA = '{"type": "message", "user": "U1", '
FOUND = [
    ("users.json", '[{"id": "U1", "name": "Ada"}, {"name": "x"}]', "users.json: entry 2: 'id' is missing"),
    ("channels.json", '[{"id": "C1", "name": "general"}, 1]', "channels.json: entry 2: "),
    ("general/2024.json", f'[{ADA}"ts": "1.0"}}, {ADA}"text": "x"}}]', "general/2024.json: entry 2: 'ts' is missing"),
    ("channels.json", '[{"id": "C7", "name": "general", "purpose": {"value": "\\u0000"}}]',
     "channels.json: C7: this row of conversation is refused: "),
]  # fmt: skip


async def test_what_is_refused_of_slack_can_be_found(shell: Shell, world: World, tmp_path: Path) -> None:
    for number, (file, text, place) in enumerate(FOUND):
        path = slack(tmp_path / str(number))
        (path / file).write_text(text)
        assert place in await shell.run("import", "slack", str(path), status=1)
    assert await world.db.fetchval("SELECT count(*) FROM conversation") == 0


async def test_what_is_refused_of_mattermost_can_be_found(shell: Shell, world: World, tmp_path: Path) -> None:
    path = tmp_path / "mattermost.jsonl"
    lines = (SAMPLES / "mattermost.jsonl").read_text().splitlines()
    number = next(at for at, line in enumerate(lines) if '"type": "channel"' in line)
    one = json.loads(lines[number])
    one["channel"]["purpose"] = "\0"
    path.write_text("\n".join([*lines[:number], json.dumps(one), *lines[number + 1 :]]))
    said = await shell.run("import", "mattermost", str(path), status=1)
    assert f"line {number + 1}: this row of " in said
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
        assert f"{place}: it holds more than 1,000 values" in said
    monkeypatch.setattr(reading, "MAX_VALUES", 1_000_000)
    monkeypatch.setattr(reading, "MAX_POSTS", 0)
    said = await shell.run("import", "mattermost", str(SAMPLES / "mattermost.jsonl"), status=1)
    assert re.search(r"line \d+: there are more than 0 messages in engines/town-square up to here", said)
    said = await shell.run("import", "slack", str(slack(tmp_path / "again")), status=1)
    assert "general/2023-11-14.json: there are more than 0 messages in general" in said


def test_depth_is_of_what_is_outside_of_strings() -> None:
    assert reading.depth(b'{"a": [[1], "[[[[\\"[["]}') == 3
    assert plain("Zoë 🎉") == "Zoë 🎉"
