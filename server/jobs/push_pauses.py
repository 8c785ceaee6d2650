"""Pauses of posts: to an endpoint, of a user at a host, and of a user at all hosts except fast ones."""

import time
from collections import OrderedDict
from typing import TypeAlias

from protocol.ids import UserId
from server.jobs.push_hosts import MAX_BACKOFF, Host, Pause
from server.queries.push import PushPost

MAX_PAUSES = 10_000
"""Max remembered pauses of endpoints, of users at hosts, and of users, per worker."""
MAX_RETRY_AFTER = 3_600.0
"""Max pause that a host can request for one endpoint or user, in seconds."""

Paused: TypeAlias = str | UserId | tuple[UserId, str]
"""An endpoint, a user, or a user at a host."""


class Pauses:
    """The pauses of a worker. Those of hosts are in `Host`."""

    def __init__(self) -> None:
        self._pauses: OrderedDict[Paused, Pause] = OrderedDict()

    def begin(self, key: Paused, retry_after: float) -> None:
        """Pause an endpoint, a user at a host, or a user. Each further pause is longer."""
        self._pauses[key] = self._pauses.pop(key, Pause()).after_failure(retry_after, MAX_RETRY_AFTER)
        if len(self._pauses) > MAX_PAUSES:
            self._pauses.popitem(last=False)

    def end(self, key: Paused) -> None:
        """Forget a pause, and how often it was repeated."""
        self._pauses.pop(key, None)

    def of(self, host: Host, post: PushPost) -> Paused | None:
        """Return the key whose pause applies to a post, or None."""
        now = time.monotonic()
        keys: list[Paused] = [(post.user_id, host.name), post.endpoint]
        if not host.is_fast:
            keys.append(post.user_id)
        return next((key for key in keys if key in self._pauses and self._pauses[key].until > now), None)

    def is_slow(self, user_id: UserId) -> bool:
        """Whether a post of a user has recently taken long at a host that is not known to be fast."""
        pause = self._pauses.get(user_id)
        return pause is not None and time.monotonic() - pause.until <= MAX_BACKOFF
