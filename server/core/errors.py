"""Failures below the handlers, mapped to the protocol's errors: violated constraints and faults of the database."""

import asyncio
import logging

import asyncpg
from redis.exceptions import RedisClusterException, RedisError

from protocol.errors import ErrorCode, Refused
from server.core.faults import fault_of, log_fault, refusal_of

UNFIT = "A value is out of range for the database. Send a smaller one."
INTERNAL = Refused(ErrorCode.INTERNAL, "Internal error; it was logged. Tell the operator.")


class Fatal(Exception):  # noqa: N818 - it ends the program, and is no defect of it
    """The program cannot start or continue. The text is the one line that the operator sees."""


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

_NO_ENTRY = (asyncpg.InvalidCatalogNameError, asyncpg.InvalidAuthorizationSpecificationError)
"""Raised by connecting if the database does not exist, or if the role or its password is wrong."""
_UNFIT: tuple[type[BaseException], ...] = (
    asyncpg.ProgramLimitExceededError,
    asyncpg.StatementTooComplexError,
)
"""Raised for values that PostgreSQL cannot process, beside those of `_is_about_a_value`: U+0000, times and numbers out
of range. It is the last check below the limits of protocol/.
"""
_BRIEF: tuple[type[BaseException], ...] = (RecursionError, OverflowError, UnicodeError)
"""Defects that a client's value reveals. Their tracebacks are long, say little, and quote the value."""

REDIS_LOST = (RedisError, RedisClusterException, OSError, asyncio.TimeoutError)
"""Raised when Redis cannot be reached."""


def redis_unreachable(error: Exception) -> Fatal:
    """Return the error for an operator whose Redis cannot be reached at the start."""
    return Fatal(f"Redis cannot be reached: {str(error).rstrip('.')}. Check REDIS_URL.")


def is_known(error: BaseException) -> bool:
    """Whether the machine, the database or Redis explains a failure, so that a traceback adds nothing."""
    return fault_of(error) is not None or isinstance(error, (Fatal, *_NO_ENTRY, *REDIS_LOST))


def told(error: BaseException) -> str:
    """Return the text of `error` for the log. It leaves out DETAIL, HINT and context of PostgreSQL's errors, which
    quote rows and parameters. It also leaves out messages that quote a value.
    """
    if _is_about_a_value(error):
        return "a value was refused"
    if isinstance(error, (asyncpg.PostgresError, asyncpg.InterfaceError)):
        return str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, TimeoutError) and not str(error):
        return "it did not answer in time"
    return str(error) or type(error).__name__


def _is_about_a_value(error: BaseException) -> bool:
    """Whether PostgreSQL or its client refused a value. The client's class has no public name."""
    is_of_the_client = isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)
    return is_of_the_client or isinstance(error, asyncpg.DataError)


def log_defect(log: logging.Logger, what: str, error: Exception) -> None:
    """Log a defect of this program that made `what` fail. If a client's value explains it, log one line."""
    if isinstance(error, _BRIEF):
        log.error("%s failed: %s", what, type(error).__name__)
    else:
        log.error("%s failed", what, exc_info=error)


def log_failure(log: logging.Logger, what: str, error: Exception) -> None:
    """Log that `what` failed and will be retried. It takes one line if the machine, the database or Redis explains it.
    `log_fault` bounds the lines about the database.
    """
    if fault_of(error) is not None:
        log_fault(log, what, error, of=log.name)
    elif is_known(error):
        log.warning("%s failed and will be retried: %s", what, error)
    else:
        log_defect(log, what, error)


def refusal(error: Exception, what: str) -> Refused | None:
    """Return the refusal of `what` for `error`, or None if it is a defect of this program. A fault of the database is
    logged.

    The result has no traceback, because a traceback refers to the caller's frame, which refers to the result. Such a
    cycle would keep the request until the collector runs, which is late.
    """
    if isinstance(error, Refused):
        return error.with_traceback(None)
    if isinstance(error, asyncpg.IntegrityConstraintViolationError):
        known = CONSTRAINTS.get(error.constraint_name or "")
        return Refused(known[0], known[1], path=known[2]) if known else None
    if isinstance(error, _UNFIT) or _is_about_a_value(error):
        logging.getLogger(__name__).warning("PostgreSQL rejected a value: %s", type(error).__name__)
        return Refused(ErrorCode.INVALID, UNFIT)
    if (fault := fault_of(error)) is None:
        return None
    log_fault(logging.getLogger(__name__), what, error)
    return refusal_of(fault)
