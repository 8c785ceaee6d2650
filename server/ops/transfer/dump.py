"""Exports of a whole installation as lines of JSON, and their import."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from protocol.codec import now
from server.db import migrate
from server.db.database import Db
from server.ops.progress import Progress
from server.ops.transfer.lines import FORMAT, VERSION, Head, Lines, Row, RowLine, Summary, Tail
from server.ops.transfer.reading import lines, reading
from server.queries import transfers

_encode = msgspec.json.Encoder().encode
_head_decoder = msgspec.json.Decoder(Head)
_row_decoder = msgspec.json.Decoder(Row)
_tail_decoder = msgspec.json.Decoder(Tail)
_keys_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
NO_HEAD = "line 1: this is not the first line of an export of OpenChat"
_DEEP = re.compile(rb'\{"table":"(\w+)","row":(\{.*\})\}\n?\Z', re.DOTALL)


async def write(db: Db, write_piece: Callable[[bytes], object], progress: Progress) -> Summary:
    """Export all rows that are not derived, as of one moment. Return their numbers."""
    digest = hashlib.sha256()
    counts: Counter[str] = Counter()
    head = Head(
        format=FORMAT, version=VERSION, schema=len(migrate.known()), exported_at=now().isoformat(timespec="seconds")
    )
    async with db.transaction():
        await transfers.begin(db, is_snapshot=True)
        write_piece(_encode(head) + b"\n")
        for table in transfers.TABLES:
            async for row in transfers.rows(db, table):
                line = _encode(Row(table, msgspec.Raw(row.encode()))) + b"\n"
                digest.update(line)
                write_piece(line)
                counts[table] += 1
                progress.counts(table, counts[table])
    progress.done()
    write_piece(_encode(Tail(rows=dict(counts), sha256=digest.hexdigest())) + b"\n")
    return Summary(rows=dict(counts), sha256=digest.hexdigest())


def read(path: Path, columns: Mapping[str, frozenset[str]]) -> Lines:
    """Yield the rows of an exported file. `columns` are those of each table, and each row has all of them.

    Raises ValueError if the file is not an export, is incomplete, or has another version.
    """
    digest = hashlib.sha256()
    counts: Counter[str] = Counter()
    number = 0
    with path.open("rb") as file:
        for number, line in lines(file):
            if number == 1:
                _check_head(line)
            elif line.startswith(b'{"rows":'):
                with reading(f"line {number}"):
                    tail = _tail_decoder.decode(line)
                if (tail.rows, tail.sha256) != (dict(counts), digest.hexdigest()):
                    raise ValueError(f"line {number}: the counts or the hash do not match the lines before")
                return
            else:
                with reading(f"line {number}"):
                    row, is_deep = _row(line)
                    if row.table not in columns:
                        raise ValueError(f"the table {row.table!r} does not exist")
                    if not is_deep and _keys_decoder.decode(row.row).keys() != columns[row.table]:
                        raise ValueError(f"the columns are not those of the table {row.table}")
                digest.update(line)
                counts[row.table] += 1
                yield RowLine(row, f"line {number}")
    raise ValueError(f"after line {number}: the last line is missing" if counts else NO_HEAD)


def _check_head(line: bytes) -> None:
    try:
        head = _head_decoder.decode(line)
    except msgspec.MsgspecError:
        raise ValueError(NO_HEAD) from None
    if (head.format, head.version) != (FORMAT, VERSION):
        raise ValueError(
            f"line 1: the format is {head.format} {head.version}, and only {FORMAT} {VERSION} is supported"
        )
    if head.schema != len(migrate.known()):
        raise ValueError(
            f"line 1: the export has the schema of step {head.schema}, and this database that of step "
            f"{len(migrate.known())}. Bring both to the same version of OpenChat"
        )


def _row(line: bytes) -> tuple[Row, bool]:
    """Return a row, and whether it is too deep for decoders. PostgreSQL reads such a row, and refuses invalid JSON and
    unknown columns.
    """
    try:
        return _row_decoder.decode(line), False
    except RecursionError:
        if deep := _DEEP.match(line):
            return Row(deep[1].decode(), msgspec.Raw(deep[2])), True
        raise
