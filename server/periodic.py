"""What is done again and again, and goes on whatever happens to it once."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def every(seconds: float, job: Callable[[], Awaitable[None]], *, is_spread: bool = False) -> None:
    """Do `job` now and then every so many seconds, until cancelled. What it raises is logged.

    A job that `is_spread` begins after a random part of its period: workers that start together do not ask the database
    for the same at the same moment.
    """
    if is_spread:
        await asyncio.sleep(random.random() * seconds)  # noqa: S311 - it spreads load, and keeps no secret
    while True:
        try:
            await job()
        except Exception:
            log.exception("%s failed", job.__qualname__)
        await asyncio.sleep(seconds)
