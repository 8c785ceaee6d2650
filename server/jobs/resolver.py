"""Resolves names in threads. A name without an answer delays only its callers, and not the shutdown of the worker.

`getaddrinfo` cannot be cancelled. After a time-out its thread continues until the system's resolver gives up.
"""

import asyncio
import contextlib
import socket
import threading

MAX_OVERDUE = 256
"""Max look-ups that continue after their callers have given up, per worker. Further callers wait for their
own thread.
"""


class Resolver:
    """Runs a daemon thread per name in progress. Further callers of the same name share its thread.

    No caller waits for the thread of another name. So there are at most `MAX_OVERDUE` threads, and one per caller.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[list[str]]] = {}
        self._overdue = 0

    async def addresses(self, host: str, *, seconds: float) -> list[str]:
        """Return all addresses of a name. Raises OSError or ValueError if it has none, and TimeoutError after
        `seconds`.
        """
        asked = self._running.get(host)
        found = asked or self._begin(host)
        # `wait` does not cancel the thread, because other callers may wait for it.
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
                problem = error.with_traceback(None)  # a traceback would refer to this frame, which refers to the error
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
            found.exception()  # marks the error as handled, because no caller may be left

    def _ended_late(self, _: asyncio.Future[list[str]]) -> None:
        self._overdue -= 1
