"""The command line: `openchat`, and `openchat migrate`, `new-epoch`, `user`, `conversation`, `erase`, `check`, `why`,
`reindex`, `export`, `import`, `load`, `prove`.
"""

import argparse
import asyncio
import difflib
import importlib
import sys
from importlib.metadata import version

from server.cli import admin, maintenance
from server.cli.arguments import Parser, named
from server.core import config, log
from server.core.config import Settings, variable
from server.core.errors import Fatal
from server.core.terminal import complain, say, status_of
from server.db import database, migrate
from server.db.epoch import begin_epoch
from server.processes.embedded.reach import Reached, reached
from server.processes.supervisor import Supervisor

OWN = {
    "run": "Start the server: what `openchat` without a command does.",
    "migrate": "Bring the database to this program's schema. Starting the server does so, too.",
    "new-epoch": "After restoring a backup, have every client start over.",
}
"""The commands of this module, and what each does."""
OUTSIDE = {"load": "loadtest.command", "prove": "prove.command"}
"""Commands that speak to a server as its clients do, with the module of each."""
COMMANDS = (*OWN, *admin.COMMANDS, *maintenance.COMMANDS, *OUTSIDE)
VALUED = ("--host", "--port", "--workers", "--data-dir")
"""Options before a command whose next argument is their value."""
MAX_PORT = 65_535
ABOUT = "A real-time chat backend: one command starts it, and it does not lose a message."
LIST = """\
commands, of which `openchat COMMAND --help` tells more:

  run            start the server (the default)
  migrate        bring the database to this program's schema
  new-epoch      after restoring a backup, have every client start over
  user           accounts
  conversation   conversations
  erase          forget a person
  check          count everything again
  why            where a message went
  reindex        search in another language
  export         write everything, or all about a person
  import         bring in an export, or come from another chat
  load           put a crowd in front of a running server
  prove          hurt a cluster in every way while a crowd uses it, and compare what is stored with what was seen
"""


def main() -> None:
    """Do what the command line says; end with status 1 and one line if it cannot be done."""
    sys.exit(status_of(lambda: _run(sys.argv[1:])))


def _run(arguments: list[str]) -> int:
    given, arguments = arguments, _ordered(arguments)
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "run"
    if name not in COMMANDS:
        before = given[given.index(name) - 1] if name in given[1:] else ""
        if not _takes_value(before) and (near := difflib.get_close_matches(before, VALUED, n=1)):
            raise Fatal(f"`{before}` is not an option. Give `{near[0]}`.")
        raise Fatal(
            f"`{name}` is not a command. Give the command first, then its options. `openchat --help` lists both."
        )
    if name in OUTSIDE:
        return _from_outside(name, arguments[1:])
    for group in (admin, maintenance):
        if name in group.COMMANDS:
            status: int = group.main(arguments)
            return status
    is_named = arguments[:1] == [name]
    options = _parser(name if is_named else None).parse_args(arguments[1:] if is_named else arguments)
    if (folder := options.data_dir) in COMMANDS:
        raise Fatal(f"`--data-dir {folder}` names a folder. Write `--data-dir ./{folder}`, or give the folder.")
    log.configure("openchat")
    if name == "run":
        _serve(options)
    elif name == "migrate":
        with reached(config.read(data_dir=options.data_dir), may_create=not options.plan) as servers:
            asyncio.run(_migrate(servers, is_plan=options.plan))
    else:
        with reached(config.read(data_dir=options.data_dir)) as servers:
            asyncio.run(_begin_epoch(servers, is_meant=options.yes))
    return 0


def _serve(options: argparse.Namespace) -> None:
    if options.port is not None and not 0 <= options.port <= MAX_PORT:
        raise Fatal(f"--port must be a whole number from 0 to {MAX_PORT}, not {options.port}.")
    settings = config.read(host=options.host, port=options.port, workers=options.workers, data_dir=options.data_dir)
    Supervisor(settings).run()


def _ordered(arguments: list[str]) -> list[str]:
    """Return `arguments` with the command first: people give options before it, too."""
    words: list[str] = []
    options: list[str] = []
    rest = arguments
    while rest and len(words) < (2 if words[:1] and words[0] in admin.GROUPS else 1):
        if rest[0].startswith("-"):
            taken = 2 if _takes_value(rest[0]) else 1
            options += rest[:taken]
        else:
            taken = 1
            words += rest[:1]
        rest = rest[taken:]
    if "--version" in options:
        return options
    end = rest.index("--") if "--" in rest else len(rest)
    return [*words, *rest[:end], *options, *rest[end:]]


def _takes_value(option: str) -> bool:
    # argparse accepts the beginnings of an option's name.
    return len(option) > len("--") and any(one.startswith(option) for one in VALUED)


def _parser(command: str | None) -> Parser:
    """Return the parser of a command's options; without a command, of those of `run`, with help about everything."""
    variables = "every setting can also be given as an environment variable:\n\n" + _variables()
    parser = Parser(
        prog=f"openchat {command}" if command else "openchat",
        usage=None if command else "openchat [COMMAND] [OPTIONS]",
        description=OWN[command] if command else ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog={None: f"{LIST}\n{variables}", "run": variables}.get(command),
    )
    if command is None:
        parser.add_argument("--version", action="version", version=f"openchat {version('openchat')}")
    if command in {None, "run"}:
        parser.add_argument("--host", help="the address to listen on (127.0.0.1)")
        parser.add_argument("--port", type=int, help="the port to listen on (8000)")
        parser.add_argument("--workers", type=int, help="worker processes (one per core, at most 4)")
    elif command == "migrate":
        parser.add_argument("--plan", action="store_true", help="only say what would be done")
    else:
        parser.add_argument("--yes", action="store_true", help="really, in the database that it names")
    parser.add_argument("--data-dir", type=named, help="where the embedded database lives (the user's state folder)")
    return parser


def _from_outside(name: str, arguments: list[str]) -> int:
    """Run a command of `OUTSIDE`."""
    try:
        command = importlib.import_module(OUTSIDE[name])
    except ImportError as error:
        # Their libraries are an extra, which a server does without.
        complain(f"{error.name} is missing; install what a crowd needs: pip install 'openchat[load]'")
        return 1
    status: int = command.main(arguments)
    return status


def _variables() -> str:
    defaults = Settings()
    lines = []
    for field in Settings.__struct_fields__:
        default = getattr(defaults, field)
        lines.append(f"  {variable(field):<36} {default if default != '' else '-'}")
    return "\n".join([*lines, "", "docs/operations.md says what each one means."])


async def _migrate(servers: Reached, *, is_plan: bool) -> None:
    connection = await database.connect(servers.database_url)
    try:
        steps = await (migrate.plan(connection) if is_plan else migrate.migrate(servers.database_url))
    finally:
        await connection.close()
    for step in steps:
        say(f"{'would apply' if is_plan else 'applied'}  {step}")
    if not steps:
        say("The database is up to date.")


async def _begin_epoch(servers: Reached, *, is_meant: bool) -> None:
    connection = await database.connect(servers.database_url)
    try:
        await migrate.require_current(connection)
        if not is_meant:
            raise Fatal(f"every client of the database {servers.name} would start over. Give --yes if that is meant.")
        await begin_epoch(connection)
    finally:
        await connection.close()
    say(f"A new epoch has begun in {servers.name}: every client starts over. Workers that run are replaced.")


if __name__ == "__main__":
    main()
