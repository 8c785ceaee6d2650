"""What commands of administrators have in common: one transaction, a note in the audit log, and news for the servers.

Whoever may run them may read the database, so they ask nobody else; what they do goes to the server's audit log. A
running server is told by the bus, as by its own workers. The commands are in users.py and conversations.py.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import click
import msgspec

from protocol.ids import MessageId, UserId
from server.app.announcement import CommandNews, announce
from server.cli.arguments import Command, Number, with_data_dir, with_json
from server.cli.tables import show_fields, show_rows
from server.core import config
from server.core.errors import Fatal
from server.core.terminal import complain, say, say_json
from server.db import database, migrate
from server.db.database import Db
from server.db.epoch import epoch_id
from server.processes.embedded.reach import Reached, reached
from server.queries import accounts, audit
from server.queries.accounts import AccountCard
from server.queries.audit import Deed

MAX_SHOWN = 500
"""Max rows of a list that are shown."""
SHOWN = 50
"""Rows of a list that are shown unless more are asked for."""


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

with_limit = click.option(
    "--limit", type=Number(int, 1, MAX_SHOWN), default=SHOWN, metavar="COUNT", help="Max rows to show. [50]"
)
with_yes = click.option("--yes", "is_meant", is_flag=True, help="Really: there is no way back.")


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


async def note(
    db: Db, action: str, user_id: UserId | None = None, message_id: MessageId | None = None, **details: object
) -> None:
    """Note in the server's audit log what is done, or read, on the command line: before it is shown."""
    async with db.transaction():
        await audit.record(db, audit.SERVER, Deed(None, action, user_id, message_id, details))


async def card(db: Db, who: str) -> AccountCard:
    """Return an account, by e-mail address or id. Raises Fatal if there is none."""
    found = await accounts.card(db, who)
    if found is None:
        raise Fatal(f"there is no user {who}.")
    return found


def fields(struct: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of a struct as JSON has them."""
    found: dict[str, Any] = msgspec.to_builtins(struct)
    return found


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
