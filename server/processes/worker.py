"""A worker process: one loop, one hub, one share of the connections. The supervisor starts it.

`python -m server.processes.worker` reads its orders, one line of JSON, from standard input, and ends when that closes:
a worker does not outlive its supervisor. It says "ready" on standard output when it takes connections.
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
from server.db.epoch import OVER
from server.gateway.http_protocol import Http
from server.gateway.sockets import raise_descriptor_limit
from server.gateway.websocket import WebSocket
from server.processes.worker_spec import DRAIN_SECONDS, READY, Orders

GC_THRESHOLDS = (2_500, 200, 20)
"""New objects between collections of the young ones, and how many of those until the survivors are walked over again.

A connection is some hundred objects that stay: by default (700, 10) they would be walked over every few connections.
The first number bounds the pause: with 25,000, the garbage of 120 connections that had closed took 70 ms at once.
"""
SECURITY_HEADERS = [
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("referrer-policy", "no-referrer"),
]
"""On every answer: none of them is a page, and a browser should not take one for one."""
OVER_SECONDS = 1
"""Max seconds that requests of an epoch that is over are waited for."""
DATE_SECONDS = 1.0
"""How often the Date header of HTTP answers is renewed: it counts in seconds."""


class DrainingServer(uvicorn.Server):
    """uvicorn, which leaves signals to us, says when it is ready, and sends clients away in batches before it stops."""

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
        """Have `serve` drain and return."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Wait until told to stop, or until the epoch is over, and renew the Date header. uvicorn looks ten times a
        second; idle should be idle.
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
        """Stop accepting, drain, and then stop as uvicorn does.

        When the epoch is over, go on accepting until all is done, and refuse: before this worker has ended, nobody else
        takes the connections of its listener.
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


async def serve(orders: Orders) -> None:
    """Run until told to stop. Raises Fatal if something it needs cannot be reached, and when the epoch of the database
    is over: the supervisor starts another one.
    """
    app = await App.open(orders.settings, Path(orders.folder), orders.number, is_alone=orders.is_alone)
    server = DrainingServer(app)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.stop)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # a Ctrl-C is the supervisor's to act on
    loop.add_reader(sys.stdin.fileno(), _orphaned, server)
    # What is there now is there for good: later collections need not look at it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        await server.serve(sockets=[socket.socket(fileno=orders.listener)])
    finally:
        await app.close()
    if app.epoch.over.is_set():
        raise Fatal(OVER)


def _orphaned(server: DrainingServer) -> None:
    """Stop when the supervisor has ended. What is read from then on is the end, again and again."""
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    server.stop()


def main() -> None:
    """Run a worker as ordered on standard input."""
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    log.configure(f"worker {orders.number}")
    raise_descriptor_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(orders))
    except Fatal as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
