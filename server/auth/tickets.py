"""Return tickets: what a worker that drains gives its clients, so that coming back asks PostgreSQL for no session.

A ticket is 256 random bits, good for one return within a minute; Redis keeps what it stands for under its hash. It says
which session it is for and the user's own clock, so one whose session was revoked meanwhile is noticed like any other.
"""

import logging
from collections.abc import Sequence

import msgspec
from redis.asyncio import Redis, RedisCluster

from server.auth.tokens import new_token, token_hash
from server.errors import REDIS_LOST
from server.gather import Gather
from server.queries.sessions import Active

LASTS_SECONDS = 60
PREFIX = "ticket."
"""No token has a full stop in it."""
KEY = "openchat:ticket:"
AT_ONCE = 256

_decoder = msgspec.json.Decoder(Active)

log = logging.getLogger(__name__)


class Tickets:
    """Gives them out and takes them back, many at once."""

    def __init__(self, redis: Redis | RedisCluster) -> None:
        self._redis = redis
        self._returns: Gather[str, Active | None] = Gather(self._redeem, most=AT_ONCE)

    async def issue(self, sessions: Sequence[Active]) -> list[str | None]:
        """Return a ticket for each session; none while Redis is away: the token does as well."""
        tickets = [PREFIX + new_token() for _ in sessions]
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for ticket, active in zip(tickets, sessions, strict=True):
                    pipe.set(_key(ticket), msgspec.json.encode(active), ex=LASTS_SECONDS)
                await pipe.execute()
        except REDIS_LOST as error:
            log.warning("no return tickets: %s", error)
            return [None] * len(sessions)
        return list(tickets)

    async def redeem(self, ticket: str) -> Active | None:
        """Return what a ticket stands for, once; None if it is used, too old or made up, or Redis is away."""
        return await self._returns.submit(ticket)

    async def _redeem(self, tickets: list[str]) -> list[Active | None]:
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for ticket in tickets:
                    pipe.getdel(_key(ticket))
                found = await pipe.execute()
        except REDIS_LOST:
            return [None] * len(tickets)
        return [None if one is None else _decoder.decode(one) for one in found]


def _key(ticket: str) -> str:
    return KEY + token_hash(ticket)
