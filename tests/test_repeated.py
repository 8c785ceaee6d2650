"""A frame that is sent again has no further effect: it reaches no user again and is not counted again (promise 5)."""

from datetime import timedelta
from typing import Any

import msgspec

from protocol import client
from protocol.codec import now
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, EditId, MessageId, uuid7
from protocol.server import Error
from tests.twins import VIEWER, Twin
from tests.world import World, message, refused, sent

STATE = """
SELECT json_build_object(
    'conversations', (SELECT json_object_agg(c.id, c.version ORDER BY c.id) FROM conversation c),
    'others', (SELECT json_object_agg(u.name, array[u.version, u.hidden_version] ORDER BY u.name) FROM "user" u
        WHERE u.id <> $1),
    'approaches', (SELECT sum(a.made) FROM approach a),
    'reports', (SELECT count(*) FROM report), 'edits', (SELECT count(*) FROM message_edit),
    'noted', (SELECT count(*) FROM audit_entry)
)::text
"""
NOT_IDEMPOTENT: set[type[Any]] = {client.SetInviteCode}
"""Frames that create something new each time, of which only the sender learns."""


async def test_repeated_frame_has_no_further_effect(world: World) -> None:
    twin = Twin(world, "é0")
    await twin.begin(have_met=True, are_friends=False)
    viewer = twin.id(VIEWER)
    again: list[str] = []
    done = 0
    for frame in twin.writes():
        if isinstance(await twin.viewer.ask(frame), Error):
            continue
        done += 1
        before = await world.db.fetchval(STATE, viewer)
        await twin.viewer.ask(frame)
        after = await world.db.fetchval(STATE, viewer)
        if before != after and type(frame) not in NOT_IDEMPOTENT:
            again.append(f"{type(frame).__name__}: {before} became {after}")
    assert not again, "\n".join(again)
    assert done > 50, "too many frames were refused"


WORDS = """
SELECT json_build_object(
    'said', (SELECT json_agg(json_build_array(m.content, m.is_deleted, m.edited_at IS NULL) ORDER BY m.id)
        FROM message m WHERE m.conversation_id = $1),
    'title', (SELECT c.title FROM conversation c WHERE c.id = $1),
    'scheduled', (SELECT json_agg(json_build_array(s.words, s.status) ORDER BY s.id) FROM scheduled_message s),
    'version', (SELECT c.version FROM conversation c WHERE c.id = $1)
)::text
"""


async def test_late_copy_of_a_frame_does_not_undo_later_changes(world: World) -> None:
    """Each frame with an id is acknowledged, undone or overwritten by another device, and sent again."""
    ada = await world.user("Ada")
    one, two = await world.connect(ada), await world.connect(ada, 1)
    other = await world.channel(one)
    group = ConversationId(uuid7())
    made = client.CreateChannel(conversation_id=group, title="Engines")
    await one.call(made)
    words, same, copied = [await sent(one, group, text) for text in ("A", "B", "C")]
    said, again, later = message(group, "D"), MessageId(uuid7()), MessageId(uuid7())

    def at(which: MessageId) -> dict[str, Any]:
        return {"conversation_id": group, "message_id": which}

    forward = client.Forward(**at(copied), to_conversation_id=group, new_message_id=again)
    at_noon = client.Schedule(**at(later), content="E", send_at=now() + timedelta(hours=1))
    pairs: list[tuple[Any, Any]] = [
        (made, client.UpdateConversation(conversation_id=group, title="Difference engines")),
        (said, client.Delete(**at(said.message_id))),
        (forward, client.Delete(**at(again))),
        (client.Edit(**at(words), content="A1", edit_id=EditId(uuid7())), client.Edit(**at(words), content="A2")),
        # An edit without a change.
        (client.Edit(**at(same), content="B", edit_id=EditId(uuid7())), client.Edit(**at(same), content="B2")),
        (at_noon, client.CancelScheduled(**at(later))),
    ]
    for frame, undone in pairs:
        first: object = await one.call(frame)
        await two.call(undone)
        before = await world.db.fetchval(WORDS, group)
        answer: Any = await one.ask(frame)
        assert (frame, await world.db.fetchval(WORDS, group)) == (frame, before)
        if frame is at_noon:
            assert isinstance(answer, Error)
            assert answer.code is ErrorCode.CONFLICT
        elif frame is not made:
            assert answer.result == first
    with refused(ErrorCode.CONFLICT, "edit_id"):
        await one.call(client.Edit(**at(same), content="B3", edit_id=pairs[-2][0].edit_id))
    assert (await one.call(client.Edit(**at(same), content="B2"))) is not None, "an edit without an id changes nothing"
    assert await world.db.fetchval("SELECT count(*) FROM message_edit WHERE message_id = $1", same) == 2
    # A frame whose id belongs to another conversation is refused.
    with refused(ErrorCode.CONFLICT, "message_id"):
        await one.call(msgspec.structs.replace(said, conversation_id=other))
