"""What is done again and again, and goes on whatever happens to it once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def every(seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    """Do `job` now and then every so many seconds, until cancelled. What it raises is logged."""
    while True:
        try:
            await job()
        except Exception:
            log.exception("%s failed", job.__qualname__)
        await asyncio.sleep(seconds)
