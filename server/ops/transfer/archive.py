"""An export of another chat, and the rows that are created from it.

Ids derive from the keys in the export (origin.py), so a second import of the same archive changes nothing.

An equal name with another e-mail address is another user. Anybody may register any address. So a person becomes an
existing account only if its address is verified, or if an operator has confirmed the list of matches. An existing
conversation is not changed.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, NamedTuple
from uuid import UUID, uuid4

import msgspec
from emoji import emojize

from protocol.http import canonical
from protocol.ids import ConversationId, MessageId, UserId
from protocol.limits import MAX_CONTENT, MAX_EMOJI_PER_MESSAGE, Email, visible, visible_lines
from protocol.reaction import normalized
from server.db.database import Db
from server.domain import mentions
from server.ops.transfer.lines import Lines, Row, RowLine
from server.ops.transfer.origin import Origin
from server.ops.transfer.reading import reading
from server.queries import transfers
from server.queries.transfers import Account

TONES = {str(number): chr(0x1F3F9 + number) for number in range(2, 7)}
"""Skin tone modifiers, U+1F3FB to U+1F3FF, by their number in Slack."""

AT_ONCE = 10_000
"""Max messages that one statement looks up."""
SAMPLE = 100
"""Max messages of a conversation that are looked up, to find out whether it is the same."""

_encode = msgspec.json.Encoder().encode
_MENTION = re.compile("\0([^\0]*)\0")


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


class Match(NamedTuple):
    """A person in the archive, and the existing account with the same address."""

    person: ArchivePerson
    account: Account


OTHERS = "none"
"""The operator's answer if no match by an unverified address is the same person."""


def confirmation(matches: list[Match]) -> str:
    """Return the code that confirms exactly these matches. If another account took one of the addresses, the code would
    differ.
    """
    words = [f"{match.person.key} {match.account.email} {match.account.id}" for match in matches]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


class UnconfirmedMatches(Exception):  # noqa: N818 - it asks the operator
    """People match accounts with unverified addresses."""

    def __init__(self, matches: list[Match]) -> None:
        super().__init__("accounts match by unverified addresses")
        self.matches = matches


class Unnamed(Exception):  # noqa: N818 - it asks the operator
    """An earlier import has something with the same key, and nothing tells whether it is the same."""

    def __init__(self, archive: Archive, what: str) -> None:
        super().__init__(
            f"{what}. The export does not name its server. If both come from the same one, use --source "
            f"{archive.kind}; otherwise use --source NAME, with the same name in each import from this server."
        )


class Plan(NamedTuple):
    """The rows of an archive, and notes on parts that become no rows. The notes are complete when all rows
    were read.
    """

    rows: Lines
    notes: list[str]


async def plan(db: Db, archive: Archive, *, source: str | None = None, confirmed: str | None = None) -> Plan:
    """Return the rows of an archive. `source` is the operator's name of its server.

    Raises UnconfirmedMatches if people match accounts with unverified addresses, unless `confirmed` is `OTHERS` or the
    confirmation of these matches. Raises Unnamed if the archive may come from another server than an earlier import,
    and has no source. Raises ValueError if two of its people or conversations are the same.
    """
    _require_different("people", [(person.key, person.key, person.found) for person in archive.people])
    _require_different("conversations", [(place.key, place.key, place.found) for place in archive.places])
    origin = await Origin.of(db, archive.kind, source or archive.source or archive.kind)
    is_named = source is not None or archive.source is not None
    who = await _people(db, archive, origin, confirmed)
    ids = {place.key: ConversationId(origin.made_id(place.created_at_ms, place.key)) for place in archive.places}
    there = await transfers.there(db, list(ids.values()))
    taken = await transfers.pairs(db, list(who.users.values()))
    wanted, notes = [], [*archive.notes, *who.notes]
    for place in archive.places:
        pair = tuple(sorted({who.users[key] for key in place.members if key in who.users}))
        if ids[place.key] not in there and not (place.kind == "direct" and pair in taken):
            wanted.append(place)
            continue
        if ids[place.key] in there and not (is_named or await _is_same(db, origin, place, who.users)):
            raise Unnamed(archive, f"{place.found}: an earlier import has a conversation {place.key}, too")
        why = "this conversation" if ids[place.key] in there else "a direct conversation of these two users"
        absent = await _absent(db, origin, place, who.users)
        notes.append(
            f"{place.found}: {why} exists already and was not changed"
            + (f". Messages that it lacks, and that were left out: {absent:,}" if absent else "")
        )
    if not is_named and (unknown := who.unknown & {key for place in wanted for key in place.members}):
        raise Unnamed(
            archive, f"{min(unknown)} has no e-mail address, and an earlier import has a user with the same id"
        )
    return Plan(_rows(archive, wanted, who, _Ids(origin, ids), notes), notes)


def _require_different(what: str, named: Iterable[tuple[object, str, str]]) -> None:
    """Raise ValueError if two things have the same value. `named` has each one's value, its key, and where it was
    found.
    """
    seen: dict[object, tuple[str, str]] = {}
    for value, key, found in named:
        if value in seen:
            other, place = seen[value]
            raise ValueError(f"{found}: {key} and {other} ({place}) are different {what} with the same {value}")
        seen[value] = key, found


async def _is_same(db: Db, origin: Origin, place: ArchivePlace, users: dict[str, UserId]) -> bool:
    """Whether an existing conversation has messages of the archive's conversation, or the latter has none."""
    with reading(place.found):
        found = place.posts()
    posts = sorted((post for post in found if _is_said(post, users)), key=lambda post: post.at_ms)
    messages = [_message_id(origin, place, post) for post in posts[:SAMPLE]]
    return not messages or await transfers.is_any_message(db, messages)


async def _absent(db: Db, origin: Origin, place: ArchivePlace, users: dict[str, UserId]) -> int:
    """Return the number of messages of the archive's conversation that do not exist here."""
    with reading(place.found):
        found = place.posts()
    messages = {_message_id(origin, place, post) for post in found if _is_said(post, users)}
    wanted, absent = iter(messages), 0
    while some := list(islice(wanted, AT_ONCE)):
        absent += await transfers.absent_messages(db, some)
    return absent


def _is_said(post: ArchivePost, users: dict[str, UserId]) -> bool:
    """Whether a post becomes a message. It must have text and a known sender."""
    return post.person in users and bool(post.text)


def _message_id(origin: Origin, place: ArchivePlace, post: ArchivePost) -> MessageId:
    return MessageId(origin.made_id(post.at_ms, place.key, post.key))


class _People(NamedTuple):
    """The users that people become. `new` are created, with these addresses. `erased` exist here and are erased.
    `unknown` exist here without an e-mail address. `inactive` have accounts that are not active. `notes` report invalid
    addresses.
    """

    users: dict[str, UserId]
    new: dict[str, str]
    erased: set[str]
    unknown: set[str]
    inactive: set[str]
    notes: list[str]


async def _people(db: Db, archive: Archive, origin: Origin, confirmed: str | None) -> _People:
    emails = {person.key: _address(person) for person in archive.people}
    _require_different("people", [(emails[one.key], one.key, one.found) for one in archive.people if emails[one.key]])
    own = {key: UserId(origin.made_id(0, "user", key, email)) for key, email in emails.items()}
    accounts = await transfers.by_email(db, sorted(email for email in emails.values() if email))
    here = await transfers.present(db, list(own.values()))
    # Users whose id derives from the archive came with an earlier import, so their match was decided then.
    matches = [
        Match(person, accounts[emails[person.key]])
        for person in archive.people
        if emails[person.key] in accounts and own[person.key] not in here
    ]
    known = await _known(db, archive, origin, {match.person.key for match in matches})
    certain = {
        match.person.key: match.account.id
        for match in matches
        if match.account.is_verified or match.account.id in known[match.person.key]
    }
    unverified = [match for match in matches if match.person.key not in certain]
    if unverified and confirmed not in {OTHERS, confirmation(unverified)}:
        raise UnconfirmedMatches(unverified)
    matched = certain if confirmed == OTHERS else {match.person.key: match.account.id for match in matches}
    users = own | matched
    active = await transfers.active(db, list(users.values()))
    _require_different("people", [(users[person.key], person.key, person.found) for person in archive.people])
    new = {
        key: emails[key] if emails[key] and emails[key] not in accounts else f"imported-{uuid4()}@invalid"
        for key in users if key not in matched and own[key] not in here
    }  # fmt: skip
    return _People(
        users, new,
        erased={key for key in own if here.get(own[key])},
        unknown={key for key in own if own[key] in here and not emails[key]},
        inactive={one.key for one in archive.people if not active.get(users[one.key], one.is_active)},
        notes=[f"{one.found}: the e-mail address is invalid and was left out" for one in archive.people
               if one.email and not emails[one.key]],
    )  # fmt: skip


async def _known(db: Db, archive: Archive, origin: Origin, keys: set[str]) -> dict[str, set[UserId]]:
    """Return the accounts that people became in earlier imports, by their participation in the archive's
    conversations.
    """
    of = {_part_id(origin, place, key): key for place in archive.places for key in place.members if key in keys}
    known: dict[str, set[UserId]] = {key: set() for key in keys}
    for part_id, user_id in (await transfers.parts(db, list(of))).items():
        known[of[part_id]].add(user_id)
    return known


def _part_id(origin: Origin, place: ArchivePlace, key: str) -> UUID:
    return origin.made_id(0, "participant", place.key, key)


def _address(person: ArchivePerson) -> str:
    """Return a person's address in its stored form. Return an empty text if it is missing or invalid."""
    try:
        return canonical(msgspec.convert(person.email, Email)) if person.email else ""
    except msgspec.ValidationError:
        return ""


class _Ids(NamedTuple):
    """The origin of derived ids, and the ids of conversations."""

    origin: Origin
    places: dict[str, ConversationId]


def _rows(archive: Archive, places: list[ArchivePlace], who: _People, ids: _Ids, notes: list[str]) -> Lines:
    for person in archive.people:
        if person.key in who.new:
            yield _line("user", _user(person, who.users[person.key], who.new[person.key]), person.found)
    for place in places:
        made = _Made(ids.origin, place, who, ids.places[place.key])
        tables = made.rows()
        if not tables:
            notes.append(f"{place.found}: all participants are erased, so the conversation was left out")
        for table, rows in tables.items():
            yield from (_line(table, row, found) for row, found in rows)
        if made.left_out:
            notes.append(
                f"{place.found}: messages without text, of bots, or of people who are not in the export were left "
                f"out: {made.left_out:,}"
            )
        if made.repeated:
            notes.append(f"{place.found}: messages with the id of another message were left out: {made.repeated:,}")


def _line(table: str, row: dict[str, Any], found: str) -> RowLine:
    return RowLine(Row(table, msgspec.Raw(_encode(row))), found)


def _user(person: ArchivePerson, user_id: UserId, email: str) -> dict[str, Any]:
    return {
        "id": user_id,
        "name": (visible(person.name) or person.key)[:255],
        "display_name": visible(person.display_name or "")[:255] or None,
        "email": email,
        "is_active": person.is_active,
    }


class _Made:
    """A conversation and its content as they will be stored, with versions as if it had happened here."""

    def __init__(self, origin: Origin, place: ArchivePlace, who: _People, about: ConversationId) -> None:
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
            if not _is_said(post, self._users):
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
                "id": _part_id(self._origin, self._place, key),
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
        content = _MENTION.sub(self._mentioned, post.text)[:MAX_CONTENT]
        found = mentions.find(content, is_code=False, is_markdown=True)
        edited = None if post.edited_at_ms is None else _moment(post.edited_at_ms)
        return {
            "id": _message_id(self._origin, self._place, post),
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
