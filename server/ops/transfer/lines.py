"""The format: lines of JSON, the first of which says what it is, and the last what there was (docs/transfer.md)."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

FORMAT, VERSION = "openchat", 1


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line. `schema` is the number of the last migration of the database that it was read from."""

    format: str
    version: int
    schema: int
    exported_at: str


class Row(msgspec.Struct, frozen=True):
    """Each line between: a row, with the names of its columns."""

    table: str
    row: msgspec.Raw


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """The last line: how many rows of each table there were, and the SHA-256 of all lines between, in hex."""

    rows: dict[str, int]
    sha256: str


class Summary(msgspec.Struct, kw_only=True):
    """What was written, or brought in: rows of each table."""

    rows: dict[str, int] = {}
    sha256: str = ""

    @property
    def total(self) -> int:
        """How many rows in all."""
        return sum(self.rows.values())


class RowLine(NamedTuple):
    """A row to be brought in. `place` is where an operator finds what it was made of."""

    row: Row
    place: str


Lines = Iterator[RowLine]
"""Rows to be brought in, those of a table one after the other, each after those that it refers to."""
