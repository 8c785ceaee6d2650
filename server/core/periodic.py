"""Jobs that run periodically until they are cancelled. A failed run does not stop them."""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

from server.core.failures import Failures

log = logging.getLogger(__name__)

SWALLOWED_SECONDS = 1.0
"""Max time that a cancelled task takes to end before it is cancelled again, in seconds."""


async def every(
    seconds: float,
    job: Callable[[], Awaitable[bool | None]],
    *,
    is_spread: bool = False,
    overruns: Counter[str] | None = None,
) -> None:
    """Run `job` immediately and then after pauses of `seconds`, until cancelled. Errors are logged, and repeated ones
    once a minute.

    A job that returns True has more work due and runs again without a pause. With `is_spread`, the first run starts
    after a random part of `seconds`, so that workers that start together do not query the database together. `overruns`
    counts runs, by the job's name, that took longer than `seconds` until no more work was due.
    """
    if is_spread:
        await asyncio.sleep(random.random() * seconds)  # noqa: S311 - it spreads load, and needs no secrecy
    failures = Failures(log, job.__qualname__)
    began = time.monotonic()
    while True:
        is_more_due: bool | None = False
        try:
            is_more_due = await job()
            failures.end()
        except Exception as error:  # noqa: BLE001 - the job runs again
            failures.add(error)
        if is_more_due:
            await asyncio.sleep(0)
            continue
        if overruns is not None and time.monotonic() - began > seconds:
            overruns[job.__name__] += 1
        await asyncio.sleep(seconds)
        began = time.monotonic()


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks, and return when they have ended.

    Tasks are cancelled repeatedly. `wait_for` of Python 3.11 loses a cancellation if the awaited task ends in the same
    turn of the loop. Without a second cancellation the job would run on forever.
    """
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=SWALLOWED_SECONDS)
