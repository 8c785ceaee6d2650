"""A Mattermost bulk export: one JSON object a line, as https://docs.mattermost.com/manage/bulk-export-tool.html has it.

Lines of the types `user`, `channel`, `post`, `direct_channel` and `direct_post` are read; where there are several
teams, a channel's title says of which.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from server.transfer.archive import Archive, Person, Place, Post, Reaction
from server.transfer.reading import lines, moment_ms, reading, require_few, require_few_posts, require_shallow

SOURCE = "mattermost"


def read(path: Path) -> Archive:
    """Return what is in a Mattermost export. Raises ValueError or OSError if it is none."""
    people: list[Person] = []
    channels: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = defaultdict(list)
    posts: dict[str, list[Post]] = defaultdict(list)
    directs: dict[str, tuple[list[str], str]] = {}
    with path.open("rb") as file:
        for number, line in lines(file):
            with reading(f"line {number}"):
                require_few(line)
                require_shallow(line)
                one = msgspec.json.decode(line)
                if number == 1 and one.get("type") != "version":
                    raise ValueError("it is not the first of a bulk export")
                kind, said = one["type"], one.get(one["type"]) or {}
                if kind == "user":
                    people.append(_person(said, f"line {number}"))
                    for key in _channels(said):
                        members[key].append(said["username"])
                elif kind == "channel":
                    channels[f"{said['team']}/{said['name']}"] = said | {"found": f"line {number}"}
                elif kind == "post":
                    key = f"{said['team']}/{said['channel']}"
                    posts[key] += _posts(said, len(posts[key]), f"line {number}")
                    require_few_posts(len(posts[key]), key)
                elif kind == "direct_channel":
                    directs[_direct_key(said["members"])] = said["members"], f"line {number}"
                elif kind == "direct_post":
                    key = _direct_key(said["channel_members"])
                    directs.setdefault(key, (said["channel_members"], f"line {number}"))
                    posts[key] += _posts(said, len(posts[key]), f"line {number}")
                    require_few_posts(len(posts[key]), key)
    if not people:
        raise ValueError("there are no users in it")
    teams = {channel["team"] for channel in channels.values()}
    places = [
        Place(
            key=key,
            found=channel["found"],
            kind="channel",
            title=channel.get("display_name") or channel["name"] if len(teams) == 1 else key,
            description=channel.get("purpose") or channel.get("header") or None,
            is_public=channel.get("type") == "O",
            is_archived=bool(channel.get("deleted_at")),
            members=members[key],
            posts=lambda key=key: posts[key],  # type: ignore[misc]
        )
        for key, channel in channels.items()
    ]
    places += [
        Place(
            key=key,
            found=found,
            kind="direct" if len(set(who)) == 2 else "group",  # noqa: PLR2004 - which is what direct means
            title=", ".join(sorted(who)),
            members=who,
            posts=lambda key=key: posts[key],  # type: ignore[misc]
        )
        for key, (who, found) in directs.items()
    ]
    return Archive(source=SOURCE, people=people, places=places)


def _channels(user: dict[str, Any]) -> list[str]:
    return [
        f"{team['name']}/{channel['name']}"
        for team in user.get("teams") or ()
        for channel in team.get("channels") or ()
    ]


def _direct_key(members: list[str]) -> str:
    return "direct/" + ",".join(sorted(set(members)))


def _person(user: dict[str, Any], found: str) -> Person:
    full = f"{user.get('first_name') or ''} {user.get('last_name') or ''}".strip()
    return Person(
        key=user["username"],
        found=found,
        name=full or user["username"],
        display_name=user.get("nickname") or user["username"],
        email=user.get("email"),
        is_active=not user.get("delete_at"),
    )


def _posts(said: dict[str, Any], number: int, found: str) -> list[Post]:
    """Return a post and its replies. They have no ids in the export: what they are called is their place in it."""
    root = _post(said, f"{said['create_at']}/{number}", found)
    replies = [_post(reply, f"{root.key}/{place}", found) for place, reply in enumerate(said.get("replies") or ())]
    for reply in replies:
        reply.thread = root.key
    return [root, *replies]


def _post(said: dict[str, Any], key: str, found: str) -> Post:
    files = [str(file["path"]) for file in said.get("attachments") or () if file.get("path")]
    return Post(
        key=key,
        found=found,
        person=said["user"],
        text="\n".join([*([said["message"]] if said.get("message") else []), *files]),
        at_ms=moment_ms(int(said["create_at"])),
        edited_at_ms=moment_ms(int(said["edit_at"])) if said.get("edit_at") else None,
        reactions=[Reaction(person=one["user"], name=one["emoji_name"]) for one in said.get("reactions") or ()],
    )
