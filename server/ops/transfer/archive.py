"""An export of another chat: its people and conversations."""

import re
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

MENTION = re.compile("\0([^\0]*)\0")
"""The placeholder of `mention`. The group is the person's key."""


def mention(key: str) -> str:
    """Return the placeholder for a mention of a person in a post's text, which itself contains no U+0000."""
    return f"\0{key}\0"


class ArchivePerson(msgspec.Struct, kw_only=True):
    """A person, with the other chat's key. `found` is the file, and the line or id in it."""

    key: str
    found: str
    name: str
    email: str | None = None
    display_name: str | None = None
    is_active: bool = True


class Reaction(msgspec.Struct, kw_only=True):
    """An emoji reaction to a post, by its name in the other chat, such as `tada` or `wave::skin-tone-2`."""

    person: str
    name: str


class ArchivePost(msgspec.Struct, kw_only=True):
    """A message. `thread` is the key of the post that it replies to. `person` is empty for a bot. Times are in
    milliseconds since 1970.
    """

    key: str
    found: str
    person: str
    text: str
    at_ms: int
    thread: str | None = None
    edited_at_ms: int | None = None
    reactions: list[Reaction] = []


class ArchivePlace(msgspec.Struct, kw_only=True):
    """A conversation. `posts` reads its messages, in any order."""

    key: str
    found: str
    kind: Literal["channel", "group", "direct"]
    title: str
    description: str | None = None
    is_public: bool = False
    is_archived: bool = False
    created_at_ms: int = 0
    owner: str | None = None
    members: list[str]
    posts: Callable[[], list[ArchivePost]]


class Archive(msgspec.Struct, kw_only=True):
    """A whole export. `source` is the workspace's own name, or None if the export does not contain it."""

    kind: str
    source: str | None = None
    people: list[ArchivePerson]
    places: list[ArchivePlace]
    notes: list[str] = []
    """Notes on parts of the export that belong to no conversation."""


def require_different(what: str, named: Iterable[tuple[object, str, str]]) -> None:
    """Raise ValueError if two things have the same value. `named` has each one's value, its key, and where it was
    found.
    """
    seen: dict[object, tuple[str, str]] = {}
    for value, key, found in named:
        if value in seen:
            other, place = seen[value]
            raise ValueError(f"{found}: {key} and {other} ({place}) are different {what} with the same {value}")
        seen[value] = key, found
