"""Notifies the workers of a running server of an operator's command, by the bus, after the commit."""

from collections.abc import Callable
from typing import NamedTuple, cast

from redis.asyncio import RedisCluster

from server.app.command_bus import CommandBus, connect
from server.auth.attempts import Attempts
from server.context import Events
from server.core.errors import REDIS_LOST, Fatal
from server.core.terminal import complain
from server.domain.presence_entries import has_worker
from server.hub.comparisons import COMPARE_SECONDS, COMPARE_USERS_SECONDS
from server.hub.hub import Hub, HubStore
from server.hub.watchers import Describe

BOUND_SECONDS = max(COMPARE_SECONDS, COMPARE_USERS_SECONDS)
"""Max time until a worker without a notification finds the change, by comparing versions, in seconds."""
UNTOLD = f"Open sockets see it within {BOUND_SECONDS:.0f} seconds."
NO_SERVER = "no server uses this Redis. If one runs, set REDIS_URL as it does"


class CommandNews(NamedTuple):
    """The events of a command, and the address of an account whose failed logins are cleared."""

    tell: Callable[[Events], None]
    account: str | None = None


async def notify_workers(redis_url: str | None, installation: str, news: CommandNews) -> None:
    """Publish news to the workers of an installation. If no worker received it, print the reason, and when they find
    the change. `redis_url` is as in `Reached`.
    """
    if redis_url is None:
        return
    if not redis_url:
        complain(f"The change is stored, but no server was notified. Next time, set REDIS_URL as it does. {UNTOLD}")
        return
    try:
        if not await _publish(redis_url, installation, news):
            complain(f"The change is stored, but no server was notified: {NO_SERVER}. {UNTOLD}")
    except (Fatal, ValueError, *REDIS_LOST) as error:
        complain(f"The change is stored, but no server was notified: {str(error).rstrip('.')}. {UNTOLD}")


async def _publish(redis_url: str, installation: str, news: CommandNews) -> bool:
    """Publish news. Return whether a worker of the installation is running. The number of subscribers would not tell
    that, because a user without connections has no channel.
    """
    bus = CommandBus(installation)
    # A hub without sockets sends no queries.
    hub = Hub(cast("HubStore", None), lambda **_: bus, describe=cast("Describe", None))
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
