"""The export format, which is lines of JSON (docs/transfer.md). The first line identifies it, and the last one has
counts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

FORMAT, VERSION = "openchat", 1


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line. `schema` is the number of the database's last migration."""

    format: str
    version: int
    schema: int
    exported_at: str


class Row(msgspec.Struct, frozen=True):
    """A line in between: a row, with the names of its columns."""

    table: str
    row: msgspec.Raw


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """The last line: the number of rows per table, and the SHA-256 of all lines in between, in hexadecimal."""

    rows: dict[str, int]
    sha256: str


class Summary(msgspec.Struct, kw_only=True):
    """The number of exported or imported rows, per table."""

    rows: dict[str, int] = {}
    sha256: str = ""

    @property
    def total(self) -> int:
        """The total number of rows."""
        return sum(self.rows.values())


class RowLine(NamedTuple):
    """A row to import. `place` tells the operator where it comes from."""

    row: Row
    place: str


Lines = Iterator[RowLine]
"""Rows to import. The rows of a table are consecutive, and follow those that they refer to."""
