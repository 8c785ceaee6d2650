"""A whole installation, written as lines of JSON, and read again."""

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
NO_HEAD = "line 1: its first line is not that of an export of OpenChat"
_DEEP = re.compile(rb'\{"table":"(\w+)","row":(\{.*\})\}\n?\Z', re.DOTALL)


async def write(db: Db, write_piece: Callable[[bytes], object], progress: Progress) -> Summary:
    """Write everything that is not derived, as it is at one moment; return what that was."""
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
    """Return the rows that were written to a file. `columns` are those of each table, all of which each row names.

    Raises ValueError if it is something else, of another version, or not all of it.
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
                    raise ValueError(f"line {number}: it is not what was written, by its counts or its hash")
                return
            else:
                with reading(f"line {number}"):
                    row, is_deep = _row(line)
                    if row.table not in columns:
                        raise ValueError(f"there is no table {row.table!r}")
                    if not is_deep and _keys_decoder.decode(row.row).keys() != columns[row.table]:
                        raise ValueError(f"its columns are not those of {row.table}")
                digest.update(line)
                counts[row.table] += 1
                yield RowLine(row, f"line {number}")
    raise ValueError(f"after line {number}: its end is missing" if counts else NO_HEAD)


def _check_head(line: bytes) -> None:
    try:
        head = _head_decoder.decode(line)
    except msgspec.MsgspecError:
        raise ValueError(NO_HEAD) from None
    if (head.format, head.version) != (FORMAT, VERSION):
        raise ValueError(f"line 1: it has the format {head.format} {head.version}; {FORMAT} {VERSION} is known")
    if head.schema != len(migrate.known()):
        raise ValueError(
            f"line 1: it comes from a database at step {head.schema}, and this one is at {len(migrate.known())}: "
            "bring both to the same version of OpenChat"
        )


def _row(line: bytes) -> tuple[Row, bool]:
    """Return a row, and whether it is nested deeper than decoders go: PostgreSQL reads such a row all the same, and
    refuses what is no JSON and columns that there are not.
    """
    try:
        return _row_decoder.decode(line), False
    except RecursionError:
        if deep := _DEEP.match(line):
            return Row(deep[1].decode(), msgspec.Raw(deep[2])), True
        raise
