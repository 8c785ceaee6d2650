"""Tables. On a terminal, rows that are too wide become blocks of lines. In a file or a pipe, each row is one line."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from server.core.terminal import plain, printing

WIDE = 100_000
"""Max characters of a line in a file or a pipe."""


def show_rows(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a line per row. Raises Fatal if the output cannot be written."""
    with drawing() as console:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in names:
            table.add_column(Text(name), no_wrap=True)
        for row in rows:
            table.add_row(*map(visible, row))
        if console.measure(table, options=console.options.update(max_width=WIDE)).maximum <= console.width:
            console.print(table)
        else:
            for row in rows:
                console.print(_fields(zip(names, row, strict=True)), "", sep="\n")


def show_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print a line per field. Raises Fatal if the output cannot be written."""
    _show(_fields(fields))


def show_paragraphs(paragraphs: Iterable[tuple[Text, list[str]]]) -> None:
    """Print lines, each with sentences below it. Raises Fatal if the output cannot be written."""
    parts: list[RenderableType] = []
    for line, sentences in paragraphs:
        parts += [line, *(Padding(visible(one), (0, 0, 0, 4)) for one in sentences), ""]
    _show(*parts)


def visible(text: str, style: str = "") -> Text:
    """Return a text without control characters and markup for a terminal."""
    return Text(plain(text), style, overflow="fold")


def _fields(fields: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in fields:
        table.add_row(Text(name), visible(value))
    return table


def _show(*things: RenderableType) -> None:
    with drawing() as console:
        console.print(*things, sep="\n")


@contextmanager
def drawing() -> Iterator[Console]:
    """Return a console that draws in memory, and print its drawing at the end. Raises Fatal if the output cannot be
    written.
    """
    with printing() as out:
        is_terminal = out.isatty()
        width = Console(file=out).width if is_terminal else WIDE
        drawn = io.StringIO()
        yield Console(file=drawn, width=width, force_terminal=is_terminal, highlight=False, emoji=False, markup=False)
        out.write("".join(f"{line.rstrip()}\n" for line in drawn.getvalue().splitlines()))
        out.flush()
