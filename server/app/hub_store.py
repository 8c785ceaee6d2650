"""The hub's queries. Concurrent queries of a kind share one statement."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from protocol.ids import ConversationId, SessionId, UserId
from protocol.limits import MAX_CHANGES, MAX_SHARED_PARTICIPANTS
from protocol.server import MessageDelivered, MessageRead
from server.db.database import Database
from server.fairness.batcher import Batcher
from server.hub.doubts import Pair
from server.hub.topics import Fetched
from server.queries import changes, conversations, memberships, own_news, presence, receipts, sessions, users, workers
from server.queries.memberships import Membership
from server.queries.own_news import OWN_PAGE, OwnNews
from server.queries.presence import Watchable
from server.queries.receipts import Moved
from server.queries.users import Clocks

MEMBERSHIPS_AT_ONCE = 64
"""Max users per membership query."""


class PostgresUserNews:
    """News for the connections of one user, from PostgreSQL. Each query runs once, and later callers share
    its result.
    """

    def __init__(self, store: "PostgresHubStore", user_id: UserId, *, is_whole: bool) -> None:
        self._store = store
        self._user_id = user_id
        self.is_whole = is_whole
        self._there: asyncio.Future[dict[ConversationId, Membership]] | None = None
        self._news: dict[int, asyncio.Future[OwnNews]] = {}

    async def memberships(self) -> Mapping[ConversationId, Membership]:
        """Return the user's conversations."""
        if self._there is None:
            self._there = asyncio.ensure_future(self._store.memberships.submit(self._user_id))
        return await asyncio.shield(self._there)

    async def news(self, since: int) -> OwnNews:
        """Return the first changes of the user's own rows after a user version."""
        if (there := self._news.get(since)) is None:
            there = self._news[since] = asyncio.ensure_future(self._store.news(self._user_id, since))
        return await asyncio.shield(there)


class PostgresHubStore:
    """The hub's queries in PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._versions: Batcher[Sequence[ConversationId], dict[ConversationId, int]] = Batcher(self._read, most=256)
        self._users: Batcher[Sequence[UserId], dict[UserId, Clocks]] = Batcher(self._read_users, most=256)
        self.memberships: Batcher[UserId, dict[ConversationId, Membership]] = Batcher(
            self._read_memberships, most=MEMBERSHIPS_AT_ONCE
        )

    async def since(self, conversation_id: ConversationId, version: int) -> Fetched | None:
        """Return the changes after a version, or a first part of them. Return None without such a conversation."""
        async with self._database.connection() as db:
            found = await changes.since(db, conversation_id, version, limit=MAX_CHANGES)
        if found is None:
            return None
        difference = await found.decoded()
        return Fetched(difference.changes, difference.changes.version, difference.gone)

    async def versions(self, conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
        """Return the versions of conversations."""
        return await self._versions.submit(conversation_ids)

    async def moved(self, conversation_ids: Sequence[ConversationId], *, since: float) -> Moved:
        """Return the read and delivered positions that have moved since a time of the loop."""
        async with self._database.connection() as db:
            return await receipts.moved(db, conversation_ids, seconds=self._age(since), most=MAX_SHARED_PARTICIPANTS)

    async def moved_of(
        self, pairs: Sequence[tuple[ConversationId, UserId]], *, since: float
    ) -> list[MessageRead | MessageDelivered]:
        """Return the positions of participants that have moved since a time of the loop."""
        async with self._database.connection() as db:
            return await receipts.moved_of(db, pairs, seconds=self._age(since))

    async def user_versions(self, user_ids: Sequence[UserId]) -> dict[UserId, Clocks]:
        """Return the versions of users."""
        return await self._users.submit(user_ids)

    def user_news(self, user_id: UserId, *, is_whole: bool) -> PostgresUserNews:
        """Return the news that a user's connections share."""
        return PostgresUserNews(self, user_id, is_whole=is_whole)

    async def news(self, user_id: UserId, since: int) -> OwnNews:
        """Return the first changes of a user's own rows after a user version."""
        async with self._database.of(user_id).connection() as db:
            found = await own_news.read(db, user_id, since, limit=OWN_PAGE)
        return await found.decoded()

    async def workers(self) -> Collection[bytes]:
        """Return the ids of the workers that are connected to the database. Earlier releases have an empty id."""
        async with self._database.connection() as db:
            return await workers.connected(db)

    async def living(self, session_ids: Sequence[SessionId]) -> Collection[SessionId]:
        """Return the valid ones of these sessions."""
        async with self._database.connection() as db:
            return await sessions.living(db, session_ids)

    async def watchable(
        self, pairs: Sequence[Pair], *, asker: UserId | None = None
    ) -> tuple[dict[Pair, Watchable], int]:
        """Return the pairs whose watcher may see the face, and the revision of that. For an asking user, use the user's
        share of connections.
        """
        database = self._database if asker is None else self._database.of(asker)
        async with database.connection() as db:
            found = await presence.watchable(db, pairs)
        return {Pair(*pair): one for pair, one in found.pairs.items()}, found.revision

    def _age(self, since: float) -> float:
        """Return the seconds since a time of the loop, after the wait for a connection."""
        return asyncio.get_running_loop().time() - since

    async def _read(self, batch: list[Sequence[ConversationId]]) -> list[dict[ConversationId, int]]:
        async with self._database.connection() as db:
            found = await conversations.versions(db, [one for ids in batch for one in ids])
        return [found] * len(batch)

    async def _read_memberships(self, user_ids: list[UserId]) -> list[dict[ConversationId, Membership]]:
        async with self._database.connection() as db:
            return await memberships.read(db, user_ids)

    async def _read_users(self, batch: list[Sequence[UserId]]) -> list[dict[UserId, Clocks]]:
        async with self._database.connection() as db:
            found = await users.versions(db, [one for ids in batch for one in ids])
        return [found] * len(batch)
