"""What the server finds in a message: who is mentioned, and hashtags. Whether it counts is the database's to say."""

import re
from typing import NamedTuple
from uuid import UUID

from protocol.ids import UserId
from protocol.limits import MAX_HASHTAGS, MAX_MENTIONS
from protocol.roles import ROLES

LOUD = ("everyone", "here", *ROLES)
"""Words that mention many at once: all, those who are here now, or those with a role."""

# Not in the middle of a word: that is an e-mail address, or a link.
_MENTION = re.compile(r"(?<![\w@/.])(?:<@([0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12})>|@(\w[\w.-]{0,254}))")
_HASHTAG = re.compile(r"(?<![\w#&/])#(\w{1,100})")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_NUMBER = re.compile(r"\d+\Z")


class Mentioned(NamedTuple):
    """What a text mentions: people by id, by name (in lower case, as written), many at once; and its hashtags."""

    ids: list[UserId]
    names: list[str]
    loud: list[str]
    hashtags: list[str]

    @property
    def is_about_people(self) -> bool:
        """Whether anybody may be mentioned at all."""
        return bool(self.ids or self.names or self.loud)


NOTHING = Mentioned([], [], [], [])


def find(content: str, *, is_code: bool, is_markdown: bool) -> Mentioned:
    """Return what is mentioned in a text: at most so many of each, nothing in code, and each once, in order."""
    if is_code or ("@" not in content and "#" not in content):
        return NOTHING
    text = _CODE.sub(" ", content) if is_markdown else content
    ids: dict[UserId, None] = {}
    names: dict[str, None] = {}
    loud: dict[str, None] = {}
    for one, name in _MENTION.findall(text):
        word = name.rstrip(".-").lower()
        if one:
            ids[UserId(UUID(one))] = None
        elif word in LOUD:
            loud[word] = None
        else:
            names[word] = None
    hashtags = dict.fromkeys(tag.lower() for tag in _HASHTAG.findall(text) if not _NUMBER.match(tag))
    return Mentioned(list(ids)[:MAX_MENTIONS], list(names)[:MAX_MENTIONS], list(loud), list(hashtags)[:MAX_HASHTAGS])
