"""The commands that check, trace, index, export and import."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeAlias
from uuid import UUID

import click
import msgspec

from protocol.ids import MessageId
from server.cli import admin, users
from server.cli.arguments import SOME_ID, Command, File, Id, OneOf, with_data_dir, with_json
from server.cli.tables import show_fields, show_rows
from server.core import config
from server.core.atomic_file import aside
from server.core.errors import Fatal
from server.core.terminal import complain, plain, printing, say, say_bytes, say_json
from server.db import database, migrate
from server.db.database import Db
from server.ops.check import run_checks
from server.ops.progress import Progress
from server.ops.reindex import rebuild_search_index
from server.ops.transfer import dump, load, matches, mattermost, plan, reading, slack
from server.ops.transfer.archive import Archive
from server.ops.transfer.lines import Lines
from server.ops.transfer.matches import UnconfirmedMatches
from server.ops.transfer.plan import Unnamed
from server.processes.embedded.reach import reached
from server.queries import accounts, delivery_report, transfers
from server.queries.audit import Deed

STANDARD_OUTPUT = Path("-")
NOT_UNDERSTOOD = (*reading.WRONG, *load.REFUSED)
"""Raised about a file with invalid content."""
FOREIGN: dict[str, Callable[[Path], Archive]] = {"slack": slack.read, "mattermost": mattermost.read}


class Place(NamedTuple):
    """The installation that a command works on."""

    name: str
    grace: timedelta
    """Time for which a deleted account can be restored, before it is erased."""


Work: TypeAlias = Callable[[Db, Place], Coroutine[None, None, int]]


def start(work: Work, data_dir: str | None) -> int:
    """Run a command on the database. Return the exit status."""
    settings = config.read(data_dir=data_dir)
    with reached(settings) as servers:
        place = Place(servers.name, timedelta(days=settings.erase_after_days))
        return asyncio.run(_run(servers.database_url, settings.search_language, lambda db: work(db, place)))


async def _run(url: str, language: str, work: Callable[[Db], Coroutine[None, None, int]]) -> int:
    connection = await database.connect(url)
    try:
        await migrate.require_current(connection)
        await database.speak(connection, language)
        return await work(connection)
    finally:
        await connection.close()


@click.command(
    "check",
    cls=Command,
    examples="""
        openchat check
        openchat check --json
        openchat check --data-dir /srv/restored     # a backup that was restored
    """,
)
@with_json
@with_data_dir
def check(data_dir: str | None, *, is_json: bool) -> int:
    """Recompute derived data and search for corruption.

    The exit status is 1 if anything is wrong. The server may run meanwhile.
    """
    return start(lambda db, place: _check(db, place, is_json=is_json), data_dir)


async def _check(db: Db, place: Place, *, is_json: bool) -> int:
    progress = Progress(is_on=not is_json)
    progress.line(f"Checking {place.name}.")
    lines = []
    async for line in run_checks(db, progress=progress, grace=place.grace):
        lines.append(line)
        state = "-" if line.found is None else "ok" if line.is_good else "WRONG"
        progress.line(f"{state:<5} {line.seconds:>6.1f} s  {line.name}")
        if line.found is None:
            progress.line("  skipped: needs CREATEROLE")
        if line.found is not None and line.found.number:
            progress.line(f"  {line.found.number:,}: {', '.join(line.found.some)}")
    wrong = sum(not line.is_good for line in lines)
    skipped = sum(line.found is None for line in lines)
    if is_json:
        rows = [
            {"check": line.name, "seconds": round(line.seconds, 3), "is_good": line.is_good,
             "wrong": line.found and line.found.number, "some": line.found and line.found.some}
            for line in lines
        ]  # fmt: skip
        say_json(msgspec.json.encode(rows).decode() + "\n")
    else:
        seconds = sum(line.seconds for line in lines)
        checks = f"{len(lines) - skipped} checks{f', {skipped} skipped,' if skipped else ''} in {seconds:.1f} s"
        progress.line(f"{checks}: {f'{wrong} WRONG' if wrong else 'all is well'}.")
    return 1 if wrong else 0


@click.command("why", cls=Command, examples=f"openchat why {SOME_ID}")
@click.argument("message", type=Id(), help="An id.")
@with_json
@with_data_dir
def why(message: UUID, data_dir: str | None, *, is_json: bool) -> int:
    """Show who has received a message, and why others have not."""
    return start(lambda db, _: _why(db, MessageId(message), is_json=is_json), data_dir)


async def _why(db: Db, message: MessageId, *, is_json: bool) -> int:
    told = await delivery_report.of(db, message, None, viewer=None)
    if told is None:
        raise Fatal(f"there is no message {message}.")
    await admin.note(db, "why", message_id=told.message_id)
    if is_json:
        say_json(msgspec.json.encode(told).decode() + "\n")
        return 0
    names = await accounts.names(db, [told.sender_id, *(one.user_id for one in told.recipients)])
    show_fields(
        [
            ("message", str(told.message_id)),
            ("conversation", str(told.conversation_id)),
            ("sender", f"{names.get(told.sender_id, '?')} ({told.sender_id})"),
            ("stored", f"{told.stored_at.isoformat()} as version {told.version}"),
            ("delivered to", str(told.delivered_to)),
            ("read by", str(told.read_by)),
        ]
    )
    say("")
    show_rows(
        ("state", "name", "user", "since"),
        [
            (
                one.state,
                names.get(one.user_id, "?"),
                str(one.user_id),
                one.at.isoformat(timespec="seconds") if one.at else "",
            )
            for one in told.recipients
        ],
    )
    return 0


@click.command("reindex", cls=Command, examples="OPENCHAT_SEARCH_LANGUAGE=english openchat reindex")
@with_data_dir
def reindex(data_dir: str | None) -> int:
    """Rebuild the search index, such as for another language.

    OPENCHAT_SEARCH_LANGUAGE sets the language. The server may run meanwhile.
    """
    return start(lambda db, _: _reindex(db), data_dir)


async def _reindex(db: Db) -> int:
    count = await rebuild_search_index(db, Progress())
    say(f"{count:,} messages are in the search index.")
    return 0


@click.command(
    "export",
    cls=Command,
    examples="""
        openchat export openchat.jsonl
        openchat export | gzip > openchat.jsonl.gz
        openchat export ada.json --user ada@example.org
    """,
)
@click.argument("file", type=File(has_output=True), default="-", help="The file to write. Standard output by default.")
@click.option("--user", metavar="USER", help="Only the data of a user: an e-mail address or an id.")
@with_data_dir
def export(file: Path, user: str | None, data_dir: str | None) -> int:
    """Export the whole installation, or the data of one user.

    An export of the installation contains everything in the database, password hashes included. docs/transfer.md has
    the format.
    """
    target = None if file == STANDARD_OUTPUT else file
    if user is not None:
        return start(lambda db, _: _export_user(db, user, target), data_dir)
    return start(lambda db, _: _export(db, target), data_dir)


async def _export(db: Db, file: Path | None) -> int:
    progress = Progress()
    if file is None:
        with printing() as out:
            if out.isatty():
                raise Fatal("an export cannot be written to a terminal. Give a file name.")
        await _note_export(db)
        await dump.write(db, say_bytes, progress)
        return 0
    with aside(file) as write:
        await _note_export(db)
        summary = await dump.write(db, write, progress)
    say(f"{summary.total:,} rows in {len(summary.rows)} tables, sha256 {summary.sha256}")
    return 0


async def _note_export(db: Db) -> None:
    # An empty installation has no data to read. An import may follow, which brings an audit log of its own.
    if not await transfers.is_empty(db):
        await admin.note(db, "export")


async def _export_user(db: Db, user: str, file: Path | None) -> int:
    if file is None:
        async for piece in users.export_user(db, user):
            say_json(piece.decode())
        return 0
    with aside(file) as write:
        async for piece in users.export_user(db, user):
            write(piece)
    return 0


@click.command(
    "import",
    cls=Command,
    examples="""
        openchat import openchat openchat.jsonl      # into an empty installation
        openchat import slack export.zip
        openchat import mattermost export.jsonl --source company
    """,
)
@click.argument(
    "format_",
    metavar="FORMAT",
    type=OneOf(("openchat", *FOREIGN)),
    help=f"One of {', '.join(('openchat', *FOREIGN))}.",
)
@click.argument("path", type=File(), help="A file; for Slack a folder or a zip file.")
@click.option(
    "--source", metavar="NAME",
    help="Name of the Slack workspace or Mattermost server, the same in each import from it.",
)  # fmt: skip
@click.option(
    "--match-accounts", metavar="CODE",
    help="Confirm that people and accounts with the same unverified addresses are the same, by the printed code. "
    "`none` keeps them apart.",
)  # fmt: skip
@with_data_dir
def import_(format_: str, path: Path, source: str | None, match_accounts: str | None, data_dir: str | None) -> int:
    """Import an export of OpenChat, Slack or Mattermost.

    docs/transfer.md lists what is imported. If anything is invalid, nothing is imported.
    """
    plan = Import(format_, path, source, match_accounts)
    return start(lambda db, _: _import(db, plan), data_dir)


class Import(NamedTuple):
    """The options of an import."""

    format: str
    path: Path
    source: str | None
    match_accounts: str | None


async def _import(db: Db, options: Import) -> int:
    progress = Progress()
    is_whole = options.format == "openchat"
    deed = Deed(
        None, "import", details={"format": options.format} | ({"source": options.source} if options.source else {})
    )
    notes: list[str] = []
    try:
        if is_whole:
            lines = dump.read(options.path, await transfers.columns(db))
        else:
            with _reading(options.path):
                found = FOREIGN[options.format](options.path)
            lines, notes = await plan.plan(db, found, source=options.source, confirmed=options.match_accounts)
        summary = await load.load(db, _read(options.path, lines), progress, is_whole=is_whole, deed=deed)
    except Unnamed as unnamed:
        raise Fatal(f"{plain(str(unnamed))} Nothing was imported.") from None
    except UnconfirmedMatches as unconfirmed:
        raise Fatal(_ask(unconfirmed, options.match_accounts)) from None
    except NOT_UNDERSTOOD as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Fatal(f"{options.path} cannot be imported: {plain(reason)}. Nothing was imported.") from error
    await rebuild_search_index(db, progress, only_missing=True)
    for note in notes:
        say(note)
    for table, count in summary.rows.items():
        say(f"{table:<26} {count:>12,}")
    return 0


def _read(path: Path, lines: Lines) -> Lines:
    # The database is used between two lines, and its errors must not count as those of the file.
    with _reading(path):
        yield from lines


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise Fatal for an OSError of the block, which only reads a file."""
    try:
        yield
    except OSError as error:
        raise Fatal(f"{path} cannot be read: {error.strerror or error}. Nothing was imported.") from None


def _ask(unconfirmed: UnconfirmedMatches, given: str | None) -> str:
    """Print the matches, and return how to answer. `given` is a code that confirms other matches."""
    for person, account in unconfirmed.matches:
        complain(f"{person.name} ({person.key}) = {account.name}, {account.email} ({account.id})")
    code = matches.confirmation(unconfirmed.matches)
    refused = "" if given is None else f"`--match-accounts {given}` is not the code of this list. "
    return (
        f"{refused}These accounts have unverified e-mail addresses that people in the export have, too. Nothing was "
        f"imported. If each account is the same person, use --match-accounts {code}. It gives each account that "
        f"person's conversations. To keep all of them apart, use --match-accounts {matches.OTHERS}."
    )
