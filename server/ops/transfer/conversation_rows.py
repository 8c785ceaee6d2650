"""The rows of a conversation in an archive, of its participants, and of its messages."""

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from emoji import emojize

from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_CONTENT, MAX_EMOJI_PER_MESSAGE, visible, visible_lines
from protocol.reaction import normalized
from server.domain import mentions
from server.ops.transfer.archive import MENTION, ArchivePlace, ArchivePost
from server.ops.transfer.matches import MatchedPeople
from server.ops.transfer.origin import Origin

TONES = {str(number): chr(0x1F3F9 + number) for number in range(2, 7)}
"""Skin tone modifiers, U+1F3FB to U+1F3FF, by their number in Slack."""


def becomes_message(post: ArchivePost, users: dict[str, UserId]) -> bool:
    """Whether a post becomes a message. It must have text and a known sender."""
    return post.person in users and bool(post.text)


class ConversationRows:
    """A conversation and its content as they will be stored, with versions as if it had happened here."""

    def __init__(self, origin: Origin, place: ArchivePlace, who: MatchedPeople, about: ConversationId) -> None:
        self._origin = origin
        self._place = place
        self._users = who.users
        self._erased = who.erased
        self._inactive = who.inactive
        self._about = about
        self._everyone = set(who.users.values())
        self._clock = 1
        self.left_out = 0
        """The number of posts that become no message."""
        self.repeated = 0
        """The number of posts that become no message because another one has their key."""
        self._messages: dict[str, dict[str, Any]] = {}
        self._roots: dict[MessageId, dict[str, Any]] = {}
        self._follows: dict[tuple[MessageId, UserId], dict[str, Any]] = {}

    def rows(self) -> dict[str, Iterable[tuple[dict[str, Any], str]]]:
        """Return the rows by table, each with where it was found. Each table follows those that it refers to. Return
        nothing if all participants are erased.
        """
        posts = sorted(self._posts(), key=lambda post: post.at_ms)
        said = dict.fromkeys(post.person for post in posts)
        everyone = [key for key in dict.fromkeys((*self._place.members, *said)) if key in self._users]
        is_direct = self._place.kind == "direct"
        members = [key for key in everyone if key not in self._erased and (is_direct or key in self._place.members)]
        gone = [key for key in everyone if key not in members and (is_direct or key in said)]
        if not members and self._erased.intersection(everyone):
            return {}
        is_pair = is_direct and len(everyone) == 2  # noqa: PLR2004
        parts = self._participants(members, gone, is_pair=is_pair)
        joined = self._clock
        for post in posts:
            self._say(post)
        erased = {self._users[key] for key in self._erased}
        for follow in self._follows.values():
            follow["is_following"] = follow["user_id"] not in erased
            if follow["is_following"]:
                follow["last_read_order"] = self._roots[follow["root_id"]]["thread_order"]
        reactions = [(row, post.found) for post in posts for row in self._react(post)]
        for part in parts:
            part["last_read_version"] = self._clock  # messages of the other chat do not count as unread
        return {
            "conversation": [(self._conversation(parts, posts, joined, is_pair=is_pair), self._place.found)],
            "conversation_participant": [(row, self._place.found) for row in parts],
            "message": (
                (self._messages[key], found) for key, found in {post.key: post.found for post in posts}.items()
            ),
            "message_reaction": reactions,
            "thread_follow": [(row, self._place.found) for row in self._follows.values()],
        }

    def _posts(self) -> Iterable[ArchivePost]:
        """Return the posts with text and a known sender, without repetitions."""
        posts: dict[str, ArchivePost] = {}
        for post in self._place.posts():
            if not becomes_message(post, self._users):
                self.left_out += 1
            elif (first := posts.setdefault(post.key, post)) is not post:
                self.repeated += (first.person, first.text) != (post.person, post.text)
        return posts.values()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _owner(self, members: list[str]) -> str | None:
        """Return the owner: the creator, or else the first participant. Active ones come first."""
        possible = [key for key in members if key not in self._inactive] or members
        return self._place.owner if self._place.owner in possible else next(iter(possible), None)

    def _participants(self, members: list[str], gone: list[str], *, is_pair: bool) -> list[dict[str, Any]]:
        owner = None if is_pair else self._owner(members)
        parts = []
        for key in (*members, *gone):
            joined = version = self._tick()
            if key in gone:  # they left after they joined, as gone_version() requires
                version = self._tick()
            parts.append({
                "id": self._origin.participant_id(self._place, key),
                "conversation_id": self._about,
                "user_id": self._users[key],
                "role": "owner" if key == owner else "member",
                "status": "left" if key in gone else "active",
                "version": version,
                "joined_version": joined,
                "left_version": version if key in gone else 0,
            })  # fmt: skip
        return parts

    def _conversation(
        self, parts: list[dict[str, Any]], posts: list[ArchivePost], joined: int, *, is_pair: bool
    ) -> dict[str, Any]:
        place = self._place
        members = [part["user_id"] for part in parts if part["status"] == "active"]
        owners = [part["user_id"] for part in parts if part["role"] == "owner"]
        low, high = sorted(part["user_id"] for part in parts) if is_pair else (None, None)
        last = max((post.at_ms for post in posts), default=place.created_at_ms)
        return {
            "id": self._about,
            "type": "direct" if is_pair else "group" if place.kind == "direct" else place.kind,
            "title": None if is_pair else (visible(place.title) or place.key)[:255],
            "description": visible_lines(place.description or "")[:1_000] or None,
            "is_public": place.is_public,
            "is_archived": place.is_archived,
            "is_active": bool(members),
            "created_by": next(iter([*owners, *members, *(part["user_id"] for part in parts), *self._users.values()])),
            "participant_count": len(members),
            "message_count": len(self._messages),
            "direct_low": low,
            "direct_high": high,
            "version": self._clock,
            "access_version": joined,
            "settings_version": 1,
            "created_at": _moment(place.created_at_ms or last),
            "last_activity_at": _moment(last),
            "last_message_at": _moment(last) if posts else None,
        }

    def _say(self, post: ArchivePost) -> None:
        root = self._messages.get(post.thread) if post.thread is not None and post.thread != post.key else None
        if root is not None and root["thread_root_id"] is not None:
            root = self._roots[root["thread_root_id"]]
        version = self._tick()
        self._messages[post.key] = message = self._message(post, version, root)
        if root is None:
            return
        self._roots[root["id"]] = root
        root["reply_count"] += 1
        root["thread_order"] += 1
        root["version"] = version
        message["thread_order"] = root["thread_order"]
        for user_id, has_replied in ((root["sender_id"], False), (message["sender_id"], True)):
            follow = self._follows.setdefault((root["id"], user_id), {
                "root_id": root["id"], "user_id": user_id, "conversation_id": self._about, "has_replied": False,
                "last_read_order": 0,
            })  # fmt: skip
            follow["has_replied"] |= has_replied

    def _react(self, post: ArchivePost) -> Iterator[dict[str, Any]]:
        message = self._messages[post.key]
        counts = message["reactions"]
        for person, emoji in dict.fromkeys((one.person, _emoji(one.name)) for one in post.reactions):
            if emoji is None or person not in self._users:
                continue
            if emoji not in counts and len(counts) >= MAX_EMOJI_PER_MESSAGE:
                continue
            counts[emoji] = counts.get(emoji, 0) + 1
            yield {
                "message_id": message["id"],
                "user_id": self._users[person],
                "emoji": emoji,
                "conversation_id": self._about,
                "version": self._tick(),
                "author_id": message["sender_id"],
                "created_at": message["created_at"],
            }

    def _mentioned(self, found: re.Match[str]) -> str:
        return f"<@{self._users[found[1]]}>" if found[1] in self._users else f"@{found[1]}"

    def _message(self, post: ArchivePost, version: int, root: dict[str, Any] | None) -> dict[str, Any]:
        content = MENTION.sub(self._mentioned, post.text)[:MAX_CONTENT]
        found = mentions.find(content, is_code=False, is_markdown=True)
        edited = None if post.edited_at_ms is None else _moment(post.edited_at_ms)
        return {
            "id": self._origin.message_id(self._place, post),
            "conversation_id": self._about,
            "sender_id": self._users[post.person],
            "content": content,
            "mentions": [one for one in found.ids if one in self._everyone],
            "hashtags": found.hashtags,
            "reactions": {},
            "parent_message_id": None if root is None else root["id"],
            "thread_root_id": None if root is None else root["id"],
            "thread_order": 0,
            "reply_count": 0,
            "status": "sent" if edited is None else "edited",
            "edited_at": edited,
            "sent_version": version,
            "version": version,
            "created_at": _moment(post.at_ms),
        }


def _moment(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def _emoji(name: str) -> str | None:
    """Return a reaction in the form in which `react` stores it, by its name in the other chat. Return None if there is
    none.
    """
    base, _, tone = name.partition("::skin-tone-")
    named = emojize(f":{base}:", language="alias")
    for text in (named + TONES.get(tone, ""), named):
        try:
            return normalized(text)
        except ValueError:
            continue
    return None
