"""What another chat has exported, in our words, and the rows that it becomes.

Ids follow from what things are called there, so that the same archive brought in again changes nothing. Anybody may
register any address. So a person becomes an account that is here only if its address is verified, or an operator has
confirmed the list of those who match. A conversation that is here already is left alone.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID, uuid4

import msgspec
from emoji import emojize

from protocol.http import canonical
from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_CONTENT, MAX_EMOJI_PER_MESSAGE, visible
from protocol.reaction import normalized
from server import mentions
from server.database import Db
from server.queries import transfers
from server.queries.transfers import Account
from server.transfer.lines import Line, Lines, Row

TONES = {str(number): chr(0x1F3F9 + number) for number in range(2, 7)}
"""Modifiers of the skin's tone, U+1F3FB to U+1F3FF, by the number of the Fitzpatrick scale that Slack has for them."""

_encode = msgspec.json.Encoder().encode


class Person(msgspec.Struct, kw_only=True):
    """Somebody, by the key that the other chat has for them. `found` is the file, and the line or id in it."""

    key: str
    found: str
    name: str
    email: str | None = None
    display_name: str | None = None
    is_active: bool = True


class Reaction(msgspec.Struct, kw_only=True):
    """An emoji that somebody put on a post, by its name there, such as `tada` or `wave::skin-tone-2`."""

    person: str
    name: str


class Post(msgspec.Struct, kw_only=True):
    """A message; `thread` is the key of the post that it replies to. Times are in milliseconds since 1970."""

    key: str
    found: str
    person: str
    text: str
    at_ms: int
    thread: str | None = None
    edited_at_ms: int | None = None
    reactions: list[Reaction] = []


class Place(msgspec.Struct, kw_only=True):
    """A conversation. `posts` reads what was said in it, in any order."""

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
    posts: Callable[[], list[Post]]


class Archive(msgspec.Struct, kw_only=True):
    """All of it. `source` names the chat and its workspace, as part of what ids follow from."""

    source: str
    people: list[Person]
    places: list[Place]


def made_id(at_ms: int, *parts: str) -> UUID:
    """Return a UUIDv7 that follows from a moment and from words: the same again for the same."""
    random = int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:10])
    high = (at_ms & 0xFFFF_FFFF_FFFF) << 80
    return UUID(int=high | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & 0x3FFF_FFFF_FFFF_FFFF)


class Match(NamedTuple):
    """A person of the archive, and the account here that has the same address."""

    person: Person
    account: Account


OTHERS = "none"
"""What an operator confirms if nobody with an unverified address is who the archive means."""


def confirmation(matches: list[Match]) -> str:
    """Return what confirms exactly these matches: had another account taken an address since, it would be another."""
    words = [f"{match.person.key} {match.account.email} {match.account.id}" for match in matches]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


class Unconfirmed(Exception):  # noqa: N818 - it is a question
    """People match accounts whose addresses nobody has verified."""

    def __init__(self, matches: list[Match]) -> None:
        super().__init__("accounts match by unverified addresses")
        self.matches = matches


async def rows(db: Db, archive: Archive, confirmed: str | None) -> Lines:
    """Return what an archive becomes, as rows to be brought in.

    Raises Unconfirmed if people match accounts by unverified addresses, and `confirmed` is neither `OTHERS` nor the
    confirmation of these matches.
    """
    own = {person.key: UserId(made_id(0, archive.source, "user", person.key)) for person in archive.people}
    emails = {person.key: canonical(person.email or "") for person in archive.people}
    accounts = await transfers.by_email(db, sorted({email for email in emails.values() if email}))
    here = await transfers.present(db, list(own.values()))
    # Who came in before, under an id that follows from the archive, has been decided about.
    matches = [
        Match(person, accounts[emails[person.key]])
        for person in archive.people
        if emails[person.key] in accounts and own[person.key] not in here
    ]
    unverified = [match for match in matches if not match.account.is_verified]
    if unverified and confirmed not in {OTHERS, confirmation(unverified)}:
        raise Unconfirmed(unverified)
    matched = {
        match.person.key: match.account.id for match in matches if match.account.is_verified or confirmed != OTHERS
    }
    users = own | matched
    ids = {
        place.key: ConversationId(made_id(place.created_at_ms, archive.source, place.key)) for place in archive.places
    }
    there = await transfers.there(db, list(ids.values()))
    taken = await transfers.pairs(db, list(users.values()))
    wanted = []
    for place in archive.places:
        pair = tuple(sorted({users[key] for key in place.members if key in users}))
        if ids[place.key] not in there and not (place.kind == "direct" and pair in taken):
            wanted.append(place)
    return _rows(archive, wanted, users, ids, _News(here | set(matched.values()), set(accounts)))


class _News(NamedTuple):
    """The users that are here, and the addresses that are taken."""

    users: set[UserId]
    emails: set[str]


def _rows(
    archive: Archive,
    places: list[Place],
    users: dict[str, UserId],
    ids: dict[str, ConversationId],
    here: _News,
) -> Lines:
    for person in archive.people:
        if users[person.key] not in here.users:
            yield _line("user", _user(person, users[person.key], here.emails), person.found)
    for place in places:
        for table, made in _Made(archive, place, users, ids[place.key]).rows().items():
            yield from (_line(table, row, found) for row, found in made)


def _line(table: str, row: dict[str, Any], found: str) -> Line:
    return Line(Row(table, msgspec.Raw(_encode(row))), found)


def _user(person: Person, user_id: UserId, taken: set[str]) -> dict[str, Any]:
    email = canonical(person.email or "")
    if not email or email in taken:
        email = f"imported-{uuid4()}@invalid"  # random: nobody can have it
    return {
        "id": user_id,
        "name": (visible(person.name) or person.key)[:255],
        "display_name": visible(person.display_name or "")[:255] or None,
        "email": email,
        "is_active": person.is_active,
    }


class _Made:
    """A conversation, with everything in it, as it will be stored: numbered as if it had been said here."""

    def __init__(self, archive: Archive, place: Place, users: dict[str, UserId], about: ConversationId) -> None:
        self._archive = archive
        self._place = place
        self._users = users
        self._about = about
        self._everyone = set(users.values())
        self._clock = 1
        self._messages: dict[str, dict[str, Any]] = {}
        self._roots: dict[MessageId, dict[str, Any]] = {}
        self._follows: dict[tuple[MessageId, UserId], dict[str, Any]] = {}

    def rows(self) -> dict[str, Iterable[tuple[dict[str, Any], str]]]:
        """Return its rows, each with where it was found, by table, each table after those that it refers to."""
        posts = sorted(
            (post for post in self._place.posts() if post.person in self._users and post.text),
            key=lambda post: post.at_ms,
        )
        members = [key for key in dict.fromkeys(self._place.members) if key in self._users]
        gone = [key for key in dict.fromkeys(post.person for post in posts) if key not in members]
        if self._place.kind == "direct":
            members, gone = members + gone, []
        is_pair = self._place.kind == "direct" and len({self._users[key] for key in members}) == 2  # noqa: PLR2004
        parts = self._participants(members, gone, is_pair=is_pair)
        joined = self._clock
        for post in posts:
            self._say(post)
        for follow in self._follows.values():
            follow["last_read_order"] = self._roots[follow["root_id"]]["thread_order"]
        reactions = [(row, post.found) for post in posts for row in self._react(post)]
        for part in parts:
            part["last_read_version"] = self._clock  # what was said elsewhere is history
        return {
            "conversation": [(self._conversation(members, posts, joined, is_pair=is_pair), self._place.found)],
            "conversation_participant": [(row, self._place.found) for row in parts],
            "message": (
                (self._messages[key], found) for key, found in {post.key: post.found for post in posts}.items()
            ),
            "message_reaction": reactions,
            "thread_follow": [(row, self._place.found) for row in self._follows.values()],
        }

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _owner(self, members: list[str]) -> str | None:
        return self._place.owner if self._place.owner in members else next(iter(members), None)

    def _participants(self, members: list[str], gone: list[str], *, is_pair: bool) -> list[dict[str, Any]]:
        owner = None if is_pair else self._owner(members)
        parts = []
        for key in (*members, *gone):
            joined = version = self._tick()
            if key in gone:  # they left after they joined: see gone_version()
                version = self._tick()
            parts.append({
                "id": made_id(0, self._archive.source, self._place.key, key),
                "conversation_id": self._about,
                "user_id": self._users[key],
                "role": "owner" if key == owner else "member",
                "status": "left" if key in gone else "active",
                "version": version,
                "joined_version": joined,
                "left_version": version if key in gone else 0,
            })  # fmt: skip
        return parts

    def _conversation(self, members: list[str], posts: list[Post], joined: int, *, is_pair: bool) -> dict[str, Any]:
        place = self._place
        owner = self._owner(members)
        low, high = sorted({self._users[key] for key in members}) if is_pair else (None, None)
        last = max((post.at_ms for post in posts), default=place.created_at_ms)
        return {
            "id": self._about,
            "type": "direct" if is_pair else "group" if place.kind == "direct" else place.kind,
            "title": None if is_pair else place.title[:255] or place.key[:255],
            "description": (place.description or "")[:1_000] or None,
            "is_public": place.is_public,
            "is_archived": place.is_archived,
            "is_active": bool(members),
            "created_by": self._users[owner] if owner is not None else next(iter(self._users.values())),
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

    def _say(self, post: Post) -> None:
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

    def _react(self, post: Post) -> Iterator[dict[str, Any]]:
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

    def _message(self, post: Post, version: int, root: dict[str, Any] | None) -> dict[str, Any]:
        content = post.text.replace("\0", "")[:MAX_CONTENT]
        found = mentions.find(content, is_code=False, is_markdown=True)
        edited = None if post.edited_at_ms is None else _moment(post.edited_at_ms)
        return {
            "id": MessageId(made_id(post.at_ms, self._archive.source, self._place.key, post.key)),
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
    """Return a reaction by its name there, as `react` stores it. None if `react` takes nothing of the kind."""
    base, _, tone = name.partition("::skin-tone-")
    named = emojize(f":{base}:", language="alias")
    for text in (named + TONES.get(tone, ""), named):
        try:
            return normalized(text)
        except ValueError:
            continue
    return None
