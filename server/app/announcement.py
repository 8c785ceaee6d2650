"""News of a command of the operator for the workers of a running server: published on the bus after the commit."""

from collections.abc import Callable
from typing import NamedTuple, cast

from redis.asyncio import RedisCluster

from server.app.command_bus import CommandBus, connect
from server.auth.attempts import Attempts
from server.context import Events
from server.core.errors import REDIS_LOST, Fatal
from server.core.terminal import complain
from server.domain.presence import has_worker
from server.hub.hub import COMPARE_SECONDS, PEOPLE_PARTS, Hub, Record
from server.hub.watchers import Describe

BOUND_SECONDS = COMPARE_SECONDS * PEOPLE_PARTS
"""Max seconds after which a worker that was not told finds out, by comparing clocks."""
UNTOLD = f"Open sockets see it within {BOUND_SECONDS:.0f} seconds."
NO_SERVER = "none is at this Redis. If one runs, set REDIS_URL as it has it"


class CommandNews(NamedTuple):
    """What to tell the workers, and the address of an account whose failed logins are forgotten."""

    tell: Callable[[Events], None]
    account: str | None = None


async def announce(redis_url: str | None, installation: str, news: CommandNews) -> None:
    """Publish news to the workers of an installation. Tell the operator if none of them received it, why, and when they
    find out. `redis_url` is as in Reached.
    """
    if redis_url is None:
        return
    if not redis_url:
        complain(f"The change is stored, but no server was told: set REDIS_URL as the server has it. {UNTOLD}")
        return
    try:
        if not await _publish(redis_url, installation, news):
            complain(f"The change is stored, but no server was told: {NO_SERVER}. {UNTOLD}")
    except (Fatal, ValueError, *REDIS_LOST) as error:
        complain(f"The change is stored, but no server was told: {str(error).rstrip('.')}. {UNTOLD}")


async def _publish(redis_url: str, installation: str, news: CommandNews) -> bool:
    """Publish news. Return whether a worker of the installation is there to receive it. Those who receive a channel
    would say less: of a user without a connection, there are none.
    """
    bus = CommandBus(installation)
    # A hub without sockets asks nothing of the database.
    hub = Hub(cast("Record", None), lambda **_: bus, describe=cast("Describe", None))
    news.tell(hub)
    hub.flush()
    redis = await connect(redis_url)
    try:
        await bus.send(redis)
        if news.account is not None:
            await Attempts(redis, installation, per_account=0, per_address=0).forget(news.account)
        return await has_worker(redis, installation)
    finally:
        await redis.aclose()
        if isinstance(redis, RedisCluster):
            await redis.nodes_manager.aclose()
