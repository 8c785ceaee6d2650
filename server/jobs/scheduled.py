"""Scheduled messages, which are sent by the same handler as all others when they are due.

A message and the record of its sending commit together, while the worker's claim is valid. So a worker that stalls or
dies sends nothing twice, and nothing that its owner has changed or cancelled since.
"""

import asyncio
import logging
from collections import deque
from datetime import timedelta
from functools import partial
from uuid import UUID

from protocol.errors import ErrorCode
from protocol.ids import SessionId, UserId
from protocol.payloads import Poll
from server.context import Context, Services
from server.core.errors import INTERNAL, log_defect, log_failure, refusal
from server.core.faults import RowHeld
from server.core.periodic import end
from server.domain.compose import is_over
from server.handlers.sending import send_noted
from server.queries import scheduled
from server.queries.scheduled import ClaimLost, DueScheduled, Waiting

log = logging.getLogger(__name__)

NO_SESSION = SessionId(UUID(int=0))
AGAIN = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.RATE_LIMITED})
"""Temporary refusals, after which a message is retried later."""


class _Round:
    """A round in which each sender with due messages has one turn. It reads all due messages, a page at a time."""

    def __init__(self) -> None:
        self.senders: deque[UserId] = deque()
        """Senders of the pages so far who have not had their turn."""
        self.is_of_use = False
        """Whether any message was claimed in this round."""
        self.last: Waiting | None = None
        self._seen: set[UserId] = set()

    def add(self, page: list[Waiting]) -> None:
        """Give a turn to each sender of a page who has had none in this round."""
        self.last = page[-1]
        for sender_id in dict.fromkeys(one.sender_id for one in page):
            if sender_id not in self._seen:
                self._seen.add(sender_id)
                self.senders.append(sender_id)


class Scheduler:
    """Sends due messages. Those of one sender are sent in order, and senders take turns concurrently. So no sender's
    messages wait for all those of another, for a lock on another sender, or for a conversation to which another one
    writes. A deferred message delays only later ones in its conversation.
    """

    def __init__(self, services: Services, *, most: int) -> None:
        """`most` is the max number of concurrent senders. Each holds one connection to the database."""
        self._services = services
        self._most = most
        self._sending: set[asyncio.Task[None]] = set()
        self._round = _Round()
        self._walks = asyncio.Lock()

    async def send_due(self) -> None:
        """Begin to send all due messages that no other worker has claimed."""
        while len(self._sending) < self._most and (due := await self._claim()) is not None:
            task = asyncio.create_task(self._send_all(due))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send_all(self, due: DueScheduled | None) -> None:
        """Send a message, and then further due ones."""
        try:
            while due is not None:
                await _send(self._services, due)
                due = await self._claim()
        except Exception as error:  # noqa: BLE001 - the next `send_due` begins again
            log_failure(log, "sending scheduled messages", error)

    async def _claim(self) -> DueScheduled | None:
        """Claim the next due message. Return None if there is none."""
        while (sender_id := await self._next_sender()) is not None:
            async with self._services.database.connection() as db:
                due = await scheduled.claim(db, sender_id)
            if due is not None:
                self._round.is_of_use = True
                return due
        return None

    async def _next_sender(self) -> UserId | None:
        """Return the next sender. Return None at the end of a round in which nothing could be claimed."""
        async with self._walks:
            while not self._round.senders:
                async with self._services.database.connection() as db:
                    page = await scheduled.walk(db, self._round.last)
                if page:
                    self._round.add(page)
                    continue
                was, self._round = self._round, _Round()
                if not was.is_of_use:
                    return None
            return self._round.senders.popleft()

    async def close(self) -> None:
        """Cancel the sends in progress. Without a commit they are rolled back, and another worker sends these
        messages.
        """
        await end(self._sending)


async def _send(services: Services, due: DueScheduled) -> None:
    """Send a message. After a lock's time-out or a lost database it stays claimed. No other message of the sender
    overtakes it until the claim expires, and then it is due again.
    """
    try:
        await _send_one(services, due)
    except (RowHeld, ClaimLost):
        return
    except Exception as error:  # noqa: BLE001 - the message is claimed again later
        log_failure(log, "sending scheduled messages", error)


async def _send_one(services: Services, due: DueScheduled) -> None:
    """Send a message, defer it, or record why it cannot be sent."""
    if due.sender is None:
        problem = "The account cannot send messages any more."
    elif due.frame is None:
        problem = "The message is stored in a form that the server cannot read. Schedule a new one."
    elif isinstance(due.frame.payload, Poll) and is_over(due.frame.payload):
        problem = "The poll closed before it could be sent. Schedule a new one."
    else:
        try:
            context = Context(services=services, user=due.sender, session_id=NO_SESSION, is_of_job=True)
            note = partial(scheduled.finish, due=due, status="sent")
            await services.database.again("a scheduled message", partial(send_noted, context, due.frame, note))
        except (RowHeld, ClaimLost):
            raise
        except Exception as error:  # noqa: BLE001 - other messages are due, too
            refused = refusal(error, "a scheduled message")
            if refused is None:
                log_defect(log, "a scheduled message", error)
                refused = INTERNAL
            if refused.code in AGAIN:
                await _put_off(services, due, refused.retry_after_ms or 0)
                return
            problem = refused.message
        else:
            services.events.notify([due.sender_id])
            return
    await _fail(services, due, problem)


async def _put_off(services: Services, due: DueScheduled, wait_ms: int) -> None:
    async with services.database.transaction() as db:
        await scheduled.put_off(db, due, timedelta(milliseconds=wait_ms))
    services.events.notify([due.sender_id])


async def _fail(services: Services, due: DueScheduled, problem: str) -> None:
    async with services.database.transaction() as db:
        await scheduled.finish(db, due, "failed", problem)
    services.events.notify([due.sender_id])
