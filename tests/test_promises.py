"""SECURITY.md and docs/limits.md name tests for what they promise; and the promises that no other file tests."""

import re
from pathlib import Path

import msgspec

from server.config import Settings
from tests.world import World

ROOT = Path(__file__).parents[1]
TEST = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)
LINK = re.compile(r"\[[^]]+\]\((tests/[^)]+)\)")


def rows(page: str) -> list[list[str]]:
    """Return the cells of each row of a page's first table, without the heading."""
    table = re.search(r"(?:^\| .*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[0].splitlines()[2:]]


def defined_in(path: Path) -> set[str]:
    return set(TEST.findall(path.read_text()))


def test_every_promise_names_a_test_that_exists() -> None:
    found = rows("SECURITY.md")
    assert len(found) > 40
    problems = []
    for promise, *_, cell in found:
        there = {file: defined_in(ROOT / file) for file in LINK.findall(cell)}
        named = set(re.findall(r"`(test_\w+)`", cell))
        if not named or not there:
            problems.append(f"{promise}: name a test, and link its file")
        problems += [f"{promise}: no {name} in {[*there]}" for name in named - set().union(*there.values())]
        problems += [f"{promise}: name a test of {file}" for file, tests in there.items() if not named & tests]
    assert problems == []


def test_every_bound_names_a_test_that_exists() -> None:
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined_in(path)}
    page = (ROOT / "docs" / "limits.md").read_text()
    assert [name for name in re.findall(r"`(test_\w+)`", page) if name not in there] == []
    found = rows("docs/limits.md")
    assert len(found) > 70
    assert [cells[0] for cells in found if len(cells) != 4 or "`test_" not in cells[-1]] == []


def test_without_settings_it_listens_on_loopback() -> None:
    assert Settings().host == "127.0.0.1"


async def test_no_setting_is_a_secret(world: World) -> None:
    """The databases' addresses may hold passwords, which are theirs."""
    names = [field.name for field in msgspec.structs.fields(Settings)]
    assert [name for name in names if re.search("secret|key|token|password|salt", name)] == []
    assert await world.db.fetchval("SELECT count(*) FROM server_key WHERE name = 'vapid'") == 1


def test_everything_that_is_installed_is_pinned_with_its_hash() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        wanted = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in " #"]
        assert len(wanted) > 10
        lock = (ROOT / name).read_text().replace("\\\n", " ")
        loose = [line for line in lock.splitlines() if line and line[0] not in " #" and "--hash=sha256:" not in line]
        assert loose == []
        assert [line for line in wanted if "==" not in line] == []
    for name in ("Makefile", "Dockerfile"):
        installs = [one for one in re.findall(r"pip install .*", (ROOT / name).read_text()) if "atheris" not in one]
        assert installs
        assert [line for line in installs if "--require-hashes" not in line and "--no-deps" not in line] == []
