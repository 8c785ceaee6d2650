"""The path from a frame's bytes to its reply: decode it, look up its route, take tokens, run the handler."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import msgspec
from asyncpg import LockNotAvailableError

from protocol.client import (
    AddParticipants,
    Authenticate,
    CreateGroup,
    Edit,
    Forward,
    Frame,
    GetUsers,
    History,
    Invite,
    ListAudit,
    ListParticipants,
    ListRelationships,
    ListReplies,
    ListReports,
    ListStars,
    Schedule,
    Send,
    Watch,
)
from protocol.codec import decode_client, kind, label, tag
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, UserId
from protocol.limits import (
    ANSWER_TOKEN_BYTES,
    FURTHER_TOKENS,
    MAX_MENTIONS,
    MAX_PAGE,
    MAX_PARTICIPANTS_NAMED,
    MAX_WATCHED,
    TOKEN_BYTES,
    part_of_mentions,
)
from protocol.server import Error, Reply, Result
from server.context import Context
from server.core.errors import INTERNAL, log_defect, refusal
from server.core.faults import Fault, HeldTooLong, RowHeld, may_have_committed
from server.core.metrics import Metrics
from server.fairness.lock_queue import LockQueue, Place
from server.fairness.share import HELD_SECONDS
from server.fairness.turns import Turns
from server.limits.load_shedding import LoadShedding, Shed
from server.limits.shared_rate_limit import SharedRateLimit

log = logging.getLogger(__name__)

SEARCHING_MS = 500
"""Delay after which to retry a search that was refused because the user has another one running, in milliseconds."""

SEARCH_COST_FACTOR = 4
"""Tokens for a search, as a multiple of its time in the database. So a user whose searches are slow does not occupy a
connection all the time.
"""

READ_SECONDS = 10.0
"""Max wait of a large read for others of its user, in seconds. A longer wait is refused as an outage of the database
is.
"""


SOCKET_ONLY = Refused(ErrorCode.INVALID, "This frame needs a WebSocket connection. Send it on one.", path="type")


class Rate(Enum):
    """The rate limit that a frame counts for. docs/operations.md has the figures."""

    WRITE = "write"
    READ = "read"
    EPHEMERAL = "ephemeral"
    SEARCH = "search"
    """Frames that may cost the database a hundred times as much as a typical read. Few are allowed per second, and one
    at a time, per user.
    """


class Route(NamedTuple):
    """A line of the table of frames."""

    handler: Callable[[Context, Any], Awaitable[Result]]
    rate: Rate
    shed: Shed | None = None
    """The load at which the frame is refused. None if it never is."""
    waits_for_client: bool = False
    """Whether the handler waits for its client while it reads. Then other large reads of the user do not wait
    for it.
    """
    socket_only: bool = False
    """Whether the frame concerns its connection. Over plain HTTP it is refused."""
    waits_for_user: bool = False
    """Whether the frame waits for rows of its user only, although it names a conversation. Then it does not delay
    frames of others in the conversation.
    """

    @property
    def writes(self) -> bool:
        """Whether the handler changes rows whose events others receive."""
        return self.rate is Rate.WRITE or (self.rate is Rate.EPHEMERAL and self.shed in {Shed.PRESENCE, Shed.RECEIPTS})


class Dispatch:
    """Runs all frames, from WebSockets and from HTTP."""

    def __init__(
        self,
        routes: Mapping[type[Frame], Route],
        rate_limits: Mapping[Rate, SharedRateLimit],
        *,
        metrics: Metrics,
        load_shedding: LoadShedding,
        lock_queue: LockQueue[ConversationId | UserId],
    ) -> None:
        """Frames that need locked rows are repeated in `lock_queue`, by conversation, or else by their user."""
        self._routes = routes
        self._lock_queue = lock_queue
        self._metrics = metrics
        self._load_shedding = load_shedding
        self._rate_limits = rate_limits
        self._rates = {tag(frame): route.rate for frame, route in routes.items()}
        self._reading: Turns[UserId] = Turns(1, patience=READ_SECONDS)
        self.searching: set[UserId] = set()
        """Users with a running search at this worker."""

    async def run(self, context: Context, data: bytes) -> Reply | Error:
        """Return the reply to a frame. Errors are replies, too."""
        frame = None
        began = time.perf_counter()
        try:
            taken = self._charge(context.user_id, data)
            frame = decode_client(data)
            route = self._routes.get(type(frame))
            if context.subscriber is None and (route is None or route.socket_only):
                raise SOCKET_ONLY
            if route is None:
                raise _already_authenticated(frame)
            if (more := further(frame)) > 0:
                self._rate_limits[route.rate].require(context.user_id, more, taken=taken)
            if route.shed is not None:
                self._load_shedding.require(route.shed)
            if route.rate is Rate.SEARCH:
                result = await self._search(route, context, frame)
            elif more > 0 and route.rate is Rate.READ and not route.waits_for_client:
                result = await self._read_alone(route, context, frame)
            else:
                result = await self._handle(route, context, frame)
        except Exception as error:  # noqa: BLE001 - any error becomes a reply
            return self._error(context, data, frame, error)
        self._metrics.answered(tag(type(frame)), time.perf_counter() - began)
        return Reply(re=frame.id, result=result)

    def _error(self, context: Context, data: bytes, frame: Frame | None, error: Exception) -> Error:
        """Return the reply to a frame that failed.

        `run` has no variable for the refusal, whose traceback may refer to the variables of `run`. Such a cycle would
        stay until the next garbage collection.
        """
        refused = self._refusal(context, error, "a frame" if frame is None else tag(type(frame)))
        if refused.retry_after_ms is not None:
            refused = self._in_turn(context.user_id, data, frame, refused, refused.retry_after_ms)
        return error_frame(refused, re=label(data) if frame is None else frame.id)

    def _refusal(self, context: Context, error: Exception, what: str) -> Refused:
        """Return the refusal for an error, which is counted and, unless the frame is to blame, logged."""
        refused = refusal(error, what)
        if refused is None:
            log_defect(log, what, error)
            refused = INTERNAL
        if isinstance(error, HeldTooLong | LockNotAvailableError):
            context.services.database.faults[Fault.BUSY] += 1  # the database counts no attempts
        self._metrics.refusals[refused.code] += 1
        return refused

    def _charge(self, user_id: UserId, data: bytes) -> int:
        """Take tokens for an encoded frame by its size, before it costs the work of decoding. Return their number.

        Raises Refused if there are too few tokens, or if the frame is a search and the user has another one running.
        """
        named = kind(data) or ""
        rate = self._rates.get(named, Rate.READ)
        if rate is Rate.SEARCH and user_id in self.searching:
            raise Refused(
                ErrorCode.RATE_LIMITED,
                "Another search of your user is running. Retry after its reply.",
                retry_after_ms=SEARCHING_MS,
            )
        count = 1 + len(data) // TOKEN_BYTES
        self._rate_limits[rate].require(user_id, count, to_come=most_further(named, data))
        return count

    def _in_turn(self, user_id: UserId, data: bytes, frame: Frame | None, refused: Refused, wait_ms: int) -> Refused:
        """Return a refusal with a retry time after the user's earlier refused frames."""
        named = kind(data) or ""
        more = most_further(named, data) if frame is None else further(frame)
        tokens = 1 + len(data) // TOKEN_BYTES + more
        wait_ms = self._rate_limits[self._rates.get(named, Rate.READ)].retry_after(user_id, wait_ms, tokens)
        return Refused(refused.code, refused.message, path=refused.path, retry_after_ms=wait_ms)

    def answered(self, user_id: UserId, data: bytes, size: int) -> None:
        """Take tokens for the reply to an encoded frame, by the size of the reply."""
        if (more := size // ANSWER_TOKEN_BYTES) > 0:
            self._rate_limits[self._rates.get(kind(data) or "", Rate.READ)].charge(user_id, more)

    async def _handle(self, route: Route, context: Context, frame: Frame) -> Result:
        """Run the handler of a frame, again and again while another transaction holds a row that it needs.

        Handlers publish after their commit, so a failed attempt published nothing.
        """
        key = context.user_id if route.waits_for_user else getattr(frame, "conversation_id", None) or context.user_id
        if not self._lock_queue.has(key):
            with suppress(RowHeld):
                return await self._handle_once(route, context, frame)

        def attempt(place: Place) -> Awaitable[Result]:
            queued = msgspec.structs.replace(context, place=place, lock_ms=self._lock_queue.lock_ms)
            return self._handle_once(route, queued, frame)

        return await self._lock_queue.repeat(key, context.user_id, attempt)

    async def _handle_once(self, route: Route, context: Context, frame: Frame) -> Result:
        """Run the handler of a frame. It is retried if PostgreSQL ends its transaction to break a deadlock."""
        try:
            return await context.services.database.again(tag(type(frame)), partial(route.handler, context, frame))
        except BaseException as error:
            if route.writes and may_have_committed(error):
                where = getattr(frame, "to_conversation_id", None) or getattr(frame, "conversation_id", None)
                context.events.recheck(context.user_id, where)
            raise

    async def _read_alone(self, route: Route, context: Context, frame: Frame) -> Result:
        """Run the handler of a frame that may have a large reply. Other such frames of the user at this worker wait.
        Decoding a reply blocks the loop for milliseconds, and a user with many connections could request many
        concurrently.
        """
        await self._reading.take(context.user_id)
        try:
            return await self._handle(route, context, frame)
        finally:
            self._reading.give(context.user_id)

    async def _search(self, route: Route, context: Context, frame: Frame) -> Result:
        """Run the handler of a search. Meanwhile `_charge` refuses other searches of the user at this worker."""
        self.searching.add(context.user_id)
        HELD_SECONDS.set(0.0)
        try:
            return await self._handle(route, context, frame)
        finally:
            self.searching.discard(context.user_id)
            rate_limit = self._rate_limits[Rate.SEARCH]
            if (more := int(HELD_SECONDS.get() * SEARCH_COST_FACTOR * rate_limit.rate)) > 0:
                rate_limit.charge(context.user_id, more)


def error_frame(refused: Refused, *, re: int | str | None = None) -> Error:
    """Return the error frame of a refusal."""
    return Error(
        re=re, code=refused.code, message=refused.message, path=refused.path, retry_after_ms=refused.retry_after_ms
    )


def further(frame: Frame) -> int:
    """Return the number of additional tokens that a frame takes for the work it requests."""
    match frame:
        case Send() | Edit() | Schedule():
            part = part_of_mentions(frame.content)
        case Forward():
            return 0  # the handler takes them when it has read the content
        case Watch():
            part = len(frame.user_ids) / MAX_WATCHED
        case CreateGroup() | AddParticipants() | Invite():
            part = len(frame.participants) / MAX_PARTICIPANTS_NAMED
        case GetUsers():
            part = len(frame.user_ids) / MAX_PAGE
        case (
            ListRelationships() | ListStars() | History() | ListParticipants() | ListReplies() | ListReports()
            | ListAudit()
        ):  # fmt: skip
            part = frame.limit / MAX_PAGE
        case _:
            part = 1.0
    return int(FURTHER_TOKENS.get(tag(type(frame)), 0) * part)


def most_further(named: str, data: bytes) -> int:
    """Return the max of `further` for a frame that is not decoded yet. A refusal reserves that many tokens. A short
    message needs fewer than one with 50 mentions.
    """
    match named:
        case "send" | "edit" | "schedule":
            count, most = data.count(b"@") + data.count(b"\\u0040"), MAX_MENTIONS
        case "watch":
            count, most = data.count(b'"') // 2, MAX_WATCHED
        case "create_group" | "add_participants" | "invite":
            count, most = data.count(b'"') // 2, MAX_PARTICIPANTS_NAMED
        case "get_users":
            count, most = data.count(b'"') // 2, MAX_PAGE
        case _:
            count = most = 1
    return int(FURTHER_TOKENS.get(named, 0) * min(count, most) / most)


def _already_authenticated(frame: object) -> Refused:
    assert isinstance(frame, Authenticate)  # noqa: S101 - no other frame lacks a route
    return Refused(
        ErrorCode.INVALID, "This connection is already authenticated. Do not send `authenticate` again.", path="type"
    )
