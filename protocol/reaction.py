"""What people react with: an emoji, or a name between colons that clients have a picture for."""

import re
import unicodedata

from emoji import EMOJI_DATA, STATUS

_SELECTORS = re.compile("[\N{VARIATION SELECTOR-15}\N{VARIATION SELECTOR-16}]")
_QUALIFIED = {
    _SELECTORS.sub("", sequence): sequence
    for sequence, about in EMOJI_DATA.items()
    if about["status"] == STATUS["fully_qualified"]
}
"""Emoji by what is left of them without variation selectors, which keyboards add or leave out (UTS #51)."""
_NAME = re.compile(r":[\w+'-]{1,30}:\Z")


def normalized(text: str) -> str:
    """Return a reaction in the one form that it is counted by: emoji fully qualified, names in lower case.

    Raises ValueError if `text` is neither an emoji of Unicode nor a name of 1 to 30 letters, digits, `_`, `+`, `-` or
    `'` between colons.
    """
    found = _QUALIFIED.get(_SELECTORS.sub("", text))
    if found is not None:
        return found
    name = unicodedata.normalize("NFC", text.lower())
    if _NAME.match(name):
        return name
    raise ValueError("`emoji` must be one emoji, such as 👍, or a name between colons, such as :shipit:")
