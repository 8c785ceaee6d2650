"""Mattermost bulk exports: one JSON object per line (https://docs.mattermost.com/manage/bulk-export-tool.html).

Lines of the types `user`, `channel`, `post`, `direct_channel` and `direct_post` are read. With several teams, a
channel's title includes its team.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from server.ops.transfer.archive import Archive, ArchivePerson, ArchivePlace, ArchivePost, Reaction
from server.ops.transfer.reading import key as _key
from server.ops.transfer.reading import (
    lines,
    moment_ms,
    reading,
    require_few,
    require_few_posts,
    require_few_things,
    require_shallow,
    text,
)

KIND = "mattermost"
APART = "/,"
"""Separators of the names in a key."""


def read(path: Path) -> Archive:
    """Return the archive in a Mattermost export. Raises ValueError or OSError if the file is no such export."""
    people: list[ArchivePerson] = []
    channels: list[tuple[str, ArchivePlace]] = []
    members: defaultdict[str, list[str]] = defaultdict(list)
    posts: defaultdict[str, list[ArchivePost]] = defaultdict(list)
    directs: dict[str, tuple[list[str], str]] = {}
    with path.open("rb") as file:
        for number, line in lines(file):
            with reading(f"line {number}"):
                require_few(line)
                require_shallow(line)
                one = msgspec.json.decode(line)
                if number == 1 and one.get("type") != "version":
                    raise ValueError("this is not the first line of a Mattermost bulk export")
                kind, said = one["type"], one.get(one["type"]) or {}
                if kind == "user":
                    people.append(_person(said, f"line {number}"))
                    require_few_things(len(people), "people")
                    for key in _channels(said):
                        members[key].append(people[-1].key)
                elif kind == "channel":
                    channels.append(_channel(said, f"line {number}"))
                    require_few_things(len(channels) + len(directs), "conversations")
                elif kind == "post":
                    key = _channel_key(said["team"], said["channel"])
                    posts[key] += _posts(said, len(posts[key]), f"line {number}")
                    require_few_posts(len(posts[key]), key)
                elif kind == "direct_channel":
                    who = _members(said["members"])
                    directs[_direct_key(who)] = who, f"line {number}"
                    require_few_things(len(channels) + len(directs), "conversations")
                elif kind == "direct_post":
                    who = _members(said["channel_members"])
                    key = _direct_key(who)
                    directs.setdefault(key, (who, f"line {number}"))
                    require_few_things(len(channels) + len(directs), "conversations")
                    posts[key] += _posts(said, len(posts[key]), f"line {number}")
                    require_few_posts(len(posts[key]), key)
    if not people:
        raise ValueError("the export has no users")
    places = _places(channels, directs, members, posts)
    known = {place.key for place in places}
    notes = [
        f"{said[0].found}: no line defines the channel {key}. Its messages were left out: {len(said):,}"
        for key, said in posts.items()
        if key not in known
    ]
    return Archive(kind=KIND, people=people, places=places, notes=notes)


def _places(
    channels: list[tuple[str, ArchivePlace]],
    directs: dict[str, tuple[list[str], str]],
    members: defaultdict[str, list[str]],
    posts: defaultdict[str, list[ArchivePost]],
) -> list[ArchivePlace]:
    """Return all conversations, with their participants and posts."""
    is_one_team = len({team for team, _ in channels}) == 1
    places = []
    for _, place in channels:
        place.members = members[place.key]
        place.title = place.title if is_one_team else place.key
        places.append(place)
    places += [
        ArchivePlace(
            key=key,
            found=found,
            kind="direct" if len(set(who)) == 2 else "group",  # noqa: PLR2004 - two participants
            title=", ".join(sorted(who)),
            members=who,
            posts=list,
        )
        for key, (who, found) in directs.items()
    ]
    for place in places:
        place.posts = partial(posts.__getitem__, place.key)
    return places


def _channel(channel: dict[str, Any], found: str) -> tuple[str, ArchivePlace]:
    """Return the team of a channel, and the channel without participants and posts."""
    place = ArchivePlace(
        key=_channel_key(channel["team"], channel["name"]),
        found=found,
        kind="channel",
        title=text(channel.get("display_name") or channel["name"]),
        description=text(channel.get("purpose") or channel.get("header") or ""),
        is_public=channel.get("type") == "O",
        is_archived=bool(channel.get("deleted_at")),
        members=[],
        posts=list,
    )
    return channel["team"], place


def _channels(user: dict[str, Any]) -> list[str]:
    return [
        _channel_key(team["name"], channel["name"])
        for team in user.get("teams") or ()
        for channel in team.get("channels") or ()
    ]


def _channel_key(team: object, name: object) -> str:
    return f"{_key(team, APART)}/{_key(name, APART)}"


def _members(names: list[object]) -> list[str]:
    return [_key(name, APART) for name in names]


def _direct_key(members: list[str]) -> str:
    return f"direct/{len(set(members))}/" + ",".join(sorted(set(members)))


def _person(user: dict[str, Any], found: str) -> ArchivePerson:
    full = f"{user.get('first_name') or ''} {user.get('last_name') or ''}".strip()
    return ArchivePerson(
        key=_key(user["username"], APART),
        found=found,
        name=full or user["username"],
        display_name=text(user.get("nickname") or user["username"]),
        email=text(user.get("email") or ""),
        is_active=not user.get("delete_at"),
    )


def _posts(said: dict[str, Any], number: int, found: str) -> list[ArchivePost]:
    """Return a post and its replies. The export has no ids, so their places serve as keys."""
    root = _post(said, f"{said['create_at']}/{number}", found)
    replies = [_post(reply, f"{root.key}/{place}", found) for place, reply in enumerate(said.get("replies") or ())]
    for reply in replies:
        reply.thread = root.key
    return [root, *replies]


def _post(said: dict[str, Any], key: str, found: str) -> ArchivePost:
    files = [text(file["path"]) for file in said.get("attachments") or () if file.get("path")]
    return ArchivePost(
        key=key,
        found=found,
        person=_key(said["user"]),
        text="\n".join([*([text(said["message"])] if said.get("message") else []), *files]),
        at_ms=moment_ms(int(said["create_at"])),
        edited_at_ms=moment_ms(int(said["edit_at"])) if said.get("edit_at") else None,
        reactions=[
            Reaction(person=_key(one["user"]), name=text(one["emoji_name"])) for one in said.get("reactions") or ()
        ],
    )
