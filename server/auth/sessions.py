"""Sessions: from a token to a user, and how long that lasts."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from protocol.codec import now
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import SessionId, UserId
from server.auth.tickets import PREFIX, TicketRefused, Tickets
from server.auth.tokens import token_hash
from server.core.errors import is_lost
from server.db.database import Database
from server.fairness.batcher import Batcher
from server.queries import sessions
from server.queries.sessions import Active

SLIDE_EVERY = timedelta(days=1)
"""A session in use is extended at most this often, or twice in its time if that is shorter than two days."""


class OpenSocket(Protocol):
    """A socket of a session: a `Connection`, which `auth` may not import."""

    session_id: SessionId
    expires_at: datetime
    """When the session expires, as far as the socket's worker knows."""

    def close(self, code: CloseCode) -> None:
        """Close it."""


class Sessions:
    """Looks tokens up, many in one query when many come at once."""

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
        """Return the session of a token. Raises Refused if there is none, or it has expired, or it is a ticket."""
        if token.startswith(PREFIX):
            raise TicketRefused("A ticket is for the socket alone. Send the token.")
        return self._required(await self._lookups.submit(token_hash(token)))

    async def admit(self, token: str, require: Callable[[UserId], None]) -> Active:
        """Return the session of a token, or of a return ticket, which is for the socket alone. Raises Refused as
        `authenticate` does: a ticket is worth what its session is worth now.

        `require` raises Refused for a user who may not connect now: their ticket stays good.
        """
        if not token.startswith(PREFIX):
            active = await self.authenticate(token)
            require(active.user.id)
            return active
        ticket = await self._tickets.look(token)
        found = None if ticket is None else await self._returns.submit(ticket.session_id)
        if found is not None:
            require(found.user.id)
        # Of two that came with the same ticket, one gets in.
        ticket = await self._tickets.redeem(token)
        if found is None or ticket is None:
            raise TicketRefused
        # What the user's other devices changed meanwhile is news to this one.
        return self._required(found._replace(user_version=ticket.user_version))

    def _required(self, active: Active | None) -> Active:
        if active is None:
            raise Refused(ErrorCode.UNAUTHENTICATED, "The session does not exist or has ended. Log in again.")
        if self.is_due(active.expires_at):
            self._spawn(self._slide([active.session_id]))
        return active

    def is_due(self, expires_at: datetime) -> bool:
        """Whether a session that is being used should be extended."""
        return expires_at - now() < self.lasts - self._slide_every

    def keep(self, sockets: Sequence[OpenSocket]) -> None:
        """Extend the sessions of open sockets that are due, soon, and close the sockets of those that have ended."""
        due = [one for one in sockets if self.is_due(one.expires_at) and one.session_id not in self._being_extended]
        if due:
            self._spawn(self._keep(due))

    def _spawn(self, work: Coroutine[None, None, object]) -> None:
        task: asyncio.Task[object] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def clear(self) -> bool:
        """Delete some of the sessions that have long expired; return whether there may be more."""
        async with self._database.connection() as db:
            return await sessions.clear_expired(db)

    async def _slide(self, session_ids: Sequence[SessionId]) -> dict[SessionId, datetime] | None:
        """Extend sessions, and return when each of those that are valid expires; None without a database."""
        try:
            async with self._database.connection() as db:
                return await sessions.slide(db, session_ids, self.lasts)
        except Exception as error:
            # The next use extends it.
            if not is_lost(error):
                raise
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
