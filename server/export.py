"""A person's own data, written piece by piece: however much they said, little of it is in memory at a time."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from uuid import UUID

from protocol.ids import MessageId, UserId
from server.database import Db
from server.queries import exports

Connect = Callable[[], AbstractAsyncContextManager[Db]]
"""Returns a connection for one query: none is kept while the reader takes its time."""


async def written(connect: Connect, user_id: UserId) -> AsyncIterator[bytes]:
    """Return a user's data, as protocol/export.py has it, in pieces of JSON."""
    async with connect() as db:
        head = await exports.head(db, user_id)
        reactions = await exports.reactions(db, user_id)
    yield f'{_open(head)},"reactions":[{",".join(reactions)}],"messages":['.encode()
    after: MessageId | None = MessageId(UUID(int=0))
    is_first = True
    while after is not None:
        async with connect() as db:
            page, after = await exports.messages(db, user_id, after)
        if page:
            yield (("" if is_first else ",") + ",".join(page)).encode()
            is_first = False
    yield b"]}\n"


def _open(head: str) -> str:
    """Return a JSON object without its last brace."""
    return head[: head.rindex("}")]
