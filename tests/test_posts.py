"""The queue of posts to push services: endpoints are named by users, and one user's must not delay those of others."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.ids import UserId, uuid7
from server.core.config import Settings
from server.core.stopwatch import Stopwatch
from server.fairness.loop_time import LoopTime
from server.jobs import push, push_hosts, push_pauses, push_posts
from server.jobs.push_drops import Drops
from server.jobs.push_posts import Failed, Posts, Push, Rejected
from server.queries.push import PushPost
from tests.browser import Browser, post_to, prepared_push
from tests.world import World, sent, until

HOST = "https://push.example"


class Service:
    """A push service that answers as a test says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.refusals: dict[str, Exception] = {}
        self.silent: set[str] = set()
        self.queue = Posts(prepared_push, self.send, Drops())

    async def send(self, push: Push, _: Stopwatch) -> None:
        self.begun.append(push.endpoint)
        if push.endpoint in self.silent:
            await asyncio.Event().wait()
        if push.endpoint in self.refusals:
            raise self.refusals[push.endpoint]

    async def post(self, *new: PushPost) -> list[str]:
        """Enqueue posts, and return the endpoints of the posts that began."""
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
async def test_failures_of_one_user_do_not_pause_a_host_for_others(service: Service, refusal: Exception | None) -> None:
    user_id = UserId(uuid7())
    bad = [post_to(f"{HOST}/bad/{number}", user_id) for number in range(20)]
    assert await service.post(post_to(f"{HOST}/good")) == [f"{HOST}/good"]
    if refusal is None:
        service.silent = {one.endpoint for one in bad[: push_hosts.PER_USER]}
        for one in bad:
            service.queue.add(one)
        service.queue.start()
        await until(lambda: len(service.begun) == 1 + push_hosts.PER_USER)
    else:
        service.refusals = {one.endpoint: refusal for one in bad}
        await service.post(*bad)
    assert await service.post(post_to(f"{HOST}/other"), post_to(f"{HOST}/good")) == [f"{HOST}/other", f"{HOST}/good"]


async def test_any_exception_of_a_post_is_a_failure_of_its_user_at_that_host(service: Service) -> None:
    """A defect that an answer triggers pauses like a 503: first the user, and after several users the host."""
    user_id = UserId(uuid7())
    service.refusals = {f"{HOST}/{number}": OverflowError("a defect") for number in range(push_hosts.HOST_USERS)}
    assert await service.post(post_to(f"{HOST}/0", user_id), post_to(f"{HOST}/good")) == [f"{HOST}/0", f"{HOST}/good"]
    assert await service.post(post_to(f"{HOST}/mine", user_id)) == []
    for number in range(push_hosts.HOST_USERS):
        assert len(await service.post(post_to(f"{HOST}/{number}"))) == 1
    assert service.queue._drops.counts["error"] == 1 + push_hosts.HOST_USERS  # noqa: SLF001
    assert await service.post(post_to(f"{HOST}/good")) == []


FORMS = ["%a, %d %b %Y %H:%M:%S GMT", "%d %b %Y %H:%M:%S -0000", "%A, %d-%b-%y %H:%M:%S %Z"]


@given(
    st.text(max_size=200)
    | st.integers().map(str)
    | st.builds(lambda at, form: at.strftime(form), st.datetimes(), st.sampled_from(FORMS))
    | st.from_regex(r"(Mon, )?[0-9]{1,30} [JFM]an [0-9]{1,30} [0-9:]{1,30} (GMT|[+-][0-9]{1,30})", fullmatch=True)
)
@example("Mon, 01 Jan 99999999999999999999 00:00:00 GMT")
@example("9" * 10_000)
def test_retry_after_is_a_bounded_number_of_seconds(value: str) -> None:
    assert 0.0 <= push.seconds_of(value) <= push_pauses.MAX_RETRY_AFTER
    assert push.seconds_of("120") == 120.0
    assert 0.0 < push.seconds_of(format_datetime(datetime.now(UTC) + timedelta(seconds=120))) <= 120.0


async def test_refused_endpoint_is_paused_alone(service: Service) -> None:
    bad = post_to(f"{HOST}/bad")
    service.refusals = {bad.endpoint: Rejected(3_600.0)}
    await service.post(bad)
    assert await service.post(post_to(bad.endpoint, bad.user_id), post_to(bad.endpoint, bad.user_id)) == []
    assert service.queue._queued == 1, "the newest post waits"  # noqa: SLF001
    assert await service.post(post_to(f"{HOST}/second", bad.user_id)) == [f"{HOST}/second"]
    assert service.queue._drops.counts == {"refused": 1, "paused": 1}  # noqa: SLF001


async def test_failures_of_several_users_pause_a_host_for_less_than_an_hour(service: Service) -> None:
    bad = [post_to(f"{HOST}/{number}") for number in range(push_hosts.HOST_USERS)]
    service.refusals = {one.endpoint: Failed(3_600.0) for one in bad}
    await service.post(*bad[:-1], post_to(f"{HOST}/good"))
    assert await service.post(bad[-1]) == [bad[-1].endpoint], "the host answered another user in between"
    assert await service.post(post_to(f"{HOST}/good")) == [f"{HOST}/good"]
    again = [post_to(f"{HOST}/again/{number}") for number in range(push_hosts.HOST_USERS)]
    service.refusals |= {one.endpoint: Failed(3_600.0) for one in again}
    await service.post(*again)
    assert await service.post(post_to(f"{HOST}/good")) == []
    (host,) = service.queue._hosts.values()  # noqa: SLF001
    assert host.pause.until <= time.monotonic() + push_hosts.MAX_BACKOFF


async def test_users_take_turns_and_each_has_a_rate(service: Service) -> None:
    greedy = UserId(uuid7())
    many = [post_to(f"{HOST}/greedy/{number}", greedy) for number in range(int(push_posts.USER_BURST) + 20)]
    begun = await service.post(*many, post_to(f"{HOST}/other"))
    assert begun.index(f"{HOST}/other") <= push_hosts.PER_USER
    assert len(begun) == int(push_posts.USER_BURST) + 1, "the others wait for the rate of their user"
    assert await service.post(post_to(f"{HOST}/other")) == [f"{HOST}/other"]


async def test_each_user_has_a_share_of_hosts_and_slots(service: Service) -> None:
    greedy = UserId(uuid7())
    many = [post_to(f"https://{number}.example/", greedy) for number in range(50)]
    service.silent = {one.endpoint for one in many}
    for one in many:
        service.queue.add(one)
    service.queue.start()
    await until(lambda: service.queue._next is None)  # noqa: SLF001
    assert len(service.begun) == push_hosts.PER_USER
    assert len(service.queue._hosts) == push_posts.MAX_HOSTS_OF_USER  # noqa: SLF001
    assert service.queue._drops.counts == {"user_hosts": 50 - push_posts.MAX_HOSTS_OF_USER}  # noqa: SLF001
    service.queue.keep(greedy, {many[0].endpoint})
    assert service.queue._queued == 0, "posts to deleted endpoints are dropped immediately"  # noqa: SLF001
    assert service.queue._drops.counts["gone"] == push_posts.MAX_HOSTS_OF_USER - push_hosts.PER_USER  # noqa: SLF001
    service.queue.add(post_to(f"{HOST}/good"))
    service.queue.start()
    await until(lambda: service.begun[-1] == f"{HOST}/good")


async def test_user_with_slow_posts_is_paused_at_every_new_host(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1_000.0
    monkeypatch.setattr(push_posts.time, "monotonic", lambda: clock)  # type: ignore[attr-defined]
    greedy = UserId(uuid7())

    async def take_long(push: Push, _: Stopwatch) -> None:
        nonlocal clock
        service.begun.append(push.endpoint)
        if "new" in push.endpoint:
            clock += push_hosts.SLOW_SECONDS
            raise Failed

    service.queue._send = take_long  # noqa: SLF001
    assert await service.post(post_to(f"{HOST}/good", greedy)) == [f"{HOST}/good"]
    for wait in (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300):
        assert len(await service.post(post_to(f"https://new{wait}.example/", greedy))) == 1
        assert await service.post(post_to("https://new.example/", greedy)) == []
        service.queue.keep(greedy, ())
        assert await service.post(post_to(f"{HOST}/good", greedy)) == [f"{HOST}/good"], "fast hosts continue"
        assert await service.post(post_to(f"https://other{wait}.example/")) != [], "other users are not delayed"
        clock += wait
    clock += push_hosts.MAX_BACKOFF
    assert len(await service.post(post_to("https://new.example/", greedy))) == 1
    assert service.queue._pauses._pauses[greedy].until == clock + 1.0, "the earlier pauses are forgotten"  # noqa: SLF001


async def test_host_that_becomes_slow_for_its_only_user_is_no_longer_fast(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1_000.0
    monkeypatch.setattr(push_posts.time, "monotonic", lambda: clock)  # type: ignore[attr-defined]
    own, shared = post_to("https://own.example/"), post_to(f"{HOST}/0")

    async def send(push: Push, _: Stopwatch) -> None:
        nonlocal clock
        clock += push_hosts.SLOW_SECONDS * (push.endpoint in service.silent)

    service.queue._send = send  # noqa: SLF001
    await service.post(own, shared, post_to(f"{HOST}/1"))
    service.silent = {own.endpoint, shared.endpoint}
    await service.post(own, shared)
    is_fast = {name: host.is_fast for name, host in service.queue._hosts.items()}  # noqa: SLF001
    assert is_fast == {"https://own.example": False, HOST: True}


async def test_full_tables_evict_entries_of_the_user_with_the_most(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_posts, "MAX_HOSTS", 6)
    monkeypatch.setattr(push_posts, "MAX_QUEUED", 24)
    queue = service.queue
    greedy, ada = UserId(uuid7()), UserId(uuid7())
    for user_id, count in ((greedy, 5), (ada, 1)):
        for number in range(count):
            queue.add(post_to(f"https://{user_id}-{number}.example/", user_id))
    queue.add(post_to("https://new.example/"))
    assert queue._drops.counts == {"too_many_hosts": 1}  # noqa: SLF001
    assert len(queue._hosts_of(greedy)) == 4, "most hosts: evicted"  # noqa: SLF001
    queue.add(post_to("https://newer.example/", ada))
    queue.add(post_to("https://newest.example/", ada))
    queue.add(post_to("https://greedy.example/", greedy))
    assert (len(queue._hosts_of(greedy)), len(queue._hosts_of(ada))) == (3, 2), "only users with fewer"  # noqa: SLF001
    for number in range(20):
        queue.add(post_to(f"https://{greedy}-4.example/{number}", greedy))
    assert queue._queued == 12, "hosts that are not known to be fast fill half of the queue"  # noqa: SLF001
    before = queue._queued_of[greedy]  # noqa: SLF001
    queue.add(post_to("https://new.example/"))
    assert (queue._queued, queue._queued_of[greedy]) == (12, before - 1), "most posts: dropped"  # noqa: SLF001


async def test_users_with_slow_posts_leave_slots_and_hosts_to_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_posts, "MAX_HOSTS", 4)
    monkeypatch.setattr(push_posts, "SLOW_USER_SLOTS", 2)
    queue = service.queue
    slow = [post_to(f"https://{number}.example/") for number in range(5)]
    for one in slow:
        queue._pauses.begin(one.user_id, 0.0)  # noqa: SLF001
        pauses = queue._pauses._pauses  # noqa: SLF001
        pauses[one.user_id] = pauses[one.user_id]._replace(until=time.monotonic())
    service.silent = {one.endpoint for one in slow}
    for one in slow:
        queue.add(one)
    assert queue._drops.counts == {"too_many_hosts": 1}, "one host per user, and no room for the last one"  # noqa: SLF001
    queue.start()
    await until(lambda: queue._next is None)  # noqa: SLF001
    assert len(service.begun) == 2
    queue.add(post_to("https://good.example/"))
    assert queue._drops.counts == {"too_many_hosts": 2}, "one of their hosts was evicted"  # noqa: SLF001
    queue.start()
    await until(lambda: service.begun[-1] == "https://good.example/")


async def test_posts_of_large_conversations_take_turns_and_fill_at_most_half_of_the_queue(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_posts, "MAX_QUEUED", 60)
    assert await service.post(post_to(f"{HOST}/first")) == [f"{HOST}/first"]
    for number in range(40):
        service.queue.add(post_to(f"{HOST}/crowd/{number}"), is_crowd=True)
    assert service.queue._drops.counts == {"queue_full": 10}  # noqa: SLF001
    begun = await service.post(*(post_to(f"{HOST}/pair/{number}") for number in range(10)))
    assert len(begun) == 40
    assert max(place for place, one in enumerate(begun) if "pair" in one) <= 2 * 10, "every second post"


async def test_newer_notification_of_a_conversation_replaces_the_queued_one(service: Service) -> None:
    older = post_to(f"{HOST}/a")
    newer = older._replace(message_id=post_to(HOST).message_id)
    read: list[PushPost] = []

    async def keep(post: PushPost) -> Push:
        read.append(post)
        return await prepared_push(post)

    service.queue._read = keep  # noqa: SLF001
    await service.post(older, newer)
    assert read == [newer]
    assert service.queue._drops.counts == {"replaced": 1}  # noqa: SLF001


async def test_one_post_begins_per_turn_of_the_loop(service: Service) -> None:
    at: Counter[int] = Counter()
    turn = 0

    async def read(_: PushPost) -> None:
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


async def test_no_post_begins_while_the_share_of_the_loop_is_used_up(service: Service) -> None:
    used, now = 0.0, 0.0
    service.queue._time = LoopTime(0.1, 0.1, clock=lambda: now, used=lambda: used)  # noqa: SLF001

    async def read(_: PushPost) -> None:
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


async def test_metered_work_keeps_its_result_errors_and_cancellation() -> None:
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
    """A push service that rate-limits one endpoint, over the network."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return msgspec.structs.replace(settings, push_after_seconds=0.0, private_addresses=True)

    async def test_rate_limited_endpoint_does_not_silence_others_at_its_host(self, world: World) -> None:
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
            queue = world.workers[0].app.web_push._posts  # noqa: SLF001
            await until(lambda: not queue._tasks)  # noqa: SLF001
            to_charles = await sent(sender, await world.group(sender, charles), "To Charles")
            assert (await browser.next())[1].message_id == to_charles
            await until(lambda: not queue._tasks)  # noqa: SLF001
            assert queue._pauses._pauses.keys() == {bad.endpoint}  # noqa: SLF001
        finally:
            await browser.stop()


def test_host_remembers_only_the_users_needed_to_judge_it() -> None:
    host = push_hosts.Host(HOST)
    for kept, note in (
        (host.failing, host.note_slow),
        (host.failing, lambda user_id: host.note_failed(user_id, 0.0)),
        (host.answered, host.note_fast),
    ):
        kept.clear()
        for _ in range(1_000):
            note(UserId(uuid7()))
        assert len(kept) == push_hosts.HOST_USERS
