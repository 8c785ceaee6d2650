"""Faults of the database: errors of a statement that neither its caller nor a defect of this program explains.

Each kind has its own refusal, its own lines in the log and its own count in the metrics. The section "Faults of the
database" in docs/operations.md lists what an operator does about them.
"""

import asyncio
import logging
import re
from enum import StrEnum

import asyncpg

from protocol.errors import ErrorCode, Refused


class Fault(StrEnum):
    """A kind of fault."""

    LOST = "lost"
    """PostgreSQL cannot be reached, or does not respond. Whether the last statement took effect is unknown."""
    BUSY = "busy"
    """A deadlock, a time-out of a statement or a lock, or no free connection. The statement had no effect."""
    FULL = "full"
    """PostgreSQL cannot store anything until the operator acts: the disk is full, memory is exhausted, or the database
    is read-only. The statement had no effect.
    """


class Away(ConnectionError):  # noqa: N818 - a state of the environment
    """PostgreSQL accepts no new connection. The code that raises this has logged it."""

    def __init__(self, reason: str, fault: Fault = Fault.LOST) -> None:
        super().__init__(reason)
        self.fault = fault


class Exhausted(TimeoutError):  # noqa: N818 - a state of the server
    """A connection, or another thing that callers take in turns, did not become free in time."""


class RowHeld(Exception):  # noqa: N818 - the caller tries again
    """Another transaction holds a row that this attempt needs. The attempt had no effect."""


class HeldTooLong(Exception):  # noqa: N818 - a state of the database
    """Another transaction held a row during all attempts. They had no effect."""

    sqlstate = asyncpg.LockNotAvailableError.sqlstate


ROLLED_BACK = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
"""Raised when PostgreSQL ends a transaction that succeeds if it is retried once."""
OF_SOME = (*ROLLED_BACK, asyncpg.LockNotAvailableError)
"""Raised when PostgreSQL ends a statement because of some of its items. It succeeds without them."""

_LOST: tuple[type[BaseException], ...] = (
    ConnectionError,
    TimeoutError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.StatementCompletionUnknownError,
)
_BUSY: tuple[type[BaseException], ...] = (
    Exhausted,
    RowHeld,
    HeldTooLong,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.InsufficientResourcesError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
_FULL: tuple[type[BaseException], ...] = (
    asyncpg.DiskFullError,
    asyncpg.OutOfMemoryError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresIOError,
)
_BROKEN = re.compile(r"\bclosed\b|\breleased\b|operation .*\bin progress\b|\bnot connected\b")
"""Texts of asyncpg's errors about a connection that is lost or closing. Its other errors are defects of this
program.
"""

REFUSALS: dict[Fault, tuple[str, int]] = {
    Fault.LOST: ("The database cannot be reached. Retry the same frame after `retry_after_ms`.", 500),
    Fault.BUSY: ("The server is busy. Retry the same frame after `retry_after_ms`.", 1_000),
    Fault.FULL: (
        "The database cannot store anything until its operator acts. Retry the same frame after `retry_after_ms`.",
        10_000,
    ),
}
"""The message of each kind's refusal, and the time after which to retry, in milliseconds."""

ONCE, OVER = "once", "over"
"""Attributes of log records (core/log.py). `ONCE` is the name of a state, of whose records one per minute is logged.
`OVER` is a part of the names of all states that have ended.
"""
LOST_STATE = "a lost database"
FULL_STATES = f"database {Fault.FULL}"


def fault_of(error: BaseException) -> Fault | None:
    """Return the kind of an error, or None if it is no fault of the database."""
    if isinstance(error, Away):
        return error.fault
    if isinstance(error, _FULL):
        return Fault.FULL
    if isinstance(error, asyncpg.StatementCompletionUnknownError):
        return Fault.LOST
    if isinstance(error, _BUSY) or is_without_thread(error):
        return Fault.BUSY
    if isinstance(error, _LOST):
        return Fault.LOST
    is_broken = isinstance(error, asyncpg.InterfaceError) and _BROKEN.search(str(error)) is not None
    return Fault.LOST if is_broken else None


def is_lost(error: BaseException) -> bool:
    """Whether the database was lost during a statement, so that it may have taken effect, and its connection may still
    be busy.
    """
    return fault_of(error) is Fault.LOST


def may_have_committed(error: BaseException) -> bool:
    """Whether a write that raised `error` may have taken effect, without publishing its events. It did not if it was
    refused, by this program or by PostgreSQL.
    """
    if isinstance(error, Refused | asyncpg.PostgresError) or fault_of(error) is not None:
        return is_lost(error)
    return True


def is_without_thread(error: BaseException) -> bool:
    """Whether the system refused a new thread. Python has no class for this."""
    return type(error) is RuntimeError and str(error) == "can't start new thread"


def refusal_of(fault: Fault) -> Refused:
    """Return the refusal for a fault."""
    message, retry_after_ms = REFUSALS[fault]
    return Refused(ErrorCode.UNAVAILABLE, message, retry_after_ms=retry_after_ms)


def cause(error: BaseException) -> BaseException:
    """Return the error that closed a connection, given an error that was raised because the connection is closed."""
    while isinstance(error, asyncpg.InterfaceError) and (before := error.__context__) is not None:
        if fault_of(before) is None and not isinstance(before, OSError):
            break
        error = before
    return error


def log_fault(
    log: logging.Logger, what: str, error: BaseException, *, of: str | None = None, fault: Fault | None = None
) -> None:
    """Log that a fault made `what` fail, with its kind and its SQLSTATE, unless it was logged where it was raised.

    Repetitions are counted, and their number is logged once per minute. A lost database is one state, whatever failed.
    Other faults are a state for each SQLSTATE and `of`, which is `what` by default. A `what` that names a row needs an
    `of`. `fault` is the kind, if the caller knows it.
    """
    if isinstance(error, Away):
        return
    kind, error = fault or fault_of(error) or Fault.LOST, cause(error)
    reason = getattr(error, "sqlstate", None) or type(error).__name__
    state = LOST_STATE if kind is Fault.LOST else f"{of or what}, database {kind} ({reason})"
    level = logging.ERROR if kind is Fault.FULL else logging.WARNING
    log.log(level, "%s failed, database %s (%s): %s", what, kind, reason, error, extra={ONCE: state})
