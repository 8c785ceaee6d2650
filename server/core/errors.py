"""Failures below the handlers, mapped to the protocol's errors: violated constraints and lost databases."""

import asyncio
import logging
import re

import asyncpg
from redis.exceptions import RedisClusterException, RedisError

from protocol.errors import ErrorCode, Refused

RETRY_AFTER_MS = 500


UNFIT = "A value is out of range for the database. Send a smaller one."
INTERNAL = Refused(ErrorCode.INTERNAL, "Internal error; it was logged. Tell the operator.")


class Fatal(Exception):  # noqa: N818 - it ends the program, and is no defect of it
    """The program cannot start or continue. The text is the one line that the operator sees."""


class Away(ConnectionError):  # noqa: N818 - a state of the environment
    """PostgreSQL cannot be reached. The code that raises this has logged it."""


class NotFound(Refused):
    """The refusal for objects that do not exist or may not be seen. The message is always the same."""

    def __init__(self, path: str | None = None) -> None:
        super().__init__(ErrorCode.NOT_FOUND, "Not found, or you may not see it. Check the id.", path=path)


class NotActive(Refused):
    """The refusal for a user who was deactivated, disabled or erased while their frame was in flight."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.UNAUTHENTICATED, "Your account is not active. Log in again.")


_EMAIL_TAKEN = (
    ErrorCode.CONFLICT,
    "This e-mail address already has an account. Log in, or use another address.",
    "email",
)
_CONVERSATION_TAKEN = (ErrorCode.CONFLICT, "Another conversation has this id. Make a new id.", "conversation_id")
# The refusal for each constraint of schema.sql that a frame can violate, by the constraint's name.
CONSTRAINTS: dict[str, tuple[ErrorCode, str, str | None]] = {
    "user_email_key": _EMAIL_TAKEN,
    "account_provider_key": _EMAIL_TAKEN,
    "user_email_lower": (
        ErrorCode.INVALID,
        "The server cannot convert this e-mail address to lower case. Use another one.",
        "email",
    ),
    "conversation_pkey": _CONVERSATION_TAKEN,
    "conversation_id_hash_key": _CONVERSATION_TAKEN,
    "message_pkey": (ErrorCode.CONFLICT, "Another message has this id. Make a new id.", "message_id"),
    "message_edit_pkey": (ErrorCode.CONFLICT, "Another edit has this id. Make a new id.", "edit_id"),
    "conversation_participant_user_fkey": (ErrorCode.NOT_FOUND, "There is no such user. Check the id.", "participants"),
    "conversation_direct_low_fkey": (ErrorCode.NOT_FOUND, "There is no such user. Check the id.", "user_id"),
    "conversation_direct_high_fkey": (ErrorCode.NOT_FOUND, "There is no such user. Check the id.", "user_id"),
}

_LOST: tuple[type[BaseException], ...] = (
    OSError,  # the base of ConnectionError and TimeoutError
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.ReadOnlySQLTransactionError,
)

_NO_ENTRY = (asyncpg.InvalidCatalogNameError, asyncpg.InvalidAuthorizationSpecificationError)
"""Raised by connecting if the database does not exist, or if the role or its password is wrong."""
ROLLED_BACK = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
"""Raised when PostgreSQL ends a transaction that succeeds if it is retried once."""
HELD_UP = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError)
"""Raised by a statement that waited or ran for too long. It is not a defect of this program."""

_UNFIT: tuple[type[BaseException], ...] = (
    asyncpg.DataError,  # U+0000, times and numbers out of range
    asyncpg.ProgramLimitExceededError,
    asyncpg.StatementTooComplexError,
)
"""Values that PostgreSQL cannot store: the last check below the limits of protocol/."""
_BRIEF: tuple[type[BaseException], ...] = (RecursionError, OverflowError, UnicodeError)
"""Defects that a client's value reveals. Their tracebacks are long, say little, and quote the value."""

_BROKEN = re.compile(r"\bclosed\b|\breleased\b|operation .*\bin progress\b|\bnot connected\b")
"""Texts of asyncpg's errors about a connection that is lost or closing. Its other errors are defects of this
program.
"""

REDIS_LOST = (RedisError, RedisClusterException, OSError, asyncio.TimeoutError)
"""Raised when Redis cannot be reached."""


def redis_unreachable(error: Exception) -> Fatal:
    """Return the error for an operator whose Redis cannot be reached at the start."""
    return Fatal(f"Redis cannot be reached: {str(error).rstrip('.')}. Check REDIS_URL.")


def is_lost(error: BaseException) -> bool:
    """Whether the database was lost during a statement, or the system refused a thread. Retrying later is right."""
    return isinstance(error, _LOST) or is_without_thread(error)


def is_without_thread(error: BaseException) -> bool:
    """Whether the system refused a new thread. Python has no class for this."""
    return type(error) is RuntimeError and str(error) == "can't start new thread"


def is_known(error: BaseException) -> bool:
    """Whether the machine, the database or Redis explains a failure, so that a traceback adds nothing."""
    if isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError)):
        return _BROKEN.search(str(error)) is not None
    return isinstance(error, (Fatal, *_NO_ENTRY, *HELD_UP, *REDIS_LOST)) or is_lost(error)


def cause(error: BaseException) -> BaseException:
    """Return the error that closed a connection, given an error that was raised because the connection is closed."""
    while isinstance(error, asyncpg.InterfaceError) and error.__context__ is not None and is_lost(error.__context__):
        error = error.__context__
    return error


def told(error: BaseException) -> str:
    """Return the text of `error` for the log. It leaves out DETAIL, HINT and context of PostgreSQL's errors, which
    quote rows and parameters. It also leaves out messages that quote a value.
    """
    is_about_a_value = isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)
    if is_about_a_value or isinstance(error, asyncpg.DataError):
        return "a value was refused"
    if isinstance(error, (asyncpg.PostgresError, asyncpg.InterfaceError)):
        return str(error.args[0]) if error.args else type(error).__name__
    return str(error) or type(error).__name__


def log_defect(log: logging.Logger, what: str, error: Exception) -> None:
    """Log a defect of this program that made `what` fail. If a client's value explains it, log one line."""
    if isinstance(error, _BRIEF):
        log.error("%s failed: %s", what, type(error).__name__)
    else:
        log.error("%s failed", what, exc_info=error)


def log_failure(log: logging.Logger, what: str, error: Exception) -> None:
    """Log that `what` failed and will be retried. It takes one line if the machine, the database or Redis explains it.
    While PostgreSQL is away, only the code that connects to it logs that, and not each job that needs it.
    """
    if isinstance(error, Away):
        return
    if is_known(error):
        log.warning("%s failed and will be retried: %s", what, error)
    else:
        log_defect(log, what, error)


def refusal(error: Exception) -> Refused | None:
    """Return the refusal for `error`, or None if it is a defect of this program.

    The result has no traceback, because a traceback refers to the caller's frame, which refers to the result. Such a
    cycle would keep the request until the collector runs, which is late.
    """
    if isinstance(error, Refused):
        return error.with_traceback(None)
    if isinstance(error, asyncpg.IntegrityConstraintViolationError):
        known = CONSTRAINTS.get(error.constraint_name or "")
        return Refused(known[0], known[1], path=known[2]) if known else None
    if isinstance(error, _UNFIT):
        logging.getLogger(__name__).warning("PostgreSQL rejected a value: %s", type(error).__name__)
        return Refused(ErrorCode.INVALID, UNFIT)
    if is_lost(error) or isinstance(error, HELD_UP):
        return Refused(
            ErrorCode.UNAVAILABLE,
            "Temporarily unavailable. Retry the same frame after `retry_after_ms`.",
            retry_after_ms=RETRY_AFTER_MS,
        )
    return None
