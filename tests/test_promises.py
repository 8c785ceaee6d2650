"""The promises of SECURITY.md and docs/limits.md name tests, and the promises that no other file tests."""

import re
from pathlib import Path

import msgspec

from protocol import limits
from protocol.limits import Limits, RateLimit
from server.core.config import Settings, variable
from server.limits.advertised import advertised
from server.limits.token_bucket import BURST_SECONDS
from tests.world import World

ROOT = Path(__file__).parents[1]
TEST = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)

PROMISE_CHARACTERS = 130
"""Max characters of a promise in SECURITY.md."""

HOW_CHARACTERS = 350
"""Max characters of how a promise is kept, and of what is not promised beside it."""


def rows(text: str) -> list[list[str]]:
    """Return the cells of each row of a text's tables, without the headings."""
    tables = re.findall(r"(?:^\| .*\n)+", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.removesuffix("|").removeprefix("|").split("|")] for line in lines]


def parts_of_limits() -> tuple[str, str]:
    """Return the first part of docs/limits.md, for users of the server, and the table of bounds with their tests."""
    page = (ROOT / "docs" / "limits.md").read_text()
    first, _, rest = page.partition("\n## Every bound, and its test\n")
    return first, rest.partition("\n## ")[0]


def defined_in(path: Path) -> set[str]:
    return set(TEST.findall(path.read_text()))


def one_line(text: str) -> str:
    return " ".join(text.split())


def faults_of(item: str) -> list[str]:
    """Return the faults of an item of SECURITY.md: a promise, how it is kept, and its tests."""
    first, *points = (one_line(part) for part in re.split(r"^  - ", item, flags=re.MULTILINE))
    tests = points.pop() if points else ""
    found = []
    if not (head := re.fullmatch(r"\*\*([^*]+\.)\*\* ?(.*)", first)):
        return [f"{first}: write the promise in bold"]
    promise, how = head.groups()
    if len(promise) > PROMISE_CHARACTERS or ". " in promise:
        found.append(f"{promise}: write one sentence of at most {PROMISE_CHARACTERS} characters")
    if max(len(text) for text in (how, *points)) > HOW_CHARACTERS:
        found.append(f"{promise}: write at most {HOW_CHARACTERS} characters of how, and of what is not promised")
    if len(points) > 1 or not all(point.startswith("Not promised: ") for point in points):
        found.append(f"{promise}: only `Not promised: …` stands between how it is kept and its tests")
    if any(line and not line.startswith("  ") for line in item.splitlines()[1:]):
        found.append(f"{promise}: indent what belongs to it, and nothing else follows")
    linked = re.findall(r"\((tests/[^)]+)\)([^[]*)", tests)
    if not tests.startswith("Tests: [") or not linked:
        found.append(f"{promise}: its last point is `Tests: `, with a link to each file")
    for file, names in linked:
        named = set(re.findall(r"`(test_\w+)`", names))
        there = defined_in(ROOT / file) if (ROOT / file).is_file() else set()
        if not named:
            found.append(f"{promise}: name a test of {file}")
        found += [f"{promise}: no {name} in {file}" for name in sorted(named - there)]
    return found


def faults(page: str) -> list[str]:
    """Return the faults of a page like SECURITY.md: sections of promises, each of which names its tests."""
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE):
        introduction, *items = re.split(r"^- ", section, flags=re.MULTILINE)
        if "**" in introduction or "`test_" in introduction:
            found.append(f"{introduction}: make each promise an item")
        found += [fault for item in items for fault in faults_of(item)]
    return found


def test_every_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert len(re.findall(r"^- \*\*", page, re.MULTILINE)) > 100
    assert faults(page) == []


def test_each_fault_of_a_promise_is_found() -> None:
    sound = "test_without_settings_it_listens_on_loopback"
    page = f"""# Head

## Section

An introduction.

- **It listens on loopback.** Since it
  says so.
  - Not promised: that it says
    anything.
  - Tests: [test_promises.py](tests/test_promises.py) `{sound}`,
    `{sound}`: both ways
- **It does nothing.**
  - Tests: [test_promises.py](tests/test_promises.py) `{sound}`
"""
    tests = page[page.rindex("  - Tests") :]
    assert faults(page) == []
    for old, new, fault in (
        (tests, "", "its last point is"),
        (tests, tests.replace("Tests: ", "Not promised: "), "its last point is"),
        (f"`{sound}`\n", "\n", "name a test of tests/test_promises.py"),
        (f"`{sound}`\n", "`test_of_nothing`\n", "no test_of_nothing in tests/test_promises.py"),
        ("(tests/test_promises.py) `", "(tests/test_house.py) `", f"no {sound} in tests/test_house.py"),
        ("(tests/test_promises.py) `", "(tests/test_nowhere.py) `", f"no {sound} in tests/test_nowhere.py"),
        ("It does nothing", "It does " + "nothing " * 20, "one sentence of at most"),
        ("It does nothing", "It does nothing. It is silent", "one sentence of at most"),
        ("Since it", "Since it " * 60, "write at most"),
        ("that it says", "that it says " * 60, "write at most"),
        ("Not promised: that", "Promised: that", "only `Not promised: …`"),
        ("**It does nothing.**", "It does nothing.", "in bold"),
        ("- **It does", "**It does", "indent"),
        ("An introduction.", f"**It does more.** `{sound}`", "make each promise an item"),
        (tests, f"{tests}\n| It does more | somehow | `{sound}` |\n", "indent"),
    ):
        assert old in page
        assert any(fault in one for one in faults(page.replace(old, new))), (new, faults(page.replace(old, new)))


def test_every_bound_names_a_test_that_exists() -> None:
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined_in(path)}
    page = (ROOT / "docs" / "limits.md").read_text()
    assert [name for name in re.findall(r"`(test_\w+)`", page) if name not in there] == []
    found = rows(parts_of_limits()[1])
    assert len(found) > 150
    assert [cells[0] for cells in found if len(cells) != 4 or "`test_" not in cells[-1]] == []


def in_words(value: float) -> set[str]:
    """Return the forms in which a page writes a number, of bytes or others."""
    whole = int(value)
    return {f"{whole:,}", *(f"{whole // size} {unit}" for size, unit in ((1 << 10, "KiB"), (1 << 20, "MiB"))
            if whole % size == 0)}  # fmt: skip


def test_limits_that_users_read_are_those_of_the_code() -> None:
    """Each row has the value of its setting, field of `ready.limits` or constant. No limit is missing."""
    page = parts_of_limits()[0]
    settings = {variable(name): getattr(Settings(), name) for name in Settings.__struct_fields__}
    told = {name: getattr(advertised(Settings()), name) for name in Limits.__struct_fields__}
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
    """The URLs of the databases may contain passwords, which belong to the databases."""
    names = [field.name for field in msgspec.structs.fields(Settings)]
    assert [name for name in names if re.search("secret|key|token|password|salt", name)] == []
    assert await world.db.fetchval("SELECT count(*) FROM server_key WHERE name = 'vapid'") == 1


def test_installed_packages_are_pinned_with_their_hashes() -> None:
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
