"""Work under the lock of a conversation does not grow with what participants put there."""

from collections.abc import AsyncIterator

import pytest

from protocol import client, server
from protocol.ids import MessageId
from protocol.payloads import Poll
from protocol.values import ConversationSettings
from server.config import Settings
from server.expiry import expire_due
from server.queries import expiry, remains
from tests.world import World, sent

CROWD = 300
"""Participants who react, vote and report: more than any transaction may change rows of."""
MOST_ROWS = 80
"""Max rows that one transaction changes while it holds a conversation."""

# Counts the rows that each transaction changes, in a table that the counted transactions write themselves.
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
# The largest transaction of those that changed a conversation, and the largest of the others.
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
        """Return a poll that everyone has voted in, reacted to and reported, and that was edited often."""
        poll = await sent(self.ada, self.about, "Tea?", payload=Poll(options=["Yes", "No"]))
        await self.db.execute(VOTE, poll, CROWD)
        await self.db.execute(REACT, [poll], CROWD)
        await self.db.execute(EDIT, poll, CROWD)
        await self.db.execute(REPORT, poll)
        await self.db.execute("TRUNCATE change")
        return poll

    async def largest(self) -> tuple[int, int]:
        """Return the most rows that a transaction has changed with a conversation locked, and without."""
        return tuple(await self.db.fetchrow(LARGEST))  # type: ignore[arg-type]


@pytest.fixture
async def crowd(settings: Settings) -> AsyncIterator[Crowd]:
    async with World(settings, workers=1) as world:
        crowd = Crowd(world)
        await crowd.begin()
        yield crowd


async def test_no_frame_about_a_message_changes_rows_of_a_crowd_under_the_lock(crowd: Crowd) -> None:
    poll = await crowd.poll()
    frames = (
        client.ClosePoll(conversation_id=crowd.about, message_id=poll),
        client.Moderate(conversation_id=crowd.about, message_id=poll, reason="Rude"),
        client.Unmoderate(conversation_id=crowd.about, message_id=poll),
        client.Delete(conversation_id=crowd.about, message_id=poll),
    )
    for frame in frames:
        await crowd.ada.call(frame)
        locked, _ = await crowd.largest()
        assert (frame.__struct_config__.tag, locked <= MOST_ROWS) == (frame.__struct_config__.tag, True), locked
    assert await crowd.db.fetchval("SELECT count(*) FROM report WHERE status = 'open'") == 0


async def test_messages_expire_in_portions_that_do_not_grow_with_a_crowd(crowd: Crowd) -> None:
    app = crowd.world.workers[0].app
    poll = await crowd.poll()
    others = [await sent(crowd.ada, crowd.about, f"Secret {number}") for number in range(3 * expiry.PORTION)]
    await crowd.db.execute(REACT, others, CROWD)
    await crowd.db.execute("TRUNCATE change")
    await crowd.db.execute("UPDATE message SET expires_at = now() WHERE conversation_id = $1", crowd.about)
    await expire_due(app._database, app.hub)  # noqa: SLF001 - due now
    locked, free = await crowd.largest()
    assert (locked <= MOST_ROWS, free <= expiry.PORTION * expiry.EDITS_AT_ONCE) == (True, True), (locked, free)
    for one in (poll, *others):
        event = await crowd.ada.event(server.MessageDeleted, lambda event, one=one: event.message.id == one)  # type: ignore[misc]
        assert (event.message.content, event.message.reactions, event.message.poll_counts) == ("", {}, None)
    # Words are gone with the message.
    assert await crowd.db.fetchval("SELECT count(*) FROM message_edit") == 0
    assert await crowd.db.fetchval("SELECT count(*) FROM message WHERE content LIKE 'Secret%'") == 0
    # What is left is deleted in portions, and not under the lock.
    ids = [poll, *others]
    await crowd.db.execute("TRUNCATE change")
    while await app.clear_remains():
        pass
    locked, free = await crowd.largest()
    assert (locked, free <= remains.AT_ONCE) == (0, True), (locked, free)
    assert await crowd.db.fetchval(REMAINS, ids) == 0
    assert await crowd.db.fetchval("SELECT count(*) FROM message WHERE has_remains") == 0
