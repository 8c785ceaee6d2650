"""The feed, and the notifications that are pushed to a browser that is not open."""

import asyncio
import base64
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, time, timedelta
from time import monotonic
from typing import Any

import msgspec
import pytest
from py_vapid import Vapid02

from protocol import client, server
from protocol.errors import ErrorCode, Refused
from protocol.ids import MessageId, uuid7
from protocol.limits import MAX_PINS, MAX_PUSH_ENDPOINTS, MAX_SCHEDULED
from prove.writes import PUSH_POINT
from server.app import app
from server.core.config import Settings
from server.core.stopwatch import Stopwatch
from server.jobs import push, push_due, push_hosts, push_posts, safe_http
from server.jobs.push import seconds_of
from server.jobs.push_drops import Drops
from server.jobs.push_posts import Failed, Posts, Push
from server.queries.push import PushPost
from tests.browser import Browser, post_to, prepared_push, text
from tests.conftest import Servers
from tests.world import Room, UserSession, World, refused, sent, until


async def feed(one: Any, *kinds: str) -> list[tuple[str, Any]]:
    page = await one.call(client.ListFeed(kinds=list(kinds) or None), server.FeedPage)  # type: ignore[arg-type]
    return [(entry.kind, entry.message.content if entry.message else entry.user_id) for entry in page.entries]


async def test_feed_contains_only_items_that_concern_the_user(room: Room, world: World) -> None:
    mary = await world.user("Mary")
    hers = await world.connect(mary)
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[mary.id]))
    mine = await sent(room.charles, room.group, "Mine")
    await sent(room.ada, room.group, "Nothing to do with him")
    await sent(room.ada, room.group, "Look, @charles")
    await sent(room.ada, room.group, "Listen, @everyone")
    await sent(room.ada, room.group, "Come, @moderator")
    await sent(room.ada, room.group, "A reply", parent_message_id=mine)
    await hers.call(client.React(**room.at(mine), emoji="👍"))
    await hers.call(client.RequestFriend(user_id=room.users[1].id))
    other = await world.group(hers, await world.user("Grace"))
    await hers.call(client.Invite(conversation_id=other, participants=[room.users[1].id]))
    assert await feed(room.charles) == [
        ("invitation", mary.id), ("friend_request", mary.id), ("reaction", "Mine"), ("reply", "A reply"),
        ("mention", "Listen, @everyone"), ("mention", "Look, @charles"),
    ]  # fmt: skip
    await room.ada.call(client.SetRole(conversation_id=room.group, user_id=room.users[1].id, role="moderator"))
    assert [said for _, said in await feed(room.charles, "mention")] == [
        "Come, @moderator", "Listen, @everyone", "Look, @charles",
    ]  # fmt: skip
    assert ("reaction", "Mine") not in await feed(hers)
    await room.charles.call(client.Mute(user_id=mary.id))
    assert {kind for kind, _ in await feed(room.charles)} == {"mention", "reply"}
    await room.charles.call(client.Leave(conversation_id=room.group))
    assert await feed(room.charles) == []


async def test_feed_omits_items_that_were_undone(room: Room, world: World) -> None:
    mine = await sent(room.charles, room.group, "Mine")
    said = await sent(room.ada, room.group, "Look, @charles")
    reply = await sent(room.ada, room.group, "A reply", parent_message_id=mine)
    hidden = await sent(room.ada, room.group, "Hidden, @charles")
    await room.ada.call(client.React(**room.at(mine), emoji="👍"))
    assert len(await feed(room.charles)) == 4
    await room.ada.call(client.Edit(**room.at(said), content="Never mind"))
    await room.ada.call(client.Delete(**room.at(reply)))
    await room.ada.call(client.Unreact(**room.at(mine), emoji="👍"))
    await world.moderate_as_owner(client.Moderate(**room.at(hidden), reason="Rude"))
    assert await feed(room.charles) == []


async def test_feed_has_pages_and_marks_new_items(room: Room, world: World) -> None:
    for number in range(5):
        await sent(room.ada, room.group, f"{number} @charles")
    first = await room.charles.call(client.ListFeed(limit=2), server.FeedPage)
    await sent(room.ada, room.group, "5 @charles")
    rest = await room.charles.call(client.ListFeed(limit=3, after=first.after), server.FeedPage)
    contents = [entry.message.content[0] for entry in (*first.entries, *rest.entries) if entry.message]
    assert (contents, rest.after, first.unread_count) == (["4", "3", "2", "1", "0"], None, 5)
    phone = await world.connect(room.users[1])
    await room.charles.call(client.SeeFeed())
    assert (await phone.event(server.MeChanged)).me.feed_seen_at is not None
    await sent(room.ada, room.group, "6 @charles")
    badge = await phone.call(client.GetBadge(), server.Badge)
    assert (badge.feed, badge.messages) == (1, 7)
    await phone.call(client.SeeFeed(up_to=datetime.now(UTC) - timedelta(days=1)))
    assert (await phone.call(client.GetBadge(), server.Badge)).feed == 1, "the position only moves forward"


# -------------------------------------------------------------------------------------------------------- push


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, push_after_seconds=0.0, private_addresses=True)


@pytest.fixture
async def browser(room: Room) -> AsyncIterator[Browser]:
    browser = Browser()
    await browser.start()
    await room.charles.call(browser.subscription())
    yield browser
    await browser.stop()


async def test_unread_message_is_pushed_encrypted_and_signed(room: Room, browser: Browser) -> None:
    key = (await room.charles.call(client.GetPushKey(), server.PushKey)).key
    await sent(room.ada, room.group, "An older one")
    message_id = await sent(room.ada, room.group, "Are you there, @charles?")
    headers, said = await browser.next()
    while said.message_id != message_id:
        headers, said = await browser.next()
    assert (said.title, said.sender, said.body) == ("Lovelace's circle", "Ada", "Are you there, @charles?")
    assert (said.is_mention, said.badge) == (True, 2)
    assert (headers["content-encoding"], headers["ttl"], headers["topic"]) == (
        "aes128gcm", "86400", text(room.group.bytes),
    )  # fmt: skip
    scheme, _, parts = headers["authorization"].partition(" ")
    given = dict(part.split("=", 1) for part in parts.split(","))
    assert (scheme, given["k"]) == ("vapid", key)
    assert Vapid02.verify(headers["authorization"])
    claims = msgspec.json.decode(base64.urlsafe_b64decode(given["t"].split(".")[1] + "=="))
    assert claims["aud"] == browser.url.rsplit("/push", 1)[0]


async def nothing_was_pushed(room: Room, browser: Browser) -> bool:
    """Send a message that is always pushed, and return whether it is pushed before any other."""
    last = await sent(room.ada, room.group, "The end, @charles")
    while True:
        _, said = await browser.next()
        if said.message_id == last:
            return True
        if not said.body.startswith("The end"):
            return False


async def test_message_that_was_read_meanwhile_is_not_pushed(room: Room, world: World, browser: Browser) -> None:
    for worker in world.workers:
        worker.app.web_push._after_seconds = 1.5  # noqa: SLF001 - long enough to read it
    message_id = await sent(room.ada, room.group, "Read at once")
    await room.charles.call(client.Read(**room.at(message_id)))
    for worker in world.workers:
        worker.app.web_push._after_seconds = 0.0  # noqa: SLF001 - as before
    assert await nothing_was_pushed(room, browser)


async def test_preferences_suppress_notifications(room: Room, world: World, browser: Browser) -> None:
    mary = await world.user("Mary")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[mary.id]))
    hers = await world.connect(mary)
    root = await sent(hers, room.group, "Root @charles")
    await browser.next()
    await room.charles.call(client.SetPreferences(conversation_id=room.group, notification_level="mentions"))
    await sent(hers, room.group, "No mention")
    await sent(hers, room.group, "A reply in a thread that he does not follow", parent_message_id=root)
    await room.charles.call(client.Mute(user_id=mary.id))
    await sent(hers, room.group, "Muted @charles")
    await room.charles.call(client.Unmute(user_id=mary.id))
    await room.charles.call(client.Follow(user_id=mary.id))
    await room.charles.call(client.SetSwitches(user_id=mary.id, notifications_enabled=False))
    await sent(hers, room.group, "Switched off @charles")
    await sent(room.charles, room.group, "His own @charles")
    hidden = await sent(hers, room.group, "Hidden")
    await room.ada.call(client.Delete(**room.at(hidden)))
    assert await nothing_was_pushed(room, browser)
    for change in (
        client.SetPreferences(conversation_id=room.group, notification_level="none"),
        client.SetPreferences(conversation_id=room.group, notification_level="all", is_muted=True),
    ):
        await room.charles.call(change)
        await sent(room.ada, room.group, "Silence, @charles")
    await asyncio.gather(*(worker.app.web_push.push_due() for worker in world.workers))
    await room.charles.call(client.SetPreferences(conversation_id=room.group, is_muted=False))
    assert await nothing_was_pushed(room, browser)


@pytest.mark.parametrize(("start", "end", "is_quiet"), [(-1, 1, True), (1, -1, False), (1, 2, False)])
async def test_quiet_hours_are_in_the_users_time_zone(
    room: Room, world: World, browser: Browser, start: int, end: int, *, is_quiet: bool
) -> None:
    zone = "Asia/Kolkata"  # half an hour from the full hour, and without summer time
    there = datetime.now(UTC) + timedelta(hours=5, minutes=30)
    hours = [(there + timedelta(hours=one)).time().replace(second=0, microsecond=0) for one in (start, end)]
    await room.charles.call(client.UpdateProfile(quiet_from=hours[0], quiet_until=hours[1], time_zone=zone))
    message_id = await sent(room.ada, room.group, "At night?")
    await asyncio.gather(*(worker.app.web_push.push_due() for worker in world.workers))
    await room.charles.call(client.UpdateProfile(quiet_from=None, quiet_until=None))
    if is_quiet:
        assert await nothing_was_pushed(room, browser)
    else:
        assert (await browser.next())[1].message_id == message_id
    assert isinstance(hours[0], time)


async def test_quiet_hours_in_an_unknown_zone_use_utc(
    room: Room, world: World, browser: Browser, servers: Servers
) -> None:
    hours = [(datetime.now(UTC) + timedelta(hours=one)).time().replace(microsecond=0) for one in (-1, 1)]
    await room.charles.call(client.UpdateProfile(quiet_from=hours[0], quiet_until=hours[1]))
    await world.db.execute("""UPDATE "user" SET time_zone = 'Mars/Olympus' WHERE id = $1""", room.users[1].id)
    await sent(room.ada, room.group, "At night?")
    await asyncio.gather(*(worker.app.web_push.push_due() for worker in world.workers))
    await room.charles.call(client.UpdateProfile(quiet_from=None, quiet_until=None))
    assert await nothing_was_pushed(room, browser)
    assert "Olympus" not in servers.postgres.log.path.read_text()


async def test_endpoint_is_deleted_with_its_session_or_when_its_service_says_so(
    room: Room, world: World, browser: Browser
) -> None:
    browser.status = 410
    await sent(room.ada, room.group, "Gone")
    await browser.next()
    async with asyncio.timeout(10):
        while await world.db.fetchval("SELECT count(*) FROM push_endpoint"):
            await asyncio.sleep(0.01)
    browser.status = 201
    await room.charles.call(browser.subscription())
    await room.charles.call(browser.subscription())
    assert await world.db.fetchval("SELECT count(*) FROM push_endpoint") == 1
    await room.charles.call(client.UnregisterPush(endpoint=browser.url))
    assert await world.db.fetchval("SELECT count(*) FROM push_endpoint") == 0
    await room.charles.call(browser.subscription())
    await world.db.execute("DELETE FROM session WHERE user_id = $1", room.users[1].id)
    assert await world.db.fetchval("SELECT count(*) FROM push_endpoint") == 0


async def test_newest_endpoints_of_each_user_are_kept(room: Room, world: World) -> None:
    browser = Browser()
    for number in range(25):
        browser.url = f"https://push.example.org/{number}"
        await room.charles.call(browser.subscription())
    kept = {row[0].rsplit("/", 1)[1] for row in await world.db.fetch("SELECT endpoint FROM push_endpoint")}
    assert kept == {str(number) for number in range(5, 25)}
    nobody: UserSession = room.users[0]
    await room.ada.call(client.UnregisterPush(endpoint=browser.url))
    assert await world.db.fetchval("SELECT count(*) FROM push_endpoint") == 20, "only the user's own endpoint"
    with refused(ErrorCode.NOT_FOUND, "message_id"):
        await room.ada.call(client.Star(**room.at(MessageId(nobody.id))))


async def test_only_new_endpoints_of_a_user_are_rate_limited(room: Room) -> None:
    browser = Browser()

    async def register(number: int) -> None:
        browser.url = f"https://push{number}.example/"
        await room.charles.call(browser.subscription())

    for number in range(int(app.ENDPOINT_BURST)):
        await register(number)
    with refused(ErrorCode.RATE_LIMITED, "endpoint"):
        await register(-1)
    await register(int(app.ENDPOINT_BURST) - 1)
    await room.ada.call(browser.subscription())


async def test_participants_on_every_page_get_the_latest_message_that_concerns_them(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages have two users with an endpoint.

    The first pages of all conversations are read before the next ones, one at a time.
    """
    monkeypatch.setattr(push, "FIRST_PAGE", 2)
    monkeypatch.setattr(push, "NEXT_PAGE", 2)
    monkeypatch.setattr(push_due, "PAUSE_PER_CANDIDATE", 0.0)
    for worker in world.workers:
        worker.app.web_push._after_seconds = 60.0  # noqa: SLF001
    people = await world.users(*(f"P{number}" for number in range(6)))
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[one.id for one in people]))
    browsers = [Browser() for _ in people]
    devices = [await world.connect(one) for one in people]
    for browser, device in zip(browsers, devices, strict=True):
        await browser.start()
        await device.call(browser.subscription())
    await devices[0].call(client.SetPreferences(conversation_id=room.group, notification_level="mentions"))
    await devices[1].call(client.Mute(user_id=room.users[1].id))
    await devices[2].call(client.SetPreferences(conversation_id=room.group, notification_level="none"))
    mention = await sent(room.ada, room.group, "@p0")
    plain = await sent(room.ada, room.group, "Older")
    last = await sent(room.charles, room.group, "Last")
    one = world.workers[0].app.web_push
    one._due = push_due.DueMessages(one._drops)  # noqa: SLF001 - messages that wait already are not added again
    one._due._clock = lambda: -60.0  # noqa: SLF001 - all messages added now are due
    for message_id, sender in ((mention, room.users[0]), (plain, room.users[0]), (last, room.users[1])):
        one._due.add(room.group, sender.id, message_id, seconds=0.0)  # noqa: SLF001
    one._due._clock = monotonic  # noqa: SLF001
    try:
        await one.push_due()
        await until(lambda: not one._posts._tasks and not one._posts._queued)  # noqa: SLF001
        got = [[(await one.next())[1].message_id for _ in range(one.received.qsize())] for one in browsers]
    finally:
        await asyncio.gather(*(browser.stop() for browser in browsers))
    assert got == [[mention], [plain], [], [last], [last], [last]]


async def test_notifications_are_pushed_after_a_retry_of_a_page_that_timed_out(
    room: Room, world: World, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.queries.push.DUE_SECONDS", 0.1)
    queues = [worker.app.web_push._due for worker in world.workers]  # noqa: SLF001
    for worker in world.workers:
        worker.app.web_push._after_seconds = 1.5  # noqa: SLF001 - until the table is locked
    message_id = await sent(room.ada, room.group, "Later")
    async with world.db.transaction():
        await world.db.execute("LOCK TABLE thread_follow IN ACCESS EXCLUSIVE MODE")
        await until(lambda: any(queue.wait() is not None for queue in queues))
    assert (await browser.next())[1].message_id == message_id


def longer(key: str, *, by: int) -> str:
    data = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
    return text((data + bytes(8))[: len(data) + by])


async def test_keys_that_cannot_be_used_for_encryption_are_refused(
    room: Room, world: World, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    good = browser.subscription()
    off_curve = text(b"\x04" + bytes(63) + b"\x01")
    for bad in ("x" * 80, "x" * 81, "B" * 87, off_curve, longer(good.p256dh, by=-1), longer(good.p256dh, by=1)):
        with refused(ErrorCode.INVALID, "p256dh"):
            await room.charles.call(msgspec.structs.replace(good, p256dh=bad))
    for bad in (longer(good.auth, by=-1), longer(good.auth, by=1), "A" * 17):
        with refused(ErrorCode.INVALID, "auth"):
            await room.charles.call(msgspec.structs.replace(good, auth=bad))
    await room.charles.call(msgspec.structs.replace(good, p256dh=good.p256dh + "=", auth=good.auth + "=="))
    # Endpoints stored before this rule are deleted, with one log entry.
    await world.db.execute("UPDATE push_endpoint SET p256dh = $1", "x" * 80)
    await asyncio.gather(*(sent(room.ada, room.group) for _ in range(3)))
    async with asyncio.timeout(10):
        while await world.db.fetchval("SELECT count(*) FROM push_endpoint"):
            await asyncio.sleep(0.01)
    lines = [one for one in caplog.messages if "unusable endpoint" in one]
    assert [(str(room.users[1].id) in one, "127.0.0.1" in one, browser.url in one) for one in lines] == [
        (True, True, False)
    ]


class SilentServices:
    """Push services that accept connections and never answer, each on its own port."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.open: Counter[int] = Counter()
        self._servers: list[asyncio.Server] = []

    async def add(self, endpoints: int = 1) -> None:
        number = len(self._servers)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.open[number] += 1
            with contextlib.suppress(ConnectionError):
                while await reader.read(65_536):
                    pass
            self.open[number] -= 1
            writer.close()

        self._servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        port = self._servers[-1].sockets[0].getsockname()[1]
        self.urls += [f"http://127.0.0.1:{port}/{one}" for one in range(endpoints)]

    def stop(self) -> None:
        for one in self._servers:
            one.close()


async def test_silent_endpoints_delay_no_other_users(
    room: Room, world: World, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 60.0)
    silent = SilentServices()
    for _ in range(16):
        await silent.add(endpoints=3)
    silenced = await world.users("Mary", "Grace", "Alan", "Kurt")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[one.id for one in silenced]))
    for number, who in enumerate(silenced):
        theirs = await world.connect(who)
        for browser_of_theirs in silent.urls[12 * number : 12 * (number + 1)]:
            subscription = browser.subscription()
            subscription.endpoint = browser_of_theirs
            await theirs.call(subscription)
    try:
        first = await sent(room.ada, room.group, "One")
        assert (await browser.next())[1].message_id == first
        await until(lambda: silent.open.total() == len(silenced) * push_hosts.PER_USER)
        second = await sent(room.ada, room.group, "Two")
        assert (await browser.next())[1].message_id == second
        assert silent.open.total() == len(silenced) * push_hosts.PER_USER, "each user has two slots for any endpoints"
        assert max(silent.open.values()) == 1, "and each host one"
    finally:
        await asyncio.gather(*(worker.app.web_push.close() for worker in world.workers))
        silent.stop()


def post(number: int = 0, host: str = "slow.example") -> PushPost:
    return post_to(f"https://{host}/{number}")


class HeldPosts:
    """A fake of the push services, in which each post waits until it is released."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = asyncio.Event()
        self.retry_after: float | None = None

    async def send(self, post: Push, _: Stopwatch) -> None:
        self.begun.append(post.endpoint)
        await self.gate.wait()
        if self.retry_after is not None:
            raise Failed(self.retry_after)


@pytest.fixture
async def held() -> HeldPosts:
    return HeldPosts()


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def idle(queue: Posts) -> None:
    """Wait until no post is in flight and none can begin."""
    while queue._tasks or queue._next is not None:  # noqa: SLF001
        await asyncio.sleep(0)


async def test_silent_host_takes_one_slot(held: HeldPosts) -> None:
    queue = Posts(prepared_push, held.send, Drops())
    for number in range(20):
        queue.add(post(number))
    for number in range(push_posts.SLOTS):
        queue.add(post(host=f"{number}.example"))
    queue.start()
    await turns(push_posts.SLOTS)
    assert len(held.begun) == push_posts.SLOW_SLOTS
    assert sum("slow.example" in one for one in held.begun) == 1
    held.gate.set()
    await idle(queue)
    assert len(held.begun) == 20 + push_posts.SLOTS
    held.begun.clear()
    held.gate.clear()
    for number in range(20):
        queue.add(post(number))
    queue.start()
    await turns(push_posts.SLOTS)
    assert len(held.begun) == push_hosts.PER_HOST, "the host answered fast"
    await queue.close()


@pytest.mark.parametrize(("retry_after", "waits"), [
    (0.0, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]), (90.0, [90, 90]), (1e9, [300, 300]),
])  # fmt: skip
async def test_failing_host_is_paused_for_longer_each_time(
    held: HeldPosts, monkeypatch: pytest.MonkeyPatch, retry_after: float, waits: list[int]
) -> None:
    monkeypatch.setattr(push_hosts, "HOST_USERS", 1)
    clock = 1_000.0
    monkeypatch.setattr(push_posts.time, "monotonic", lambda: clock)  # type: ignore[attr-defined]
    held.retry_after = retry_after
    held.gate.set()
    queue = Posts(prepared_push, held.send, Drops())
    for wait in waits:
        queue.add(post())
        queue.start()
        await idle(queue)
        begun = len(held.begun)
        queue.add(post())
        clock += wait - 0.5
        queue.start()
        assert (len(held.begun), len(queue._tasks)) == (begun, 0)  # noqa: SLF001
        host = queue._hosts["https://slow.example"]  # noqa: SLF001
        queue._remove(host, host.oldest())  # noqa: SLF001
        clock += 0.5
    held.retry_after = None
    queue.add(post())
    queue.start()
    await idle(queue)
    assert queue._hosts["https://slow.example"].pause.failures == 0  # noqa: SLF001


@pytest.mark.parametrize(("header", "least", "most"), [
    ("120", 120, 120), ("", 0, 0), ("soon", 0, 0), ("-1", 0, 0), ("9" * 5_000, 3_600, 1e9), ("\u00b2", 0, 0),
    ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0), ("Fri, 31 Dec 2100 23:59:59 GMT", 3_600, 1e10),
    ("Fri, 31 Dec 99999 23:59:59 GMT", 0, 0),
])  # fmt: skip
def test_retry_after_is_read_in_both_forms(header: str, least: float, most: float) -> None:
    assert least <= seconds_of(header) <= most


async def test_dropped_notifications_are_counted_and_logged_once_per_period(
    held: HeldPosts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(push_hosts, "HOST_USERS", 1)
    monkeypatch.setattr(push_posts, "MAX_QUEUED", 40)
    held.retry_after = 0.0
    drops = Drops()
    queue = Posts(prepared_push, held.send, drops)
    for number in range(30):
        queue.add(post(number))
    assert drops.counts == {"queue_full": 10}, "hosts that are not known to be fast fill half of the queue"
    held.gate.set()
    for _ in range(2):
        host = queue._hosts["https://slow.example"]  # noqa: SLF001
        host.pause = host.pause._replace(until=0.0)
        queue.start()
        await idle(queue)
    assert drops.counts == {"queue_full": 10, "host_failed": 2, "host_slow": 18 - push_posts.MAX_QUEUED_SLOW}
    assert len(caplog.messages) == 3


async def test_full_queue_of_messages_counts_dropped_ones(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_due, "MAX_OF_SENDER", 2)
    for worker in world.workers:
        worker.app.web_push._after_seconds = 60.0  # noqa: SLF001 - nothing leaves the queue
    for _ in range(5):
        await sent(room.ada, room.group)
    page = world.workers[0].app.metrics.page().decode()
    assert 3.0 in map(float, re.findall(r'push_dropped_total{.*reason="messages_full".*} (.*)', page)), page


async def test_numbers_of_hosts_and_signatures_are_bounded(
    held: HeldPosts, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_posts, "MAX_HOSTS", 3)
    monkeypatch.setattr(push, "MAX_SIGNED", 3)
    drops = Drops()
    queue = Posts(prepared_push, held.send, drops)
    for number in range(4):
        queue.add(post(host=f"{number}.example"))
    assert drops.counts == {"too_many_hosts": 1}, "all hosts have queued posts"
    held.gate.set()
    queue.start()
    await idle(queue)
    queue.add(post(host="4.example"))
    assert list(queue._hosts) == [f"https://{number}.example" for number in (1, 2, 4)]  # noqa: SLF001
    one = world.workers[0].app.web_push
    first = one._authorization("https://0.example/a")  # noqa: SLF001
    for number in range(6):
        one._authorization(f"https://{number}.example/a")  # noqa: SLF001
        assert one._authorization("https://0.example/b") == first, "a host in constant use is kept"  # noqa: SLF001
    assert len(one._signed) == 3  # noqa: SLF001


async def test_hosts_in_back_off_are_discarded_last(held: HeldPosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_hosts, "HOST_USERS", 1)
    monkeypatch.setattr(push_hosts, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(push_posts, "MAX_HOSTS", 3)
    held.gate.set()
    drops = Drops()
    queue = Posts(prepared_push, held.send, drops)
    for name, retry_after in (("longer", 200.0), ("shorter", 100.0), ("idle", None)):
        held.retry_after = retry_after
        queue.add(post(host=name))
        queue.start()
        await idle(queue)

    def known_after(new: str) -> list[str]:
        queue.add(post(host=new))
        return [name.removeprefix("https://") for name in queue._hosts]  # noqa: SLF001

    assert known_after("new") == ["longer", "shorter", "new"], "an idle host is discarded before one in back-off"
    assert known_after("newer") == ["longer", "new", "newer"], "the back-off that ends first is discarded"
    assert known_after("newest") == ["new", "newer", "newest"], "hosts in back-off never block a new host"
    assert drops.counts == {"host_failed": 2}
    assert known_after("one more") == ["new", "newer", "newest"], "hosts with queued posts are never discarded"
    assert drops.counts == {"host_failed": 2, "too_many_hosts": 1}


async def test_bounds_hold_for_concurrent_frames_on_two_workers(room: Room, world: World) -> None:
    """All but two of the allowed items exist already."""
    await asyncio.gather(*(sent(room.ada, room.group) for _ in range(MAX_PINS - 2)))
    await world.db.execute("UPDATE message SET is_pinned = true")
    ids = [await sent(room.ada, room.group) for _ in range(8)]
    elsewhere = await world.connect(room.users[0], worker=1)
    both = (room.ada, elsewhere)
    here: dict[str, Any] = {"conversation_id": room.group}
    later = datetime.now(UTC) + timedelta(hours=1)
    for _ in range(MAX_SCHEDULED - 2):
        await room.ada.call(client.Schedule(**here, message_id=MessageId(uuid7()), content="Later", send_at=later))
    answers = await asyncio.gather(
        *(both[number % 2].call(client.Pin(**room.at(one))) for number, one in enumerate(ids)),
        *(
            both[number % 2].call(
                client.Schedule(**here, message_id=MessageId(uuid7()), content="Later", send_at=later)
            )
            for number in range(8)
        ),
        *(
            both[number % 2].call(
                client.RegisterPush(endpoint=f"https://push.example/{number}", p256dh=PUSH_POINT, auth="A" * 22)
            )
            for number in range(25)
        ),
        return_exceptions=True,
    )
    refusals = Counter(
        one.code if isinstance(one, Refused) else type(one) for one in answers if isinstance(one, Exception)
    )
    assert refusals == {ErrorCode.CONFLICT: 12}
    counted = await world.db.fetchrow(
        """SELECT (SELECT count(*) FROM message WHERE is_pinned), (SELECT count(*) FROM push_endpoint),
        (SELECT count(*) FROM scheduled_message WHERE status = 'waiting')"""
    )
    assert tuple(counted or ()) == (MAX_PINS, MAX_PUSH_ENDPOINTS, MAX_SCHEDULED)
