"""Posts to push services, queued per host and user: who fails or is slow delays nobody else.

A host starts with one post at a time. A fast answer raises that to `PER_HOST`; failures and slow answers of several
users lower it to one again. Hosts at one post share half of the slots, so that fast hosts always find a free slot.

Users name endpoints, so an answer tells first about its endpoint (429 and other refusals) or about that user at that
host (no connection, no answer, 5xx, slow answers). Only what happens to several users tells about the host.

One post begins in a turn of the loop, users take turns, and all of them take a share of the loop's time.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from protocol.ids import ConversationId, UserId
from server.errors import log_failure
from server.limits import Allowance
from server.looptime import LoopTime
from server.queries.push import Post

SLOTS = 64
"""Max posts in flight, per worker."""
SLOW_SLOTS = SLOTS // 2
"""Max posts in flight to hosts that are not known to be fast, per worker."""
PER_HOST = 8
"""Max posts in flight to a fast host."""
MAX_HOSTS = 500
"""Max hosts remembered, per worker."""
MAX_QUEUED = 10_000
"""Max posts queued, per worker; hosts that are not known to be fast fill half of it."""
MAX_QUEUED_SLOW = 8
"""Max posts queued for a slow host: its last answer was slow, or it failed twice in a row."""
SLOW_SECONDS = 2.0
"""An answer that takes longer makes a host slow."""
HOST_USERS = 3
"""Users whose posts must fail or be slow, with no fast answer in between, before the host is paused or slow for all."""
PER_USER = 2
"""Max posts in flight of one user to one host."""
MAX_QUEUED_OF_USER = 100
"""Max posts queued of one user to one host."""
USER_RATE, USER_BURST = 2.0, 40.0
"""Posts of one user that begin per second, and at once. Others wait; a newer one for the same place replaces them."""
SHARE, BURST_SECONDS = 0.1, 0.1
"""Share of the loop's time that posts take, and seconds of it that they may take at once."""
MAX_PAUSES = 10_000
"""Max pauses of endpoints, and of users at a host, that are remembered, per worker."""
MAX_BACKOFF = 300.0
"""Max wait after consecutive failures, in seconds, and max wait that a host may ask for in the name of all users."""
MAX_RETRY_AFTER = 3_600.0
"""Max wait that a host may ask for in the name of one endpoint or user, in seconds."""
STRETCH_SECONDS = 60.0
"""Drops for the same reason are logged again after this long without one."""

log = logging.getLogger(__name__)


class Push(NamedTuple):
    """What a post says, not yet encrypted, and the keys of its endpoint."""

    endpoint: str
    p256dh: str
    auth: str
    topic: str
    payload: bytes


class Failed(Exception):  # noqa: N818 - an answer, not a fault
    """There was no answer, or 5xx; `retry_after` is the wait in seconds that was asked for, or 0."""

    def __init__(self, retry_after: float = 0.0) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Rejected(Failed):
    """The host answered that it takes nothing for this endpoint now."""


class _Pause(NamedTuple):
    """How many times in a row something failed, and until when it is left alone."""

    failures: int = 0
    until: float = 0.0

    def after_failure(self, retry_after: float, most: float) -> "_Pause":
        """Return the pause after a failure: longer each time, and as long as was asked for, up to `most` seconds."""
        now = time.monotonic()
        failures = self.failures + (self.until <= now)  # else this post was in flight when another one failed
        wait = max(min(2.0 ** min(failures - 1, 30), MAX_BACKOFF), min(retry_after, most))
        return _Pause(failures, max(self.until, now + wait))


class _Host:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: OrderedDict[UserId, OrderedDict[tuple[str, ConversationId], Post]] = OrderedDict()
        self.queued = 0
        self.in_flight: Counter[UserId] = Counter()
        self.is_fast = False  # a new host is neither fast nor slow
        self.is_slow = False
        self.failing: set[UserId] = set()
        self.pause = _Pause()

    def put(self, post: Post) -> bool:
        """Enqueue a post, in the place of an older one of the same conversation. Return whether there was one."""
        posts = self.queue.setdefault(post.user_id, OrderedDict())
        before = len(posts)
        posts[post.endpoint, post.conversation_id] = post
        self.queued += len(posts) - before
        return len(posts) == before

    def holds(self, post: Post) -> bool:
        return (post.endpoint, post.conversation_id) in self.queue.get(post.user_id, ())

    def take(self, is_paused: Callable[[Post], bool], has_token: Callable[[UserId], bool]) -> Post | None:
        """Take the oldest post that may begin, of the user who waited longest."""
        for user_id, posts in self.queue.items():
            if self.in_flight[user_id] >= PER_USER:
                continue
            post = next((one for one in posts.values() if not is_paused(one)), None)
            if post is not None and has_token(user_id):
                self.remove(post)
                if user_id in self.queue:
                    self.queue.move_to_end(user_id)
                return post
        return None

    def remove(self, post: Post) -> None:
        """Remove a post from the queue."""
        posts = self.queue[post.user_id]
        del posts[post.endpoint, post.conversation_id]
        self.queued -= 1
        if not posts:
            del self.queue[post.user_id]

    def drop(self) -> None:
        """Drop the oldest post of the user who has most."""
        user_id = max(self.queue, key=lambda one: len(self.queue[one]))
        self.remove(next(iter(self.queue[user_id].values())))


class Drops:
    """Counts the notifications that are dropped, by reason, and logs the first one of each stretch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    def add(self, reason: str, count: int = 1) -> bool:
        """Count dropped notifications. Return whether they are the first of a stretch."""
        now = time.monotonic()
        is_first = now - self._last.get(reason, -STRETCH_SECONDS) >= STRETCH_SECONDS
        if is_first:
            log.warning("notifications are dropped: %s (counted in openchat_push_dropped_total)", reason)
        self._last[reason] = now
        self.counts[reason] += count
        return is_first


class Posts:
    """The queues of all hosts, and the posts in flight."""

    def __init__(
        self, read: Callable[[Post], Awaitable[Push | None]], send: Callable[[Push], Awaitable[None]], drops: Drops
    ) -> None:
        """`read` is called when a post begins, and returns None if it has nothing to say any more. `send` raises
        `Failed` or `Rejected` if it was not taken.
        """
        self._read = read
        self._send = send
        self._drops = drops
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._pauses: OrderedDict[str | tuple[UserId, str], _Pause] = OrderedDict()
        self._users: Allowance[UserId] = Allowance("notifications", USER_RATE, burst=USER_BURST)
        self._time = LoopTime(SHARE, BURST_SECONDS)
        self._next: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._slow = 0
        self._queued = 0

    def add(self, post: Post) -> None:
        """Enqueue a post, or count it as dropped."""
        name = host_of(post.endpoint)
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= MAX_HOSTS and not self._forget_one():
                self._drops.add("too_many_hosts")
                return
            host = self._hosts[name] = _Host(name)
        if host.holds(post):
            host.put(post)
            self._drops.add("replaced")
        elif self._queued >= (MAX_QUEUED if host.is_fast else MAX_QUEUED // 2):
            self._drops.add("queue_full")
        elif host.is_slow and host.queued >= MAX_QUEUED_SLOW:
            self._drops.add("host_slow")
        elif len(host.queue.get(post.user_id, ())) >= MAX_QUEUED_OF_USER:
            self._drops.add("user_full")
        else:
            host.put(post)
            self._queued += 1
            if self._pause_of(post) is not None:
                self._trim_paused(host, post.user_id)

    def start(self) -> None:
        """Begin posts, one in a turn of the loop, as long as there are slots and time for them."""
        if self._next is None:
            self._begin_one()

    async def close(self) -> None:
        """Cancel what is in flight."""
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

    def _find(self) -> tuple[_Host, Post] | None:
        """Take the post that begins next, of the host that waited longest."""
        now = time.monotonic()
        for name, host in self._hosts.items():
            if len(self._tasks) >= SLOTS:
                return None
            if not host.queue or host.pause.until > now:
                continue
            if host.in_flight.total() >= (PER_HOST if host.is_fast else 1):
                continue
            if not host.is_fast and self._slow >= SLOW_SLOTS:
                continue
            post = host.take(lambda one: self._pause_of(one) is not None, lambda user_id: not self._users.take(user_id))
            if post is not None:
                self._queued -= 1
                self._hosts.move_to_end(name)
                return host, post
        return None

    def _begin(self, host: _Host, post: Post) -> None:
        host.in_flight[post.user_id] += 1
        slow = int(not host.is_fast)
        self._slow += slow
        task = asyncio.create_task(self._time.run(self._deliver(host, post)))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._slow -= slow
            host.in_flight[post.user_id] -= 1
            if not host.in_flight[post.user_id]:
                del host.in_flight[post.user_id]
            self.start()

        task.add_done_callback(ended)

    async def _deliver(self, host: _Host, post: Post) -> None:
        try:
            push = await self._read(post)
            if push is None:
                return
            began = time.monotonic()
            await self._send(push)
        except Rejected as rejected:
            self._drops.add("refused")
            self._pause(post.endpoint, rejected.retry_after)
            self._trim_paused(host, post.user_id)
        except Failed as failed:
            self._drops.add("host_failed")
            self._pause((post.user_id, host.name), failed.retry_after)
            self._trim_paused(host, post.user_id)
            self._failed(host, post.user_id, failed.retry_after)
        except Exception as error:  # noqa: BLE001 - the others are pushed
            if self._drops.add("error"):
                log_failure(log, "pushing a notification", error)
        else:
            if time.monotonic() - began < SLOW_SECONDS:
                self._pauses.pop(post.endpoint, None)
                self._pauses.pop((post.user_id, host.name), None)
                host.failing.clear()
                host.pause = host.pause._replace(failures=0)
                host.is_fast = True
                host.is_slow = False
            else:
                self._pause((post.user_id, host.name), 0.0)
                self._trim_paused(host, post.user_id)
                host.failing.add(post.user_id)
                if len(host.failing) >= HOST_USERS:
                    host.is_fast = False
                    host.is_slow = True
                    self._trim(host)

    def _pause_of(self, post: Post) -> str | tuple[UserId, str] | None:
        """Return what pauses a post, its user at its host or its endpoint, if anything does."""
        now = time.monotonic()
        keys = ((post.user_id, host_of(post.endpoint)), post.endpoint)
        return next((key for key in keys if key in self._pauses and self._pauses[key].until > now), None)

    def _trim_paused(self, host: _Host, user_id: UserId) -> None:
        """Keep the newest post of a user for each pause: a badge tells of the others."""
        kept = set()
        for post in reversed(list(host.queue.get(user_id, OrderedDict()).values())):
            pause = self._pause_of(post)
            if pause is not None and pause in kept:
                host.remove(post)
                self._queued -= 1
                self._drops.add("paused")
            kept.add(pause)

    def _pause(self, key: str | tuple[UserId, str], retry_after: float) -> None:
        """Pause an endpoint, or a user at a host, for longer each time."""
        self._pauses[key] = self._pauses.pop(key, _Pause()).after_failure(retry_after, MAX_RETRY_AFTER)
        if len(self._pauses) > MAX_PAUSES:
            self._pauses.popitem(last=False)

    def _failed(self, host: _Host, user_id: UserId, retry_after: float) -> None:
        """Pause a host for all, if posts of enough users failed."""
        if len(host.failing) < HOST_USERS:
            host.failing.add(user_id)
        if len(host.failing) < HOST_USERS:
            return
        host.pause = host.pause.after_failure(retry_after, MAX_BACKOFF)
        host.is_fast = False
        host.is_slow = host.is_slow or host.pause.failures > 1
        self._trim(host)

    def _trim(self, host: _Host) -> None:
        """Drop what a slow host may not have queued."""
        over = max(0, host.queued - MAX_QUEUED_SLOW) if host.is_slow else 0
        for _ in range(over):
            host.drop()
        if over:
            self._queued -= over
            self._drops.add("host_slow", over)

    def _forget_one(self) -> bool:
        """Forget the host that was idle for longest; among hosts that back off, the one that may be asked soonest.

        Return False if none is idle. A back-off that is forgotten early is lost, so those hosts come last.
        """
        now = time.monotonic()
        idle = (name for name, host in self._hosts.items() if not host.queue and not host.in_flight)
        # `min` returns the first of equals: that is the one idle for longest.
        name = min(idle, key=lambda name: max(self._hosts[name].pause.until, now), default=None)
        if name is None:
            return False
        del self._hosts[name]
        return True


def host_of(endpoint: str) -> str:
    """Return the scheme, host and port of an endpoint."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc}"
