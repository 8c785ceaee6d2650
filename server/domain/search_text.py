"""Converts search input to queries of PostgreSQL's text search."""

import unicodedata

from protocol.errors import ErrorCode, Refused

MAX_WORDS = 10
PREFIX_OF_WORDS = 3
"""Min length of a word that also finds longer words in texts, in bytes of UTF-8. The prefix `a` would find half of all
words. One Chinese character, which takes three bytes, is a word by itself.
"""
PREFIX_OF_NAMES = 2
"""Min length of a word that also finds longer names, in bytes of UTF-8."""
_OF_WORDS = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Cf"))
"""Categories of the characters that PostgreSQL's parser treats as parts of words. Vowel signs and accents are marks."""


def query(text: str, *, prefix: int) -> str:
    """Return a tsquery for texts with all of these words. Words of at least `prefix` bytes also find longer words.

    Raises Refused if there is no word.
    """
    spaced = "".join(one if unicodedata.category(one) in _OF_WORDS else " " for one in text)
    words = [word for word in spaced.split() if any(map(str.isalnum, word))][:MAX_WORDS]
    if not words:
        raise Refused(ErrorCode.INVALID, "`text` must contain a word.", path="text")
    return " & ".join(f"{word}:*" if len(word.encode()) >= prefix else word for word in words)
