"""The common parts of all commands: help with examples, types of arguments, and errors in one line."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
from click.shell_completion import CompletionItem

from server.core.errors import Fatal
from server.core.terminal import say

F = TypeVar("F", bound=Callable[..., Any])
EXTRA = re.compile(r"Got unexpected extra arguments? \((.*)\)\Z", re.DOTALL)
"""click's error about superfluous arguments."""
SOME_ID = "01a20000-0000-7000-8000-000000000001"
"""An id for examples."""


class Documented(click.Command):
    """A command whose help ends with examples, and whose options may be abbreviated."""

    def __init__(self, *arguments: Any, examples: str = "", **options: Any) -> None:  # noqa: ANN401 - those of click
        options.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*arguments, **options)
        self.examples = examples.strip().splitlines()

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return `--help`, which fails if its output cannot be written."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Expand abbreviated options."""
        return super().parse_args(ctx, list(self._spelled_out(ctx, args)))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")

    def _spelled_out(self, ctx: click.Context, args: Sequence[str]) -> Iterator[str]:
        """Yield the arguments with complete names of options. Raises UsageError if an option stands in place of a
        value.
        """
        options = {name: one for one in self.get_params(ctx) if isinstance(one, click.Option) for name in one.opts}
        rest = iter(args)
        for argument in rest:
            name, has_value, value = argument.partition("=")
            if argument == "--" or not name.startswith("--"):
                yield argument
                if argument == "--":
                    yield from rest
                continue
            near = [one for one in options if one.startswith(name)]
            name = near[0] if name not in options and len(near) == 1 else name
            yield f"{name}{has_value}{value}"
            if name in options and not has_value and not (options[name].is_flag or options[name].count):
                following = next(rest, None)
                if following is not None and (ctx.resilient_parsing or not following.startswith("--")):
                    yield following
                elif not ctx.resilient_parsing:
                    raise click.UsageError(f"{name} needs a value", ctx)


class Command(Documented):
    """A command that runs something."""


class Group(Documented, click.Group):
    """Commands with a common first word."""

    command_class = Command

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - those of click
        options.setdefault("no_args_is_help", False)
        options.setdefault("subcommand_metavar", "COMMAND [OPTIONS]")
        options.setdefault("options_metavar", "")
        super().__init__(*arguments, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Return the names in the order of the code."""
        return list(self.commands)


def _show_help(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - as click calls it
    if value and not ctx.resilient_parsing:
        for line in ctx.get_help().splitlines():
            say(line)
        ctx.exit()


# -------------------------------------------------------------------------------------------------- refusals


def refusal(error: click.UsageError) -> Fatal:
    """Return the error about invalid arguments, in one line."""
    path = " ".join((error.ctx.command_path if error.ctx else "openchat").split())
    if isinstance(error, click.NoSuchOption):
        what = f"`{path}` has no option {error.option_name}"
    elif isinstance(error, click.exceptions.NoSuchCommand):
        what = f"`{path}` has no command `{error.command_name}`"
        if error.possibilities:
            what += f"; it has {', '.join(error.possibilities)}"
    elif isinstance(error, click.MissingParameter) and error.param is not None:
        what = f"`{path}` needs {shown(error.param)}"
    elif isinstance(error, click.BadParameter) and error.param is not None:
        what = f"{shown(error.param)} {error.message}"
    elif error.message == "Missing command." and error.ctx is not None and isinstance(error.ctx.command, click.Group):
        what = f"`{path}` needs one of its commands: {', '.join(error.ctx.command.list_commands(error.ctx))}"
    elif extra := EXTRA.match(error.message):
        what = f"`{path}` takes no further `{extra[1]}`"
    else:
        what = error.format_message()
    return Fatal(f"{what.rstrip('.')}. `{path} --help` tells more.")


def shown(parameter: click.Parameter) -> str:
    """Return the name of an option or an argument, as typed or as shown in the help."""
    name = parameter.human_readable_name.strip("[].")
    return max(parameter.opts, key=len) if isinstance(parameter, click.Option) else name


# ------------------------------------------------------------------------------------------ kinds of arguments


class Name(click.ParamType[str]):
    """The name of a file or a folder. Empty names are refused, because they often come from unset variables. Names that
    begin with `-` are refused, because these are options, or stand for standard input or output.
    """

    name = "path"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        if not value or value.startswith("-"):
            self.fail(f"must be the name of a file or a folder, not '{value}'. Write `./-` for `-`", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Let the shell complete file names."""
        return [CompletionItem(incomplete, type="file")]


class File(click.ParamType[Path]):
    """A file or a folder, as `Name`. With `has_output`, `-` stands for standard output."""

    name = "path"

    def __init__(self, *, has_output: bool = False) -> None:
        self._has_output = has_output

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ANN401
        """Return the path."""
        if isinstance(value, Path) or (self._has_output and value == "-"):
            return Path(value)
        return Path(NAME.convert(value, param, ctx))

    shell_complete = Name.shell_complete


class Number(click.ParamType[float]):
    """A number within a range."""

    def __init__(self, kind: type[int] | type[float], least: float, most: float) -> None:
        self.name = "number"
        self._kind = kind
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return the number."""
        try:
            number = value if isinstance(value, (int, float)) else self._kind(value)
        except ValueError:
            number = math.nan
        if not self._least <= number <= self._most or "_" in str(value):
            kind = "a whole number" if self._kind is int else "a number"
            self.fail(f"must be {kind} from {self._least} to {self._most}, not '{value}'", param, ctx)
        return number


class Id(click.ParamType[UUID]):
    """The id of a conversation or a message."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UUID:  # noqa: ANN401
        """Return the id."""
        try:
            return value if isinstance(value, UUID) else UUID(value)
        except ValueError:
            self.fail(f"must be an id such as {SOME_ID}, not '{value}'", param, ctx)


class OneOf(click.Choice[str]):
    """One of a few words."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ANN401, ARG002
        """Return the error with the allowed words."""
        words = [f"`{one}`" for one in self.choices]
        return f"must be {', '.join(words[:-1])} or {words[-1]}, not '{value}'"


NAME = Name()


# ------------------------------------------------------------------------------------------- options in common

with_data_dir = click.option("--data-dir", metavar="FOLDER", type=NAME, help="The folder of the embedded database.")
with_json = click.option("--json", "is_json", is_flag=True, help="Print JSON, for programs.")


def with_server_options(function: F) -> F:
    """Add the options of the server. `core.config` reads them in the same way as variables."""
    for add in (
        click.option("--data-dir", metavar="FOLDER", type=NAME, help="Folder of the embedded PostgreSQL and Valkey."),
        click.option("--workers", metavar="COUNT", help="Number of worker processes. 0 means one per core, at most 4."),
        click.option("--port", help="TCP port to listen on. 0 selects a free one. [8000]", metavar="PORT"),
        click.option("--host", help="Address to listen on. [127.0.0.1]", metavar="ADDRESS"),
    ):
        function = add(function)
    return function
