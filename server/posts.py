"""Posts to push services, queued per host: a host that fails or is slow delays nobody else.

A host starts with one post at a time. A fast answer raises that to `PER_HOST`; a failure or a slow answer lowers it
to one again. Hosts at one post share half of the slots, so that fast hosts always find a free slot.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from server.errors import log_failure
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
MAX_BACKOFF = 300.0
"""Max wait after consecutive failures of a host, in seconds."""
MAX_RETRY_AFTER = 3_600.0
"""Max wait that a host may ask for, in seconds."""
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
    """The host failed; `retry_after` is the wait in seconds that it asked for, or 0."""

    def __init__(self, retry_after: float = 0.0) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class _Host:
    def __init__(self) -> None:
        self.queue: deque[Post] = deque()
        self.in_flight = 0
        self.is_fast = False  # a new host is neither fast nor slow
        self.is_slow = False
        self.failures = 0
        self.retry_at = 0.0


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
        `Failed` when the host is to be left alone for a while.
        """
        self._read = read
        self._send = send
        self._drops = drops
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
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
            host = self._hosts[name] = _Host()
        if self._queued >= (MAX_QUEUED if host.is_fast else MAX_QUEUED // 2):
            self._drops.add("queue_full")
        elif host.is_slow and len(host.queue) >= MAX_QUEUED_SLOW:
            self._drops.add("host_slow")
        else:
            host.queue.append(post)
            self._queued += 1

    def start(self) -> None:
        """Start as many posts as there are slots for. The host that waited longest is first."""
        now = time.monotonic()
        is_any = True
        while is_any:
            is_any = False
            for name, host in list(self._hosts.items()):
                if len(self._tasks) >= SLOTS:
                    return
                if not host.queue or host.retry_at > now or host.in_flight >= (PER_HOST if host.is_fast else 1):
                    continue
                if not host.is_fast and self._slow >= SLOW_SLOTS:
                    continue
                self._hosts.move_to_end(name)
                self._begin(host)
                is_any = True

    async def close(self) -> None:
        """Cancel what is in flight."""
        tasks = list(self._tasks)
        self._hosts.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, host: _Host) -> None:
        post = host.queue.popleft()
        self._queued -= 1
        host.in_flight += 1
        slow = int(not host.is_fast)
        self._slow += slow
        task = asyncio.create_task(self._deliver(host, post))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._slow -= slow
            host.in_flight -= 1
            self.start()

        task.add_done_callback(ended)

    async def _deliver(self, host: _Host, post: Post) -> None:
        try:
            push = await self._read(post)
            if push is None:
                return
            began = time.monotonic()
            await self._send(push)
        except Failed as failed:
            self._drops.add("host_failed")
            self._back_off(host, failed.retry_after)
        except Exception as error:  # noqa: BLE001 - the others are pushed
            if self._drops.add("error"):
                log_failure(log, "pushing a notification", error)
        else:
            host.failures = 0
            host.is_fast = time.monotonic() - began < SLOW_SECONDS
            host.is_slow = not host.is_fast
            self._trim(host)

    def _back_off(self, host: _Host, retry_after: float) -> None:
        now = time.monotonic()
        if host.retry_at <= now:  # else this post was in flight when another one failed
            host.failures += 1
        wait = min(2.0 ** min(host.failures - 1, 30), MAX_BACKOFF)
        host.retry_at = max(host.retry_at, now + wait, now + min(retry_after, MAX_RETRY_AFTER))
        host.is_fast = False
        host.is_slow = host.is_slow or host.failures > 1
        self._trim(host)

    def _trim(self, host: _Host) -> None:
        """Drop the oldest of what a slow host may not have queued."""
        over = max(0, len(host.queue) - MAX_QUEUED_SLOW) if host.is_slow else 0
        for _ in range(over):
            host.queue.popleft()
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
        name = min(idle, key=lambda name: max(self._hosts[name].retry_at, now), default=None)
        if name is None:
            return False
        del self._hosts[name]
        return True


def host_of(endpoint: str) -> str:
    """Return the scheme, host and port of an endpoint."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc}"
