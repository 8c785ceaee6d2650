"""Read receipts and unread counts, which agree in lists, the badge and notifications."""

import random
from typing import Any

import pytest

from protocol import client, server
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, MessageId
from prove import truth
from prove.client import Client
from server.queries import badge
from server.queries import unread as counting
from tests.world import Room, UserSession, World, message, refused, sent


async def listed(one: Client, about: ConversationId) -> int:
    view = (await one.call(client.GetConversation(conversation_id=about), server.OneConversation)).view
    return view.unread_count


async def test_unread_count_excludes_own_deleted_hidden_and_muted_messages(room: Room, world: World) -> None:
    root = await sent(room.ada, room.group, "Counts")
    gone, hidden, _ = [await sent(room.ada, room.group, str(number)) for number in range(3)]
    await sent(room.charles, room.group, "One's own")
    await sent(room.ada, room.group, "In its thread", parent_message_id=root)
    await sent(room.ada, room.group, "In both", parent_message_id=root, also_in_conversation=True)
    mary = await world.user("Mary")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[mary.id]))
    await sent(await world.connect(mary), room.group, "Mary's")
    assert await listed(room.charles, room.group) == 6
    await room.ada.call(client.Delete(**room.at(gone)))
    await world.moderate_as_owner(client.Moderate(**room.at(hidden), reason="Rude"))
    assert await listed(room.charles, room.group) == 4
    for silence, sound in ((client.Mute, client.Unmute), (client.Block, client.Unblock)):
        await room.charles.call(silence(user_id=mary.id))
        assert await listed(room.charles, room.group) == 3
        await room.charles.call(sound(user_id=mary.id))
    assert (await room.charles.call(client.GetBadge(), server.Badge)).messages == 4
    await room.charles.call(client.SetPreferences(conversation_id=room.group, is_muted=True))
    assert (await room.charles.call(client.GetBadge(), server.Badge)).messages == 0
    assert await listed(room.charles, room.group) == 4


async def test_mark_as_unread_is_private(room: Room, world: World) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(4)]
    phone = await world.connect(room.users[1])
    await room.charles.call(client.Read(**room.at(ids[3])))
    marked = await room.charles.call(client.MarkUnread(**room.at(ids[1])), server.ReadUpTo)
    assert marked.unread_count == 3
    told = await phone.event(server.PreferencesChanged, lambda event: event.preferences.unread_from_id == ids[1])
    assert told.conversation_id == room.group
    assert await listed(phone, room.group) == 3
    assert (await phone.call(client.GetBadge(), server.Badge)).messages == 3
    readers = await room.ada.call(client.ListReaders(**room.at(ids[3])), server.Readers)
    assert [one.user_id for one in readers.readers] == [room.users[1].id], "others do not see the mark"
    got = await phone.call(client.Read(**room.at(ids[2])), server.ReadUpTo)
    assert (got.message_id, got.unread_count) == (ids[3], 0), "any `read` removes the mark"
    await room.charles.event(server.PreferencesChanged, lambda event: event.preferences.unread_from_id is None)
    assert await listed(phone, room.group) == 0


async def test_delivered_and_read_positions_are_separate(room: Room, world: World) -> None:
    first, second = await sent(room.ada, room.group, "1"), await sent(room.ada, room.group, "2")
    await room.charles.call(client.Delivered(**room.at(second)))
    told = await room.ada.event(server.MessageDelivered)
    assert (told.user_id, told.message_id) == (room.users[1].id, second)
    got = await room.ada.call(client.ListReaders(**room.at(first)), server.Readers)
    assert (got.delivered_to, got.read_by, got.readers) == (1, 0, [])
    await room.charles.call(client.Read(**room.at(first)))
    got = await room.ada.call(client.ListReaders(**room.at(first)), server.Readers)
    assert (got.delivered_to, got.read_by, [one.user_id for one in got.readers]) == (1, 1, [room.users[1].id])
    assert got.readers[0].read_at is not None
    await room.charles.call(client.Delivered(**room.at(first)))
    got = await room.ada.call(client.ListReaders(**room.at(second)), server.Readers)
    assert (got.delivered_to, got.read_by) == (1, 0), "the position only moves forward"
    frame = client.Resume(epoch=room.ada.ready.epoch, versions={room.group: 1})
    back = await world.connect(room.users[0], query="?resume=1")
    await back.call(frame)
    (receipt,) = (await back.event(server.Changes)).receipts
    assert (receipt.message_id, receipt.delivered_message_id) == (first, second)


async def test_readers_took_part_when_the_message_was_sent_and_still_do(room: Room) -> None:
    async def read_by(message_id: MessageId) -> tuple[int, int, int]:
        got = await room.ada.call(client.ListReaders(**room.at(message_id)), server.Readers)
        one = await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
        return got.read_by, len(got.readers), one.read_by

    before = await sent(room.ada, room.group)
    await room.charles.call(client.Read(**room.at(before)))
    assert await read_by(before) == (1, 1, 1)
    await room.charles.call(client.Leave(conversation_id=room.group))
    assert await read_by(before) == (0, 0, 0)
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[room.users[1].id]))
    after = await sent(room.ada, room.group)
    await room.charles.call(client.Read(**room.at(after)))
    assert [await read_by(one) for one in (before, after)] == [(0, 0, 0), (1, 1, 1)]


async def test_readers_in_a_crowd_are_counted_and_not_listed(room: Room, world: World) -> None:
    await world.db.execute("UPDATE conversation SET participant_count = 101 WHERE id = $1", room.group)
    message_id = await sent(room.ada, room.group)
    await room.charles.call(client.Read(**room.at(message_id)))
    got = await room.ada.call(client.ListReaders(**room.at(message_id)), server.Readers)
    assert (got.is_crowd, got.read_by, got.readers) == (True, 1, [])


async def badges(world: World, who: UserSession) -> list[int]:
    """Return the number of unread messages in `get_badge` and in notifications, which two statements count."""
    async with world.db.transaction():
        own = await badge.of(world.db, who.id)
    return [own.messages, (await counting.badges(world.db, {who.id})).get(who.id, 0)]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
async def test_unread_count_equals_a_simple_recount(world: World, seed: int) -> None:
    chance = random.Random(seed)
    people = await world.users("Ada", "Charles", "Mary", "Grace")
    clients = [await world.connect(who, number % 2) for number, who in enumerate(people)]
    groups = [await world.group(clients[0], *people[1:]) for _ in range(2)]
    said: list[tuple[ConversationId, MessageId]] = [(group, await sent(clients[0], group)) for group in groups]
    for _ in range(250):
        one, other = chance.choice(clients), chance.choice(people).id
        about, message_id = chance.choice(said)
        place: dict[str, Any] = {"conversation_id": about, "message_id": message_id}
        parent = message_id if chance.random() < 0.4 else None
        is_both = parent is not None and chance.random() < 0.3
        send = message(about, "Words", parent_message_id=parent, also_in_conversation=is_both)
        frame = chance.choice([
            send, send, send, client.Delete(**place), client.Moderate(**place, reason="Rude"),
            client.Unmoderate(**place), client.Read(**place), client.MarkUnread(**place), client.Block(user_id=other),
            client.Unblock(user_id=other), client.Mute(user_id=other), client.Unmute(user_id=other),
        ])  # fmt: skip
        try:
            answer: server.Result = await one.call(frame)
        except Refused:
            continue
        if isinstance(frame, client.Send):
            said.append((about, frame.message_id))
        elif isinstance(answer, server.ReadUpTo):
            assert answer.unread_count == await truth.unread(world.db, one.ready.user.id, about), frame
    counts = 0
    for who, one in zip(people, clients, strict=True):
        views = (await one.call(client.ListConversations(), server.ConversationPage)).conversations
        recounted = {group: await truth.unread(world.db, who.id, group) for group in groups}
        assert {view.conversation.id: view.unread_count for view in views} == recounted
        assert await badges(world, who) == [sum(recounted.values())] * 2
        counts += sum(recounted.values())
    assert counts, "the scenario has no unread messages"
    assert await truth.recount(world.db) == []


async def test_message_that_the_user_cannot_see_cannot_be_marked(room: Room, world: World) -> None:
    message_id = await sent(room.ada, room.group)
    stranger: UserSession = await world.user("Stranger")
    one = await world.connect(stranger)
    for frame in (
        client.MarkUnread(**room.at(message_id)),
        client.Delivered(**room.at(message_id)),
        client.ListReaders(**room.at(message_id)),
    ):
        with refused(ErrorCode.NOT_FOUND, "message_id"):
            await one.call(frame)


MANY = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version) SELECT 'group', 'One of many', $2, 4
    FROM generate_series(1, 120) RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, version)
    SELECT made.id, who, 2 FROM made, unnest(ARRAY[$1::uuid, $2]) who
)
INSERT INTO message (conversation_id, sender_id, content, sent_version, version) SELECT id, $2, 'Hello', 4, 4 FROM made
"""


async def test_badge_adds_up_at_most_a_hundred_conversations(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(MANY, ada.id, charles.id)
    one = await world.connect(ada)
    assert (await one.call(client.GetBadge(), server.Badge)).messages == counting.MAX_IN_BADGE
    listed_first = [event for event in one.events if isinstance(event, server.Conversations)]
    assert sum(len(event.conversations) for event in listed_first) == 120, "all conversations are sent on connecting"
    assert [event.is_last for event in listed_first] == [False, False, True]


async def test_badge_stops_at_its_maximum(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    await world.db.execute(MANY, ada.id, charles.id)
    await world.db.execute(
        """INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT conversation_id, $1, 'Hello', n, n FROM conversation_participant, generate_series(5, 24) n
        WHERE user_id = $2""",
        charles.id,
        ada.id,
    )
    assert await badges(world, ada) == [counting.MAX_BADGE] * 2 == [1_000] * 2
