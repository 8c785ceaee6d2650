"""The bus by itself, between two ends on the real Valkey."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from server.core.config import Settings
from server.hub.redis_bus import PING_SECONDS, RedisBus
from tests.world import until


class End:
    """One worker's end, and what it heard."""

    def __init__(self, url: str, installation: str = "one") -> None:
        self.heard: list[tuple[bytes, bytes]] = []
        self.bus = RedisBus(url, installation, deliver=lambda *said: self.heard.append(said), caught_up=lambda: None)


@pytest.fixture
async def ends(settings: Settings) -> AsyncIterator[tuple[End, End]]:
    ends = End(settings.redis_url), End(settings.redis_url)
    for end in ends:
        await end.bus.start()
        await until(lambda: end.bus.is_up)  # noqa: B023 - awaited in this turn
    yield ends
    for end in ends:
        await end.bus.close()


async def test_what_is_said_is_heard_by_others_alone_and_in_order(ends: tuple[End, End]) -> None:
    one, other = ends
    for end in ends:
        await end.bus.subscribe([b"a", b"b"])
    for number in range(100):
        one.bus.publish(b"a", b"%d," % number)
        if number % 7 == 0:
            # In the middle of a publish, what is said next has to wait, and then travels together.
            await asyncio.sleep(0)
    one.bus.publish(b"b", b"end")
    await until(lambda: (b"b", b"end") in other.heard)
    assert b"".join(words for channel, words in other.heard if channel == b"a") == b"".join(
        b"%d," % number for number in range(100)
    )
    assert one.heard == []


async def test_who_left_a_channel_hears_no_more(ends: tuple[End, End]) -> None:
    one, other = ends
    await other.bus.subscribe([b"a", b"b"])
    other.bus.unsubscribe(b"a")
    await other.bus.subscribe([b"c"])
    for channel in (b"a", b"b", b"c"):
        one.bus.publish(channel, b"said")
    await until(lambda: len(other.heard) == 2)
    assert {channel for channel, _ in other.heard} == {b"b", b"c"}


async def test_a_lost_connection_is_made_again_with_all_its_channels(ends: tuple[End, End], settings: Settings) -> None:
    one, other = ends
    await other.bus.subscribe([b"a"])
    redis = Redis.from_url(settings.redis_url)
    await redis.client_kill_filter(_type="pubsub")
    await until(lambda: not other.bus.is_up)
    await other.bus.subscribe([b"late"])
    await until(lambda: other.bus.is_up and one.bus.is_up)
    for channel in (b"a", b"late"):
        one.bus.publish(channel, b"said")
    await until(lambda: len(other.heard) == 2)
    assert set(other.heard) == {(b"a", b"said"), (b"late", b"said")}
    await redis.aclose()


async def test_a_worker_that_was_held_up_does_not_take_the_server_for_dead_and_a_silent_one_is(
    ends: tuple[End, End], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = ends
    await other.bus.subscribe([b"a"])
    time.sleep(2.5 * PING_SECONDS)  # noqa: ASYNC251 - as a busy machine holds up a worker
    await asyncio.sleep(PING_SECONDS)
    one.bus.publish(b"a", b"said")
    await until(lambda: len(other.heard) == 1)
    assert "failed" not in caplog.text
    transport = other.bus._transport  # noqa: SLF001 - it has the socket
    assert transport is not None
    transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: "the bus failed and will be retried: no answer to 2 pings" in caplog.text)
    await until(lambda: other.bus.is_up)


async def test_who_subscribes_is_answered_though_somebody_left_the_channel_meanwhile(ends: tuple[End, End]) -> None:
    one, other = ends
    waiting = []
    for _ in range(5):
        waiting.append(asyncio.ensure_future(other.bus.subscribe([b"a"])))
        await asyncio.sleep(0)
        other.bus.unsubscribe(b"a")
    waiting.append(asyncio.ensure_future(other.bus.subscribe([b"a"])))
    _, unanswered = await asyncio.wait(waiting, timeout=10)
    assert not unanswered
    assert not other.bus._confirming  # noqa: SLF001
    one.bus.publish(b"a", b"said")
    await until(lambda: other.heard == [(b"a", b"said")])
