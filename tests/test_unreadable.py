"""Rows that this version cannot read are shown as far as possible, and do not affect other rows."""

import asyncio
import json
import logging
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from protocol import client, server
from protocol.codec import now
from protocol.errors import ErrorCode
from protocol.ids import MessageId, uuid7
from protocol.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES
from protocol.payloads import File
from tests.test_administration import Shell
from tests.test_upkeep import elsewhere, shell
from tests.world import Room, World, http_client, received_message, refused, sent

__all__ = ["elsewhere", "shell"]


def deep(depth: int) -> str:
    """Return an object with the given nesting depth, as JSON."""
    return '{"a":' * depth + "1" + "}" * depth


BROKEN: dict[str, str] = {
    "metadata, deep": f"metadata = '{deep(5_000)}'",
    "metadata that was accepted once": f"metadata = '{deep(975)}'",
    "metadata, a number": "metadata = '{\"a\": 1e5000}'",
    "metadata, no object": "metadata = '[1]'",
    "payload of no known type": """payload = '{"type": "hologram", "url": "https://x.org"}', content_type = 'image'""",
    "payload without what it needs": """payload = '{"type": "file"}', content_type = 'file'""",
    "payload, deep": f"""payload = '{{"type": "code", "language": {deep(2_000)}}}', content_type = 'code'""",
    "preview": "link_preview = '{\"url\": 1}'",
    "reactions": 'reactions = \'{"x": "many"}\'',
    "a time before years": "edited_at = '0044-03-15 BC'",
    "a time after years": "created_at = '20000-01-01'",
}
"""Values of a message in an old, restored or newer database."""


async def test_unreadable_message_is_shown_as_far_as_possible(
    room: Room, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """This holds for every frame that reads, on connecting and on resuming. Each message is logged once."""
    before = (await room.charles.call(client.GetConversation(conversation_id=room.group), server.OneConversation)).view
    root = await sent(room.ada, room.group, "The root for @charles")
    reply = {"parent_message_id": root, "also_in_conversation": True}
    broken = {what: await sent(room.ada, room.group, f"{what} for @charles", **reply) for what in BROKEN}
    last = await sent(room.ada, room.group, "The last for @charles", **reply)
    await world.indexed()
    for one in broken.values():
        await room.charles.call(client.Star(**room.at(one)))
        await room.charles.call(client.React(**room.at(one), emoji="👍"))
        await room.ada.call(client.Pin(**room.at(one)))
    for what, one in broken.items():
        # The newest message is unreadable, so that each view of the conversation contains one.
        await world.db.execute(f"UPDATE message SET {BROKEN[what]} WHERE id = $1", one)
    await world.db.execute(f"UPDATE message SET metadata = '{deep(5_000)}' WHERE id = $1", last)
    unreadable = {*broken.values(), last}

    for reader in (room.ada, room.charles):
        frames: list[client.Frame] = [
            client.History(conversation_id=room.group, limit=50), client.ListPins(conversation_id=room.group),
            client.ListStars(limit=50), client.Search(text="for", limit=50),
            client.Search(text="for", order="relevance"),
            client.ListConversations(), client.GetConversation(conversation_id=room.group), client.ListFeed(limit=50),
            client.GetThread(**room.at(root)), client.ListReplies(**room.at(root), limit=50), client.ListThreads(),
            *(client.GetMessage(**room.at(one)) for one in unreadable),
            *(client.Why(**room.at(one)) for one in unreadable if reader is room.ada),
        ]  # fmt: skip
        for frame in frames:
            await reader.call(frame)
    page = await room.charles.call(client.History(conversation_id=room.group, limit=50), server.MessagePage)
    readable = [one.content for one in page.messages if not one.is_unreadable]
    assert readable == ["The root for @charles"]
    assert {one.content for one in page.messages} >= {f"{what} for @charles" for what in BROKEN}
    stars = await room.charles.call(client.ListStars(limit=50), server.MessageList)
    assert {one.id for one in stars.messages} == set(broken.values())

    fresh = await world.connect(room.users[1])
    told = await fresh.event(server.Conversations)
    (view,) = [view for view in told.conversations if view.conversation.id == room.group]
    assert view.last_message is not None
    assert (view.last_message.id, view.last_message.is_unreadable) == (last, True)
    again = await world.connect(room.users[1], query="?resume=1")
    await again.call(client.Resume(epoch=again.ready.epoch, versions={room.group: before.version}))
    changes = await again.event(server.Changes)
    edited = {event.message.id: event.message for event in changes.events if isinstance(event, server.MessageSent)}
    assert {one for one, message in edited.items() if message.is_unreadable} >= unreadable
    for one in unreadable - {last}:
        await room.ada.call(client.Unpin(**room.at(one)))
        await room.ada.call(client.Edit(**room.at(one), content="Edited"))
        await room.ada.call(client.Delete(**room.at(one)))
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await room.ada.call(
            client.Forward(**room.at(last), to_conversation_id=room.group, new_message_id=MessageId(uuid7()))
        )
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    lines = [line for line in logged if line.startswith("unreadable ")]
    assert len(lines) == len(set(lines)), "each row is logged once"
    assert all(any(str(one) in line for line in lines) for one in unreadable)
    assert not [line for line in logged if "for @charles" in line or '"a":' in line]
    assert not room.ada.is_over
    assert not room.charles.is_over


async def test_unreadable_settings_and_scheduled_messages_do_not_affect_others(room: Room, world: World) -> None:
    other = await world.group(room.ada, room.users[1], title="Unharmed")
    await room.charles.event(server.ConversationJoined, lambda event: event.view.conversation.id == other)
    await world.db.execute(
        "UPDATE conversation SET settings = $2 WHERE id = $1", room.group,
        '{"from_tomorrow": true, "history": "sideways", "edits_visible_to": "nobody", "custom": ' + deep(5_000) + "}",
    )  # fmt: skip
    view = (await room.ada.call(client.GetConversation(conversation_id=room.group), server.OneConversation)).view
    assert (view.conversation.settings.edits_visible_to, view.conversation.settings.custom) == ("nobody", {})
    page = await room.ada.call(client.ListConversations(), server.ConversationPage)
    assert {one.conversation.id for one in page.conversations} == {room.group, other}
    fresh = await world.connect(room.users[0])
    await sent(fresh, room.group, "Still here")

    soon = now() + timedelta(hours=1)
    ids = [MessageId(uuid7()) for _ in range(3)]
    for one in ids:
        frame = client.Schedule(conversation_id=other, message_id=one, content="Later", send_at=soon)
        await room.ada.call(frame)
    await world.db.execute("UPDATE scheduled_message SET words = $2 WHERE id = $1", ids[0], '{"content": 1}')
    await world.db.execute("UPDATE scheduled_message SET words = words || $2 WHERE id = $1", ids[1],
        '{"metadata": ' + deep(5_000) + "}")  # fmt: skip
    listed = await room.ada.call(client.ListScheduled(), server.ScheduledList)
    assert {one.message_id for one in listed.scheduled} == set(ids)
    await world.db.execute("UPDATE scheduled_message SET send_at = now() - interval '1 second'")
    await room.charles.event(server.MessageSent, lambda event: event.message.id == ids[2])
    async with asyncio.timeout(15):
        while await world.db.fetchval("SELECT count(*) FROM scheduled_message WHERE status = 'waiting'"):
            await asyncio.sleep(0.05)
    rows = await world.db.fetch("SELECT id, status FROM scheduled_message")
    assert {row["id"]: row["status"] for row in rows} == dict.fromkeys(ids[:2], "failed") | {ids[2]: "sent"}


async def test_value_that_a_newer_rule_refuses_is_still_shown(room: Room, world: World) -> None:
    """The file has a control character in its name and a quotation mark in its URL. Both are removed or escaped."""
    one = await sent(room.ada, room.group, payload=File(url="https://example.org/x", name="x"))
    await world.db.execute(
        """UPDATE message SET payload = '{"type": "file", "url": "https://example.org/\\"<x>", "name": "a\\u202eb\\n"}'
        WHERE id = $1""", one,
    )  # fmt: skip
    got = (await room.charles.call(client.GetMessage(**room.at(one)), server.OneMessage)).message
    assert (got.payload, got.is_unreadable) == (File(url="https://example.org/%22%3Cx%3E", name="ab"), False)


def moved(path: Path) -> list[str]:
    """Return the lines of an export, without its first and last line and the entries about exports and imports."""
    return [line for line in path.read_text().splitlines()[1:-1] if '"table":"audit_entry"' not in line]


async def test_installation_with_unreadable_rows_can_be_exported_and_imported(
    shell: Shell, room: Room, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await sent(room.ada, room.group)
    await shell.world.db.execute(f"UPDATE message SET metadata = '{deep(5_000)}' WHERE id = $1", one)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    await shell.run("export", str(first))
    monkeypatch.setenv("DATABASE_URL", elsewhere)
    await shell.run("import", "openchat", str(first))
    await shell.run("export", str(second))
    assert moved(second) == moved(first)
    there = await asyncpg.connect(elsewhere)
    assert len(await there.fetchval("SELECT metadata::text FROM message WHERE id = $1", one)) > 5_000
    await there.close()
    async with http_client(shell.world.workers[0].url) as http:
        token = {"Authorization": f"Bearer {room.users[0].token}"}
        exported = await http.get("/v1/auth/export", headers=token)
    assert str(one) in exported.text
    assert exported.text.endswith("]}\n")


# ---------------------------------------------------------------------------------------------- input


PLACES = {
    "metadata": '{"type": "send", "conversation_id": "%s", "message_id": "%s", "content": "x", "metadata": %s}',
    "settings.custom": '{"type": "update_conversation", "conversation_id": "%s", "title": "%s", '
    '"settings": {"custom": %s}}',
}


@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH + 1, 100, 900, 983, 5_000])
async def test_json_nested_too_deeply_is_refused_with_the_bound(room: Room, depth: int) -> None:
    for path, text in PLACES.items():
        error = await room.ada.raw(text % (room.group, uuid7(), deep(depth)))
        if depth < 900:
            assert (error.code, error.path) == (ErrorCode.INVALID, path)
            assert str(MAX_JSON_DEPTH) in error.message
        assert error.code in {ErrorCode.INVALID, ErrorCode.BAD_FRAME}
    page = await room.ada.call(client.History(conversation_id=room.group), server.MessagePage)
    assert not page.messages


async def test_json_of_maximum_depth_is_returned_unchanged(room: Room) -> None:
    assert (room.ada.ready.limits.json_depth, room.ada.ready.limits.metadata_bytes) == (20, 16 * 1024)
    metadata = json.loads(deep(MAX_JSON_DEPTH))
    one = await sent(room.ada, room.group, metadata=metadata)
    assert (await received_message(room.charles, one)).metadata == metadata


async def test_number_of_values_in_an_object_is_bounded(room: Room) -> None:
    assert room.ada.ready.limits.json_values == MAX_JSON_VALUES
    for values in ("[" + "1," * (MAX_JSON_VALUES - 2) + "1]", json.dumps({str(n): {} for n in range(125)})):
        for path, text in PLACES.items():
            error = await room.ada.raw(text % (room.group, uuid7(), f'{{"a": {values}}}'))
            assert (error.code, error.path) == (ErrorCode.INVALID, path)
            assert str(MAX_JSON_VALUES) in error.message
    metadata: dict[str, list[list[int]]] = {"a": [[] for _ in range(MAX_JSON_VALUES - 2)]}
    one = await sent(room.ada, room.group, metadata=metadata)
    assert (await received_message(room.charles, one)).metadata == metadata


@pytest.mark.parametrize("value", [r'"\u0000"', "[1e308" + ",1e308" * 60 + "]", str(2**64), '{"a\\u0000": 1}'])
async def test_values_that_postgresql_or_javascript_cannot_represent_are_refused(room: Room, value: str) -> None:
    """Numbers count by their stored digits, and 1e308 has 309."""
    text = '{"type": "send", "conversation_id": "%s", "message_id": "%s", "content": "x", "metadata": {"a": %s}}'
    error = await room.ada.raw(text % (room.group, uuid7(), value))
    assert (error.code, error.path) == (ErrorCode.INVALID, "metadata")
