"""Statements for many users. They pass locked rows, so that nobody waits for another user's row.

Each calls a function of schema.sql with the items as JSON, whether to pass locked conversations, and the max wait for
other rows (docs/decisions/0062-the-common-statement-waits-for-nobody.md).
"""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from asyncpg import LockNotAvailableError, QueryCanceledError, Record

from server.fairness.batcher import Slow

SHARED_LOCK_MS, ALONE_LOCK_MS = 10, 200
"""Max wait for a row other than the conversation's, in milliseconds. The first is for a batch of several items, the
second for a single one, which delays only its conversation.
"""

Query: TypeAlias = Callable[..., Awaitable[list[Record]]]
"""A statement with its connection and its items. The other parameters follow."""


async def waiting(query: Query, *more: object, count: int) -> list[Record]:
    """Return the rows of a statement for `count` items, which waits for locked conversations.

    Has no effect and raises LockNotAvailableError if it waits for another row longer than `SHARED_LOCK_MS` or
    `ALONE_LOCK_MS`. In a transaction, this limit stays in force for later statements.
    """
    patience_ms = ALONE_LOCK_MS if count == 1 else SHARED_LOCK_MS
    return await query(False, f"{patience_ms}ms", *more)  # noqa: FBT003 - a parameter of the statement


async def passing(query: Query, *more: object, count: int) -> list[Record] | None:
    """Do the same, but pass locked conversations. Return None, without an effect, if a single item would wait for
    another row longer than `SHARED_LOCK_MS`. Several raise LockNotAvailableError, and the caller repeats them in parts.

    Raises what `passed` raises.
    """
    return await passed(query(True, brief(), *more), count=count)  # noqa: FBT003 - as above


def brief() -> str:
    """Return `SHARED_LOCK_MS` as a `lock_timeout`."""
    return f"{SHARED_LOCK_MS}ms"


async def passed(rows: Awaitable[list[Record]], *, count: int) -> list[Record] | None:
    """Return the rows of a statement for `count` items that passes locked conversations, or None as `passing`.

    Raises Slow if PostgreSQL cancelled the statement. It had no effect then, because the limit does not apply to the
    commit. After a timeout of the client, it may have had one (docs/decisions/0066).
    """
    try:
        return await rows
    except QueryCanceledError:
        raise Slow from None
    except LockNotAvailableError:
        if count > 1:
            raise
        return None
