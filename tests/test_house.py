"""Rules of the code: imports, SQL and Redis as in docs/map.md, and generated documents are current."""

import ast
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_type_hints

import pytest

from protocol.client import Frame
from server.describe import DOCUMENTS
from server.routes import ROUTES
from tests.trees import parsed

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "server"
EVERYWHERE = {"core", "protocol"}
"""Rooms that each room may import besides those in its line of docs/map.md."""

SQL = re.compile(
    r"^\s*(SELECT\b|INSERT INTO\b|UPDATE \S|DELETE FROM\b|MERGE INTO\b|WITH (RECURSIVE )?\w+ (\(.*\) )?AS\b|VALUES \()",
    re.MULTILINE,
)
"""An SQL statement at the start of a line of a string."""
CONNECTS = re.compile(r"\basyncpg\.(connect|create_pool)\b")
REDIS = re.compile(r"^\s*(from|import) redis\b", re.MULTILINE)
ENVIRONMENT = re.compile(r"\bos\.(environ|getenv)\b")


def table(header: str) -> dict[str, frozenset[str]]:
    """Return the table of docs/map.md whose first column is `header`: the names in backticks of each line."""
    page = (ROOT / "docs" / "map.md").read_text()
    body = page.split(f"\n| {header} | ", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body]
    return {first.strip("` "): frozenset(re.findall(r"`([\w.]+)`", second)) for first, second, *_ in cells}


ROOMS = table("room")
ONLY = table("only here")


def name_of(path: Path, server: Path) -> str:
    """Return the name of a module below `server`, such as `hub.topics`. A package has the name of its folder."""
    parts = path.relative_to(server).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    return {name_of(path, SERVER): path for path in SERVER.rglob("*.py") if path.name != "__init__.py"}


def imported(path: Path) -> list[tuple[int, str]]:
    """Return the imports of our modules in a file, with their line numbers."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(parsed(path)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        line = getattr(node, "lineno", 0)
        found += [(line, name) for name in names if name.split(".")[0] in {"server", "protocol", "tests", ""}]
    return found


def broken(server: Path) -> list[str]:
    """Return each import and each use of SQL, PostgreSQL, Redis or the environment that the tables do not allow."""
    found: list[str] = []
    for path in sorted(server.rglob("*.py")):
        name = name_of(path, server)
        if not name:
            continue
        room = name.split(".")[0]
        for line, what in imported(path):
            where = f"{path.relative_to(server)}:{line} imports {what}"
            kind, _, inner = what.partition(".")
            other = inner.split(".")[0] if kind == "server" else kind
            if room not in ROOMS or other not in ROOMS[room] | EVERYWHERE | {room}:
                found.append(where)
            elif room == other == "handlers" and not what.startswith(f"server.{name}"):
                found.append(f"{where}: no handler imports another")
        text = path.read_text()
        strings = [
            one.value for one in ast.walk(parsed(path)) if isinstance(one, ast.Constant) and isinstance(one.value, str)
        ]
        uses = {
            "SQL": any(map(SQL.search, strings)),
            "connections to PostgreSQL": CONNECTS.search(text),
            "Redis": REDIS.search(text),
            "the environment": ENVIRONMENT.search(text),
        }
        found += [
            f"{path.relative_to(server)} has {what}"
            for what, is_there in uses.items()
            if is_there and not {room, name} & ONLY[what]
        ]
    return found


def test_rooms_import_only_what_the_map_allows() -> None:
    assert broken(SERVER) == []


def test_rooms_and_files_of_the_map_exist_and_rooms_import_only_lower_ones() -> None:
    rooms = {path.stem for path in SERVER.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert set(ROOMS) == rooms - {"__init__", "__pycache__"}
    order = list(ROOMS)
    up = [f"{room} → {one}" for room, may in ROOMS.items() for one in may if order.index(one) <= order.index(room)]
    assert up == []
    assert [name for names in ONLY.values() for name in names if name not in modules() and name not in ROOMS] == []


def test_map_allows_no_unused_import() -> None:
    needed: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, path in modules().items():
        needed[name.split(".")[0]] |= {what.split(".")[1] for _, what in imported(path) if what.startswith("server.")}
    assert {room: may - needed[room] for room, may in ROOMS.items() if may - needed[room]} == {}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/log.py", "from server.db import database"),
        ("hub/topics.py", "from server.queries.changes import Changes"),
        ("hub/topics.py", "import server.handlers.sending"),
        ("gateway/connection.py", "    from server.domain import sync"),
        ("handlers/pins.py", "from server.handlers import polls"),
        ("handlers/pins.py", "from server.handlers.polls import vote"),
        ("handlers/pins.py", "from server.gateway.connection import Connection"),
        ("domain/sync.py", "from ..hub import topics"),
        ("auth/tokens.py", "from server import http"),
        ("queries/pins.py", "from tests.world import World"),
        ("context.py", "from server.domain import sync"),
        ("attic.py", "from server.core import log"),
        ("handlers/pins.py", 'GONE = """\nDELETE FROM pin\n"""'),
        ("handlers/pins.py", 'GONE = f"SELECT {1}"'),
        ("http/endpoints.py", 'GONE = """\n    WITH found AS (SELECT 1) SELECT * FROM found"""'),
        ("jobs/push.py", "DB = asyncpg.connect"),
        ("handlers/pins.py", "from redis.asyncio import Redis"),
        ("hub/hub.py", 'HOME = os.environ["HOME"]'),
    ],
)
def test_violations_of_the_map_are_found(tmp_path: Path, file: str, line: str) -> None:
    copy = tmp_path / "server"
    (copy / file).parent.mkdir(parents=True)
    text = (SERVER / file).read_text() if (SERVER / file).exists() else ""
    (copy / file).write_text(f"{text}\n\nif True:\n{line}\n" if line.startswith(" ") else f"{text}\n\n{line}\n")
    (found,) = broken(copy)
    assert found.startswith(file)


@pytest.mark.parametrize("name", sorted(name for name in modules() if name.startswith("queries.")))
def test_statements_of_every_query_file_are_found(tmp_path: Path, name: str) -> None:
    """In another room, the SQL of each of these files would be found."""
    text = modules()[name].read_text()
    if re.search(r"\bdb\.(fetch|fetchrow|fetchval|execute|executemany|cursor)\b", text):
        (tmp_path / "handlers").mkdir()
        shutil.copy(modules()[name], tmp_path / "handlers" / "moved.py")
        assert "handlers/moved.py has SQL" in broken(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "protocol").glob("*.py")), ids=lambda path: path.stem)
def test_protocol_does_not_import_the_server(path: Path) -> None:
    assert [what for _, what in imported(path) if not what.startswith("protocol")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "loadtest").rglob("*.py")), ids=lambda path: path.stem)
def test_loadtest_imports_only_the_protocol_and_helpers_of_the_command_line(path: Path) -> None:
    files = {
        "server.core.atomic_file.aside",
        "server.core.atomic_file.require_folder",
        "server.core.errors.Fatal",
        "server.core.terminal.complain",
        "server.cli.tables.visible",
        *(f"server.cli.arguments.{kind}" for kind in ("OneOf", "Command", "File", "Number")),
    }
    assert [what for _, what in imported(path) if not what.startswith("protocol") and what not in files] == []


class Class(NamedTuple):
    """A class: its members, with the keyword-only parameters of each method, and its docstring."""

    path: Path
    bases: frozenset[str]
    own: dict[str, frozenset[str] | None]
    docstring: str

    @classmethod
    def read(cls, path: Path, node: ast.ClassDef) -> "Class":
        """Return the class of a definition."""
        own: dict[str, frozenset[str] | None] = {}
        for one in ast.walk(node):
            if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == "self":
                own[one.attr] = None
        for one in node.body:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                is_property = any("property" in ast.unparse(each) for each in one.decorator_list)
                names = frozenset(each.arg for each in one.args.kwonlyargs)
                own[one.name] = None if is_property else names
            elif isinstance(one, ast.AnnAssign | ast.Assign):
                targets = [one.target] if isinstance(one, ast.AnnAssign) else one.targets
                own |= {target.id: None for target in targets if isinstance(target, ast.Name)}
        bases = frozenset(ast.unparse(base).split("[")[0] for base in node.bases)
        return cls(path, bases, own, ast.get_docstring(node) or "")

    def room(self) -> str:
        """Return the room of `server` that contains the class, or the folder beside `server`."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return parts[1] if parts[0] == "server" else parts[0]


@functools.cache
def classes() -> dict[str, Class]:
    folders = (ROOT / name for name in ("server", "protocol", "loadtest", "prove", "benchmarks", "tests"))
    return {
        f"{path.relative_to(ROOT)}:{node.name}": Class.read(path, node)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }


@functools.cache
def members(key: str) -> dict[str, frozenset[str] | None]:
    """Return the members of a class, including those of its bases."""
    one = classes()[key]
    named = [members(base) for base in classes() if base.rpartition(":")[2] in one.bases]
    return functools.reduce(lambda all_of, more: more | all_of, named, one.own)


def implements(key: str, protocol: str) -> bool:
    """Return whether a class has all members of a Protocol. For a callable Protocol, compare `__init__` with it."""
    needed = {name.replace("__call__", "__init__"): takes for name, takes in members(protocol).items()}
    has = members(key)
    return needed.keys() <= has.keys() and all(
        (takes is None) == (has[name] is None) and (takes or frozenset()) <= (has[name] or frozenset())
        for name, takes in needed.items()
    )


PROTOCOLS = sorted(key for key, one in classes().items() if "Protocol" in one.bases)


@pytest.mark.parametrize("key", PROTOCOLS)
def test_protocol_class_has_two_implementations_or_one_that_its_room_may_not_import(key: str) -> None:
    """A single implementation is in a room that the Protocol's room may not import, and the docstring names it."""
    protocol = classes()[key]
    found = [name for name in classes() if name not in PROTOCOLS and implements(name, key)]
    if len(found) < 2:
        (only,) = found
        room, other = protocol.room(), classes()[only].room()
        assert room in ROOMS, f"{key} has one implementation: use {only}"
        assert other not in ROOMS[room] | {room}, f"{key} has one implementation, and may import it: use {only}"
        assert f"`{only.rpartition(':')[2]}`" in protocol.docstring, f"the docstring of {key} does not name {only}"


@pytest.mark.parametrize("frame", ROUTES, ids=lambda frame: frame.__name__)
def test_each_frame_has_a_handler_of_its_own(frame: type[Frame]) -> None:
    """This includes frames that switch something on or off. Handlers share code by private functions."""
    assert get_type_hints(ROUTES[frame].handler)["frame"] is frame


def held(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield code that holds a database connection: blocks that acquire `db`, and functions that take it."""
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


def test_code_that_holds_a_database_connection_awaits_only_the_database() -> None:
    """Others wait for the connection and its locks, so it must not wait for the network, the loop or decoding."""
    commands = {
        "cli.admin",
        "cli.conversations",
        "cli.users",
        "ops.reindex",
        "queries.checks",
    }  # each has its own connection
    found = [
        f"{path}: {ast.unparse(one)}"
        for name, path in modules().items()
        if name not in commands
        for block in held(parsed(path))
        for one in awaited(block)
        if not {"db", "membership_change"} & {part.id for part in ast.walk(one) if isinstance(part, ast.Name)}
        or any(isinstance(part, ast.Attribute) and part.attr == "decoded" for part in ast.walk(one))
    ]
    assert found == []


FUTURES = {"create_future", "create_task", "ensure_future", "run_in_executor"}
"""Functions that create a future."""
OWN_FUTURES = {("redis_bus.py", "receiver.lost"), ("push_posts.py", "*tasks"), ("batches.py", "rows")}
"""Futures of an attribute that only one task waits for, tasks that were cancelled before, and a new coroutine."""


def is_plain(awaitable: ast.expr) -> bool:
    """Return whether an awaited expression is a variable, an item or an attribute, and not a call."""
    one = awaitable.value if isinstance(awaitable, ast.Starred) else awaitable
    return isinstance(one, ast.Name | ast.Attribute | ast.Subscript)


def shared_futures(tree: ast.Module) -> Iterator[str]:
    """Yield futures that a function awaits and did not create for itself alone. The cancellation of its caller would
    cancel them, which `asyncio.shield` and `asyncio.wait` prevent.
    """
    for function in (one for one in ast.walk(tree) if isinstance(one, ast.AsyncFunctionDef)):
        own = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                target, value = node.target, node.value
            else:
                continue
            if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in FUTURES:
                own.add(ast.unparse(target))
        for awaitable in (one.value for one in ast.walk(function) if isinstance(one, ast.Await)):
            some = [awaitable]
            if isinstance(awaitable, ast.Call):
                called = ast.unparse(awaitable.func).rpartition(".")[2]
                some = awaitable.args if called == "gather" else awaitable.args[:1] if called == "wait_for" else []
            names = [ast.unparse(one) for one in some if is_plain(one)]
            yield from (name for name in names if name not in own)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("await self._task", ["self._task"]),
        ("await asyncio.shield(self._task)", []),
        ("await asyncio.wait_for(task, 1)", ["task"]),
        ("await asyncio.gather(*self._tasks)", ["*self._tasks"]),
        ("task = self._task = asyncio.create_task(f())\n  await task", ["task"]),
        ("task = asyncio.create_task(f())\n  await task", []),
    ],
)
def test_awaits_of_shared_futures_are_found(code: str, found: list[str]) -> None:
    assert list(shared_futures(ast.parse(f"async def work(self):\n  {code}"))) == found


def test_cancelled_caller_cancels_no_work_that_others_wait_for() -> None:
    found = {(path.name, name) for path in modules().values() for name in shared_futures(parsed(path))}
    assert found - OWN_FUTURES == set()
    assert found >= OWN_FUTURES, "an exception is no longer needed"


def test_no_key_is_the_id_of_an_object() -> None:
    """Another object gets the same `id` after the first one has ended, and with it what was stored under that key."""
    found = {
        name
        for name, path in modules().items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "id"
    }
    # These hold the objects while they compare them.
    assert found == {"core.log", "describe.query_tree"}


@pytest.mark.parametrize("name", sorted(DOCUMENTS.keys() - {"columns.md"}))  # tested with a database in test_columns.py
def test_generated_documents_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == DOCUMENTS[name](), "run `make docs`"


HELPERS_THAT_WAIT = {"ask", "call", "connect", "event", "message", "received_message", "sent", "synced", "until"}
"""Helpers of tests with their own assertion, which does not count as an assertion of the test."""


def asserts(node: ast.AST, helpers: dict[str, list[ast.AST]], depth: int = 3) -> bool:
    """Return whether a function has an assertion, expects an exception, or calls a helper of tests that does."""
    if any(isinstance(one, ast.Assert | ast.Raise) for one in ast.walk(node)):
        return True
    calls = (ast.unparse(one.func).rpartition(".")[2] for one in ast.walk(node) if isinstance(one, ast.Call))
    return any(
        name in {"raises", "fail"}
        or (depth > 0 and any(asserts(one, helpers, depth - 1) for one in helpers.get(name, []) if one is not node))
        for name in calls
        if name not in HELPERS_THAT_WAIT
    )


def test_each_test_asserts_something() -> None:
    nodes = [
        (path, node)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    helpers: dict[str, list[ast.AST]] = {}
    for _, node in nodes:
        helpers.setdefault(node.name, []).append(node)
    tests = [(path, node) for path, node in nodes if node.name.startswith("test_")]
    assert [f"{path.name}: {node.name}" for path, node in tests if not asserts(node, helpers)] == []


PRIMITIVES = {
    "string", "integer", "number", "boolean", "null", "list", "object", "anything", "uuid", "date", "partial", "time",
    "of", "or", "to", "from",
}  # fmt: skip


def test_every_type_in_the_handbook_is_described() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    described = {*re.findall(r"^#{3,4} (\w+)$", page, re.MULTILINE), "ErrorCode", "Limits"}  # these have chapters
    rows = re.findall(r"^\| `\w+` \| (.*?) \| ", page.split("## Error codes")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"[A-Za-z]\w+", re.sub(r"`[^`]*`", "", row))}
    assert named - PRIMITIVES - described - {"version", "characters", "elements"} == set()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_no_ignored_file_is_committed() -> None:
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.split() == []


def test_prose_in_documents_wraps() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        if path.name == "CHANGELOG.md":  # one line per change
            continue
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert [line for line in long if " " in line.strip()] == [], f"{path.name}: wrap prose at 120 characters"


def test_links_in_documents_resolve() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} → {target}"


def test_class_names_are_unique() -> None:
    names: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(module)
    assert {name: where for name, where in names.items() if len(where) > 1} == {}
