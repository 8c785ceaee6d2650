"""The bus on its own, between two ends, on a real Valkey."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from server.core.config import Settings
from server.hub.redis_bus import PING_SECONDS, RedisBus
from tests.world import until


class End:
    """The end of one worker, and the events that it received."""

    def __init__(self, url: str, installation: str = "one") -> None:
        self.received: list[tuple[bytes, bytes]] = []
        self.bus = RedisBus(
            url, installation, deliver=lambda *event: self.received.append(event), caught_up=lambda: None
        )


@pytest.fixture
async def ends(settings: Settings) -> AsyncIterator[tuple[End, End]]:
    ends = End(settings.redis_url), End(settings.redis_url)
    for end in ends:
        await end.bus.start()
        await until(lambda: end.bus.is_up)  # noqa: B023 - awaited in this turn
    yield ends
    for end in ends:
        await end.bus.close()


async def test_events_are_received_in_order_by_other_workers_only(ends: tuple[End, End]) -> None:
    one, other = ends
    for end in ends:
        await end.bus.subscribe([b"a", b"b"])
    for number in range(100):
        one.bus.publish(b"a", b"%d," % number)
        if number % 7 == 0:
            # Events published during a write wait, and are sent together.
            await asyncio.sleep(0)
    one.bus.publish(b"b", b"end")
    await until(lambda: (b"b", b"end") in other.received)
    assert b"".join(event for channel, event in other.received if channel == b"a") == b"".join(
        b"%d," % number for number in range(100)
    )
    assert one.received == []


async def test_unsubscribed_channel_delivers_no_events(ends: tuple[End, End]) -> None:
    one, other = ends
    await other.bus.subscribe([b"a", b"b"])
    other.bus.unsubscribe(b"a")
    await other.bus.subscribe([b"c"])
    for channel in (b"a", b"b", b"c"):
        one.bus.publish(channel, b"event")
    await until(lambda: len(other.received) == 2)
    assert {channel for channel, _ in other.received} == {b"b", b"c"}


async def test_lost_connection_is_reopened_with_all_its_channels(ends: tuple[End, End], settings: Settings) -> None:
    one, other = ends
    await other.bus.subscribe([b"a"])
    redis = Redis.from_url(settings.redis_url)
    await redis.client_kill_filter(_type="pubsub")
    await until(lambda: not other.bus.is_up)
    await other.bus.subscribe([b"late"])
    await until(lambda: other.bus.is_up and one.bus.is_up)
    for channel in (b"a", b"late"):
        one.bus.publish(channel, b"event")
    await until(lambda: len(other.received) == 2)
    assert set(other.received) == {(b"a", b"event"), (b"late", b"event")}
    await redis.aclose()


async def test_blocked_worker_keeps_its_connection_and_a_silent_server_is_disconnected(
    ends: tuple[End, End], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = ends
    await other.bus.subscribe([b"a"])
    time.sleep(2.5 * PING_SECONDS)  # noqa: ASYNC251 - blocks the worker, as a busy machine does
    await asyncio.sleep(PING_SECONDS)
    one.bus.publish(b"a", b"event")
    await until(lambda: len(other.received) == 1)
    assert "failed" not in caplog.text
    transport = other.bus._transport  # noqa: SLF001 - has the socket
    assert transport is not None
    transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: "the bus failed and will be retried: no answer to 2 pings" in caplog.text)
    await until(lambda: other.bus.is_up)


async def test_subscribe_completes_despite_a_concurrent_unsubscribe(ends: tuple[End, End]) -> None:
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
    one.bus.publish(b"a", b"event")
    await until(lambda: other.received == [(b"a", b"event")])
