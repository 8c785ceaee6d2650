"""Scheduled messages: sent, when their time has come, by the same handler as all others.

A message and the note that it was sent commit together, and only while the worker's claim holds. So a worker that
stalls or dies sends nothing twice, and nothing that its owner has changed or cancelled since.
"""

import logging
from contextlib import suppress
from datetime import timedelta
from functools import partial
from uuid import UUID

from protocol.errors import ErrorCode
from protocol.ids import SessionId
from server.context import Context, Services
from server.errors import INTERNAL, log_defect, refusal
from server.handlers.sending import send_noted
from server.queries import scheduled
from server.queries.scheduled import ClaimLost, Due

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
        if due.sender is None:
            problem = "The account cannot send messages any more."
        elif due.frame is None:
            problem = "The message is stored in a form that the server cannot read. Schedule a new one."
        else:
            try:
                context = Context(services=services, user=due.sender, session_id=NO_SESSION, is_of_job=True)
                note = partial(scheduled.finish, due=due, status="sent")
                await services.database.again("a scheduled message", partial(send_noted, context, due.frame, note))
                services.events.poke([due.sender_id])
                continue
            except ClaimLost:
                continue
            except Exception as error:  # noqa: BLE001 - the others are due, too
                refused = refusal(error)
                if refused is None:
                    log_defect(log, "send_due", error)
                    refused = INTERNAL
                if refused.code in AGAIN:
                    await _put_off(services, due, refused.retry_after_ms or 0)
                    continue
                problem = refused.message
        await _fail(services, due, problem)
    return len(claimed) == scheduled.AT_ONCE


async def _put_off(services: Services, due: Due, wait_ms: int) -> None:
    async with services.database.connection() as db:
        await scheduled.put_off(db, due, timedelta(milliseconds=wait_ms))
    services.events.poke([due.sender_id])


async def _fail(services: Services, due: Due, problem: str) -> None:
    with suppress(ClaimLost):
        async with services.database.connection() as db:
            await scheduled.finish(db, due, "failed", problem)
        services.events.poke([due.sender_id])
