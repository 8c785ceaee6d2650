"""Return tickets: what a worker that drains gives its clients, so that they come back without their token.

A ticket is 256 random bits, good for one return to the socket within a minute; Redis keeps what it stands for under its
hash. A ticket names a session and says nothing about it: whoever redeems it looks whether the session is still valid.
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
from server.fairness.batcher import Batcher

LASTS_SECONDS = 60
PREFIX = "ticket."
"""No token has a full stop in it."""
KEY = "openchat:return:"
AT_ONCE = 256

log = logging.getLogger(__name__)


class TicketRefused(Refused):
    """The answer to a return ticket that is no good. It says nothing about the token of the same session."""

    def __init__(self, message: str = "This ticket is used or too old. Connect with the token.") -> None:
        super().__init__(ErrorCode.UNAUTHENTICATED, message, path="ticket")


class Ticket(NamedTuple):
    """What a ticket stands for: a session, and the user's own clock as far as the connection was told of it."""

    session_id: SessionId
    user_version: int


_decoder = msgspec.json.Decoder(Ticket)


class Tickets:
    """Gives them out and takes them back, many at once."""

    def __init__(self, redis: Redis | RedisCluster, installation: str) -> None:
        self._redis = redis
        self._prefix = f"{KEY}{installation}:"
        self._looks: Batcher[str, Ticket | None] = Batcher(self._look, most=AT_ONCE)
        self._returns: Batcher[str, Ticket | None] = Batcher(self._redeem, most=AT_ONCE)

    async def issue(self, wanted: Sequence[Ticket]) -> list[str | None]:
        """Return the words of each ticket; none while Redis is away: the token does as well."""
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

    async def look(self, ticket: str) -> Ticket | None:
        """Return what a ticket stands for, and leave it good; None as `redeem`."""
        return await self._looks.submit(ticket)

    async def redeem(self, ticket: str) -> Ticket | None:
        """Return what a ticket stands for, once; None if it is used, too old or made up, or Redis is away."""
        return await self._returns.submit(ticket)

    async def _look(self, tickets: list[str]) -> list[Ticket | None]:
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
        return [None if one is None else _decoder.decode(one) for one in found]

    def _key(self, ticket: str) -> str:
        return self._prefix + token_hash(ticket)
