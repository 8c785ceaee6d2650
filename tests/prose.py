"""The part of the rules of prose that a machine can check (docs/map.md): length, openings, colons, words."""

import re
from collections.abc import Iterator

MAX_WORDS = 25
OPENING = re.compile(r"(?:What|Whoever|Whatever|Of how|How many|That)\b")
WORDS = re.compile(r"\b(?:at once|anew|so many|somebody|in vain)\b")
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|\([^()]*\)")
_PARAGRAPHS = re.compile(r"\n\s*\n|\n\s*(?:- |\d+\. )|^\s*\|.*$", re.MULTILINE)
_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"({])")
_COLON = re.compile(r":(?=\s|$)")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text, whose paragraphs and items of lists are apart."""
    for paragraph in _PARAGRAPHS.split(text):
        yield from (one for one in _SENTENCES.split(" ".join(paragraph.split())) if one)


def faults(text: str) -> list[str]:
    """Return which sentences of a text break which rule."""
    found = []
    for one in sentences(text):
        bare = _QUOTED.sub("x", one)
        if len(bare.split()) > MAX_WORDS:
            found.append(f"{len(bare.split())} words: {one}")
        if OPENING.match(one):
            found.append(f"opening: {one}")
        if len(_COLON.findall(bare)) > 1:
            found.append(f"colons: {one}")
        if (word := WORDS.search(bare)) is not None:
            found.append(f"`{word[0]}`: {one}")
    return found
