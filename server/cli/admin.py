"""The common parts of administrators' commands: one transaction, an entry in the audit log, and notifications of
servers.

A user who may run them may read the database, so the commands check no further rights. Their actions are recorded in
the server's audit log. A running server is notified by the bus, as by its own workers. users.py and conversations.py
contain the commands.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import click
import msgspec

from protocol.ids import MessageId, UserId
from server.app.command_news import CommandNews, notify_workers
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
"""Default number of rows of a list that are shown."""


class ListPart(NamedTuple):
    """A part of a list, and the `--after` of the next part, or None at the end."""

    rows: list[Mapping[str, Any]]
    after: str | None


Decorator: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]
Act = TypeVar("Act", bound=Callable[..., Any])
Answer: TypeAlias = Mapping[str, Any] | list[Mapping[str, Any]] | ListPart | None


class RightsChange(NamedTuple):
    """The answer of a command that changes rights, and the news for the workers."""

    answer: Answer
    news: CommandNews
    failure: str | None = None
    """The error with which to exit after the workers were notified."""


Work: TypeAlias = Callable[[Db], Coroutine[None, None, Answer | RightsChange]]

with_limit = click.option(
    "--limit", type=Number(int, 1, MAX_SHOWN), default=SHOWN, metavar="COUNT", help="Max rows to show. [50]"
)
with_yes = click.option("--yes", "is_meant", is_flag=True, help="Confirm. This cannot be undone.")


def start(work: Work, *, is_json: bool, data_dir: str | None) -> None:
    """Run a command on the database, and show its answer."""
    with reached(config.read(data_dir=data_dir)) as servers:
        answer = asyncio.run(_run(servers, work))
    if answer is not None:
        _show(answer, is_json=is_json)


def command(group: click.Group, name: str, *arguments: Decorator, example: str) -> Callable[[Act], Act]:
    """Make a command of a function, which gets a connection and the declared arguments by name."""

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
        # Read before the change. After the commit, no failure may hide from the operator whether the servers were
        # notified.
        installation = await epoch_id(connection)
        # A command runs in one transaction, or can be repeated.
        answer = await database.twice(lambda: work(connection), lambda _: None)
    finally:
        await connection.close()
    if isinstance(answer, RightsChange):
        await notify_workers(servers.redis_url, installation, answer.news)
        if answer.failure is not None:
            raise Fatal(answer.failure)
        return answer.answer
    return answer


async def note(
    db: Db, action: str, user_id: UserId | None = None, message_id: MessageId | None = None, **details: object
) -> None:
    """Record an action of the command line in the server's audit log, before its result is shown."""
    async with db.transaction():
        await audit.record(db, audit.SERVER, Deed(None, action, user_id, message_id, details))


async def card(db: Db, who: str) -> AccountCard:
    """Return an account, by e-mail address or id. Raises Fatal if it does not exist."""
    found = await accounts.card(db, who)
    if found is None:
        raise Fatal(f"there is no user {who}.")
    return found


def fields(struct: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of a struct in their JSON form."""
    found: dict[str, Any] = msgspec.to_builtins(struct)
    return found


def _show(answer: Answer, *, is_json: bool) -> None:
    """Print a table with a line per row, or per field of a single answer."""
    if isinstance(answer, ListPart):
        _show(answer.rows, is_json=is_json)
        if answer.after is not None:
            complain(f"there are more. To continue, use --after {answer.after}")
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
