"""A user who has nothing to do with an attack, and who measures how long answers take while it goes on.

The bystander is a process of its own: `python -m tests.bystander URL TOKEN CONVERSATION WORKER SECONDS` asks, one after
the other, for what people do all the time, and prints how long each answer took. In the attackers' process it would
measure how busy they are.

Attackers, server and bystander share the machine, which in life they do not. So attackers run at the lowest priority,
and of each answer's time the bystander takes off what the worker and itself waited for a processor (schedstat,
proc(5)). Without that, of 13 seconds by which the loop was late during one attack, it had waited 10 for a processor.
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
from tests.world import Somebody, message

PAUSE_SECONDS = 0.01
"""Pause between an answer and the next request: the bystander is no load."""
ROUNDS = 5
"""Max measurements of one attack, each between two quiet ones. Most of them decide: neither one lucky round nor one
round during which another program had the processor does.
"""
SECONDS = 2.0
ROOT = Path(__file__).parent.parent


class Answers(NamedTuple):
    """How long answers took, in milliseconds."""

    median: float
    p99: float
    asked: int


class Round(NamedTuple):
    """A measurement during an attack, and the quiet ones beside it."""

    before: Answers
    during: Answers
    after: Answers

    @property
    def ratio(self) -> float:
        """How often the p99 with the attack is the worse quiet one."""
        return self.during.p99 / max(self.before.p99, self.after.p99)


class Bystander:
    """Somebody with a conversation of their own, at one server."""

    def __init__(self, url: str, who: Somebody, conversation_id: ConversationId, *, worker: int) -> None:
        """`worker` is the process that serves `url`."""
        self.user_id = who.id
        self._arguments = (url, who.token, str(conversation_id), str(worker))
        self.rounds: list[Round] = []

    async def measure(self, seconds: float = SECONDS) -> Answers:
        """Ask for so long and return how long the answers took. Raises RuntimeError if one was refused."""
        asking = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bystander", *self._arguments, str(seconds),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        with lowest_priority():  # the attackers', if there are any
            said, problem = await asking.communicate()
        if asking.returncode:
            raise RuntimeError(f"the bystander was refused: {problem.decode()[-500:]}")
        took = sorted(msgspec.json.decode(said, type=list[float]))
        return Answers(statistics.median(took), took[int(0.99 * len(took))], len(took))

    async def is_unaffected(
        self, attack: Callable[[], Awaitable[None]], *, ratio: float = 3.0, seconds: float = SECONDS
    ) -> None:
        """Measure in turns without the attack and with it. Raises AssertionError, with all figures, if in most rounds
        the p99 with the attack is more than `ratio` times the worse one of the quiet measurements beside it.

        `attack` goes on until it is cancelled; what it raises before that is raised here.
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
    """Let everything else go before the calling thread (sched(7)); for good where only root may take that back."""
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, 19)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, before)


def resident_bytes(pid: int) -> int:
    """Return how much memory a process holds (VmRSS of /proc/PID/status, proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no memory")


def waited_ms(pid: int) -> float:
    """Return how long the first thread of a process has waited for a processor; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e6
    except (FileNotFoundError, IndexError):
        return 0.0


async def _ask(url: str, token: str, conversation_id: ConversationId, *, worker: int, seconds: float) -> list[float]:
    own = os.getpid()
    took: list[float] = []
    async with Client(url, token) as asker:
        until = time.monotonic() + seconds
        for frame in _frames(conversation_id):
            waited = waited_ms(worker) + waited_ms(own)
            began = time.perf_counter()
            await asker.call(frame)
            elapsed = 1_000 * (time.perf_counter() - began)
            took.append(max(0.0, elapsed - (waited_ms(worker) + waited_ms(own) - waited)))
            if time.monotonic() > until:
                return took
            await asyncio.sleep(PAUSE_SECONDS)
    return took


def _frames(conversation_id: ConversationId) -> Iterator[client.Frame]:
    """Yield what people do all the time, for ever."""
    for number in cycle(range(4)):
        if number == 0:
            yield message(conversation_id, "Is it still as quick as it was?")
        elif number == 1:
            yield client.History(conversation_id=conversation_id, limit=10)
        elif number == 2:
            yield client.GetMe()
        else:
            yield client.Ping()


if __name__ == "__main__":
    url, token, conversation, worker, seconds = sys.argv[1:]
    about = ConversationId(UUID(conversation))
    answers = asyncio.run(_ask(url, token, about, worker=int(worker), seconds=float(seconds)))
    sys.stdout.buffer.write(msgspec.json.encode(answers))
