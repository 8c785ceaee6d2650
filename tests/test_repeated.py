"""Doing it twice is doing it once (promise 5): a frame that is sent again reaches nobody again, and counts nowhere."""

from typing import Any

from protocol import client
from protocol.server import Error
from tests.twins import VIEWER, Twin
from tests.world import World

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
ANEW: set[type[Any]] = {client.SetInviteCode}
"""Frames that make something new each time, which only the caller is told of."""


async def test_a_frame_that_is_sent_again_reaches_nobody_again(world: World) -> None:
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
        if before != after and type(frame) not in ANEW:
            again.append(f"{type(frame).__name__}: {before} became {after}")
    assert not again, "\n".join(again)
    assert done > 50, "most frames are not refused"
