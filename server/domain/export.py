"""The export of a user's own data, in pieces. Only a small part is in memory at a time."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

from protocol.ids import UserId
from server.db.database import Db
from server.queries import export
from server.queries.export import ExportRow

Connect = Callable[[], AbstractAsyncContextManager[Db]]
"""Returns a connection for one query, so that a slow reader holds none."""
Page = Callable[[Db, Any, Any], Awaitable[list[ExportRow]]]
"""Returns the rows of an owner after a sort key."""
NO_ID = UUID(int=0)
LISTS: tuple[tuple[str, Page, Any], ...] = (
    ("drafts", export.drafts, NO_ID),
    ("scheduled", export.scheduled, NO_ID),
    ("votes", export.votes, NO_ID),
    ("reactions", export.reactions, (NO_ID, "")),
    ("deeds", export.deeds, (NO_ID, 0)),
)
"""Lists of unlimited length, besides messages. Each has its field, its query, and the sort key before the first row."""


async def written(connect: Connect, user_id: UserId) -> AsyncIterator[bytes]:
    """Yield a user's data in pieces of JSON. protocol/export.py defines it."""
    async with connect() as db:
        head = await export.head(db, user_id)
    yield _open(head).encode()
    for name, page, first in LISTS:
        yield f',"{name}":['.encode()
        async for piece in _pages(connect, page, user_id, first):
            yield piece
        yield b"]"
    yield b',"messages":['
    separator = ""
    async for rows in _rows(connect, export.messages, user_id, NO_ID):
        # One piece per page, except for edits, because the caller checks the database before it sends each piece.
        texts: list[str] = []
        for row in rows:
            texts.append(f'{separator}{_open(row.text)},"edits":[')
            separator = ","
            if row.is_edited:
                yield "".join(texts).encode()
                texts.clear()
                async for piece in _pages(connect, export.edits, user_id, (row.place, 0)):
                    yield piece
            texts.append("]}")
        yield "".join(texts).encode()
    yield b"]}\n"


async def _rows(connect: Connect, page: Page, owner: UserId, after: Any) -> AsyncIterator[list[ExportRow]]:  # noqa: ANN401 - as `ExportRow.place`
    """Yield the rows of an owner after a sort key, page by page."""
    while True:
        async with connect() as db:
            rows = await page(db, owner, after)
        if not rows:
            return
        yield rows
        after = rows[-1].place


async def _pages(connect: Connect, page: Page, owner: UserId, after: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - as above
    """Yield the same as pieces of a JSON array, without its brackets."""
    separator = ""
    async for rows in _rows(connect, page, owner, after):
        yield (separator + ",".join(row.text for row in rows)).encode()
        separator = ","


def _open(head: str) -> str:
    """Return a JSON object without its closing brace."""
    return head[: head.rindex("}")]
