"""The supervisor: the operator's process, which owns the embedded servers, the port and the workers."""

import asyncio
import contextlib
import logging
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec
from redis.asyncio import Redis

from server.core.config import Settings, variable
from server.core.errors import REDIS_LOST, Fatal, redis_unreachable
from server.core.terminal import say
from server.db import database, migrate
from server.db.database import OWN_CONNECTIONS
from server.db.hosts import CONNECT_SECONDS
from server.processes.embedded import postgres, valkey
from server.processes.embedded.folder import DataFolder, installed
from server.processes.embedded.postgres import Postgres
from server.processes.embedded.reach import named
from server.processes.embedded.valkey import Valkey
from server.processes.wake_up import WakeUp
from server.processes.worker_spec import DRAIN_SECONDS, READY, WorkerSpec

WATCH_SECONDS = 1.0
"""Max interval at which processes are checked, in seconds. One that ends is attended immediately."""
READY_SECONDS = 30.0
"""Max time until a worker accepts connections, in seconds."""
STOP_SECONDS = DRAIN_SECONDS + 15.0
"""Max time until a worker ends, in seconds. Then it is killed."""
CRASHED_SOON_SECONDS = 2.0
"""Min lifetime of a worker that is restarted immediately, in seconds. Others are restarted after that time."""
BACKLOG = 4096
SPARE_DATABASE_CONNECTIONS = 20
"""Connections of the embedded PostgreSQL besides those of workers, for commands and readers."""

log = logging.getLogger(__name__)


class Worker:
    """A place for a worker process, whose listening socket outlives the process."""

    def __init__(
        self, settings: Settings, number: int, listener: socket.socket, folder: Path, *, is_alone: bool = False
    ) -> None:
        self._spec = WorkerSpec(settings, number, listener.fileno(), str(folder), is_alone)
        self.listener = listener
        self.number = number
        self.started_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def is_running(self) -> bool:
        """Whether a process runs in this place."""
        return self.process is not None and self.process.poll() is None

    def last_words(self) -> str:
        """Return why a process ended: the reason that it printed, or its exit status, negative for a signal."""
        process, printed = self.process, ""
        if process is None:
            return "it did not start"
        if process.stdout is not None and not process.stdout.closed:
            printed = process.stdout.read().decode().removeprefix(READY).strip().rstrip(".")
        return printed or f"process {process.pid} with status {process.returncode}"

    def start(self) -> None:
        """Start a process in this place."""
        self._forget()
        self.started_at = time.monotonic()
        self.process = process = subprocess.Popen(
            # -P, because a server.py in the current folder is another program's.
            [sys.executable, "-P", "-m", "server.processes.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.listener.fileno()],
            process_group=0,
        )
        assert process.stdin is not None  # noqa: S101 - requested above
        process.stdin.write(msgspec.json.encode(self._spec) + b"\n")
        process.stdin.flush()

    def wait_ready(self) -> None:
        """Return when the worker accepts connections. Raises Fatal, with the worker's text, if it does not."""
        assert self.process is not None and self.process.stdout is not None  # noqa: S101, PT018 - started, with a pipe
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            said = self.process.stdout.readline().decode() if selector.select(READY_SECONDS) else ""
        if said != READY:
            self.kill()
            raise Fatal(said.strip() or f"worker {self.number} does not start.")

    def replace(self) -> subprocess.Popen[bytes] | None:
        """Start another process in this place. When it accepts connections, return the previous process, which is still
        running. Raises Fatal, without an effect, if it does not accept any.
        """
        old, self.process = self.process, None
        try:
            self.start()
            self.wait_ready()
        except (Fatal, OSError):
            self.kill()
            self.process = old
            raise
        return old

    def terminate(self) -> None:
        """Ask the worker to drain and end."""
        if self.process is not None and self.is_running():
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the worker, if it is running."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._forget()

    def _forget(self) -> None:
        if self.process is not None:
            close_pipes(self.process)


class Supervisor:
    """Starts all processes, restarts them when they end, and stops them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_stopping = False
        self._is_forced = False
        self._is_rolling = False
        self._folder: DataFolder | None = None
        self._postgres: Postgres | None = None
        self._valkey: Valkey | None = None
        self._workers: list[Worker] = []
        self._resting: dict[str, float] = {}
        """The time until which each failed process is not attended."""
        self._failures: dict[str, str] = {}
        """The last failure of each process."""
        self._shared = Path(tempfile.mkdtemp(prefix="openchat-"))

    def run(self) -> None:
        """Run until SIGINT or SIGTERM. Raises Fatal if the start fails."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_hangup)
        with WakeUp.by_signals() as self._wake_up:
            try:
                self._start()
                while not self._pause():
                    self._watch()
                    if self._is_rolling:
                        self._is_rolling = False
                        self._roll()
            finally:
                self._stop()

    def _pause(self) -> bool:
        """Wait for a signal, such as that of a process that has ended. Return whether to stop."""
        if not self._is_stopping:
            self._wake_up.wait(WATCH_SECONDS)
        return self._is_stopping

    def _start(self) -> None:
        listeners = listen(self._settings.host, self._settings.port, self._settings.worker_count)
        # Named servers come first, because a start that fails with them must not create a data folder.
        asyncio.run(prepare(self._settings))
        settings = self._with_servers()
        if self._postgres is not None:
            asyncio.run(prepare(settings))
        # Nobody else can reach an embedded Valkey, so a single worker has no others to publish to.
        is_alone = self._valkey is not None and len(listeners) == 1
        self._workers = [
            Worker(settings, number, listener, self._shared, is_alone=is_alone)
            for number, listener in enumerate(listeners, start=1)
        ]
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            worker.wait_ready()
        self._greet(listeners[0])

    def _with_servers(self) -> Settings:
        settings = self._settings
        own = [
            *([] if settings.database_url else [postgres.PACKAGE]), *([] if settings.redis_url else [valkey.PACKAGE])
        ]  # fmt: skip
        for package in own:
            installed(package)
        if own:
            self._folder = DataFolder(settings.data_path, advice=settings.folder_advice)
        if self._folder is not None and not settings.database_url:
            each = settings.database_connections + OWN_CONNECTIONS
            connections = settings.worker_count * each + SPARE_DATABASE_CONNECTIONS
            self._postgres = Postgres(self._folder, max_connections=connections)
            if self._postgres.is_new:
                tell("Setting up the database; only the first start does this …")
            self._postgres.start()
            settings = msgspec.structs.replace(settings, database_url=self._postgres.url())
        if self._folder is not None and not settings.redis_url:
            self._valkey = Valkey(self._folder)
            self._valkey.start()
            settings = msgspec.structs.replace(settings, redis_url=self._valkey.url)
        return settings

    def _watch(self) -> None:
        for server in (self._postgres, self._valkey):
            if server is not None:
                self._attend(type(server).__name__, partial(self._see_to_server, server))
        for worker in self._workers:
            self._attend(f"worker {worker.number}", partial(self._see_to_worker, worker))

    def _attend(self, what: str, work: Callable[[], None]) -> None:
        """Attend a process. No failure ends the supervisor, which has to attend all others. Failures may be a full
        disk, a full table of processes, or a package that is being replaced.
        """
        if time.monotonic() < self._resting.get(what, 0):
            return
        try:
            work()
        except Exception as error:
            self._resting[what] = time.monotonic() + CRASHED_SOON_SECONDS
            failure = repr(error)
            # The text of a known failure suffices. A defect of this program is logged with its traceback once.
            is_new_defect = not isinstance(error, Fatal | OSError) and self._failures.get(what) != failure
            self._failures[what] = failure
            log.error("%s: %s; retrying", what, error, exc_info=error if is_new_defect else None)  # noqa: TRY400

    def _see_to_server(self, server: Postgres | Valkey) -> None:
        if not server.is_running() and not self._is_stopping:
            log.error("%s ended; restarting it", type(server).__name__)
            server.start()
        server.log.rotate()

    def _see_to_worker(self, worker: Worker) -> None:
        has_waited = time.monotonic() - worker.started_at > CRASHED_SOON_SECONDS
        if not worker.is_running() and has_waited and not self._is_stopping:
            log.error("worker %d ended: %s; starting another", worker.number, worker.last_words())
            worker.start()

    def _roll(self) -> None:
        """Replace all workers one after the other. In each place, one process accepts connections at all times."""
        log.info("replacing the workers one by one")
        for worker in self._workers:
            try:
                old = worker.replace()
            except (Fatal, OSError) as error:
                log.error("worker %d could not be replaced: %s", worker.number, error)  # noqa: TRY400 - says it all
                return
            if old is not None:
                self._see_off(old)
            if self._is_stopping:
                return
        log.info("all workers are replaced")

    def _see_off(self, old: subprocess.Popen[bytes]) -> None:
        """Drain and end a process, and attend all others meanwhile."""
        old.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while old.poll() is None and time.monotonic() < deadline and not self._pause():
            self._watch()
        old.kill()
        old.wait()
        close_pipes(old)

    def _stop(self) -> None:
        if self._workers:
            tell("Stopping: clients reconnect elsewhere, frames in progress are finished …")
        for worker in self._workers:
            # Close our copy first, because the kernel would add connections to it while the worker drains.
            worker.listener.close()
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            while worker.is_running() and not self._is_forced and time.monotonic() < deadline:
                self._wake_up.wait(WATCH_SECONDS)
            worker.kill()
        for server in (self._valkey, self._postgres):
            if server is not None:
                server.stop()
        if self._folder is not None:
            self._folder.release()
        shutil.rmtree(self._shared, ignore_errors=True)

    def _on_hangup(self, *_: object) -> None:
        self._is_rolling = True

    def _on_signal(self, *_: object) -> None:
        self._is_forced = self._is_stopping
        self._is_stopping = True

    def _greet(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        tell(f"OpenChat {version('openchat')} is running. Ctrl-C stops it.")
        tell(f"  listening  {url}  (WebSocket at /v1/ws)")
        tell(f"  data       {named(self._settings)}")
        if self._valkey is not None and self._settings.database_url:
            tell(f"  Valkey     {self._settings.data_path}  (its own; REDIS_URL names another)")
        tell(f"  workers    {len(self._workers)}  (kill -HUP {os.getpid()} replaces them)")
        if self._settings.registration == "closed":
            tell(f"  try next   {self._command('user create Ada ada@example.org --admin')}")
        else:
            body = '{"name":"Ada","email":"ada@example.org","password":"correct horse"}'
            tell(f"  try next   curl {url}/v1/auth/register -d '{body}'")

    def _command(self, words: str) -> str:
        """Return a command line for this installation, with the variables that it needs."""
        settings = self._settings
        has_folder = self._folder is not None and bool(settings.data_dir)
        wanted = ["database_url", "redis_url", *(["data_dir"] if has_folder and settings.database_url else [])]
        variables = [variable(name) for name in wanted if getattr(settings, name)]
        note = f"  # with the {' and '.join(variables)} of this server" if variables else ""
        folder = f" --data-dir {shlex.quote(settings.data_dir)}" if has_folder and not settings.database_url else ""
        return f"openchat {words}{folder}{note}"


async def prepare(settings: Settings) -> None:
    """Check that the given Redis answers, and migrate the given database. Raises Fatal if that fails."""
    if settings.redis_url:
        await _require_redis(settings.redis_url)
    if settings.database_url:
        connection = await database.connect(settings.database_url)
        try:
            for step in await migrate.migrate(settings.database_url):
                tell(f"Database: {step}")
            await database.speak(connection, settings.search_language)
        finally:
            await connection.close()


async def _require_redis(url: str) -> None:
    try:
        redis = Redis.from_url(url, socket_connect_timeout=CONNECT_SECONDS)
    except ValueError:
        raise Fatal("REDIS_URL is invalid. Check its port, database and options.") from None
    try:
        await redis.ping()
    except REDIS_LOST as error:
        raise redis_unreachable(error) from None
    finally:
        await redis.aclose()


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """Return `count` listening sockets that share a port. The kernel balances connections among them. Raises Fatal if
    the port is taken.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Bind without SO_REUSEPORT first. Otherwise a second server would get half of the connections without an error.
        with socket.socket(family, kind, number) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        listeners = []
        for _ in range(count):
            listener = socket.socket(family, kind, number)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listeners.append(listener)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a valid name"
        raise Fatal(f"cannot listen on {host} port {port}: {reason}. Choose another by --host or --port.") from None
    return listeners


def close_pipes(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes to a process."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def tell(line: str) -> None:
    """Print a line for the operator. Ignore a closed terminal, because a server outlives the terminal that
    started it.
    """
    with contextlib.suppress(Fatal):
        say(line)
