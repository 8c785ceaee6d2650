"""The command line `openchat`, and the table of its commands. A command's module is imported when it is used."""

import difflib
import importlib
import sys
from importlib import metadata
from itertools import pairwise
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem, shell_complete

from server.cli.arguments import Group, refusal, with_server_options
from server.core import config
from server.core.errors import Fatal
from server.core.terminal import say, status_of


class Entry(NamedTuple):
    """A line of the table: the place of a command, and its description."""

    place: str
    about: str


SECTIONS = {
    "Run": {
        "run": Entry("server.cli.serve:run", "Start the server. `openchat` alone does the same."),
        "migrate": Entry("server.cli.schema:migrate", "Migrate the database to this program's schema."),
        "new-epoch": Entry("server.cli.schema:new_epoch", "Make every client start over, after a backup was restored."),
        "reindex": Entry("server.cli.maintenance:reindex", "Rebuild the search index, such as for another language."),
    },
    "Administer": {
        "user": Entry("server.cli.users:user", "List, create, change and disable accounts."),
        "conversation": Entry("server.cli.conversations:conversation", "List, show, export and delete conversations."),
        "erase": Entry("server.cli.users:erase", "Erase a user. Their messages stay, without a name."),
    },
    "Inspect": {
        "settings": Entry(
            "server.cli.settings:settings", "Print all settings with their meanings, values and sources."
        ),
        "check": Entry("server.cli.maintenance:check", "Recompute derived data and search for corruption."),
        "why": Entry("server.cli.maintenance:why", "Show who has received a message, and why others have not."),
    },
    "Move data": {
        "export": Entry("server.cli.maintenance:export", "Export the whole installation, or the data of one user."),
        "import": Entry("server.cli.maintenance:import_", "Import an export of OpenChat, Slack or Mattermost."),
    },
    "Prove": {
        "load": Entry("loadtest.command:load", "Run a load test against a server and check every delivery."),
        "prove": Entry("prove.command:prove", "Inject faults into a cluster while a crowd uses it."),
    },
    "Shell": {
        "completion": Entry("server.cli.completion:completion", "Print a script that completes commands on Tab."),
    },
}
"""The commands, as `openchat --help` shows them."""
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}
GROUPS = ("user", "conversation")
"""Commands of two words."""
VALUED = ("--host", "--port", "--workers", "--data-dir")
"""Options before a command whose next argument is their value."""
PROGRAM = "openchat"


class Root(Group):
    """`openchat` itself. It lists its commands from the table, without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].place.partition(":")
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """Write the table."""
        width = max(map(len, COMMANDS))
        for section, entries in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), entry.about) for name, entry in entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands from the table, and options."""
        found = [CompletionItem(name, help=COMMANDS[name].about) for name in COMMANDS if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - as click calls it
    if value and not ctx.resilient_parsing:
        say(f"{PROGRAM} {metadata.version(PROGRAM)}")
        ctx.exit()


@click.command(
    PROGRAM,
    cls=Root,
    invoke_without_command=True,
    options_metavar="",
    subcommand_metavar="[COMMAND] [OPTIONS]",
    examples="""
        openchat                                  # start a server on this machine
        openchat user create Ada ada@example.org --admin
        openchat user --help                      # each command has help of its own
    """,
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
@with_server_options
@click.pass_context
def openchat(ctx: click.Context, /, **options: Any) -> None:  # noqa: ANN401 - handed on
    """Run and administer a real-time chat server.

    The server starts its own PostgreSQL and Valkey, unless DATABASE_URL and REDIS_URL name others. `openchat settings`
    lists all settings. Without a command, the options are those of `openchat run`. Options may also come before their
    command.
    """
    if ctx.invoked_subcommand is None:
        command = openchat.get_command(ctx, "run")
        assert command is not None  # noqa: S101 - the table has it
        ctx.invoke(command, **options)


def main() -> None:
    """Run the command line. On failure, print one line and exit with status 1."""
    if instruction := config.completion():
        sys.exit(status_of(lambda: shell_complete(openchat, {}, PROGRAM, config.COMPLETION, instruction)))
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line. Return the exit status."""
    return status_of(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    given, arguments = arguments, _ordered(arguments)
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None and "--" in arguments:
        raise Fatal("give the command before `--`. `openchat --help` lists the commands.")
    if name is not None and name not in COMMANDS:
        raise Fatal(_unknown(name, given))
    for option, folder in pairwise(arguments):
        if option == "--data-dir" and folder in COMMANDS:
            raise Fatal(f"`--data-dir {folder}` names a folder. Write `--data-dir ./{folder}`, or name another folder.")
    try:
        with openchat.make_context(PROGRAM, arguments) as ctx:
            status = openchat.invoke(ctx)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        raise refusal(error) from None
    return status or 0


def _unknown(name: str, given: list[str]) -> str:
    before = given[given.index(name) - 1] if name in given[1:] else ""
    if not _takes_value(before) and (near := difflib.get_close_matches(before, VALUED, n=1)):
        return f"`{before}` is not an option. Use `{near[0]}`."
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    guess = f" Did you mean `{near[0]}`?" if near else ""
    return f"`{name}` is not a command.{guess} Give the command first, then its options. `openchat --help` lists both."


def _ordered(arguments: list[str]) -> list[str]:
    """Return `arguments` with the command first, because options may come before it."""
    words: list[str] = []
    options: list[str] = []
    rest = arguments
    while rest and rest[0] != "--" and len(words) < (2 if words[:1] and words[0] in GROUPS else 1):
        if rest[0].startswith("-"):
            taken = 2 if _takes_value(rest[0]) and not "".join(rest[1:2]).startswith("--") else 1
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
    # An option may be abbreviated.
    return len(option) > len("--") and any(one.startswith(option) for one in VALUED)


if __name__ == "__main__":
    main()
