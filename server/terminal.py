"""Text for a terminal or a log: what others have written cannot move the cursor, change colours or reorder a line."""

import json
import sys
import unicodedata
from collections.abc import Callable

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Categories of characters that a terminal obeys instead of showing them: controls, formats, line ends."""


def plain(text: str) -> str:
    r"""Return text with each invisible character written as its escape in Python, such as `\x1b` or `\u202e`."""
    return _escaped(text, lambda character: character.encode("unicode_escape").decode())


def plain_json(text: str) -> str:
    """Return JSON that means the same, with each invisible character as its escape; line feeds stay between values."""
    return _escaped(text, lambda character: "\n" if character == "\n" else json.dumps(character)[1:-1])


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(plain(line) + "\n")
    sys.stdout.flush()


def say_json(text: str) -> None:
    """Print JSON, or a piece of it."""
    sys.stdout.write(plain_json(text))


def complain(error: object) -> None:
    """Print an error, or a part of a longer one, on standard error as one line."""
    sys.stderr.write(f"openchat: {plain(str(error))}\n")


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return "".join(
        escape(character) if unicodedata.category(character) in INVISIBLE else character for character in text
    )
