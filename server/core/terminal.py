"""Text for a terminal or a log: foreign text cannot move the cursor, change colours or reorder a line."""

import contextlib
import errno
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import asyncpg

from server.core.errors import Fatal, told
from server.core.faults import Fault, cause, fault_of, is_without_thread

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended."""

UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETRESET}
"""Network errors without a class of their own."""

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Categories of characters that a terminal obeys instead of showing them: controls, formats and line ends."""


def plain(text: str) -> str:
    r"""Return text with each invisible character as its Python escape, such as `\x1b` or `\u202e`."""
    return _escaped(text, lambda character: character.encode("unicode_escape").decode())


def plain_json(text: str) -> str:
    """Return equivalent JSON with each invisible character as its escape. Line feeds between values remain."""
    return _escaped(text, lambda character: "\n" if character == "\n" else json.dumps(character)[1:-1])


def say(line: str) -> None:
    """Print a line. Raises Fatal if standard output cannot be written."""
    with printing() as out:
        out.write(plain(line) + "\n")
        out.flush()


def say_json(text: str) -> None:
    """Print JSON, or a piece of it. Raises Fatal if standard output cannot be written."""
    with printing() as out:
        out.write(plain_json(text))


def say_bytes(piece: bytes) -> None:
    """Print a piece of a file unchanged, for a pipe. Raises Fatal if standard output cannot be written."""
    with printing() as out:
        out.buffer.write(piece)


@contextmanager
def printing() -> Iterator[TextIO]:
    """Return standard output. Raises Fatal if it is closed or the block's output cannot be written. The block must not
    do anything else that raises OSError, such as using a database.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise Fatal("standard output is closed.")
    try:
        yield sys.stdout
    except OSError as error:
        raise Fatal(f"standard output cannot be written: {error.strerror or type(error).__name__}.") from None


def complain(error: object, command: str = "openchat") -> None:
    """Print an error, or a part of a longer one, as one line on standard error, if that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{command}: {plain(str(error))}\n")


def status_of(work: Callable[[], int]) -> int:
    """Return the exit status of a command, which is the result of `work`. A failure with an outside cause prints one
    sentence and gives 1; an interrupt gives 130.
    """
    try:
        try:
            status = work()
        except SystemExit as end:  # a library ends the program
            status = end.code if isinstance(end.code, int) else 1
        with printing() as out:
            out.flush()
    except KeyboardInterrupt:
        complain("interrupted.")
        _discard_output()
        return INTERRUPTED
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        complain(reason)
    else:
        return status
    _discard_output()
    return 1


def reason_of(error: Exception) -> str | None:
    """Return the line for the operator about a failure with an outside cause, or None for a defect of this program."""
    if isinstance(error, Fatal):
        return str(error)
    if isinstance(error, asyncpg.InsufficientPrivilegeError):  # such as after a dump was restored by a superuser
        return (
            f"the role in DATABASE_URL lacks a right: {told(error)}. Use the role that owns the database and its "
            "tables, or restore the dump with `pg_restore --role` (docs/operations.md)."
        )
    return None if fault_of(error) is None and not isinstance(error, OSError) else _failure(cause(error))


def _failure(error: BaseException) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or told(error) or type(error).__name__
    is_of_a_connection = isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, OSError) and not is_of_a_connection and error.errno not in UNREACHABLE:
        return f"{error.filename}: {reason}." if error.filename is not None else f"{reason}."
    if is_without_thread(error):
        return f"{reason}. Run the command again when the machine is less busy."
    if fault_of(error) is Fault.FULL:
        return f"the database cannot store anything: {reason}. Correct that, and run the command again."
    return f"the database cannot be used: {reason.rstrip('.')}. Run the command again."


def _discard_output() -> None:
    """Discard pending output. Otherwise, the interpreter would report an error about it when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return "".join(
        escape(character) if unicodedata.category(character) in INVISIBLE else character for character in text
    )
