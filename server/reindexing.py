"""Making what messages are found by anew: page by page, so that nothing waits for it."""

from functools import partial
from uuid import UUID

from protocol.ids import MessageId
from server.database import Db, twice
from server.progress import Progress
from server.queries import indexing

FIRST = MessageId(UUID(int=0))


async def reindex(db: Db, progress: Progress, *, only_missing: bool = False) -> int:
    """Make the words of all messages anew, or of those that have none; return how many were made."""
    count, after = 0, FIRST
    while True:
        page = await twice(partial(indexing.page, db, after, only_missing=only_missing), lambda _: None)
        if page is None:
            progress.done()
            return count
        after = page.last
        count += page.made
        progress.counts("messages that can be found", count)
