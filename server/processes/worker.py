"""A worker process: one event loop, one hub, and a share of the connections. The supervisor starts it.

`python -m server.processes.worker` reads its parameters, one line of JSON, from standard input. It ends when standard
input closes, so a worker does not outlive its supervisor. It writes "ready" to standard output when it accepts
connections.
"""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from protocol.limits import MAX_FRAME_BYTES
from server.app.app import App
from server.core import log
from server.core.errors import Fatal
from server.core.terminal import reason_of
from server.db.epoch import OVER, OVER_SECONDS
from server.gateway.http_protocol import Http
from server.gateway.sockets import raise_descriptor_limit
from server.gateway.websocket import WebSocket
from server.processes.worker_spec import DRAIN_SECONDS, READY, WorkerSpec

GC_THRESHOLDS = (2_500, 200, 20)
"""Thresholds of the garbage collector: new objects per collection, and young collections per collection of older
objects.

A connection has some hundred objects that stay. By default (700, 10), they would be visited again after every few
connections. The first number bounds the pause. With 25,000, the garbage of 120 closed connections took 70 ms.
"""
SECURITY_HEADERS = [
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("referrer-policy", "no-referrer"),
]
"""Headers of every response, because none is a page and no browser should treat one as a page."""
DATE_SECONDS = 1.0
"""Interval at which the Date header of HTTP responses is renewed, in seconds, which is its resolution."""


class DrainingServer(uvicorn.Server):
    """uvicorn without signal handling. It reports when it is ready, and drains clients in batches before it stops."""

    def __init__(self, app: App) -> None:
        super().__init__(
            uvicorn.Config(
                app.starlette,
                loop="uvloop",
                http=partial(Http, sockets=app.sockets),  # type: ignore[arg-type]  # it makes one
                ws=WebSocket,
                ws_max_size=MAX_FRAME_BYTES,
                ws_per_message_deflate=False,
                ws_ping_interval=None,
                lifespan="off",
                access_log=False,
                log_config=None,
                proxy_headers=False,  # forwarded.py knows which entry counts
                server_header=False,
                headers=SECURITY_HEADERS,
                backlog=4096,
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._app = app

        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Make `serve` drain and return."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Wait for `stop` or the end of the epoch, and renew the Date header. uvicorn wakes up ten times per second,
        even when idle.
        """
        try:
            sys.stdout.write(READY)
            sys.stdout.flush()
        except BrokenPipeError:  # the supervisor has ended
            self.stop()
        ending = asyncio.create_task(self._app.epoch.over.wait())
        ending.add_done_callback(lambda _: self.stop())
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), DATE_SECONDS)
        ending.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, drain, and then stop as uvicorn does.

        At the end of an epoch, continue to accept connections and refuse them until all is done. Nobody else accepts
        the connections of this worker's listener before it has ended.
        """
        is_over = self._app.epoch.over.is_set()
        if is_over:
            self.config.timeout_graceful_shutdown = OVER_SECONDS
        else:
            for server in self.servers:
                server.close()
        await self._app.drain()
        if is_over:
            await self._app.finish()
        await super().shutdown(sockets)


async def serve(spec: WorkerSpec) -> None:
    """Run until told to stop. Raises Fatal if a server cannot be reached, and at the end of the database's epoch. The
    supervisor then starts another worker.
    """
    try:
        app = await App.open(spec.settings, Path(spec.folder), spec.number, is_alone=spec.is_alone)
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        raise Fatal(reason) from error
    server = DrainingServer(app)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.stop)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the supervisor handles Ctrl-C
    loop.add_reader(sys.stdin.fileno(), _orphaned, server)
    # Objects that exist now stay for ever, so later collections need not visit them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        await server.serve(sockets=[socket.socket(fileno=spec.listener)])
    finally:
        await app.close()
    if app.epoch.over.is_set():
        raise Fatal(OVER)


def _orphaned(server: DrainingServer) -> None:
    """Stop when the supervisor has ended. Further reads would only return the end again."""
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    server.stop()


def main() -> None:
    """Run a worker with the parameters on standard input."""
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerSpec)
    log.configure(f"worker {spec.number}")
    raise_descriptor_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(spec))
    except Fatal as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
