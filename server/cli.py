"""The command line: `openchat`, and `openchat migrate`, `new-epoch`, `user`, `conversation`, `erase`, `check`, `why`,
`reindex`, `export`, `import`, `load`, `prove`.
"""

import argparse
import asyncio
import importlib
import sys
from importlib.metadata import version

from server import administration, config, database, log, migrate, upkeep
from server.config import Settings, variable
from server.embedded.reach import reached
from server.supervisor import Supervisor
from server.terminal import complain, say, status_of

ABOUT = "A real-time chat backend: one command starts it, and it does not lose a message."


def main() -> None:
    """Do what the command line says; end with status 1 and one line if it cannot be done."""
    sys.exit(status_of(lambda: _run(sys.argv[1:])))


def _run(arguments: list[str]) -> int:
    if arguments[:1] in (["load"], ["prove"]):
        return _from_outside(arguments[0], arguments[1:])
    for group in (administration, upkeep):
        if arguments[:1] and arguments[0] in group.COMMANDS:
            status: int = group.main(arguments)
            return status
    options = _parser().parse_args(arguments)
    log.configure("openchat")
    settings = config.read(host=options.host, port=options.port, workers=options.workers, data_dir=options.data_dir)
    if options.command == "migrate":
        _with_database(settings, is_plan=options.plan)
    elif options.command == "new-epoch":
        _with_database(settings, is_new_epoch=True)
    else:
        Supervisor(settings).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openchat",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every setting can also be given as an environment variable:\n\n" + _variables(),
    )
    parser.add_argument("--version", action="version", version=f"openchat {version('openchat')}")
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=["run", "migrate", "new-epoch", *administration.COMMANDS, *upkeep.COMMANDS, "load", "prove"],
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
    parser.add_argument("--data-dir", help="where the embedded database lives (the user's state folder)")
    parser.add_argument("--plan", action="store_true", help="with migrate: only say what would be done")
    return parser


def _from_outside(name: str, arguments: list[str]) -> int:
    """Run what speaks to a server as its clients do."""
    try:
        command = importlib.import_module({"load": "loadtest.command", "prove": "prove.command"}[name])
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


def _with_database(settings: Settings, *, is_plan: bool = False, is_new_epoch: bool = False) -> None:
    may_create = not (is_plan or is_new_epoch)
    with reached(settings, may_create=may_create) as (url, _):
        asyncio.run(_administer(url, is_plan=is_plan, is_new_epoch=is_new_epoch))


async def _administer(url: str, *, is_plan: bool, is_new_epoch: bool) -> None:
    connection = await database.connect(url)
    try:
        if is_new_epoch:
            await migrate.new_epoch(connection)
            say("A new epoch has begun: every client starts over.")
            return
        steps = await (migrate.plan(connection) if is_plan else migrate.migrate(url))
        for step in steps:
            say(f"{'would apply' if is_plan else 'applied'}  {step}")
        if not steps:
            say("The database is up to date.")
    finally:
        await connection.close()


if __name__ == "__main__":
    main()
