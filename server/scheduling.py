"""Scheduled messages: sent, when their time has come, by the same handler as all others.

The message's id was made when it was scheduled, so a worker that dies after sending, and before it has noted that,
leaves nothing behind that the next one could send twice.
"""

import logging
from datetime import timedelta
from functools import partial
from uuid import UUID

from protocol.errors import ErrorCode
from protocol.ids import SessionId
from server.context import Context, Services
from server.errors import INTERNAL, log_defect, refusal
from server.handlers.sending import send
from server.queries import scheduled
from server.queries.scheduled import Due

log = logging.getLogger(__name__)

NO_SESSION = SessionId(UUID(int=0))
AGAIN = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED})
"""Refusals that say to come back: the message is taken up again after a while."""


async def send_due(services: Services) -> bool:
    """Send messages whose time has come and that no other worker has taken up, as many as one claim takes; return
    whether there may be more.
    """
    async with services.database.connection() as db:
        claimed = await scheduled.claim(db)
    for due in claimed:
        problem: str | None = None
        if due.sender is None:
            problem = "The account cannot send messages any more."
        elif due.frame is None:
            problem = "The message is stored in a form that the server cannot read. Schedule a new one."
        else:
            try:
                context = Context(services=services, user=due.sender, session_id=NO_SESSION)
                await services.database.again("a scheduled message", partial(send, context, due.frame))
            except Exception as error:  # noqa: BLE001 - the others are due, too
                refused = refusal(error)
                if refused is None:
                    log_defect(log, "send_due", error)
                    refused = INTERNAL
                if refused.code in AGAIN:
                    await _put_off(services, due, refused.retry_after_ms or 0)
                    continue
                problem = refused.message
        await _finish(services, due, problem)
    return len(claimed) == scheduled.AT_ONCE


async def _put_off(services: Services, due: Due, wait_ms: int) -> None:
    async with services.database.connection() as db:
        await scheduled.put_off(db, due, timedelta(milliseconds=wait_ms))
    services.events.poke([due.sender_id])


async def _finish(services: Services, due: Due, problem: str | None) -> None:
    async with services.database.connection() as db:
        await scheduled.finish(db, due, "sent" if problem is None else "failed", problem)
    services.events.poke([due.sender_id])
