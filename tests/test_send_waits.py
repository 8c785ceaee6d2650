"""A message waits for a row that another transaction has locked, and other messages do not wait with it."""

import asyncio

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import EditId, uuid7
from server.core.config import Settings
from server.db.database import speak
from server.ops.progress import Progress
from server.ops.reindex import rebuild_search_index
from server.queries import batches, sending
from server.queries.sending import Derived, Outgoing, Source
from tests.world import World, are_stored, message, refused, sent

OTHERS = 40
"""Messages of another user that are sent together with the waiting one."""
SECONDS = 3.0
"""Max time for those messages, in seconds. A statement may wait ten seconds for a lock."""

# Statements that lock the rows of a message, by table. Parameters: `$1` conversation, `$2` root of the thread,
# `$3` its author, `$4` sender, `$5` forwarded author, `$6` quoted message, `$7` new message.
HOLD = {
    "conversation": {"": "SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE"},
    "message": {
        "root": "SELECT FROM message WHERE id = $2 FOR SHARE",
        "quoted": "SELECT FROM message WHERE id = $6 FOR UPDATE",
        "id": "INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version)"
        " SELECT $7, id, created_by, 'Taken', 1, 1 FROM conversation WHERE title = 'Elsewhere'",
    },
    "message_search": {
        "id": "INSERT INTO message_search (message_id, conversation_id, created_at, words) VALUES ($7, $1, now(), '')"
    },
    "search_queue": {},  # messages insert rows, which no other transaction can hold
    "thread_follow": {
        "author": "UPDATE thread_follow SET is_following = false WHERE root_id = $2 AND user_id = $3",
        "sender": "UPDATE thread_follow SET is_following = false WHERE root_id = $2 AND user_id = $4",
        "id": "INSERT INTO thread_follow (root_id, user_id, conversation_id) VALUES ($2, $3, $1)",
    },
    "user": {
        "author": 'SELECT FROM "user" WHERE id = $3 FOR UPDATE',
        "sender": 'SELECT FROM "user" WHERE id = $4 FOR UPDATE',
        "forwarded": 'SELECT FROM "user" WHERE id = $5 FOR UPDATE',
    },
}
IS_FOLLOWED = {("thread_follow", "author"), ("thread_follow", "sender")}
LOCKED = """
SELECT DISTINCT c.relname::text FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND l.mode IN ('RowShareLock', 'RowExclusiveLock') AND c.relkind = 'r'
"""


class Stage:
    """A thread of Ada in which Charles replies, while Mary writes in another conversation."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def begin(self) -> None:
        self.ada, self.charles, self.mary, self.jane = await self.world.users("Ada", "Charles", "Mary", "Jane")
        self.author, self.sender, self.other = [
            await self.world.connect(one) for one in (self.ada, self.charles, self.mary)
        ]
        self.group = await self.world.group(self.author, self.charles)
        self.elsewhere = await self.world.channel(self.other, title="Elsewhere")

    async def reply(self, *, is_followed: bool) -> tuple[Outgoing, list[object]]:
        """Return a reply that uses each row that a message can, and the ids of those rows."""
        root, quoted = await sent(self.author, self.group, "Root"), await sent(self.author, self.group, "Quoted")
        if is_followed:
            await sent(self.sender, self.group, "First", parent_message_id=root)
        frame = message(self.group, "Reply", parent_message_id=root, quoted_message_id=quoted)
        derived = Derived(mentions=[self.ada.id])
        out = Outgoing(self.charles.id, frame, derived, Source(self.group, quoted, self.jane.id, None))
        return out, [self.group, root, self.ada.id, self.charles.id, self.jane.id, quoted, frame.message_id]


async def test_message_does_not_wait_for_a_row_of_another_message(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ALONE_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        stage = Stage(world)
        await stage.begin()
        sends = world.workers[0].app._sends  # noqa: SLF001 - many messages, as from many connections
        for table, rows in HOLD.items():
            for row, statement in rows.items():
                out, named = await stage.reply(is_followed=(table, row) in IS_FOLLOWED)
                held = world.db.transaction()
                await held.start()
                used = [number for number in range(1, 8) if f"${number}" in statement]
                for place, number in enumerate(used, start=1):
                    statement = statement.replace(f"${number}", f"${place}")  # noqa: PLW2901
                await world.db.execute(statement, *(named[number - 1] for number in used))
                frames = [message(stage.elsewhere) for _ in range(OTHERS)]
                others = [asyncio.ensure_future(sends.submit(Outgoing(stage.mary.id, one))) for one in frames[:5]]
                stuck = asyncio.ensure_future(sends.submit(out))
                others += [asyncio.ensure_future(sends.submit(Outgoing(stage.mary.id, one))) for one in frames[5:]]
                done, late = await asyncio.wait(others, timeout=SECONDS)
                assert not late, (table, row, len(late))
                assert are_stored(one.result() for one in done)
                if table != "conversation":
                    with pytest.raises(asyncpg.LockNotAvailableError):
                        await asyncio.wait_for(stuck, SECONDS)
                    # The lane is empty again, and the next message waits like the first.
                    with pytest.raises(asyncpg.LockNotAvailableError):
                        await asyncio.wait_for(sends.submit(out), SECONDS)
                assert stuck.done() == (table != "conversation")
                await held.rollback()
                stored = await (stuck if table == "conversation" else sends.submit(out))
                assert are_stored([stored]), (table, row)


async def test_every_table_that_a_message_locks_is_covered(settings: Settings) -> None:
    async with World(settings, workers=1) as world:
        stage = Stage(world)
        await stage.begin()
        out, _ = await stage.reply(is_followed=False)
        async with world.workers[0].app._database.transaction() as db:  # noqa: SLF001 - the rows that it locks
            assert are_stored(await sending.send(db, [out]))
            assert {row[0] for row in await db.fetch(LOCKED)} == set(HOLD)


async def test_sender_whose_row_is_locked_is_refused_with_a_retry_time(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ALONE_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        stage = Stage(world)
        await stage.begin()
        out, _ = await stage.reply(is_followed=True)
        async with world.db.transaction():
            await world.db.execute("UPDATE thread_follow SET is_following = false")
            with refused(ErrorCode.UNAVAILABLE, None):
                await stage.sender.call(out.frame, server.Sent)
            # Later messages in the same conversation do not wait.
            await sent(stage.author, stage.group, "Meanwhile")
        await stage.sender.call(out.frame, server.Sent)


# A replacement of `search_words()` that blocks for one message.
SLOW = """
ALTER FUNCTION search_words RENAME TO words_of;
CREATE FUNCTION search_words(uuid, text, jsonb, uuid[], text[], text[]) RETURNS tsvector LANGUAGE plpgsql AS $$
BEGIN
    IF $2 = 'Slow' AND current_setting('application_name') = 'reindex' THEN
        PERFORM pg_advisory_xact_lock_shared(62);
    END IF;
    RETURN words_of($1, $2, $3, $4, $5, $6);
END $$
"""
STARTED = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 62 AND NOT granted)"
WORDS = "SELECT words::text FROM message_search WHERE message_id = $1"


async def test_messages_do_not_wait_for_reindex(settings: Settings) -> None:
    async with World(settings, workers=1) as world, asyncio.TaskGroup() as group:
        stage = Stage(world)
        await stage.begin()
        held, root, edited, last = [
            await sent(stage.author, stage.group, content) for content in ("Held", "Root", "Slow", "Last")
        ]
        await world.indexed()
        await world.db.execute(SLOW)
        await world.db.execute("UPDATE message_search SET words = ''")
        db = await asyncpg.connect(settings.database_url, server_settings={"application_name": "reindex"})
        await speak(db, settings.search_language)
        await world.db.execute("SELECT pg_advisory_lock(62)")
        reindexing = group.create_task(rebuild_search_index(db, Progress(is_on=False)))
        async with asyncio.timeout(SECONDS):
            while not await world.db.fetchval(STARTED):
                await asyncio.sleep(0.01)
            # While it computes words, it holds no locks on rows that these frames change.
            await sent(stage.sender, stage.group, "Reply", parent_message_id=root)
            await stage.author.call(
                client.Edit(conversation_id=stage.group, message_id=edited, edit_id=EditId(uuid7()), content="Edited")
            )
            async with world.db.transaction():
                await world.db.execute("SELECT FROM message WHERE id = $1 FOR NO KEY UPDATE", held)
                await world.db.execute("SELECT pg_advisory_unlock(62)")
                while not await world.db.fetchval(WORDS, last):
                    await asyncio.sleep(0.01)
                assert not await world.db.fetchval(WORDS, held)
                assert not reindexing.done()
            await reindexing
        found = [(await world.db.fetchval(WORDS, one)).split()[-1] for one in (held, root, edited, last)]
        assert found == ["'held':1", "'root':1", "'edited':1", "'last':1"]
        await db.close()
