"""Sessions: from a token to its user, and how long sessions last."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from protocol.codec import now
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import SessionId, UserId
from server.auth.tickets import PREFIX, TicketRefused, Tickets
from server.auth.tokens import token_hash
from server.core.errors import log_failure
from server.core.faults import fault_of
from server.db.database import Database
from server.fairness.batcher import Batcher
from server.queries import sessions
from server.queries.sessions import Active

SLIDE_EVERY = timedelta(days=1)
"""Min interval between two extensions of a session in use. Half of the session's lifetime, if that is shorter."""

log = logging.getLogger(__name__)


class OpenSocket(Protocol):
    """A socket of a session. `Connection` implements it, which `auth` may not import."""

    session_id: SessionId
    expires_at: datetime
    """When the session expires, as last read by the socket's worker."""

    def close(self, code: CloseCode) -> None:
        """Close the socket."""


class Sessions:
    """Looks up tokens. Concurrent look-ups share a query."""

    def __init__(self, database: Database, tickets: Tickets, *, days: int) -> None:
        self._database = database
        self._tickets = tickets
        self.lasts = timedelta(days=days)
        self._slide_every = min(SLIDE_EVERY, self.lasts / 2)
        self._lookups: Batcher[str, Active | None] = Batcher(self._find, most=256)
        self._returns: Batcher[SessionId, Active | None] = Batcher(self._find_by_id, most=256)
        self._tasks: set[asyncio.Task[object]] = set()
        self._being_extended: set[SessionId] = set()

    async def authenticate(self, token: str) -> Active:
        """Return the session of a token. Raises Refused if it does not exist or has expired, or if the token is a
        ticket.
        """
        if token.startswith(PREFIX):
            raise TicketRefused("A ticket is for the socket alone. Send the token.")
        return self._required(await self._lookups.submit(token_hash(token)))

    async def admit(self, token: str, require: Callable[[UserId], None]) -> Active:
        """Return the session of a token, or of a return ticket, which is valid for sockets only. Raises Refused as
        `authenticate` does. A ticket's session must still be valid.

        `require` raises Refused for a user who may not connect now. The ticket stays valid then.
        """
        if not token.startswith(PREFIX):
            active = await self.authenticate(token)
            require(active.user.id)
            return active
        ticket = await self._tickets.find(token)
        found = None if ticket is None else await self._returns.submit(ticket.session_id)
        if found is not None:
            require(found.user.id)
        # Of two connections with the same ticket, one is admitted.
        ticket = await self._tickets.redeem(token)
        if found is None or ticket is None:
            raise TicketRefused
        # Send this device what the user's other devices have changed meanwhile.
        return self._required(found._replace(user_version=ticket.user_version))

    def _required(self, active: Active | None) -> Active:
        if active is None:
            raise Refused(ErrorCode.UNAUTHENTICATED, "The session does not exist or has ended. Log in again.")
        if self.is_due(active.expires_at):
            self._spawn(self._slide([active.session_id]))
        return active

    def is_due(self, expires_at: datetime) -> bool:
        """Whether a session in use should be extended."""
        return expires_at - now() < self.lasts - self._slide_every

    def keep(self, sockets: Sequence[OpenSocket]) -> None:
        """Extend the sessions of open sockets that are due, in the background. Close the sockets of ended sessions."""
        due = [one for one in sockets if self.is_due(one.expires_at) and one.session_id not in self._being_extended]
        if due:
            self._spawn(self._keep(due))

    def _spawn(self, work: Coroutine[None, None, object]) -> None:
        task: asyncio.Task[object] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def clear(self) -> bool:
        """Delete some of the sessions that expired long ago. Return whether there may be more."""
        async with self._database.connection() as db:
            return await sessions.clear_expired(db)

    async def _slide(self, session_ids: Sequence[SessionId]) -> dict[SessionId, datetime] | None:
        """Extend sessions. Return when each valid one expires, or None after a fault of the database."""
        try:
            async with self._database.connection() as db:
                return await sessions.slide(db, session_ids, self.lasts)
        except Exception as error:
            # The next use of the session extends it.
            if fault_of(error) is None:
                raise
            log_failure(log, "extending sessions", error)
            return None

    async def _keep(self, sockets: Sequence[OpenSocket]) -> None:
        ids = {one.session_id for one in sockets}
        self._being_extended |= ids
        try:
            living = await self._slide(sorted(ids))
        finally:
            self._being_extended -= ids
        if living is None:
            return
        for one in sockets:
            if (expires_at := living.get(one.session_id)) is None:
                one.close(CloseCode.SESSION_ENDED)
            else:
                one.expires_at = expires_at

    async def _find(self, hashes: list[str]) -> list[Active | None]:
        async with self._database.connection() as db:
            found = await sessions.find(db, hashes)
        active = await found.decoded()
        return [active.get(one) for one in hashes]

    async def _find_by_id(self, session_ids: list[SessionId]) -> list[Active | None]:
        async with self._database.connection() as db:
            found = await sessions.find_by_id(db, session_ids)
        active = await found.decoded()
        return [active.get(one) for one in session_ids]
