"""Failures that the supervisor survives, and its work as root in a folder that the servers' user owns."""

import ast
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.core.config import Settings
from server.core.errors import Fatal
from server.processes.embedded.folder import DataFolder
from server.processes.embedded.logfile import LogFile
from server.processes.embedded.postgres import Postgres
from server.processes.supervisor import Supervisor, Worker
from server.processes.wake_up import WakeUp
from tests.trees import parsed

EMBEDDED = Path(__file__).parent.parent / "server" / "embedded"


# --------------------------------------------------------------------------------------------------------- supervision


class Part:
    """A server or worker that has ended, one of whose methods may fail."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.started_at = -1e9
        self.log = self
        self.attended = 0

    def is_running(self) -> bool:
        return False

    def rotate(self) -> None: ...

    def last_words(self) -> str:
        return ""

    def start(self) -> None:
        self.attended += 1


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.fixture
def supervisor() -> Iterator[tuple[Any, list[Part]]]:
    made: Any = Supervisor(Settings())
    # Each part has its own type, like PostgreSQL and Valkey.
    parts: list[Part] = [type(f"Part{number}", (Part,), {})(number) for number in range(4)]
    made._postgres, made._valkey, made._workers = parts[0], parts[1], parts[2:]  # noqa: SLF001
    yield made, parts
    made._shared.rmdir()  # noqa: SLF001


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file"), OSError(28, "No space left on device"), BlockingIOError(11, "fork"),
    BrokenPipeError(32, "Broken pipe"), Fatal("it does not start."), ValueError("not enough values to unpack"),
    subprocess.SubprocessError("preexec_fn"), MemoryError(), ConnectionResetError(104, "reset"),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("what", ["start", "rotate", "is_running"])
def test_failure_of_one_process_does_not_affect_supervision_of_others(
    supervisor: tuple[Any, list[Part]], what: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, parts = supervisor
    for broken in parts:
        before = [part.attended for part in parts]
        watch._resting.clear()  # noqa: SLF001
        with monkeypatch.context() as patch:
            patch.setattr(broken, what, failing(error))
            watch._watch()  # noqa: SLF001
        others = [part.attended - count for part, count in zip(parts, before, strict=True) if part is not broken]
        assert others == [1, 1, 1]
    assert len(watch._resting) <= 1, "the other processes are checked in every turn"  # noqa: SLF001


def test_defect_is_logged_with_its_traceback_once(
    supervisor: tuple[Any, list[Part]], caplog: pytest.LogCaptureFixture
) -> None:
    watch, _ = supervisor
    for error, traces in (
        (OSError(28, "No space left on device"), 0), (ValueError("one"), 1), (ValueError("one"), 0),
        (ValueError("two"), 1),
    ):  # fmt: skip
        caplog.clear()
        watch._resting.clear()  # noqa: SLF001
        watch._attend("worker 1", failing(error))  # noqa: SLF001
        assert [bool(record.exc_info) for record in caplog.records] == [bool(traces)]


def test_greeting_names_the_variables_that_a_command_needs(tmp_path: Path) -> None:
    for given, words in (
        ({}, "openchat check"),
        ({"data_dir": str(tmp_path)}, f"openchat check --data-dir {tmp_path}"),
        ({"data_dir": str(tmp_path), "redis_url": "redis://r"},
            f"openchat check --data-dir {tmp_path}  # with the REDIS_URL of this server"),
        ({"data_dir": str(tmp_path), "database_url": "postgresql://:secret@d"},
            "openchat check  # with the DATABASE_URL and OPENCHAT_DATA_DIR of this server"),
        ({"data_dir": str(tmp_path), "database_url": "postgresql://:secret@d", "redis_url": "redis://r"},
            "openchat check  # with the DATABASE_URL and REDIS_URL of this server"),
    ):  # fmt: skip
        made: Any = Supervisor(msgspec.structs.replace(Settings(), **given))
        made._folder = given.get("data_dir") if len(given) < 3 else None  # noqa: SLF001
        assert made._command("check") == words  # noqa: SLF001
        made._shared.rmdir()  # noqa: SLF001


def test_reason_why_a_worker_cannot_start_is_logged(tmp_path: Path) -> None:
    with socket.socket() as listener:
        worker = Worker(Settings(), 1, listener, tmp_path)
        for said, reason in (
            ("ready\n", "process {} with status 3"),
            ("the database cannot be reached.\n", "the database cannot be reached"),
        ):
            worker.process = subprocess.Popen(
                [sys.executable, "-c", f"print({said!r}, end='', flush=True); exit(3)"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            worker.process.wait()
            assert worker.last_words() == reason.format(worker.process.pid)
            worker.kill()


def test_worker_keeps_running_if_its_replacement_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        worker = Worker(Settings(), 1, listener, tmp_path)
        there: Any = object()
        worker.process = there
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: failing(BlockingIOError(11, "fork"))())
        monkeypatch.setattr("server.processes.supervisor.close_pipes", lambda _: None)
        with pytest.raises(BlockingIOError):
            worker.replace()
        assert worker.process is there


# ----------------------------------------------------------------------------------------------------------- the logs


def test_rotation_survives_concurrent_changes_of_a_log(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "postgres.log", max_bytes=10)
    victim = tmp_path / "victim"
    victim.write_text("kept" * 10)
    if os.geteuid() == 0:  # without root, links can only lead to the user's own files
        os.chown(victim, 1, 1)
    spare = tmp_path / "spare"
    is_over = threading.Event()

    def disturb() -> None:
        deeds: list[Callable[[], object]] = [
            lambda: spare.write_text("x" * 30),
            lambda: spare.symlink_to(victim),
            lambda: os.link(victim, spare),
            lambda: os.mkfifo(spare),
            spare.mkdir,
        ]
        number = 0
        while not is_over.is_set():
            deeds[number % len(deeds)]()
            number += 1
            if log.path.is_dir():
                log.path.rmdir()
            else:
                log.path.unlink(missing_ok=True)
            spare.rename(log.path)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(3_000):
            log.rotate()
            log.last_line()
    finally:
        is_over.set()
        other.join()
    assert victim.read_text() == "kept" * 10 or os.geteuid() != 0


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to, None])
def test_log_that_is_a_link_is_replaced_and_its_target_is_unchanged(tmp_path: Path, make: Any) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept" * 10)
    victim.chmod(0o644)
    log = LogFile(tmp_path / "postgres.log", max_bytes=10)
    os.mkfifo(log.path) if make is None else make(log.path, victim)
    log.rotate()
    with log.open() as file:
        file.write(b"ours\n")
    assert (victim.read_text(), stat.S_IMODE(victim.stat().st_mode)) == ("kept" * 10, 0o644)
    assert log.last_line() == "ours"


# --------------------------------------------------------------------------------------------------------- the folder


def seen(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the contents of a folder with owners and modes."""
    return {
        str(one.relative_to(folder)): (
            one.lstat().st_uid,
            one.lstat().st_mode,
            one.read_bytes() if one.is_file() else b"",
        )
        for one in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder that the servers' user can access."""
    path = Path(tempfile.mkdtemp(prefix="openchat-tests-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


OPERATIONS: dict[str, Callable[[DataFolder, Path], object]] = {
    "write": lambda folder, path: folder.write(path / "pg_hba.conf", "ours"),
    "read": lambda folder, path: folder.read(path / "postmaster.pid"),
    "remove": lambda folder, path: folder.remove(path / "postmaster.pid"),
    "give": lambda folder, path: folder.give(path),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_links_in_the_data_folder_are_not_followed_out_of_it(
    place: Path, operation: Callable[[DataFolder, Path], object], depth: int
) -> None:
    """The servers' user owns the folder, and may put a link at any place of a path to which root writes."""
    outside, data = place / "outside", place / "data"
    (outside / "a" / "b").mkdir(parents=True)
    folder = DataFolder(data)
    parts = ["postgres", "a", "b"][: depth + 1]
    for at, part in enumerate(parts):
        here = data.joinpath(*parts[:at])
        if at == depth:
            (here / part).symlink_to(outside.joinpath(*parts[1 : at + 1]))
        else:
            (here / part).mkdir()
    target = outside.joinpath(*parts[1:])
    for name in ("postmaster.pid", "pg_hba.conf"):
        (target / name).write_text("1234")
    before = seen(outside)
    try:
        found = operation(folder, data.joinpath(*parts))
    except Fatal as error:
        assert str(data) in str(error)
    else:
        assert found is None
    assert seen(outside) == before
    folder.release()


def test_folder_is_created_and_files_are_written_read_and_removed(place: Path) -> None:
    folder = DataFolder(place / "data")
    made = folder.make("initdb-")
    mine = folder.owner.uid if folder.owner else os.geteuid()
    folder.write(made / "pg_hba.conf", "first")
    (made / "pg_hba.conf.new").symlink_to(place / "elsewhere")
    folder.write(made / "pg_hba.conf", "second")
    assert folder.read(made / "pg_hba.conf") == "second"
    for one in (made, made / "pg_hba.conf"):
        assert (one.stat().st_uid, stat.S_IMODE(one.stat().st_mode)) == (mine, 0o700 if one == made else 0o600)
    folder.remove(made / "pg_hba.conf")
    folder.remove(made / "pg_hba.conf")
    assert folder.read(made / "pg_hba.conf") is None
    assert not (place / "elsewhere").exists()
    folder.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root ends processes of others")
@pytest.mark.parametrize(("is_theirs", "is_here"), [(True, True), (True, False), (False, True)])
def test_stale_process_is_ended_only_if_it_runs_as_the_servers_user_in_the_folder(
    place: Path, *, is_theirs: bool, is_here: bool
) -> None:
    program = place / "postgres"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o755)
    folder = DataFolder(place / "data")
    assert folder.owner is not None
    data = folder.make("postgres-").rename(place / "data" / "postgres")
    uid = folder.owner.uid if is_theirs else pwd.getpwnam("nobody").pw_uid
    other = subprocess.Popen(
        [program, "60"],
        user=uid,
        cwd=data if is_here and is_theirs else "/",
        # Programs that a shell starts in the background ignore this signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    try:
        (data / "postmaster.pid").write_text(f"{other.pid}\n")
        (folder.run / ".s.PGSQL.5432.lock").write_text(f"{other.pid}\n")
        Postgres(folder, max_connections=1)._clear_stale()  # noqa: SLF001
        assert (other.poll() is None) is not (is_theirs and is_here)
        assert not (data / "postmaster.pid").exists()
        assert not (folder.run / ".s.PGSQL.5432.lock").exists()
    finally:
        other.kill()
        other.wait()
        folder.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files over")
def test_change_of_owner_skips_hard_links_and_symbolic_links(place: Path) -> None:
    folder = DataFolder(place / "data")
    tree = place / "data" / "tree"
    tree.mkdir()
    shadow = place / "shadow"
    shadow.write_text("secret")
    (tree / "second").hardlink_to(shadow)
    (tree / "link").symlink_to(shadow)
    (tree / "own").write_text("")
    os.mkfifo(tree / "pipe")
    folder.give(tree)
    assert folder.owner is not None
    assert [(tree / name).stat().st_uid for name in ("second", "link", "own")] == [0, 0, folder.owner.uid]
    assert tree.stat().st_uid == folder.owner.uid
    folder.release()


def test_only_folder_and_logfile_use_paths_in_the_data_folder() -> None:
    """Other code must use these modules to change files there, since the owner of the folder controls the path."""
    changing = {"chown", "chmod", "unlink", "write_text", "write_bytes", "read_text", "mkdtemp", "symlink_to", "touch"}
    allowed = {("folder.py", "chmod"), ("logfile.py", "unlink"), ("folder.py", "unlink"), ("folder.py", "mkdtemp")}
    allowed.add(("postgres.py", "read_text"))  # of /proc
    found = {
        (path.name, node.attr)
        for path in EMBEDDED.glob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr in changing
    }
    assert found <= allowed


def test_wait_ends_when_a_process_ends_or_a_signal_arrives() -> None:
    with WakeUp.by_signals() as wake_up:
        for end in (
            lambda: subprocess.run([sys.executable, "-c", ""], check=True),
            lambda: os.kill(os.getpid(), signal.SIGCHLD),
        ):
            end()
            began = time.monotonic()
            wake_up.wait(60)
            assert time.monotonic() - began < 30
        began = time.monotonic()
        wake_up.wait(0.05)
        assert time.monotonic() - began >= 0.05, "nothing is left of earlier signals"
