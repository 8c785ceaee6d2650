"""Reactions are changed in batches. Each change has its outcome, as if it had been made alone."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest

from protocol import client, server
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.limits import MAX_EMOJI_OF_USER, MAX_EMOJI_PER_MESSAGE
from protocol.server import MessageReacted, MessageUnreacted
from prove.client import Client
from prove.truth import recount
from server.core.config import Settings
from server.fairness.lanes import Held
from server.handlers.reactions import REFUSALS
from server.queries import batches, reactions
from server.queries.reactions import NotChanged, ReactionChange, ReactionRequest, Reason
from tests import test_send_outcomes
from tests.test_may_send import waiting
from tests.test_send_waits import LOCKED
from tests.world import Room, UserSession, World, received_message, sent, until

SAY = """
WITH c AS (UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING id, version)
INSERT INTO message (id, conversation_id, sender_id, content, sent_version, version)
SELECT $2, c.id, $3, 'Said', c.version, c.version FROM c
"""
REACT = """
WITH reacted AS (
    INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id, is_removed)
    SELECT m.id, $2, ':e' || n || ':', m.conversation_id, m.version, m.sender_id, $4
    FROM message m, generate_series(1, $3::int) n WHERE m.id = $1 RETURNING emoji, is_removed
)
UPDATE message SET reactions = coalesce(
    (SELECT jsonb_object_agg(emoji, 1) FILTER (WHERE NOT is_removed) FROM reacted), '{}'
) WHERE id = $1
"""


class Stage(test_send_outcomes.Stage):
    """The stage of messages. Charles has reacted with `:e1:` to messages with every obstacle."""

    async def begin(self) -> None:
        await super().begin()
        self.places: dict[str, tuple[ConversationId, MessageId]] = {}
        for name, about, who, count, is_removed in (
            ("said", self.group, self.charles, 1, False),
            ("archived", self.archived, self.charles, 1, False),
            ("announcements", self.announcements, self.charles, 1, False),
            ("direct", self.direct, self.charles, 1, False),
            ("slow", self.slow, self.charles, 1, False),
            ("full", self.group, self.ada, MAX_EMOJI_PER_MESSAGE, False),
            ("used", self.group, self.charles, MAX_EMOJI_OF_USER, True),
        ):
            self.places[name] = about, MessageId(uuid7())
            await self.world.db.execute(SAY, *self.places[name], self.ada.id)
            await self.world.db.execute(REACT, self.places[name][1], who.id, count, is_removed)
        self.places |= {
            "deleted": (self.group, self.deleted), "foreign": (self.elsewhere, self.foreign),
            "early": (self.late, self.early), "misplaced": (self.group, self.foreign),
            "unknown": (self.group, MessageId(uuid7())),
        }  # fmt: skip
        await self.world.db.execute(
            "UPDATE conversation_participant SET last_sent_at = now() WHERE conversation_id = $1", self.slow
        )

    def add(self, place: str, emoji: str = "👍", who: UserSession | None = None) -> ReactionRequest:
        return ReactionRequest(*self.places[place], (who or self.charles).id, emoji, emoji, is_added=True)

    def remove(self, place: str, emoji: str = ":e1:") -> ReactionRequest:
        return self.add(place, emoji)._replace(is_added=False)


@pytest.fixture
async def stage(world: World) -> Stage:
    stage = Stage(world)
    await stage.begin()
    return stage


WAYS: list[tuple[str, Callable[[Stage], ReactionRequest]]] = [
    ("stored", lambda on: on.add("foreign", who=on.mary)),
    ("stored", lambda on: on.add("said")),
    ("stored", lambda on: on.add("said", ":e1:", on.ada)),
    ("stored", lambda on: on.remove("said")),
    ("stored", lambda on: on.add("full", ":e1:")),
    ("stored", lambda on: on.remove("archived")),
    ("stored", lambda on: on.remove("direct")),
    ("unchanged", lambda on: on.add("said", ":e1:")),
    ("unchanged", lambda on: on.add("archived", ":e1:")),
    ("unchanged", lambda on: on.add("announcements", ":e1:")),
    ("unchanged", lambda on: on.add("direct", ":e1:")),
    ("unchanged", lambda on: on.add("slow", ":e1:")),
    ("unchanged", lambda on: on.remove("full")),
    ("unchanged", lambda on: on.remove("used")),
    ("missing", lambda on: on.add("deleted")),
    ("missing", lambda on: on.add("foreign")),
    ("missing", lambda on: on.add("misplaced")),
    ("missing", lambda on: on.add("early")),
    ("missing", lambda on: on.remove("unknown")),
    ("inactive", lambda on: on.add("said", who=on.gone)),
    ("archived", lambda on: on.add("archived", who=on.ada)),
    ("role", lambda on: on.add("announcements")),
    ("unwanted", lambda on: on.add("direct")),
    ("unwanted", lambda on: on.add("direct", who=on.unfriendly)),
    ("slow", lambda on: on.add("slow")),
    ("too_many_of_user", lambda on: on.add("used")),
    ("too_many_of_message", lambda on: on.add("full")),
]
"""Expected outcomes of changes, which do not depend on the others in a batch."""


def reason(outcome: ReactionChange | NotChanged | Held) -> str:
    assert not isinstance(outcome, Held)
    if isinstance(outcome, NotChanged):
        return outcome.reason
    return "unchanged" if outcome.total is None else "stored"


def apart(stage: Stage, ways: list[int]) -> Iterator[list[int]]:
    """Divide ways into batches with at most one change of a user to a message, in order."""
    while ways:
        first: dict[tuple[UserId, MessageId], int] = {}
        for way in ways:
            change = WAYS[way][1](stage)
            first.setdefault((change.user_id, change.message_id), way)
        yield list(first.values())
        ways = [way for way in ways if way not in first.values()]


STATE = """
SELECT json_agg(ARRAY[m.id::text, m.reactions::text] ORDER BY m.id),
    (SELECT json_agg(ARRAY[c.id::text, c.version::text] ORDER BY c.id) FROM conversation c),
    (SELECT json_agg(to_jsonb(r) - 'created_at' ORDER BY r.message_id, r.user_id, r.emoji) FROM message_reaction r)
FROM message m
"""


async def test_each_change_of_a_batch_has_its_outcome_and_the_effect_that_it_has_alone(stage: Stage) -> None:
    db, dice = stage.world.db, random.Random(7)
    for ways in apart(stage, list(range(len(WAYS)))):
        for _ in range(4):
            batch, results = [WAYS[way][1](stage) for way in ways], []
            for parts in ([batch], [[one] for one in batch]):
                transaction = db.transaction()
                await transaction.start()
                outcomes = [outcome for part in parts for outcome in await reactions.change(db, part)]
                results.append((outcomes, tuple(await db.fetchrow(STATE) or ())))
                await transaction.rollback()
            assert [reason(one) for one in results[0][0]] == [WAYS[way][0] for way in ways]
            assert results[0][1] == results[1][1]
            # The time until the next message in slow mode differs.
            assert [one[:1] if isinstance(one, NotChanged) else one for one in results[0][0]] == [
                one[:1] if isinstance(one, NotChanged) else one for one in results[1][0]
            ]
            dice.shuffle(ways)


def test_each_reason_has_a_change_and_an_error() -> None:
    assert set(get_args(Reason)) - {expected for expected, _ in WAYS} == {"changed"}
    assert set(get_args(Reason)) - REFUSALS.keys() == {"changed"}


JOIN = "INSERT INTO conversation_participant (conversation_id, user_id) VALUES ($1, $2)"


async def test_last_free_emoji_of_a_message_is_given_once(stage: Stage) -> None:
    """The others with the same emoji share it."""
    _, message_id = stage.places["full"]
    await stage.world.db.execute(
        "UPDATE message SET reactions = reactions - ARRAY[':e1:', ':e2:', ':e3:'] WHERE id = $1", message_id
    )
    people = await stage.world.users(*(f"User {number}" for number in range(6)))
    for who in people:
        await stage.world.db.execute(JOIN, stage.group, who.id)
    batch = [stage.add("full", emoji, who) for emoji, who in zip("👍👎👍🎉👀👎", people, strict=True)]
    outcomes = await reactions.change(stage.world.db, batch)
    assert [reason(one) for one in outcomes] == ["stored"] * 4 + ["too_many_of_message", "stored"]
    assert [one.total for one in outcomes if isinstance(one, ReactionChange)] == [1, 1, 2, 1, 2]


def reacted(one: Client) -> list[MessageReacted | MessageUnreacted]:
    events = [one for event in one.events for one in getattr(event, "events", [event])]
    return [event for event in events if isinstance(event, MessageReacted | MessageUnreacted)]


async def test_second_change_of_a_user_to_a_message_is_made_after_the_first(room: Room, world: World) -> None:
    said, user_id = await sent(room.ada, room.group), room.users[0].id
    here: Any = room.at(said)
    first = ReactionRequest(room.group, said, user_id, "👍", "👍", is_added=True)
    outcomes = await reactions.change(world.db, [first, first._replace(is_added=False), first._replace(normal="🎉")])
    assert [reason(one) for one in outcomes] == ["stored", "changed", "changed"]
    frames = [kind(**here, emoji=emoji) for emoji in "👍🎉👀" for kind in (client.React, client.Unreact)] * 5
    await asyncio.gather(*(room.ada.call(frame, server.Changed) for frame in frames))
    versions = [event.version for event in reacted(room.ada)]
    assert versions == sorted(set(versions))
    assert await recount(world.db) == []


def test_request_has_the_fields_of_its_type() -> None:
    reaction = ReactionRequest(ConversationId(uuid7()), MessageId(uuid7()), UserId(uuid7()), "", "", is_added=True)
    (row,) = json.loads(reactions._encoded([reaction]))  # noqa: SLF001 - the list itself
    (columns,) = re.findall(r"CREATE TYPE reaction_request AS \((.+?)\n\)", Path("schema.sql").read_text(), re.DOTALL)
    assert [column.split()[0] for column in columns.split(",")] == list(row)


async def test_concurrent_changes_at_two_workers_count_exactly_and_have_consecutive_versions(world: World) -> None:
    dice = random.Random(1)
    people = await world.users(*(f"User {number}" for number in range(12)))
    devices = [await world.connect(who, number % 2) for number, who in enumerate(people * 2)]
    group = await world.group(devices[0], *people[1:])
    for one in devices:
        await one.event(server.ConversationJoined)
    said = [await sent(devices[0], group) for _ in range(3)]
    for one in devices:
        await received_message(one, said[-1])
    before = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", group)

    async def act(one: Client) -> None:
        for _ in range(15):
            kind = dice.choice((client.React, client.React, client.Unreact))
            await one.call(kind(conversation_id=group, message_id=dice.choice(said), emoji=dice.choice("👍❤🎉")))

    await asyncio.gather(*map(act, devices))
    assert await recount(world.db) == []
    after = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", group)
    for one in devices:
        await until(lambda one=one: len(reacted(one)) == after - before)  # type: ignore[misc]
    for one in devices:
        assert [event.version for event in reacted(one)] == list(range(before + 1, after + 1))
    # Each event has the count of its version, for each emoji.
    on: dict[tuple[MessageId, str], set[Any]] = {}
    for event in reacted(devices[0]):
        them = on.setdefault((event.message_id, event.emoji), set())
        assert (event.user_id in them) == isinstance(event, MessageUnreacted)
        them ^= {event.user_id}
        # An event inside `changes` has the count of the time when the worker read it.
        assert event.count == len(them) or event not in devices[0].events


HOLD = {
    "conversation": ("SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE", "👍", True),
    "message": ("SELECT FROM message WHERE conversation_id = $1 FOR SHARE", "👍", False),
    "message_reaction": ("SELECT FROM message_reaction WHERE conversation_id = $1 FOR UPDATE", "👍", False),
    "user": ("SELECT FROM \"user\" WHERE id <> $1 AND name = 'Ada' FOR UPDATE", "🎉", True),
}
"""Statements that lock a row of a change of Ada, who has reacted with 👍, and the change, by table."""


async def test_locked_row_delays_only_reactions_that_need_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ALONE_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        ada, mary = await world.users("Ada", "Mary")
        one, other = await world.connect(ada), await world.connect(mary)
        held, free = await world.channel(one), await world.channel(other)
        first = ReactionRequest(held, await sent(one, held), ada.id, "👍", "👍", is_added=True)
        more = [ReactionRequest(free, await sent(other, free), mary.id, "👍", "👍", is_added=True) for _ in range(20)]
        lanes = world.workers[0].app._reactions  # noqa: SLF001 - many reactions, as from many connections
        await reactions.change(world.db, [first])
        for table, (statement, emoji, is_added) in HOLD.items():
            asked = first._replace(normal=emoji, typed=emoji, is_added=is_added)
            async with world.db.transaction():
                await world.db.execute(statement, held)
                tasks = [asyncio.ensure_future(lanes.submit(change)) for change in (*more[:5], asked, *more[5:])]
                stuck = tasks.pop(5)
                async with asyncio.timeout(3):
                    assert {reason(outcome) for outcome in await asyncio.gather(*tasks)} == {"stored"}, table
                    if table != "conversation":
                        with pytest.raises(asyncpg.LockNotAvailableError):
                            await stuck
            assert table != "conversation" or reason(await stuck) == "unchanged"
            more = [change._replace(is_added=not change.is_added) for change in more]
        assert lanes._lanes == {}  # noqa: SLF001
        assert await recount(world.db) == []


async def test_every_table_that_a_reaction_locks_is_covered(room: Room, world: World) -> None:
    change = ReactionRequest(room.group, await sent(room.ada, room.group), room.users[0].id, "👍", "👍", is_added=True)
    async with world.db.transaction():
        await reactions.change(world.db, [change])
        assert {row[0] for row in await world.db.fetch(LOCKED)} == set(HOLD)


async def test_reactions_in_a_locked_conversation_leave_connections_to_others(settings: Settings) -> None:
    async with World(settings, workers=1) as world:
        ada, mary = await world.users("Ada", "Mary")
        one, other = await world.connect(ada), await world.connect(mary)
        held, free = await world.channel(one), await world.channel(other)
        said, there = await sent(one, held), await sent(other, free)
        async with asyncio.TaskGroup() as group, world.db.transaction():
            await world.db.execute("SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE", held)
            frames = [client.React(conversation_id=held, message_id=said, emoji=emoji) for emoji in "👍👎🎉👀"] * 4
            tasks = [group.create_task(one.call(frame, server.Changed)) for frame in frames]
            await waiting(world, 1)
            async with asyncio.timeout(3):
                await other.call(client.History(conversation_id=free))
                await other.call(client.React(conversation_id=free, message_id=there, emoji="👍"))
                await sent(other, free)
            assert not any(task.done() for task in tasks)
        assert await recount(world.db) == []
