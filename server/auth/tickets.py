"""Return tickets, with which the clients of a draining worker reconnect without their token.

A ticket has 256 random bits. It is valid for one connection within a minute. Redis stores its session and user version
under its hash. The worker that redeems the ticket checks whether the session is still valid.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis, RedisCluster

from protocol.errors import ErrorCode, Refused
from protocol.ids import SessionId
from server.auth.tokens import new_token, token_hash
from server.core.errors import REDIS_LOST
from server.core.faults import ONCE
from server.fairness.batcher import Batcher

LASTS_SECONDS = 60
"""Lifetime of a ticket, in seconds."""
PREFIX = "ticket."
"""A prefix that no token has, because tokens contain no full stop."""
KEY = "openchat:return:"
TICKETS_PER_BATCH = 256
"""Max tickets per exchange with Redis."""

log = logging.getLogger(__name__)


class TicketRefused(Refused):
    """The refusal for an invalid return ticket. It reveals nothing about the token of the same session."""

    def __init__(self, message: str = "This ticket is used or too old. Connect with the token.") -> None:
        super().__init__(ErrorCode.UNAUTHENTICATED, message, path="ticket")


class Ticket(NamedTuple):
    """The content of a ticket: a session, and the user version that the connection was last sent."""

    session_id: SessionId
    user_version: int


_decoder = msgspec.json.Decoder(Ticket)


class Tickets:
    """Issues and redeems tickets. Concurrent calls share an exchange with Redis."""

    def __init__(self, redis: Redis | RedisCluster, installation: str) -> None:
        self._redis = redis
        self._prefix = f"{KEY}{installation}:"
        self._lookups: Batcher[str, Ticket | None] = Batcher(self._find, most=TICKETS_PER_BATCH)
        self._returns: Batcher[str, Ticket | None] = Batcher(self._redeem, most=TICKETS_PER_BATCH)

    async def issue(self, wanted: Sequence[Ticket]) -> list[str | None]:
        """Return the ticket strings, or None for each while Redis is unavailable. Clients then use their tokens."""
        tickets = [PREFIX + new_token() for _ in wanted]
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for ticket, one in zip(tickets, wanted, strict=True):
                    pipe.set(self._key(ticket), msgspec.json.encode(one), ex=LASTS_SECONDS)
                await pipe.execute()
        except REDIS_LOST as error:
            log.warning("cannot issue return tickets: %s", error)
            return [None] * len(wanted)
        return list(tickets)

    async def find(self, ticket: str) -> Ticket | None:
        """Return the content of a ticket without redeeming it. Return None as `redeem` does."""
        return await self._lookups.submit(ticket)

    async def redeem(self, ticket: str) -> Ticket | None:
        """Redeem a ticket, and return its content. Return None if it is used, expired or invented, or if Redis is
        unavailable.
        """
        return await self._returns.submit(ticket)

    async def _find(self, tickets: list[str]) -> list[Ticket | None]:
        return await self._read(tickets, is_last=False)

    async def _redeem(self, tickets: list[str]) -> list[Ticket | None]:
        return await self._read(tickets, is_last=True)

    async def _read(self, tickets: list[str], *, is_last: bool) -> list[Ticket | None]:
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for ticket in tickets:
                    if is_last:
                        pipe.getdel(self._key(ticket))
                    else:
                        pipe.get(self._key(ticket))
                found = await pipe.execute()
        except REDIS_LOST:
            return [None] * len(tickets)
        return [None if one is None else _ticket(one) for one in found]

    def _key(self, ticket: str) -> str:
        return self._prefix + token_hash(ticket)


def _ticket(stored: bytes) -> Ticket | None:
    """Return a stored ticket. Return None for one in another form, because others are read with it."""
    try:
        return _decoder.decode(stored)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        log.warning("ignored a return ticket in another form: %s", error, extra={ONCE: "ignored return tickets"})
        return None
