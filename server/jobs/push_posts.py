"""Posts to push services, with a queue per host and user, so that failing or slow ones delay nobody else.

A host starts with one post at a time. A fast response raises that to `PER_HOST`. Failures and slow responses of several
users reduce it to one again. Hosts with one post at a time share half of the slots, so that fast hosts always find a
free slot.

Users choose endpoints, so a response first concerns its endpoint (429 and other refusals) or the user at that host (no
connection, no response, 5xx, slow responses). Only results of several users concern the host. A user whose posts take
long is paused at all hosts that are not known to be fast, including new ones.

Users also have limits across all hosts: on hosts, on queued posts, and on posts in flight. A full table drops entries
of the user with the most. Posts of large conversations fill at most half of the queue, and take turns with others at
each host.

One post begins per turn of the loop. Users take turns, and all posts share a part of the loop's time.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Container
from typing import NamedTuple
from urllib.parse import urlsplit

from protocol.ids import UserId
from server.core.errors import log_failure
from server.core.stopwatch import Stopwatch
from server.core.tally import Tally
from server.fairness.loop_time import LoopTime
from server.jobs.push_drops import Drops
from server.jobs.push_hosts import PER_USER, SLOW_SECONDS, Host
from server.jobs.push_pauses import Pauses
from server.limits.token_bucket import TokenBuckets
from server.queries.push import PushPost

SLOTS = 64
"""Max posts in flight, per worker."""
SLOW_SLOTS = SLOTS // 2
"""Max posts in flight to hosts that are not known to be fast, per worker."""
SLOW_USER_SLOTS = SLOW_SLOTS // 2
"""Of these, max posts of users whose posts to such hosts have taken long, per worker."""
MAX_HOSTS = 500
"""Max hosts that are remembered, per worker."""
MAX_QUEUED = 10_000
"""Max queued posts, per worker. Hosts that are not known to be fast fill at most half of it."""
MAX_QUEUED_SLOW = 8
"""Max queued posts of a slow host, whose last response was slow, or which failed twice in a row."""
ROOM_SECONDS = 0.5
"""Min interval between two searches for a host to drop, after one found none, in seconds. It applies to users with the
same number of hosts.
"""
IN_FLIGHT_OF_USER = 4
"""Max posts in flight, per user."""
MAX_HOSTS_OF_USER = 5
"""Max hosts of queued posts and posts in flight, per user. Browsers use few push services."""
MAX_QUEUED_OF_USER = 100
"""Max queued posts, per user."""
USER_RATE, USER_BURST = 2.0, 40.0
"""Max posts that begin, per user, per second and as a burst. Others wait, and may be replaced by newer ones for the
same place.
"""
LOOP_SHARE, BURST_SECONDS = 0.1, 0.1
"""Max share of the loop's time that posts take, and the burst of it in seconds."""

log = logging.getLogger(__name__)


class Push(NamedTuple):
    """The content of a post, not yet encrypted, and the keys of its endpoint."""

    endpoint: str
    p256dh: str
    auth: str
    topic: str
    payload: bytes


class Failed(Exception):  # noqa: N818 - an answer, not a fault
    """There was no response, or a 5xx. `retry_after` is the requested delay in seconds, or 0."""

    def __init__(self, retry_after: float = 0.0) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Rejected(Failed):
    """The host refused the notification for this endpoint."""


class _User:
    """The number of queued posts and posts in flight of one user, by host."""

    def __init__(self) -> None:
        self.hosts: Counter[str] = Counter()
        self.in_flight = 0
        self.slow = 0
        """Of these, the posts to hosts that were not known to be fast when they began."""


class Posts:
    """The queues of all hosts, and the posts in flight."""

    def __init__(
        self,
        read: Callable[[PushPost], Awaitable[Push | None]],
        send: Callable[[Push, Stopwatch], Awaitable[None]],
        drops: Drops,
    ) -> None:
        """`read` is called when a post begins. It returns None if nothing remains to be sent. `send` raises `Failed` or
        `Rejected` if the post was not accepted. It stops the stopwatch while it does not wait for the host.
        """
        self._read = read
        self._send = send
        self._drops = drops
        self._hosts: OrderedDict[str, Host] = OrderedDict()
        self._pauses = Pauses()
        self._users: TokenBuckets[UserId] = TokenBuckets("notifications", USER_RATE, burst=USER_BURST)
        self._time = LoopTime(LOOP_SHARE, BURST_SECONDS)
        self._next: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._slow = 0
        self._of_slow_users = 0
        self._no_room: dict[tuple[bool, int], float] = {}
        self._queued = 0
        self._crowds = 0
        self._of_user: dict[UserId, _User] = {}
        self._queued_of: Tally[UserId] = Tally()

    def keep(self, user_id: UserId, endpoints: Container[str]) -> None:
        """Drop queued posts to endpoints of a user that are not among `endpoints`, which are all current ones."""
        for name in list(self._hosts_of(user_id)):
            host = self._hosts[name]
            for post in host.posts_of(user_id):
                if post.endpoint not in endpoints:
                    self._remove(host, post)
                    self._drops.add("gone")

    def add(self, post: PushPost, *, is_crowd: bool = False) -> None:
        """Enqueue a post, or count it as dropped. `is_crowd` tells that its conversation is a large one."""
        if (reason := self._put(post, is_crowd=is_crowd)) is not None:
            self._drops.add(reason)

    def _put(self, post: PushPost, *, is_crowd: bool) -> str | None:
        """Enqueue a post. If a post was dropped, return the reason."""
        name = host_of(post.endpoint)
        host = self._hosts.get(name)
        if host is not None and host.replace(post):
            return "replaced"
        if (
            reason := self._beyond_share(host, name, post.user_id) or self._without_room(host, post, is_crowd=is_crowd)
        ) is not None:
            return reason
        if host is None:
            host = self._hosts[name] = Host(name)
        host.put(post, is_crowd=is_crowd)
        self._queued += 1
        self._crowds += is_crowd
        self._queued_of.add(post.user_id, 1)
        self._of_user.setdefault(post.user_id, _User()).hosts[name] += 1
        if self._pauses.of(host, post) is not None:
            self._trim_paused(host, post.user_id)
        return None

    def _beyond_share(self, host: Host | None, name: str, user_id: UserId) -> str | None:
        """Return the reason if a user, or a slow host, has too many posts or hosts for another post."""
        if self._queued_of[user_id] >= MAX_QUEUED_OF_USER:
            return "user_full"
        hosts = self._hosts_of(user_id)
        if name not in hosts and len(hosts) >= MAX_HOSTS_OF_USER:
            return "user_hosts"
        if host is not None and host.is_slow and host.queued >= MAX_QUEUED_SLOW:
            return "host_slow"
        return None

    def _without_room(self, host: Host | None, post: PushPost, *, is_crowd: bool) -> str | None:
        """Make room for a post. If there is none, return the full table as the reason."""
        is_fast = host is not None and host.is_fast
        is_full = self._queued >= (MAX_QUEUED if is_fast else MAX_QUEUED // 2)
        if (is_crowd and self._crowds >= MAX_QUEUED // 2) or (is_full and not self._make_room(post.user_id)):
            return "queue_full"
        if host is None and len(self._hosts) >= MAX_HOSTS and not self._make_room_for_host(post.user_id):
            return "too_many_hosts"
        return None

    def _hosts_of(self, user_id: UserId) -> Counter[str]:
        user = self._of_user.get(user_id)
        return Counter() if user is None else user.hosts

    def start(self) -> None:
        """Begin posts, one per turn of the loop, while there are slots and time for them."""
        if self._next is None:
            self._begin_one()

    async def close(self) -> None:
        """Cancel the posts in flight."""
        tasks = list(self._tasks)
        self._hosts.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _begin_one(self) -> None:
        loop = asyncio.get_running_loop()
        self._next = None
        if (wait := self._time.wait()) > 0:
            self._next = loop.call_later(wait, self._begin_one)
        elif (found := self._time.do(self._find)) is not None:
            self._begin(*found)
            self._next = loop.call_soon(self._begin_one)

    def _find(self) -> tuple[Host, PushPost] | None:
        """Take the next post, of the host that has waited longest."""
        now = time.monotonic()
        for name, host in self._hosts.items():
            if len(self._tasks) >= SLOTS:
                return None
            if not host.queued or host.pause.until > now:
                continue
            if host.in_flight.total() >= host.most:
                continue
            if not host.is_fast and self._slow >= SLOW_SLOTS:
                continue
            post = self._take(host)
            if post is not None:
                self._remove(host, post)
                self._hosts.move_to_end(name)
                return host, post
        return None

    def _take(self, host: Host) -> PushPost | None:
        def may_begin(user_id: UserId) -> bool:
            user = self._of_user[user_id]
            if user.in_flight >= IN_FLIGHT_OF_USER:
                return False
            if host.is_fast:
                return True
            return user.slow < PER_USER and (self._of_slow_users < SLOW_USER_SLOTS or not self._pauses.is_slow(user_id))

        return host.take(
            may_begin, lambda one: self._pauses.of(host, one) is not None, lambda user_id: not self._users.take(user_id)
        )

    def _remove(self, host: Host, post: PushPost) -> None:
        """Remove a post from the queues."""
        self._crowds -= host.remove(post)
        self._queued -= 1
        self._queued_of.add(post.user_id, -1)
        self._leave(host, post.user_id)

    def _leave(self, host: Host, user_id: UserId) -> None:
        """Record that a user has one post less at a host, queued or in flight."""
        hosts = self._of_user[user_id].hosts
        hosts[host.name] -= 1
        if not hosts[host.name]:
            del hosts[host.name]
        if not hosts:
            del self._of_user[user_id]

    def _begin(self, host: Host, post: PushPost) -> None:
        host.in_flight[post.user_id] += 1
        slow = int(not host.is_fast)
        of_slow_user = slow and int(self._pauses.is_slow(post.user_id))
        self._slow += slow
        self._of_slow_users += of_slow_user
        user = self._of_user.setdefault(post.user_id, _User())
        user.hosts[host.name] += 1
        user.in_flight += 1
        user.slow += slow
        task = asyncio.create_task(self._run(host, post))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._slow -= slow
            self._of_slow_users -= of_slow_user
            user.in_flight -= 1
            user.slow -= slow
            self._leave(host, post.user_id)
            host.used_at = time.monotonic()
            host.in_flight[post.user_id] -= 1
            if not host.in_flight[post.user_id]:
                del host.in_flight[post.user_id]
            if not host.queued and not host.in_flight:
                self._no_room.clear()
            self.start()

        task.add_done_callback(ended)

    async def _run(self, host: Host, post: PushPost) -> None:
        # Created inside the task, which may be cancelled before it begins.
        await self._time.run(self._deliver(host, post))

    async def _deliver(self, host: Host, post: PushPost) -> None:
        try:
            push = await self._read(post)
        except Exception as error:  # noqa: BLE001 - other posts continue
            self._failed_by_defect(error)
            return
        if push is None:
            return
        stopwatch = Stopwatch()
        try:
            await self._send(push, stopwatch)
        except Rejected as rejected:
            self._drops.add("refused")
            self._pauses.begin(post.endpoint, rejected.retry_after)
            self._trim_paused(host, post.user_id)
            self._note_duration(host, post.user_id, stopwatch.seconds)
        except Exception as error:  # noqa: BLE001 - other posts continue
            # A defect that a host's response triggers counts as a failure. Otherwise the post would be retried for
            # ever.
            if isinstance(error, Failed):
                self._drops.add("host_failed")
                retry_after = error.retry_after
            else:
                self._failed_by_defect(error)
                retry_after = 0.0
            self._pauses.begin((post.user_id, host.name), retry_after)
            self._trim_paused(host, post.user_id)
            host.note_failed(post.user_id, retry_after)
            self._trim(host)
            self._note_duration(host, post.user_id, stopwatch.seconds)
        else:
            if stopwatch.seconds < SLOW_SECONDS:
                self._pauses.end(post.endpoint)
                self._pauses.end((post.user_id, host.name))
                host.note_fast(post.user_id)
            else:
                self._pauses.begin((post.user_id, host.name), 0.0)
                self._trim_paused(host, post.user_id)
                host.note_slow(post.user_id)
                self._trim(host)
                self._note_duration(host, post.user_id, stopwatch.seconds)

    def _failed_by_defect(self, error: Exception) -> None:
        if self._drops.add("error"):
            log_failure(log, "pushing a notification", error)

    def _note_duration(self, host: Host, user_id: UserId, seconds: float) -> None:
        """Pause a user at all hosts that are not known to be fast, if a post to one of them took long."""
        if seconds < SLOW_SECONDS:
            return
        host.note_long()
        if host.is_fast:
            return
        if not self._pauses.is_slow(user_id):
            self._pauses.end(user_id)
        self._pauses.begin(user_id, 0.0)

    def _trim_paused(self, host: Host, user_id: UserId) -> None:
        """Keep the newest post of a user for each pause. Its badge includes the others."""
        kept = set()
        for post in reversed(host.posts_of(user_id)):
            pause = self._pauses.of(host, post)
            if pause is not None and pause in kept:
                self._remove(host, post)
                self._drops.add("paused")
            kept.add(pause)

    def _trim(self, host: Host) -> None:
        """Drop posts beyond the limit of a slow host."""
        over = max(0, host.queued - MAX_QUEUED_SLOW) if host.is_slow else 0
        for _ in range(over):
            self._remove(host, host.oldest())
        if over:
            self._drops.add("host_slow", over)

    def _forget_one(self) -> bool:
        """Drop the host that has been idle longest. Among paused hosts, drop the one whose pause ends first.

        Return False if none is idle. Paused hosts are dropped last, because their pauses are lost with them. Hosts that
        responded fast to several users lately stay. Otherwise others would take their places while they are idle.
        """
        now = time.monotonic()
        hosts = self._hosts.items()
        idle = (name for name, host in hosts if not host.queued and not host.in_flight and not host.stays(now))
        # `min` returns the first of equal ones, which has been idle longest.
        name = min(idle, key=lambda name: max(self._hosts[name].pause.until, now), default=None)
        if name is None:
            return False
        del self._hosts[name]
        return True

    def _make_room_for_host(self, user_id: UserId) -> bool:
        """Drop a host. Return False if there is none to drop for this user. The result is cached, because the search
        visits all hosts.
        """
        now = time.monotonic()
        kind = (self._pauses.is_slow(user_id), len(self._hosts_of(user_id)))
        if now - self._no_room.get(kind, -ROOM_SECONDS) < ROOM_SECONDS:
            return False
        if self._forget_one() or self._evict_for(*kind):
            return True
        self._no_room[kind] = now
        return False

    def _evict_for(self, is_slow: bool, number: int) -> bool:  # noqa: FBT001 - a kind of users
        """Drop the queue of one host, for a user with `number` hosts. It is a host of users whose posts take long, or
        else one whose users have more hosts. Return False if there is none. Hosts that are fast, in use or have many
        users stay.
        """

        def worth(host: Host) -> tuple[bool, int]:
            if host.is_fast or host.in_flight or host.has_many_users:
                return False, 0
            users = host.users()
            return all(map(self._pauses.is_slow, users)), min(len(self._hosts_of(user_id)) for user_id in users)

        host = max(self._hosts.values(), key=worth)
        of_slow, at_hosts = worth(host)
        if not (of_slow and not is_slow) and at_hosts <= number + 1:
            return False
        for user_id in host.users():
            for post in host.posts_of(user_id):
                self._remove(host, post)
                self._drops.add("too_many_hosts")
        del self._hosts[host.name]
        return True

    def _make_room(self, user_id: UserId) -> bool:
        """Drop a post of the user with the most queued posts. Return False if that is this user."""
        most = self._queued_of.most()
        if self._queued_of[most] <= self._queued_of[user_id] + 1:
            return False
        host, post = next(
            (host, post)
            for name in self._hosts_of(most)
            for host in [self._hosts[name]]
            for post in host.posts_of(most)
        )
        self._remove(host, post)
        self._drops.add("queue_full")
        return True


def host_of(endpoint: str) -> str:
    """Return the scheme, host and port of an endpoint."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc}"
