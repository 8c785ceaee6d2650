"""Looks names up in threads. A name that nobody answers for delays only who asked for it, and not the worker's stop.

`getaddrinfo` can't be cancelled: after a time-out its thread runs on until the system's resolver gives up.
"""

import asyncio
import contextlib
import socket
import threading

MAX_OVERDUE = 256
"""Max look-ups that run on after their callers have given up, per worker. Further callers wait for their thread."""


class Resolver:
    """One daemon thread per name that is being looked up; a second caller of the same name waits for the same thread.

    No caller waits for a thread of another name, so the callers bound the threads: `MAX_OVERDUE` and one per caller.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[list[str]]] = {}
        self._overdue = 0

    async def addresses(self, host: str, *, seconds: float) -> list[str]:
        """Return all addresses of a name. Raises OSError or ValueError if it has none, and TimeoutError."""
        asked = self._running.get(host)
        found = asked or self._begin(host)
        # `wait` cancels nothing: the thread goes on, and others may wait for it.
        await asyncio.wait({found}, timeout=seconds)
        if found.done():
            return found.result()
        if asked is None and self._overdue >= MAX_OVERDUE:
            await asyncio.wait({found})
        elif asked is None:
            self._overdue += 1
            found.add_done_callback(self._ended_late)
        raise TimeoutError("its name was not resolved in time")

    def _begin(self, host: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[str]] = loop.create_future()

        def look_up() -> None:
            addresses: list[str] = []
            problem: Exception | None = None
            try:
                addresses = [str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
            except Exception as error:  # noqa: BLE001 - the caller raises it
                problem = error.with_traceback(None)  # this frame, which holds it, would be in it
            with contextlib.suppress(RuntimeError):  # the worker has stopped meanwhile
                loop.call_soon_threadsafe(self._ended, host, addresses, problem)

        try:
            threading.Thread(target=look_up, name="resolver", daemon=True).start()
        except RuntimeError:
            raise OSError("no thread to resolve its name") from None
        self._running[host] = found
        return found

    def _ended(self, host: str, addresses: list[str], problem: Exception | None) -> None:
        found = self._running.pop(host)
        if problem is None:
            found.set_result(addresses)
        else:
            found.set_exception(problem)
            found.exception()  # there may be no caller left

    def _ended_late(self, _: asyncio.Future[list[str]]) -> None:
        self._overdue -= 1
