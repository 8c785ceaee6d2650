"""Whose posts to push services wait for what: endpoints are named by users, and one user's slow down nobody else's."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

import msgspec
import pytest

from protocol.ids import UserId, uuid7
from server import posts
from server.config import Settings
from server.looptime import LoopTime
from server.posts import Drops, Failed, Posts, Push, Rejected
from server.queries.push import Post
from tests.browser import Browser, post_to, say
from tests.world import World, sent, until

HOST = "https://push.example"


class Service:
    """A push service that answers as a test says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.refusals: dict[str, Exception] = {}
        self.silent: set[str] = set()
        self.queue = Posts(say, self.send, Drops())

    async def send(self, push: Push) -> None:
        self.begun.append(push.endpoint)
        if push.endpoint in self.silent:
            await asyncio.Event().wait()
        if push.endpoint in self.refusals:
            raise self.refusals[push.endpoint]

    async def post(self, *new: Post) -> list[str]:
        """Enqueue posts, and return to which endpoints posts began."""
        before = len(self.begun)
        for one in new:
            self.queue.add(one)
        self.queue.start()
        while self.queue._next is not None or len(self.queue._tasks) > len(self.silent):  # noqa: SLF001
            await asyncio.sleep(0)
        return self.begun[before:]


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    yield service
    await service.queue.close()


@pytest.mark.parametrize("refusal", [Rejected(3_600.0), Failed(3_600.0), Failed(), None])
async def test_endpoints_of_one_user_pause_no_host_for_others(service: Service, refusal: Exception | None) -> None:
    user_id = UserId(uuid7())
    bad = [post_to(f"{HOST}/bad/{number}", user_id) for number in range(20)]
    assert await service.post(post_to(f"{HOST}/good")) == [f"{HOST}/good"]
    if refusal is None:
        service.silent = {one.endpoint for one in bad[: posts.PER_USER]}
        for one in bad:
            service.queue.add(one)
        service.queue.start()
        await until(lambda: len(service.begun) == 1 + posts.PER_USER)
    else:
        service.refusals = {one.endpoint: refusal for one in bad}
        await service.post(*bad)
    assert await service.post(post_to(f"{HOST}/other"), post_to(f"{HOST}/good")) == [f"{HOST}/other", f"{HOST}/good"]


async def test_endpoint_that_is_refused_waits_alone(service: Service) -> None:
    bad = post_to(f"{HOST}/bad")
    service.refusals = {bad.endpoint: Rejected(3_600.0)}
    await service.post(bad)
    assert await service.post(post_to(bad.endpoint, bad.user_id), post_to(bad.endpoint, bad.user_id)) == []
    assert service.queue._queued == 1, "the newest one waits"  # noqa: SLF001
    assert await service.post(post_to(f"{HOST}/second", bad.user_id)) == [f"{HOST}/second"]
    assert service.queue._drops.counts == {"refused": 1, "paused": 1}  # noqa: SLF001


async def test_failures_of_several_users_pause_a_host_for_all_and_not_for_an_hour(service: Service) -> None:
    bad = [post_to(f"{HOST}/{number}") for number in range(posts.HOST_USERS)]
    service.refusals = {one.endpoint: Failed(3_600.0) for one in bad}
    await service.post(*bad[:-1], post_to(f"{HOST}/good"))
    assert await service.post(bad[-1]) == [bad[-1].endpoint], "the host answered somebody in between"
    assert await service.post(post_to(f"{HOST}/good")) == [f"{HOST}/good"]
    again = [post_to(f"{HOST}/again/{number}") for number in range(posts.HOST_USERS)]
    service.refusals |= {one.endpoint: Failed(3_600.0) for one in again}
    await service.post(*again)
    assert await service.post(post_to(f"{HOST}/good")) == []
    (host,) = service.queue._hosts.values()  # noqa: SLF001
    assert host.pause.until <= time.monotonic() + posts.MAX_BACKOFF


async def test_users_take_turns_and_each_has_a_pace(service: Service) -> None:
    greedy = UserId(uuid7())
    many = [post_to(f"{HOST}/greedy/{number}", greedy) for number in range(int(posts.USER_BURST) + 20)]
    begun = await service.post(*many, post_to(f"{HOST}/other"))
    assert begun.index(f"{HOST}/other") <= posts.PER_USER
    assert len(begun) == int(posts.USER_BURST) + 1, "the others wait for the pace of their user"
    assert await service.post(post_to(f"{HOST}/other")) == [f"{HOST}/other"]


async def test_newer_notification_of_a_conversation_replaces_the_one_that_waits(service: Service) -> None:
    older = post_to(f"{HOST}/a")
    newer = older._replace(message_id=post_to(HOST).message_id)
    read: list[Post] = []

    async def keep(post: Post) -> Push:
        read.append(post)
        return await say(post)

    service.queue._read = keep  # noqa: SLF001
    await service.post(older, newer)
    assert read == [newer]
    assert service.queue._drops.counts == {"replaced": 1}  # noqa: SLF001


async def test_one_post_begins_in_a_turn_of_the_loop(service: Service) -> None:
    at: Counter[int] = Counter()
    turn = 0

    async def read(_: Post) -> None:
        at[turn] += 1

    service.queue._read = read  # noqa: SLF001
    await service.post(post_to(f"{HOST}/first"))
    for number in range(50):
        service.queue.add(post_to(f"{HOST}{number}.example/"))
    service.queue.start()
    while sum(at.values()) < 51:
        turn += 1
        await asyncio.sleep(0)
    assert max(at.values()) == 1


async def test_posts_stop_beginning_when_their_share_of_the_loop_is_used_up(service: Service) -> None:
    used, now = 0.0, 0.0
    service.queue._time = LoopTime(0.1, 0.1, clock=lambda: now, used=lambda: used)  # noqa: SLF001

    async def read(_: Post) -> None:
        nonlocal used, now
        used += 0.004
        now += 0.004

    service.queue._read = read  # noqa: SLF001
    for number in range(200):
        service.queue.add(post_to(f"{HOST}/{number}"))
    for _ in range(2_000):
        if service.queue._next is not None:  # noqa: SLF001
            service.queue._next.cancel()  # noqa: SLF001
        service.queue._begin_one()  # noqa: SLF001
        await asyncio.sleep(0)
        now += 0.001
    assert 0.1 <= used <= 0.1 * now + 0.1 + 0.004


async def test_metered_work_keeps_its_outcome_its_errors_and_its_cancellation() -> None:
    used = 0.0
    budget = LoopTime(0.5, 1.0, used=lambda: used)
    log: list[str] = []

    async def work(problem: Exception | None) -> str:
        nonlocal used
        used += 2.0
        try:
            await asyncio.sleep(0 if problem is None else 1e-6)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        if problem is not None:
            raise problem
        return "done"

    assert await budget.run(work(None)) == "done"
    assert budget.wait() > 0
    with pytest.raises(ValueError, match="no"):
        await budget.run(work(ValueError("no")))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await budget.run(asyncio.sleep(60))
    task = asyncio.create_task(budget.run(work(ValueError("no"))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cancelled"]


class TestInTheServer:
    """A push service that limits one endpoint, over the wire."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return msgspec.structs.replace(settings, push_after_seconds=0.0, private_addresses=True)

    async def test_endpoint_with_too_many_requests_silences_nobody_else_at_its_host(self, world: World) -> None:
        ada, charles, mary = await world.users("Ada", "Charles", "Mary")
        await world.befriend(ada, charles)
        await world.befriend(ada, mary)
        sender = await world.connect(ada)
        browser = Browser()
        await browser.start()
        try:
            good, bad = browser.subscription(), browser.subscription()
            bad.endpoint = browser.url + "/bad"
            browser.statuses["/bad"] = 429
            await (await world.connect(charles)).call(good)
            await (await world.connect(mary)).call(bad)
            to_mary = await sent(sender, await world.group(sender, mary), "To Mary")
            assert (await browser.next())[1].message_id == to_mary
            queue = world.workers[0].app.notices._posts  # noqa: SLF001
            await until(lambda: not queue._tasks)  # noqa: SLF001
            to_charles = await sent(sender, await world.group(sender, charles), "To Charles")
            assert (await browser.next())[1].message_id == to_charles
            await until(lambda: not queue._tasks)  # noqa: SLF001
            assert queue._pauses.keys() == {bad.endpoint}  # noqa: SLF001
        finally:
            await browser.stop()
