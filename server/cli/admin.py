"""The administrator's command line: accounts, conversations, a person's data, and forgetting a person.

Whoever may run it may read the database, so it asks nobody else; what it does goes to the server's audit log. A running
server is told by the bus, as by its own workers.
"""

import asyncio
import contextlib
import inspect
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import click
import msgspec

from protocol import limits
from protocol.codec import advice
from protocol.http import canonical
from protocol.ids import EVERYONE, ConversationId, MessageId, UserId
from server.app.announcement import CommandNews, announce
from server.auth import passwords
from server.cli.arguments import SOME_ID, Command, Group, Id, Number, with_data_dir, with_json
from server.cli.tables import show_fields, show_rows
from server.context import Events
from server.core import config
from server.core.errors import Fatal
from server.core.terminal import complain, say, say_json
from server.db import database, migrate
from server.db.database import Db
from server.db.epoch import epoch_id
from server.domain import erasure as erasing
from server.domain import membership
from server.domain.export import written
from server.domain.publish import publish_participant, publish_updated
from server.ops.progress import Progress
from server.processes.embedded.reach import Reached, reached
from server.queries import accounts, audit, conversations, erasure, export, participants, sessions, users
from server.queries.accounts import AccountCard
from server.queries.audit import Deed

PASSWORD_BYTES = 12
"""Of randomness in a password that we make."""
PAGE = 500
"""Max entries of an audit log that are read at a time, and of a list that are shown."""
SHOWN = 50
"""Entries of a list that are shown unless more are asked for."""
LAST_ID = UUID(int=2**128 - 1)
SERVER_LOG = UUID(int=0)
"""What stands for the id of a conversation where the server's own audit log is meant."""


class ListPart(NamedTuple):
    """A part of a list, and the `--after` that shows the next one, if there is one."""

    rows: list[Mapping[str, Any]]
    after: str | None


Decorator: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]
Act = TypeVar("Act", bound=Callable[..., Any])
Answer: TypeAlias = Mapping[str, Any] | list[Mapping[str, Any]] | ListPart | None


class RightsChange(NamedTuple):
    """The answer of a command that changed rights, and the news for the workers, whose sockets see it."""

    answer: Answer
    news: CommandNews
    failure: str | None = None
    """What to end with, once the workers were told."""


Work: TypeAlias = Callable[[Db], Coroutine[None, None, Answer | RightsChange]]

with_user = click.argument("user", help="An e-mail address or an id.")
with_conversation = click.argument("conversation", type=Id(), help="An id.")
with_limit = click.option(
    "--limit", type=Number(int, 1, PAGE), default=SHOWN, metavar="COUNT", help="Max rows to show. [50]"
)
with_yes = click.option("--yes", "is_meant", is_flag=True, help="Really: there is no way back.")


@click.group(
    "user",
    cls=Group,
    examples="""
        openchat user create Ada ada@example.org --admin
        openchat user list ada
        openchat user disable ada@example.org
    """,
)
def user() -> None:
    """List, create, change and lock accounts.

    What these commands do, and what they show, is noted in the server's audit log. A running server knows immediately.
    """


@click.group(
    "conversation",
    cls=Group,
    examples=f"""
        openchat conversation list engines
        openchat conversation list --user ada@example.org
        openchat conversation show {SOME_ID}
    """,
)
def conversation() -> None:
    """List, show, export and delete conversations.

    What these commands do, and what they show, is noted in the server's audit log. A running server knows immediately.
    """


def start(work: Work, *, is_json: bool, data_dir: str | None) -> None:
    """Do the work of a command on the database, and show the answer."""
    with reached(config.read(data_dir=data_dir)) as servers:
        answer = asyncio.run(_run(servers, work))
    if answer is not None:
        _show(answer, is_json=is_json)


def command(group: click.Group, name: str, *arguments: Decorator, example: str) -> Callable[[Act], Act]:
    """Make a command of a function that is given a connection, and by name what `arguments` declare."""

    def made(act: Act) -> Act:
        def begin(*, is_json: bool, data_dir: str | None, **given: Any) -> None:  # noqa: ANN401 - the arguments
            start(partial(act, **given), is_json=is_json, data_dir=data_dir)

        declared: tuple[Decorator, ...] = (with_data_dir, with_json, *reversed(arguments))
        callback: Callable[..., None] = begin
        for add in declared:
            callback = add(callback)
        examples = f"openchat {group.name} {name} {example}"
        group.command(name, cls=Command, help=inspect.getdoc(act), examples=examples)(callback)
        return act

    return made


async def _run(servers: Reached, work: Work) -> Answer:
    connection = await database.connect(servers.database_url)
    try:
        await migrate.require_current(connection)
        # Before the change: once that is committed, nothing that fails hides from the operator whether servers know it.
        installation = await epoch_id(connection)
        # All that a command does is in one transaction, or may be done again.
        answer = await database.twice(lambda: work(connection), lambda _: None)
    finally:
        await connection.close()
    if isinstance(answer, RightsChange):
        await announce(servers.redis_url, installation, answer.news)
        if answer.failure is not None:
            raise Fatal(answer.failure)
        return answer.answer
    return answer


# ------------------------------------------------------------------------------------------------------ users


@command(
    user, "create", click.argument("name", help="What others see."), click.argument("email", help="To log in with."),
    click.option("--admin", "is_admin", is_flag=True, help="Make the user a server administrator."),
    example="Ada ada@example.org --admin",
)  # fmt: skip
async def create_user(db: Db, *, name: str, email: str, is_admin: bool) -> Answer:
    """Make an account, and print its password once."""
    _require_fit("an e-mail address", email, limits.Email)
    _require_fit("a name", name, limits.Name)
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    password_hash = await passwords.hashed(password)
    try:
        async with db.transaction():
            user_id = await accounts.register(db, name, canonical(email), password_hash)
            if is_admin:
                await accounts.promote(db, user_id, is_admin=True)
            await note(db, "create_user", user_id, is_admin=is_admin)
    except asyncpg.UniqueViolationError:
        raise Fatal("this e-mail address has an account already.") from None
    return {"id": str(user_id), "email": canonical(email), "password": password}


def _require_fit(what: str, value: str, kind: object) -> None:
    """Raise Fatal, with what to give instead, for a value that the wire does not allow either."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Fatal(f"`{value}` cannot be {what}. {advice(str(error))}") from None


@command(
    user, "list", click.argument("text", default="", help="A part of a name or of an e-mail address."), with_limit,
    click.option("--after", default="", metavar="EMAIL", help="Go on after this one, the last that was shown."),
    example="ada --limit 10",
)  # fmt: skip
async def list_users(db: Db, *, text: str, limit: int, after: str) -> Answer:
    """List accounts, by e-mail address.

    All, or those with a text in a name or in the address.
    """
    found = await accounts.listed(db, text, after, limit=limit)
    await note(db, "list_users")
    page = await found.decoded()
    return ListPart([_fields(entry) for entry in page.rows], page.after)


@command(user, "show", with_user, example="ada@example.org")
async def show_user(db: Db, *, user: str) -> Answer:
    """Show an account."""
    card = await _card(db, user)
    await note(db, "show_user", card.id)
    return _fields(card)


@command(user, "disable", with_user, example="ada@example.org")
async def disable_user(db: Db, *, user: str) -> RightsChange:
    """Lock a user out, until enabled again."""
    return await _set_disabled(db, user, is_disabled=True)


@command(user, "enable", with_user, example="ada@example.org")
async def enable_user(db: Db, *, user: str) -> RightsChange:
    """Let a user in again."""
    return await _set_disabled(db, user, is_disabled=False)


@command(user, "promote", with_user, example="ada@example.org")
async def promote_user(db: Db, *, user: str) -> RightsChange:
    """Make a user a server administrator."""
    return await _set_admin(db, user, is_admin=True)


@command(user, "demote", with_user, example="ada@example.org")
async def demote_user(db: Db, *, user: str) -> RightsChange:
    """Make a server administrator an ordinary user."""
    return await _set_admin(db, user, is_admin=False)


@command(user, "reset-password", with_user, example="ada@example.org")
async def reset_password(db: Db, *, user: str) -> RightsChange:
    """Make a new password, print it once, end all sessions."""
    card = await _card(db, user)
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


@command(
    user, "sessions", with_user, click.option("--revoke", "is_revoked", is_flag=True, help="End all of them."),
    example="ada@example.org --revoke",
)  # fmt: skip
async def list_sessions(db: Db, *, user: str, is_revoked: bool) -> Answer | RightsChange:
    """List a user's sessions, or end them."""
    card = await _card(db, user)
    if is_revoked:
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


async def _set_disabled(db: Db, user: str, *, is_disabled: bool) -> RightsChange:
    card = await _card(db, user)
    async with db.transaction():
        await users.lock(db, [card.id])
        await accounts.disable(db, card.id, is_disabled=is_disabled)
        if is_disabled:
            await sessions.revoke(db, card.id, None)
        await note(db, "disable_user" if is_disabled else "enable_user", card.id)
    return RightsChange(_fields(await _card(db, user)), CommandNews(partial(_of_user, card.id)))


async def _set_admin(db: Db, user: str, *, is_admin: bool) -> RightsChange:
    card = await _card(db, user)
    async with db.transaction():
        await accounts.promote(db, card.id, is_admin=is_admin)
        await note(db, "promote_user" if is_admin else "demote_user", card.id)
    return RightsChange(_fields(await _card(db, user)), CommandNews(partial(_of_user, card.id)))


def _of_user(user_id: UserId, events: Events) -> None:
    """Have the workers look again at a user's sessions, and at who may see the user."""
    events.notify([user_id])
    events.reconsider(user_id)


# ---------------------------------------------------------------------------------------------- conversations


@command(
    conversation, "list", click.argument("text", default="", help="A part of a title."), with_limit,
    click.option("--user", metavar="USER", help="Those of a user: an e-mail address or an id."),
    click.option("--after", type=Id(), default=LAST_ID, metavar="ID", help="Go on after the last that was shown."),
    example="--user ada@example.org",
)  # fmt: skip
async def list_conversations(db: Db, *, text: str, limit: int, user: str | None, after: UUID) -> Answer:
    """List conversations, the newest first.

    All, those with a text in the title, or those of a user.
    """
    user_id = None if user is None else (await _card(db, user)).id
    found = await conversations.listed(db, text, ConversationId(after), user_id=user_id, limit=limit)
    await note(db, "list_conversations", user_id)
    page = await found.decoded()
    return ListPart([_fields(entry) for entry in page.rows], None if page.after is None else str(page.after))


@command(conversation, "show", with_conversation, example=SOME_ID)
async def show_conversation(db: Db, *, conversation: UUID) -> Answer:
    """Show a conversation, without its messages."""
    found = await _conversation(db, conversation)
    await note(db, "show_conversation", None, conversation_id=str(found.conversation.id))
    return _shown(found)


def _shown(found: conversations.ConversationCard) -> Answer:
    rest = {
        "owner": str(found.owner),
        "messages": found.message_count,
        "last_activity_at": msgspec.to_builtins(found.last_activity_at),
    }
    return _fields(found.conversation) | rest


@command(conversation, "export", with_conversation, example=SOME_ID)
async def export_conversation(db: Db, *, conversation: UUID) -> Answer:
    """Print all messages of a conversation, one JSON a line."""
    found = await _conversation(db, conversation)
    await note(db, "export_conversation", None, conversation_id=str(found.conversation.id))
    progress, after = Progress(), 0
    while lines := await conversations.everything(db, found.conversation.id, after, limit=export.PAGE):
        for line, _ in lines:
            say_json(line + "\n")
        after = lines[-1][1]
        progress.counts("versions", after)
    progress.done()
    return None


@command(conversation, "delete", with_conversation, with_yes, example=f"{SOME_ID} --yes")
async def delete_conversation(db: Db, *, conversation: UUID, is_meant: bool) -> Answer | RightsChange:
    """Delete a group or a channel, for everyone and for good."""
    found = (await _conversation(db, conversation)).conversation
    if membership.is_lasting(found):
        raise Fatal("a direct conversation is not deleted: its two participants could never have another.")
    if not found.is_deleted and not is_meant:
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


@command(
    conversation, "audit", with_conversation,
    click.option("--verify", "is_verified", is_flag=True, help="Only check that nothing was changed."),
    example=f"{SERVER_LOG} --verify",
)  # fmt: skip
async def show_audit(db: Db, *, conversation: UUID, is_verified: bool) -> Answer:
    """Show who used what power in a conversation.

    The id 00000000-0000-0000-0000-000000000000 stands for the server's own log.
    """
    chain = ConversationId(conversation)
    if (number := await audit.broken(db, chain)) is not None:
        raise Fatal(f"the log was tampered with at or before entry {number}.")
    if is_verified:
        return {"entries": await audit.count(db, chain), "tampered_with": False}
    entries: list[Mapping[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = await (await audit.page(db, chain, after, limit=PAGE)).decoded()
        entries += [_fields(entry) for entry in page.rows]
        after = page.after
    return entries


# --------------------------------------------------------------------------------------------- a person's data


async def export_user(db: Db, who: str) -> AsyncIterator[bytes]:
    """Return everything that is stored about a user, as JSON (protocol/export.py), piece by piece. This is noted."""
    card = await _card(db, who)
    await note(db, "export_user", card.id)
    async for piece in written(lambda: contextlib.nullcontext(db), card.id):
        yield piece


@click.command("erase", cls=Command, examples="openchat erase ada@example.org --yes --verify")
@with_user
@with_yes
@click.option("--verify", "is_verified", is_flag=True, help="Look afterwards whether anything is left.")
@with_json
@with_data_dir
def erase(user: str, data_dir: str | None, *, is_meant: bool, is_verified: bool, is_json: bool) -> None:
    """Erase a person. Their messages stay, without a name.

    Nothing else about the person stays. There is no way back.
    """
    # Those that an attempt committed before it failed are told, too.
    work = partial(erase_user, user=user, is_meant=is_meant, is_verified=is_verified, changes=[])
    start(work, is_json=is_json, data_dir=data_dir)


async def erase_user(
    db: Db, *, user: str, is_meant: bool, is_verified: bool, changes: list[participants.ParticipantChange]
) -> RightsChange:
    """Erase a person now. `changes` gets the ends of their memberships."""
    card = await _card(db, user)
    texts = [] if card.state == "erased" else await erasure.words(db, card.id)
    if card.state != "erased" and not is_meant:
        await note(db, "show_user", card.id)
        raise Fatal(f"this erases {card.name} ({card.email}) for good; say --yes if that is meant.")
    if is_meant:
        # Who was erased before is erased again: what was left, or came since, is taken away.
        await erasing.erase(database.Single(db), card.id, changes.append)
        await note(db, "erase_user", card.id)
    answer: dict[str, Any] = {"id": str(card.id), "state": "erased"}
    failure = None
    if is_verified:
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


async def _conversation(db: Db, conversation: UUID) -> conversations.ConversationCard:
    found = await conversations.card(db, ConversationId(conversation))
    if found is None:
        raise Fatal(f"there is no conversation {conversation}.")
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
    elif not answer:
        say("none")
    elif isinstance(answer, list):
        names = list(dict.fromkeys(name for row in answer for name in row))
        show_rows(names, [[_word(row.get(name)) for name in names] for row in answer])
    else:
        show_fields((name, _word(value)) for name, value in answer.items())


def _word(value: object) -> str:
    if isinstance(value, (dict, list)):
        return msgspec.json.encode(value).decode()
    return "-" if value is None else str(value)
