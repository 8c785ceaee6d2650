"""Finds mentions and hashtags in a message. The database decides which mentions are valid."""

import re
from typing import NamedTuple
from uuid import UUID

from protocol.ids import UserId
from protocol.limits import MAX_HASHTAGS, MAX_MENTIONS
from protocol.roles import ROLES

LOUD = ("everyone", "here", *ROLES)
"""Words that mention several participants: all, those who are online, or those with a role."""

# A mention does not begin inside a word, which would be an e-mail address or a link.
_MENTION = re.compile(r"(?<![\w@/.])(?:<@([0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12})>|@(\w[\w.-]{0,254}))")
_HASHTAG = re.compile(r"(?<![\w#&/])#(\w{1,100})")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_NUMBER = re.compile(r"\d+\Z")


class Mentioned(NamedTuple):
    """Mentions and hashtags in a text. Users are mentioned by id, by name in lower case, or by one of `LOUD`."""

    ids: list[UserId]
    names: list[str]
    loud: list[str]
    hashtags: list[str]

    @property
    def is_about_people(self) -> bool:
        """Whether the text may mention anybody."""
        return bool(self.ids or self.names or self.loud)


NOTHING = Mentioned([], [], [], [])


def find(content: str, *, is_code: bool, is_markdown: bool) -> Mentioned:
    """Return the mentions and hashtags in a text, without duplicates, in order. Code counts as text without any.
    `MAX_MENTIONS` and `MAX_HASHTAGS` limit the lists.
    """
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
