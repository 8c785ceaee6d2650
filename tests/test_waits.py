"""Conditions that a frame read before it waited for a lock are checked again under the lock."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.server import Error
from protocol.values import User
from prove.client import Client
from server.context import Context
from server.core.config import Settings
from server.core.errors import NotActive
from server.db.database import Database
from server.db.lock_timeouts import JOB_LOCK_MS
from server.queries import conversations, moderation
from server.routes import ROUTES
from tests.test_lock_order import ConflictingWrites
from tests.test_may_send import WAITING, let_all_wait, waiting
from tests.world import World, http_client, message, sent

# A job adds the words of messages that were sent before.
TABLES = """
SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    AND relname NOT IN ('message_search', 'search_queue') ORDER BY relname
"""
REPORTS = f"""
WITH made AS (
    INSERT INTO "user" (name, email) SELECT 'p' || n, 'p' || n || '@example.org'
    FROM generate_series(1, {2 * moderation.MAX_RESOLVED + 1}) n RETURNING id
)
INSERT INTO report (id, conversation_id, message_id, reporter_id, reason)
SELECT gen_random_uuid(), $1, $2, id, 'Rude' FROM made
"""
FLIP = 'UPDATE "user" SET is_active = NOT is_active WHERE id = $1'


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with World(msgspec.structs.replace(settings, database_connections=18)) as world:
        yield world


async def test_frame_of_a_disabled_account_writes_nothing_even_if_it_waited(world: World) -> None:
    """Every frame that writes is tested."""
    async with http_client(world.url) as http:
        conflicting = ConflictingWrites(world, http)
        await conflicting.begin()
        db, refused = world.db, 0
        watch = await asyncpg.connect(world.settings.database_url)
        before = await rows(db)
        for index, frame in enumerate(conflicting.frames()):
            name = type(frame).__name__
            async with db.transaction():
                await db.execute("SELECT FROM conversation FOR UPDATE")
                await db.execute('SELECT FROM "user" FOR UPDATE')
                done = asyncio.create_task(refusal_code(conflicting, frame))
                while not done.done() and not await watch.fetchval(WAITING):
                    await asyncio.sleep(0.005)
                has_waited = not done.done()
                await db.execute(FLIP, conflicting.ada)
            code = await done
            refused += code is ErrorCode.UNAUTHENTICATED
            if not has_waited:
                await db.execute(FLIP, conflicting.ada)
                before = await rows(db)
                await db.execute(FLIP, conflicting.ada)
            await refusal_code(conflicting, conflicting.frames()[index])
            await db.execute(FLIP, conflicting.ada)
            after = await rows(db)
            assert not [(name, table) for table in before if before[table] != after[table]]
        await watch.close()
        assert refused >= 35, "too few frames waited and were refused"


async def test_change_of_privacy_that_waits_for_its_opposite_is_published(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compared the row with what it had read before it waited, and found no difference."""
    ada = await world.user("Ada")
    devices = [await world.connect(ada), await world.connect(ada, 1)]
    await devices[0].call(client.UpdateProfile(show_online_status=False))
    published = 0
    for worker in world.workers:
        events, reconsider = worker.app.hub, worker.app.hub.reconsider

        def counted(user_id: UserId, *rest: Any, reconsider: Callable[..., None] = reconsider) -> None:
            nonlocal published
            published += 1
            reconsider(user_id, *rest)

        monkeypatch.setattr(events, "reconsider", counted)
    let_all_wait(world)
    holder = await asyncpg.connect(world.settings.database_url)
    async with holder.transaction():
        await holder.execute('SELECT FROM "user" WHERE id = $1 FOR UPDATE', ada.id)
        asked: list[asyncio.Task[Any]] = []
        for count, (one, is_shown) in enumerate(zip(devices, (True, False), strict=True), start=1):
            asked.append(asyncio.create_task(one.call(client.UpdateProfile(show_online_status=is_shown))))
            await waiting(world, count)
    await asyncio.gather(*asked)
    await holder.close()
    assert await world.db.fetchval('SELECT NOT show_online_status FROM "user" WHERE id = $1', ada.id)
    assert published == 2


async def rows(db: Any) -> dict[str, list[str]]:
    """Return all rows of all tables."""
    tables = [row[0] for row in await db.fetch(TABLES)]
    return {one: [row[0] for row in await db.fetch(f'SELECT t::text FROM "{one}" t ORDER BY 1')] for one in tables}


async def refusal_code(conflicting: ConflictingWrites, frame: Frame) -> ErrorCode | None:
    """Run a frame of Ada on a worker that does not know yet that her account is disabled. Return the error code."""
    context = Context(
        services=conflicting.app._services,  # noqa: SLF001
        user=User(id=conflicting.ada, name="Ada"),
        session_id=conflicting.sessions[conflicting.ada],
    )
    try:
        await ROUTES[type(frame)].handler(context, frame)
    except Refused as refused:
        return refused.code
    return None


CHECKS_ITSELF: set[type[Frame]] = {
    client.Read, client.MarkUnread, client.Delivered, client.SeeFeed, client.SetPresence,
}  # fmt: skip
"""Frames that write with one statement outside a transaction. Each of these statements checks the account."""


class WritesInTransactions(Database):
    """A database that is read-only outside transactions. `Context.transaction` checks the account."""

    __slots__ = ()

    def of(self, user_id: UserId, *, lock_ms: int = 0) -> Database:  # noqa: ARG002 - they wait
        return WritesInTransactions(self._state.pool.of(user_id), self._state, lock_ms=JOB_LOCK_MS)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:  # type: ignore[override]
        async with super().connection() as db:
            await db.execute("SET default_transaction_read_only = on")
            try:
                yield db
            finally:
                await db.execute("RESET default_transaction_read_only")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with super().connection() as db, db.transaction():
            yield db


async def test_frames_write_only_in_a_transaction_that_checks_the_account(world: World) -> None:
    """The same holds for statements after it.

    `send` and the frames of `CHECKS_ITSELF` check in the statement that writes.
    """
    async with http_client(world.url) as http:
        conflicting = ConflictingWrites(world, http)
        await conflicting.begin()
        services = conflicting.app._services  # noqa: SLF001
        reading = WritesInTransactions(services.database._pool, services.database._state, lock_ms=JOB_LOCK_MS)  # noqa: SLF001
        context = Context(
            services=msgspec.structs.replace(services, database=reading),
            user=User(id=conflicting.ada, name="Ada"),
            session_id=conflicting.sessions[conflicting.ada],
        )
        done, checks_itself = 0, set()
        for index, frame in enumerate(conflicting.frames()):
            if isinstance(conflicting.frames()[index - 1], client.Leave | client.TransferOwnership):
                await conflicting.fill_group()
            try:
                await ROUTES[type(frame)].handler(context, conflicting.frames()[index])
            except Refused:
                continue
            except asyncpg.ReadOnlySQLTransactionError:
                checks_itself.add(type(frame))
            done += 1
        assert checks_itself == CHECKS_ITSELF
        assert done > 35, "too few frames succeeded"
        async with reading.connection() as db:
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await db.execute("DELETE FROM report")


DEMOTED = """
UPDATE conversation_participant SET role = CASE role WHEN 'owner' THEN 'member' ELSE 'owner' END WHERE user_id = $1
"""


@pytest.mark.parametrize(("lost", "refusal"), [(FLIP, NotActive), (DEMOTED, Refused)], ids=["account", "role"])
async def test_reports_stay_open_if_the_account_or_role_ends_meanwhile(
    world: World, lost: str, refusal: type[Refused]
) -> None:
    """More reports than one statement resolves. The message is hidden, since that was committed before."""
    owner, other = await world.users("Owner", "Other")
    mine = await world.connect(owner)
    about = await world.channel(mine, is_public=True)
    theirs = await world.connect(other)
    await theirs.call(client.Join(conversation_id=about))
    said = await sent(theirs, about)
    await world.db.execute(REPORTS, about, said)
    async with http_client(world.url) as http:
        conflicting = ConflictingWrites(world, http)
        services = conflicting.app._services  # noqa: SLF001
    session = await world.db.fetchval("SELECT id FROM session WHERE user_id = $1", owner.id)
    context = Context(services=services, user=User(id=owner.id, name="Owner"), session_id=session)
    handler: Any = ROUTES[client.Moderate].handler
    frame = client.Moderate(conversation_id=about, message_id=said, reason="Rude")
    async with world.db.transaction():
        # The resolving statement skips locked rows, so the test locks the table.
        await world.db.execute("LOCK TABLE report IN SHARE MODE")
        waits = asyncio.create_task(handler(context, frame))
        await waiting(world, 1)
        await world.db.execute(lost, owner.id)
    with pytest.raises(refusal):
        await waits
    assert await world.db.fetchval("SELECT is_moderated FROM message WHERE id = $1", said)
    assert await world.db.fetchval("SELECT count(*) FROM report WHERE status = 'upheld'") == 0
    await world.db.execute(lost, owner.id)
    await mine.close()
    await handler(context, frame)
    upheld = await world.db.fetchval("SELECT count(*) FROM report WHERE status = 'upheld'")
    assert upheld == 2 * moderation.MAX_RESOLVED + 1


async def test_reports_are_upheld_in_batches_with_any_plan(world: World) -> None:
    """With the statistics of an empty table, the planner once chose a plan that selected the batch again per report."""
    (owner,) = await world.users("Owner")
    mine = await world.connect(owner)
    about = await world.channel(mine, is_public=True)
    said = await sent(mine, about)
    await world.db.execute(REPORTS, about, said)
    await world.db.execute("CREATE TEMP TABLE kept AS SELECT * FROM report")
    await world.db.execute("DELETE FROM report")
    await world.db.execute("ANALYZE report")
    await world.db.execute("INSERT INTO report SELECT * FROM kept")
    await world.db.execute("UPDATE message SET is_moderated = true WHERE id = $1", said)
    most = moderation.MAX_RESOLVED
    portions = [len(await world.db.fetch(moderation.UPHOLD, about, said, owner.id, most)) for _ in range(4)]
    assert portions == [most, most, 1, 0]


class Source(NamedTuple):
    """A message, the owner of its conversation, its author, and a reader who is about to use it."""

    owner: Client
    author: Client
    reader_id: UserId
    about: ConversationId
    said: MessageId

    @property
    def at(self) -> dict[str, Any]:
        return {"conversation_id": self.about, "message_id": self.said}


async def delete(source: Source) -> None:
    await source.author.call(client.Delete(**source.at))


async def hide(source: Source) -> None:
    await source.owner.call(client.Moderate(**source.at, reason="Secret"))


async def edit(source: Source) -> None:
    await source.author.call(client.Edit(**source.at, content="Nothing"))


async def ban(source: Source) -> None:
    frame = client.RemoveParticipant(conversation_id=source.about, user_id=source.reader_id, ban=True)
    await source.owner.call(frame)


async def delete_all(source: Source) -> None:
    await source.owner.call(client.DeleteConversation(conversation_id=source.about))


BECOMES: dict[Callable[[Source], Awaitable[None]], str | None] = {
    delete: None, hide: None, edit: "Nothing", ban: None, delete_all: None,
}  # fmt: skip
"""Changes of a message that is being forwarded, and the content of the forward. None if it is refused."""


async def test_forward_contains_what_its_sender_may_read_after_the_wait(world: World) -> None:
    first, author, reader = await world.users("Owner", "Author", "Reader")
    owner, theirs, mine = [await world.connect(who, number % 2) for number, who in enumerate((first, author, reader))]
    target = await world.channel(mine)
    for change, words in BECOMES.items():
        about = await world.group(owner, author, reader)
        source = Source(owner, theirs, reader.id, about, await sent(theirs, about, "A secret"))
        new = MessageId(uuid7())
        frame = client.Forward(**source.at, to_conversation_id=target, new_message_id=new)
        async with world.db.transaction():
            await conversations.lock(world.db, target)
            waits = asyncio.create_task(mine.ask(frame))
            await waiting(world, 1)
            await change(source)
        answer: Any = await waits
        refusal = (answer.code, answer.path) if isinstance(answer, Error) else None
        assert (change, refusal) == (change, None if words else (ErrorCode.NOT_FOUND, "message_id"))
        assert await world.db.fetchval("SELECT content FROM message WHERE id = $1", new) == words
        # A stored forward gets the first answer again, even if its source was deleted.
        if words:
            await delete(source)
            again = await mine.call(frame, server.Sent)
            assert (again.message_id, again.version) == (new, answer.result.version)


async def test_reply_or_quote_is_refused_if_its_message_is_deleted_meanwhile(world: World) -> None:
    author, reader = await world.users("Author", "Reader")
    theirs, mine = await world.connect(author), await world.connect(reader, 1)
    about = await world.group(theirs, reader)
    source = Source(theirs, theirs, reader.id, about, await sent(theirs, about))
    other = await world.connect(reader)
    let_all_wait(world)
    async with world.db.transaction():
        await conversations.lock(world.db, about)
        deleted = asyncio.create_task(theirs.ask(client.Delete(**source.at)))
        await waiting(world, 1)
        answers = [
            asyncio.create_task(mine.ask(message(about, parent_message_id=source.said))),
            asyncio.create_task(other.ask(message(about, quoted_message_id=source.said))),
        ]
        await waiting(world, 3)
    assert not isinstance(await deleted, Error)
    refusals = [await answer for answer in answers]
    paths = [one.path if isinstance(one, Error) else "stored" for one in refusals]
    assert paths == ["parent_message_id", "quoted_message_id"]
