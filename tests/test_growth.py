"""All data that clients can grow is bounded. docs/growth.md, which lists it, is compared with the code."""

import ast
import asyncio
import contextlib
import fnmatch
import functools
import gc
import inspect
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

import server
from protocol import limits
from protocol.client import Block, Watch
from protocol.errors import CloseCode
from protocol.server import Error, Reply
from server.app.background import Background
from server.core.config import Settings
from server.domain import presence
from server.hub import topics, watchers
from server.hub.online_users import Sight
from tests.test_hostile import idle
from tests.test_hostile_values import each_frame, ids_for, ids_in, valid
from tests.test_periodic import AGED, Backlog
from tests.trees import parsed
from tests.world import World, until

ROOT = Path(__file__).parents[1]
SERVER = Path(server.__file__).parent
BOUNDS = frozenset(
    {
        "history",
        "number",
        "rate",
        "age",
        "row",
        "operator",
        "fixed",
        "sockets",
        "flight",
        "turn",
        "swept",
        "users",
        "unused",
    }
)
HISTORY = {"user", "conversation", "message", "report"}
"""Tables without a bound. A further one needs a decision."""
NOT_FOR_CLIENTS = ("ops", "describe", "processes", "cli")
"""Rooms whose code runs once, or only for an operator."""
MAKERS = frozenset({
    "dict", "set", "list", "deque", "Counter", "defaultdict", "OrderedDict", "WeakKeyDictionary", "WeakValueDictionary",
    "WeakSet", "Queue", "LifoQueue", "PriorityQueue", "bytearray", "fromkeys", "BytesIO", "StringIO", "array",
})  # fmt: skip
"""Names that create a container that can grow."""
CACHES = frozenset({"lru_cache", "cache", "cached_property"})


def listed(title: str) -> dict[str, tuple[str, str]]:
    """Return the names in a table of docs/growth.md, each with its bound and its last cell."""
    page = (ROOT / "docs" / "growth.md").read_text()
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (\w+) \| ?(.*?) ?\|$", section, re.MULTILINE)
    found = {name: (bound, last) for names, bound, last in rows for name in re.findall(r"`([^`]+)`", names)}
    assert {bound for bound, _ in found.values()} <= BOUNDS
    return found


def name_of(called: ast.expr) -> str:
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def is_empty(value: ast.expr) -> bool:
    """Return whether an expression creates an empty container."""
    match value:
        case ast.Dict(keys=[]) | ast.List(elts=[]):
            return True
        case ast.Call(args=[], keywords=[]):
            return makes_container(value)
    return False


def makes_container(value: ast.expr) -> bool:
    """Return whether an expression creates a container that can grow."""
    match value:
        case ast.Dict() | ast.List() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call():
            made = [value.func, *(one.value for one in value.keywords if one.arg == "default_factory")]
            return any(name_of(one) in MAKERS for one in made)
        case ast.BinOp():
            return makes_container(value.left) or makes_container(value.right)
        case ast.IfExp():
            return makes_container(value.body) or makes_container(value.orelse)
        case ast.BoolOp():
            return any(makes_container(one) for one in value.values)
    return False


def assigned(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the targets to which a statement assigns a container."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.AnnAssign | ast.NamedExpr):
        targets = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    for target in targets:
        value: ast.expr | None = node.value  # type: ignore[attr-defined]
        them = target.elts if isinstance(target, ast.Tuple) else [target]
        values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value] * len(them)
        yield from (one for one, made in zip(them, values, strict=True) if made is not None and makes_container(made))


def begins_empty(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_empty(node.value)


@functools.cache
def containers() -> frozenset[str]:
    """Return the containers in the server's code that outlive a call.

    These are attributes of instances and classes, caches, and globals in lower case or with an empty initial value.
    """
    found: set[str] = set()
    for path in SERVER.rglob("*.py"):
        file = path.relative_to(SERVER).as_posix()
        if file.startswith(NOT_FOR_CLIENTS):
            continue
        tree = parsed(path)
        for node in ast.walk(tree):
            found |= {f"{file} {ast.unparse(one)}" for one in assigned(node) if isinstance(one, ast.Attribute)}
            if isinstance(node, ast.ClassDef):
                found |= {
                    f"{file} {node.name}.{one.id}"
                    for body in node.body
                    for one in assigned(body)
                    if isinstance(one, ast.Name)
                }
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for decorator in node.decorator_list:
                    called = decorator.func if isinstance(decorator, ast.Call) else decorator
                    if name_of(called) in CACHES:
                        found.add(f"{file} {node.name}")
        for node in tree.body:
            found |= {
                f"{file} {one.id}"
                for one in assigned(node)
                if isinstance(one, ast.Name) and (not one.id.strip("_").isupper() or begins_empty(node))
            }
    return frozenset(found)


UNIQUE = """
SELECT c.relname, array_agg(a.attname::text) FROM pg_index i
JOIN pg_class c ON c.oid = i.indrelid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey)
WHERE i.indisunique AND i.indpred IS NULL AND c.relnamespace = 'public'::regnamespace GROUP BY c.relname, i.indexrelid
"""


async def test_every_table_has_a_bound(database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    rows = await db.fetch(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
    )
    await db.close()
    assert {row[0] for row in rows} == listed("Tables").keys()


def test_bounds_of_tables_are_in_the_code() -> None:
    tables = listed("Tables")
    assert {name for name, (bound, _) in tables.items() if bound == "history"} == HISTORY
    assert {bound for bound, _ in tables.values()} <= {
        "history", "number", "age", "row", "operator", "fixed", "turn", "unused",
    }  # fmt: skip
    code = "".join(path.read_text() for path in SERVER.rglob("*.py"))
    for name, (bound, last) in tables.items():
        numbers = re.findall(r"`(MAX_\w+)`", last)
        assert numbers or bound != "number", name
        assert [one for one in numbers if not hasattr(limits, one) or f" {one}" not in code] == []


async def test_tables_bounded_by_other_rows_have_a_unique_key_of_ids(database_url: str) -> None:
    db = await asyncpg.connect(database_url)
    keys: dict[str, list[list[str]]] = {}
    for table, columns in await db.fetch(UNIQUE):
        keys.setdefault(table, []).append(columns)
    await db.close()
    for name, (bound, _) in listed("Tables").items():
        ids = [columns for columns in keys.get(name, []) if all(one.endswith("_id") for one in columns)]
        assert ids or bound != "row", name


def test_tables_bounded_by_age_have_a_job_that_deletes() -> None:
    """The job is run by test_each_job_handles_all_due_rows_despite_rows_that_always_fail."""
    assert {name for name, (bound, _) in listed("Tables").items() if bound == "age"} == AGED.keys()
    for table, job in AGED.items():
        assert f"self.{job})" in inspect.getsource(Background.__init__)
        assert table in inspect.getsource(getattr(Backlog, job))


def test_every_container_has_a_bound() -> None:
    found = containers()
    assert len(found) > 50
    assert found == listed("Memory of a worker").keys()


SHARING = frozenset(
    {"Semaphore", "Share", "SharedBound", "Turns", "FairQueue", "Lanes", "Batcher", "ThreadPoolExecutor"}
)
"""Classes that share places among clients."""
PARTS = ("fairness/lanes.py self._all", "fairness/share.py ", "fairness/turns.py ")
"""Parts of these classes."""


def test_every_shared_bound_is_listed_with_the_share_of_a_client() -> None:
    made: set[str] = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if name_of(node.value.func) in SHARING and ast.unparse(target) != "lane":
                    made.add(f"{path.relative_to(SERVER).as_posix()} {ast.unparse(target)}")
    page = (ROOT / "docs" / "limits.md").read_text()
    section = page.split("\n### What all share, and each client's share\n")[1].split("\n## ")[0]
    listed_there = set(re.findall(r"`([\w/]+\.py \S+)`", section))
    assert len(made) > 20
    assert {one for one in made if not one.startswith(PARTS)} <= listed_there
    for one in listed_there:
        file, name = one.split(" ")
        assert name in (SERVER / file).read_text(), one


def test_scan_finds_containers_of_all_kinds() -> None:
    source = """
class One:
    def __init__(self):
        self.a = {}
        self.b: set[int] = set()
        self.c = collections.deque()
        self.d, self.e = [], 1
        self.f = other or []
        self.g = [0] * 5
        self.h = asyncio.Queue(5)
        self.i = self.j = {}
        k, self.l = self.l, {}
        self.no = 1
        self.no, self.m = 1, dict.fromkeys(())
    n: dict[int, int] = field(default_factory=dict)
    o = {}
    no: frozenset[int] = frozenset()
"""
    found = {ast.unparse(one) for node in ast.walk(ast.parse(source)) for one in assigned(node)}
    assert found == {*(f"self.{letter}" for letter in "abcdfghijlm"), "n", "o"}
    filled = {
        text: begins_empty(ast.parse(text).body[0]) for text in ("A = {}", "A = set()", "A: Any = []", "A = {1: 2}")
    }
    assert list(filled.values()) == [True, True, True, False]


def test_every_kind_of_redis_key_has_a_bound() -> None:
    """Check the keys in the code. The next test checks those in Redis."""
    kinds = {
        one for path in SERVER.rglob("*.py") for one in re.findall(r'["\'](openchat:[a-z][\w:]*)', path.read_text())
    }
    patterns = listed("Redis")
    assert kinds
    assert [
        one for one in kinds if not any(fnmatch.fnmatch(one, name.removesuffix("*") + "*") for name in patterns)
    ] == []


async def every_frame(world: World) -> None:
    """Send each frame once, in a new conversation, on a new connection, and close it."""
    ada, ids = await ids_in(world)
    client = await world.connect(ada)
    for kind in each_frame():
        await client.socket.send(json.dumps(valid(msgspec.inspect.type_info(kind), "", ids_for(kind, ids))))
    await client.synced()
    await world._open.aclose()  # noqa: SLF001


GONE = -2
"""The result of Redis for a key that does not exist any more, such as one of an earlier test."""


async def test_redis_keys_expire_or_are_deleted_with_their_sockets(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.0)
    redis = Redis.from_url(settings.redis_url, decode_responses=True)
    ada, _ = await ids_in(world)
    await world.connect(ada, 1)
    key_of_ada = world.workers[1].app.presence.entries.user_key + ada.id.hex
    async with asyncio.timeout(10):
        while not await redis.exists(key_of_ada):
            await asyncio.sleep(0.01)
    kept = {name for name, (_, expires) in listed("Redis").items() if expires.startswith("no:")}
    patterns = sorted(listed("Redis"), key=len, reverse=True)
    seen = set()
    async for key in redis.scan_iter(match="*"):
        (pattern, *_) = [one for one in patterns if fnmatch.fnmatch(key, one)] or [key]
        assert pattern in patterns
        seen.add(pattern)
        left = await redis.pttl(key)  # ttl() is 0 in the last half a second
        assert left == GONE or (left > 0) == (pattern not in kept), (key, left)
    assert {"openchat:workers:*", "openchat:worker:*", "openchat:presence:*"} <= seen
    await world._open.aclose()  # noqa: SLF001
    async with asyncio.timeout(10):
        while await redis.exists(key_of_ada):
            await asyncio.sleep(0.01)
    await redis.aclose()


def sizes() -> dict[str, int]:
    """Return the number of items in the listed containers of all objects, by name."""
    wanted: dict[str, set[str]] = {}
    for name in containers():
        file, _, attribute = name.partition(" ")
        module = "server." + file.removesuffix(".py").replace("/", ".")
        wanted.setdefault(module, set()).add(attribute.partition(".")[2])
    found: dict[str, int] = {}
    for one in gc.get_objects():
        module = type(one).__module__
        if module in wanted and not isinstance(one, type):
            for attribute in wanted[module]:
                value: Any = getattr(one, attribute, None)
                if attribute and hasattr(value, "__len__"):
                    key = f"{module.removeprefix('server.').replace('.', '/')}.py self.{attribute}"
                    found[key] = found.get(key, 0) + len(value)
    return found


@pytest.fixture
async def lone(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """One worker that does not keep the presence of users who disconnect."""
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.0)
    async with World(msgspec.structs.replace(settings, ephemeral_rate=1e6), workers=1) as world:
        yield world


@pytest.mark.long
async def test_frames_of_all_kinds_do_not_grow_containers(lone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    app = lone.workers[0].app

    async def settled() -> dict[str, int]:
        await idle(lone)
        with monkeypatch.context() as patch:
            patch.setattr(topics, "LINGER_SECONDS", -1.0)
            app.hub.topics._close_quiet()  # noqa: SLF001
        await until(lambda: not app.presence._departing and not app.presence._transitions)  # noqa: SLF001
        gc.collect()
        return sizes()

    await every_frame(lone)
    before = await settled()
    assert len(before) > 30
    for _ in range(3):
        await every_frame(lone)
    may_grow = {name for name, (bound, _) in listed("Memory of a worker").items() if bound in {"fixed", "swept"}}

    def grown() -> dict[str, tuple[int, int]]:
        return {
            name: (before.get(name, 0), size)
            for name, size in sizes().items()
            if size > before.get(name, 0) and name not in may_grow
        }

    # The last commands to Redis are sent in the next iteration of the loop. A topic that is being opened is closed in
    # a later one.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while grown():
                await settled()
                await asyncio.sleep(0.01)
    assert grown() == {}


async def test_rechecks_of_a_user_are_coalesced(lone: World) -> None:
    ada = await lone.user("Ada")
    client = await lone.connect(ada)
    online_users = lone.workers[0].app.hub.online_users
    for _ in range(1_000):
        online_users.recheck(ada.id)
    assert len(online_users._rechecks) <= 2  # noqa: SLF001
    await until(lambda: not online_users._rechecks)  # noqa: SLF001
    await lone.db.execute("DELETE FROM session")
    online_users.recheck(ada.id, is_whole=True)
    assert await client.closed() == CloseCode.SESSION_ENDED


async def test_close_code_of_a_user_with_another_connection_is_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "OFFLINE_SECONDS", 0.0)
    ada = await world.user("Ada")
    here, _ = await world.connect(ada), await world.connect(ada, 1)
    app = world.workers[0].app
    for socket in app.hub.online_users.sockets(ada.id):
        socket.close(CloseCode.SILENT)
    await here.closed()
    await until(lambda: not app.presence._departing and not app.presence._devices)  # noqa: SLF001
    await until(lambda: not app.presence._ends)  # noqa: SLF001


async def test_refused_watch_leaves_nothing(lone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "MAX_WATCHED", 1)
    ada, charles, mary = await lone.users("Ada", "Charles", "Mary")
    client = await lone.connect(ada)
    for one in (charles, mary):
        await client.call(Block(user_id=one.id))
    assert isinstance(await client.ask(Watch(user_ids=[charles.id])), Reply)
    assert isinstance(await client.ask(Watch(user_ids=[mary.id])), Error)
    (socket,) = lone.workers[0].app.hub.online_users.sockets(ada.id)
    assert socket.watched == {charles.id: Sight.FACE}
