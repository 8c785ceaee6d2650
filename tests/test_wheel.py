"""The wheel is one package, and works beside modules of the user with the same names as ours."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from protocol.client import CreateChannel, Join
from protocol.http import LoggedIn
from protocol.ids import ConversationId, uuid7
from prove.client import Client
from tests.test_command import Program, folder, registered, workers_of
from tests.trees import parsed
from tests.world import http_client, received_message, sent

__all__ = ("folder",)
ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "protocol", "loadtest", "prove")
CHARLES = {"name": "Charles", "email": "charles@example.org", "password": "correct horse"}


class Installed(Program):
    """A run of the installed command in a folder whose modules have the names of ours."""

    site: Path

    @classmethod
    def install(cls, home: Path) -> None:
        """Build the wheel, and install it into its own environment with the libraries of this one."""
        wheels, environment, strangers = home / "wheels", home / "environment", home / "strangers"
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = wheels.iterdir()
        venv.create(environment)
        pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "-q"]
        subprocess.run([*pip, "--no-index", "--no-deps", "--no-cache-dir", str(wheel)], check=True)
        cls.command = [str(environment / "bin" / "openchat")]
        cls.site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
        (cls.site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
        strangers.mkdir()
        for name in PACKAGES:
            (strangers / f"{name}.py").write_text('raise SystemExit("a module of the user was imported")\n')
        cls.directory = strangers

    def __init__(self, *arguments: str) -> None:
        super().__init__(*arguments, PYTHONPATH=str(self.directory))


@pytest.fixture(scope="module")
def installed() -> Iterator[type[Installed]]:
    home = Path(tempfile.mkdtemp(prefix="openchat-tests-"))
    Installed.install(home)
    yield Installed
    shutil.rmtree(home)


async def said(*arguments: str, status: int = 0) -> str:
    """Run a command of the installed program and return its output."""
    program = Installed(*arguments)
    await program.start()
    assert await program.ended() == status, program.lines
    return "\n".join(program.lines)


@pytest.mark.long
async def test_wheel_installs_one_package(installed: type[Installed]) -> None:
    names = {path.name for path in installed.site.iterdir() if path.suffix not in {".pth", ".dist-info"}}
    assert names == {"openchat"}
    assert (installed.site / "openchat" / "server" / "schema.sql").read_text() == (ROOT / "schema.sql").read_text()
    migrations = {path.name for path in (installed.site / "openchat" / "server" / "migrations").glob("*.sql")}
    assert migrations == {path.name for path in (ROOT / "migrations").glob("*.sql")}


@pytest.mark.long
async def test_installed_program_works_beside_modules_of_the_same_names(
    installed: type[Installed], folder: Path
) -> None:
    data = ("--data-dir", str(folder))
    program = installed("--port", "0", "--workers", "2", *data)
    await program.start()
    try:
        await program.ready()
        assert len(workers_of(program)) == 2
        ada = await registered(program.url)
        async with http_client(program.url) as http:
            answer = await http.post("/v1/auth/register", json=CHARLES)
        charles = msgspec.json.decode(answer.content, type=LoggedIn)
        async with Client(program.url, ada.token) as one, Client(program.url, charles.token) as other:
            about = ConversationId(uuid7())
            await one.call(CreateChannel(conversation_id=about, title="News", is_public=True))
            await other.call(Join(conversation_id=about))
            message_id = await sent(one, about, "Hello")
            assert (await received_message(other, message_id)).content == "Hello"

        assert "all is well" in await said("check", *data)
        users = json.loads(await said("user", "list", "--json", *data))
        assert {user["name"] for user in users} == {"Ada", "Charles"}
        assert "Charles" in await said("why", str(message_id), *data)
        assert "there is no message" in await said("why", str(uuid7()), *data, status=1)
        people = ["--people", "4", "--group", "2", "--rate", "20", "--seconds", "1", "--processes", "1"]
        report = str(installed.site.parent / "report")
        await said("load", "teams", *people, "--url", program.url, "--report", report)
        assert "worker" in await said("prove", "--list")
    finally:
        await program.kill()


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_hook", ROOT / "deploy" / "wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_hook_renames_every_import_of_the_tree(hook: ModuleType, tmp_path: Path) -> None:
    hook.write(ROOT, tmp_path)
    files = list(tmp_path.rglob("*.py"))
    assert len(files) > 100
    nodes = [node for path in files for node in ast.walk(parsed(path))]
    sources = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    names = sources | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in names if name.split(".")[0] in PACKAGES} == set()
    assert "openchat.server.db.migrate" in names


MODULES = frozenset({"server", "server.core", "server.core.log", "loadtest", "loadtest.connection"})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from server.core import a  # server.core.log", "from openchat.server.core import a  # server.core.log"),
        ("if é:\n    x = 'é'; from server import core", "if é:\n    x = 'é'; from openchat.server import core"),
        ("import os, server.core as core", "import os, openchat.server.core as core"),
        ('run("-m", "server.core", b"server.core")', 'run("-m", "openchat.server.core", b"openchat.server.core")'),
        ('connection = "loadtest.connection:Connection"', 'connection = "openchat.loadtest.connection:Connection"'),
        ("from servers import core", None),
        ("from . import server", None),
        ('kind = {"server": "server.example"}', None),
        ('print(f"The server: {server.core}")', None),
    ],
)  # fmt: skip
def test_hook_renames_only_imports_and_names_of_modules(hook: ModuleType, source: str, expected: str | None) -> None:
    assert hook.renamed(source, MODULES) == (source if expected is None else expected)


@pytest.mark.parametrize(
    "source", ["import server.core", "import server", 'f"server.core.{name}"', 'f"server.{name}"', "x = 'server.core'"]
)
def test_hook_refuses_what_it_cannot_rename(hook: ModuleType, source: str) -> None:
    with pytest.raises(hook.RenameError, match=r"^1: "):
        hook.renamed(source, MODULES)
