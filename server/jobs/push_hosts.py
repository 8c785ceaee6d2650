"""Hosts of push services: their queues, their speed and their pauses."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from protocol.ids import ConversationId, UserId
from server.queries.push import PushPost

PER_HOST = 8
"""Max posts in flight to a fast host."""
PER_USER = 2
"""Max posts in flight per user, to one host, and to all hosts that are not known to be fast."""
SLOW_SECONDS = 2.0
"""Duration of a response from which a host is slow, in seconds."""
HOST_USERS = 3
"""Min number of users with a failed or slow post, without a fast response in between, before a host is paused or slow
for all.
"""
KEPT_SECONDS = 300.0
"""Time after a post for which a host that responded fast to `HOST_USERS` users is remembered, in seconds."""
MAX_BACKOFF = 300.0
"""Max pause after consecutive failures, and max pause that a host can request for all users, in seconds."""


class Pause(NamedTuple):
    """The number of consecutive failures, and the end of the pause."""

    failures: int = 0
    until: float = 0.0

    def after_failure(self, retry_after: float, most: float) -> "Pause":
        """Return the pause after a failure. It grows with each one, and is at least `retry_after`, up to `most`
        seconds.
        """
        now = time.monotonic()
        failures = self.failures + (self.until <= now)  # otherwise this post was in flight during the previous failure
        wait = max(min(2.0 ** min(failures - 1, 30), MAX_BACKOFF), min(retry_after, most))
        return Pause(failures, max(self.until, now + wait))


class Host:
    """The queue of a host, and its state as known from responses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: OrderedDict[UserId, OrderedDict[tuple[str, ConversationId], PushPost]] = OrderedDict()
        self.crowds: OrderedDict[UserId, OrderedDict[tuple[str, ConversationId], PushPost]] = OrderedDict()
        """Posts of large conversations. The two queues take turns."""
        self.is_crowds_turn = False
        self.queued = 0
        self.in_flight: Counter[UserId] = Counter()
        self.is_fast = False  # a new host is neither fast nor slow
        self.is_slow = False
        self.answered: set[UserId] = set()
        self.used_at = 0.0
        self.failing: set[UserId] = set()
        self.pause = Pause()

    def put(self, post: PushPost, *, is_crowd: bool) -> None:
        """Enqueue a post. There is none of the same conversation to the same endpoint yet."""
        queue = self.crowds if is_crowd else self.queue
        queue.setdefault(post.user_id, OrderedDict())[post.endpoint, post.conversation_id] = post
        self.queued += 1

    def replace(self, post: PushPost) -> bool:
        """Replace a queued post of the same conversation to the same endpoint. Return whether there was one."""
        for queue in (self.queue, self.crowds):
            posts = queue.get(post.user_id)
            if posts is not None and (post.endpoint, post.conversation_id) in posts:
                posts[post.endpoint, post.conversation_id] = post
                return True
        return False

    def posts_of(self, user_id: UserId) -> list[PushPost]:
        """Return a user's queued posts."""
        return [post for queue in (self.queue, self.crowds) for post in queue.get(user_id, OrderedDict()).values()]

    def users(self) -> set[UserId]:
        """Return the users with queued posts."""
        return {*self.queue, *self.crowds}

    def take(
        self,
        may_begin: Callable[[UserId], bool],
        is_paused: Callable[[PushPost], bool],
        has_token: Callable[[UserId], bool],
    ) -> PushPost | None:
        """Return the oldest post that may begin, of the user who has waited longest."""
        for queue in (self.crowds, self.queue) if self.is_crowds_turn else (self.queue, self.crowds):
            for user_id, posts in queue.items():
                if self.in_flight[user_id] >= PER_USER or not may_begin(user_id):
                    continue
                post = next((one for one in posts.values() if not is_paused(one)), None)
                if post is not None and has_token(user_id):
                    queue.move_to_end(user_id)
                    self.is_crowds_turn = queue is self.queue
                    return post
        return None

    def remove(self, post: PushPost) -> bool:
        """Remove a post from its queue. Return whether it was one of a large conversation."""
        is_crowd = (post.endpoint, post.conversation_id) not in self.queue.get(post.user_id, ())
        queue = self.crowds if is_crowd else self.queue
        posts = queue[post.user_id]
        del posts[post.endpoint, post.conversation_id]
        self.queued -= 1
        if not posts:
            del queue[post.user_id]
        return is_crowd

    def oldest(self) -> PushPost:
        """Return the oldest post of the user with the most."""
        return next(iter(max((*self.queue.values(), *self.crowds.values()), key=len).values()))

    @property
    def most(self) -> int:
        """Max posts in flight."""
        return PER_HOST if self.is_fast else 1

    @property
    def has_many_users(self) -> bool:
        """Whether posts of more than `HOST_USERS` users are queued."""
        return len(self.queue) + len(self.crowds) > HOST_USERS

    def stays(self, now: float) -> bool:
        """Whether it has responded fast to several users lately."""
        return self.is_fast and len(self.answered) >= HOST_USERS and now - self.used_at < KEPT_SECONDS

    def note_fast(self, user_id: UserId) -> None:
        """Record a fast response to a user's post."""
        self.failing.clear()
        self.pause = self.pause._replace(failures=0)
        self.is_fast = True
        self.is_slow = False
        if len(self.answered) < HOST_USERS:
            self.answered.add(user_id)

    def note_slow(self, user_id: UserId) -> None:
        """Record a slow response to a user's post. With enough users, the host is slow."""
        self._add_failing(user_id)
        if len(self.failing) >= HOST_USERS:
            self.is_fast = False
            self.is_slow = True

    def note_failed(self, user_id: UserId, retry_after: float) -> None:
        """Record a failed post of a user. With enough users, the host is paused for all."""
        self._add_failing(user_id)
        if len(self.failing) >= HOST_USERS:
            self.pause = self.pause.after_failure(retry_after, MAX_BACKOFF)
            self.is_fast = False
            self.is_slow = self.is_slow or self.pause.failures > 1

    def _add_failing(self, user_id: UserId) -> None:
        if len(self.failing) < HOST_USERS:
            self.failing.add(user_id)

    def note_long(self) -> None:
        """Record a long post, whatever its result. A host that was slow for all users to whom it had responded fast is
        no longer known to be fast.
        """
        if self.answered <= self.failing:
            self.is_fast = False
            self.answered.clear()
