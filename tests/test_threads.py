"""Threads: numbers of replies, followers, and unread counts."""

import asyncio
from typing import Any

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import MessageId, uuid7
from protocol.values import ConversationSettings
from tests.world import Room, World, message, received_message, refused, sent


async def test_replies_are_numbered_and_not_listed_in_the_conversation(room: Room) -> None:
    root = await sent(room.ada, room.group, "Root")
    replies = [await sent(room.charles, room.group, str(number), parent_message_id=root) for number in range(5)]
    nested = await sent(room.ada, room.group, "5", parent_message_id=replies[2])
    loud = await sent(room.ada, room.group, "6", parent_message_id=root, also_in_conversation=True)
    told = [await received_message(room.charles, one) for one in (*replies, nested, loud)]
    assert [one.thread_order for one in told] == [1, 2, 3, 4, 5, 6, 7]
    assert {one.thread_root_id for one in told} == {root}
    page = await room.charles.call(client.History(conversation_id=room.group), server.MessagePage)
    assert [one.id for one in page.messages] == [root, loud]
    assert (page.messages[0].reply_count, page.messages[0].thread_order) == (7, 7)
    page = await room.charles.call(client.History(conversation_id=room.group, with_replies=True), server.MessagePage)
    assert len(page.messages) == 8
    place = room.at(root)

    async def thread(**fields: Any) -> tuple[list[str], bool, bool]:
        got = await room.charles.call(client.ListReplies(**place, limit=3, **fields), server.MessagePage)
        return [one.content for one in got.messages], got.has_before, got.has_after

    assert await thread() == (["4", "5", "6"], True, False)
    assert await thread(before_order=5) == (["1", "2", "3"], True, True)
    assert await thread(after_order=0) == (["0", "1", "2"], False, True)
    assert await thread(after_order=6) == (["6"], True, False)
    await room.ada.call(client.Delete(**room.at(nested)))
    got = await room.charles.call(client.GetThread(**place), server.OneThread)
    assert (got.thread.root.reply_count, got.thread.root.thread_order) == (6, 7)
    again = await sent(room.ada, room.group, "7", parent_message_id=root)
    assert (await received_message(room.charles, again)).thread_order == 8, "a number is not used twice"


async def test_participants_of_a_thread_follow_it_and_new_replies_are_counted(room: Room, world: World) -> None:
    root = await sent(room.ada, room.group, "Root")
    place = room.at(root)
    mary = await world.user("Mary")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[mary.id]))
    reader = await world.connect(mary)

    async def unread(one: object) -> tuple[bool, int]:
        view = (await one.call(client.GetThread(**place), server.OneThread)).thread  # type: ignore[attr-defined]
        return view.follow.is_following, view.unread_count

    first = await sent(room.charles, room.group, "1", parent_message_id=root)
    assert [await unread(one) for one in (room.ada, room.charles, reader)] == [(True, 1), (True, 0), (False, 1)]
    await reader.call(client.FollowThread(**place))
    assert (await reader.event(server.ThreadFollowChanged)).follow.is_following
    assert await unread(reader) == (True, 0), "earlier replies do not count as unread"
    await sent(room.charles, room.group, "2", parent_message_id=root)
    assert [await unread(one) for one in (room.ada, room.charles, reader)] == [(True, 2), (True, 0), (True, 1)]
    view = (await room.ada.call(client.GetThread(**place), server.OneThread)).thread
    assert (view.participants, view.last_reply and view.last_reply.content) == ([room.users[1].id], "2")
    listed = await room.ada.call(client.ListThreads(is_unread=True), server.ThreadList)
    assert [one.root.id for one in listed.threads] == [root]
    await room.ada.call(client.ReadThread(**place, thread_order=1))
    assert await unread(room.ada) == (True, 1)
    await room.ada.call(client.ReadThread(**place, thread_order=2))
    await room.ada.call(client.ReadThread(**place, thread_order=1))
    assert await unread(room.ada) == (True, 0), "the read position only moves forward"
    assert (await room.ada.call(client.ListThreads(is_unread=True), server.ThreadList)).threads == []
    assert len((await room.ada.call(client.ListThreads(), server.ThreadList)).threads) == 1
    await room.ada.call(client.UnfollowThread(**place))
    await sent(room.charles, room.group, "3", parent_message_id=root)
    await sent(room.ada, room.group, "4", parent_message_id=root)
    assert await unread(room.ada) == (False, 0), "a reply does not follow the thread again"
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.ada.call(client.FollowThread(**room.at(first)))


async def test_deleted_hidden_and_muted_replies_are_not_counted(room: Room) -> None:
    root = await sent(room.ada, room.group, "Root")
    gone, hidden, _ = [await sent(room.charles, room.group, str(number), parent_message_id=root) for number in range(3)]

    async def unread() -> int:
        return (await room.ada.call(client.GetThread(**room.at(root)), server.OneThread)).thread.unread_count

    assert await unread() == 3
    await room.charles.call(client.Delete(**room.at(gone)))
    await room.ada.call(client.Moderate(**room.at(hidden), reason="Rude"))
    assert await unread() == 1
    await room.ada.call(client.Mute(user_id=room.users[1].id))
    assert await unread() == 0
    await room.ada.call(client.Unmute(user_id=room.users[1].id))
    await room.ada.call(client.Unmoderate(**room.at(hidden)))
    assert await unread() == 2


async def test_concurrent_replies_are_numbered_without_gaps(room: Room, world: World) -> None:
    root = await sent(room.ada, room.group, "Root")
    frames = [message(room.group, str(number), parent_message_id=root) for number in range(40)]
    await asyncio.gather(*((room.ada, room.charles)[number % 2].call(frame) for number, frame in enumerate(frames)))
    query = "SELECT thread_order FROM message WHERE thread_root_id = $1 ORDER BY sent_version"
    orders = await world.db.fetch(query, root)
    assert [row[0] for row in orders] == list(range(1, 41))
    assert await world.db.fetchval("SELECT thread_order FROM message WHERE id = $1", root) == 40


async def test_thread_from_before_the_user_joined_is_not_found(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    owner = await world.connect(ada)
    about = await world.channel(owner, is_public=True, settings=ConversationSettings(history="from_joining"))
    root = await sent(owner, about, "Root")
    newcomer = await world.connect(charles, 1)
    await newcomer.call(client.Join(conversation_id=about))
    place = {"conversation_id": about, "message_id": root}
    for frame in (
        client.GetThread(**place),  # type: ignore[arg-type]
        client.ListReplies(**place),  # type: ignore[arg-type]
        client.FollowThread(**place),  # type: ignore[arg-type]
        client.Star(**place),  # type: ignore[arg-type]
        client.Why(**place),  # type: ignore[arg-type]
    ):
        with refused(ErrorCode.NOT_FOUND, "message_id"):
            await newcomer.call(frame)
    with refused(ErrorCode.NOT_FOUND, "quoted_message_id"):
        await sent(newcomer, about, quoted_message_id=root)
    with refused(ErrorCode.NOT_FOUND, "quoted_message_id"):
        await sent(newcomer, about, quoted_message_id=MessageId(uuid7()))
