"""Every refusal is an error with a code and a path; the connection stays open, and nothing is stored."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from protocol import client, server
from protocol.client import Frame
from protocol.codec import encode, now
from protocol.errors import CloseCode, ErrorCode, Refused
from protocol.ids import ConversationId, MessageId, ReportId, UserId, uuid7
from protocol.limits import MAX_FRAME_BYTES
from prove.client import Client
from server.core.config import Settings
from server.describe.handbook import is_for_participants
from server.routes import ROUTES
from tests.world import Room, World, http_client, message, sent

ROOT = Path(__file__).parent.parent
A_UUID4 = "8b9d4d78-2de1-4813-b7a2-e0529d3c0efa"


@pytest.fixture
async def ada(world: World) -> Client:
    return await world.connect(await world.user("Ada"))


def send(**fields: Any) -> dict[str, Any]:
    frame = {"type": "send", "conversation_id": A_UUID4, "message_id": str(uuid7()), "content": "Hello"}
    return {name: value for name, value in (frame | fields).items() if value is not None}


MALFORMED: list[tuple[Any, str, str | None]] = [
    ("not json", "bad_frame", None),
    ("", "bad_frame", None),
    ("[]", "invalid", None),
    ('{"type": "dance"}', "bad_frame", "type"),
    ("{}", "bad_frame", "type"),
    (b"\x00\x01\xff binary garbage", "bad_frame", None),
    (b'{"type": "ping"}', "bad_frame", None),
    ("[" * 5_000, "invalid", None),
    ("[" * 100_000, "bad_frame", None),
    ('{"type": "send", "metadata": [' + "{}," * 80_000 + "1]}", "bad_frame", None),
    ('{"type": "send", "metadata": ' + '{"a":' * 50_000, "bad_frame", None),
    (send(message_id="no uuid"), "invalid", "message_id"),
    (send(message_id=A_UUID4), "invalid", "message_id"),
    (send(conversation_id=17), "invalid", "conversation_id"),
    (send(content=""), "invalid", "content"),
    (send(content="x" * 10_001), "invalid", "content"),
    (send(content="a\0b"), "invalid", "content"),
    (send(content=None), "invalid", "content"),
    (send(payload={"type": "system"}), "invalid", "payload.type"),
    (send(payload={"type": "code", "language": "C++ & co"}), "invalid", "payload.language"),
    (send(payload={"type": "image", "url": "javascript:alert(1)"}), "invalid", "payload.url"),
    (send(payload={"type": "file", "url": "https://example.org/x"}), "invalid", "payload.name"),
    (send(payload={"type": "audio", "url": "https://example.org/x", "duration_ms": -1}), "invalid",
        "payload.duration_ms"),
    (send(payload={"type": "video", "url": "https://example.org/x", "width": 0}), "invalid", "payload.width"),
    (send(payload={"type": "location", "latitude": 90.1, "longitude": 0}), "invalid", "payload.latitude"),
    (send(payload={"type": "poll", "options": ["one"]}), "invalid", "payload.options"),
    (send(payload={"type": "poll", "options": ["one", "one"]}), "invalid", "payload.options"),
    (send(payload={"type": "poll", "options": ["1", "2"], "closes_at": "2030-01-01T00:00:00"}), "invalid",
        "payload.closes_at"),
    (send(also_in_conversation=True), "invalid", "also_in_conversation"),
    ({"type": "search", "text": "x", "hashtag": "two words"}, "invalid", "hashtag"),
    ({"type": "search"}, "invalid", "text"),
    ({"type": "search", "text": "x", "after": "nonsense"}, "invalid", "after"),
    ({"type": "list_feed", "after": "nonsense"}, "invalid", "after"),
    ({"type": "list_stars", "after": "nonsense"}, "invalid", "after"),
    ({"type": "vote", "conversation_id": A_UUID4, "message_id": A_UUID4, "options": [1, 1]}, "invalid", "options"),
    *(({"type": "update_profile", "time_zone": zone}, "invalid", "time_zone") for zone in (
        "Europe/Atlantis", "\x1b[31mRED\x07", "a\r\n2027-01-01 LOG:  b", "<+03>-3", "+02:00", "EST5", "europe/london",
        "Europe/London\n", "")),
    ({"type": "register_push", "endpoint": "ftp://example.org", "p256dh": "x", "auth": "x"}, "invalid", "endpoint"),
    (send(metadata=[1]), "invalid", "metadata"),
    (send(metadata={"x": "y" * 17_000}), "invalid", "metadata"),
    (send(colour="red"), "invalid", "colour"),
    ({"type": "react", "message_id": A_UUID4, "emoji": "x" * 33}, "invalid", "emoji"),
    ({"type": "history", "conversation_id": A_UUID4, "limit": 101}, "invalid", "limit"),
    ({"type": "history", "conversation_id": A_UUID4, "before": A_UUID4, "after": A_UUID4}, "invalid", "before"),
    ({"type": "join"}, "invalid", "conversation_id"),
    ({"type": "list_conversations", "after": "nonsense"}, "invalid", "after"),
    ({"type": "create_group", "conversation_id": str(uuid7()), "title": "x" * 256, "participants": [A_UUID4]},
        "invalid", "title"),
    ({"type": "create_group", "conversation_id": str(uuid7()), "title": "x", "participants": []},
        "invalid", "participants"),
    ({"type": "presence", "status": "asleep"}, "invalid", "status"),
    ({"type": "presence", "status": "busy", "custom_status": "x" * 256}, "invalid", "custom_status"),
    ({"type": "resume", "epoch": "e", "versions": {"x": 1}}, "invalid", "versions"),
    ({"type": "resume", "epoch": "e", "versions": {A_UUID4: -1}}, "invalid", "versions[...]")]  # fmt: skip


async def test_malformed_frame_is_refused(ada: Client, subtests: pytest.Subtests) -> None:
    for data, code, path in MALFORMED:
        with subtests.test(data=str(data)[:60]):
            error = await ada.raw(encode(data).decode() if isinstance(data, dict) else data)
            assert (error.code, error.path) == (code, path)
            assert error.message.endswith(".")
    await ada.call(client.Ping(), server.Pong)


@pytest.mark.parametrize("data", ['{"id": 7, "type": "dance"}', '{"type": "send", "id": 7, "content": 3}'])
async def test_refusal_has_the_id_of_the_frame_if_it_is_readable(ada: Client, data: str) -> None:
    assert (await ada.raw(data)).re == 7


async def test_frame_of_ten_megabytes_closes_the_connection(ada: Client) -> None:
    with contextlib.suppress(ConnectionClosed):
        await ada.socket.send("x" * 10_000_000)
    assert await ada.closed() == CloseCode.TOO_BIG


async def test_largest_frame_is_accepted(ada: Client) -> None:
    error = await ada.raw('{"type": "ping", "x": "' + "x" * (MAX_FRAME_BYTES - 30) + '"}')
    assert error.path == "x"


async def test_abuse_closes_the_connection_and_is_logged_once(
    world: World, room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    for again in (room.ada, await world.connect(room.users[0])):
        for _ in range(300):
            await again.socket.send("abuse")
        assert await again.closed() == CloseCode.ABUSE
    named = f"closing a connection of user {room.users[0].id} with 4003 (abuse): too many frames that are refused"
    assert [record.message for record in caplog.records if "4003" in record.message] == [named]


@contextlib.contextmanager
def no_error_in_a_cycle() -> Iterator[None]:
    """Fail if an exception of the server is part of a reference cycle.

    Its traceback keeps all local variables alive until a late collection (worker.GC_THRESHOLDS), and a request may be
    large.
    """
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        places = {
            f"{type(one).__name__} in {step.tb_frame.f_code.co_qualname}"
            for one in gc.garbage
            if isinstance(one, BaseException)
            for step in iterate(one.__traceback__)
            if Path(step.tb_frame.f_code.co_filename).is_relative_to(ROOT / "server")
        }
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not places


def iterate(step: TracebackType | None) -> Iterator[TracebackType]:
    while step is not None:
        yield step
        step = step.tb_next


async def test_refusal_keeps_no_reference_to_its_request(world: World, ada: Client) -> None:
    stranger = frames(ConversationId(uuid7()), MessageId(uuid7()), ada.ready.user.id)
    too_long = message(await world.channel(ada), "&" * 10_000, is_markdown=True)
    async with http_client(world.url) as http:
        headers = {"Authorization": f"Bearer {(await world.user('Charles')).token}"}
        with no_error_in_a_cycle():
            for data, _, _ in MALFORMED:
                await ada.raw(encode(data).decode() if isinstance(data, dict) else data)
            for frame in (*stranger, too_long):
                await ada.ask(frame)
            for content in (b"{", b'{"type": "typing"}', encode(send())):
                await http.post("/v1/call", content=content, headers=headers)
            for path in ("register", "login", "password", "nothing"):
                await http.post(f"/v1/auth/{path}", json={"email": "ada@example.org", "password": "x"}, headers=headers)


def frames(conversation_id: ConversationId, message_id: MessageId, user_id: UserId) -> list[Frame]:
    """Return one frame of each type that names a conversation or a message."""
    about: dict[str, Any] = {"conversation_id": conversation_id}
    return [
        client.GetConversation(**about),
        client.UpdateConversation(**about, title="Mine"),
        client.Leave(**about),
        client.AddParticipants(**about, participants=[user_id]),
        client.RemoveParticipant(**about, user_id=user_id),
        client.SetRole(**about, user_id=user_id, role="admin"),
        client.SetPreferences(**about, is_muted=True),
        client.Invite(**about, participants=[user_id]),
        client.SetInviteCode(**about),
        client.Unban(**about, user_id=user_id),
        client.SetPermissions(**about, user_id=user_id, can_pin_messages=True),
        client.TransferOwnership(**about, user_id=user_id),
        client.Moderate(**about, message_id=message_id, reason="Rude"),
        client.Unmoderate(**about, message_id=message_id),
        client.ReportMessage(**about, message_id=message_id, reason="Rude"),
        client.ListReports(**about),
        client.DismissReport(**about, report_id=ReportId(message_id)),
        client.ListAudit(**about),
        client.ListParticipants(**about),
        message(conversation_id),
        client.Edit(**about, message_id=message_id, content="Mine"),
        client.Delete(**about, message_id=message_id),
        client.React(**about, message_id=message_id, emoji="👍"),
        client.Unreact(**about, message_id=message_id, emoji="👍"),
        client.Read(**about, message_id=message_id),
        client.History(**about),
        client.GetMessage(**about, message_id=message_id),
        client.ListEdits(**about, message_id=message_id),
        client.Forward(
            **about, message_id=message_id, to_conversation_id=conversation_id, new_message_id=MessageId(uuid7())
        ),
        client.Pin(**about, message_id=message_id),
        client.Unpin(**about, message_id=message_id),
        client.ListPins(**about),
        client.Star(**about, message_id=message_id),
        client.Vote(**about, message_id=message_id, options=[0]),
        client.ClosePoll(**about, message_id=message_id),
        client.ListVotes(**about, message_id=message_id),
        client.Why(**about, message_id=message_id),
        client.GetThread(**about, message_id=message_id),
        client.ListReplies(**about, message_id=message_id),
        client.FollowThread(**about, message_id=message_id),
        client.UnfollowThread(**about, message_id=message_id),
        client.ReadThread(**about, message_id=message_id, thread_order=1),
        client.Delivered(**about, message_id=message_id),
        client.MarkUnread(**about, message_id=message_id),
        client.ListReaders(**about, message_id=message_id),
        client.SetDraft(**about, content="Mine"),
        client.Schedule(**about, message_id=MessageId(uuid7()), content="Mine", send_at=now()),
        client.CancelScheduled(**about, message_id=message_id),
        client.Typing(**about),
        client.DeleteConversation(**about),
    ]


NOT_FOUND_FOR_OWNERS = (
    client.Leave, client.Delete, client.DeleteConversation, client.DismissReport, client.Vote, client.ClosePoll,
    client.ListVotes, client.CancelScheduled,
)  # fmt: skip
"""Frames with which the owner also gets `not_found`: there is no poll or scheduled message, and some targets are gone.
"""


async def test_hidden_and_missing_conversations_get_the_same_answer(world: World, ada: Client) -> None:
    mary = await world.connect(await world.user("Mary"), 1)
    group = await world.group(ada, await world.user("Charles"))
    there = frames(group, await sent(ada, group), ada.ready.user.id)
    nowhere = frames(ConversationId(uuid7()), MessageId(uuid7()), ada.ready.user.id)
    before = await world.db.fetch("SELECT * FROM conversation, message, conversation_participant")
    for real, unreal in zip(there, nowhere, strict=True):
        answers = [await mary.ask(real), await mary.ask(unreal)]
        assert isinstance(answers[0], server.Error)
        assert isinstance(answers[1], server.Error)
        assert answers[0].code == ErrorCode.NOT_FOUND
        assert (answers[0].message, answers[0].path) == (answers[1].message, answers[1].path)
    assert before == await world.db.fetch("SELECT * FROM conversation, message, conversation_participant")
    for frame in there:
        if not isinstance(frame, NOT_FOUND_FOR_OWNERS):
            assert not (isinstance(answer := await ada.ask(frame), server.Error) and answer.code == "not_found")


def test_every_frame_of_participants_is_covered() -> None:
    asked = {type(frame) for frame in frames(ConversationId(uuid7()), MessageId(uuid7()), UserId(uuid7()))}
    assert asked == set(filter(is_for_participants, ROUTES))


async def test_former_participant_gets_the_answer_of_a_stranger(world: World, ada: Client) -> None:
    charles = await world.user("Charles")
    group = await world.group(ada, charles)
    message_id = await sent(ada, group)
    phone = await world.connect(charles, 1)
    await phone.call(client.Leave(conversation_id=group))
    for frame in frames(group, message_id, ada.ready.user.id):
        answer = await phone.ask(frame)
        assert isinstance(answer, server.Error)
        assert answer.code == ErrorCode.NOT_FOUND


async def test_too_many_frames_are_refused_with_a_retry_time(settings: Settings, ada: Client) -> None:
    for _ in range(int(settings.ephemeral_rate * 4) + 20):
        await ada.socket.send('{"type": "ping"}')
    refused = await ada.event(server.Error)
    assert refused.code == ErrorCode.RATE_LIMITED
    assert refused.retry_after_ms is not None
    assert refused.retry_after_ms > 0


async def test_frames_over_http_get_the_same_answers(world: World) -> None:
    who = await world.user("Ada")
    async with http_client(world.url) as http:
        headers = {"Authorization": f"Bearer {who.token}"}
        good = await http.post("/v1/call", content=b'{"type": "ping", "id": "a"}', headers=headers)
        assert (good.status_code, good.json()["re"], good.json()["result"]["type"]) == (200, "a", "pong")
        for content, status in [(b"{", 400), (b'{"type": "typing"}', 422), (encode(send()), 404)]:
            bad = await http.post("/v1/call", content=content, headers=headers)
            assert (bad.status_code, bad.json()["type"]) == (status, "error")
        only_sockets = b'{"type": "watch", "user_ids": ["%s"]}' % str(who.id).encode()
        assert (await http.post("/v1/call", content=only_sockets, headers=headers)).status_code == 422
        assert (await http.post("/v1/call", content=b'{"type": "ping"}')).status_code == 401


async def test_too_many_connections_of_a_user_are_refused(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, connections_per_user=2), workers=1) as world:
        who = await world.user("Ada")
        for _ in range(2):
            await world.connect(who)
        third = Client(world.url, who.token)
        await third.open()
        error = await third.event(server.Error)
        assert (error.code, "2 connections to this server" in error.message) == ("conflict", True)
        assert await third.closed() == CloseCode.TOO_MANY_CONNECTIONS


async def test_sockets_on_other_paths_are_refused(world: World) -> None:
    with pytest.raises(Exception, match=r"403|404"):
        await connect(world.url.replace("http", "ws") + "/elsewhere", proxy=None)


async def test_client_raises_refused(ada: Client) -> None:
    with pytest.raises(Refused, match="Not found, or you may not see it"):
        await ada.call(client.GetMessage(conversation_id=ConversationId(uuid7()), message_id=MessageId(uuid7())))
