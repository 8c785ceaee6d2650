"""The administrator's command line: accounts, conversations, a person's data, and forgetting a person.

Whoever may run it may read the database, so it asks nobody else; what it does goes to the server's audit log. A running
server is told by the bus, as by its own workers.
"""

import argparse
import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import asyncpg
import msgspec

from protocol import limits
from protocol.codec import advice
from protocol.http import canonical
from protocol.ids import EVERYONE, ConversationId, MessageId, UserId
from server.app.announcement import CommandNews, announce
from server.auth import passwords
from server.cli.arguments import Parser, named
from server.context import Events
from server.core import config
from server.core.errors import Fatal
from server.core.terminal import complain, plain, say, say_json, status_of
from server.db import database, migrate
from server.db.database import Db
from server.db.epoch import epoch_id
from server.domain import membership
from server.domain.erasure import erase
from server.domain.export import written
from server.domain.publish import publish_participant, publish_updated
from server.ops.progress import Progress
from server.processes.embedded.reach import Reached, reached
from server.queries import accounts, audit, conversations, erasure, export, participants, sessions, users
from server.queries.accounts import AccountCard
from server.queries.audit import Deed

GROUPS = ("user", "conversation")
"""Commands of two words."""
COMMANDS = (*GROUPS, "erase")
PASSWORD_BYTES = 12
"""Of randomness in a password that we make."""
PAGE = 500
"""Max entries of an audit log that are read at a time, and of a list that are shown."""
SHOWN = 50
"""Entries of a list that are shown unless more are asked for."""
LAST_ID = UUID(int=2**128 - 1)


class ListPart(NamedTuple):
    """A part of a list, and the `--after` that shows the next one, if there is one."""

    rows: list[Mapping[str, Any]]
    after: str | None


Answer: TypeAlias = Mapping[str, Any] | list[Mapping[str, Any]] | ListPart | None


class RightsChange(NamedTuple):
    """The answer of a command that changed rights, and the news for the workers, whose sockets see it."""

    answer: Answer
    news: CommandNews
    failure: str | None = None
    """What to end with, once the workers were told."""


Work: TypeAlias = Callable[[Db, argparse.Namespace], Coroutine[None, None, Answer | RightsChange]]


def main(arguments: list[str]) -> int:
    """Do what the command line says; return the status to end with."""

    def done() -> int:
        options = _parser().parse_args(arguments)
        with reached(config.read(data_dir=options.data_dir)) as servers:
            answer = asyncio.run(_run(servers, options))
        if answer is not None:
            _show(answer, is_json=options.json)
        return 0

    return status_of(done)


def _parser() -> Parser:
    parser = Parser(prog="openchat", description=__doc__)
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    common.add_argument("--data-dir", type=named, help="where the embedded database lives, if not in the usual place")
    who = Parser(add_help=False)
    who.add_argument("user", help="an e-mail address, or an id")
    part = Parser(add_help=False)
    part.add_argument("--limit", type=_count, default=SHOWN, metavar="COUNT", help=f"show so many ({SHOWN})")
    which = Parser(add_help=False)
    which.add_argument("conversation", type=UUID, help="an id")
    top = parser.add_subparsers(required=True, metavar="command")

    def command(
        group: "argparse._SubParsersAction[Parser]",
        name: str,
        work: Work,
        *parents: Parser,
    ) -> Parser:
        about = (work.__doc__ or "").split("\n")[0]
        made = group.add_parser(name, parents=[common, *parents], help=about, description=about)
        made.set_defaults(work=work)
        return made

    user = top.add_parser("user", help="accounts").add_subparsers(required=True, metavar="what")
    create = command(user, "create", create_user)
    create.add_argument("name")
    create.add_argument("email")
    create.add_argument("--admin", action="store_true", help="make them a server administrator")
    several = command(user, "list", list_users, part)
    several.add_argument("text", nargs="?", default="", help="a part of a name or of an e-mail address")
    several.add_argument("--after", default="", metavar="EMAIL", help="the last one that was shown")
    command(user, "show", show_user, who)
    command(user, "disable", disable_user, who)
    command(user, "enable", enable_user, who)
    command(user, "promote", promote_user, who)
    command(user, "demote", demote_user, who)
    command(user, "reset-password", reset_password, who)
    listed = command(user, "sessions", list_sessions, who)
    listed.add_argument("--revoke", action="store_true", help="end them all")
    conversation = top.add_parser("conversation", help="conversations").add_subparsers(required=True, metavar="what")
    several = command(conversation, "list", list_conversations, part)
    several.add_argument("text", nargs="?", default="", help="a part of a title")
    several.add_argument("--user", metavar="USER", help="those that a user takes part in: an e-mail address, or an id")
    several.add_argument("--after", type=UUID, default=LAST_ID, metavar="ID", help="the last one that was shown")
    command(conversation, "show", show_conversation, which)
    command(conversation, "export", export_conversation, which)
    deleted = command(conversation, "delete", delete_conversation, which)
    deleted.add_argument("--yes", action="store_true", help="really: there is no way back")
    audited = command(conversation, "audit", show_audit, which)
    audited.add_argument("--verify", action="store_true", help="only check that nothing was changed")
    erased = command(top, "erase", erase_user, who)
    erased.set_defaults(changes=[])
    erased.add_argument("--yes", action="store_true", help="really: there is no way back")
    erased.add_argument("--verify", action="store_true", help="look afterwards whether anything is left")
    return parser


def _count(text: str) -> int:
    """Return how many entries to show. Raises ArgumentTypeError if a list shows no such number of them."""
    if text.isascii() and text.isdecimal() and len(text) <= len(str(PAGE)) and 1 <= int(text) <= PAGE:
        return int(text)
    raise argparse.ArgumentTypeError(f"give a number from 1 to {PAGE}")


async def _run(servers: Reached, options: argparse.Namespace) -> Answer:
    connection = await database.connect(servers.database_url)
    try:
        await migrate.require_current(connection)
        # Before the change: once that is committed, nothing that fails hides from the operator whether servers know it.
        installation = await epoch_id(connection)
        work: Work = options.work
        # All that a command does is in one transaction, or may be done again.
        answer = await database.twice(lambda: work(connection, options), lambda _: None)
    finally:
        await connection.close()
    if isinstance(answer, RightsChange):
        await announce(servers.redis_url, installation, answer.news)
        if answer.failure is not None:
            raise Fatal(answer.failure)
        return answer.answer
    return answer


# ------------------------------------------------------------------------------------------------------ users


async def create_user(db: Db, options: argparse.Namespace) -> Answer:
    """Make an account, and print its password once."""
    _require_fit("an e-mail address", options.email, limits.Email)
    _require_fit("a name", options.name, limits.Name)
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    password_hash = await passwords.hashed(password)
    try:
        async with db.transaction():
            user_id = await accounts.register(db, options.name, canonical(options.email), password_hash)
            if options.admin:
                await accounts.promote(db, user_id, is_admin=True)
            await note(db, "create_user", user_id, is_admin=options.admin)
    except asyncpg.UniqueViolationError:
        raise Fatal("this e-mail address has an account already.") from None
    return {"id": str(user_id), "email": canonical(options.email), "password": password}


def _require_fit(what: str, value: str, kind: object) -> None:
    """Raise Fatal, with what to give instead, for a value that the wire does not allow either."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Fatal(f"`{value}` cannot be {what}. {advice(str(error))}") from None


async def list_users(db: Db, options: argparse.Namespace) -> Answer:
    """List accounts by their e-mail addresses: all, or those with a text in a name or in the address."""
    found = await accounts.listed(db, options.text, options.after, limit=options.limit)
    await note(db, "list_users")
    page = await found.decoded()
    return ListPart([_fields(entry) for entry in page.rows], page.after)


async def show_user(db: Db, options: argparse.Namespace) -> Answer:
    """Show an account."""
    card = await _card(db, options.user)
    await note(db, "show_user", card.id)
    return _fields(card)


async def disable_user(db: Db, options: argparse.Namespace) -> RightsChange:
    """Lock a user out, everywhere, until enabled again."""
    return await _set_disabled(db, options, is_disabled=True)


async def enable_user(db: Db, options: argparse.Namespace) -> RightsChange:
    """Let a user in again."""
    return await _set_disabled(db, options, is_disabled=False)


async def promote_user(db: Db, options: argparse.Namespace) -> RightsChange:
    """Make a user a server administrator."""
    return await _set_admin(db, options, is_admin=True)


async def demote_user(db: Db, options: argparse.Namespace) -> RightsChange:
    """Make a server administrator a user like others."""
    return await _set_admin(db, options, is_admin=False)


async def reset_password(db: Db, options: argparse.Namespace) -> RightsChange:
    """Give a user a new password, print it once, and end their sessions."""
    card = await _card(db, options.user)
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    new_hash = await passwords.hashed(password)
    async with db.transaction():
        await users.lock(db, [card.id])
        if not await accounts.give_password(db, card.id, new_hash):
            raise Fatal(f"{card.email} cannot log in: it is erased, or another account logs in with this address.")
        await sessions.revoke(db, card.id, None)
        await users.touch(db, [card.id])
        await note(db, "reset_password", card.id)
    answer = {"id": str(card.id), "email": card.email, "password": password}
    return RightsChange(answer, CommandNews(partial(_of_user, card.id), account=card.email))


async def list_sessions(db: Db, options: argparse.Namespace) -> Answer | RightsChange:
    """List a user's sessions."""
    card = await _card(db, options.user)
    if options.revoke:
        async with db.transaction():
            await users.lock(db, [card.id])
            found = await sessions.of_user(db, card.id, None)
            ended: list[Mapping[str, Any]] = [_fields(one) | {"state": "ended"} for one in found]
            await sessions.revoke(db, card.id, None)
            await users.touch(db, [card.id])
            await note(db, "revoke_sessions", card.id)
        return RightsChange(ended, CommandNews(partial(_of_user, card.id)))
    await note(db, "list_sessions", card.id)
    return [_fields(one) for one in await sessions.of_user(db, card.id, None)]


async def _set_disabled(db: Db, options: argparse.Namespace, *, is_disabled: bool) -> RightsChange:
    card = await _card(db, options.user)
    async with db.transaction():
        await users.lock(db, [card.id])
        await accounts.disable(db, card.id, is_disabled=is_disabled)
        if is_disabled:
            await sessions.revoke(db, card.id, None)
        await note(db, "disable_user" if is_disabled else "enable_user", card.id)
    return RightsChange(_fields(await _card(db, options.user)), CommandNews(partial(_of_user, card.id)))


async def _set_admin(db: Db, options: argparse.Namespace, *, is_admin: bool) -> RightsChange:
    card = await _card(db, options.user)
    async with db.transaction():
        await accounts.promote(db, card.id, is_admin=is_admin)
        await note(db, "promote_user" if is_admin else "demote_user", card.id)
    return RightsChange(_fields(await _card(db, options.user)), CommandNews(partial(_of_user, card.id)))


def _of_user(user_id: UserId, events: Events) -> None:
    """Have the workers look again at a user's sessions, and at who may see the user."""
    events.notify([user_id])
    events.reconsider(user_id)


# ---------------------------------------------------------------------------------------------- conversations


async def list_conversations(db: Db, options: argparse.Namespace) -> Answer:
    """List conversations, the newest first: all, those with a text in the title, or those of a user."""
    user_id = None if options.user is None else (await _card(db, options.user)).id
    found = await conversations.listed(db, options.text, options.after, user_id=user_id, limit=options.limit)
    await note(db, "list_conversations", user_id)
    page = await found.decoded()
    return ListPart([_fields(entry) for entry in page.rows], None if page.after is None else str(page.after))


async def show_conversation(db: Db, options: argparse.Namespace) -> Answer:
    """Show what a conversation is, without what is said in it."""
    found = await _conversation(db, options)
    await note(db, "show_conversation", None, conversation_id=str(found.conversation.id))
    return _shown(found)


def _shown(found: conversations.ConversationCard) -> Answer:
    rest = {
        "owner": str(found.owner),
        "messages": found.message_count,
        "last_activity_at": msgspec.to_builtins(found.last_activity_at),
    }
    return _fields(found.conversation) | rest


async def export_conversation(db: Db, options: argparse.Namespace) -> Answer:
    """Print all messages of a conversation, one JSON object a line. This is noted."""
    found = await _conversation(db, options)
    await note(db, "export_conversation", None, conversation_id=str(found.conversation.id))
    progress, after = Progress(), 0
    while lines := await conversations.everything(db, found.conversation.id, after, limit=export.PAGE):
        for line, _ in lines:
            say_json(line + "\n")
        after = lines[-1][1]
        progress.counts("versions", after)
    progress.done()
    return None


async def delete_conversation(db: Db, options: argparse.Namespace) -> Answer | RightsChange:
    """Delete a group or a channel, for everyone and for good."""
    found = (await _conversation(db, options)).conversation
    if membership.is_lasting(found):
        raise Fatal("a direct conversation is not deleted: its two participants could never have another.")
    if not found.is_deleted and not options.yes:
        await note(db, "show_conversation", None, conversation_id=str(found.id))
        raise Fatal(
            f"this deletes the {found.type} `{found.title}` ({found.id}) and its {found.participant_count} "
            "participants lose it for good; say --yes if that is meant."
        )
    answer = {"id": str(found.id), "title": found.title, "state": "deleted"}
    async with db.transaction():
        if await conversations.lock(db, found.id) is None:
            return answer
        ended = await membership.end(db, found.id)
        await note(db, "delete_conversation", None, conversation_id=str(found.id))

    def news(events: Events) -> None:
        publish_updated(events, ended, gone=EVERYONE)

    return RightsChange(answer, CommandNews(news))


async def show_audit(db: Db, options: argparse.Namespace) -> Answer:
    """Show who used what power in a conversation (zeros: on the server), or check that nothing was changed."""
    chain = ConversationId(options.conversation)
    if (number := await audit.broken(db, chain)) is not None:
        raise Fatal(f"the log was tampered with at or before entry {number}.")
    if options.verify:
        return {"entries": await audit.count(db, chain), "tampered_with": False}
    entries: list[Mapping[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = await (await audit.page(db, chain, after, limit=PAGE)).decoded()
        entries += [_fields(entry) for entry in page.rows]
        after = page.after
    return entries


# --------------------------------------------------------------------------------------------- a person's data


async def export_user(db: Db, options: argparse.Namespace) -> AsyncIterator[bytes]:
    """Return everything that is stored about a user, as JSON (protocol/export.py), piece by piece. This is noted."""
    card = await _card(db, options.user)
    await note(db, "export_user", card.id)
    async for piece in written(lambda: contextlib.nullcontext(db), card.id):
        yield piece


async def erase_user(db: Db, options: argparse.Namespace) -> RightsChange:
    """Erase a person now: what they said stays, and nothing else of them. With --verify, prove it."""
    card = await _card(db, options.user)
    texts = [] if card.state == "erased" else await erasure.words(db, card.id)
    if card.state != "erased" and not options.yes:
        await note(db, "show_user", card.id)
        raise Fatal(f"this erases {card.name} ({card.email}) for good; say --yes if that is meant.")
    # Those that an attempt committed before it failed are told, too.
    changes: list[participants.ParticipantChange] = options.changes
    if options.yes:
        # Who was erased before is erased again: what was left, or came since, is taken away.
        await erase(database.Single(db), card.id, changes.append)
        await note(db, "erase_user", card.id)
    answer: dict[str, Any] = {"id": str(card.id), "state": "erased"}
    failure = None
    if options.verify:
        found = await erasure.traces(db, card.id, texts)
        left = [f"{trace.place} ({trace.found})" for trace in found if not trace.is_said]
        if left:
            failure = f"something is left in {', '.join(left)}."
        answer["traces"] = 0
        answer["people_say_the_same_in"] = ", ".join(f"{trace.place} ({trace.found})" for trace in found) or "-"

    def news(events: Events) -> None:
        for change in changes:
            publish_participant(events, change)
        _of_user(card.id, events)

    return RightsChange(answer, CommandNews(news), failure)


# --------------------------------------------------------------------------------------------------- in common


async def note(
    db: Db, action: str, user_id: UserId | None = None, message_id: MessageId | None = None, **details: object
) -> None:
    """Note in the server's audit log what is done, or read, on the command line: before it is shown."""
    async with db.transaction():
        await audit.record(db, audit.SERVER, Deed(None, action, user_id, message_id, details))


async def _card(db: Db, who: str) -> AccountCard:
    card = await accounts.card(db, who)
    if card is None:
        raise Fatal(f"there is no user {who}.")
    return card


async def _conversation(db: Db, options: argparse.Namespace) -> conversations.ConversationCard:
    found = await conversations.card(db, ConversationId(options.conversation))
    if found is None:
        raise Fatal(f"there is no conversation {options.conversation}.")
    return found


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(struct)
    return fields


def _show(answer: Answer, *, is_json: bool) -> None:
    """Print a table: a line for each of several, or for each field of one."""
    if isinstance(answer, ListPart):
        _show(answer.rows, is_json=is_json)
        if answer.after is not None:
            complain(f"there are more: give --after {answer.after}")
    elif is_json:
        say_json(msgspec.json.encode(answer).decode() + "\n")
    elif isinstance(answer, list):
        names = list(dict.fromkeys(name for row in answer for name in row))
        _table([names, *([_word(row.get(name)) for name in names] for row in answer)] if answer else [["none"]])
    elif answer is not None:
        _table([[name, _word(value)] for name, value in answer.items()])


def _word(value: object) -> str:
    if isinstance(value, (dict, list)):
        return msgspec.json.encode(value).decode()
    return "-" if value is None else str(value)


def _table(rows: list[list[str]]) -> None:
    rows = [[plain(word) for word in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
