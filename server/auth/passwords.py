"""Passwords, hashed with argon2id in a few threads, never on the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

from protocol.errors import ErrorCode, Refused

Given = ParamSpec("Given")
Result = TypeVar("Result")

MAX_WAITING = 64
"""Max passwords that wait for a thread in this process, which is the work of about a second."""
RETRY_AFTER_MS = 1_000

# argon2id with the parameters of OWASP's Password Storage Cheat Sheet: 19 MiB of memory, two passes, one lane. A hash
# takes about 30 ms.
_hasher = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1, type=Type.ID)
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="argon2")
_unfinished: set[asyncio.Future[Any]] = set()
_nobody = _hasher.hash("nobody's password")


async def hashed(password: str) -> str:
    """Return the hash of a password. Raises Refused if too many passwords wait."""
    return await _in_thread(_hasher.hash, password)


async def matches(password: str, password_hash: str | None) -> bool:
    """Whether a password matches a hash. Without an account it takes the same time.

    Raises Refused if too many passwords wait.
    """
    return await _in_thread(_matches, password, password_hash)


def is_outdated(password_hash: str) -> bool:
    """Whether a hash has other parameters than new ones have."""
    return _hasher.check_needs_rehash(password_hash)


def _matches(password: str, password_hash: str | None) -> bool:
    try:
        _hasher.verify(password_hash or _nobody, password)
    except (VerificationError, InvalidHashError):
        return False
    return password_hash is not None


async def _in_thread(work: Callable[Given, Result], *given: Given.args, **_: Given.kwargs) -> Result:
    if len(_unfinished) >= MAX_WAITING:
        raise Refused(
            ErrorCode.UNAVAILABLE,
            "Too many logins are in progress. Retry after `retry_after_ms`.",
            retry_after_ms=RETRY_AFTER_MS,
        )
    future = asyncio.get_running_loop().run_in_executor(_threads, work, *given)
    _unfinished.add(future)
    future.add_done_callback(_unfinished.discard)
    return await future
