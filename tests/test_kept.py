"""Pins, stars, forwards, quotes, drafts, scheduled messages, and the expiry of messages."""

from datetime import UTC, datetime, timedelta

import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import EditId, MessageId, uuid7
from protocol.payloads import Code
from protocol.values import ConversationSettings
from server.core.errors import NotFound
from server.jobs.expiry import expire_due
from server.queries import scheduled
from tests.world import Room, World, message, refused, sent

SOON = timedelta(hours=1)


async def test_pins_are_shared_by_all_participants(room: Room) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(3)]
    first = await room.ada.call(client.Pin(**room.at(ids[0])), server.Changed)
    assert await room.ada.call(client.Pin(**room.at(ids[0])), server.Changed) == first
    event = await room.charles.event(server.MessageEdited)
    assert (event.message.is_pinned, event.message.pinned_by) == (True, room.users[0].id)
    await room.ada.call(client.Pin(**room.at(ids[2])))
    pinned = await room.charles.call(client.ListPins(conversation_id=room.group), server.MessageList)
    assert [one.id for one in pinned.messages] == [ids[2], ids[0]]
    with refused(ErrorCode.FORBIDDEN, None):
        await room.charles.call(client.Unpin(**room.at(ids[0])))
    await room.ada.call(client.Unpin(**room.at(ids[0])))
    await room.ada.call(client.Delete(**room.at(ids[2])))
    assert (await room.charles.call(client.ListPins(conversation_id=room.group), server.MessageList)).messages == []
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.ada.call(client.Pin(**room.at(ids[2])))


async def test_number_of_pins_is_bounded(room: Room, world: World) -> None:
    message_id = await sent(room.ada, room.group)
    for number in range(100):
        await sent(room.ada, room.group, str(number))
    await world.db.execute("UPDATE message SET is_pinned = true WHERE id <> $1", message_id)
    with refused(ErrorCode.CONFLICT, "conversation_id"):
        await room.ada.call(client.Pin(**room.at(message_id)))


async def test_in_a_direct_conversation_both_may_pin(room: Room) -> None:
    made = await room.ada.call(client.CreateDirect(user_id=room.users[1].id), server.OneConversation)
    about = made.view.conversation.id
    message_id = await sent(room.ada, about)
    await room.charles.call(client.Pin(conversation_id=about, message_id=message_id))
    pinned = await room.ada.call(client.ListPins(conversation_id=about), server.MessageList)
    assert [one.id for one in pinned.messages] == [message_id]


async def test_stars_are_private_and_on_all_devices(room: Room, world: World) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(3)]
    phone = await world.connect(room.users[1])
    for one in ids:
        await room.charles.call(client.Star(**room.at(one)))
        await room.charles.call(client.Star(**room.at(one)))
        await phone.event(server.StarChanged, lambda event, one=one: event.star.message_id == one)  # type: ignore[misc]
    page = await phone.call(client.ListStars(limit=2), server.MessageList)
    assert [one.id for one in page.messages] == [ids[2], ids[1]]
    page = await phone.call(client.ListStars(limit=2, after=page.after), server.MessageList)
    assert ([one.id for one in page.messages], page.after) == ([ids[0]], None)
    await phone.call(client.Unstar(**room.at(ids[1])))
    assert (await room.charles.event(server.StarChanged, lambda event: event.star.is_removed)).star.message_id == ids[1]
    assert (await room.ada.call(client.ListStars(), server.MessageList)).messages == []
    await phone.call(client.Leave(conversation_id=room.group))
    assert (await phone.call(client.ListStars(), server.MessageList)).messages == []
    await phone.call(client.Unstar(**room.at(ids[0])))
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await phone.call(client.Star(**room.at(ids[1])))


async def test_forward_names_the_first_author(room: Room, world: World) -> None:
    source = message(room.group, "print(1)", payload=Code(language="python"))
    await room.ada.call(source)
    elsewhere = await world.channel(room.charles)
    frame = client.Forward(
        **room.at(source.message_id), to_conversation_id=elsewhere, new_message_id=MessageId(uuid7())
    )
    first = await room.charles.call(frame, server.Sent)
    got = await room.charles.call(
        client.GetMessage(conversation_id=elsewhere, message_id=frame.new_message_id), server.OneMessage
    )
    said = got.message
    assert (said.content, said.payload, said.sender_id) == (source.content, source.payload, room.users[1].id)
    assert (said.forwarded_from_id, said.forwarded_sender_id) == (source.message_id, room.users[0].id)
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await room.charles.call(
            client.Edit(conversation_id=elsewhere, message_id=frame.new_message_id, content="They said")
        )
    await room.ada.call(client.Edit(**room.at(source.message_id), content="print(2)"))
    assert await room.charles.call(frame, server.Sent) == first
    await room.ada.call(client.Delete(**room.at(source.message_id)))
    assert await room.charles.call(frame, server.Sent) == first
    again = client.Forward(
        **room.at(source.message_id), to_conversation_id=elsewhere, new_message_id=MessageId(uuid7())
    )
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.charles.call(again)
    other = await sent(room.ada, room.group, "Other")
    with refused(ErrorCode.NOT_FOUND, "to_conversation_id"):
        await room.ada.call(
            client.Forward(**room.at(other), to_conversation_id=elsewhere, new_message_id=MessageId(uuid7()))
        )
    taken = client.Forward(**room.at(other), to_conversation_id=elsewhere, new_message_id=frame.new_message_id)
    with refused(ErrorCode.CONFLICT, "new_message_id"):
        await room.charles.call(taken)


async def test_draft_is_private_and_on_all_devices(room: Room, world: World) -> None:
    phone = await world.connect(room.users[1])
    await room.charles.call(client.SetDraft(conversation_id=room.group, content="I thi"))
    assert (await phone.event(server.DraftChanged)).draft.content == "I thi"
    assert len((await phone.call(client.ListDrafts(), server.DraftList)).drafts) == 1
    assert (await room.ada.call(client.ListDrafts(), server.DraftList)).drafts == []
    await phone.call(client.SetDraft(conversation_id=room.group))
    await room.charles.event(server.DraftChanged, lambda event: not event.draft.content)
    assert (await phone.call(client.ListDrafts(), server.DraftList)).drafts == []
    await room.charles.call(client.SetDraft(conversation_id=room.group, content="Away"))
    # A device that was away receives it once when it is back.
    back = await world.connect(room.users[1], query="?resume=1")
    frame = client.Resume(epoch=back.ready.epoch, versions={}, user_version=0)
    await back.call(frame)
    assert (await back.event(server.DraftChanged)).draft.content == "Away"


def schedule(room: Room, content: str = "Later", at: datetime | None = None) -> client.Schedule:
    when = at or datetime.now(UTC) + SOON
    return client.Schedule(conversation_id=room.group, message_id=MessageId(uuid7()), content=content, send_at=when)


async def test_a_scheduled_message_is_sent_once_at_its_time(room: Room, world: World) -> None:
    frame = schedule(room)
    await room.ada.call(frame)
    frame.content, frame.send_at = "Now, @charles", datetime.now(UTC)
    await room.ada.call(frame)
    event = await room.charles.event(server.MessageSent)
    assert (event.message.id, event.message.content) == (frame.message_id, "Now, @charles")
    assert event.message.mentions == [room.users[1].id]
    told = await room.ada.event(server.ScheduledChanged, lambda event: event.scheduled.status == "sent")
    assert told.scheduled.message_id == frame.message_id
    assert (await room.ada.call(client.ListScheduled(), server.ScheduledList)).scheduled == []
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE id = $1", frame.message_id) == 1
    assert (await room.ada.call(frame, server.OneScheduled)).scheduled.status == "sent"


async def test_scheduled_message_is_sent_once_if_the_worker_dies_before_it_records_that(
    room: Room, world: World
) -> None:
    frame = schedule(room, at=datetime.now(UTC))
    await room.ada.call(frame)
    await room.ada.event(server.ScheduledChanged, lambda event: event.scheduled.status == "sent")
    # As if the worker had died: the row is claimed, and the send is not recorded.
    await world.db.execute(
        "UPDATE scheduled_message SET status = 'waiting', claimed_at = now() - 2 * $1::interval", scheduled.CLAIMED
    )
    await room.ada.event(
        server.ScheduledChanged, lambda event: event.scheduled.status == "sent", start=len(room.ada.events)
    )
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE id = $1", frame.message_id) == 1


async def test_scheduled_message_can_be_cancelled_until_it_is_sent(room: Room, world: World) -> None:
    frame = schedule(room)
    await room.ada.call(frame)
    place = room.at(frame.message_id)
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.charles.call(client.CancelScheduled(**place))
    with refused(ErrorCode.CONFLICT, "message_id"):
        await room.charles.call(schedule_of(frame))
    first = await room.ada.call(client.CancelScheduled(**place), server.OneScheduled)
    assert await room.ada.call(client.CancelScheduled(**place), server.OneScheduled) == first
    await world.db.execute("UPDATE scheduled_message SET status = 'waiting', claimed_at = now()")
    for late in (client.CancelScheduled(**place), schedule_of(frame)):
        with refused(ErrorCode.CONFLICT, "message_id"):
            await room.ada.call(late)
    with refused(ErrorCode.INVALID, "send_at"):
        await room.ada.call(schedule(room, at=datetime.now(UTC) + timedelta(days=400)))


async def test_message_postponed_by_slow_mode_can_be_listed_changed_and_cancelled(room: Room) -> None:
    slow = ConversationSettings(slow_mode_seconds=3600)
    await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=slow))
    await sent(room.charles, room.group)
    changed, cancelled = (schedule(room, at=datetime.now(UTC)) for _ in range(2))
    await room.charles.call(changed)
    told = await room.charles.event(server.ScheduledChanged, lambda event: event.scheduled.not_before is not None)
    assert told.scheduled.status == "waiting"
    await room.charles.call(cancelled)  # it is due after the other one
    listed = (await room.charles.call(client.ListScheduled(), server.ScheduledList)).scheduled
    assert {one.message_id for one in listed} == {changed.message_id, cancelled.message_id}
    first, second = (one for of in (changed, cancelled) for one in listed if one.message_id == of.message_id)
    assert first.not_before is not None
    assert first.not_before > first.send_at + timedelta(minutes=30)
    assert second.not_before is None
    changed.content, changed.send_at = "Changed", datetime.now(UTC) + SOON
    now = (await room.charles.call(changed, server.OneScheduled)).scheduled
    assert (now.words.content, now.not_before) == ("Changed", None)
    place = room.at(cancelled.message_id)
    now = (await room.charles.call(client.CancelScheduled(**place), server.OneScheduled)).scheduled
    assert now.status == "cancelled"
    listed = (await room.charles.call(client.ListScheduled(), server.ScheduledList)).scheduled
    assert [one.words.content for one in listed] == ["Changed"]


async def test_message_sent_before_it_was_postponed_cannot_be_cancelled(room: Room, world: World) -> None:
    frame = schedule(room, at=datetime.now(UTC))
    await room.ada.call(frame)
    await room.ada.event(server.ScheduledChanged, lambda event: event.scheduled.status == "sent")
    # As if the worker had lost the result of the send.
    await world.db.execute(
        "UPDATE scheduled_message SET status = 'waiting', claimed_at = NULL, not_before = now() + interval '1 hour'"
    )
    for late in (client.CancelScheduled(**room.at(frame.message_id)), schedule_of(frame)):
        with refused(ErrorCode.CONFLICT, "message_id"):
            await room.ada.call(late)


def schedule_of(frame: client.Schedule) -> client.Schedule:
    return client.Schedule(
        conversation_id=frame.conversation_id, message_id=frame.message_id, content="Changed", send_at=frame.send_at
    )


async def test_failed_scheduled_message_has_a_reason(room: Room) -> None:
    frame = schedule(room)
    await room.charles.call(frame)
    await room.charles.call(client.Leave(conversation_id=room.group))
    assert (await room.charles.call(client.ListScheduled(), server.ScheduledList)).scheduled
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[room.users[1].id]))
    frame.send_at = datetime.now(UTC)
    await room.charles.call(frame)
    await room.ada.event(server.MessageSent, lambda event: event.message.id == frame.message_id)
    other = schedule(room, at=datetime.now(UTC) + timedelta(seconds=1))
    await room.charles.call(other)
    await room.charles.call(client.Leave(conversation_id=room.group))
    told = await room.charles.event(server.ScheduledChanged, lambda event: event.scheduled.status == "failed")
    assert told.scheduled.problem == NotFound().message


async def test_messages_expire_if_the_settings_say_so(room: Room, world: World) -> None:
    kept = await sent(room.ada, room.group, "Kept")
    settings = ConversationSettings(expire_after_seconds=3600)
    await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=settings))
    frame = message(room.group, "Secret root")
    first, root = await room.ada.call(frame, server.Sent), frame.message_id
    reply = await sent(room.charles, room.group, "Secret reply", parent_message_id=root)
    await room.charles.call(client.Edit(**room.at(reply), content="Secret again", edit_id=EditId(uuid7())))
    got = (await room.ada.call(client.GetMessage(**room.at(root)), server.OneMessage)).message
    assert got.expires_at == got.created_at + timedelta(hours=1)
    await world.db.execute("UPDATE message SET expires_at = now() WHERE expires_at IS NOT NULL")
    for one in (root, reply):
        event = await room.charles.event(server.MessageDeleted, lambda event, one=one: event.message.id == one)  # type: ignore[misc]
        assert (event.message.content, event.message.deleted_by) == ("", None)
    await expire_due(world.workers[0].app._database, world.workers[0].app.hub)  # noqa: SLF001 - none expires twice
    assert await room.ada.call(frame, server.Sent) == first, "a repeated send stores no second message"
    assert await world.db.fetchval("SELECT count(*) FROM message_edit") == 0, "no content is kept"
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE content LIKE 'Secret%'") == 0
    assert (await room.ada.call(client.GetMessage(**room.at(kept)), server.OneMessage)).message.content == "Kept"


async def test_no_copy_of_the_content_of_an_expired_message_remains(room: Room, world: World) -> None:
    """The content of the scheduled message and the content that was kept on deletion are covered."""
    settings = ConversationSettings(expire_after_seconds=3600)
    await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=settings))
    scheduled = schedule(room, "Secret, scheduled", datetime.now(UTC))
    await room.ada.call(scheduled)
    await room.charles.event(server.MessageSent, lambda event: event.message.id == scheduled.message_id)
    deleted = await sent(room.ada, room.group, "Secret, deleted")
    await room.ada.call(client.Edit(**room.at(deleted), content="Secret, edited", edit_id=EditId(uuid7())))
    gone = await room.ada.call(client.Delete(**room.at(deleted)), server.Changed)
    await world.indexed()
    traces = "SELECT coalesce(array_agg(place ORDER BY place), '{}') FROM traces(ARRAY['%secret%'])"
    assert await world.db.fetchval(traces) == ["message.content", "message_edit.content", "scheduled_message.words"]
    await world.db.execute("UPDATE message SET expires_at = now() WHERE expires_at IS NOT NULL")
    await room.charles.event(server.MessageDeleted, lambda event: event.message.id == scheduled.message_id)
    app = world.workers[0].app
    await expire_due(app._database, app.hub)  # noqa: SLF001 - rows that another run left
    assert await world.db.fetchval(traces) == []
    assert await world.db.fetchval("SELECT count(*) FROM message_search WHERE words @@ 'secret'") == 0
    # A repeated send stores and publishes neither of them again.
    await room.ada.call(scheduled)
    assert await room.ada.call(client.Delete(**room.at(deleted)), server.Changed) == gone
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE expires_at IS NOT NULL") == 0


@pytest.mark.parametrize("window", [0, 3600])
async def test_edit_after_the_edit_window_is_refused(room: Room, world: World, window: int) -> None:
    settings = ConversationSettings(edit_window_seconds=window)
    await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=settings))
    message_id = await sent(room.ada, room.group, "One")
    if window:
        await room.ada.call(client.Edit(**room.at(message_id), content="Two"))
        await world.db.execute("UPDATE message SET created_at = created_at - interval '1 hour'")
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await room.ada.call(client.Edit(**room.at(message_id), content="Three"))


async def test_setting_decides_who_sees_the_edits_of_a_message(room: Room) -> None:
    message_id = await sent(room.charles, room.group, "One")
    await room.charles.call(client.Edit(**room.at(message_id), content="Two"))
    for visible_to, owner_sees in (("everyone", True), ("moderators", True), ("nobody", False)):
        settings = ConversationSettings(edits_visible_to=visible_to)  # type: ignore[arg-type]
        await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=settings))
        for one, sees in ((room.charles, True), (room.ada, owner_sees)):
            if sees:
                page = await one.call(client.ListEdits(**room.at(message_id)), server.EditPage)
                assert [edit.content for edit in page.edits] == ["One"]
            else:
                with refused(ErrorCode.NOT_FOUND, "message_id"):
                    await one.call(client.ListEdits(**room.at(message_id)))
    hers = await sent(room.ada, room.group, "One")
    await room.ada.call(client.Edit(**room.at(hers), content="Two"))
    settings = ConversationSettings(edits_visible_to="moderators")
    await room.ada.call(client.UpdateConversation(conversation_id=room.group, settings=settings))
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.charles.call(client.ListEdits(**room.at(hers)))
