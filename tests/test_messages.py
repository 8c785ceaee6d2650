"""Sending, editing, deleting, reacting, history and read positions, with the refusals of each."""

from typing import Any

import pytest
from emoji import EMOJI_DATA

from protocol import client, server
from protocol.codec import encode
from protocol.errors import ErrorCode
from protocol.ids import EditId, MessageId, UserId, uuid7
from protocol.payloads import Code
from protocol.reaction import normalized
from prove.client import Client
from server.db import migrate
from tests.world import Room, UserSession, World, message, received_message, refused, sent


async def test_message_is_returned_as_it_was_sent(room: Room) -> None:
    first = await sent(room.ada, room.group)
    frame = message(
        room.group, "print(1) # **not** @Charles", payload=Code(language="python"), is_markdown=True,
        metadata={"deep": {"n": [1, None, "é\n"]}}, quoted_message_id=first,
    )  # fmt: skip
    await room.ada.call(frame)
    event = await received_message(room.charles, frame.message_id)
    got = await room.charles.call(client.GetMessage(**room.at(frame.message_id)), server.OneMessage)
    assert got.message == event
    assert (event.content_type, event.payload, event.metadata) == ("code", frame.payload, frame.metadata)
    assert (event.formatted_content, event.mentions) == ("<p>print(1) # <strong>not</strong> @Charles</p>", [])
    assert event.quoted_message_id == first


@pytest.mark.parametrize(
    "change", [{"content": "Twice"}, {"metadata": {"a": 1}}, {"payload": Code(language="c")}, {"is_markdown": True}]
)
async def test_the_same_id_with_other_content_is_refused(room: Room, change: dict[str, object]) -> None:
    frame = message(room.group, "Once")
    await room.ada.call(frame)
    for field, value in change.items():
        setattr(frame, field, value)
    with refused(ErrorCode.CONFLICT, "message_id"):
        await room.ada.call(frame)


async def test_id_of_another_users_message_is_refused(room: Room, world: World) -> None:
    frame = message(room.group)
    await room.ada.call(frame)
    with refused(ErrorCode.CONFLICT, "message_id"):
        await room.charles.call(frame)
    elsewhere = await world.channel(room.charles)
    with refused(ErrorCode.CONFLICT, "message_id"):
        await room.charles.call(client.Send(conversation_id=elsewhere, message_id=frame.message_id, content="Mine"))


async def test_repeated_send_gets_the_first_answer_even_after_edit_and_delete(room: Room) -> None:
    frame = message(room.group, "First words")
    first = await room.ada.call(frame, server.Sent)
    await room.ada.call(client.Edit(**room.at(frame.message_id), content="Second words"))
    assert await room.ada.call(frame, server.Sent) == first
    await room.ada.call(client.Delete(**room.at(frame.message_id)))
    assert await room.ada.call(frame, server.Sent) == first


async def test_a_reply_needs_a_parent_in_the_same_conversation(room: Room, world: World) -> None:
    elsewhere = await world.channel(room.ada)
    foreign = await sent(room.ada, elsewhere)
    for parent in (foreign, MessageId(uuid7())):
        with refused(ErrorCode.NOT_FOUND, "parent_message_id"):
            await sent(room.ada, room.group, parent_message_id=parent)


async def test_edits_of_a_message_are_listed(room: Room) -> None:
    message_id = await sent(room.ada, room.group, "One")
    await room.ada.call(client.Edit(**room.at(message_id), content="Two"))
    await room.ada.call(client.Edit(**room.at(message_id), content="*Three*", is_markdown=True))
    edits = (await room.charles.call(client.ListEdits(**room.at(message_id)), server.EditPage)).edits
    assert [one.content for one in edits] == ["Two", "One"]
    got = await room.charles.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert (got.message.content, got.message.formatted_content) == ("*Three*", "<p><em>Three</em></p>")


async def test_repeated_edit_is_stored_once(room: Room) -> None:
    message_id = await sent(room.ada, room.group, "One")
    frame = client.Edit(**room.at(message_id), content="Two", edit_id=EditId(uuid7()))
    first = await room.ada.call(frame, server.Changed)
    await room.ada.call(client.Edit(**room.at(message_id), content="Three", edit_id=EditId(uuid7())))
    assert await room.ada.call(frame, server.Changed) == first
    assert len((await room.ada.call(client.ListEdits(**room.at(message_id)), server.EditPage)).edits) == 2
    frame.content = "Other"
    with refused(ErrorCode.CONFLICT, "edit_id"):
        await room.ada.call(frame)


async def test_edit_without_a_change_has_no_effect(room: Room) -> None:
    message_id = await sent(room.ada, room.group, "Same")
    changed = await room.ada.call(client.Edit(**room.at(message_id), content="Same"), server.Changed)
    got = await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert (got.message.version, got.message.edited_at) == (changed.version, None)


async def test_only_the_sender_can_edit_a_message(room: Room) -> None:
    message_id = await sent(room.charles, room.group)
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await room.ada.call(client.Edit(**room.at(message_id), content="Mine"))


async def test_deleted_message_keeps_its_place_and_loses_its_content(room: Room, world: World) -> None:
    message_id = await sent(room.ada, room.group, "Secret", metadata={"secret": 1})
    await room.charles.call(client.React(**room.at(message_id), emoji="👍"))
    first = await room.ada.call(client.Delete(**room.at(message_id)), server.Changed)
    assert await room.ada.call(client.Delete(**room.at(message_id)), server.Changed) == first
    page = await room.charles.call(client.History(conversation_id=room.group), server.MessagePage)
    (left,) = page.messages
    assert (left.id, left.is_deleted, left.deleted_by) == (message_id, True, room.users[0].id)
    assert (left.content, left.metadata, left.mentions, left.reactions) == ("", None, [], {})
    for frame in (
        client.Edit(**room.at(message_id), content="Back"),
        client.React(**room.at(message_id), emoji="👍"),
        client.ListEdits(**room.at(message_id)),
    ):
        with refused(ErrorCode.NOT_FOUND, "message_id"):
            await room.ada.call(frame)
    assert await world.db.fetchval("SELECT content FROM message_edit") == "Secret"


async def test_only_moderators_delete_for_others(room: Room, world: World) -> None:
    mary = await world.user("Mary")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[mary.id]))
    hers = await sent(await world.connect(mary), room.group)
    with refused(ErrorCode.FORBIDDEN, None):
        await room.charles.call(client.Delete(**room.at(hers)))
    await room.ada.call(client.SetRole(conversation_id=room.group, user_id=room.users[1].id, role="moderator"))
    await room.charles.call(client.Delete(**room.at(hers)))


async def test_repeated_reaction_counts_once(room: Room) -> None:
    message_id = await sent(room.ada, room.group)
    react, unreact = (kind(**room.at(message_id), emoji="🎉") for kind in (client.React, client.Unreact))
    first = await room.charles.call(react, server.Changed)
    assert await room.charles.call(react, server.Changed) == first
    got = await room.charles.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert (got.message.reactions, got.mine) == ({"🎉": 1}, ["🎉"])
    second = await room.charles.call(unreact, server.Changed)
    assert await room.charles.call(unreact, server.Changed) == second
    assert second.version == first.version + 1
    got = await room.charles.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert (got.message.reactions, got.mine) == ({}, [])


async def test_all_spellings_of_an_emoji_are_one_reaction(room: Room) -> None:
    message_id = await sent(room.ada, room.group)
    for client_, written in (
        (room.ada, "❤"),
        (room.charles, "❤\ufe0f"),
        (room.ada, ":Ship-It:"),
        (room.charles, ":ship-it:"),
    ):
        await client_.call(client.React(**room.at(message_id), emoji=written))
    got = await room.charles.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert got.message.reactions == {"❤\ufe0f": 2, ":ship-it:": 2}
    assert (await room.charles.event(server.MessageReacted)).emoji == "❤\ufe0f"
    await room.ada.call(client.Unreact(**room.at(message_id), emoji="❤\ufe0e"))
    got = await room.charles.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert got.message.reactions["❤\ufe0f"] == 1


OLD_REACTION = """
INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
SELECT $1, $2, emoji, $3, 0, $2 FROM unnest($4::text[]) emoji
"""
COUNTED = "UPDATE message SET reactions = (SELECT jsonb_object_agg(e, 1) FROM unnest($2::text[]) e) WHERE id = $1"


async def test_reaction_that_is_no_longer_allowed_can_be_removed(room: Room, world: World) -> None:
    """Older versions stored any text and each spelling of an emoji. Imports store names that clients may not send."""
    stored = ["lol", "❤", "❤\ufe0f", ":thumbsup::skin-tone-2:", ":Ship-It:"]
    message_id = await sent(room.ada, room.group)
    await world.db.execute(OLD_REACTION, message_id, room.users[0].id, room.group, stored)
    await world.db.execute(COUNTED, message_id, stored)
    with refused(ErrorCode.INVALID, "emoji"):
        await room.charles.call(client.Unreact(**room.at(message_id), emoji="lol"))
    for written, taken in [*((emoji, emoji) for emoji in stored if emoji != "❤\ufe0f"), ("❤", "❤\ufe0f")]:
        await room.ada.call(client.Unreact(**room.at(message_id), emoji=written))
        stored.remove(taken)
        got = await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
        assert (got.message.reactions, got.mine) == (dict.fromkeys(stored, 1), sorted(stored))
    assert (await room.charles.event(server.MessageUnreacted)).emoji == "lol"


async def test_migration_merges_older_spellings_of_reactions(room: Room, world: World) -> None:
    message_id = await sent(room.ada, room.group)
    ada, charles = (one.id for one in room.users)
    await world.db.execute(OLD_REACTION, message_id, ada, room.group, ["❤", "❤\ufe0f", ":Ship-It:", "lol"])
    await world.db.execute(OLD_REACTION, message_id, charles, room.group, ["❤", "☺\ufe0e", "👍"])
    old = ["❤", "❤\ufe0f", ":Ship-It:", "lol", "☺\ufe0e", "👍"]
    await world.db.execute(COUNTED, message_id, old)
    before = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", room.group)
    step = next(step for step in migrate.known() if step.name.endswith("one_spelling_of_reactions"))
    for _ in range(2):  # the second run changes nothing
        await world.db.execute(step.path.read_text())
    got = await room.charles.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert got.message.reactions == {"❤\ufe0f": 2, "☺\ufe0f": 1, ":ship-it:": 1, "lol": 1, "👍": 1}
    assert got.mine == sorted(["❤\ufe0f", "☺\ufe0f", "👍"])
    versions = await world.db.fetch("SELECT version FROM message_reaction WHERE version > 0 ORDER BY version")
    after = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", room.group)
    # Four are removed and three added. Ada had reacted with both spellings of the heart.
    assert [row[0] for row in versions] == list(range(before + 1, after + 1)) == list(range(before + 1, before + 8))
    await room.charles.call(client.Unreact(**room.at(message_id), emoji="☺"))


def test_migration_of_spellings_covers_every_emoji_with_two_spellings() -> None:
    step = next(step for step in migrate.known() if step.name.endswith("one_spelling_of_reactions"))
    listed = set(step.path.read_text().split())
    assert {emoji for emoji in EMOJI_DATA if "\ufe0f" in emoji and normalized(emoji) == emoji} <= listed


NO_EMOJI = (
    "lol",
    "Buy now",
    " ",
    "\u200b",
    "👍👍",
    "👍\n",
    "1",
    "🏻",
    ":a b:",
    "::",
    ":x",
    ":x:\n",
    f":{'x' * 31}:",
    ":İİİİİİİİİİİİİİİİİİİİİİİİİİİİİİ:",
)


async def test_reaction_that_is_not_an_emoji_is_refused(room: Room) -> None:
    message_id = await sent(room.ada, room.group)
    for text in NO_EMOJI:
        for kind in ("react", "unreact"):
            frame = {"type": kind, **room.at(message_id), "emoji": text}
            error = await room.ada.raw(encode(frame).decode())
            assert (error.code, error.path) == (ErrorCode.INVALID, "emoji"), text


async def test_number_of_different_reactions_per_message_is_bounded(room: Room) -> None:
    message_id = await sent(room.ada, room.group)
    for number in range(20):
        await room.ada.call(client.React(**room.at(message_id), emoji=f":e{number}:"))
    with refused(ErrorCode.CONFLICT, "emoji"):
        await room.ada.call(client.React(**room.at(message_id), emoji=":one-more:"))
    await room.charles.call(client.React(**room.at(message_id), emoji=":e0:"))


async def test_history_is_read_in_pages(room: Room) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(12)]

    async def page(**fields: object) -> tuple[list[int], bool, bool]:
        frame = client.History(conversation_id=room.group, limit=5, **fields)  # type: ignore[arg-type]
        got = await room.charles.call(frame, server.MessagePage)
        return [ids.index(one.id) for one in got.messages], got.has_before, got.has_after

    assert await page() == ([7, 8, 9, 10, 11], True, False)
    assert await page(before=ids[7]) == ([2, 3, 4, 5, 6], True, True)
    assert await page(before=ids[2]) == ([0, 1], False, True)
    assert await page(after=ids[2]) == ([3, 4, 5, 6, 7], True, True)
    assert await page(after=ids[11]) == ([], True, False)
    assert await page(around=ids[5]) == ([3, 4, 5, 6, 7], True, True)
    assert await page(around=ids[0]) == ([0, 1, 2], False, True)
    for side in ("before", "after", "around"):
        with refused(ErrorCode.NOT_FOUND, side):
            await page(**{side: MessageId(uuid7())})


async def test_history_marks_the_callers_own_reactions(room: Room) -> None:
    message_id = await sent(room.ada, room.group)
    await room.charles.call(client.React(**room.at(message_id), emoji="👍"))
    for one, mine in ((room.charles, {message_id: ["👍"]}), (room.ada, {})):
        page = await one.call(client.History(conversation_id=room.group), server.MessagePage)
        assert page.mine == mine


async def test_read_by_and_unread_follow_from_positions(room: Room, world: World) -> None:
    ids = [await sent(room.ada, room.group, str(number)) for number in range(3)]

    async def unread(who: UserSession) -> int:
        async with Client(world.url, who.token) as one:
            view = (await one.event(server.Conversations)).conversations[0]
            return view.unread_count

    assert [await unread(one) for one in room.users] == [0, 3]
    await room.charles.call(client.Read(**room.at(ids[1])))
    assert await unread(room.users[1]) == 1
    read_by = [(await room.ada.call(client.GetMessage(**room.at(one)), server.OneMessage)).read_by for one in ids]
    assert read_by == [1, 1, 0]


async def test_unread_count_stops_at_a_hundred(room: Room, world: World) -> None:
    for number in range(105):
        await sent(room.ada, room.group, str(number))
    phone = await world.connect(room.users[1])
    assert (await phone.event(server.Conversations)).conversations[0].unread_count == 100


async def test_private_user_is_returned_only_to_users_who_may_see_them(room: Room, world: World) -> None:
    private = await world.user("Private")
    await world.db.execute('UPDATE "user" SET is_private = true WHERE id = $1', private.id)
    asked = client.GetUsers(user_ids=[room.users[1].id, private.id, UserId(uuid7())])
    assert [one.name for one in (await room.ada.call(asked, server.UserList)).users] == ["Charles"]
    with refused(ErrorCode.NOT_FOUND, "participants"):
        await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[private.id]))
    theirs = await world.connect(private)
    await theirs.call(client.Join(conversation_id=await world.channel(room.ada, is_public=True)))
    assert len((await room.ada.call(asked, server.UserList)).users) == 2


async def test_message_is_found_only_in_its_own_conversation(room: Room, world: World) -> None:
    message_id = await sent(room.ada, room.group)
    elsewhere: dict[str, Any] = {"conversation_id": await world.channel(room.ada), "message_id": message_id}
    for frame in (
        client.Edit(**elsewhere, content="Changed"),
        client.Delete(**elsewhere),
        client.React(**elsewhere, emoji="👍"),
        client.Unreact(**elsewhere, emoji="👍"),
        client.Read(**elsewhere),
        client.GetMessage(**elsewhere),
        client.ListEdits(**elsewhere),
    ):
        with refused(ErrorCode.NOT_FOUND, "message_id"):
            await room.ada.call(frame)
    got = await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert (got.message.content, got.message.reactions) == ("Hello", {})
