"""Reactions: a Unicode emoji, or a name between colons for which clients have a picture."""

import re
import unicodedata

from emoji import EMOJI_DATA, STATUS

_SELECTORS = re.compile("[\N{VARIATION SELECTOR-15}\N{VARIATION SELECTOR-16}]")
_QUALIFIED = {
    _SELECTORS.sub("", sequence): sequence
    for sequence, about in EMOJI_DATA.items()
    if about["status"] == STATUS["fully_qualified"]
}
"""Fully qualified emoji, by their form without variation selectors, which keyboards add or leave out (UTS #51)."""
_NAME = re.compile(r":[\w+'-]{1,30}:\Z")


def normalized(text: str) -> str:
    """Return the canonical form of a reaction: emoji fully qualified, names in lower case.

    Raises ValueError if `text` is neither a Unicode emoji nor a name between colons. A name has 1 to 30 letters,
    digits, `_`, `+`, `-` or `'`.
    """
    found = _QUALIFIED.get(_SELECTORS.sub("", text))
    if found is not None:
        return found
    name = unicodedata.normalize("NFC", text.lower())
    if _NAME.match(name):
        return name
    raise ValueError("`emoji` must be one emoji, such as 👍, or a name between colons, such as :shipit:")
