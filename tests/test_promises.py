"""SECURITY.md and docs/limits.md name tests for what they promise; and the promises that no other file tests."""

import re
from pathlib import Path

import msgspec

from protocol import limits
from protocol.limits import Limits, RateLimit
from server.config import Settings, variable
from server.limits import BURST_SECONDS
from tests.world import World

ROOT = Path(__file__).parents[1]
TEST = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)
LINK = re.compile(r"\[[^]]+\]\((tests/[^)]+)\)")


def rows(text: str) -> list[list[str]]:
    """Return the cells of each row of a text's tables, without the headings."""
    tables = re.findall(r"(?:^\| .*\n)+", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.removesuffix("|").removeprefix("|").split("|")] for line in lines]


def parts_of_limits() -> tuple[str, str]:
    """Return what docs/limits.md tells the users of the server, and the bounds with their tests."""
    page = (ROOT / "docs" / "limits.md").read_text()
    first, _, rest = page.partition("\n## Every bound, and its test\n")
    return first, rest.partition("\n## ")[0]


def defined_in(path: Path) -> set[str]:
    return set(TEST.findall(path.read_text()))


def test_every_promise_names_a_test_that_exists() -> None:
    found = rows((ROOT / "SECURITY.md").read_text())
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
    found = rows(parts_of_limits()[1])
    assert len(found) > 150
    assert [cells[0] for cells in found if len(cells) != 4 or "`test_" not in cells[-1]] == []


def in_words(value: float) -> set[str]:
    """Return the ways in which a page writes a number, of bytes or others."""
    whole = int(value)
    return {f"{whole:,}", *(f"{whole // size} {unit}" for size, unit in ((1 << 10, "KiB"), (1 << 20, "MiB"))
            if whole % size == 0)}  # fmt: skip


def test_limits_that_users_read_are_those_of_the_code() -> None:
    """Each has the number of the setting, the field of `ready.limits` or the constant in its row; none is missing."""
    page = parts_of_limits()[0]
    settings = {variable(name): getattr(Settings(), name) for name in Settings.__struct_fields__}
    told = {name: getattr(Settings().limits, name) for name in Limits.__struct_fields__}
    named = set()
    for cells in rows(page):
        for name in re.findall(r"`(\w+)`", " ".join(cells[3:])):
            named.add(name)
            value = settings.get(name, told.get(name, getattr(limits, name, None)))
            if isinstance(value, RateLimit):
                assert cells[1] == f"{value.per_second:g}", cells
                assert value.burst == value.per_second * (BURST_SECONDS - 1)
                continue
            assert value is not None, name
            assert cells[1] in in_words(value), cells
            if name.endswith("_RATE"):
                assert cells[2] == f"{value * BURST_SECONDS:,.0f}", cells
    bounds = {name for name in settings if re.search("_RATE|_PER_|_ATTEMPTS|OUTBOX", name)}
    assert bounds | told.keys() - {"further_tokens"} <= named


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
