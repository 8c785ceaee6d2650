"""Scheduled messages: sent, when their time has come, by the same handler as all others.

A message and the note that it was sent commit together, and only while the worker's claim holds. So a worker that
stalls or dies sends nothing twice, and nothing that its owner has changed or cancelled since.
"""

import asyncio
import logging
from datetime import timedelta
from functools import partial
from uuid import UUID

from asyncpg import LockNotAvailableError

from protocol.errors import ErrorCode
from protocol.ids import SessionId, UserId
from server.context import Context, Services
from server.errors import INTERNAL, log_defect, log_failure, refusal
from server.handlers.sending import send_noted
from server.periodic import end
from server.queries import scheduled
from server.queries.scheduled import ClaimLost, Due

log = logging.getLogger(__name__)

NO_SESSION = SessionId(UUID(int=0))
AGAIN = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED})
"""Refusals that say to come back: the message is taken up again after a while."""


class Scheduling:
    """Sends what is due: the messages of one sender in order, those of different senders concurrently, one of each
    sender in turn. So nobody's messages wait for all those of another sender, for a lock on that sender's row, or for a
    conversation that another one writes to. A message that was put off holds up those behind it in its conversation
    alone.
    """

    def __init__(self, services: Services, *, most: int) -> None:
        """`most` is the max number of senders at a time. Each of them holds one connection to the database."""
        self._services = services
        self._most = most
        self._sending: set[asyncio.Task[None]] = set()
        self._had_turn: set[UserId] = set()
        """Senders whose next message is taken up after one of each other sender's."""

    async def send_due(self) -> None:
        """Begin to send all messages whose time has come and that no other worker has taken up."""
        while len(self._sending) < self._most and (due := await self._claim()) is not None:
            task = asyncio.create_task(self._send_all(due))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send_all(self, due: Due | None) -> None:
        """Send a message, and what is due after it."""
        try:
            while due is not None:
                await _send(self._services, due)
                due = await self._claim()
        except Exception as error:  # noqa: BLE001 - `send_due` begins again
            log_failure(log, "sending scheduled messages", error)

    async def _claim(self) -> Due | None:
        """Take up the next message; None if there is none."""
        while True:
            async with self._services.database.connection() as db:
                claim = await scheduled.claim(db, self._had_turn)
            if claim is not None:
                self._had_turn.add(claim.sender_id)
                if claim.due is not None:
                    return claim.due
            elif self._had_turn:
                self._had_turn.clear()
            else:
                return None

    async def close(self) -> None:
        """Give up what was begun. What is not committed is rolled back, and sent by another worker."""
        await end(self._sending)


async def _send(services: Services, due: Due) -> None:
    """Send a message. One that met a lock that somebody else holds, or no database, stays claimed: nothing of the same
    sender overtakes it until the claim ends, and then it is due again.
    """
    try:
        await _send_one(services, due)
    except (LockNotAvailableError, ClaimLost):
        return
    except Exception as error:  # noqa: BLE001 - it is taken up again
        log_failure(log, "sending scheduled messages", error)


async def _send_one(services: Services, due: Due) -> None:
    """Send a message, put it off, or note why it cannot be sent."""
    if due.sender is None:
        problem = "The account cannot send messages any more."
    elif due.frame is None:
        problem = "The message is stored in a form that the server cannot read. Schedule a new one."
    else:
        try:
            context = Context(services=services, user=due.sender, session_id=NO_SESSION, is_of_job=True)
            note = partial(scheduled.finish, due=due, status="sent")
            await services.database.again("a scheduled message", partial(send_noted, context, due.frame, note))
        except (LockNotAvailableError, ClaimLost):
            raise
        except Exception as error:  # noqa: BLE001 - the others are due, too
            refused = refusal(error)
            if refused is None:
                log_defect(log, "send_due", error)
                refused = INTERNAL
            if refused.code in AGAIN:
                await _put_off(services, due, refused.retry_after_ms or 0)
                return
            problem = refused.message
        else:
            services.events.poke([due.sender_id])
            return
    await _fail(services, due, problem)


async def _put_off(services: Services, due: Due, wait_ms: int) -> None:
    async with services.database.of_jobs().transaction() as db:
        await scheduled.put_off(db, due, timedelta(milliseconds=wait_ms))
    services.events.poke([due.sender_id])


async def _fail(services: Services, due: Due, problem: str) -> None:
    async with services.database.of_jobs().transaction() as db:
        await scheduled.finish(db, due, "failed", problem)
    services.events.poke([due.sender_id])
