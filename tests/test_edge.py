"""Commands: their audit entries, and errors of output, files and the database."""

import asyncio
import contextlib
import errno
import functools
import io
import os
import re
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import click
import msgspec
import pytest

from server.cli import main, maintenance
from server.core import atomic_file, terminal
from server.core.errors import Fatal
from server.ops.transfer.lines import Row, RowLine
from server.queries import audit
from tests.test_administration import Shell, shell
from tests.world import sent

__all__ = ("shell",)
ROOT = Path(__file__).parent.parent
AUDITED = {
    "user create": "create_user", "user show": "show_user", "user disable": "disable_user",
    "user enable": "enable_user", "user promote": "promote_user", "user demote": "demote_user",
    "user reset-password": "reset_password", "user list": "list_users", "conversation list": "list_conversations",
    "user sessions": "list_sessions",
    "conversation show": "show_conversation", "conversation export": "export_conversation",
    "conversation delete": "delete_conversation", "erase": "show_user", "why": "why", "export": "export",
    "export --user": "export_user", "import": "import",
}  # fmt: skip
"""The action in the audit log of each command."""
UNAUDITED = {
    "conversation audit": "reads the log itself, which names users only by id",
    "check": "prints counts and ids",
    "reindex": "prints counts",
}
"""Commands that show no data of users, and why."""
ELSEWHERE = {"run", "migrate", "new-epoch", "settings", "completion", "load", "prove"}
"""Commands that neither show nor change rows."""


def commands(command: click.Command | None = None, *words: str) -> Iterator[str]:
    """Yield the full name of every command."""
    command = command or main.openchat
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from commands(command.get_command(click.Context(command), name), *words, name)
    else:
        yield " ".join(words)


class Place(NamedTuple):
    """Ids that commands take as operands."""

    ada: str
    charles: str
    about: str
    said: str
    samples: Path

    def arguments(self, command: str) -> list[str]:
        """Return a command with its operands."""
        rest = {
            "user create": ["Mary", "mary@example.org"],
            "user list": ["Ada"],
            "conversation list": ["--user", self.ada],
            "conversation delete": [self.about, "--yes"],
            "conversation": [self.about],
            "why": [self.said],
            "import": ["mattermost", str(self.samples / "mattermost.jsonl")],
            "export --user": [self.ada],
            "user": [self.charles],
            "erase": [self.charles],
        }
        found = [value for key, value in rest.items() if command == key or command.startswith(f"{key} ")]
        return [*command.split(), *(found[0] if found else [])]


@pytest.fixture
async def place(shell: Shell) -> Place:
    them = await shell.world.users("Ada", "Charles")
    ada = await shell.world.connect(them[0])
    about = await shell.world.channel(ada)
    said = await sent(ada, about, "Hello")
    return Place(str(them[0].id), str(them[1].id), str(about), str(said), Path(__file__).parent / "samples")


async def log(shell: Shell) -> list[dict[str, Any]]:
    rows = await shell.world.db.fetch("SELECT * FROM audit_entry WHERE chain = $1 ORDER BY number", audit.SERVER)
    return [dict(row) for row in rows]


async def test_every_command_that_reads_or_changes_user_data_is_audited(shell: Shell, place: Place) -> None:
    assert {*commands(), "export --user"} == AUDITED.keys() | UNAUDITED.keys() | ELSEWHERE
    # Commands that delete come last.
    for command in sorted(AUDITED, key=lambda one: ("delete" in one, one == "erase")):
        before = len(await log(shell))
        arguments = place.arguments(command)
        if command == "export":
            arguments.append(str(shell.world.folder / "all.jsonl"))
        await shell.run(*arguments, status=int(command == "erase"))
        new = (await log(shell))[before:]
        assert [entry["action"] for entry in new] == [AUDITED[command]], command
        about = str([new[0]["user_id"], new[0]["message_id"], new[0]["details"]])
        named = [one for one in place[:4] if one in arguments]
        assert all(one in about for one in named), (command, about)
        assert "example.org" not in about, "users are named only by id"
    for command in UNAUDITED:
        before = len(await log(shell))
        await shell.run(*place.arguments(command))
        assert len(await log(shell)) == before
    assert (await shell.json("conversation", "audit", str(UUID(int=0)), "--verify"))["tampered_with"] is False


async def test_refused_import_and_empty_export_are_not_audited(shell: Shell, tmp_path: Path) -> None:
    await shell.run("import", "mattermost", str(tmp_path / "missing"), status=1)
    await shell.run("export", str(tmp_path / "nobody.jsonl"))
    assert await log(shell) == []


def full() -> TextIO:
    return Path("/dev/full").open("w")


def unread() -> TextIO:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def closed() -> TextIO:
    one = io.StringIO()
    one.close()
    return one


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "target",
    [full, pytest.param(unread, marks=LONG), pytest.param(closed, marks=LONG), pytest.param(None, marks=LONG)],
)
async def test_command_that_cannot_write_its_output_ends_with_one_line(
    place: Place, target: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in sorted(AUDITED | UNAUDITED, key=lambda one: ("delete" in one, one == "erase")):
        arguments = place.arguments(command)
        capsys.readouterr()
        out = target and target()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            status = await asyncio.to_thread(main.run, arguments)
        if out is not None:
            out.close()
        said = capsys.readouterr().err
        assert status == 1, command
        assert said.startswith("openchat: standard output " if command != "erase" else "openchat: this erases"), said
        assert said.count("\n") == 1, said
    monkeypatch.setattr(sys, "stderr", None)
    assert await asyncio.to_thread(main.run, ["user", "show", "nobody"]) == 1


@pytest.mark.parametrize("user", [False, True])
async def test_export_is_complete_or_leaves_no_file(
    shell: Shell, place: Place, tmp_path: Path, *, user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shell.world.db.execute("UPDATE message SET content = repeat('x', 9000)")
    export = ["export", *(["--user", place.ada] if user else [])]
    folder = tmp_path / "folder"
    folder.mkdir()
    there = folder / "there"
    there.write_text("there")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    for path, why in (
        (there, "already exists"),
        (folder, "already exists"),
        (folder / "link", "already exists"),
        (folder / "missing" / "file", "No such file or directory"),
        (there / "file", "Not a directory"),
        (folder / ("x" * 300), "name too long"),
        (Path("/proc/file"), "cannot be written"),
    ):
        said = await shell.run(*export, str(path), status=1)
        assert why in said
        assert said.startswith(f"openchat: {path} ")
        assert said.count("\n") == 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # like a full disk
    try:
        said = await shell.run(*export, str(folder / "large"), status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == f"openchat: {folder / 'large'} cannot be written: File too large. No partial file remains.\n"
    name = "server.cli.users.written" if user else "server.ops.transfer.dump.transfers.rows"
    with monkeypatch.context() as patch:
        patch.setattr(name, lambda *_: interrupted())
        assert await asyncio.to_thread(main.run, [*export, str(folder / "interrupted")]) == 130
    assert sorted(one.name for one in folder.iterdir()) == ["link", "there"]
    assert there.read_text() == "there"
    assert not (tmp_path / "elsewhere").exists()
    await shell.run(*export, str(folder / "good"))
    assert (folder / "good").stat().st_mode & 0o777 == 0o600
    assert len(list(folder.iterdir())) == 3


def refuses(error: int) -> Any:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(error, os.strerror(error))

    return refuse


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_file_is_written_atomically_without_hard_links(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuses(error))  # like exFAT and some network file systems
    with atomic_file.aside(tmp_path / "good") as write:
        write(b"all of it")
    assert (tmp_path / "good").read_bytes() == b"all of it"
    with pytest.raises(Fatal, match="already exists"), atomic_file.aside(tmp_path / "late") as write:
        (tmp_path / "late").write_text("another")
    assert (tmp_path / "late").read_text() == "another"
    monkeypatch.setattr(Path, "replace", refuses(errno.EIO))
    said = r"cannot be written: Input/output error\. No partial file remains\."
    with pytest.raises(Fatal, match=said), atomic_file.aside(tmp_path / "bad") as write:
        write(b"some of it")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["good", "late"]


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "Reset"), TimeoutError(), FileExistsError("x"), ValueError("x")]
)
def test_other_errors_are_not_reported_as_errors_of_the_file(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as caught, atomic_file.aside(tmp_path / "x"):
        fail(error)
    assert caught.value is error
    assert names(tmp_path) == []

    def rows() -> Iterator[RowLine]:
        yield RowLine(Row("user", msgspec.Raw(b"{}")), "line 2")

    with pytest.raises(type(error)) as caught:
        list(map(lambda _: fail(error), maintenance._read(tmp_path, rows())))  # noqa: C417, SLF001 - not in the generator
    assert caught.value is error
    if isinstance(error, (ConnectionError, TimeoutError)):
        assert terminal.status_of(functools.partial(fail, error)) == 1
        assert capsys.readouterr().err.startswith("openchat: the database cannot be used: ")


def fail(error: Exception) -> int:
    raise error


def test_replaced_file_has_either_the_old_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    for text in (b"old", b"new"):
        with atomic_file.aside(path, replaces=True) as write:
            write(text)
            assert not path.exists() or path.read_bytes() == b"old"
    with contextlib.suppress(KeyError), atomic_file.aside(path, replaces=True) as write:
        write(b"half")
        raise KeyError
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]


async def test_partial_file_of_a_killed_export_is_reported_by_the_next_one(shell: Shell, tmp_path: Path) -> None:
    program = "import os, pathlib, sys; from server.core.atomic_file import aside\n"
    program += "with aside(pathlib.Path(sys.argv[1])) as write:\n write(b'secret')\n os.kill(os.getpid(), 9)"
    path = tmp_path / "all [1].jsonl"
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, str(path)], check=False)
    (left,) = names(tmp_path)
    _, told = await shell.both("export", str(path))
    assert re.fullmatch(
        rf"openchat: {re.escape(str(tmp_path / left))} is from a command that .* delete it\.\n",
        told,
    )
    assert names(tmp_path) == [left, path.name], "no file is deleted"


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_every_output_file_is_written_by_atomic_file() -> None:
    writes = re.compile(r"write_text\(|write_bytes\(|O_TRUNC|open\([^)]*[\"'][wax]b?[\"']")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("server", "prove", "loadtest")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line)
    }
    assert {one.split(":")[0] for one in found} == OTHER_WRITERS.keys(), found


OTHER_WRITERS = {
    "server/describe/__main__.py": "generated documents",
    "server/processes/embedded/logfile.py": "uses file descriptors",
    "loadtest/installation.py": "a log",
    "prove/standby.py": "a configuration file of a server that ends with the run",
    "server/core/metrics.py": "replaces a file that only this program reads",
}
"""Source files that write files without server/core/atomic_file.py, and why."""


async def test_lost_database_is_not_reported_as_an_error_of_the_file(
    shell: Shell, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shell.world.db.execute("UPDATE message SET content = repeat('x', 9000)")
    url = urlsplit(shell.world.settings.database_url)
    path = f"{parse_qs(url.query)['host'][0]}/.s.PGSQL.5432"
    outside = {"check": b"schema_migration", "import": b"email_verified FROM", "export --user file": b"reaction"}
    for command in (*AUDITED, "check", "export file", "export --user file"):
        # Most commands lose the connection while they write the audit entry, others outside of a transaction.
        async with resets(path, outside.get(command, b"audit_entry")) as port:
            monkeypatch.setenv("DATABASE_URL", f"postgresql://openchat@127.0.0.1:{port}{url.path}")
            arguments = place.arguments(command.removesuffix(" file"))
            said = await shell.run(*arguments, *([str(tmp_path / "x")] if command.endswith("file") else []), status=1)
            reason = "(Connection reset by peer|connection was closed in the middle of operation)"
            assert re.fullmatch(
                rf"openchat: the database cannot be used: {reason}\. Run the command again\.\n", said
            ), (
                command,
                said,
            )
            assert names(tmp_path) == []


@contextlib.asynccontextmanager
async def resets(path: str, word: bytes) -> AsyncIterator[int]:
    """Relay connections to PostgreSQL, and reset each when a client sends `word`."""

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_up: bool) -> None:
        while data := await source.read(65536):
            if is_up and word in data:
                return
            sink.write(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(path)
        ways = [
            asyncio.create_task(carry(reader, forth, is_up=True)),
            asyncio.create_task(carry(back, writer, is_up=False)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        forth.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def interrupted() -> AsyncIterator[Any]:
    """Raise KeyboardInterrupt, as Ctrl-C does."""
    if sys.flags:
        raise KeyboardInterrupt
    yield


@pytest.mark.parametrize("arguments", [["user", "--help"], ["migrate", "--plan"]])
def test_process_that_cannot_write_its_output_prints_one_line(arguments: list[str], database_url: str) -> None:
    environment = os.environ | {"DATABASE_URL": database_url}
    command = [sys.executable, "-P", "-m", "server.cli.main", *arguments]
    with full() as out:
        ended = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, timeout=30, check=False
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("openchat: standard output cannot be written: No space left on device.")
    assert ended.stderr.count("\n") == 1
