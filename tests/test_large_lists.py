"""Lists of rows of maximum size: no answer, and no frame on connecting, is larger than a page and one row."""

import asyncio
import typing
from datetime import timedelta
from typing import Any

import msgspec

from protocol import client, server
from protocol.codec import encode, now
from protocol.errors import ErrorCode
from protocol.ids import MessageId, uuid7
from protocol.limits import MAX_PAGE_BYTES, MAX_SENT_BYTES
from prove.client import Client
from server.routes import ROUTES
from tests.world import Room, World, message, refused, sent

ROW_BYTES = 100_000
"""Larger than the largest row: a thread with a root and a reply."""
MANY = 30
SMALL = {
    server.OneConversation: "ids of at most 100 users",
    server.Added: "ids of at most 100 users",
    server.UserList: "at most 100 users",
    server.InvitationList: "at most 100 invitations of 7 KB",
    server.PublicConversationList: "at most 100 conversations of 7 KB",
    server.Readers: "at most 100 participants",
    server.DeliveryReport: "at most 100 recipients",
    server.PresenceList: "at most 500 users",
    server.OneMessage: "one message, with the caller's own vote",
}
"""Results whose lists need no pages, and the reason."""
LARGEST = (
    "UPDATE message SET content = repeat('😀', 10000)",
    "UPDATE message_edit SET content = repeat('😀', 10000)",
    "UPDATE draft SET content = repeat('😀', 10000)",
    "UPDATE scheduled_message SET words = jsonb_set(words, '{content}', to_jsonb(repeat('😀', 10000)))",
)


def has_rows(kind: Any) -> bool:
    return typing.get_origin(kind) is list or any(has_rows(one) for one in typing.get_args(kind))


def test_every_result_with_rows_has_pages_or_a_bound() -> None:
    without = set()
    for frame, route in ROUTES.items():
        result = typing.get_type_hints(route.handler)["return"]
        fields = {field.name: field.type for field in msgspec.structs.fields(result)}
        if not any(has_rows(kind) for kind in fields.values()) or "has_after" in fields:
            continue
        if not ("after" in fields and "after" in frame.__struct_fields__):
            without.add(result)
    assert without == SMALL.keys()


async def walked(one: Client, frame: Any) -> list[Any]:
    """Return all pages of a list."""
    pages: list[Any] = []
    while not pages or pages[-1].after is not None:
        after = {"after": pages[-1].after} if pages else {}
        answer = await one.ask(msgspec.structs.replace(frame, id=None, **after))
        assert isinstance(answer, server.Reply), (frame, answer)
        assert len(encode(answer)) < MAX_PAGE_BYTES + ROW_BYTES < MAX_SENT_BYTES, frame
        pages.append(answer.result)
    return pages


async def test_no_list_exceeds_a_page(room: Room, world: World) -> None:
    ada, group = room.ada, room.group
    rooms = [await world.channel(ada) for _ in range(MANY)]
    said = [await sent(ada, group, f"Number {number}") for number in range(MANY)]
    later = [MessageId(uuid7()) for _ in said]
    for number, about in enumerate(rooms):
        soon = now() + timedelta(days=1, seconds=number)
        scheduled = client.Schedule(conversation_id=about, message_id=later[number], content="Later", send_at=soon)
        frames = [
            message(about), client.SetDraft(conversation_id=about, content="I thi"),
            client.Pin(**room.at(said[number])), client.Edit(**room.at(said[0]), content=f"Edit {number}"), scheduled,
        ]  # fmt: skip
        answers = await asyncio.gather(*(ada.ask(frame) for frame in frames))
        assert not [answer for answer in answers if isinstance(answer, server.Error)]
        await sent(room.charles, group, "Yes", parent_message_id=said[number])
    for statement in LARGEST:
        await world.db.execute(statement)
    edits = [row[0] for row in await world.db.fetch("SELECT id FROM message_edit ORDER BY version DESC")]

    lists: list[tuple[Any, typing.Callable[[Any], list[Any]], list[Any]]] = [
        (client.ListPins(conversation_id=group), lambda page: [one.id for one in page.messages], said[::-1]),
        (client.ListThreads(), lambda page: [one.root.id for one in page.threads], said[::-1]),
        (client.ListDrafts(), lambda page: [one.conversation_id for one in page.drafts], rooms[::-1]),
        (client.ListScheduled(), lambda page: [one.message_id for one in page.scheduled], later[::-1]),
        (client.ListEdits(**room.at(said[0])), lambda page: [one.id for one in page.edits], edits),
    ]
    for frame, ids, expected in lists:
        after = -1 if isinstance(frame, client.ListEdits) else "the next"
        with refused(ErrorCode.INVALID, "after"):
            await ada.call(msgspec.structs.replace(frame, id=None, after=after))
        pages = await walked(ada, frame)
        assert [one for page in pages for one in ids(page)] == expected, frame
        assert len(pages) > 1, frame

    # The content of hidden messages is returned beside the messages.
    await world.db.execute("UPDATE message SET is_moderated = true")
    pages = await walked(ada, client.ListPins(conversation_id=group))
    assert [one.id for page in pages for one in page.messages] == said[::-1]
    assert [one for page in pages for one in page.withheld] == said[::-1]
    assert len(pages) > 1
    assert (await ada.call(client.History(conversation_id=group, limit=100), server.MessagePage)).has_before
    await world.db.execute("UPDATE message SET is_moderated = false")

    # The frames that a client gets on connecting: the initial state, and the state after a change of the epoch.
    again = await world.connect(room.users[0])
    anew = await world.connect(room.users[0], query="?resume=1")
    await anew.call(client.Resume(epoch="another", versions=dict.fromkeys([group, *rooms], 1)))
    for one in (again, anew):
        assert max(len(encode(event)) for event in one.events) < MAX_PAGE_BYTES + ROW_BYTES
    pages_said = [event for event in again.events if isinstance(event, server.Conversations)]
    told = [view.conversation.id for page in pages_said for view in page.conversations]
    assert sorted(told) == sorted([group, *rooms])
    assert [page.is_last for page in pages_said] == [False] * (len(pages_said) - 1) + [True]
    assert len([event for event in anew.events if isinstance(event, server.StartOver)]) == MANY + 1
