"""`openchat settings`: all settings with their meanings and current values."""

from typing import NamedTuple

import click
import msgspec
from rich.text import Text

from server.cli.arguments import Command, with_data_dir, with_json
from server.cli.tables import show_paragraphs, show_rows, visible
from server.core import config
from server.core.config import FIELDS, SECRET, Settings
from server.core.errors import Fatal
from server.core.terminal import printing, say_json


class Line(NamedTuple):
    """A line about a setting."""

    name: str
    value: str
    source: str
    default: str
    allowed: str
    meaning: str


@click.command(
    "settings",
    cls=Command,
    examples="""
        openchat settings
        openchat settings rate             # those with `rate` in their names
        openchat settings | grep environment
        openchat settings --json
    """,
)
@click.argument("text", default="", help="A part of a name.")
@with_json
@with_data_dir
def settings(text: str, data_dir: str | None, *, is_json: bool) -> None:
    """Print all settings with their meanings, values and sources.

    Settings are environment variables, which the server reads once when it starts. This command shows the variables of
    this shell, which may differ from those of a running server. Passwords are not shown.
    """
    lines = [one for one in _lines(data_dir) if text.lower() in one.name.lower()]
    if not lines:
        raise Fatal(f"no setting has `{text}` in its name. `openchat settings` lists all of them.")
    with printing() as out:
        is_terminal = out.isatty()
    if is_json:
        say_json(msgspec.json.encode([one._asdict() for one in lines]).decode() + "\n")
    elif is_terminal:
        show_paragraphs((_head(one), [one.meaning, f"Allowed: {one.allowed}."]) for one in lines)
    else:
        show_rows(Line._fields, [[word or "-" for word in one] for one in lines])


def _head(line: Line) -> Text:
    by = line.source if line.source == "default" else f"{line.source}; the default is {line.default or 'empty'}"
    return visible(line.name, "bold").append_text(visible(f" = {line.value or 'empty'} ({by})", "not bold"))


def _lines(data_dir: str | None) -> list[Line]:
    now, defaults = config.read(data_dir=data_dir), Settings()
    found = []
    for field in FIELDS:
        is_argument = field == "data_dir" and data_dir is not None
        value = _word(getattr(now, field))
        found.append(
            Line(
                name=config.variable(field),
                value=config.masked(value) if field in SECRET and value else value,
                source="argument" if is_argument else config.source(field),
                default=_word(getattr(defaults, field)),
                allowed=config.allowed(field),
                meaning=config.meaning(field),
            )
        )
    return found


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
