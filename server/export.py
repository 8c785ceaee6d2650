"""A person's own data, written piece by piece: however much they said, little of it is in memory at a time."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from uuid import UUID

from protocol.ids import UserId
from server.database import Db
from server.queries import exports
from server.queries.exports import Row

Connect = Callable[[], AbstractAsyncContextManager[Db]]
"""Returns a connection for one query: none is kept while the reader takes its time."""
Page = Callable[[Db, UserId, UUID], Awaitable[list[Row]]]
"""Returns the rows after one."""


async def written(connect: Connect, user_id: UserId) -> AsyncIterator[bytes]:
    """Return a user's data, as protocol/export.py has it, in pieces of JSON."""
    async with connect() as db:
        head = await exports.head(db, user_id)
        reactions = await exports.reactions(db, user_id)
    yield f'{_open(head)},"reactions":[{",".join(reactions)}]'.encode()
    for name, page in (("drafts", exports.drafts), ("scheduled", exports.scheduled)):
        before = f',"{name}":['
        async for rows in _pages(connect, page, user_id):
            yield (before + ",".join(row.text for row in rows)).encode()
            before = ","
        yield b"]" if before == "," else f"{before}]".encode()
    before = ',"messages":['
    async for rows in _pages(connect, exports.messages, user_id):
        async with connect() as db:
            edited = await exports.edited(db, [row.id for row in rows])
        for row in rows:
            yield f'{before}{_open(row.text)},"edits":['.encode()
            before = ","
            if row.id in edited:
                async for piece in _edits(connect, row.id):
                    yield piece
            yield b"]}"
    yield b"]}\n" if before == "," else f"{before}]}}\n".encode()


async def _pages(connect: Connect, page: Page, user_id: UserId) -> AsyncIterator[list[Row]]:
    after = exports.NOTHING
    while True:
        async with connect() as db:
            rows = await page(db, user_id, after)
        if not rows:
            return
        yield rows
        after = rows[-1].id


async def _edits(connect: Connect, message_id: UUID) -> AsyncIterator[bytes]:
    before, after = "", 0
    while True:
        async with connect() as db:
            found = await exports.edits(db, message_id, after)
        if not found:
            return
        yield (before + ",".join(text for _, text in found)).encode()
        before, after = ",", found[-1][0]


def _open(head: str) -> str:
    """Return a JSON object without its last brace."""
    return head[: head.rindex("}")]
