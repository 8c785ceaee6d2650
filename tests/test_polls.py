"""Polls under concurrent votes on two workers: one vote per user, bounds, closing, deletion, and correct counts."""

import asyncio
import random
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import MessageId
from protocol.payloads import Poll
from protocol.server import Changed, Error, PollVoted
from prove.client import Client
from prove.truth import recount
from tests.world import Room, World, events_of, sent, until

OPTIONS = 3
VOTERS = 4
ROUNDS = 6


async def poll(room: Room, world: World, *, is_multiple: bool) -> tuple[MessageId, list[list[Client]]]:
    """Return a poll in the room, and its voters with a device on each worker."""
    people = await world.users(*(f"Voter {number}" for number in range(VOTERS)))
    ids = [one.id for one in people]
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=ids))
    devices = [[await world.connect(one, worker) for worker in (0, 1)] for one in people]
    options = [f"Option {number}" for number in range(OPTIONS)]
    return await sent(room.ada, room.group, "Which?", payload=Poll(options=options, is_multiple=is_multiple)), devices


async def votes_of(room: Room, message_id: MessageId) -> dict[Any, list[int]]:
    listed = client.ListVotes(conversation_id=room.group, message_id=message_id, limit=100)
    page = await room.ada.call(listed, server.VotePage)
    return {vote.user_id: vote.options for vote in page.votes}


async def standing(room: Room, message_id: MessageId) -> tuple[list[int], int]:
    got = await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert got.message.poll_counts is not None
    return got.message.poll_counts, got.message.poll_voters


@pytest.mark.parametrize("is_multiple", [False, True])
async def test_concurrent_votes_count_once_per_user(room: Room, world: World, *, is_multiple: bool) -> None:
    chance = random.Random(int(is_multiple))
    message_id, devices = await poll(room, world, is_multiple=is_multiple)

    async def keep_voting(one: Client) -> None:
        for _ in range(ROUNDS):
            options = chance.sample(range(OPTIONS + 1), chance.choice([0, 1, 1, 2]))
            answer = await one.ask(client.Vote(**room.at(message_id), options=options))
            is_refused = OPTIONS in options or (len(options) > 1 and not is_multiple)
            code = answer.code if isinstance(answer, Error) else None
            assert code is (ErrorCode.INVALID if is_refused else None), options

    await asyncio.gather(*(keep_voting(one) for both in devices for one in both))
    # Both devices of each voter send the same vote, which counts once.
    last = [client.Vote(**room.at(message_id), options=[number % OPTIONS]) for number in range(VOTERS)]
    await asyncio.gather(
        *(one.call(client.Vote(**room.at(message_id), options=vote.options))
          for vote, both in zip(last, devices, strict=True) for one in both)
    )  # fmt: skip
    votes = await votes_of(room, message_id)
    assert votes == {both[0].ready.user.id: vote.options for vote, both in zip(last, devices, strict=True)}
    expected = [sum(option in options for options in votes.values()) for option in range(OPTIONS)]
    assert await standing(room, message_id) == (expected, VOTERS)
    assert await recount(world.db) == []
    for one in (room.ada, room.charles, devices[0][0], devices[0][1]):
        await require_counts(one, message_id, (expected, VOTERS))


async def require_counts(one: Client, message_id: MessageId, end: tuple[list[int], int]) -> None:
    """Require that each event of a poll has the counts of its version, and the last one those of `end`."""

    def told() -> list[PollVoted]:
        return [event for event in events_of(one, PollVoted) if event.message_id == message_id]

    await until(lambda: [(event.poll_counts, event.poll_voters) for event in told()[-1:]] == [end])
    votes: dict[Any, list[int]] = {}
    for before, event in pairwise([None, *told()]):
        assert event is not None
        assert before is None or before.version < event.version
        assert event.options is not None
        votes[event.user_id] = event.options
        expected = [sum(option in options for options in votes.values()) for option in range(OPTIONS)]
        # An event inside `changes` has the counts of the time when the worker read it.
        is_live = event in one.events
        assert not is_live or (event.poll_counts, event.poll_voters) == (expected, sum(map(bool, votes.values())))


async def voted_until(
    room: Room, message_id: MessageId, devices: list[Client], frame: client.ClosePoll | client.Delete, again: Client
) -> tuple[Changed, set[tuple[ErrorCode, str | None]]]:
    """Vote on all devices until each is refused, while the poll's sender ends the poll on both workers concurrently.
    Require that it ends once, after all votes. Return the reply to that, and the refusals.
    """
    answered: list[int] = []
    refusals = set()

    async def vote_on(one: Client, first: int) -> None:
        for turn in range(1_000):
            answer = await one.ask(client.Vote(**room.at(message_id), options=[(first + turn) % OPTIONS]))
            if isinstance(answer, Error):
                refusals.add((answer.code, answer.path))
                return
            assert isinstance(answer.result, Changed)
            answered.append(answer.result.version)

    voting = [asyncio.create_task(vote_on(one, number)) for number, one in enumerate(devices)]
    await until(lambda: len(answered) >= len(devices))
    ended = await asyncio.gather(*(one.call(msgspec.structs.replace(frame), Changed) for one in (room.ada, again)))
    await asyncio.gather(*voting)
    assert ended[0].version == ended[1].version
    assert max(answered) < ended[0].version
    return ended[0], refusals


def require_no_votes_after(one: Client, version: int) -> None:
    assert all(event.version < version for event in events_of(one, PollVoted))


async def test_vote_after_the_poll_was_closed_does_not_count(room: Room, world: World) -> None:
    message_id, devices = await poll(room, world, is_multiple=False)
    every = [one for both in devices for one in both]
    again = await world.connect(room.users[0], 1)
    frame = client.ClosePoll(**room.at(message_id))
    closed, refusals = await voted_until(room, message_id, every, frame, again)
    assert refusals == {(ErrorCode.FORBIDDEN, "message_id")}
    votes = await votes_of(room, message_id)
    expected = [sum(options == [option] for options in votes.values()) for option in range(OPTIONS)]
    assert await standing(room, message_id) == (expected, VOTERS)
    await room.charles.event(server.MessageEdited, lambda event: event.message.poll_closed_at is not None)
    require_no_votes_after(room.charles, closed.version)
    assert await recount(world.db) == []


async def test_vote_after_the_poll_was_deleted_does_not_count(room: Room, world: World) -> None:
    message_id, devices = await poll(room, world, is_multiple=False)
    every = [one for both in devices for one in both]
    again = await world.connect(room.users[0], 1)
    frame = client.Delete(**room.at(message_id))
    deleted, refusals = await voted_until(room, message_id, every, frame, again)
    assert refusals == {(ErrorCode.NOT_FOUND, "message_id")}
    event = await room.charles.event(server.MessageDeleted)
    assert (event.version, event.message.poll_counts, event.message.poll_voters) == (deleted.version, None, 0)
    require_no_votes_after(room.charles, deleted.version)
    assert await recount(world.db) == []


@pytest.mark.parametrize("offset", [timedelta(), timedelta(hours=5, minutes=30), -timedelta(hours=23, minutes=59)])
async def test_poll_closes_at_its_time_in_each_time_zone(world: World, offset: timedelta) -> None:
    for seconds, has_passed in ((-0.01, True), (60.25, False)):
        at = (datetime.now(UTC) + timedelta(seconds=seconds)).astimezone(timezone(offset))
        closes_at = msgspec.to_builtins(Poll(options=["Yes", "No"], closes_at=at))["closes_at"]
        assert await world.db.fetchval("SELECT has_passed($1)", closes_at) == has_passed, closes_at
    for first_or_last, has_passed in (("0001-01-01T00:00:01Z", True), ("9999-12-31T23:59:59.999998Z", False)):
        assert await world.db.fetchval("SELECT has_passed($1)", first_or_last) == has_passed
