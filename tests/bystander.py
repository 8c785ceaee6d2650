"""A user not involved in an attack, who measures the latency of replies during the attack.

The bystander runs in a separate process, `python -m tests.bystander URL TOKEN CONVERSATION WORKER SECONDS`. It sends
frequent kinds of frames one after the other, and prints the latency of each reply. In the attackers' process it would
measure the load of the attackers.

Attackers, server and bystander share a machine in the test, but not in production. Therefore attackers run at the
lowest priority. The bystander subtracts the time that the worker and itself waited for a CPU (schedstat, proc(5)).
During one attack, the worker's loop was late by 13 seconds, 10 of which it had waited for a CPU.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import msgspec

from protocol import client
from protocol.ids import ConversationId
from prove.client import Client
from tests.world import UserSession, message

PAUSE_SECONDS = 0.01
"""Pause between a reply and the next frame, seconds, so that the bystander causes no load."""
ROUNDS = 5
"""Max measurements of one attack, each between two without it. The majority decides, so that a single lucky round, or
one disturbed by another program, does not matter.
"""
SECONDS = 2.0
ROOT = Path(__file__).parent.parent


class Latency(NamedTuple):
    """Latency of replies in milliseconds, and the number of frames."""

    median: float
    p99: float
    frames: int


class Round(NamedTuple):
    """A measurement during an attack, and those without the attack before and after it."""

    before: Latency
    during: Latency
    after: Latency

    @property
    def ratio(self) -> float:
        """The p99 with the attack divided by the worse p99 without it."""
        return self.during.p99 / max(self.before.p99, self.after.p99)


class Bystander:
    """A user with their own conversation on one server."""

    def __init__(self, url: str, who: UserSession, conversation_id: ConversationId, *, worker: int) -> None:
        """`worker` is the id of the process that serves `url`."""
        self.user_id = who.id
        self._arguments = (url, who.token, str(conversation_id), str(worker))
        self.rounds: list[Round] = []

    async def measure(self, seconds: float = SECONDS) -> Latency:
        """Send frames for some seconds and return the latency of replies. Raises RuntimeError if one was refused."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bystander", *self._arguments, str(seconds),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        with lowest_priority():  # that of the attackers
            output, errors = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"the bystander was refused: {errors.decode()[-500:]}")
        took = sorted(msgspec.json.decode(output, type=list[float]))
        return Latency(statistics.median(took), took[int(0.99 * len(took))], len(took))

    async def is_unaffected(
        self, attack: Callable[[], Awaitable[None]], *, ratio: float = 3.0, seconds: float = SECONDS
    ) -> None:
        """Measure alternately without and with the attack. Raises AssertionError, with all figures, if the p99 in most
        rounds is more than `ratio` times the worse p99 of the two measurements around it.

        `attack` runs until it is cancelled. An exception that it raises before is raised here.
        """
        good = bad = 0
        before = await self.measure(seconds)
        while max(good, bad) <= ROUNDS // 2:
            attacking = asyncio.ensure_future(attack())
            during = await self.measure(seconds)
            if attacking.done():
                attacking.result()
            attacking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await attacking
            after = await self.measure(seconds)
            self.rounds.append(Round(before, during, after))
            is_good = self.rounds[-1].ratio <= ratio
            good, bad = good + is_good, bad + (not is_good)
            before = after
        assert good > bad, "\n".join(f"attacked: {one}" for one in self.rounds)


@contextlib.contextmanager
def lowest_priority() -> Iterator[None]:
    """Give the calling thread the lowest priority (sched(7)). Without the right to raise it, it stays low."""
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, 19)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, before)


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process (VmRSS of /proc/PID/status, proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no memory")


def waited_ms(pid: int) -> float:
    """Return how long the main thread of a process has waited for a CPU, or 0 if the system does not report it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e6
    except (FileNotFoundError, IndexError):
        return 0.0


async def _latencies(
    url: str, token: str, conversation_id: ConversationId, *, worker: int, seconds: float
) -> list[float]:
    own = os.getpid()
    took: list[float] = []
    async with Client(url, token) as connection:
        until = time.monotonic() + seconds
        for frame in _frames(conversation_id):
            waited = waited_ms(worker) + waited_ms(own)
            began = time.perf_counter()
            await connection.call(frame)
            elapsed = 1_000 * (time.perf_counter() - began)
            took.append(max(0.0, elapsed - (waited_ms(worker) + waited_ms(own) - waited)))
            if time.monotonic() > until:
                return took
            await asyncio.sleep(PAUSE_SECONDS)
    return took


def _frames(conversation_id: ConversationId) -> Iterator[client.Frame]:
    """Yield frequent kinds of frames, without end."""
    for number in cycle(range(4)):
        if number == 0:
            yield message(conversation_id, "Is it still as fast as before?")
        elif number == 1:
            yield client.History(conversation_id=conversation_id, limit=10)
        elif number == 2:
            yield client.GetMe()
        else:
            yield client.Ping()


if __name__ == "__main__":
    url, token, conversation, worker, seconds = sys.argv[1:]
    about = ConversationId(UUID(conversation))
    answers = asyncio.run(_latencies(url, token, about, worker=int(worker), seconds=float(seconds)))
    sys.stdout.buffer.write(msgspec.json.encode(answers))
