"""The house: imports point down, SQL and Redis stay where they belong, and what is generated is current."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.describe import DOCUMENTS

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "server"

# From the ground up: a file may import from its own storey or from those below it.
STOREYS: list[list[str]] = [
    ["protocol"],
    [
        "config",
        "errors",
        "deadlines",
        "throttle",
        "failures",
        "epoch",
        "reconnecting",
        "log",
        "limits",
        "reservations",
        "retries",
        "strikes",
        "sharedallowance",
        "addresses",
        "proxies",
        "sockets",
        "pressure",
        "admission",
        "gather",
        "lanes",
        "lines",
        "periodic",
        "readiness",
        "metrics",
        "migrate",
        "turns",
        "looptime",
        "stopwatch",
        "backlog",
        "tally",
        "unconfirmed",
        "drops",
        "pool",
        "share",
        "sharedbound",
        "cursor",
        "progress",
        "terminal",
        "arguments",
        "aside",
        "markup",
        "rows",
        "mentions",
        "resolver",
        "outbound",
        "database",
        "orders",
    ],
    ["queries", "embedded", "auth.tokens"],
    ["context", "untold"],
    ["sync", "search", "invitecode", "permissions", "presence", "auth.passwords", "auth.attempts", "auth.tickets"],
    ["auth.sessions", "auth.credentials", "membership", "telling", "saying", "erasure", "export"],
    ["hosts", "posts", "due"],
    ["expiry", "notices", "previews", "checking", "reindexing", "transfer"],
    ["handlers"],
    ["websocket", "bus", "redisbus"],
    ["clusterbus", "doubts", "people", "watchers", "topics", "hub", "dispatch"],
    ["commandbus", "record", "connection", "web", "forwarded", "http_protocol"],
    ["announcement", "roster", "routes", "auth.endpoints", "describe", "scheduling"],
    ["endpoints"],
    ["app"],
    ["worker"],
    ["supervisor", "administration", "upkeep"],
    ["cli"],
]
TRANSPORT = {
    "websocket",
    "http_protocol",
    "bus",
    "redisbus",
    "clusterbus",
    "commandbus",
    "doubts",
    "people",
    "watchers",
    "topics",
    "hub",
    "dispatch",
    "connection",
    "roster",
}
DOMAIN = {"queries", "handlers", "sync"}


@functools.cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SERVER).with_suffix("").parts): path
        for path in SERVER.rglob("*.py")
        if path.name != "__init__.py"
    }


def imported(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a file that import something of ours, and what."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        line = getattr(node, "lineno", 0)
        found += [(line, name) for name in names if name.split(".")[0] in {"server", "protocol", "tests"}]
    return found


def place(name: str) -> tuple[str, int] | None:
    """Return the entry of STOREYS that a module belongs to, and its height."""
    for height, storey in enumerate(STOREYS):
        for entry in storey:
            if name == entry or name.startswith(entry + "."):
                return entry, height
    return None


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    mine = place(name)
    assert mine is not None, f"server/{name} has no storey: say where it belongs"
    for line, what in imported(modules()[name]):
        target = place(what.removeprefix("server."))
        if target is None:
            continue
        where = f"{modules()[name].relative_to(ROOT)}:{line} imports {what}"
        assert target[1] <= mine[1], where
        assert not (mine[0] in TRANSPORT and target[0] in DOMAIN), where
        assert not (mine[0] in DOMAIN and target[0] in TRANSPORT), where
        assert not (mine[0] == "handlers" and target[0] == "handlers" and what != f"server.{name}"), where


@pytest.mark.parametrize("path", sorted((ROOT / "protocol").glob("*.py")), ids=lambda path: path.stem)
def test_the_protocol_imports_nothing_of_the_server(path: Path) -> None:
    assert [what for _, what in imported(path) if not what.startswith("protocol")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "loadtest").rglob("*.py")), ids=lambda path: path.stem)
def test_the_crowd_speaks_only_the_protocol_and_writes_files_as_the_server_does(path: Path) -> None:
    files = {
        "server.aside.aside",
        "server.aside.require_folder",
        "server.errors.Fatal",
        "server.arguments.Parser",
        "server.arguments.path",
    }
    assert [what for _, what in imported(path) if not what.startswith("protocol") and what not in files] == []


def test_sql_stays_in_queries() -> None:
    allowed = {"migrate", "database", "epoch", "embedded.postgres"}
    verbs = re.compile(r"\"(SELECT|INSERT|UPDATE|DELETE|WITH) ", re.MULTILINE)
    for name, path in modules().items():
        if not name.startswith("queries.") and name not in allowed:
            assert not verbs.search(path.read_text()), path


def test_redis_is_for_a_few() -> None:
    users = {
        name for name, path in modules().items() if re.search(r"^(from|import) redis", path.read_text(), re.MULTILINE)
    }
    assert users == {
        "redisbus",
        "clusterbus",
        "commandbus",
        "announcement",
        "presence",
        "auth.attempts",
        "auth.tickets",
        "sharedallowance",
        "app",
        "supervisor",
        "errors",
    }


def test_only_config_reads_the_environment() -> None:
    for name, path in modules().items():
        assert name == "config" or "os.environ" not in path.read_text(), path


def held(tree: ast.AST) -> Iterator[ast.AST]:
    """Return what runs while a connection is held: blocks that have borrowed `db`, and functions that are given it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncWith):
            has = any(isinstance(item.optional_vars, ast.Name) and item.optional_vars.id == "db" for item in node.items)
        else:
            has = isinstance(node, ast.AsyncFunctionDef) and any(one.arg == "db" for one in node.args.args)
        if has:
            yield from node.body  # type: ignore[attr-defined]


def awaited(node: ast.AST) -> Iterator[ast.AST]:
    for one in ast.walk(node):
        if isinstance(one, ast.Await):
            yield one.value
        elif isinstance(one, ast.AsyncFor) or (isinstance(one, ast.comprehension) and one.is_async):
            yield one.iter
        elif isinstance(one, ast.AsyncWith):
            yield from (item.context_expr for item in one.items)


def test_nothing_but_the_database_is_waited_for_while_a_connection_is_held() -> None:
    """Others wait for it, or for what it has locked: nobody's answer, no turn of the loop, no rows that are decoded."""
    commands = {"administration", "reindexing", "queries.checks"}  # each has a connection of its own
    found = [
        f"{path}: {ast.unparse(one)}"
        for name, path in modules().items()
        if name not in commands
        for block in held(ast.parse(path.read_text()))
        for one in awaited(block)
        if not {"db", "news"} & {part.id for part in ast.walk(one) if isinstance(part, ast.Name)}
        or any(isinstance(part, ast.Attribute) and part.attr == "decoded" for part in ast.walk(one))
    ]
    assert found == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_documents_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == DOCUMENTS[name](), "run `make docs`"


PRIMITIVES = {
    "string", "integer", "number", "boolean", "null", "list", "object", "anything", "uuid", "date", "partial", "time",
    "of", "or", "to", "from",
}  # fmt: skip


def test_every_type_in_the_handbook_is_described() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    described = {*re.findall(r"^#{3,4} (\w+)$", page, re.MULTILINE), "ErrorCode", "Limits"}  # two have chapters
    rows = re.findall(r"^\| `\w+` \| (.*?) \| ", page.split("## Error codes")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"[A-Za-z]\w+", re.sub(r"`[^`]*`", "", row))}
    assert named - PRIMITIVES - described - {"version"} == set()


def test_prose_in_documents_wraps() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        if path.name == "CHANGELOG.md":  # a line for each change
            continue
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert [line for line in long if " " in line.strip()] == [], f"{path.name}: wrap prose at 120 characters"


def test_links_in_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} → {target}"
