"""Bytes on the bus and in Redis that a worker cannot read, as those of another release. It leaves them out."""

# ruff: noqa: SLF001 - they are parsed below the public interface
import asyncio
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol import client, server
from protocol.codec import is_text_frame, text_frame
from protocol.ids import ConversationId, SessionId, UserId, uuid7
from server.auth.tickets import Ticket
from server.domain.presence_entries import USER, WORKER, WORKERS
from server.hub import cluster_bus, comparisons, online_users, peers, topics, watchers
from server.hub.entries import pack, unpack
from server.hub.redis_bus import RedisBus
from server.queries import workers
from tests.conftest import Lines
from tests.world import Room, World, received_message, sent

MANY = examples(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.sampled_from([0, 1, 2, 3, 99, 2**63, 2**64 - 1])
FRAMES = st.binary(max_size=200).filter(lambda frame: not is_text_frame(frame))
"""Bytes that are no event. A well-formed event of a version that the database does not have would be delivered."""
ENTRIES = st.lists(st.builds(pack, NUMBERS, FRAMES, st.binary(min_size=16, max_size=16)), max_size=4).map(b"".join)
MESSAGES = st.one_of(
    st.binary(max_size=100),
    ENTRIES,
    st.builds(lambda message, kept: message[: kept % (len(message) or 1)], ENTRIES, st.integers(0, 1_000)),
)


def channels_of(user_id: UserId, conversation_id: ConversationId) -> list[bytes]:
    return [
        topics.channel(conversation_id), online_users.channel(user_id), online_users.own_channel(user_id),
        watchers.channel(user_id), peers.CHANNEL, b"z:" + user_id.hex.encode(), b"c:", b"",
    ]  # fmt: skip


def push(*words: bytes) -> bytes:
    """Return a message of Redis, as RESP 3 has it."""
    return b">%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Receiver:
    """The connection of a worker to the bus, to which a test writes as Redis does."""

    def __init__(self, world: World, number: int) -> None:
        self.hub = world.workers[number].app.hub
        assert isinstance(self.hub.bus, RedisBus)
        assert self.hub.bus._receiver is not None
        self._bus, self._receiver, self._losses = self.hub.bus, self.hub.bus._receiver, self.hub.bus.losses

    def receive(self, channel: bytes, message: bytes, *, origin: bytes = b"another_") -> None:
        """Receive a message, and check that the connection stays up without a loss."""
        self._receiver.data_received(push(b"message", self._bus._prefix + channel, origin + message))
        assert self._bus.is_up
        assert self._bus._receiver is self._receiver
        assert not self._receiver.lost.done()
        assert self._bus.losses == self._losses


async def test_messages_that_cannot_be_read_are_left_out_and_logged_once(
    world: World, room: Room, lines: Lines
) -> None:
    receiver = Receiver(world, 1)
    channels = channels_of(room.users[1].id, room.group)

    @MANY
    @given(st.binary(max_size=40), MESSAGES, st.sampled_from([b"another_", b"", b"short"]))
    @example(b"", b"".join(pack(kind, b"abc") for kind in (*peers.Kind, 99)), b"another_")
    def receive(channel: bytes, message: bytes, origin: bytes) -> None:
        for one in (*channels, channel):
            receiver.receive(one, message, origin=origin)

    receive()
    fetched = receiver.hub.topics.fetched
    await received_message(room.charles, await sent(room.ada, room.group))
    assert receiver.hub.topics.fetched == fetched
    ignored = [line for line in lines.text.splitlines() if "ignored a message on the bus" in line]
    assert len(ignored) == len({line.partition("WARNING")[2] for line in ignored})
    assert len(ignored) == 6
    assert "Traceback" not in lines.text


async def test_message_of_a_later_release_is_read_as_far_as_this_one_knows_it(world: World, room: Room) -> None:
    receiver = Receiver(world, 1)
    worker = bytes(range(16))
    unknown = pack(99, b"abc", worker)
    receiver.receive(peers.CHANNEL, unknown + pack(peers.Kind.HEARTBEAT, bytes(8) + b"more", worker))
    assert worker in receiver.hub.comparisons._peers.workers
    receiver.receive(watchers.channel(room.users[0].id), pack(99, text_frame(b"{}")))
    receiver.receive(peers.CHANNEL, unknown + pack(peers.Kind.GOODBYE, b"more", worker))
    assert worker not in receiver.hub.comparisons._peers.workers


async def test_defect_in_a_delivery_is_repaired_by_a_comparison(
    world: World, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver(world, 1)
    monkeypatch.setattr(comparisons, "MAX_JITTER_SECONDS", 0.0)

    def accept(*_: object) -> None:
        monkeypatch.undo()
        raise IndexError

    monkeypatch.setattr(receiver.hub.topics, "accept", accept)
    await received_message(room.charles, await sent(room.ada, room.group))
    assert receiver.hub.topics.fetched == 1
    receiver.receive(peers.CHANNEL, b"")


@MANY
@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=50), st.binary(min_size=16, max_size=16)), min_size=1
    )
)
def test_entries_are_read_as_they_were_written(written: list[tuple[int, bytes, bytes]]) -> None:
    message = b"".join(pack(*one) for one in written)
    assert list(unpack(message)) == written
    assert list(unpack(message[:-1])) == written[:-1]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 128, 65_535, 65_536, 70_000])
def test_text_frame_is_recognized_by_its_length(size: int) -> None:
    frame = text_frame(b"x" * size)
    assert is_text_frame(frame)
    for other in (frame[:-1], frame + b"x", b"\x82" + frame[1:], frame[1:], b""):
        assert not is_text_frame(other)


async def test_ticket_in_another_form_is_invalid_and_others_are_valid(world: World) -> None:
    tickets = world.workers[0].app._tickets
    wanted = Ticket(SessionId(uuid7()), 1)
    forms = [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'["\xff",1]',
        b'["x",1]',
        b"[" * 5_000,
        b'["%s",1,2]' % str(wanted[0]).encode(),
    ]
    redis = Redis.from_url(world.settings.redis_url)
    for number, form in enumerate(forms):
        await redis.set(tickets._key(f"{number}"), form)
    await redis.aclose()
    (valid,) = await tickets.issue([wanted])
    assert valid is not None
    found = await asyncio.gather(*map(tickets.find, [*map(str, range(len(forms))), valid]))
    assert found == [None] * len(forms) + [wanted]


async def test_presence_is_read_beside_entries_in_another_form(world: World) -> None:
    """A worker that is dead has such entries, too."""
    ada, mary = await world.users("Ada", "Mary")
    await world.befriend(ada, mary)
    one = await world.connect(ada)
    await one.call(client.Watch(user_ids=[mary.id]))
    epoch = world.workers[0].app.epoch.id
    worker = f"{WORKER}{epoch}:".encode() + b"\xff:users"
    redis = Redis.from_url(world.settings.redis_url)
    await redis.hset(f"{USER}{epoch}:{mary.id.hex}", b"\xff", b"\xff")
    for user_id in (b"\xff", b"x", b"", mary.id.hex.encode()):
        await redis.sadd(worker, user_id)
    await redis.sadd(f"{WORKERS}{epoch}", b"\xff")
    await world.workers[0].app.presence._sign()
    event = await one.event(server.PresenceChanged, lambda event: event.presence.user_id == mary.id)
    assert event.presence.status == "offline"
    async with asyncio.timeout(5):
        while await redis.exists(worker):
            await asyncio.sleep(0.01)
    await redis.aclose()


@pytest.mark.parametrize("found", [None, 1, [1], [[1]], [[0, 1, None]], [[0, 1, [1, 2]]], [[0, 1, [b"\xff", 2]]]])
def test_slots_in_another_form_are_reported_as_an_error_of_redis(found: Any) -> None:
    with pytest.raises(RedisError, match="another form"):
        cluster_bus.owners(found, "here")


def test_node_without_an_address_is_the_one_that_was_asked() -> None:
    found = [[0, 1, [b"there", 2, b"id"], [b"replica", 3]], [2, 3, [b"", 4]], [4, 5, [None, 6]]]
    assert cluster_bus.owners(found, "here") == {(0, 1): ("there", 2), (2, 3): ("here", 4), (4, 5): ("here", 6)}


async def test_connection_whose_name_is_no_worker_is_left_out(world: World) -> None:
    names = {"application_name": "openchat abc"}
    other = await asyncpg.connect(world.settings.database_url, server_settings=names)
    assert len(await workers.connected(world.db)) == len(world.workers)
    await other.close()
