"""One member of a large conversation writes constantly, and the notifications of others are not delayed."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from httpx import Headers

from protocol import client
from protocol.ids import ConversationId
from prove.client import Client
from prove.writes import PUSH_POINT
from server.core.config import Settings
from server.db.database import Db
from server.jobs.push import IN_A_TURN, TICK_SECONDS
from server.jobs.push_hosts import PER_HOST
from server.jobs.push_posts import Posts
from server.jobs.safe_http import HttpAnswer, SafeHttp
from server.queries import push
from server.queries.push import DuePushes, PushPage, PushPost
from tests.world import World, message, sent, until

MEMBERS, BROWSERS = 20_000, 2_000
FILL = """
WITH made AS (
    INSERT INTO "user" (name, email)
    SELECT 'C' || i, 'c' || i || '@example.org' FROM generate_series(1, $1) i RETURNING id
), joined AS (
    INSERT INTO conversation_participant (conversation_id, user_id, version, joined_version)
    SELECT $2, id, 1, 1 FROM made RETURNING user_id
), begun AS (
    INSERT INTO session (user_id, token, expires_at)
    SELECT user_id, user_id::text, now() + interval '1 day' FROM joined LIMIT $3 RETURNING id, user_id
)
INSERT INTO push_endpoint (user_id, session_id, endpoint, p256dh, auth)
SELECT user_id, id, 'https://push.example/' || user_id, $4, 'BTBZMqHH6r4Tts7J_aSIgg' FROM begun
"""


@pytest.mark.long
@pytest.mark.new_database
async def test_constant_writer_in_a_crowd_does_not_silence_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All endpoints are at one push service, at the default rates.

    The test compares the order of posts and not their times, which depend on the load of the machine.
    """
    pushed: list[str] = []
    pages: list[tuple[float, set[ConversationId], int]] = []
    """For each page, the time of the query, its conversations, and the number of posts that had begun at its end."""
    due = push.due

    async def noted(db: Db, asked: Sequence[PushPage], limit: int) -> DuePushes:
        asked_at = time.monotonic()
        found = await due(db, asked, limit)
        pages.append((asked_at, {page.conversation_id for page in asked}, len(pushed)))
        return found

    async def post(self: SafeHttp, url: str, *_: object, **__: object) -> HttpAnswer:  # noqa: ARG001
        pushed.append(url)
        return HttpAnswer(201, Headers(), b"", url)

    monkeypatch.setattr(SafeHttp, "post", post)
    monkeypatch.setattr(push, "due", noted)
    settings = Settings(database_url=settings.database_url, redis_url=settings.redis_url)
    async with World(msgspec.structs.replace(settings, push_after_seconds=1.0), workers=1) as world:
        ada, mal, mary, charles = await world.users("Ada", "Mal", "Mary", "Charles")
        await world.befriend(charles, mary)
        hers, his = await world.connect(mary), await world.connect(charles)
        pair = await world.group(his, mary)
        crowd = await world.channel(await world.connect(ada), is_public=True)
        flooding = [await world.connect(mal) for _ in range(5)]
        await flooding[0].call(client.Join(conversation_id=crowd))
        await world.db.execute(FILL, MEMBERS, crowd, BROWSERS, PUSH_POINT)
        endpoint = "https://push.example/mary"
        await hers.call(client.RegisterPush(endpoint=endpoint, p256dh=PUSH_POINT, auth="BTBZMqHH6r4Tts7J_aSIgg"))

        async def flood(device: Client) -> None:
            while True:
                await device.ask(message(crowd, "x"))
                await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(flood(device)) for device in flooding]
        pages_before, posts_before = [], []
        try:
            await until(lambda: len(pushed) > 0)
            for number in range(5):
                await sent(his, pair, "Hello")
                due_at = time.monotonic() + 1.0
                await until(lambda number=number: pushed.count(endpoint) == number + 1)  # type: ignore[misc]
                asked_at, _, begun = next(page for page in reversed(pages) if pair in page[1])
                pages_before.append(sum(due_at + TICK_SECONDS < at < asked_at for at, _, _ in pages))
                posts_before.append(len(pushed) - 1 - pushed[::-1].index(endpoint) - begun)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert max(pages_before) <= 2, pages_before
        assert max(posts_before) <= 2 * PER_HOST, posts_before
        assert len(set(pushed)) > 100, "the crowd is notified, too"
        assert "database" not in world.workers[0].app.web_push.dropped


async def test_posts_of_a_conversation_are_queued_over_many_turns_of_the_loop(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each user has 20 endpoints in each of 10 conversations. With 50 users, one turn queued all 10,000 posts."""
    turn = 0
    in_turn: Counter[int] = Counter()
    add = Posts.add

    def noted(self: Posts, post: PushPost, *, is_crowd: bool = False) -> None:
        in_turn[turn] += 1
        add(self, post, is_crowd=is_crowd)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Posts, "add", noted)
    async with World(msgspec.structs.replace(settings, push_after_seconds=0.5), workers=1) as world:
        who, other = await world.users("Ada", "Bob")
        ada, bob = await world.connect(who), await world.connect(other)
        places = [await world.group(ada, other) for _ in range(10)]
        for number in range(20):
            endpoint = f"http://127.0.0.1:9/{number}"
            await bob.call(client.RegisterPush(endpoint=endpoint, p256dh=PUSH_POINT, auth="A" * 22))
        counting = asyncio.create_task(count_turns())
        await asyncio.gather(*(sent(ada, place) for place in places))
        await until(lambda: in_turn.total() >= 200)
        counting.cancel()
    assert max(in_turn.values()) <= IN_A_TURN
