"""Rebuilds the search index page by page. It skips messages that others are changing, so nothing waits for it."""

import asyncio
from uuid import UUID

from protocol.ids import MessageId
from server.db.database import Db
from server.ops.progress import Progress
from server.queries import search_index

FIRST = MessageId(UUID(int=0))
PAUSE_SECONDS = 0.1
"""Pause before another attempt at messages that others are changing, in seconds."""


async def rebuild_search_index(db: Db, progress: Progress, *, only_missing: bool = False) -> int:
    """Rebuild the index entries of all messages, or with `only_missing` of those without one. Return their number.
    Messages that others have locked come last.
    """
    count, after = 0, FIRST
    held: list[MessageId] = []
    while message_ids := await search_index.following(db, after):
        page = await search_index.page(db, message_ids, only_missing=only_missing)
        after = message_ids[-1]
        held += page.left
        count += page.made
        progress.counts("messages that can be found", count)
    while held:
        progress.counts("messages that others are changing", len(held))
        await asyncio.sleep(PAUSE_SECONDS)
        page = await search_index.page(db, held[: search_index.MAX_MESSAGES], only_missing=only_missing)
        held = held[search_index.MAX_MESSAGES :] + page.left
        count += page.made
    progress.done()
    return count
