"""Max times for which statements of a worker wait for a lock, with a connection. Frames try again after a time-out.

PostgreSQL calls these times `lock_timeout`. Without one, a few held rows would take all connections of a worker.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from server.core.faults import RowHeld

FIRST_LOCK_MS = 50
"""Max wait of the first attempt of a frame, in milliseconds. Any number of frames may wait concurrently."""
RETRY_LOCK_MS = 200
"""Max wait of each further attempt, in milliseconds. It has one of few places. Where many change one conversation, the
turn of a frame comes in that time, because PostgreSQL serves the waiting transactions in order.
"""
JOB_LOCK_MS = 500
"""Max wait of a job, in milliseconds. Due work of others waits behind it."""
ATTEMPTS_SECONDS = 10.0
"""Max time for which a frame or a request repeats attempts, in seconds."""


def within(lock_ms: int) -> str:
    """Return an SQL condition that is always true, and limits each wait of its statement for a lock. It is evaluated
    before the rows, because it depends on none.
    """
    return f"(SELECT set_config('lock_timeout', '{lock_ms}ms', true)) IS NOT NULL"


BRIEFLY = within(FIRST_LOCK_MS)
"""Condition for a statement of a frame that locks rows without a transaction."""
WITHIN_RETRY_LOCK_MS = within(RETRY_LOCK_MS)
"""Condition for a statement of many users that waits for their conversations."""


def begin(lock_ms: int) -> str:
    """Return the statement that begins a transaction with a limit, in one round trip."""
    return f"BEGIN; SET LOCAL lock_timeout = '{lock_ms}ms'"


@contextmanager
def row_held() -> Iterator[None]:
    """Raise RowHeld for a statement that waited for a lock too long."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise RowHeld(str(error)) from None
