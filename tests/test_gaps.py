"""Events that arrive before missing ones, while other missing events are being fetched."""

import asyncio
from collections.abc import Sequence

import pytest

from protocol import client, server
from protocol.codec import encode, text_frame
from protocol.errors import ErrorCode
from protocol.ids import ConversationId
from protocol.server import Error
from server.hub import topics
from server.hub.entries import NOBODY
from server.hub.topics import Fetched, Topics
from tests.world import World, events_of, new_messages, received_message, sent, until

EVENT = text_frame(encode(Error(code=ErrorCode.INTERNAL, message="This stands for an event.")))
BUMP = "UPDATE conversation SET version = version + 1, settings_version = version + 1 WHERE id = $1 RETURNING version"


@pytest.mark.parametrize("early", [[4], [5, 1, 2], [7, 5, 1], [3, 6, 2, 1], []], ids=str)
async def test_missing_events_are_fetched_without_waiting_for_the_comparison(
    world: World, monkeypatch: pytest.MonkeyPatch, early: list[int]
) -> None:
    """The second event arrives first. The versions in `early` arrive while the missing events are being read."""
    one = await world.connect(await world.user("Ada"))
    about = await world.channel(one)
    topics = world.workers[0].app.hub.topics
    topic = topics._topics[about]  # noqa: SLF001
    base = topic.delivered
    since = topics._store.since  # noqa: SLF001
    fetched: list[int] = []

    async def late(conversation_id: ConversationId, version: int) -> Fetched | None:
        found = await since(conversation_id, version)
        fetched.append(version - base)
        if len(fetched) == 1:
            for _ in range(2, max(early, default=2)):
                await world.db.fetchval(BUMP, about)
            for number in early:
                topics.accept(about, base + number, EVENT, NOBODY)
        return found

    async def no_comparison(_: Topics) -> None:
        return

    monkeypatch.setattr(Topics, "compare", no_comparison)
    monkeypatch.setattr(topics._store, "since", late)  # noqa: SLF001
    for _ in range(2):
        await world.db.fetchval(BUMP, about)
    topics.accept(about, base + 2, EVENT, NOBODY)
    await until(lambda: topic.delivered == base + max(early, default=2) and topic.fetch is None, seconds=3)
    assert topic.early == {}
    assert len(fetched) <= 1 + len(early)
    # An event whose version is not in PostgreSQL causes only one query.
    fetched.clear()
    topics.accept(about, topic.delivered + 2, EVENT, NOBODY)
    await until(lambda: topic.fetch is None)
    assert len(fetched) == 1


async def test_cancelled_caller_does_not_cancel_the_opening_of_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await world.connect(await world.user("Ada"))
    about = await world.channel(one)
    topics = world.workers[1].app.hub.topics
    versions, may_read = topics._store.versions, asyncio.Event()  # noqa: SLF001

    async def slow(conversation_ids: Sequence[ConversationId]) -> dict[ConversationId, int]:
        await may_read.wait()
        return await versions(conversation_ids)

    monkeypatch.setattr(topics._store, "versions", slow)  # noqa: SLF001
    first, *others = [asyncio.create_task(topics.open([about])) for _ in range(3)]
    await until(lambda: about in topics._topics)  # noqa: SLF001
    first.cancel()
    others.pop().cancel()
    await asyncio.wait([first])
    may_read.set()
    await others[0]
    topic = topics._topics[about]  # noqa: SLF001
    assert (first.cancelled(), topic.opening, topic.delivered > 0) == (True, None, True)


@pytest.mark.parametrize("is_crowd", [False, True])
async def test_removed_participant_receives_nothing_later_when_the_removal_was_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, *, is_crowd: bool
) -> None:
    """A worker ends after it has committed a removal. A later message makes the other one read both."""
    monkeypatch.setattr(topics, "MAX_SHARED_PARTICIPANTS", 1 if is_crowd else 100)
    ada, bob, mary = await world.users("Ada", "Bob", "Mary")
    here = await world.connect(ada)
    about = await world.channel(here, is_public=True)
    removed, other = await world.connect(bob, 1), await world.connect(mary, 1)
    for one in (removed, other):
        await one.call(client.Join(conversation_id=about))
    with monkeypatch.context() as lost:
        lost.setattr(world.workers[0].app.hub.bus, "publish", lambda *_: None)
        await here.call(client.RemoveParticipant(conversation_id=about, user_id=bob.id))
    later = await sent(here, about)
    await received_message(other, later)
    await until(lambda: bool(events_of(removed, server.ConversationLeft)))
    assert later not in {message.id for message in new_messages(removed)}
    assert events_of(other, server.ParticipantLeft)
