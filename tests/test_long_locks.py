"""Work under the lock of a conversation does not grow with what participants store there."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, json_object, server
from protocol.errors import ErrorCode
from protocol.export import Export
from protocol.ids import MessageId, uuid7
from protocol.payloads import Poll
from protocol.values import ConversationSettings
from server.app import background
from server.core.config import Settings
from server.db.database import Db, Single
from server.domain.erasure import erase
from server.domain.export import written
from server.jobs.expiry import expire_due
from server.queries import changes, erasure, expiry, joins, locks, own_news, remains
from tests.world import World, refused, sent

CROWD = 300
"""Participants who react, vote and report, more than a transaction may change rows."""
MOST_ROWS = 80
"""Max rows that a transaction changes while it has locked a conversation."""

# Count the rows that each transaction changes, in a table that the transactions themselves write.
COUNT = """
CREATE UNLOGGED TABLE change (transaction xid8 NOT NULL, name text NOT NULL);
CREATE FUNCTION count_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO change VALUES (pg_current_xact_id(), TG_TABLE_NAME);
    RETURN NULL;
END $$;
DO $$
DECLARE
    found record;
BEGIN
    FOR found IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'change' LOOP
        EXECUTE format('CREATE TRIGGER count_change AFTER INSERT OR UPDATE OR DELETE ON %I FOR EACH ROW'
            ' EXECUTE FUNCTION count_change()', found.tablename);
    END LOOP;
END $$;
"""
# Max rows of a transaction that changed a conversation, and of the other transactions.
LARGEST = """
SELECT coalesce(max(rows) FILTER (WHERE is_locked), 0), coalesce(max(rows) FILTER (WHERE NOT is_locked), 0) FROM (
    SELECT count(*) AS rows, bool_or(name = 'conversation') AS is_locked FROM change GROUP BY transaction
) each
"""
PEOPLE = """
WITH made AS (
    INSERT INTO "user" (name, email) SELECT 'p' || n, 'p' || n || '@example.org' FROM generate_series(1, $2::int) n
    RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id) SELECT $1, id FROM made
)
UPDATE conversation SET participant_count = participant_count + $2 WHERE id = $1
"""
REACT = """
WITH reacted AS (
    INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
    SELECT m.id, p.user_id, '👍', m.conversation_id, m.version, m.sender_id
    FROM message m JOIN conversation_participant p ON p.conversation_id = m.conversation_id
    WHERE m.id = ANY($1) AND p.role = 'member'
)
UPDATE message SET reactions = jsonb_build_object('👍', $2::int) WHERE id = ANY($1)
"""
VOTE = """
WITH voted AS (
    INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version)
    SELECT m.id, p.user_id, m.conversation_id, '{0}', m.version
    FROM message m JOIN conversation_participant p ON p.conversation_id = m.conversation_id
    WHERE m.id = $1 AND p.role = 'member'
)
UPDATE message SET poll_counts = ARRAY[$2::int, 0], poll_voters = $2 WHERE id = $1
"""
EDIT = """
INSERT INTO message_edit (id, message_id, content, edited_by, version, conversation_id)
SELECT gen_random_uuid(), m.id, 'Secret ' || n, m.sender_id, n, m.conversation_id
FROM message m, generate_series(1, $2) n WHERE m.id = $1
"""
REPORT = """
INSERT INTO report (conversation_id, message_id, reporter_id, reason)
SELECT m.conversation_id, m.id, p.user_id, 'Rude'
FROM message m JOIN conversation_participant p ON p.conversation_id = m.conversation_id
WHERE m.id = $1 AND p.role = 'member'
"""
REMAINS = """
SELECT (SELECT count(*) FROM message_reaction WHERE message_id = ANY($1))
    + (SELECT count(*) FROM poll_vote WHERE message_id = ANY($1))
"""


class Crowd:
    """Ada, who owns a channel in which many others take part."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.db = world.db

    async def begin(self) -> None:
        self.ada = await self.world.connect(await self.world.user("Ada"))
        self.about = await self.world.channel(self.ada, settings=ConversationSettings(expire_after_seconds=3600))
        await self.db.execute(PEOPLE, self.about, CROWD)
        await self.db.execute(COUNT)

    async def poll(self) -> MessageId:
        """Return a poll on which all participants voted, reacted and reported, and that was edited often."""
        poll = await sent(self.ada, self.about, "Tea?", payload=Poll(options=["Yes", "No"]))
        await self.db.execute(VOTE, poll, CROWD)
        await self.db.execute(REACT, [poll], CROWD)
        await self.db.execute(EDIT, poll, CROWD)
        await self.db.execute(REPORT, poll)
        await self.db.execute("TRUNCATE change")
        return poll

    async def largest(self) -> tuple[int, int]:
        """Return the max rows that a transaction changed with a conversation locked, and without."""
        return tuple(await self.db.fetchrow(LARGEST))  # type: ignore[arg-type]


@pytest.fixture
async def crowd(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Crowd]:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        crowd = Crowd(world)
        await crowd.begin()
        yield crowd


async def test_frames_about_a_message_change_few_rows_under_the_lock(crowd: Crowd) -> None:
    poll = await crowd.poll()
    frames = (
        client.ClosePoll(conversation_id=crowd.about, message_id=poll),
        client.Moderate(conversation_id=crowd.about, message_id=poll, reason="Rude"),
        client.Unmoderate(conversation_id=crowd.about, message_id=poll),
        client.Delete(conversation_id=crowd.about, message_id=poll),
    )
    for frame in frames:
        if isinstance(frame, client.Moderate | client.Unmoderate):
            await crowd.world.moderate_as_owner(frame)
        else:
            await crowd.ada.call(frame)
        locked, _ = await crowd.largest()
        assert (frame.__struct_config__.tag, locked <= MOST_ROWS) == (frame.__struct_config__.tag, True), locked
    assert await crowd.db.fetchval("SELECT count(*) FROM report WHERE status = 'open'") == 0


async def test_join_and_leave_make_few_round_trips_under_the_lock(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one takes a network's delay, during which nobody else writes there."""
    await crowd.db.execute("UPDATE conversation SET is_public = true WHERE id = $1", crowd.about)
    bob = await crowd.world.connect(await crowd.world.user("Bob"))
    for frame, lock, most in (
        (client.Join(conversation_id=crowd.about), joins.JOIN, 0),
        (client.Leave(conversation_id=crowd.about), locks.LOCK_AS_WITH_USER, 5),
    ):
        asked: list[tuple[Any, str]] = []
        with monkeypatch.context() as patch:
            for name in ("fetch", "fetchrow", "fetchval", "execute"):
                patch.setattr(asyncpg.Connection, name, noted(asked, getattr(asyncpg.Connection, name)))
            await bob.call(frame)
        connection = next(db for db, query in asked if query == lock)
        statements = [query for db, query in asked if db is connection]
        begun = statements.index(lock)
        end = statements.index("COMMIT", begun) if most else begun
        assert end - begun <= most, statements


def noted(asked: list[tuple[Any, str]], method: Any) -> Any:
    """Return a method of a connection that also adds the connection and the statement to a list."""

    async def called(db: Any, query: str, *args: Any, **options: Any) -> Any:
        asked.append((db, query))
        return await method(db, query, *args, **options)

    return called


async def test_messages_expire_in_batches_of_bounded_size(crowd: Crowd) -> None:
    worker = crowd.world.workers[0].app
    poll = await crowd.poll()
    others = [await sent(crowd.ada, crowd.about, f"Secret {number}") for number in range(3 * expiry.PORTION)]
    await crowd.db.execute(REACT, others, CROWD)
    await crowd.db.execute("TRUNCATE change")
    await crowd.db.execute("UPDATE message SET expires_at = now() WHERE conversation_id = $1", crowd.about)
    await expire_due(worker._database, worker.hub)  # noqa: SLF001 - due now
    locked, free = await crowd.largest()
    assert (locked <= MOST_ROWS, free <= expiry.PORTION * expiry.EDITS_AT_ONCE) == (True, True), (locked, free)
    for one in (poll, *others):
        event = await crowd.ada.event(server.MessageDeleted, lambda event, one=one: event.message.id == one)  # type: ignore[misc]
        assert (event.message.content, event.message.reactions, event.message.poll_counts) == ("", {}, None)
    # The words for search are deleted with the message.
    assert await crowd.db.fetchval("SELECT count(*) FROM message_edit") == 0
    assert await crowd.db.fetchval("SELECT count(*) FROM message WHERE content LIKE 'Secret%'") == 0
    # The remaining rows are deleted in batches, not under the lock.
    ids = [poll, *others]
    await crowd.db.execute("TRUNCATE change")
    while await worker.background.clear_remains():
        pass
    locked, free = await crowd.largest()
    assert (locked, free <= remains.MAX_ROWS) == (0, True), (locked, free)
    assert await crowd.db.fetchval(REMAINS, ids) == 0
    assert await crowd.db.fetchval("SELECT count(*) FROM message WHERE has_remains") == 0


async def test_reactions_and_votes_of_a_deleted_message_are_hidden_until_the_job_deletes_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        who = await world.user("Ada")
        ada = await world.connect(who)
        about = await world.channel(ada)
        poll = await sent(ada, about, "Tea?", payload=Poll(options=["Yes", "No"]))
        await ada.call(client.React(conversation_id=about, message_id=poll, emoji="👍"))
        await ada.call(client.Vote(conversation_id=about, message_id=poll, options=[0]))
        role = f"reader_{uuid7().hex}"
        await world.db.execute(f"CREATE ROLE {role}; SELECT grant_reader('{role}')")
        seen = "SELECT (SELECT count(*) FROM message_reaction) + (SELECT count(*) FROM poll_vote)"

        async def shown() -> tuple[int, int, dict[str, int], list[str], list[int]]:
            await world.db.execute(f"SET openchat.user_id = '{who.id}'; SET ROLE {role}")
            by_reader = await world.db.fetchval(seen)
            await world.db.execute("RESET ROLE")
            pieces = [piece async for piece in written(world.workers[0].app._database.connection, who.id)]  # noqa: SLF001
            export = msgspec.json.decode(b"".join(pieces), type=Export, dec_hook=json_object.read)
            got = await ada.call(client.GetMessage(conversation_id=about, message_id=poll), server.OneMessage)
            return by_reader, len(export.reactions) + len(export.votes), got.message.reactions, got.mine, got.vote

        try:
            assert await shown() == (2, 2, {"👍": 1}, ["👍"], [0])
            await ada.call(client.Delete(conversation_id=about, message_id=poll))
            assert await world.db.fetchval(REMAINS, [poll]) == 2
            assert await shown() == (0, 0, {}, [], [])
            with refused(ErrorCode.NOT_FOUND, "message_id"):
                await ada.call(client.ListVotes(conversation_id=about, message_id=poll))
            found = await changes.since(world.db, about, 0, limit=100)
            assert found is not None
            difference = await found.decoded()
            assert [type(event) for event in difference.changes.events if event.version >= 3] == [
                server.MessageUnreacted, server.MessageDeleted,
            ]  # fmt: skip
            assert (
                not await world.workers[0].app.background.clear_remains()
                or not await world.workers[0].app.background.clear_remains()
            )
            assert await world.db.fetchval(REMAINS, [poll]) == 0
        finally:
            await world.db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


DRAFTS = """
INSERT INTO draft (user_id, conversation_id, content, user_version)
SELECT p.user_id, $1, 'Secret', 1 FROM conversation_participant p WHERE p.conversation_id = $1
"""
WRITTEN = "SELECT count(*) FROM draft WHERE content <> ''"


async def test_drafts_in_a_deleted_conversation_are_hidden_and_emptied_in_batches(crowd: Crowd) -> None:
    """Rows of some authors may be locked, and the job may end between its commit and its events."""
    world, worker = crowd.world, crowd.world.workers[0].app
    who = await world.user("Charles")
    charles = await world.connect(who)
    await crowd.db.execute("UPDATE conversation SET is_public = true WHERE id = $1", crowd.about)
    await charles.call(client.Join(conversation_id=crowd.about))
    await charles.call(client.SetDraft(conversation_id=crowd.about, content="Secret"))
    await charles.event(server.DraftChanged, lambda event: event.draft.content == "Secret")
    await crowd.db.execute(DRAFTS + " ON CONFLICT DO NOTHING", crowd.about)

    async def shown() -> tuple[int, int, list[str]]:
        pieces = [piece async for piece in written(worker._database.connection, who.id)]  # noqa: SLF001
        export = msgspec.json.decode(b"".join(pieces), type=Export, dec_hook=json_object.read)
        drafts = (await charles.call(client.ListDrafts(), server.DraftList)).drafts
        news = (await (await own_news.read(crowd.db, who.id, 0, limit=100)).decoded()).events
        told = [event.draft.content for event in news if isinstance(event, server.DraftChanged)]
        return len(export.drafts), len(drafts), told

    assert await shown() == (1, 1, ["Secret"])
    holder = await asyncpg.connect(world.settings.database_url)
    try:
        async with holder.transaction():
            await holder.execute("""SELECT FROM "user" WHERE id = $1 OR name IN ('p7', 'p8') FOR UPDATE""", who.id)
            await crowd.db.execute("TRUNCATE change")
            await crowd.ada.call(client.DeleteConversation(conversation_id=crowd.about))
            locked, _ = await crowd.largest()
            assert (locked <= MOST_ROWS, await crowd.db.fetchval(WRITTEN)) == (True, CROWD + 2), locked
            assert await shown() == (0, 0, [""])
            await crowd.db.execute("TRUNCATE change")
            while await worker.background.clear_remains():
                pass
            locked, free = await crowd.largest()
            # The row of the user and the draft.
            assert (locked, free <= 2 * remains.USERS_AT_ONCE) == (0, True), (locked, free)
            assert await crowd.db.fetchval(WRITTEN) == 3
    finally:
        await holder.close()
    emptied = await remains.empty(crowd.db)
    assert (len(emptied.user_ids), await crowd.db.fetchval(WRITTEN)) == (3, 0)
    worker.hub.comparisons.soon()
    await charles.event(server.DraftChanged, lambda event: event.draft.content == "")
    assert not await worker.background.clear_remains()
    assert await crowd.db.fetchval("SELECT count(*) FROM conversation WHERE has_remains") == 0


# A user with several of everything that a user can have, beside what the constraints forbid.
HOARD = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, settings_version, version, participant_count)
    SELECT 'group', 'c' || n, $1, 1, 2, 1 FROM generate_series(1, $2::int) n RETURNING id
), numbered AS (
    SELECT id, row_number() OVER () AS n FROM made
), others AS (
    INSERT INTO "user" (name, email) SELECT 'o' || n, 'o' || n || '@example.org' FROM generate_series(1, $2) n
    RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, status, left_at, pin_order, last_read_at, version)
    SELECT id, $1, 'left', now(), 1, now(), 2 FROM numbered
), drafted AS (
    INSERT INTO draft (user_id, conversation_id, content, user_version) SELECT $1, id, '', n FROM numbered
), said AS (
    INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version, is_deleted)
    SELECT gen_random_uuid(), id, $1, '', 1, 1, n % 2 = 0 FROM numbered RETURNING id, conversation_id, is_deleted
), edited AS (
    INSERT INTO message_edit (id, message_id, content, edited_by, version, conversation_id)
    SELECT gen_random_uuid(), s.id, 'Secret', $1, n, s.conversation_id FROM said s, generate_series(1, 3) n
), starred AS (
    INSERT INTO message_star (user_id, message_id, conversation_id, user_version)
    SELECT $1, id, conversation_id, 1 FROM said
), followed AS (
    INSERT INTO thread_follow (root_id, user_id, conversation_id, is_following, last_read_order)
    SELECT id, $1, conversation_id, is_deleted, 7 FROM said
), scheduled AS (
    INSERT INTO scheduled_message (id, sender_id, conversation_id, words, send_at, status, user_version)
    SELECT gen_random_uuid(), $1, id, '{}', now(), 'sent', n FROM numbered
), reported AS (
    INSERT INTO report (conversation_id, message_id, reporter_id, reason)
    SELECT conversation_id, id, $1, 'Secret' FROM said
), reached AS (
    INSERT INTO approach (from_user_id, to_user_id, kind)
    SELECT $1, id, 'follow' FROM others UNION ALL SELECT id, $1, 'follow' FROM others
)
INSERT INTO user_relationship (from_user_id, to_user_id, type, status)
SELECT $1, id, 'mute', 'active' FROM others UNION ALL SELECT id, $1, 'follow', 'active' FROM others
"""
HOARDED = """
SELECT (SELECT count(*) FROM draft WHERE user_id = $1) + (SELECT count(*) FROM message_star WHERE user_id = $1)
    + (SELECT count(*) FROM scheduled_message WHERE sender_id = $1) + (SELECT count(*) FROM approach)
    + (SELECT count(*) FROM thread_follow WHERE user_id = $1 AND (is_following OR last_read_order > 0))
    + (SELECT count(*) FROM report WHERE reporter_id = $1 AND reason <> 'Erased')
    + (SELECT count(*) FROM conversation_participant WHERE user_id = $1 AND num_nonnulls(pin_order, last_read_at) > 0)
    + (SELECT count(*) FROM message_edit e JOIN message m ON m.id = e.message_id WHERE m.is_deleted)
    + (SELECT count(*) FROM user_relationship r WHERE r.status = 'active')
"""


class Crash(Exception):  # noqa: N818 - it stands for a crash of the process
    """The process crashes."""


class Failing(Single):
    """A database that a process uses for a number of transactions before it crashes."""

    def __init__(self, db: Db, left: int) -> None:
        super().__init__(db)
        self.left = left

    async def atomically(self, what: str, work: Callable[[Db], Awaitable[Any]]) -> Any:
        """Run `work` in a transaction, or raise `Crash`."""
        if self.left == 0:
            raise Crash
        self.left -= 1
        return await super().atomically(what, work)


async def test_erasure_deletes_rows_in_bounded_batches_and_resumes_after_a_crash(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = await crowd.world.user("Charles")
    portion, number = 10, 45
    monkeypatch.setattr(erasure, "PORTION", portion)
    monkeypatch.setattr(erasure, "RELATED_AT_ONCE", portion)
    await crowd.db.execute(HOARD, who.id, number)
    assert await crowd.db.fetchval(HOARDED, who.id) > 10 * number
    await crowd.db.execute("TRUNCATE change")
    is_erased = 'SELECT erased_at IS NOT NULL FROM "user" WHERE id = $1'
    ended, crashes = False, 0
    while not ended:
        assert not await crowd.db.fetchval(is_erased, who.id)
        try:
            # Each attempt starts from the beginning, so each gets a little further.
            await erase(Failing(crowd.db, 10 + 15 * crashes), who.id, lambda _: None)
            ended = True
        except Crash:
            crashes += 1
    locked, free = await crowd.largest()
    # A batch of relationships also changes one row per other user, and a batch of the rest mixes several kinds.
    assert (crashes > 1, locked, free <= 4 * portion) == (True, 0, True), (crashes, locked, free)
    assert (await crowd.db.fetchval(is_erased, who.id), await crowd.db.fetchval(HOARDED, who.id)) == (True, 0)
    assert await crowd.db.fetchval(erasure.IS_ERASED, who.id)
    assert await crowd.db.fetchval("SELECT count(*) FROM message_edit") == 3 * (number - number // 2)
