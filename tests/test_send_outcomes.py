"""`send_messages()` returns an outcome for each message of a batch, as if it had been sent alone."""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, get_args

import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.server import Error
from protocol.values import ConversationSettings
from server.core.config import Settings
from server.db.database import Db
from server.fairness.lanes import Held
from server.handlers.sending import REFUSALS
from server.queries import batches, sending
from server.queries.sending import Derived, NotStored, Outgoing, Reason, Source, Stored
from tests.world import UserSession, World, message, refused, sent, until

SLOW = ConversationSettings(slow_mode_seconds=3_600)


class Stage:
    """Conversations with every obstacle to messages from Charles, and none to Ada's."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def begin(self) -> None:
        names = ("Ada", "Charles", "Mary", "Gone", "Unfriendly")
        self.ada, self.charles, self.mary, self.gone, self.unfriendly = people = await self.world.users(*names)
        self.owner, self.member, other, gone, unfriendly = [await self.world.connect(one) for one in people]
        self.group = await self.world.group(self.owner, self.charles, self.gone, title="Group")
        self.archived = await self.world.group(self.owner, self.charles, title="Archived")
        self.announcements = await self.world.group(
            self.owner, self.charles, title="Announcements", settings=ConversationSettings(send_role="admin")
        )
        self.slow = await self.world.group(self.owner, self.charles, title="Slow", settings=SLOW)
        self.late = await self.world.group(
            self.owner, self.mary, title="Late", settings=ConversationSettings(history="from_joining")
        )
        self.elsewhere = await self.world.channel(other, title="Elsewhere")
        frame = client.CreateDirect(user_id=self.charles.id)
        self.direct = (await unfriendly.call(frame, server.OneConversation)).view.conversation.id
        self.said = await sent(self.owner, self.group, "Said")
        self.deleted = await sent(self.owner, self.group, "Deleted")
        self.early = await sent(self.owner, self.late, "Before Charles came")
        self.foreign = await sent(other, self.elsewhere, "Elsewhere")
        await self.owner.call(client.AddParticipants(conversation_id=self.late, participants=[self.charles.id]))
        await self.owner.call(client.Delete(conversation_id=self.group, message_id=self.deleted))
        await self.owner.call(client.UpdateConversation(conversation_id=self.archived, is_archived=True))
        await unfriendly.call(client.Block(user_id=self.charles.id))
        await gone.close()
        await self.world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', self.gone.id)

    def out(self, about: ConversationId, who: UserSession | None = None, **fields: Any) -> Outgoing:
        return Outgoing((who or self.charles).id, message(about, **fields))

    def forwarded(self, source: MessageId, about: ConversationId) -> Outgoing:
        return Outgoing(self.charles.id, message(self.group), source=Source(about, source, self.ada.id, None))


@pytest.fixture
async def stage(world: World) -> Stage:
    stage = Stage(world)
    await stage.begin()
    return stage


def again(out: Outgoing, message_id: MessageId) -> Outgoing:
    return out._replace(frame=msgspec.structs.replace(out.frame, message_id=message_id))


WAYS: list[tuple[str, Callable[[Stage], Outgoing]]] = [
    ("stored", lambda on: on.out(on.group)),
    ("stored", lambda on: on.out(on.group, parent_message_id=on.said)),
    ("stored", lambda on: on.out(on.group, quoted_message_id=on.said)),
    ("stored", lambda on: on.forwarded(on.said, on.group)),
    ("stored", lambda on: on.out(on.announcements, on.ada)),
    ("stored", lambda on: on.out(on.slow, on.ada)),
    ("stored", lambda on: Outgoing(on.ada.id, message(on.group), Derived(loud_mentions=["everyone"]))),
    ("stored", lambda on: on.out(on.elsewhere, on.mary)),
    ("stored", lambda on: on.out(on.late)),
    ("duplicate", lambda on: again(on.out(on.group), on.said)),
    ("duplicate", lambda on: again(on.out(on.group), on.foreign)),
    ("duplicate", lambda on: again(on.out(on.elsewhere), on.early)),
    ("no_access", lambda on: on.out(on.elsewhere)),
    ("no_access", lambda on: on.out(ConversationId(uuid7()))),
    ("inactive", lambda on: on.out(on.group, on.gone)),
    ("archived", lambda on: on.out(on.archived)),
    ("archived", lambda on: on.out(on.archived, on.ada)),
    ("role", lambda on: on.out(on.announcements)),
    ("unwanted", lambda on: on.out(on.direct)),
    ("unwanted", lambda on: on.out(on.direct, on.unfriendly)),
    ("loud", lambda on: Outgoing(on.charles.id, message(on.group), Derived(loud_mentions=["everyone"]))),
    ("missing_parent", lambda on: on.out(on.group, parent_message_id=MessageId(uuid7()))),
    ("missing_parent", lambda on: on.out(on.group, parent_message_id=on.deleted)),
    ("missing_parent", lambda on: on.out(on.group, parent_message_id=on.foreign)),
    ("missing_parent", lambda on: on.out(on.late, parent_message_id=on.early)),
    ("missing_quoted", lambda on: on.out(on.group, quoted_message_id=MessageId(uuid7()))),
    ("missing_quoted", lambda on: on.out(on.group, quoted_message_id=on.deleted)),
    ("missing_quoted", lambda on: on.out(on.late, quoted_message_id=on.early)),
    ("source_changed", lambda on: on.forwarded(on.deleted, on.group)),
    ("source_changed", lambda on: on.forwarded(on.foreign, on.elsewhere)),
    ("source_changed", lambda on: on.forwarded(on.said, on.elsewhere)),
]
"""Expected outcomes of messages, in one batch or alone."""


def reason(outcome: Stored | NotStored | Held) -> str:
    assert not isinstance(outcome, Held)
    return "stored" if isinstance(outcome, Stored) else outcome.reason


async def test_each_message_of_a_batch_has_its_outcome(stage: Stage) -> None:
    outcomes = await sending.send(stage.world.db, [make(stage) for _, make in WAYS])
    assert [reason(one) for one in outcomes] == [expected for expected, _ in WAYS]
    # Versions are consecutive, in the order of the batch.
    clock = await stage.world.db.fetchval("SELECT version FROM conversation WHERE id = $1", stage.group)
    versions = [one.version for one, (_, make) in zip(outcomes, WAYS, strict=True)
                if isinstance(one, Stored) and make(stage).frame.conversation_id == stage.group]  # fmt: skip
    assert versions == list(range(clock - len(versions) + 1, clock + 1))


def test_each_reason_has_a_message_and_an_error() -> None:
    reasons = set(get_args(Reason))
    assert reasons - {expected for expected, _ in WAYS} == {"changed", "slow"}  # tested below
    # `_store` retries these, or returns the first answer.
    assert reasons - REFUSALS.keys() == {"changed", "loud", "duplicate"}


async def alone(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored | Held]:
    return [outcome for one in batch for outcome in await sending.send(db, [one])]


async def plainly(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored | Held]:
    """Store plain messages by their own statement, one by one, and judge those that it leaves."""
    outcomes: list[Stored | NotStored | Held] = []
    for one in batch:
        (stored,) = await sending.send_plain(db, [one]) if sending.is_plain(one) else [None]
        outcomes += [stored] if stored is not None else await sending.send(db, [one])
    return outcomes


async def plainly_together(db: Db, batch: Sequence[Outgoing]) -> list[Stored | NotStored | Held]:
    """Do the same with the whole batch."""
    stored = await sending.send_plain(db, batch)
    left = iter(await sending.send(db, [one for one, is_there in zip(batch, stored, strict=True) if is_there is None]))
    return [next(left) if one is None else one for one in stored]


def told(outcomes: Sequence[Stored | NotStored | Held], batch: Sequence[Outgoing]) -> list[tuple[object, ...]]:
    """Return the parts that are equal in one batch and alone: all except times and reply counts."""
    found: list[tuple[object, ...]] = []
    for outcome, out in zip(outcomes, batch, strict=True):
        if isinstance(outcome, Stored):
            found.append((out.frame.message_id, outcome.version, outcome.root_id, outcome.thread_order))
        else:
            # A second message with the same id is left out of the statement, and finds the first one on retry.
            found.append((out.frame.message_id, reason(outcome).replace("changed", "duplicate")))
    return found


STORED = """
SELECT json_agg(to_jsonb(m) - '{created_at,updated_at,expires_at}'::text[] ORDER BY m.id),
    (SELECT json_agg(ARRAY[c.id::text, c.version::text, c.message_count::text] ORDER BY c.id) FROM conversation c),
    (SELECT json_agg(to_jsonb(t) - '{updated_at}'::text[] ORDER BY t.root_id, t.user_id) FROM thread_follow t),
    (SELECT json_agg(ARRAY[s.message_id::text, s.words::text] ORDER BY s.message_id) FROM message_search s),
    (SELECT json_agg(i ORDER BY i) FROM search_queue q CROSS JOIN unnest(q.message_ids) i)
FROM message m
"""


@pytest.mark.parametrize("seed", range(4))
async def test_batch_stores_the_same_as_single_messages(stage: Stage, seed: int) -> None:
    dice = random.Random(seed)
    db = stage.world.db
    await stage.world.indexed()
    makers = [make for _, make in WAYS]
    for _ in range(8):
        batch = [make(stage) for make in dice.choices(makers, k=dice.randint(1, 24))]
        results = []
        for way in (sending.send, alone, plainly):
            transaction = db.transaction()
            await transaction.start()
            outcomes = await way(db, batch)
            results.append((told(outcomes, batch), tuple(await db.fetchrow(STORED))))  # type: ignore[arg-type]
            await transaction.rollback()
        assert results[0] == results[1] == results[2], seed


@pytest.mark.parametrize("seed", range(2))
async def test_plain_statement_stores_the_same_as_the_function(stage: Stage, seed: int) -> None:
    dice = random.Random(seed)
    db = stage.world.db
    await stage.world.indexed()
    makers = [make for _, make in WAYS if sending.is_plain(make(stage))]
    for _ in range(8):
        batch = [make(stage) for make in dice.choices(makers, k=dice.randint(1, 24))]
        results = []
        for way in (sending.send, plainly_together):
            transaction = db.transaction()
            await transaction.start()
            outcomes = await way(db, batch)
            results.append((told(outcomes, batch), tuple(await db.fetchrow(STORED))))  # type: ignore[arg-type]
            await transaction.rollback()
        assert results[0] == results[1], seed


async def test_reply_to_and_quote_of_a_message_in_the_same_batch_are_retried(stage: Stage) -> None:
    new = stage.out(stage.group)
    about = new.frame.message_id
    batch = [new, stage.out(stage.group, parent_message_id=about), stage.out(stage.group, quoted_message_id=about)]
    outcomes = await sending.send(stage.world.db, batch)
    assert [reason(one) for one in outcomes] == ["stored", "changed", "changed"]
    outcomes = await sending.send(stage.world.db, batch)
    assert [reason(one) for one in outcomes] == ["duplicate", "stored", "stored"]


async def test_reply_that_waits_with_its_parent_is_stored(stage: Stage) -> None:
    other = await stage.world.connect(stage.charles)
    lanes = stage.world.workers[0].app._sends.lanes._lanes  # noqa: SLF001 - messages that wait for the conversation
    first, parent = message(stage.group), message(stage.group)
    reply = message(stage.group, parent_message_id=parent.message_id)
    async with asyncio.timeout(10):
        async with stage.world.db.transaction():
            await stage.world.db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", stage.group)
            waiting = [asyncio.ensure_future(stage.owner.ask(first))]
            await until(lambda: stage.group in lanes)
            waiting += [
                asyncio.ensure_future(one.ask(frame)) for one, frame in ((stage.member, parent), (other, reply))
            ]
            await until(lambda: sum(map(len, lanes[stage.group]._waiting._lines.values())) == 2)  # noqa: SLF001
        answers = await asyncio.gather(*waiting)
    assert [answer for answer in answers if isinstance(answer, Error)] == []


async def test_slow_mode_accepts_one_of_many_concurrent_messages(stage: Stage) -> None:
    frames = [message(stage.slow, f"{number}") for number in range(20)]
    answers = await asyncio.gather(*(stage.member.ask(frame) for frame in frames))
    errors = [answer for answer in answers if isinstance(answer, Error)]
    assert len(errors) == len(frames) - 1
    assert {error.code for error in errors} == {ErrorCode.RATE_LIMITED}
    assert all(error.retry_after_ms is not None and 3_500_000 < error.retry_after_ms <= 3_600_000 for error in errors)
    await stage.world.db.execute(
        "UPDATE conversation_participant SET last_sent_at = last_sent_at - $1::interval", timedelta(hours=1)
    )
    await sent(stage.member, stage.slow, "An hour later")


async def test_second_message_of_a_batch_in_slow_mode_is_checked_again(stage: Stage) -> None:
    batch = [stage.out(stage.slow), stage.out(stage.slow), stage.out(stage.slow, stage.ada)]
    assert [reason(one) for one in await sending.send(stage.world.db, batch)] == ["stored", "changed", "stored"]
    (second,) = await sending.send(stage.world.db, batch[1:2])
    assert isinstance(second, NotStored)
    assert second.reason == "slow"
    assert 3_500_000 < second.wait_ms <= 3_600_000


async def test_slow_mode_refuses_while_the_conversation_is_locked(stage: Stage) -> None:
    await sent(stage.member, stage.slow)
    async with stage.world.db.transaction(), asyncio.timeout(10):
        await stage.world.db.execute("SELECT FROM conversation WHERE id = $1 FOR UPDATE", stage.slow)
        with refused(ErrorCode.RATE_LIMITED, "conversation_id"):
            await stage.member.call(message(stage.slow))


async def test_locked_participant_delays_no_others_in_slow_mode(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ALONE_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        stage = Stage(world)
        await stage.begin()
        async with world.db.transaction(), asyncio.timeout(10):
            await world.db.execute(
                "SELECT FROM conversation_participant WHERE user_id = $1 FOR UPDATE", stage.charles.id
            )
            with refused(ErrorCode.UNAVAILABLE, None):
                await stage.member.call(message(stage.slow))
            await sent(stage.owner, stage.slow, "Meanwhile")
        await sent(stage.member, stage.slow, "Now")


async def test_right_granted_before_the_lock_is_found_on_retry(stage: Stage) -> None:
    """A sender without the right takes no lock. A right granted in between is found on retry."""
    db = stage.world.db
    await db.execute(PROMOTE)
    (outcome,) = await sending.send(db, [stage.out(stage.announcements)])
    assert reason(outcome) == "role"
    batch = [stage.out(stage.announcements), stage.out(stage.announcements, stage.ada)]
    assert [reason(one) for one in await sending.send(db, batch)] == ["changed", "stored"]
    assert [reason(one) for one in await sending.send(db, batch)] == ["stored", "duplicate"]


PROMOTE = """
ALTER FUNCTION lock_conversations RENAME TO locked_of;
CREATE FUNCTION lock_conversations(uuid[], boolean) RETURNS uuid[] LANGUAGE plpgsql AS $$
BEGIN
    UPDATE public.conversation_participant SET role = 'admin' WHERE conversation_id = ANY($1);
    RETURN public.locked_of($1, $2);
END $$
"""
"""A replacement of `lock_conversations()` that changes roles."""


async def test_unknown_sender_has_no_access(stage: Stage) -> None:
    (outcome,) = await sending.send(stage.world.db, [Outgoing(UserId(uuid7()), message(stage.group))])
    assert outcome == NotStored("no_access")
