"""The operator's command line: is everything as it should be, where did a message go, move everything elsewhere."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import msgspec

from protocol.ids import MessageId
from server.cli import admin
from server.cli.arguments import Parser, named, path
from server.core import config
from server.core.atomic_file import aside
from server.core.errors import Fatal
from server.core.terminal import complain, plain, printing, say, say_bytes, say_json, status_of
from server.db import database, migrate
from server.db.database import Db
from server.ops.check import run_checks
from server.ops.progress import Progress
from server.ops.reindex import rebuild_search_index
from server.ops.transfer import archive, dump, load, mattermost, reading, slack
from server.ops.transfer.archive import Archive, UnconfirmedMatches, Unnamed
from server.ops.transfer.lines import Lines
from server.processes.embedded.reach import reached
from server.queries import accounts, delivery_report, transfers
from server.queries.audit import Deed

COMMANDS = ("check", "why", "reindex", "export", "import")
NOT_UNDERSTOOD = (*reading.WRONG, *load.REFUSED)
"""What is raised about a file that does not hold what it should."""
FOREIGN: dict[str, Callable[[Path], Archive]] = {"slack": slack.read, "mattermost": mattermost.read}


def main(arguments: list[str]) -> int:
    """Do what the command line says; return the status to end with."""

    def done() -> int:
        options = _parser().parse_args(arguments)
        settings = config.read(data_dir=options.data_dir)
        options.grace = timedelta(days=settings.erase_after_days)
        with reached(settings) as servers:
            options.database = servers.name
            return asyncio.run(_run(servers.database_url, settings.search_language, options))

    return status_of(done)


def _parser() -> Parser:
    parser = Parser(prog="openchat", description=__doc__)
    common = Parser(add_help=False)
    common.add_argument("--data-dir", type=named, help="where the embedded database lives, if not in the usual place")
    json = Parser(add_help=False)
    json.add_argument("--json", action="store_true", help="print JSON, for programs")
    top = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, work: Work, *parents: Parser) -> Parser:
        about = (work.__doc__ or "").split("\n")[0]
        made = top.add_parser(name, parents=[common, *parents], help=about, description=about)
        made.set_defaults(work=work)
        return made

    command("check", check, json)
    command("why", why, json).add_argument("message", type=UUID, help="an id")
    command("reindex", reindex)
    exported = command("export", export)
    exported.add_argument("file", nargs="?", type=_output, help="where to write it; `-` or nothing is standard output")
    exported.add_argument("--user", help="only what is stored about a user: an e-mail address, or an id")
    imported = command("import", import_all)
    imported.add_argument("format", choices=("openchat", *FOREIGN), help="what wrote it")
    imported.add_argument("path", type=path, help="a file, or for Slack a folder or a zip file")
    imported.add_argument(
        "--source", metavar="NAME",
        help="which server or workspace of Slack or Mattermost it was: the same name in each import from there",
    )  # fmt: skip
    imported.add_argument(
        "--match-accounts", metavar="CODE",
        help="who has the same, unverified address is the same person: the code under the list; or `none` of them is",
    )  # fmt: skip
    return parser


def _output(text: str) -> Path | None:
    """Return a file to write, or None for standard output."""
    return None if text == "-" else path(text)


async def _run(url: str, language: str, options: argparse.Namespace) -> int:
    connection = await database.connect(url)
    try:
        await migrate.require_current(connection)
        await database.speak(connection, language)
        work: Work = options.work
        return await work(connection, options)
    finally:
        await connection.close()


Work = Callable[[Db, argparse.Namespace], Awaitable[int]]


async def check(db: Db, options: argparse.Namespace) -> int:
    """Count everything again and look for what must not be; end with status 1 if anything is wrong."""
    progress = Progress(is_on=not options.json)
    progress.line(f"Checking {options.database}.")
    lines = []
    async for line in run_checks(db, begins=progress.begins, grace=options.grace):
        lines.append(line)
        state = "skipped: needs CREATEROLE" if line.found is None else "ok" if line.is_good else "WRONG"
        progress.line(f"{line.name:<74} {line.seconds:>7.1f} s  {state}")
        if line.found is not None and line.found.number:
            progress.line(f"  {line.found.number:,}: {', '.join(line.found.some)}")
    wrong = sum(not line.is_good for line in lines)
    skipped = sum(line.found is None for line in lines)
    if options.json:
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


async def why(db: Db, options: argparse.Namespace) -> int:
    """Tell where a message went: stored, delivered, read, and for each who has it not, why."""
    told = await delivery_report.of(db, MessageId(options.message), None, viewer=None)
    if told is None:
        raise Fatal(f"there is no message {options.message}.")
    await admin.note(db, "why", message_id=told.message_id)
    if options.json:
        say_json(msgspec.json.encode(told).decode() + "\n")
        return 0
    names = await accounts.names(db, [told.sender_id, *(one.user_id for one in told.recipients)])
    say(f"message       {told.message_id}")
    say(f"conversation  {told.conversation_id}")
    say(f"sender        {names.get(told.sender_id, '?')} ({told.sender_id})")
    say(f"stored        {told.stored_at.isoformat()} as version {told.version}")
    say(f"delivered to  {told.delivered_to}")
    say(f"read by       {told.read_by}")
    say("")
    for one in told.recipients:
        at = "" if one.at is None else one.at.isoformat(timespec="seconds")
        say(f"{one.state:<13} {names.get(one.user_id, '?'):<30} {one.user_id}  {at}".rstrip())
    return 0


async def reindex(db: Db, options: argparse.Namespace) -> int:  # noqa: ARG001 - every command's shape
    """Make what messages are found by anew, in the language of OPENCHAT_SEARCH_LANGUAGE; the server may run."""
    count = await rebuild_search_index(db, Progress())
    say(f"{count:,} messages can be found.")
    return 0


async def export(db: Db, options: argparse.Namespace) -> int:
    """Write the whole installation, or with --user all about one person, as JSON (docs/transfer.md). Keep it safe."""
    if options.user is not None:
        return await _export_user(db, options)
    progress = Progress()
    if options.file is None:
        with printing() as out:
            if out.isatty():
                raise Fatal("an export of everything is not for a terminal; name a file.")
        await _note_export(db)
        await dump.write(db, say_bytes, progress)
        return 0
    with aside(options.file) as write:
        await _note_export(db)
        summary = await dump.write(db, write, progress)
    say(f"{summary.total:,} rows in {len(summary.rows)} tables, sha256 {summary.sha256}")
    return 0


async def _note_export(db: Db) -> None:
    # Where nobody is, nothing of anybody is read, and a whole installation may come, with an audit log of its own.
    if not await transfers.is_empty(db):
        await admin.note(db, "export")


async def _export_user(db: Db, options: argparse.Namespace) -> int:
    if options.file is None:
        async for piece in admin.export_user(db, options):
            say_json(piece.decode())
        return 0
    with aside(options.file) as write:
        async for piece in admin.export_user(db, options):
            write(piece)
    return 0


async def import_all(db: Db, options: argparse.Namespace) -> int:
    """Bring in what another installation, Slack or Mattermost has exported (docs/transfer.md)."""
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
            lines, notes = await archive.plan(db, found, source=options.source, confirmed=options.match_accounts)
        summary = await load.load(db, _read(options.path, lines), progress, is_whole=is_whole, deed=deed)
    except Unnamed as unnamed:
        raise Fatal(f"{plain(str(unnamed))} Nothing was brought in.") from None
    except UnconfirmedMatches as unconfirmed:
        raise Fatal(_ask(unconfirmed, options.match_accounts)) from None
    except NOT_UNDERSTOOD as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Fatal(f"{options.path} is not understood: {plain(reason)}. Nothing was brought in.") from error
    await rebuild_search_index(db, progress, only_missing=True)
    for note in notes:
        say(note)
    for table, count in summary.rows.items():
        say(f"{table:<26} {count:>12,}")
    return 0


def _read(path: Path, lines: Lines) -> Lines:
    # The database is used between two lines: its errors are not those of the file.
    with _reading(path):
        yield from lines


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise Fatal for an OSError of the block, in which nothing but a file is read."""
    try:
        yield
    except OSError as error:
        raise Fatal(f"{path} cannot be read: {error.strerror or error}. Nothing was brought in.") from None


def _ask(unconfirmed: UnconfirmedMatches, given: str | None) -> str:
    """Print who would become whom, and return what to do about it. `given` is a code that confirms something else."""
    for person, account in unconfirmed.matches:
        complain(f"{person.name} ({person.key}) = {account.name}, {account.email} ({account.id})")
    code = archive.confirmation(unconfirmed.matches)
    refused = "" if given is None else f"`--match-accounts {given}` is not the code of this list: "
    return (
        f"{refused}these accounts have the addresses of people in the export, and nobody has verified that the "
        "addresses are theirs. Nothing was brought in. If each of them is the same person, who gets that person's "
        f"conversations, say --match-accounts {code}; to keep all of them apart, say --match-accounts {archive.OTHERS}."
    )
