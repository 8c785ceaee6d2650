"""A reconnect transfers only the difference: the missed changes, in order, or `start_over`."""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from protocol import SUBPROTOCOL, client, server
from protocol.client import Frame
from protocol.codec import encode
from protocol.errors import CloseCode, ErrorCode
from protocol.ids import ConversationId, MessageId, uuid7
from protocol.limits import MAX_CHANGES, MAX_CHANGES_BYTES, MAX_PAGE_BYTES, MAX_RESUMED, MAX_SENT_BYTES
from protocol.payloads import Poll
from protocol.server import Changes, ServerFrame
from prove.client import Client
from prove.mirror import Mirror
from prove.truth import assert_same, read_conversation, recount
from server.core.config import Settings
from server.core.periodic import end
from server.domain import sync
from server.gateway.connection import Connection
from server.hub import backlog, topics
from server.queries.changes import missed, since
from tests.world import UserSession, World, message, refused, sent, until


class Away:
    """Charles, who is away while Ada changes things."""

    def __init__(self, world: World, ada: Client, charles: UserSession, group: ConversationId) -> None:
        self.world = world
        self.ada = ada
        self.who = charles
        self.group = group
        self.epoch = ada.ready.epoch
        self.version = 3

    async def back(
        self, versions: dict[ConversationId, int] | None = None, epoch: str | None = None
    ) -> list[ServerFrame]:
        """Reconnect to the other worker, and return the events between `ready` and the reply."""
        phone = await self.world.connect(self.who, 1, query="?resume=1")
        frame = client.Resume(
            epoch=epoch or self.epoch, versions={self.group: self.version} if versions is None else versions
        )
        await phone.call(frame, server.Resumed)
        return phone.events[1:]


@pytest.fixture
async def away(world: World) -> Away:
    ada = await world.connect(await world.user("Ada"))
    charles = await world.user("Charles")
    return Away(world, ada, charles, await world.group(ada, charles))


async def test_no_events_are_sent_if_none_were_missed(away: Away) -> None:
    assert await away.back() == []


async def test_missed_events_are_sent_in_order(away: Away) -> None:
    old = await sent(away.ada, away.group, "Old")
    away.version = 4
    new = await sent(away.ada, away.group, "New", parent_message_id=old)
    await away.ada.call(client.Edit(conversation_id=away.group, message_id=old, content="Edited"))
    await away.ada.call(client.React(conversation_id=away.group, message_id=new, emoji="👍"))
    gone = await sent(away.ada, away.group, "Gone")
    await away.ada.call(client.Delete(conversation_id=away.group, message_id=gone))
    await away.ada.call(client.UpdateConversation(conversation_id=away.group, title="Renamed"))
    mary = await away.world.user("Mary")
    await away.ada.call(client.AddParticipants(conversation_id=away.group, participants=[mary.id]))
    (changes,) = await away.back()
    assert isinstance(changes, Changes)
    assert (changes.since, changes.version) == (4, 13)
    assert [(event.version, type(event)) for event in changes.events] == [
        (5, server.MessageSent),
        (6, server.MessageEdited),
        (7, server.MessageReacted),
        (9, server.MessageDeleted),
        (10, server.ConversationUpdated),
        (11, server.MessageSent),  # a system message
        (12, server.ParticipantChanged),
        (13, server.MessageSent),
    ]
    assert changes.unread_count == 1, "a reply counts as unread in its thread only"


async def test_resume_includes_receipts_and_the_own_position(away: Away) -> None:
    first, second = await sent(away.ada, away.group, "One"), await sent(away.ada, away.group, "Two")
    await away.ada.call(client.Read(conversation_id=away.group, message_id=second))
    async with Client(away.world.url, away.who.token) as other_device:
        await other_device.call(client.Read(conversation_id=away.group, message_id=first))
    (changes,) = await away.back()
    assert isinstance(changes, Changes)
    assert changes.last_read_message_id == first
    assert changes.unread_count == 1
    assert {one.user_id: one.message_id for one in changes.receipts} == {
        away.ada.ready.user.id: second,
        away.who.id: first,
    }
    phone = await away.world.connect(away.who, 1, query="?resume=1")
    resumed = await phone.call(client.Resume(epoch=away.epoch, versions={away.group: 5}), server.Resumed)
    assert resumed.read_positions == {away.group: first}


async def test_live_events_follow_without_a_gap(away: Away) -> None:
    await sent(away.ada, away.group, "Missed")
    phone = await away.world.connect(away.who, 1, query="?resume=1")
    await phone.call(client.Resume(epoch=away.epoch, versions={away.group: away.version}), server.Resumed)
    await sent(away.ada, away.group, "Live")
    event = await phone.event(server.MessageSent)
    assert (event.version, event.message.content) == (5, "Live")


async def test_conversation_unfollowed_during_a_long_resume_is_followed_again(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier conversations may take longer than a worker follows a conversation without sockets."""
    kept = away.world.workers[1].app.hub.topics

    async def late(*args: Any, **options: Any) -> Any:
        found = await missed(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(topics, "LINGER_SECONDS", -1.0)
            kept._close_quiet()  # noqa: SLF001
        return found

    monkeypatch.setattr("server.domain.sync.changes.missed", late)
    second = await away.world.group(away.ada, away.who)
    for group in (away.group, second):
        await sent(away.ada, group, "Missed")
    phone = await away.world.connect(away.who, 1, query="?resume=1")
    await phone.call(
        client.Resume(epoch=away.epoch, versions={away.group: away.version, second: away.version}), server.Resumed
    )
    for group in (away.group, second):
        await sent(away.ada, group, "Live")
        assert (await phone.event(server.MessageSent)).message.content == "Live"


@pytest.mark.parametrize("bound", [topics.MAX_EARLY, 2], ids=["kept", "overflow"])
async def test_conversation_with_new_messages_during_each_read_is_caught_up(
    away: Away, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    """No message arrives twice. If the backlog is full, the conversation is read again."""
    here = away.world.workers[1].app.hub.topics
    reads = 0

    async def late(*args: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        found = await missed(*args, **options)
        for number in range(4 - reads):
            await sent(away.ada, away.group, f"During read {reads}, {number}")
        version = await away.world.db.fetchval("SELECT version FROM conversation WHERE id = $1", away.group)
        await until(lambda: here._topics[away.group].delivered == version)  # noqa: SLF001
        return found

    monkeypatch.setattr(backlog, "MAX_BACKLOG", bound)
    monkeypatch.setattr("server.domain.sync.changes.missed", late)
    await sent(away.ada, away.group, "Missed")
    phone = await away.world.connect(away.who, 1, query="?resume=1")
    await phone.call(client.Resume(epoch=away.epoch, versions={away.group: away.version}), server.Resumed)
    await sent(away.ada, away.group, "Live")
    await phone.event(server.MessageSent, lambda event: event.message.content == "Live")
    said = [event.events if isinstance(event, Changes) else [event] for event in phone.events]
    # No message is counted by both `changes` and an event.
    assert [event.unread_count for event in phone.events if isinstance(event, Changes)] == (
        [1] if bound > 3 else [1, 4]
    )
    versions = [one.version for events in said for one in events if isinstance(one, server.MessageSent)]
    assert reads == (1 if bound > 3 else 2)
    assert versions == [away.version + number for number in range(1, 6 if bound > 3 else 8)]


async def test_user_banned_during_a_resume_follows_nothing(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(*args: Any, **options: Any) -> Any:
        found = await missed(*args, **options)
        if not banned:
            banned.append(True)
            await sent(away.ada, away.group, "Said before")
            ban = client.RemoveParticipant(conversation_id=away.group, user_id=away.who.id, ban=True)
            await away.ada.call(ban)
            await sent(away.ada, away.group, "Secret")
        return found

    banned: list[bool] = []
    monkeypatch.setattr("server.domain.sync.changes.missed", late)
    await sent(away.ada, away.group, "Missed")
    (changes, left) = await away.back()
    assert isinstance(changes, Changes)
    assert left == server.ConversationLeft(conversation_id=away.group)


async def test_resume_reports_joined_and_left_conversations(away: Away) -> None:
    other = await away.world.group(away.ada, away.who, title="Other")
    await away.ada.call(client.RemoveParticipant(conversation_id=away.group, user_id=away.who.id))
    left, joined = await away.back()
    assert left == server.ConversationLeft(conversation_id=away.group)
    assert isinstance(joined, server.ConversationJoined)
    assert joined.view.conversation.id == other


async def test_hidden_and_missing_conversations_are_both_reported_as_left(away: Away) -> None:
    strange = await away.world.channel(away.ada)
    nowhere = ConversationId(uuid7())
    said = await away.back({away.group: away.version, strange: 1, nowhere: 1})
    assert {one.conversation_id for one in said if isinstance(one, server.ConversationLeft)} == {strange, nowhere}
    assert len(said) == 2


MAKE_MORE = """
WITH made AS (
    INSERT INTO conversation (type, title, created_by, version, participant_count)
    SELECT 'group', 'Grown', $1, 1, 1 FROM generate_series(1, 200) RETURNING id
)
INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version)
SELECT id, $1, 1, 1 FROM made RETURNING conversation_id
"""


async def test_resume_of_thousands_of_conversations_yields_between_pages(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [row[0] for row in await away.world.db.fetch(MAKE_MORE, away.who.id)]
    strange = [ConversationId(uuid7()) for _ in range(MAX_RESUMED - 1 - len(own))]
    turn, in_turn = 0, Counter[int]()
    detach = Connection.detach

    def counted(self: Connection, conversation_id: ConversationId) -> None:
        in_turn[turn] += 1
        detach(self, conversation_id)

    async def others() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Connection, "detach", counted)
    turning = asyncio.create_task(others())
    said = await away.back({away.group: away.version} | dict.fromkeys(own + strange, 1))
    await end([turning])
    assert {one.conversation_id for one in said if isinstance(one, server.ConversationLeft)} == set(strange)
    assert len(said) == len(strange)
    assert in_turn.total() == MAX_RESUMED
    assert max(in_turn.values()) <= sync.CONVERSATIONS_PER_PAGE


async def test_resume_ends_with_its_connection(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of its client are free immediately. Otherwise the resume would read on for a closed connection."""
    app = away.world.workers[1].app
    own = [row[0] for row in await away.world.db.fetch(MAKE_MORE, away.who.id)]
    reads = 0

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 3:
            for socket in app.hub.online_users.sockets(away.who.id):
                socket.close(CloseCode.GOING_AWAY)
        return await missed(*args, **options)

    monkeypatch.setattr("server.domain.sync.changes.missed", counted)
    with pytest.raises(ConnectionError):
        await away.back(dict.fromkeys(own, 0))
    await until(lambda: not app._working)  # noqa: SLF001
    assert reads == 3


async def test_answers_of_a_resume_take_tokens_by_their_size(settings: Settings) -> None:
    """Reads have a rate of 10 and a burst of 40. The frame takes at most 30 tokens, and 415 KiB of answers take 12."""
    async with World(msgspec.structs.replace(settings, read_rate=10.0), workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        versions = {ConversationId(uuid7()): 1 for _ in range(MAX_RESUMED)}
        frame = client.Resume(epoch=ada.ready.epoch, versions=versions)
        began = time.monotonic()
        await ada.call(frame, server.Resumed)
        answer = await ada.ask(client.GetMe())
        # On a busy machine, tokens refill meanwhile.
        assert isinstance(answer, server.Error) or time.monotonic() - began > 0.2


async def test_unsent_reads_of_a_resume_take_tokens(settings: Settings) -> None:
    """Reads as above. Quotation marks take two bytes each, so 2 of 2.8 MiB are read, and take 60 tokens."""
    async with World(msgspec.structs.replace(settings, read_rate=10.0), workers=1) as world:
        ada = await world.connect(await world.user("Ada"))
        group = await world.channel(ada)
        version = await world.db.fetchval("SELECT version FROM conversation WHERE id = $1", group)
        await world.db.execute(MISS, group, MAX_CHANGES, ada.ready.user.id, '"' * 900)
        began = time.monotonic()
        await ada.call(client.Resume(epoch=ada.ready.epoch, versions={group: version}), server.Resumed)
        assert (await ada.event(server.StartOver)).reason == "too_many_changes"
        answer = await ada.ask(client.GetMe())
        assert isinstance(answer, server.Error) or time.monotonic() - began > 2


MISS = """
WITH bumped AS (UPDATE conversation SET version = version + $2 WHERE id = $1)
INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
SELECT $1, $3, $4, c.version + n, c.version + n FROM conversation c, generate_series(1, $2) n WHERE c.id = $1
"""


async def test_too_many_missed_changes_start_over_without_being_read(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    await away.world.db.execute(MISS, away.group, MAX_CHANGES, away.ada.ready.user.id, "Many")
    (changes,) = await away.back()
    assert isinstance(changes, Changes)
    assert len(changes.events) == MAX_CHANGES
    await sent(away.ada, away.group, "One more")
    monkeypatch.delattr("server.domain.sync.changes.missed")
    (over,) = await away.back()
    assert isinstance(over, server.StartOver)
    assert (over.reason, over.view.version) == ("too_many_changes", 4 + MAX_CHANGES)


async def test_version_ahead_of_the_server_starts_over(away: Away) -> None:
    away.version = 1000
    (over,) = await away.back()
    assert isinstance(over, server.StartOver)
    assert over.reason == "ahead_of_server"


async def test_different_epoch_starts_over(away: Away) -> None:
    (over,) = await away.back(epoch="another")
    assert isinstance(over, server.StartOver)
    assert over.reason == "other_epoch"


async def test_resume_on_an_open_connection(away: Away) -> None:
    await sent(away.ada, away.group, "One")
    await away.ada.event(server.MessageSent)
    await away.ada.call(client.Resume(epoch=away.epoch, versions={away.group: away.version}), server.Resumed)
    changes = await away.ada.event(Changes)
    assert (changes.since, changes.version) == (3, 4)
    await sent(away.ada, away.group, "Two")
    event = await away.ada.event(server.MessageSent, lambda event: event.message.content == "Two")
    assert event.version == 5
    # The connection keeps following conversations that the frame does not name, and does not get them again.
    seen = len(away.ada.events)
    resumed = await away.ada.call(client.Resume(epoch=away.epoch, versions={}), server.Resumed)
    assert (resumed.conversations, away.ada.events[seen:]) == (1, [])
    await sent(away.ada, away.group, "Three")
    event = await away.ada.event(server.MessageSent, lambda event: event.message.content == "Three")
    assert event.version == 6


async def test_resume_may_name_its_conversations_in_several_frames(away: Away) -> None:
    """Conversations that no frame has named are sent with the last one, also if something happens in between."""
    first, second = away.group, await away.world.group(away.ada, away.who)
    await away.world.db.execute("UPDATE conversation_participant SET last_read_message_id = $1", uuid7())
    await sent(away.ada, first, "One")
    await sent(away.ada, second, "Two")
    phone = await away.world.connect(away.who, 1, query="?resume=1")

    async def name(versions: dict[ConversationId, int], **fields: Any) -> tuple[list[ServerFrame], server.Resumed]:
        seen = len(phone.events)
        done = await phone.call(client.Resume(epoch=away.epoch, versions=versions, **fields), server.Resumed)
        return phone.events[seen:], done

    events, done = await name({first: away.version}, user_version=0, is_last=False)
    assert [(event.conversation_id, event.version) for event in events if isinstance(event, Changes)] == [(first, 4)]
    assert not [event for event in events if isinstance(event, server.ConversationJoined)]
    assert (done.conversations, {*done.read_positions}, {*done.read_revisions}) == (2, {first}, {first})
    # A new conversation, and the end of one that was named. Nothing is said about the one that a later frame names.
    third = await away.world.group(away.ada, away.who)
    await away.ada.call(client.RemoveParticipant(conversation_id=first, user_id=away.who.id))
    await phone.event(server.ConversationLeft, lambda event: event.conversation_id == first)
    await sent(away.ada, second, "Three")
    await phone.synced()
    assert not [event for event in phone.events if isinstance(event, server.ConversationJoined)]
    events, done = await name({second: 3})
    assert [(event.conversation_id, event.version) for event in events if isinstance(event, Changes)] == [(second, 5)]
    joined = [event.view.conversation.id for event in events if isinstance(event, server.ConversationJoined)]
    assert (joined, done.conversations, {*done.read_positions}) == ([third], 2, {second})
    fourth = await away.world.group(away.ada, away.who)
    await phone.event(server.ConversationJoined, lambda event: event.view.conversation.id == fourth)


async def test_watch_before_the_last_frame_of_a_resume_follows_all_conversations(away: Away) -> None:
    """Otherwise the user would go on to see people after the end of a conversation with them."""
    phone = await away.world.connect(away.who, 1, query="?resume=1")
    frame = client.Resume(epoch=away.epoch, versions={}, is_last=False)
    await phone.call(frame, server.Resumed)
    assert phone.events[1:] == []
    await phone.call(client.Watch(user_ids=[away.ada.ready.user.id]))
    joined = await phone.event(server.ConversationJoined)
    assert joined.view.conversation.id == away.group


async def test_resume_names_any_number_of_conversations(away: Away) -> None:
    left = [ConversationId(uuid7()) for _ in range(MAX_RESUMED + 1)]
    phone = await away.world.connect(away.who, 1, query="?resume=1")
    with refused(ErrorCode.INVALID, "versions"):
        await phone.call(client.Resume(epoch=away.epoch, versions=dict.fromkeys(left, 1)))
    for some, is_last in ((left[:-1], False), (left[-1:], True)):
        frame = client.Resume(epoch=away.epoch, versions=dict.fromkeys(some, 1), is_last=is_last)
        assert (await phone.call(frame, server.Resumed)).conversations == 1
    assert {event.conversation_id for event in phone.events if isinstance(event, server.ConversationLeft)} == set(left)
    await phone.event(server.ConversationJoined)


async def test_heartbeats_have_the_versions_of_active_conversations(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, heartbeat_seconds=0.5)) as world:
        ada = await world.connect(await world.user("Ada"))
        assert ada.ready.heartbeat_ms == 500
        channel, quiet = await world.channel(ada), await world.channel(ada)
        await sent(ada, channel)
        beat = await ada.event(server.Heartbeat, lambda beat: beat.versions.get(channel) == 3)
        assert quiet not in beat.versions
        still = await ada.event(server.Heartbeat, lambda beat: not beat.versions, start=ada.events.index(beat))
        assert still.server_time > beat.server_time


async def test_crowd_receives_events_in_order_and_heartbeats_never_run_ahead(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long rests, so that heartbeats are sent while events wait.
    monkeypatch.setattr(topics, "WRITE_PAUSE_FACTOR", 300.0)
    # The test sends heartbeats itself, so that a slow machine is not closed as silent.
    async with World(msgspec.structs.replace(settings, heartbeat_seconds=600.0)) as world:
        ada, charles = await world.users("Ada", "Charles")
        first = await world.connect(ada)
        group = await world.group(first, charles)
        crowd = [first, *[await world.connect(who) for who in (ada, charles) for _ in range(30)]]
        starts = [len(one.events) for one in crowd]

        async def talk(one: Client) -> None:
            for number in range(25):
                await sent(one, group, f"{number}")
                for worker in world.workers:
                    await worker.app.connections._beat()  # noqa: SLF001

        await asyncio.gather(*(talk(one) for one in crowd[:12]))
        early = 0
        before = await world.db.fetchval("SELECT version - 12 * 25 FROM conversation WHERE id = $1", group)
        for one, start in zip(crowd, starts, strict=True):
            await one.event(server.MessageSent, lambda event: event.version == before + 12 * 25, start=start)
            heard = before
            for event in one.events[start:]:
                if isinstance(event, server.MessageSent):
                    assert event.version == heard + 1
                    heard = event.version
                elif isinstance(event, server.Heartbeat):
                    assert event.versions.get(group, 0) <= heard
                    early += before < event.versions.get(group, 0) < before + 12 * 25
        assert early > len(crowd), "heartbeats arrived while others wrote"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "send",
                "reply",
                "both",
                "poll",
                "quote",
                "edit",
                "delete",
                "react",
                "unreact",
                "pin",
                "unpin",
                "vote",
                "withdraw",
                "close",
                "hide",
                "show",
                "rename",
                "drop",
            ]
        ),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=30,
)


@pytest.fixture
async def watched(world: World) -> tuple[World, Client, UserSession]:
    return world, await world.connect(await world.user("Ada")), await world.user("Charles")


@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
async def test_old_state_plus_events_equals_new_state(
    watched: tuple[World, Client, UserSession], actions: list[tuple[str, int]]
) -> None:
    """This holds for any actions, and wherever the connection drops in between."""
    world, ada, charles = watched
    group = await world.group(ada, charles)
    mirror = Mirror()
    phone = await listening(world, charles, mirror, None)
    mirror.unloaded.discard(group)
    ids: list[MessageId] = []
    for action, number in actions:
        if action == "drop":
            await phone.drop()
            ids += [await sent(ada, group, f"Missed {missed}") for missed in range(number)]
            phone = await listening(world, charles, mirror, mirror.versions)
            continue
        frame = to_do(action, group, ids[-1 - number % len(ids)] if ids else None)
        if isinstance(frame, client.Send):
            ids.append(frame.message_id)
        await ada.ask(frame)
    assert await recount(world.db) == []
    truth = await read_conversation(world.db, group)
    await until(lambda: mirror.copies[group].version >= truth.version)
    copy = mirror.copies[group]
    copy.participants = truth.participants
    assert_same(copy, truth)
    await phone.close()


async def listening(
    world: World, who: UserSession, mirror: Mirror, versions: dict[ConversationId, int] | None
) -> Client:
    phone = Client(world.workers[1].url, who.token, query="" if versions is None else "?resume=1")
    phone.on_event = mirror.receive
    await phone.open()
    if versions is None:
        await phone.settled()
    else:
        await phone.call(client.Resume(epoch=mirror.epoch, versions=versions), server.Resumed)
    return phone


def to_do(action: str, group: ConversationId, message_id: MessageId | None) -> Frame:
    if action == "rename":
        return client.UpdateConversation(conversation_id=group, title=f"Title {uuid7()}")
    if action == "send" or message_id is None:
        return message(group)
    place: dict[str, Any] = {"conversation_id": group, "message_id": message_id}
    return {
        "reply": message(group, parent_message_id=message_id),
        "both": message(group, parent_message_id=message_id, also_in_conversation=True),
        "poll": message(group, "Tea? #tea @charles", payload=Poll(options=["Yes", "No"], is_anonymous=True)),
        "quote": message(group, "*So* said", quoted_message_id=message_id, is_markdown=True),
        "pin": client.Pin(**place),
        "unpin": client.Unpin(**place),
        "vote": client.Vote(**place, options=[message_id.int % 2]),
        "withdraw": client.Vote(**place, options=[]),
        "close": client.ClosePoll(**place),
        "hide": client.Moderate(**place, reason="Rude"),
        "show": client.Unmoderate(**place),
        "edit": client.Edit(conversation_id=group, message_id=message_id, content=f"Edit {uuid7()}"),
        "delete": client.Delete(conversation_id=group, message_id=message_id),
        "react": client.React(conversation_id=group, message_id=message_id, emoji="👍"),
        "unreact": client.Unreact(conversation_id=group, message_id=message_id, emoji="👍"),
    }[action]


async def test_large_missed_changes_start_over(away: Away) -> None:
    """The hub, which cannot start over, reads them in parts."""
    say = """WITH bumped AS (UPDATE conversation SET version = version + $2 WHERE id = $1)
        INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT $1, $3, repeat(U&'\\0001', 10000), 3 + n, 3 + n FROM generate_series(1, $2) n"""
    count = 120
    await away.world.db.execute(say, away.group, count, away.ada.ready.user.id)
    (over,) = await away.back()
    assert isinstance(over, server.StartOver)
    assert over.reason == "too_many_changes"
    version, pieces = away.version, 0
    while (undecoded := await since(away.world.db, away.group, version, limit=MAX_CHANGES)) is not None:
        found = await undecoded.decoded()
        assert len(encode(found.changes)) < MAX_CHANGES_BYTES + 100_000
        assert [event.version for event in found.changes.events] == list(range(version + 1, found.changes.version + 1))
        version, pieces = found.changes.version, pieces + 1
        if found.is_whole:
            break
    assert version == 3 + count
    assert pieces > 3


@pytest.mark.parametrize(("count", "content"), [(59, "\x01"), (90, "\u4e00")], ids=["escaped", "long"])
async def test_first_missed_version_is_read_whole_at_any_size(away: Away, count: int, content: str) -> None:
    await away.world.db.execute(
        """WITH bumped AS (UPDATE conversation SET version = 5 WHERE id = $1)
        INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT $1, $2, repeat($3, 10000), 3 + n, CASE WHEN n <= $4 THEN 4 ELSE 5 END
        FROM generate_series(1, $4::int + 1) n""",
        away.group, away.ada.ready.user.id, content, count,
    )  # fmt: skip
    undecoded = await since(away.world.db, away.group, 3, limit=MAX_CHANGES)
    assert undecoded is not None
    found = await undecoded.decoded()
    assert (found.changes.version, len(found.changes.events), found.is_whole) == (4, count, False)
    assert found.parts(MAX_PAGE_BYTES) is None, "the changes do not fit into a frame"


async def test_client_of_the_guide_resumes_with_default_frame_size(away: Away) -> None:
    """`websockets` refuses frames over 1 MiB by default."""
    say = """WITH bumped AS (UPDATE conversation SET version = version + 45 WHERE id = $1)
        INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT $1, $2, repeat('😀', 10000), 3 + n, 3 + n FROM generate_series(1, 45) n"""
    await away.world.db.execute(say, away.group, away.ada.ready.user.id)
    url = away.world.workers[1].url.replace("http", "ws", 1)
    async with asyncio.timeout(10), connect(f"{url}/v1/ws?resume=1", subprotocols=[Subprotocol(SUBPROTOCOL)]) as socket:
        await socket.send(json.dumps({"type": "authenticate", "token": away.who.token}))
        ready = json.loads(await socket.recv())
        assert ready["limits"]["sent_bytes"] == MAX_SENT_BYTES == 2**20
        versions = {str(away.group): away.version}
        await socket.send(json.dumps({"type": "resume", "id": 1, "epoch": ready["epoch"], "versions": versions}))
        version, seen = away.version, []
        while (frame := json.loads(await socket.recv()))["type"] != "reply":
            assert (frame["type"], frame["since"]) == ("changes", version)
            version = frame["version"]
            seen += [event["version"] for event in frame["events"]]
            assert seen[-1] == version
    assert seen == list(range(4, 49))
