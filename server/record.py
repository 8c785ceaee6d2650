"""What the hub asks the database, many questions of a kind in one query."""

from collections.abc import Collection, Sequence

from protocol.ids import ConversationId, SessionId, UserId
from protocol.limits import MAX_CHANGES
from server.database import Database
from server.doubts import Pair
from server.gather import Gather
from server.queries import changes, conversations, sessions, users
from server.queries.users import Clocks, Watchable
from server.topics import Fetched


class PostgresRecord:
    """The hub's Record, in PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._versions: Gather[Sequence[ConversationId], dict[ConversationId, int]] = Gather(self._read, most=256)
        self._users: Gather[Sequence[UserId], dict[UserId, Clocks]] = Gather(self._read_users, most=256)

    async def since(self, conversation_id: ConversationId, version: int) -> Fetched | None:
        """Return what came after a version, or the first part of it."""
        async with self._database.connection() as db:
            difference = await changes.since(db, conversation_id, version, limit=MAX_CHANGES)
        if difference is None:
            return None
        return Fetched(difference.changes, difference.changes.version, difference.gone)

    async def versions(self, conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
        """Return conversations' clocks."""
        return await self._versions.submit(conversation_ids)

    async def user_versions(self, user_ids: Sequence[UserId]) -> dict[UserId, Clocks]:
        """Return users' own clocks, and the hidden ones."""
        return await self._users.submit(user_ids)

    async def living(self, session_ids: Sequence[SessionId]) -> Collection[SessionId]:
        """Return which of the sessions are valid."""
        async with self._database.connection() as db:
            return await sessions.living(db, session_ids)

    async def watchable(self, pairs: Sequence[Pair], *, asker: UserId | None = None) -> dict[Pair, Watchable]:
        """Return those of the pairs whose watcher may see the face: for a user who asks, with their share."""
        database = self._database if asker is None else self._database.of(asker)
        async with database.connection() as db:
            found = await users.watchable(db, pairs)
        return {Pair(*pair): one for pair, one in found.items()}

    async def epoch(self) -> str:
        """Return what tells this database from another one."""
        return await self._database.epoch()

    async def _read(self, batch: list[Sequence[ConversationId]]) -> list[dict[ConversationId, int]]:
        async with self._database.connection() as db:
            found = await conversations.versions(db, [one for ids in batch for one in ids])
        return [found] * len(batch)

    async def _read_users(self, batch: list[Sequence[UserId]]) -> list[dict[UserId, Clocks]]:
        async with self._database.connection() as db:
            found = await users.versions(db, [one for ids in batch for one in ids])
        return [found] * len(batch)
