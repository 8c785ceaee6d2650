"""The server of one worker, with all of its objects."""

import asyncio
import os
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
from server.app.sends import sends_of
from server.auth.attempts import Attempts
from server.auth.sessions import Sessions
from server.auth.tickets import Ticket, Tickets
from server.context import Services
from server.core.config import Settings
from server.core.metrics import Metrics
from server.core.periodic import end, every
from server.core.throttle import Throttle
from server.core.unconfirmed import Unconfirmed
from server.db.database import OWN_CONNECTIONS, Database
from server.db.epoch import OVER_SECONDS
from server.db.lock_timeouts import ATTEMPTS_SECONDS, RETRY_LOCK_MS
from server.db.migrate import require_steps
from server.domain import sync
from server.domain.presence import Presence
from server.domain.presence_entries import PresenceEntries
from server.fairness.lanes import Held, Lanes
from server.fairness.lock_queue import LockQueue, Places
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
from server.jobs.search_index import SearchIndexer
from server.limits.admission import Admission
from server.limits.advertised import advertised
from server.limits.load_shedding import LoadShedding
from server.limits.per_address import Addresses
from server.limits.shared_rate_limit import SharedRateLimit
from server.limits.token_bucket import Pace, TokenBuckets
from server.queries import joins, polls, push, reactions
from server.queries.batched_changes import ChangeFunction, NotChanged, Outcome, Request
from server.routes import ROUTES

MAX_BATCH_CHANGES = 64
"""Max reactions that one statement changes, or votes, or joins."""
WORKER_BYTES = 16
"""Length of the random id of a worker, in bytes."""
REDIS_SECONDS = 1.0
"""Max time of a command to Redis, in seconds."""
METRICS_SECONDS = 1.0
"""Interval at which a worker writes its metrics, in seconds."""
WAITING_SHARE = 4
"""Max share of a worker's connections that wait for locked rows, as 1 / `WAITING_SHARE`, but at least one. The brief
first attempts of frames do not count.
"""
SENDERS_SHARE = 4
"""Max share of a worker's connections that scheduled messages use, as 1 / `SENDERS_SHARE`, but at least one."""
ENDPOINT_RATE, ENDPOINT_BURST = 1 / 30, 40.0
"""Max new push endpoints, per user and worker, per second and as a burst. A browser keeps its endpoint for months."""
FINISH_SECONDS = 5.0
"""Max wait for frames in progress when the worker ends, in seconds."""


class App:
    """All objects of a worker."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        metrics: Metrics,
        redis: Redis | RedisCluster,
        connect: Connect,
        *,
        push_key: str,
        worker: bytes,
    ) -> None:
        """`connect` returns the bus. `worker` is the id of this worker."""
        self._database = database
        self._redis = redis
        self.epoch = database.epoch
        installation = self.epoch.id
        self.metrics = metrics
        self._draining = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

        hub_store = PostgresHubStore(database)
        self.hub = Hub(
            hub_store,
            connect,
            describe=lambda found: self.presence.describe(found),  # noqa: PLW0108 - it is created below
            worker=worker,
        )
        self.presence = Presence(PresenceEntries(self._redis, installation), database, self.hub.send_to_watchers)
        self._tickets = Tickets(self._redis, installation)
        self.sessions = Sessions(database, self._tickets, days=settings.session_days)
        self.connections = Connections(
            self.hub,
            heartbeat_seconds=settings.heartbeat_seconds,
            alive=self.sessions.keep,
            tickets=self._issue_tickets,
        )
        self.sockets = Sockets(
            most=most_sockets(settings.database_connections + OWN_CONNECTIONS),
            per_address=settings.connections_per_address,
            proxies=settings.proxies,
            frames=Pace.of(settings.frame_rate),
            outbox_bytes=settings.outbox_bytes,
            compresses=settings.compression,
        )
        self.load_shedding = LoadShedding()
        self.admission = Admission()
        places = Places(max(1, settings.database_connections // WAITING_SHARE), patience=ATTEMPTS_SECONDS)
        self._sends = sends_of(database, places)
        self._reactions = self._lanes_of(reactions.FUNCTION, places)
        self._votes = self._lanes_of(polls.FUNCTION, places)

        self._safe_http = SafeHttp(to_private=settings.private_addresses)
        self.web_push = WebPush(
            database,
            self._safe_http,
            key=push_key,
            contact=settings.push_contact,
            after_seconds=settings.push_after_seconds,
        )
        self.previews = Previews(database, self.hub, self._safe_http, are_on=settings.link_previews)
        self.search_indexer = SearchIndexer(database)

        rates = {
            Rate.WRITE: settings.write_rate,
            Rate.READ: settings.read_rate,
            Rate.EPHEMERAL: settings.ephemeral_rate,
            Rate.SEARCH: settings.search_rate,
        }
        self._rate_limits = {
            one: SharedRateLimit(
                one.value, rate, None if isinstance(self.hub.bus, Alone) else self._redis, installation=installation
            )
            for one, rate in rates.items()
        }
        services = Services(
            database=database,
            events=self.hub,
            presence=self.presence,
            sends=self._sends,
            reactions=self._reactions,
            votes=self._votes,
            joins=self._lanes_of(joins.FUNCTION, places),
            memberships=hub_store.memberships,
            unconfirmed=Unconfirmed(),
            web_push=self.web_push,
            previews=self.previews,
            search_indexer=self.search_indexer,
            writes=self._rate_limits[Rate.WRITE],
            new_endpoints=TokenBuckets("new push endpoints", ENDPOINT_RATE, burst=ENDPOINT_BURST),
            push_key=self.web_push.public_key,
            anyone_adds=settings.add_people == "anyone",
        )
        self._services = services
        self.scheduler = Scheduler(services, most=max(1, settings.database_connections // SENDERS_SHARE))
        self.background = Background(
            settings,
            database,
            self.hub,
            sessions=self.sessions,
            presence=self.presence,
            scheduler=self.scheduler,
            web_push=self.web_push,
            metrics=metrics,
        )
        self._lock_queue: LockQueue[ConversationId | UserId] = LockQueue(places, lock_ms=RETRY_LOCK_MS)
        dispatch = Dispatch(
            ROUTES,
            self._rate_limits,
            metrics=metrics,
            load_shedding=self.load_shedding,
            lock_queue=self._lock_queue,
        )
        self.searching = dispatch.searching
        connection_deps = ConnectionDeps(
            epoch=self.epoch.id,
            hub=self.hub,
            dispatch=dispatch,
            hooks=Hooks(sync.start, sync.refresh),
            limits=advertised(settings),
            frames=Pace.of(settings.frame_rate),
            arrived=self._arrived,
            left=self._left,
            connections_per_user=settings.connections_per_user,
            connection_counts=Counter(),
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
            reads=self._rate_limits[Rate.READ],
            origins=settings.allowed_origins,
            is_open=settings.registration == "open",
        )
        addresses = Addresses(
            settings.address_rate, connections=settings.connections_per_address, too_many=self.sockets.too_many
        )
        self._connects: TokenBuckets[UserId] = TokenBuckets(
            "connections of your user that begin", CONNECTS_PER_SECOND, burst=2.0 * settings.connections_per_user
        )
        deps = HttpDeps(
            services=services,
            connection_deps=connection_deps,
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
            compresses=settings.compression,
        )
        routes = [*Endpoints(deps).routes(), *self.accounts.routes()]
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
        # A redirect would contain the host of the request, whatever that is.
        self.starlette.router.redirect_slashes = False
        self.starlette.router.default = no_path
        metrics.values = self._values
        metrics.push_dropped = self.web_push.dropped
        metrics.faults = database.faults
        metrics.closed = self.sockets.closed
        metrics.answers = self.sockets.answers

    @classmethod
    async def open(cls, settings: Settings, folder: Path, number: int, *, is_alone: bool = False) -> "App":
        """Return a worker's server, connected to the database and to Redis. `folder` is shared by the workers. With
        `is_alone`, there are no other workers.

        Raises Fatal if the database or Redis cannot be reached, or if the database lacks migrations of this program.
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
        worker = os.urandom(WORKER_BYTES)
        database = await Database.open(settings, worker=worker)
        async with database.connection() as db:
            await require_steps(db)
            push_key = await push.key(db, "vapid", new_key())
        connect = partial(bus, settings.redis_url, database.epoch.id)
        metrics = Metrics(folder, number)
        app = cls(settings, database, metrics, redis, connect, push_key=push_key, worker=worker)
        await app.hub.start()
        await app.presence.start()
        app.connections.start()
        app.background.start()
        app.metrics.collector.start()
        app._tasks = [
            asyncio.create_task(every(METRICS_SECONDS, app.metrics.write)),
            asyncio.create_task(app.previews.work()),
            asyncio.create_task(app.search_indexer.work()),
            asyncio.create_task(app.load_shedding.watch()),
        ]
        return app

    async def drain(self) -> None:
        """Ask all clients to reconnect, after their frames in progress."""
        self._draining.set()
        await self.connections.drain(CloseCode.START_OVER if self.epoch.over.is_set() else CloseCode.GOING_AWAY)

    async def finish(self) -> None:
        """Wait until no frame is in progress, up to `FINISH_SECONDS`, or `OVER_SECONDS` at the end of an epoch. Then
        the connections to an old primary, which may not answer, are closed.
        """
        if self._working:
            is_over = self.epoch.over.is_set()
            _, left = await asyncio.wait(self._working, timeout=OVER_SECONDS if is_over else FINISH_SECONDS)
            if left and is_over:
                await self._database.close()

    async def close(self) -> None:
        """Finish frames in progress, stop all jobs, and close all connections."""
        self.metrics.collector.stop()
        await self.finish()
        await self.background.close()
        await end(self._tasks)
        await self.scheduler.close()
        for rate_limit in self._rate_limits.values():
            await rate_limit.close()
        await self.presence.close(is_epoch_over=self.epoch.over.is_set())
        await self.hub.close()
        await self.web_push.close()
        await self._safe_http.close()
        await self._redis.aclose()
        if isinstance(self._redis, RedisCluster):
            # `aclose` leaves connections open if the client was about to read the nodes of the cluster again.
            await self._redis.nodes_manager.aclose()
        await self._database.close()

    def _lanes_of(
        self, function: ChangeFunction[Request, Outcome], places: Places
    ) -> Lanes[ConversationId, Request, Outcome | NotChanged]:
        """Return the lanes of the changes that a function makes. `places` are those of all lanes."""

        async def run(batch: list[Request]) -> list[Outcome | NotChanged | Held]:
            async with self._database.sending() as db:
                return await function.passing(db, batch)

        async def wait(batch: list[Request]) -> list[Outcome | NotChanged | Held]:
            async with self._database.connection() as db:
                return await function.waiting(db, batch)

        return Lanes(
            key=lambda request: request.conversation_id,
            owner=lambda request: request.subject[0],
            run=run,
            wait=wait,
            places=places,
            most=MAX_BATCH_CHANGES,
        )

    def _arrived(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.presence.arrived(connection.user_id, connection)

    def _left(self, connection: Connection) -> None:
        self.connections.remove(connection)
        self.presence.left(connection.user_id, connection, connection.closed_with)

    async def _issue_tickets(self, connections: list[Connection]) -> list[str | None]:
        if self.epoch.over.is_set():
            return [None] * len(connections)  # tickets belong to this epoch
        return await self._tickets.issue(
            [Ticket(one.session_id, self.hub.online_users.version(one.user_id)) for one in connections]
        )

    def _values(self) -> dict[str, float]:
        return {
            "connections": len(self.connections),
            "conversations": len(self.hub.topics),
            "bus_up": int(self.hub.bus.is_up),
            "database_connections": self._database.size,
            "database_waiting": self._database.waiting,
            "tasks": len(asyncio.all_tasks()),
            "deadlocks": self._database.deadlocks,
            "deliveries": self.hub.topics.delivered,
            "fetches": self.hub.topics.fetched,
            "bus_published": self.hub.bus.published,
            "bus_received": self.hub.bus.received,
            "bus_dropped": self.hub.bus.dropped,
            "sockets": len(self.sockets),
            "sockets_shed": self.sockets.shed,
            "sockets_timed_out": self.sockets.timed_out,
            "shed": self.load_shedding.refused,
            "turned_away": self.admission.refused,
            "shedding": self.load_shedding.level,
        }


def _for_pages_of(origins: frozenset[str], addresses: Addresses, sockets: Sockets) -> list[Middleware]:
    """Return the middleware that lets pages of other origins read responses, if any origin may."""
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
