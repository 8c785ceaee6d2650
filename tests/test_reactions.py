"""Reactions under concurrent changes on two workers: counts, versions, and the last free emoji of a message.

`test_batched_changes.py` has the tests that votes share.
"""

import asyncio
import random
from typing import Any

from protocol import client, server
from protocol.ids import MessageId
from protocol.server import MessageReacted, MessageUnreacted
from prove.client import Client
from prove.truth import recount
from server.queries.reactions import FUNCTION, ReactionChange
from tests.test_batched_changes import Stage, reason, stage
from tests.world import World, events_of, received_message, sent, until

__all__ = ["stage"]  # a fixture


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
    outcomes = await FUNCTION.waiting(stage.world.db, batch)
    assert [reason(one) for one in outcomes] == ["stored"] * 4 + ["too_many_of_message", "stored"]
    assert [one.total for one in outcomes if isinstance(one, ReactionChange)] == [1, 1, 2, 1, 2]


def reacted(one: Client) -> list[Any]:
    return events_of(one, MessageReacted, MessageUnreacted)


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
