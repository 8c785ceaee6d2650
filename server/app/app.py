"""The server of one worker, built from top to bottom."""

import asyncio
from collections import Counter
from functools import partial
from pathlib import Path

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, WebSocketRoute

from protocol.errors import CloseCode
from protocol.ids import ConversationId, UserId
from server.app.background import Background
from server.app.hub_store import PostgresHubStore
from server.auth.attempts import Attempts
from server.auth.sessions import Sessions
from server.auth.tickets import Ticket, Tickets
from server.context import Services
from server.core.config import Settings
from server.core.metrics import Metrics
from server.core.periodic import end, every
from server.core.throttle import Throttle
from server.core.unconfirmed import Unconfirmed
from server.db.database import SENDING_CONNECTIONS, Database
from server.db.migrate import require_steps
from server.domain import sync
from server.domain.presence import Presence
from server.fairness.lanes import Held, Lanes
from server.gateway.connection import Connection, ConnectionDeps, Hooks
from server.gateway.connections import Connections
from server.gateway.dispatch import Dispatch, Rate
from server.gateway.sockets import Sockets, most_sockets
from server.http.accounts import Accounts
from server.http.endpoints import CONNECTS_PER_SECOND, Endpoints, HttpDeps
from server.http.forwarded import Forwarded
from server.http.middleware import Counted, CountedPreflights, Tallied
from server.http.routing import no_path, no_route
from server.hub.bus import Connect
from server.hub.cluster_bus import ClusterBus, is_cluster
from server.hub.hub import Hub
from server.hub.redis_bus import Alone, RedisBus
from server.jobs.previews import Previews
from server.jobs.push import WebPush, new_key
from server.jobs.safe_http import SafeHttp
from server.jobs.scheduled import Scheduler
from server.limits.admission import Admission
from server.limits.advertised import advertised
from server.limits.load_shedding import LoadShedding
from server.limits.per_address import Addresses
from server.limits.shared_rate_limit import SharedRateLimit
from server.limits.token_bucket import Pace, TokenBuckets
from server.queries import push, sending
from server.queries.sending import Outgoing, Stored
from server.routes import ROUTES

SENDS_AT_ONCE = 64
"""How many messages one statement stores at most."""
SENT_AT_ONCE = 32_000
"""Max characters, with those of payloads, in one statement that stores messages; one alone may have more. The
statement holds the locks of all their conversations: 64 messages at their bounds would hold them for a second. Messages
of more than 2,000 are stored apart: the words of one of 10,000 take ten times as long as the rest of it
(docs/performance.md).
"""
REDIS_SECONDS = 1.0
METRICS_SECONDS = 1.0
LANES_SHARE = 4
"""Messages to conversations that somebody holds wait on at most one in `LANES_SHARE` of a worker's connections, and at
least one.
"""
SENDERS_SHARE = 4
"""Scheduled messages hold at most one in `SENDERS_SHARE` of a worker's connections, and at least one."""
ENDPOINT_RATE, ENDPOINT_BURST = 1 / 30, 40.0
"""New push endpoints of one user at a worker, per second, and at once. A browser keeps its own for months."""
FINISH_SECONDS = 5.0
"""How long what connections have begun may take when the worker ends."""


class App:
    """Everything a worker has, wired together."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        metrics: Metrics,
        redis: Redis | RedisCluster,
        connect: Connect,
        *,
        push_key: str,
    ) -> None:
        """`connect` returns the bus."""
        self._database = database
        self._redis = redis
        self.epoch = database.epoch
        installation = self.epoch.id
        self.metrics = metrics
        self._draining = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

        record = PostgresHubStore(database)
        self.hub = Hub(
            record,
            connect,
            describe=lambda found: self.presence.describe(found),  # noqa: PLW0108 - it is made below
        )
        self.presence = Presence(self._redis, installation, database, self.hub.announce)
        self._tickets = Tickets(self._redis, installation)
        self.sessions = Sessions(database, self._tickets, days=settings.session_days)
        self.connections = Connections(
            self.hub,
            heartbeat_seconds=settings.heartbeat_seconds,
            alive=self.sessions.keep,
            tickets=self._issue_tickets,
        )
        self.sockets = Sockets(
            most=most_sockets(settings.database_connections + SENDING_CONNECTIONS),
            per_address=settings.connections_per_address,
            proxies=settings.proxies,
            frames=Pace.of(settings.frame_rate),
            outbox_bytes=settings.outbox_bytes,
        )
        self.pressure = LoadShedding()
        self.admission = Admission()
        self._sends: Lanes[ConversationId, Outgoing, Stored | None] = Lanes(
            key=lambda out: out.frame.conversation_id,
            owner=lambda out: out.sender_id,
            run=self._send_free,
            wait=self._send,
            most=SENDS_AT_ONCE,
            weigh=sending.weight,
            most_weight=SENT_AT_ONCE,
            lanes=max(1, settings.database_connections // LANES_SHARE),
        )

        self._outbound = SafeHttp(to_private=settings.private_addresses)
        self.web_push = WebPush(
            database,
            self._outbound,
            key=push_key,
            contact=settings.push_contact,
            after_seconds=settings.push_after_seconds,
        )
        self.previews = Previews(database, self.hub, self._outbound, are_on=settings.link_previews)

        rates = {
            Rate.WRITE: settings.write_rate,
            Rate.READ: settings.read_rate,
            Rate.EPHEMERAL: settings.ephemeral_rate,
            Rate.SEARCH: settings.search_rate,
        }
        others = None if isinstance(self.hub.bus, Alone) else self._redis
        self._allowances = {
            one: SharedRateLimit(one.value, rate, others, installation=installation) for one, rate in rates.items()
        }
        services = Services(
            database=database,
            events=self.hub,
            presence=self.presence,
            sends=self._sends,
            memberships=record.memberships,
            unconfirmed=Unconfirmed(),
            web_push=self.web_push,
            previews=self.previews,
            writes=self._allowances[Rate.WRITE],
            new_endpoints=TokenBuckets("new push endpoints", ENDPOINT_RATE, burst=ENDPOINT_BURST),
            push_key=self.web_push.public_key,
            anyone_adds=settings.add_people == "anyone",
        )
        self._services = services
        self.scheduling = Scheduler(services, most=max(1, settings.database_connections // SENDERS_SHARE))
        self.background = Background(
            settings,
            database,
            self.hub,
            sessions=self.sessions,
            presence=self.presence,
            scheduling=self.scheduling,
            web_push=self.web_push,
            metrics=metrics,
        )
        dispatch = Dispatch(ROUTES, self._allowances, metrics=metrics, pressure=self.pressure)
        self.searching = dispatch.searching
        shared = ConnectionDeps(
            epoch=self.epoch.id,
            hub=self.hub,
            dispatch=dispatch,
            lifecycle=Hooks(sync.start, sync.refresh),
            limits=advertised(settings),
            frames=Pace.of(settings.frame_rate),
            arrived=self._arrived,
            left=self._left,
            connections_per_user=settings.connections_per_user,
            places=Counter(),
            heartbeat_seconds=settings.heartbeat_seconds,
            abuse=Throttle(),
            working=self._working,
        )
        self.accounts = Accounts(
            database,
            self.hub,
            sessions=self.sessions,
            attempts=Attempts(
                self._redis,
                installation,
                per_account=settings.login_attempts,
                per_address=settings.login_attempts_per_address,
            ),
            reads=self._allowances[Rate.READ],
            origins=settings.allowed_origins,
            is_open=settings.registration == "open",
        )
        addresses = Addresses(
            settings.address_rate, connections=settings.connections_per_address, too_many=self.sockets.too_many
        )
        self._connects: TokenBuckets[UserId] = TokenBuckets(
            "connections of your user that begin", CONNECTS_PER_SECOND, burst=2.0 * settings.connections_per_user
        )
        door = HttpDeps(
            services=services,
            shared=shared,
            sessions=self.sessions,
            accounts=self.accounts,
            origins=settings.allowed_origins,
            metrics=metrics,
            metrics_from=settings.metrics_networks,
            metrics_names=settings.metrics_names,
            is_draining=self._draining,
            addresses=addresses,
            connects=self._connects,
            admission=self.admission,
        )
        routes = [*Endpoints(door).routes(), *self.accounts.routes()]
        paths = frozenset(route.path for route in routes if isinstance(route, (Route, WebSocketRoute)))
        self.starlette = Starlette(
            routes=routes,
            exception_handlers={HTTPException: no_route},
            middleware=[
                Middleware(Tallied, metrics=metrics, paths=paths),
                Middleware(Forwarded, proxies=settings.proxies),
                *_for_pages_of(settings.allowed_origins, addresses, self.sockets),
                Middleware(Counted, addresses=addresses, sockets=self.sockets),
            ],
        )
        # A redirect would name whatever host the request does.
        self.starlette.router.redirect_slashes = False
        self.starlette.router.default = no_path
        metrics.values = self._values
        metrics.push_dropped = self.web_push.dropped
        metrics.closed = self.sockets.closed
        metrics.answers = self.sockets.answers

    @classmethod
    async def open(cls, settings: Settings, folder: Path, number: int, *, is_alone: bool = False) -> "App":
        """Return a worker's server, connected to everything. `folder` is for what the workers share; one that
        `is_alone` has no others to talk to.

        Raises Fatal if the database or the bus cannot be reached, or if the database lacks steps of this program's
        schema.
        """
        redis: Redis | RedisCluster
        bus: type[RedisBus | ClusterBus]
        if await is_cluster(settings.redis_url):
            redis = RedisCluster.from_url(
                settings.redis_url,
                socket_timeout=REDIS_SECONDS,
                socket_connect_timeout=REDIS_SECONDS,
                retry=Retry(NoBackoff(), 1),
                require_full_coverage=False,
            )
            bus = ClusterBus
        else:
            redis = Redis.from_url(
                settings.redis_url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
            )
            bus = Alone if is_alone else RedisBus
        database = await Database.open(settings)
        async with database.connection() as db:
            await require_steps(db)
            push_key = await push.key(db, "vapid", new_key())
        connect = partial(bus, settings.redis_url, database.epoch.id)
        metrics = Metrics(folder, number)
        app = cls(settings, database, metrics, redis, connect, push_key=push_key)
        await app.hub.start()
        await app.presence.start()
        app.connections.start()
        app.background.start()
        app._tasks = [
            asyncio.create_task(every(METRICS_SECONDS, app.metrics.write)),
            asyncio.create_task(app.previews.work()),
            asyncio.create_task(app.pressure.watch()),
        ]
        return app

    async def drain(self) -> None:
        """Send everyone elsewhere, after what they have begun is done."""
        self._draining.set()
        await self.connections.drain(CloseCode.START_OVER if self.epoch.over.is_set() else CloseCode.GOING_AWAY)

    async def finish(self) -> None:
        """Return when nothing is in the middle of something, or it has taken too long."""
        if self._working:
            await asyncio.wait(self._working, timeout=FINISH_SECONDS)

    async def close(self) -> None:
        """Let go of everything, after what is in the middle of something is done."""
        await self.finish()
        await self.background.close()
        await end(self._tasks)
        await self.scheduling.close()
        for allowance in self._allowances.values():
            await allowance.close()
        await self.presence.close(is_epoch_over=self.epoch.over.is_set())
        await self.hub.close()
        await self.web_push.close()
        await self._outbound.close()
        await self._redis.aclose()
        if isinstance(self._redis, RedisCluster):
            # The above leaves all open if the client was about to look at the cluster anew.
            await self._redis.nodes_manager.aclose()
        await self._database.close()

    async def _send_free(self, batch: list[Outgoing]) -> list[Stored | Held | None]:
        async with self._database.sending() as db:
            return await sending.send_free(db, batch)

    async def _send(self, batch: list[Outgoing]) -> list[Stored | None]:
        async with self._database.connection() as db:
            return await sending.send(db, batch)

    def _arrived(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.presence.arrived(connection.user_id, connection)

    def _left(self, connection: Connection) -> None:
        self.connections.remove(connection)
        self.presence.left(connection.user_id, connection, connection.closed_with)

    async def _issue_tickets(self, connections: list[Connection]) -> list[str | None]:
        if self.epoch.over.is_set():
            return [None] * len(connections)  # they are kept under the name of this epoch
        return await self._tickets.issue(
            [Ticket(one.session_id, self.hub.people.version(one.user_id)) for one in connections]
        )

    def _values(self) -> dict[str, float]:
        return {
            "connections": len(self.connections),
            "conversations": len(self.hub.topics),
            "bus_up": int(self.hub.bus.is_up),
            "database_connections": self._database.size,
            "deadlocks": self._database.deadlocks,
            "deliveries": self.hub.topics.delivered,
            "fetches": self.hub.topics.fetched,
            "bus_published": self.hub.bus.published,
            "bus_received": self.hub.bus.received,
            "bus_dropped": self.hub.bus.dropped,
            "sockets": len(self.sockets),
            "sockets_shed": self.sockets.shed,
            "sockets_timed_out": self.sockets.timed_out,
            "shed": self.pressure.refused,
            "turned_away": self.admission.refused,
            "shedding": self.pressure.level,
        }


def _for_pages_of(origins: frozenset[str], addresses: Addresses, sockets: Sockets) -> list[Middleware]:
    """Let pages of other origins read answers, if there are any that may."""
    if not origins:
        return []
    return [
        Middleware(CountedPreflights, addresses=addresses, sockets=sockets),
        Middleware(
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
            allow_credentials=True,
            expose_headers=["retry-after"],
        ),
    ]
