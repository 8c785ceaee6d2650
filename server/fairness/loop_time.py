"""A budget of the event loop's time, for work that must leave most of it to others."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

Outcome = TypeVar("Outcome")
Clock = Callable[[], float]


class LoopTime:
    """Seconds of the loop's thread. `share` of a second flows in per second, up to `burst` seconds."""

    def __init__(
        self, share: float, burst: float, *, clock: Clock = time.monotonic, used: Clock = time.thread_time
    ) -> None:
        """`used` returns the CPU time of the thread."""
        self._share = share
        self._burst = burst
        self._clock = clock
        self._used = used
        self._left = burst
        self._at = clock()
        self._turn = asyncio.Lock()

    def wait(self) -> float:
        """Return the seconds until the budget is positive, or 0 if it is."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._share)
        self._at = now
        return 0.0 if self._left > 0 else -self._left / self._share + 0.001

    async def turn(self) -> None:
        """Return in a later turn of the loop, when the budget is positive. At most one caller returns per turn, in
        order, because the work of many in one turn would delay everything else.
        """
        is_next = not self._turn.locked()
        async with self._turn:
            if is_next:  # a caller that waited for the lock is in a later turn already
                await asyncio.sleep(0)
            while (seconds := self.wait()) > 0:  # noqa: ASYNC110 - elapsed time has no event
                await asyncio.sleep(seconds)

    def do(self, work: Callable[[], Outcome]) -> Outcome:
        """Return the result of `work`, and spend the time that it takes."""
        began = self._used()
        try:
            return work()
        finally:
            self._left -= self._used() - began

    async def run(self, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Await `work`, and spend the time that it runs, but not the time that it waits."""
        return await _Metered(work, self)


class _Metered(Generic[Outcome]):
    def __init__(self, work: Coroutine[Any, Any, Outcome], budget: LoopTime) -> None:
        self._work = work
        self._budget = budget

    def __await__(self) -> Generator[Any, Any, Outcome]:
        work = self._work
        problem: BaseException | None = None
        while True:
            try:
                if problem is None:
                    waits_for = self._budget.do(lambda: work.send(None))
                else:
                    thrown = problem
                    waits_for = self._budget.do(lambda: work.throw(thrown))  # noqa: B023 - called immediately
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            problem = None
            try:
                yield waits_for
            except BaseException as error:  # noqa: BLE001 - the work decides how to handle it
                problem = error
