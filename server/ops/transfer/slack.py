"""Slack exports, as a folder or a zip file (https://slack.com/help/articles/220556107).

They contain `users.json`. Depending on the plan, they contain `channels.json`, `groups.json`, `mpims.json` and
`dms.json`. Each conversation in these has a folder of its name, or for a direct message of its id. The folder has one
file per day.
"""

import html
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from server.ops.transfer.archive import Archive, ArchivePerson, ArchivePlace, ArchivePost, Reaction, mention
from server.ops.transfer.reading import (
    Files,
    each,
    key,
    moment_ms,
    reading,
    require_few_posts,
    require_few_things,
    text,
)

KINDS = {"channels.json": "channel", "groups.json": "group", "mpims.json": "group", "dms.json": "direct"}
SAID = {None, "thread_broadcast", "me_message", "bot_message", "file_share", "file_comment"}
"""Subtypes of messages of users and bots. Others report joins and settings."""
KIND = "slack"

_LINK = re.compile(r"<([^<>]+)>")


def read(path: Path) -> Archive:
    """Return the archive in a Slack export. Raises ValueError or OSError if the path is no such export."""
    files = Files(path)
    users = files.json("users.json")
    if users is None:
        raise ValueError("users.json is missing")
    with reading("users.json"):
        require_few_things(len(users), "people")
        if not users:
            raise ValueError("the file has no users")
    people = each("users.json", users, _person)
    # Most users belong to the workspace itself. Others come from shared channels.
    teams = Counter(sorted(team for team in each("users.json", users, _team) if team))
    places: list[ArchivePlace] = []
    folders: dict[str, str] = {}
    for name, kind in KINDS.items():
        entries = files.json(name) or []
        with reading(name):
            require_few_things(len(places) + len(entries), "conversations")
        places += each(name, entries, partial(_place, files, folders, name, kind))
    source = next(iter(teams.most_common(1)), (None,))[0]
    unnamed = [folder for folder in files.folders() if folder not in folders and files.names(folder)]
    notes = [f"{folder}: no conversation has this folder. Its files were left out" for folder in unnamed]
    return Archive(kind=KIND, source=source, people=people, places=places, notes=notes)


def _team(user: dict[str, Any]) -> str:
    return key(user["team_id"]) if user.get("team_id") else ""


def _person(user: dict[str, Any]) -> ArchivePerson:
    profile = user.get("profile", {})
    return ArchivePerson(
        key=key(user["id"]),
        found=f"users.json: {user['id']}",
        name=text(user.get("real_name") or profile.get("real_name") or user.get("name") or user["id"]),
        display_name=text(profile.get("display_name") or ""),
        email=text(profile.get("email") or ""),
        is_active=not user.get("deleted", False),
    )


def _place(
    files: Files,
    folders: dict[str, str],
    file: str,
    kind: Any,  # noqa: ANN401 - one of three words
    one: dict[str, Any],
) -> ArchivePlace:
    """Return a conversation, and record its folder. Raises ValueError if another conversation has the same folder,
    because each message would appear in both.
    """
    name = one.get("name") or one["id"]
    if (other := folders.setdefault(name, one["id"])) != one["id"]:
        raise ValueError(f"{one['id']} and {other} are different conversations with the same folder {name!r:.100}")
    return ArchivePlace(
        key=key(one["id"]),
        found=f"{file}: {one['id']}",
        kind=kind,
        title=text(name),
        description=text((one.get("purpose") or {}).get("value") or ""),
        is_public=kind == "channel",
        is_archived=bool(one.get("is_archived")),
        created_at_ms=moment_ms(int(one.get("created", 0)) * 1000),
        owner=key(one["creator"]) if one.get("creator") else None,
        members=[key(member) for member in one.get("members") or ()],
        posts=lambda: _posts(files, name),
    )


def _posts(files: Files, name: object) -> list[ArchivePost]:
    posts = []
    for day in files.names(name):
        if day.endswith(".json"):
            made = each(f"{name}/{day}", files.json(name, day), partial(_post, f"{name}/{day}"))
            posts += [post for post in made if post is not None]
            with reading(f"{name}/{day}"):
                require_few_posts(len(posts), str(name))
    return posts


def _post(file: str, message: dict[str, Any]) -> ArchivePost | None:
    """Return a message of a user or a bot, or None for anything else."""
    if message.get("type") != "message" or message.get("subtype") not in SAID:
        return None
    edited = message.get("edited")
    files = [text(f"{file.get('name', 'file')}: {file['url_private']}") for file in message.get("files") or ()
             if file.get("url_private")]  # fmt: skip
    return ArchivePost(
        key=key(message["ts"]),
        found=f"{file}: {message['ts']}",
        person=key(message["user"]) if message.get("user") else "",
        text="\n".join([*([_text(text(message["text"]))] if message.get("text") else []), *files]),
        at_ms=_ms(message["ts"]),
        thread=key(message["thread_ts"]) if message.get("thread_ts") else None,
        edited_at_ms=_ms(edited["ts"]) if edited else None,
        reactions=[
            Reaction(person=key(user), name=text(reaction["name"]))
            for reaction in message.get("reactions") or ()
            for user in reaction.get("users", ())
        ],
    )


def _ms(ts: str) -> int:
    seconds, _, rest = ts.partition(".")
    return moment_ms(int(seconds) * 1000 + int((rest + "000")[:3]))


def _text(said: str) -> str:
    """Return Slack's text in plain form: `<@U1>` is a mention, `<#C1|name>` a channel, `<url|label>` a link."""

    def plain(found: re.Match[str]) -> str:
        target, _, label = found[1].partition("|")
        if target.startswith("@"):
            return mention(target[1:])
        if target.startswith("#"):
            return f"#{label or target[1:]}"
        if target.startswith("!"):
            return f"@{'everyone' if target[1:] in {'channel', 'everyone'} else target[1:]}"
        return f"{label} ({target})" if label and label != target else target

    return html.unescape(_LINK.sub(plain, said))
