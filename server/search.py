"""What people type into a search box, as PostgreSQL's text search understands it."""

import re

from protocol.errors import ErrorCode, Refused

MAX_WORDS = 10
_WORD = re.compile(r"\w+")


def query(text: str) -> str:
    """Return a tsquery for what has all of these words, or words that begin so. Raises Refused if there is none."""
    words = _WORD.findall(text)[:MAX_WORDS]
    if not words:
        raise Refused(ErrorCode.INVALID, "There is no word in this to search for.", path="text")
    return " & ".join(f"{word}:*" for word in words)
