"""Joins are made in batches. Each has its outcome, as if it had been made alone."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import asyncpg
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, uuid7
from protocol.limits import MAX_SHARED_PARTICIPANTS
from protocol.values import ConversationSettings
from prove.truth import recount
from server.core.config import Settings
from server.fairness.lanes import Held
from server.handlers.participants import REFUSALS
from server.queries import batches
from server.queries.batched_changes import AGAIN, USER_HELD, NotChanged
from server.queries.joins import FUNCTION, Joined, JoinRequest, Reason
from tests.test_batches import counted
from tests.test_send_waits import LOCKED
from tests.world import World, events_of, refused, until

MOST_MEMBERSHIPS = 10
"""Max conversations of a user in these tests."""
MAKE_MANY = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version, participant_count)
    SELECT 'group', 'Many', $1, 1, 1 FROM generate_series(1, $2::int) RETURNING id
)
INSERT INTO conversation_participant (conversation_id, user_id, role, version) SELECT id, $1, 'owner', 1 FROM made
"""
STATUS = "UPDATE conversation_participant SET status = $3 WHERE conversation_id = $1 AND user_id = $2"
CODE = (
    "UPDATE conversation SET invite_code = $2, invite_uses_left = $3, invite_expires_at = $4::timestamptz WHERE id = $1"
)


class Stage:
    """Conversations with every obstacle to Charles, and users with every obstacle."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def begin(self) -> None:
        db = self.world.db
        names = ("Ada", "Charles", "Mary", "Gone", "Full", "Guest", "Invited", "Uninvited", "Banned", "Left", "Fourth")
        self.people = dict(zip(names, await self.world.users(*names), strict=True))
        owner = await self.world.connect(self.people["Ada"])
        others = [
            self.people[name] for name in names if name not in {"Ada", "Charles", "Mary", "Gone", "Full", "Fourth"}
        ]
        quiet = ConversationSettings(system_messages=False)
        self.places: dict[str, ConversationId] = {
            "public": await self.world.channel(owner, is_public=True, title="Public"),
            "quiet": await self.world.channel(owner, is_public=True, title="Quiet", settings=quiet),
            "private": await self.world.group(owner, *others, title="Private"),
            "room for one": await self.world.channel(owner, is_public=True, max_participants=2, title="Narrow"),
            "full": await self.world.channel(owner, is_public=True, max_participants=1, title="Full"),
            "used once": await self.world.channel(owner, title="Code"),
            "used up": await self.world.channel(owner, title="Used up"),
            "expired": await self.world.channel(owner, title="Expired"),
            "ended": await self.world.channel(owner, is_public=True, title="Ended"),
            "deleted": await self.world.channel(owner, is_public=True, title="Deleted"),
            "unknown": ConversationId(uuid7()),
        }  # fmt: skip
        frame = client.CreateDirect(user_id=self.people["Mary"].id)
        self.places["direct"] = (await owner.call(frame, server.OneConversation)).view.conversation.id
        for name, uses, expires in (("used once", 1, "infinity"), ("used up", 0, "infinity"), ("expired", 9, "epoch")):
            await db.execute(CODE.replace("$4", f"'{expires}'"), self.places[name], f"code {name}", uses)
        await owner.call(client.DeleteConversation(conversation_id=self.places["deleted"]))
        await db.execute("UPDATE conversation SET is_active = false WHERE id = $1", self.places["ended"])
        await db.execute("UPDATE conversation SET participant_count = 1 WHERE title = 'Private'")
        for name, status in (("Invited", "invited"), ("Uninvited", "invited"), ("Banned", "banned"), ("Left", "left")):
            await db.execute(STATUS, self.places["private"], self.people[name].id, status)
        await db.execute(STATUS, self.places["private"], self.people["Guest"].id, "invited")
        await db.execute(
            "UPDATE conversation_participant SET role = CASE WHEN user_id = $2 THEN 'guest' ELSE 'admin' END,"
            " can_pin_messages = true WHERE conversation_id = $1 AND role <> 'owner'",
            self.places["private"], self.people["Guest"].id,
        )  # fmt: skip
        await db.execute(
            "UPDATE conversation_participant SET invited_by = $3 WHERE conversation_id = $1 AND user_id = $2",
            self.places["private"], self.people["Uninvited"].id, self.people["Charles"].id,
        )  # fmt: skip
        await db.execute(
            "INSERT INTO conversation_participant (conversation_id, user_id, status, version)"
            " SELECT $1, u, 'banned', 1 FROM unnest($2::uuid[]) u",
            self.places["public"], [self.people["Banned"].id],
        )  # fmt: skip
        await db.execute(MAKE_MANY, self.people["Full"].id, MOST_MEMBERSHIPS)
        await db.execute('UPDATE "user" SET is_active = false WHERE id = $1', self.people["Gone"].id)

    def join(self, place: str, who: str = "Charles", *, by_code: bool = False) -> JoinRequest:
        return JoinRequest(self.places[place], self.people[who].id, f"code {place}" if by_code else None)


class Way(NamedTuple):
    """The expected outcome of a join, and the join. None depends on the others in a batch."""

    expected: str
    join: Callable[[Stage], JoinRequest]


WAYS = [
    Way("stored", lambda on: on.join("public")),
    Way("stored", lambda on: on.join("public", "Mary")),
    Way("stored", lambda on: on.join("quiet", "Fourth")),
    Way("stored", lambda on: on.join("private", "Invited")),
    Way("stored", lambda on: on.join("private", "Guest")),
    Way("stored", lambda on: on.join("room for one", "Left")),
    Way("unchanged", lambda on: on.join("private", "Ada")),
    Way("missing", lambda on: on.join("private", "Left")),
    Way("missing", lambda on: on.join("private", "Banned")),
    Way("missing", lambda on: on.join("private")),
    Way("missing", lambda on: on.join("direct")),
    Way("missing", lambda on: on.join("ended")),
    Way("missing", lambda on: on.join("deleted")),
    Way("missing", lambda on: on.join("unknown")),
    Way("missing", lambda on: on.join("public", by_code=True)),
    Way("missing", lambda on: on.join("used once", "Mary")),
    Way("stored", lambda on: on.join("used once", "Mary", by_code=True)),
    Way("missing", lambda on: on.join("used up", by_code=True)),
    Way("missing", lambda on: on.join("expired", by_code=True)),
    Way("banned", lambda on: on.join("public", "Banned")),
    Way("uninvited", lambda on: on.join("private", "Uninvited")),
    Way("full", lambda on: on.join("full")),
    Way("inactive", lambda on: on.join("public", "Gone")),
    Way("too_many", lambda on: on.join("public", "Full")),
]


@pytest.fixture
async def stage(world: World, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(FUNCTION, "_limits", (MAX_SHARED_PARTICIPANTS, MOST_MEMBERSHIPS))
    stage = Stage(world)
    await stage.begin()
    return stage


def reason(outcome: Joined | NotChanged | Held) -> str:
    assert not isinstance(outcome, Held)
    if isinstance(outcome, NotChanged):
        return outcome.reason
    return "unchanged" if outcome.change is None else "stored"


# Times differ between two runs, ids of system messages are random, and a job deletes the remains.
STATE = """
SELECT (SELECT json_agg(to_jsonb(c) - '{last_activity_at,last_message_at,has_remains}'::text[] ORDER BY c.id)
        FROM conversation c),
    (SELECT json_agg(to_jsonb(p) - 'id' - 'joined_at' ORDER BY p.conversation_id, p.user_id)
        FROM conversation_participant p),
    (SELECT json_agg(to_jsonb(m) - 'id' - 'created_at' - 'updated_at' ORDER BY m.conversation_id, m.version)
        FROM message m),
    (SELECT json_agg(ARRAY[u.id::text, u.version::text] ORDER BY u.id) FROM "user" u)
"""


async def test_each_join_of_a_batch_has_its_outcome_and_the_effect_that_it_has_alone(stage: Stage) -> None:
    db, dice = stage.world.db, random.Random(7)
    left = list(WAYS)
    while left:
        first: dict[Any, Way] = {}
        for way in left:
            first.setdefault(way.join(stage).subject, way)
        ways = list(first.values())
        left = [way for way in left if way not in ways]
        for _ in range(4):
            batch, results = [way.join(stage) for way in ways], []
            for parts in ([batch], [[one] for one in batch]):
                transaction = db.transaction()
                await transaction.start()
                outcomes = [outcome for part in parts for outcome in await FUNCTION.waiting(db, part)]
                results.append((outcomes, tuple(await db.fetchrow(STATE) or ())))
                await transaction.rollback()
            assert [reason(one) for one in results[0][0]] == [way.expected for way in ways]
            assert results[0][1] == results[1][1]
            dice.shuffle(ways)


def test_each_reason_has_a_join_and_an_error() -> None:
    assert set(get_args(Reason)) - {way.expected for way in WAYS} == {AGAIN, USER_HELD}
    for refusals in REFUSALS.values():
        assert set(get_args(Reason)) - {AGAIN, USER_HELD} == refusals.keys()


async def test_roles_and_grants_of_a_participant_who_joins_are_those_of_the_invitation(stage: Stage) -> None:
    batch = [stage.join("private", "Invited"), stage.join("private", "Guest"), stage.join("public", "Mary")]
    found = []
    for outcome in await FUNCTION.waiting(stage.world.db, batch):
        assert isinstance(outcome, Joined)
        assert outcome.change is not None
        them = outcome.change.participant
        found.append((them.role, them.permissions.can_pin_messages, them.invited_by is None))
    assert found == [("admin", True, False), ("guest", False, False), ("member", False, True)]


async def test_maximum_and_uses_of_a_code_hold_within_a_batch(stage: Stage) -> None:
    db = stage.world.db
    three = ("Charles", "Mary", "Fourth")
    outcomes = await FUNCTION.waiting(db, [stage.join("room for one", who) for who in three])
    assert [reason(one) for one in outcomes] == ["stored", "full", "full"]
    assert isinstance(outcomes[1], NotChanged)
    assert outcomes[1].max_participants == 2
    outcomes = await FUNCTION.waiting(db, [stage.join("used once", who, by_code=True) for who in three])
    assert [reason(one) for one in outcomes] == ["stored", "missing", "missing"]


async def test_last_joins_before_a_conversation_is_large_post_messages(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The versions of all joins and messages follow each other."""
    monkeypatch.setattr(FUNCTION, "_limits", (3, MOST_MEMBERSHIPS))
    four = ("Charles", "Mary", "Fourth", "Left")
    before = await stage.world.db.fetchval("SELECT version FROM conversation WHERE id = $1", stage.places["public"])
    outcomes = await FUNCTION.waiting(stage.world.db, [stage.join("public", who) for who in four])
    found: list[tuple[int, int, int | None]] = []
    for one in outcomes:
        assert isinstance(one, Joined)
        assert one.change is not None
        assert one.change.event.version == one.change.participant.version
        version = None if one.message is None else one.message.version - before
        found.append((one.change.participant.version - before, one.change.participant_count, version))
    assert found == [(1, 2, 2), (3, 3, 4), (5, 4, None), (6, 5, None)]


async def test_second_join_of_a_user_is_made_after_the_first(stage: Stage) -> None:
    first, second = stage.join("public"), stage.join("quiet")
    outcomes = await FUNCTION.waiting(stage.world.db, [first, second, first])
    assert [reason(one) for one in outcomes] == ["stored", "changed", "changed"]
    mary = await stage.world.connect(stage.people["Mary"])
    frames = [client.Join(conversation_id=stage.places[place]) for place in ("public", "quiet", "public")]
    answers = await asyncio.gather(*(mary.call(frame, server.OneConversation) for frame in frames))
    assert [one.view.conversation.title for one in answers] == ["Public", "Quiet", "Public"]


async def test_concurrent_joins_share_statements(world: World) -> None:
    """One transaction each would hold the conversation for as many round trips to PostgreSQL."""
    owner = await world.connect(await world.user("Ada"))
    about = await world.channel(owner, is_public=True)
    people = await world.users(*(f"User {number}" for number in range(20)))
    lanes = world.workers[0].app._services.joins  # noqa: SLF001
    runs: list[int] = []
    lanes._light._work = counted(lanes._light._work, runs)  # noqa: SLF001
    outcomes = await asyncio.gather(*(lanes.submit(JoinRequest(about, who.id)) for who in people))
    assert {reason(one) for one in outcomes} == {"stored"}
    assert runs == [1, len(people) - 1]
    assert await recount(world.db) == []


@pytest.mark.parametrize("by_code", [False, True])
async def test_others_learn_of_a_join_with_an_unknown_outcome(
    world: World, monkeypatch: pytest.MonkeyPatch, *, by_code: bool
) -> None:
    """PostgreSQL may commit a join although its worker lost the connection."""
    ada, charles = await world.users("Ada", "Charles")
    owner, joining = await world.connect(ada), await world.connect(charles, 1)
    about = await world.channel(owner, is_public=True)
    made = await owner.call(client.SetInviteCode(conversation_id=about), server.OneConversation)
    assert made.view.invite is not None
    lanes = world.workers[1].app._services.joins  # noqa: SLF001
    submit = lanes.submit

    async def lost(item: JoinRequest) -> None:
        await submit(item)
        raise ConnectionError

    monkeypatch.setattr(lanes, "submit", lost)
    frame = client.Join(invite_code=made.view.invite.code) if by_code else client.Join(conversation_id=about)
    with refused(ErrorCode.UNAVAILABLE, None):
        await joining.call(frame)
    await until(lambda: charles.id in {
        one.participant.user_id for one in events_of(owner, server.ParticipantChanged)
    })  # fmt: skip


HELD_ROWS = {
    "conversation": "SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE",
    "user": "SELECT FROM \"user\" WHERE id <> $1 AND name = 'Charles' FOR UPDATE",
    "conversation_participant": "SELECT FROM conversation_participant WHERE conversation_id = $1 FOR UPDATE",
}


@pytest.mark.parametrize("table", HELD_ROWS)
async def test_locked_row_delays_only_joins_that_need_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(batches, "ALONE_LOCK_MS", 50)
    async with World(settings, workers=1) as world:
        charles, mary = await world.users("Charles", "Mary")
        one, other = await world.connect(charles), await world.connect(mary)
        held, free = await world.channel(other, is_public=True), await world.channel(other, is_public=True)
        await one.call(client.Join(conversation_id=held))
        await one.call(client.Leave(conversation_id=held))
        people = await world.users(*(f"User {number}" for number in range(10)))
        clients = [await world.connect(who) for who in people]
        async with world.db.transaction():
            await world.db.execute(HELD_ROWS[table], held)
            stuck = asyncio.ensure_future(one.ask(client.Join(conversation_id=held)))
            async with asyncio.timeout(3):
                await asyncio.gather(*(each.call(client.Join(conversation_id=free)) for each in clients))
                if table != "conversation":
                    await clients[0].call(client.Join(conversation_id=held))
            if table == "conversation_participant":  # only the user's own frames lock it
                assert isinstance(await stuck, server.Error)
            else:
                assert not stuck.done()
        assert isinstance(await stuck, server.Error) is (table == "conversation_participant")
        assert await recount(world.db) == []


async def test_every_table_that_a_join_locks_is_covered(stage: Stage) -> None:
    async with stage.world.db.transaction():
        await FUNCTION.waiting(stage.world.db, [stage.join("quiet"), stage.join("private", "Invited")])
        # The message table has only new rows.
        assert {row[0] for row in await stage.world.db.fetch(LOCKED)} - {"message"} == HELD_ROWS.keys()


FREE = """
SELECT FROM conversation c, "user" u WHERE c.id = $1 AND u.id = $2 FOR NO KEY UPDATE NOWAIT
"""


async def test_refused_joins_lock_nothing(stage: Stage, database_url: str) -> None:
    other = await asyncpg.connect(database_url)
    for way in WAYS:
        request = way.join(stage)
        async with stage.world.db.transaction():
            await FUNCTION.waiting(stage.world.db, [request])
            if way.expected in {"stored", "too_many"}:
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await other.execute(FREE, request.conversation_id, request.user_id)
            else:
                await other.execute(FREE, request.conversation_id, request.user_id)
        await stage.world.db.execute("SELECT 1")
    await other.close()


async def test_user_locked_elsewhere_is_skipped_and_others_join(stage: Stage, database_url: str) -> None:
    holder = await asyncpg.connect(database_url)
    async with holder.transaction():
        await holder.execute('SELECT FROM "user" WHERE id = $1 FOR UPDATE', stage.people["Mary"].id)
        outcomes = await FUNCTION.waiting(stage.world.db, [stage.join("public"), stage.join("public", "Mary")])
    await holder.close()
    assert isinstance(outcomes[0], Joined)
    assert reason(outcomes[1]) == "user_held"


async def test_refusals_name_the_field_of_the_frame(stage: Stage) -> None:
    charles = await stage.world.connect(stage.people["Charles"])
    banned = await stage.world.connect(stage.people["Banned"])
    with refused(ErrorCode.NOT_FOUND, "invite_code"):
        await charles.call(client.Join(invite_code="code used up"))
    with refused(ErrorCode.NOT_FOUND, "invite_code"):
        await charles.call(client.Join(invite_code="no such code"))
    with refused(ErrorCode.NOT_FOUND, "conversation_id"):
        await charles.call(client.Join(conversation_id=stage.places["private"]))
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await banned.call(client.Join(conversation_id=stage.places["public"]))
    with refused(ErrorCode.CONFLICT, "conversation_id"):
        await charles.call(client.Join(conversation_id=stage.places["full"]))
    full = await stage.world.connect(stage.people["Full"], query="?resume=1")
    with refused(ErrorCode.CONFLICT, "conversation_id"):
        await full.call(client.Join(conversation_id=stage.places["public"]))


async def test_devices_at_other_workers_learn_of_a_join(stage: Stage) -> None:
    who = stage.people["Mary"]
    phone, desk = await stage.world.connect(who), await stage.world.connect(who, 1)
    about = stage.places["used once"]
    joined = await phone.call(client.Join(invite_code="code used once"), server.OneConversation)
    assert joined.view.conversation.id == about
    await until(
        lambda: any(
            isinstance(one, server.ConversationJoined) and one.view.conversation.id == about for one in desk.events
        )
    )
