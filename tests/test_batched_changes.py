"""Reactions and votes are changed in batches. Each change has its outcome, as if it had been made alone."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import asyncpg
import pytest
from msgspec.structs import replace

from protocol import client, server
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.limits import MAX_EMOJI_OF_USER, MAX_EMOJI_PER_MESSAGE
from protocol.payloads import Poll
from prove.client import Client
from prove.truth import recount
from server.core.config import Settings
from server.fairness.lanes import Held, Lanes
from server.handlers import polls as poll_handlers
from server.handlers import reactions as reaction_handlers
from server.queries import batches, polls, reactions
from server.queries.batched_changes import ChangeFunction, NotChanged, _encoded
from server.queries.polls import Voted, VoteRequest
from server.queries.reactions import ReactionChange, ReactionRequest
from tests import test_send_outcomes
from tests.test_batches import counted
from tests.test_may_send import waiting
from tests.test_send_waits import LOCKED
from tests.world import Room, UserSession, World, events_of, sent

SCHEMA = Path("schema.sql").read_text()

SAY = """
WITH c AS (UPDATE conversation SET version = version + 1 WHERE id = $1 RETURNING id, version)
INSERT INTO message (id, conversation_id, sender_id, content, content_type, payload, poll_counts, poll_closed_at,
    is_moderated, sent_version, version)
SELECT $2, c.id, $3, 'Said', CASE WHEN $4::jsonb IS NULL THEN 'text' ELSE 'poll' END, $4, $5, $6, $7, c.version,
    c.version
FROM c
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
VOTE = """
WITH voted AS (
    INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version)
    SELECT m.id, $2, m.conversation_id, $3, m.version FROM message m WHERE m.id = $1
)
UPDATE message SET poll_voters = poll_voters + 1, poll_counts[$3[1] + 1] = poll_counts[$3[1] + 1] + 1 WHERE id = $1
"""


class Stage(test_send_outcomes.Stage):
    """The stage of messages. Charles has reacted with `:e1:` to messages with every obstacle, and has voted for option
    1 of the polls there.
    """

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
            message_id = await self.say(name, about)
            await self.world.db.execute(REACT, message_id, who.id, count, is_removed)
            if name not in {"full", "used"}:
                message_id = await self.say(f"poll {name}", about, payload="{}")
                await self.world.db.execute(VOTE, message_id, self.charles.id, [1])
        await self.say("poll", self.group, payload="{}")
        await self.say("many", self.group, payload='{"is_multiple": true, "closes_at": "9999-12-31T23:59:59Z"}')
        await self.say("hidden", self.group, payload="{}", is_moderated=True)
        await self.say("closed", self.group, payload="{}", closed_at=datetime.now(UTC))
        # PostgreSQL accepts no such offset.
        await self.say("over", self.group, payload='{"closes_at": "2026-01-01T20:00:00.5+23:59"}')
        for name in ("closed", "over"):
            await self.world.db.execute(VOTE, self.places[name][1], self.charles.id, [1])
        self.places |= {
            "deleted": (self.group, self.deleted), "foreign": (self.elsewhere, self.foreign),
            "early": (self.late, self.early), "misplaced": (self.group, self.foreign),
            "unknown": (self.group, MessageId(uuid7())),
        }  # fmt: skip
        await self.world.db.execute(
            "UPDATE conversation_participant SET last_sent_at = now() WHERE conversation_id = $1", self.slow
        )

    async def say(
        self,
        name: str,
        about: ConversationId,
        *,
        payload: str | None = None,
        is_moderated: bool = False,
        closed_at: datetime | None = None,
    ) -> MessageId:
        """Store a message of Ada, or a poll with three options."""
        self.places[name] = place = about, MessageId(uuid7())
        counts = None if payload is None else [0] * len(OPTIONS)
        whole = None if payload is None else json.dumps({"options": OPTIONS} | json.loads(payload))
        await self.world.db.execute(SAY, *place, self.ada.id, whole, counts, closed_at, is_moderated)
        return place[1]

    def add(self, place: str, emoji: str = "👍", who: UserSession | None = None) -> ReactionRequest:
        return ReactionRequest(*self.places[place], (who or self.charles).id, emoji, emoji, is_added=True)

    def remove(self, place: str, emoji: str = ":e1:") -> ReactionRequest:
        return replace(self.add(place, emoji), is_added=False)

    def vote(self, place: str, *options: int, who: UserSession | None = None) -> VoteRequest:
        return VoteRequest(*self.places[place], (who or self.charles).id, list(options))


OPTIONS = ["Yes", "No", "Later"]


@pytest.fixture
async def stage(world: World) -> Stage:
    stage = Stage(world)
    await stage.begin()
    return stage


Way: TypeAlias = tuple[str, Callable[[Stage], Any]]
"""The expected outcome of a change, and the change. None depends on the others in a batch."""

REACTIONS: list[Way] = [
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
VOTES: list[Way] = [
    ("stored", lambda on: on.vote("poll", 0)),
    ("stored", lambda on: on.vote("poll", 2, who=on.ada)),
    ("stored", lambda on: on.vote("poll said", 0)),
    ("stored", lambda on: on.vote("poll said", 0, who=on.ada)),
    ("stored", lambda on: on.vote("poll archived")),
    ("stored", lambda on: on.vote("poll direct")),
    ("stored", lambda on: on.vote("many", 0, 2)),
    ("stored", lambda on: on.vote("many", 1, 2, who=on.ada)),
    ("unchanged", lambda on: on.vote("poll")),
    ("unchanged", lambda on: on.vote("poll said", 1)),
    ("unchanged", lambda on: on.vote("poll archived", 1)),
    ("unchanged", lambda on: on.vote("poll announcements", 1)),
    ("unchanged", lambda on: on.vote("poll direct", 1)),
    ("unchanged", lambda on: on.vote("poll slow", 1)),
    ("unchanged", lambda on: on.vote("closed", 1)),
    ("unchanged", lambda on: on.vote("over", 1)),
    ("missing", lambda on: on.vote("deleted", 0)),
    ("missing", lambda on: on.vote("hidden", 0)),
    ("missing", lambda on: on.vote("hidden", 0, who=on.ada)),
    ("missing", lambda on: on.vote("foreign", 0)),
    ("missing", lambda on: on.vote("misplaced", 0)),
    ("missing", lambda on: on.vote("early", 0)),
    ("missing", lambda on: on.vote("unknown")),
    ("no_poll", lambda on: on.vote("said", 0)),
    ("no_poll", lambda on: on.vote("said", who=on.gone)),
    ("inactive", lambda on: on.vote("poll", 0, who=on.gone)),
    ("archived", lambda on: on.vote("poll archived", 0, who=on.ada)),
    ("role", lambda on: on.vote("poll announcements", 0)),
    ("unwanted", lambda on: on.vote("poll direct", 0)),
    ("unwanted", lambda on: on.vote("poll direct", 0, who=on.unfriendly)),
    ("slow", lambda on: on.vote("poll slow", 9)),
    ("closed", lambda on: on.vote("closed")),
    ("closed", lambda on: on.vote("closed", 8, 9)),
    ("closed", lambda on: on.vote("over", 0)),
    ("closed", lambda on: on.vote("over")),
    ("unknown_option", lambda on: on.vote("poll", 3)),
    ("unknown_option", lambda on: on.vote("poll said", 0, 3)),
    ("unknown_option", lambda on: on.vote("many", 0, 3)),
    ("too_many_options", lambda on: on.vote("poll", 0, 1)),
]


class Kind(NamedTuple):
    """A kind of changes: what makes them, the expected outcomes, and the reasons and errors of refusals."""

    function: ChangeFunction[Any, Any]
    ways: list[Way]
    reasons: Any
    refusals: Any
    request: str
    """The type of a request in schema.sql."""
    events: tuple[type, ...]
    tables: set[str]
    """The tables in which a change locks a row. `HELD_ROWS` has a statement for each."""


KINDS = {
    "reactions": Kind(
        reactions.FUNCTION,
        REACTIONS,
        reactions.Reason,
        reaction_handlers.REFUSALS,
        "reaction_request",
        (server.MessageReacted, server.MessageUnreacted),
        {"conversation", "message", "message_reaction", "user"},
    ),
    "votes": Kind(
        polls.FUNCTION,
        VOTES,
        polls.Reason,
        poll_handlers.REFUSALS,
        "vote_request",
        (server.PollVoted,),
        {"conversation", "message", "poll_vote", "user"},
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def reason(outcome: ReactionChange | Voted | NotChanged | Held) -> str:
    assert not isinstance(outcome, Held)
    match outcome:
        case NotChanged(reason=reason):
            return reason
        case ReactionChange(total=None) | Voted(poll_counts=None):
            return "unchanged"
        case _:
            return "stored"


def apart(stage: Stage, ways: Sequence[Way]) -> Iterator[list[Way]]:
    """Divide ways into batches with at most one change of a user to a message, in order."""
    while ways:
        first: dict[tuple[UserId, MessageId], Way] = {}
        for way in ways:
            change = way[1](stage)
            first.setdefault((change.user_id, change.message_id), way)
        yield list(first.values())
        ways = [way for way in ways if way not in first.values()]


STATE = """
SELECT json_agg(ARRAY[m.id::text, m.reactions::text, m.poll_counts::text, m.poll_voters::text] ORDER BY m.id),
    (SELECT json_agg(ARRAY[c.id::text, c.version::text] ORDER BY c.id) FROM conversation c),
    (SELECT json_agg(to_jsonb(r) - 'created_at' ORDER BY r.message_id, r.user_id, r.emoji) FROM message_reaction r),
    (SELECT json_agg(to_jsonb(v) - 'voted_at' ORDER BY v.message_id, v.user_id) FROM poll_vote v)
FROM message m
"""


@each_kind
async def test_each_change_of_a_batch_has_its_outcome_and_the_effect_that_it_has_alone(
    stage: Stage, kind: Kind
) -> None:
    db, dice = stage.world.db, random.Random(7)
    for ways in apart(stage, kind.ways):
        for _ in range(4):
            batch, results = [change(stage) for _, change in ways], []
            for parts in ([batch], [[one] for one in batch]):
                transaction = db.transaction()
                await transaction.start()
                outcomes = [outcome for part in parts for outcome in await kind.function.waiting(db, part)]
                results.append((outcomes, tuple(await db.fetchrow(STATE) or ())))
                await transaction.rollback()
            assert [reason(one) for one in results[0][0]] == [expected for expected, _ in ways]
            assert results[0][1] == results[1][1]
            # The time until the next message in slow mode differs.
            told = [
                [one._replace(wait_ms=0) if isinstance(one, NotChanged) else one for one in outcomes]
                for outcomes, _ in results
            ]
            assert told[0] == told[1]
            dice.shuffle(ways)


@each_kind
def test_each_reason_has_a_change_and_an_error(kind: Kind) -> None:
    assert set(get_args(kind.reasons)) - {expected for expected, _ in kind.ways} == {"changed"}
    assert set(get_args(kind.reasons)) - {"changed"} == kind.refusals.keys()


@each_kind
async def test_request_has_the_fields_of_its_type(stage: Stage, kind: Kind) -> None:
    (row,) = json.loads(_encoded([kind.ways[0][1](stage)]))
    (columns,) = re.findall(rf"CREATE TYPE {kind.request} AS \((.+?)\n\)", SCHEMA, re.DOTALL)
    assert [column.split()[0] for column in columns.split(",")] == list(row)


async def requested(one: Client, kind: Kind, about: ConversationId) -> Any:
    """Return a change to a new message, by the user of a connection."""
    if kind.function is reactions.FUNCTION:
        said = await sent(one, about)
        return ReactionRequest(about, said, one.ready.user.id, "👍", "👍", is_added=True)
    said = await sent(one, about, "Tea?", payload=Poll(options=OPTIONS))
    return VoteRequest(about, said, one.ready.user.id, [0])


def lanes_of(world: World, kind: Kind) -> Lanes[Any, Any, Any]:
    """Return the lanes of a worker, for many changes, as from many connections."""
    app = world.workers[0].app
    return app._reactions if kind.function is reactions.FUNCTION else app._votes  # noqa: SLF001


def frame(change: Any) -> client.Frame:
    """Return the frame of a change."""
    here: dict[str, Any] = {"conversation_id": change.conversation_id, "message_id": change.message_id}
    if isinstance(change, VoteRequest):
        return client.Vote(**here, options=change.options)
    return (client.React if change.is_added else client.Unreact)(**here, emoji=change.typed)


def opposite(change: Any) -> Any:
    """Return a change that changes something after `change`."""
    if isinstance(change, ReactionRequest):
        return replace(change, is_added=not change.is_added)
    return replace(change, options=[1 - change.options[0]])


HELD_ROWS: dict[str, str] = {
    "conversation": "SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE",
    "message": "SELECT FROM message WHERE conversation_id = $1 FOR SHARE",
    "message_reaction": "SELECT FROM message_reaction WHERE conversation_id = $1 FOR UPDATE",
    "poll_vote": "SELECT FROM poll_vote WHERE conversation_id = $1 FOR UPDATE",
    "user": "SELECT FROM \"user\" WHERE id <> $1 AND name = 'Ada' FOR UPDATE",
}
"""Statements that lock a row of a change of Ada, by table."""


@each_kind
async def test_locked_row_delays_only_changes_that_need_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(batches, "ALONE_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        ada, mary = await world.users("Ada", "Mary")
        one, other = await world.connect(ada), await world.connect(mary)
        held, free = await world.channel(one), await world.channel(other)
        first, new = [await requested(one, kind, held) for _ in range(2)]
        more = [await requested(other, kind, free) for _ in range(20)]
        lanes = lanes_of(world, kind)
        await kind.function.waiting(world.db, [first])
        for table in kind.tables:
            asked = {"conversation": first, "user": new}.get(table, opposite(first))
            async with world.db.transaction():
                await world.db.execute(HELD_ROWS[table], held)
                tasks = [asyncio.ensure_future(lanes.submit(change)) for change in (*more[:5], asked, *more[5:])]
                stuck = tasks.pop(5)
                async with asyncio.timeout(3):
                    assert {reason(outcome) for outcome in await asyncio.gather(*tasks)} == {"stored"}, table
                    if table != "conversation":
                        with pytest.raises(asyncpg.LockNotAvailableError):
                            await stuck
            assert table != "conversation" or reason(await stuck) == "unchanged"
            more = [opposite(change) for change in more]
        assert lanes._lanes == {}  # noqa: SLF001
        assert await recount(world.db) == []


@each_kind
async def test_every_table_that_a_change_locks_is_covered(room: Room, world: World, kind: Kind) -> None:
    change = await requested(room.ada, kind, room.group)
    async with world.db.transaction():
        await kind.function.waiting(world.db, [change])
        assert {row[0] for row in await world.db.fetch(LOCKED)} == kind.tables


@each_kind
async def test_second_change_of_a_user_to_a_message_is_made_after_the_first(
    room: Room, world: World, kind: Kind
) -> None:
    first = await requested(room.ada, kind, room.group)
    outcomes = await kind.function.waiting(world.db, [first, opposite(first), first])
    assert [reason(one) for one in outcomes] == ["stored", "changed", "changed"]
    frames = [frame(first), frame(opposite(first))] * 8
    await asyncio.gather(*(room.ada.call(one, server.Changed) for one in frames))
    versions = [event.version for event in events_of(room.ada, *kind.events)]
    assert versions == sorted(set(versions))
    assert await recount(world.db) == []


@each_kind
async def test_changes_in_a_locked_conversation_leave_connections_to_others(settings: Settings, kind: Kind) -> None:
    async with World(settings, workers=1) as world:
        people = await world.users("Ada", "Mary")
        one, other = [await world.connect(who) for who in people]
        held, free = await world.channel(one), await world.channel(other)
        devices = [await world.connect(people[0]) for _ in range(10)]
        stuck = [frame(await requested(device, kind, held)) for device in devices]
        there = await requested(other, kind, free)
        async with asyncio.TaskGroup() as group, world.db.transaction():
            await world.db.execute(HELD_ROWS["conversation"], held)
            tasks = [
                group.create_task(device.call(frame, server.Changed))
                for device, frame in zip(devices, stuck, strict=True)
            ]
            await waiting(world, 1)
            async with asyncio.timeout(3):
                await other.call(client.History(conversation_id=free))
                await other.call(frame(there), server.Changed)
                await sent(other, free)
            assert not any(task.done() for task in tasks)
        assert await recount(world.db) == []


@each_kind
async def test_concurrent_changes_share_statements(room: Room, world: World, kind: Kind) -> None:
    """One statement each would hold the conversation for as many round trips to PostgreSQL."""
    first = await requested(room.ada, kind, room.group)
    people = await world.users(*(f"User {number}" for number in range(20)))
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[one.id for one in people]))
    lanes = lanes_of(world, kind)
    runs: list[int] = []
    lanes._light._work = counted(lanes._light._work, runs)  # noqa: SLF001
    outcomes = await asyncio.gather(*(lanes.submit(replace(first, user_id=who.id)) for who in people))
    assert {reason(one) for one in outcomes} == {"stored"}
    assert runs == [1, len(people) - 1]
    versions = [one.version for one in outcomes]
    assert versions == list(range(versions[0], versions[0] + len(people)))
    assert await recount(world.db) == []
