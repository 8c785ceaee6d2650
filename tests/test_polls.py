"""Polls under concurrent votes on two workers: one vote per user, bounds, closing, and correct counts."""

import asyncio
import random
from typing import Any

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import MessageId
from protocol.payloads import Poll
from protocol.server import Changed, Error
from prove.client import Client
from prove.truth import recount
from tests.world import Room, World, sent, until

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


async def test_vote_after_the_poll_was_closed_does_not_count(room: Room, world: World) -> None:
    message_id, devices = await poll(room, world, is_multiple=False)
    every = [one for both in devices for one in both]
    answered: list[int] = []

    async def vote_until_closed(one: Client, first: int) -> None:
        for turn in range(1_000):
            answer = await one.ask(client.Vote(**room.at(message_id), options=[(first + turn) % OPTIONS]))
            if isinstance(answer, Error):
                assert (answer.code, answer.path) == (ErrorCode.FORBIDDEN, "message_id")
                return
            assert isinstance(answer.result, Changed)
            answered.append(answer.result.version)

    voting = [asyncio.create_task(vote_until_closed(one, number)) for number, one in enumerate(every)]
    await until(lambda: len(answered) >= len(every))
    # The poll is closed concurrently on both workers, and counts as closed once.
    again = await world.connect(room.users[0], 1)
    closed = await asyncio.gather(
        *(one.call(client.ClosePoll(**room.at(message_id)), Changed) for one in (room.ada, again))
    )
    await asyncio.gather(*voting)
    assert closed[0].version == closed[1].version
    assert max(answered) < closed[0].version
    votes = await votes_of(room, message_id)
    expected = [sum(options == [option] for options in votes.values()) for option in range(OPTIONS)]
    assert await standing(room, message_id) == (expected, VOTERS)
    await room.charles.event(server.MessageEdited, lambda event: event.message.poll_closed_at is not None)
    told = [event for event in room.charles.events if isinstance(event, server.PollVoted)]
    assert all(event.version < closed[0].version for event in told)
    assert await recount(world.db) == []
