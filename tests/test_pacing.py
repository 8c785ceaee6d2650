"""Rate limits: clients that keep to them, or wait as told, are never refused for it or closed; others are."""

import asyncio
import random
import time
from datetime import UTC, datetime, timedelta
from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from protocol import client, server
from protocol.codec import encode
from protocol.errors import CloseCode, ErrorCode
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from protocol.limits import (
    FURTHER_TOKENS,
    MAX_MENTIONS,
    MAX_PAGE,
    MAX_PARTICIPANTS_NAMED,
    MAX_WATCHED,
    TOKEN_BYTES,
    RateLimit,
)
from protocol.server import Error
from server.core.config import Settings
from server.gateway.dispatch import Rate, further, most_further
from server.limits.advertised import advertised, rate_limit
from server.limits.reservations import GRACE_NS, ReservingBucket
from server.limits.retries import LATEST_NS, Retries
from server.limits.shared_rate_limit import SharedRateLimit
from server.limits.strikes import Strikes
from server.limits.token_bucket import Pace, TokenBucket, TokenBuckets
from server.routes import ROUTES
from tests.world import Room, World, message

NS = 1_000_000_000


def too_many(wait_ms: int) -> Error:
    return Error(code=ErrorCode.RATE_LIMITED, message="", retry_after_ms=wait_ms)


class Clock:
    def __init__(self) -> None:
        self.now = NS

    def __call__(self) -> int:
        return self.now


class Paced:
    """A client that keeps to a limit of `ready`, as docs/clients.md describes."""

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._tokens = float(limit.burst)
        self._at = 0.0

    def wait(self, now: float, tokens: int = 1) -> float:
        """Count the tokens of the next frame, and return how long to wait before it."""
        tokens = min(tokens, self._limit.burst)
        self._tokens = min(self._limit.burst, self._tokens + (now - self._at) * self._limit.per_second) - tokens
        self._at = now
        return max(0.0, -self._tokens / self._limit.per_second)


@examples(max_examples=200)
@given(
    rate=st.floats(1.0, 500.0),
    pauses=st.lists(st.floats(0.0, 3.0) | st.just(0.0), min_size=1, max_size=400),
    delays=st.lists(st.floats(0.0, 0.9), min_size=1, max_size=20),
    costs=st.lists(st.tuples(st.integers(1, 17), st.sampled_from([0, 0, 0, 1, 10, 20])), min_size=1, max_size=20),
)
def test_client_that_keeps_to_the_limits_is_never_refused(
    rate: float, pauses: list[float], delays: list[float], costs: list[tuple[int, int]]
) -> None:
    """Frames may take up to nearly a second to arrive, with varying delay, in order."""
    clock = Clock()
    bucket = TokenBuckets[str]("frames", rate, clock=clock)
    paced = Paced(rate_limit(rate))
    now = arrived = 1.0
    for number, pause in enumerate(pauses):
        first, further = costs[number % len(costs)]
        now += pause
        now += paced.wait(now, first + further)
        paced._at = now  # noqa: SLF001 - it has waited
        paced._tokens = max(paced._tokens, 0.0)  # noqa: SLF001
        arrived = max(arrived, now + delays[number % len(delays)])
        clock.now = round(arrived * NS)
        assert bucket.take("Ada", first, to_come=further) == 0
        assert bucket.take("Ada", further, taken=first) == 0


COSTLY: dict[str, client.Frame] = {
    "list_threads": client.ListThreads(),
    "watch": client.Watch(user_ids=[UserId(uuid7()) for _ in range(MAX_WATCHED)]),
    "get_users": client.GetUsers(user_ids=[UserId(uuid7()) for _ in range(MAX_PAGE)]),
    "resume": client.Resume(epoch="", versions={}, user_version=0),
    "create_group": client.CreateGroup(
        conversation_id=ConversationId(uuid7()),
        title="Us",
        participants=[UserId(uuid7()) for _ in range(MAX_PARTICIPANTS_NAMED)],
    ),
    "add_participants": client.AddParticipants(
        conversation_id=ConversationId(uuid7()), participants=[UserId(uuid7()) for _ in range(MAX_PARTICIPANTS_NAMED)]
    ),
    "invite": client.Invite(
        conversation_id=ConversationId(uuid7()), participants=[UserId(uuid7()) for _ in range(MAX_PARTICIPANTS_NAMED)]
    ),
    "get_badge": client.GetBadge(),
    "list_conversations": client.ListConversations(limit=MAX_PAGE),
    "list_relationships": client.ListRelationships(limit=MAX_PAGE),
    "list_stars": client.ListStars(limit=MAX_PAGE),
    "send": client.Send(
        conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7()), content="@" * MAX_MENTIONS
    ),
    "edit": client.Edit(
        conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7()), content="@" * MAX_MENTIONS
    ),
    "schedule": client.Schedule(
        conversation_id=ConversationId(uuid7()),
        message_id=MessageId(uuid7()),
        content="@" * MAX_MENTIONS,
        send_at=datetime.now(UTC) + timedelta(hours=1),
    ),
    "forward": client.Forward(
        conversation_id=ConversationId(uuid7()),
        message_id=MessageId(uuid7()),
        to_conversation_id=ConversationId(uuid7()),
        new_message_id=MessageId(uuid7()),
    ),
    "why": client.Why(conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7())),
    "history": client.History(conversation_id=ConversationId(uuid7()), limit=MAX_PAGE),
    "list_participants": client.ListParticipants(conversation_id=ConversationId(uuid7()), limit=MAX_PAGE),
    "list_replies": client.ListReplies(
        conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7()), limit=MAX_PAGE
    ),
    "list_reports": client.ListReports(conversation_id=ConversationId(uuid7()), limit=MAX_PAGE),
    "list_audit": client.ListAudit(conversation_id=ConversationId(uuid7()), limit=MAX_PAGE),
    "list_pins": client.ListPins(conversation_id=ConversationId(uuid7())),
    "list_edits": client.ListEdits(conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7())),
    "list_drafts": client.ListDrafts(),
    "list_scheduled": client.ListScheduled(),
    "list_invitations": client.ListInvitations(),
}
CHEAP = {"list_votes"}
"""Frames with a `limit` whose most expensive page costs the database little more than a row (docs/performance.md)."""


def test_tokens_of_a_page_depend_on_its_limit() -> None:
    for frame, route in ROUTES.items():
        name = str(frame.__struct_config__.tag)
        if route.rate is not Rate.READ or "limit" not in frame.__struct_fields__ or name in CHEAP:
            continue
        dearest = COSTLY[name]
        assert further(dearest) == FURTHER_TOKENS[name], name
        if name not in {"list_threads", "list_conversations"}:
            assert further(msgspec.structs.replace(dearest, limit=1)) == 0, name
    about = ConversationId(uuid7())
    asked = (1, 20, 50, 100)
    assert [further(client.History(conversation_id=about, limit=limit)) for limit in asked] == [0, 0, 1, 3]
    people = [UserId(uuid7()) for _ in range(50)]
    few = [client.Invite(conversation_id=about, participants=people[:count]) for count in (1, 5, 50)]
    assert [further(frame) for frame in few] == [0, 1, 10]


async def test_retry_after_the_given_time_is_not_refused_at_any_cost(world: World) -> None:
    assert COSTLY.keys() == FURTHER_TOKENS.keys()
    ada = await world.user("Ada")
    asker = await world.connect(ada)
    said = message(await world.channel(asker), "@" * MAX_MENTIONS)
    await asker.call(said)
    there = {"conversation_id": said.conversation_id, "message_id": said.message_id}
    costly = COSTLY | {"forward": msgspec.structs.replace(COSTLY["forward"], **there)}
    rate_limits = world.workers[0].app._rate_limits  # noqa: SLF001
    for rate, (name, frame), left in product((100.0, 5.0, 1.0), costly.items(), (0, 1)):
        clock = Clock()
        rate_limit = rate_limits[ROUTES[type(frame)].rate]
        # Change the rate in place, since the handlers hold it, too.
        vars(rate_limit).update(vars(SharedRateLimit("write", rate, None, clock=clock)))
        for _ in range(round(4 * rate) - left):
            rate_limit.require(ada.id)
        refused = await asker.ask(frame)
        assert isinstance(refused, Error), (name, rate, left)
        assert refused.code is ErrorCode.RATE_LIMITED
        assert refused.retry_after_ms
        clock.now += refused.retry_after_ms * 1_000_000
        answer = await asker.ask(frame)
        assert not isinstance(answer, Error) or answer.code is ErrorCode.NOT_FOUND, (name, rate, left, answer)


async def test_retry_times_of_concurrent_messages_are_one_token_apart(world: World) -> None:
    """The time of a message with mentions, which is not decoded yet, allows for the most tokens that it may take."""
    asker = await world.connect(await world.user("Ada"))
    about = await world.channel(asker)
    rate_limit = world.workers[0].app._rate_limits[Rate.WRITE]  # noqa: SLF001
    vars(rate_limit).update(vars(SharedRateLimit("write", 1.0, None, clock=Clock())))
    for _ in range(4):
        rate_limit.require(asker.ready.user.id)
    frames = [message(about) for _ in range(5)] + [message(about, "@" * MAX_MENTIONS)]
    told = [(await asker.ask(frame)).retry_after_ms for frame in frames]  # type: ignore[union-attr]
    assert told == [1_001, 2_000, 3_000, 4_000, 5_000, 8_000]  # the last one needs the full bucket


@given(st.text(alphabet='@"\\a\u2028'), st.integers(0, 100))
def test_estimate_before_decoding_is_an_upper_bound_of_the_tokens(content: str, count: int) -> None:
    about, people = ConversationId(uuid7()), [UserId(uuid7()) for _ in range(count)]
    escaped = msgspec.json.encode(message(about, content or "x")).replace(b"@", b"\\u0040")
    for frame, data in (
        (message(about, content or "x"), escaped),
        *((one, msgspec.json.encode(one)) for one in (
            client.Edit(conversation_id=about, message_id=MessageId(uuid7()), content=content or "x"),
            client.Watch(user_ids=people), client.GetUsers(user_ids=people),
            client.Invite(conversation_id=about, participants=people),
        )),
    ):  # fmt: skip
        assert further(frame) <= most_further(str(type(frame).__struct_config__.tag), data) <= further(frame) + 2


async def test_message_takes_the_same_tokens_in_every_frame(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(SharedRateLimit, "_tell", lambda _, __, count: told.append(count))
    text = " ".join(f"@somebody{number}" for number in range(MAX_MENTIONS))
    text += "😀" * (int(1.8 * TOKEN_BYTES - len(text)) // 4)
    said = message(room.group, text)
    place = room.at(said.message_id)
    await room.ada.call(message(room.group, "Else"))
    frames = [
        said,
        client.Edit(**place, content=text + "!"),
        client.Schedule(**room.at(MessageId(uuid7())), content=text, send_at=datetime.now(UTC) + timedelta(hours=1)),
        client.Forward(**place, to_conversation_id=room.group, new_message_id=MessageId(uuid7())),
    ]
    # A draft creates no message, and its mentions are not resolved.
    assert {type(frame) for frame in frames} - {client.Forward} == {
        kind for kind in ROUTES if "content" in kind.__struct_fields__
    } - {client.SetDraft}
    for frame in frames:
        told.clear()
        await room.ada.call(frame)
        assert sum(told) == 2 + FURTHER_TOKENS["send"], frame


@examples(max_examples=20, deadline=None)
@given(rate=st.floats(0.1, 500.0), seed=st.integers(0, 1 << 32), latest=st.sampled_from([0.0, 0.001, 0.1]))
def test_client_that_waits_as_told_gets_no_strikes(rate: float, seed: int, latest: float) -> None:
    clock, rng = Clock(), random.Random(seed)
    bucket, strikes = TokenBuckets[str]("frames", rate, clock=clock), Strikes(clock=clock)
    for _ in range(3_000):
        if rng.random() < 0.1:
            bucket.charge("Ada", rng.randrange(20))  # tokens that she used on another worker
        wait = bucket.take("Ada")
        if wait:
            retry = int(wait * 1000) + 1
            assert not strikes.is_abuse(too_many(retry), is_flood=True)
            # Timers may fire slightly early, and later by more.
            clock.now += retry * 1_000_000 - GRACE_NS + round(rng.uniform(0, latest) * NS)


@examples(max_examples=30, deadline=None)
@given(
    rate=st.integers(1, 200),
    waiting=st.integers(1, 190),
    seed=st.integers(0, 1 << 32),
    latest=st.sampled_from([0.0, 0.001, 0.2]),
)
def test_frame_repeated_at_its_retry_time_is_not_refused_again(
    rate: int, waiting: int, seed: int, latest: float
) -> None:
    """Many frames wait. Timers may fire slightly early, and later by more. Some clients give up."""
    clock, rng = Clock(), random.Random(seed)
    bucket, strikes = ReservingBucket(Pace.of(rate), clock=clock), Strikes(clock=clock)
    assert not any(bucket.take() for _ in range(4 * rate))
    told = [bucket.take() for _ in range(waiting)]
    assert told == sorted(set(told))
    for wait in told:
        assert not strikes.is_abuse(too_many(int(wait * 1000) + 1), is_flood=True)
    at = clock.now
    again = sorted(
        at + (int(wait * 1000) + 1) * 1_000_000 - GRACE_NS + round(rng.uniform(0, latest) * NS) for wait in told
    )
    for clock.now in again:
        if rng.random() < 0.9:
            assert bucket.take() == 0
    clock.now = again[-1] + 5 * NS
    assert [bucket.take() > 0 for _ in range(4 * rate + 1)] == [False] * 4 * rate + [True]


def test_retry_times_of_refused_frames_of_a_user_follow_each_other() -> None:
    clock = Clock()
    retries: Retries[str] = Retries(Pace.of(50.0), clock=clock)
    told = [retries.after("Ada", 500, 1) for _ in range(400)]
    assert told[:25] == [500] * 25
    assert told[25:] == [20 * number for number in range(26, 401)]
    assert retries.after("Ben", 500, 1) == 500
    assert retries.after("Ada", 60_000, 1) == 60_000
    assert retries.after("Ada", 500, 17) == 401 * 20 + 17 * 20
    # A client that keeps retrying waits longer, up to a bound.
    assert max(retries.after("Ada", 500, 1) for _ in range(5_000)) <= LATEST_NS // 1_000_000
    clock.now += LATEST_NS
    assert retries.after("Ada", 500, 1) == 500


def test_early_retries_are_strikes_only_over_the_rate_of_the_connection() -> None:
    clock = Clock()
    strikes = Strikes(clock=clock)
    for _ in range(300):
        assert not strikes.is_abuse(too_many(60_000))
    assert not strikes.is_abuse(too_many(60_000), is_flood=True)
    assert [strikes.is_abuse(too_many(60_000), is_flood=True) for _ in range(201)] == [False] * 200 + [True]


@pytest.mark.parametrize("code", ErrorCode)
def test_only_incorrect_frames_are_strikes(code: ErrorCode) -> None:
    strikes = Strikes(clock=Clock())
    are_abuse = [strikes.is_abuse(Error(code=code, message="", retry_after_ms=None)) for _ in range(300)]
    assert any(are_abuse) == (code in {ErrorCode.BAD_FRAME, ErrorCode.INVALID, ErrorCode.INTERNAL})


def test_smallest_rate_allows_a_frame() -> None:
    assert TokenBucket(Pace.of(0.01)).take() == 0


async def test_client_that_waits_as_told_is_not_closed(settings: Settings) -> None:
    # Pings do not use the database, so that a busy machine answers more of them than the rate allows.
    settings = msgspec.structs.replace(settings, ephemeral_rate=100.0)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        refusals = 0
        until = time.monotonic() + 30
        while refusals <= 210 and time.monotonic() < until:
            answer = await ada.ask(client.Ping())
            if isinstance(answer, Error):
                assert answer.code is ErrorCode.RATE_LIMITED
                assert answer.retry_after_ms is not None
                refusals += 1
                await asyncio.sleep(answer.retry_after_ms / 1000)
        # More refusals than the limit of strikes, had they counted. The connection continues.
        assert refusals > 200
        await ada.call(client.GetMe())


async def test_client_with_many_frames_in_flight_is_refused_and_not_closed(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, write_rate=1.0)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        frame = encode(message(await world.channel(ada))).decode()
        for _ in range(400):
            await ada.socket.send(frame)
        assert isinstance(await ada.call(client.GetMe()), server.OneMe)


@pytest.mark.parametrize("rate", [50.0, 5.0])
async def test_large_frame_takes_tokens_by_its_size_before_it_is_decoded(settings: Settings, rate: float) -> None:
    """Frames that are refused for their content count too, since decoding them is their cost."""
    settings = msgspec.structs.replace(settings, write_rate=rate)
    async with World(settings, workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        large = '{"type": "send", "content": "' + 250_000 * "x" + '"}'
        codes = [(await ada.raw(large)).code for _ in range(20)]
        tokens, each = int(4 * rate), 1 + 250_000 // TOKEN_BYTES
        whole = max(1, tokens // each)
        assert codes[:whole] == [ErrorCode.INVALID] * whole
        assert ErrorCode.RATE_LIMITED in codes[whole:]


async def test_client_that_does_not_wait_is_closed(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, frame_rate=1.0)
    async with World(settings, workers=1) as world:
        who = await world.user("Ada")
        ada = await world.connect(who)
        frame = encode(message(await world.channel(ada))).decode()
        for _ in range(300):
            await ada.socket.send(frame)
        assert await ada.closed() == CloseCode.ABUSE
        # Another connection starts without strikes, whatever `id` it has.
        await (await world.connect(who)).call(client.Ping())


async def test_ready_has_the_rates(settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, write_rate=50.0, frame_rate=200.0)
    async with World(settings, workers=1) as world:
        limits = (await world.connect(await world.user("Ada"))).ready.limits
    assert limits == advertised(settings)
    assert limits.writes == RateLimit(per_second=50.0, burst=150)
    assert {route.rate for route in ROUTES.values()} == {Rate.WRITE, Rate.READ, Rate.EPHEMERAL, Rate.SEARCH}


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9, 1.0, 5.0])
def test_charge_never_adds_tokens(rate: float) -> None:
    """With a rate below one per second, the bucket holds less than two tokens, and reserves little."""
    bucket = TokenBuckets[str]("frames", rate, clock=lambda: 0)
    while bucket.take("Ada") == 0:
        pass
    waits = [bucket.take("Ada")]
    for _ in range(20):
        bucket.charge("Ada", 1)
        waits.append(bucket.take("Ada"))
    assert waits == sorted(waits)
    assert waits[1] > waits[0]
