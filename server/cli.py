"""The command line: `openchat`, and `openchat migrate`, `new-epoch`, `user`, `conversation`, `erase`, `check`, `why`,
`reindex`, `export`, `import`, `load`, `prove`.
"""

import argparse
import asyncio
import difflib
import importlib
import sys
from importlib.metadata import version

from server import administration, config, database, log, migrate, upkeep
from server.config import Settings, variable
from server.embedded.reach import Reached, reached
from server.epoch import begin_epoch
from server.errors import Fatal
from server.supervisor import Supervisor
from server.terminal import complain, say, status_of

OPTIONS = {
    "run": {"host", "port", "workers", "data_dir"},
    "migrate": {"data_dir", "plan"},
    "new-epoch": {"data_dir", "yes"},
}
"""The commands of this module, with the options of each."""
OUTSIDE = {"load": "loadtest.command", "prove": "prove.command"}
"""Commands that speak to a server as its clients do, with the module of each."""
COMMANDS = (*OPTIONS, *administration.COMMANDS, *upkeep.COMMANDS, *OUTSIDE)
VALUED = ("--host", "--port", "--workers", "--data-dir")
"""Options before a command whose next argument is their value."""
MAX_PORT = 65_535
ABOUT = "A real-time chat backend: one command starts it, and it does not lose a message."


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
    for group in (administration, upkeep):
        if name in group.COMMANDS:
            status: int = group.main(arguments)
            return status
    options = _parser().parse_args(arguments)
    _require_meant(options)
    log.configure("openchat")
    if options.port is not None and not 0 <= options.port <= MAX_PORT:
        raise Fatal(f"--port must be a whole number from 0 to {MAX_PORT}, not {options.port}.")
    settings = config.read(host=options.host, port=options.port, workers=options.workers, data_dir=options.data_dir)
    if options.command == "migrate":
        with reached(settings, may_create=not options.plan) as servers:
            asyncio.run(_migrate(servers, is_plan=options.plan))
    elif options.command == "new-epoch":
        with reached(settings) as servers:
            asyncio.run(_begin_epoch(servers, is_meant=options.yes))
    else:
        Supervisor(settings).run()
    return 0


def _ordered(arguments: list[str]) -> list[str]:
    """Return `arguments` with the command first: people give options before it, too."""
    words: list[str] = []
    options: list[str] = []
    rest = arguments
    while rest and len(words) < (2 if words[:1] and words[0] in administration.GROUPS else 1):
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


def _require_meant(options: argparse.Namespace) -> None:
    """Raise Fatal for an option of another command, and for a folder that was rather meant as a command."""
    for name, value in vars(options).items():
        if value is not None and value is not False and name not in {"command", *OPTIONS[options.command]}:
            raise Fatal(f"`openchat {options.command}` has no option --{name.replace('_', '-')}. Leave it out.")
    if (folder := options.data_dir) in COMMANDS:
        raise Fatal(f"`--data-dir {folder}` names a folder. Write `--data-dir ./{folder}`, or give the folder.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openchat",
        usage="openchat [COMMAND] [OPTIONS]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every setting can also be given as an environment variable:\n\n" + _variables(),
    )
    parser.add_argument("--version", action="version", version=f"openchat {version('openchat')}")
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=COMMANDS,
        help="run: start the server (the default). migrate: bring the database to this program's schema. "
        "new-epoch: after restoring a backup, have every client start over. "
        "user, conversation, erase: administer (`openchat user --help`). "
        "check: count everything again. why: where a message went. export, import: move everything, or come from "
        "another chat. reindex: search in another language (`openchat check --help`). "
        "load: put a crowd in front of a running server (`openchat load --help`). "
        "prove: hurt a cluster in every way while a crowd uses it, and compare what is stored with what was seen "
        "(`openchat prove --help`)",
    )
    parser.add_argument("--host", help="the address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="the port to listen on (8000)")
    parser.add_argument("--workers", type=int, help="worker processes (one per core, at most 4)")
    parser.add_argument(
        "--data-dir", type=config.folder, help="where the embedded database lives (the user's state folder)"
    )
    parser.add_argument("--plan", action="store_true", help="with migrate: only say what would be done")
    parser.add_argument("--yes", action="store_true", help="with new-epoch: really, in the database that it names")
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
