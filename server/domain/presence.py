"""Presence: which users are online, and how others see them.

Redis has the users of each worker, and a sign of life of the worker, which expires (presence_entries.py). So presence
is correct again seconds after a worker is killed, if any other worker runs. Without Redis a worker knows its own users
only. PostgreSQL stores the users' choices and when they were last seen.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from protocol.client import SetPresence
from protocol.errors import CloseCode
from protocol.ids import UserId
from protocol.server import MeChanged, PresenceChanged
from protocol.values import Presence as Seen
from protocol.values import PresenceStatus
from server.context import Context, Subscriber
from server.core.errors import REDIS_LOST, log_failure
from server.core.faults import fault_of
from server.core.periodic import end, every
from server.db.database import Database
from server.db.epoch import OVER_SECONDS
from server.domain.pending_presence import PendingPresence, PresenceNews, Reason
from server.domain.presence_entries import PresenceEntries
from server.fairness.batcher import Batcher
from server.queries import presence
from server.queries.presence import Transition, Visibility, Watchable

FLUSH_SECONDS = 0.1
"""Interval at which arrivals and departures are written to Redis, in seconds."""
OFFLINE_SECONDS = 5.0
"""Delay between the last device's departure and the "offline" announcement, in seconds. Most devices reconnect before
that.
"""
SIGN_SECONDS = 2.0
"""Interval of a worker's signs of life, in seconds."""
RECORD_SECONDS = 1.0
"""Interval at which arrivals and departures are written to PostgreSQL, in seconds."""
LAST_TRIES = 5
"""Max attempts of a worker that shuts down to record users whose rows are locked, `FLUSH_SECONDS` apart."""

CALLS_AT_ONCE = 256
"""Max calls that share an exchange with Redis."""

log = logging.getLogger(__name__)

WatchedBy = TypeVar("WatchedBy", bound=tuple[UserId, UserId])
"""A watcher and a watched user."""


class Presence:
    """The users at this worker, and the known state of others."""

    def __init__(
        self,
        entries: PresenceEntries,
        database: Database,
        send_to_watchers: Callable[[UserId, PresenceChanged], None],
    ) -> None:
        """`send_to_watchers` delivers an event to those who watch a user."""
        self.entries = entries
        self._worker = entries.worker
        self._database = database
        self._send_to_watchers = send_to_watchers
        self._devices: dict[UserId, dict[Subscriber, bool]] = {}
        self._dirty: set[UserId] = set()
        self._has_news = asyncio.Event()
        self._departing: dict[UserId, float] = {}
        self._unsaved: set[UserId] = set()
        # The close code of a departed user's last connection, and its time in seconds of the epoch, until Redis has the
        # departure.
        self._ends: dict[UserId, CloseCode] = {}
        self._left_at: dict[UserId, float] = {}
        self._transitions: dict[UserId, Transition] = {}
        self._pending = PendingPresence(self._announce_all)
        # Exchanges with Redis are serialized, so that the latest one comes last.
        self._flushes: Batcher[None, None] = Batcher(self._flush_dirty, most=CALLS_AT_ONCE)
        # Users who were announced during an outage of Redis, from this worker's knowledge alone.
        self._guessed: set[UserId] = set()
        # Dead workers whose entries are being deleted, with users whose announcement may still be pending.
        self._burying: dict[bytes, Collection[UserId]] = {}
        self._dead: set[bytes] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Start the jobs that keep Redis and PostgreSQL up to date."""
        jobs = (
            (self._flush, FLUSH_SECONDS), (self._tell_due, FLUSH_SECONDS), (self._sign, SIGN_SECONDS),
            (self._record, RECORD_SECONDS),
        )  # fmt: skip
        self._tasks = [asyncio.create_task(every(seconds, job)) for job, seconds in jobs]

    async def close(self, *, is_epoch_over: bool = False) -> None:
        """Stop. Delete the sign of life, so that other workers soon announce the users who do not reconnect. After the
        end of an epoch no other worker does that, so this one deletes its entries itself.
        """
        await end(self._tasks)  # a sign of life in flight would undo the deletion of it
        leaving = [*self._devices, *self._left_at]
        self._devices.clear()
        try:
            # Some users are also connected to another worker, or have moved there.
            for user_id, fields in (await self._fields(leaving)).items():
                fields.pop(self._worker, None)
                if not self._states(fields):
                    self._transitions[user_id] = self._gone(user_id)
            # At the end of an epoch, the database may be an old primary that does not answer.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OVER_SECONDS if is_epoch_over else None):
                    await self._record_last()
            while self._pending and await self._pending.tell():
                pass
            await self.entries.delete_sign()
            if is_epoch_over:
                await self._bury(self._worker)
                await self._take_away([self._worker])
        except REDIS_LOST:
            return

    # ---------------------------------------------------------------------------------- connections and choices

    def arrived(self, user_id: UserId, device: Subscriber) -> None:
        """A user's device connected."""
        devices = self._devices.setdefault(user_id, {})
        devices[device] = False
        self._departing.pop(user_id, None)
        self._ends.pop(user_id, None)
        self._left_at.pop(user_id, None)
        self._note(user_id)

    def left(self, user_id: UserId, device: Subscriber, code: CloseCode | None) -> None:
        """A user's device disconnected."""
        devices = self._devices.get(user_id)
        if devices is None or devices.pop(device, None) is None:
            return
        if devices:
            self._note(user_id)
        else:
            del self._devices[user_id]
            self._dirty.discard(user_id)
            if code is not None:
                self._ends[user_id] = code
            self._left_at[user_id] = time.time()
            self._departing[user_id] = self._loop.time() + OFFLINE_SECONDS
            self._has_news.set()

    async def choose(self, context: Context, frame: SetPresence) -> MeChanged | None:
        """Store the chosen presence of the caller, or `away` for one of the caller's devices. Return the event for the
        caller's own devices, if the choice changed.
        """
        user_id, device = context.user_id, context.subscriber
        devices = self._devices.get(user_id, {})
        async with context.statement() as db:
            event, is_visible_again = await presence.choose(db, user_id, frame, is_here=bool(devices))
        if is_visible_again and not devices and self._departing.pop(user_id, None) is not None:
            # They were invisible, so their departure needs no delay in which they may reconnect.
            self._note(user_id)
        if device in devices:
            devices[device] = frame.status == "away"
            self._note(user_id)
        try:
            await self._flushes.submit(None)  # announces a device that became idle or active
        finally:
            if event is not None:
                self._pending.keep(user_id, PresenceNews(Reason.CHOICE))
        await self._pending.tell(user_id)
        return event

    async def republish(self, user_id: UserId) -> None:
        """Send a user's presence again to those who watch the user, after a change of privacy."""
        self._pending.keep(user_id, PresenceNews(Reason.PRIVACY))
        await self._pending.tell(user_id)

    async def expire_statuses(self) -> bool:
        """Delete expired custom statuses, and announce it. Return whether there may be more."""
        async with self._database.connection() as db:
            over = await presence.expire_statuses(db)
        for user_id in over:
            self._pending.keep(user_id, PresenceNews(Reason.CHOICE))
        return len(over) == presence.MAX_DELETED

    # -------------------------------------------------------------------------------------------------- reads

    async def describe(self, found: Mapping[WatchedBy, Watchable]) -> dict[WatchedBy, Seen]:
        """Return how watchers see the users whom they may watch."""
        fields = await self._fields(list({watched for _, watched in found}))
        return {pair: _seen(pair[1], one.choice, self._states(fields[pair[1]])) for pair, one in found.items()}

    async def _fields(self, user_ids: Sequence[UserId]) -> dict[UserId, dict[bytes, bytes]]:
        try:
            return await self._shared_fields(user_ids)
        except REDIS_LOST:
            return {user_id: self._local(user_id) for user_id in user_ids}

    async def _shared_fields(self, user_ids: Sequence[UserId]) -> dict[UserId, dict[bytes, bytes]]:
        found = await self.entries.read(user_ids)
        return {user_id: there | self._local(user_id) for user_id, there in found.items()}

    def _local(self, user_id: UserId) -> dict[bytes, bytes]:
        devices = self._devices.get(user_id)
        if not devices:
            return {}
        return {self._worker: b"away" if all(devices.values()) else b"online"}

    def _states(self, fields: dict[bytes, bytes]) -> set[bytes]:
        """Return the states at workers that are not known to be dead."""
        return {state for worker, state in fields.items() if worker not in self._dead}

    # ----------------------------------------------------------------------------------------- writes and expiry

    def _note(self, *user_ids: UserId) -> None:
        self._dirty.update(user_ids)
        self._has_news.set()

    async def _flush(self) -> None:
        await self._has_news.wait()
        now = self._loop.time()
        gone = [user_id for user_id, at in self._departing.items() if at <= now]
        for user_id in gone:
            del self._departing[user_id]
        if not self._departing:
            self._has_news.clear()
        self._dirty.update(gone)
        if self._dirty:
            await self._flushes.submit(None)

    async def _flush_dirty(self, calls: list[None]) -> list[None]:
        """Write the users with a changed state to Redis."""
        dirty, self._dirty = self._dirty, set()
        try:
            if dirty:
                await self._flush_users(list(dirty))
        except BaseException:
            self._note(*dirty)
            raise
        return [None] * len(calls)

    async def _flush_users(self, user_ids: Sequence[UserId]) -> None:
        here = {user_id: local for user_id in user_ids if (local := self._local(user_id))}
        left_at = {one: self._left_at[one] for one in user_ids if one not in here and one in self._left_at}
        before = await self._exchange(user_ids, here)
        is_noted = before is not None
        if before is None:
            before = {user_id: {} for user_id in user_ids}
            self._unsaved.update(user_ids)
        for user_id in user_ids:
            was = self._states(before[user_id])
            states = self._elsewhere(before[user_id]) | self._states(here.get(user_id, {}))
            # A user is gone even if Redis had no entry. A user whom nobody knew was never here.
            has_left = not states and (bool(was) or user_id in left_at)
            if (states and not was) or (has_left and is_noted):
                self._transitions[user_id] = Transition(is_online=True) if states else self._gone(user_id)
            if was != states or has_left:
                self._pending.keep(user_id, _of_device(states, left_at.get(user_id)))
            # Redis may have been lost during the exchange, and then another one follows.
            if is_noted and user_id not in self._unsaved and self._left_at.get(user_id) == left_at.get(user_id):
                self._left_at.pop(user_id, None)
                self._ends.pop(user_id, None)

    async def _exchange(
        self, user_ids: Sequence[UserId], here: Mapping[UserId, dict[bytes, bytes]]
    ) -> dict[UserId, dict[bytes, bytes]] | None:
        """Write the states of users to Redis. Return the states before, or None if Redis cannot be reached."""
        try:
            return await self.entries.exchange(user_ids, here)
        except REDIS_LOST:
            return None

    async def _tell_due(self) -> bool:
        is_more_due = await self._pending.tell_due()
        await self._end_burials()
        return is_more_due

    async def _announce_all(self, untold: Mapping[UserId, PresenceNews]) -> None:
        async with self._database.connection() as db:
            choices = await presence.choices(db, list(untold))
        try:
            fields = await self._shared_fields(list(choices))
        except REDIS_LOST:
            fields = {user_id: self._local(user_id) for user_id in choices}
            self._guessed.update(choices)
        for user_id, choice in choices.items():
            reason, left_at = untold[user_id]
            if not reason.is_told_of(choice):
                continue
            states = self._states(fields[user_id])
            if left_at is not None and reason is Reason.DEVICE and left_at >= (choice.visible_since or 0.0):
                # The departure may not be in PostgreSQL yet.
                choice = choice._replace(last_seen_at=max(left_at, choice.last_seen_at or 0.0))  # noqa: PLW2901
            self._send_to_watchers(user_id, PresenceChanged(presence=_seen(user_id, choice, states)))

    async def _sign(self) -> None:
        """Renew the sign of life, and clean up after workers that no longer renew theirs."""
        try:
            signs = await self.entries.sign()
        except REDIS_LOST:
            return
        self._dead = signs.dead
        if self._unsaved:
            # A frozen Redis may execute earlier commands late, in any order.
            self._note(*self._unsaved)
            self._unsaved.clear()
        for user_id in self._guessed:
            self._pending.keep(user_id, PresenceNews(Reason.DEVICE, self._left_at.get(user_id)))
        self._guessed.clear()
        if not signs.is_known:
            # Redis is new, or the outage was so long that others considered this worker dead. They may be deleting its
            # entries right now, so the next sign of life writes them again.
            self._note(*self._devices)
            self._unsaved.update(self._devices)
        for worker in self._dead:
            await self._bury(worker)

    async def _bury(self, worker: bytes) -> None:
        """Delete the entries of a dead worker, and announce its users who are offline now."""
        if worker not in self._burying:
            try:
                found = await self.entries.delete_states(worker)
            except REDIS_LOST:
                return
            self._burying[worker] = set(found)
            for user_id, fields in found.items():
                states = self._states(fields | self._local(user_id))
                if not states:
                    self._transitions[user_id] = self._gone(user_id)
                self._pending.keep(user_id, _of_device(states))
        await self._end_burials()

    async def _end_burials(self) -> None:
        """Delete the keys of dead workers whose users have been announced. If this worker dies before that, another one
        repeats all of it.
        """
        over = [worker for worker, user_ids in self._burying.items() if self._pending.isdisjoint(user_ids)]
        for worker in over:
            if worker not in self._dead:
                del self._burying[worker]  # the worker is alive again
        await self._take_away([worker for worker in over if worker in self._dead])

    async def _take_away(self, workers: Sequence[bytes]) -> None:
        for worker in workers:
            try:
                await self.entries.delete_worker(worker)
            except REDIS_LOST:
                return
            self._burying.pop(worker, None)

    def _gone(self, user_id: UserId) -> Transition:
        return Transition(is_online=False, close_code=self._ends.get(user_id), left_at=self._left_at.get(user_id))

    async def _record_last(self) -> None:
        await self._record()
        for _ in range(LAST_TRIES):
            if not self._transitions:
                break
            await asyncio.sleep(FLUSH_SECONDS)
            await self._record()

    async def _record(self) -> None:
        if not self._transitions:
            return
        transitions, self._transitions = self._transitions, {}
        left, overtaken = transitions, {}
        try:
            current = await self._without_returned(transitions)
            async with self._database.connection() as db:
                left = await presence.seen(db, current)
            overtaken = await self._overtaken({one: current[one] for one in current.keys() - left.keys()})
        except Exception as error:
            if fault_of(error) is None:
                raise
            log_failure(log, "recording who is online", error)
        finally:
            self._transitions = left | overtaken | self._transitions

    async def _without_returned(self, transitions: dict[UserId, Transition]) -> dict[UserId, Transition]:
        """Leave out users who departed and are at another worker by now. The other worker records their arrival,
        perhaps before this.
        """
        gone = [user_id for user_id, one in transitions.items() if not one.is_online]
        try:
            fields = await self.entries.read(gone) if gone else {}
        except REDIS_LOST:
            return transitions
        returned = {user_id for user_id, there in fields.items() if self._elsewhere(there)}
        return {user_id: one for user_id, one in transitions.items() if user_id not in returned}

    async def _overtaken(self, recorded: dict[UserId, Transition]) -> dict[UserId, Transition]:
        """Return the opposite of what was recorded for users who came or left elsewhere meanwhile, as Redis has it now.

        Another worker may have recorded that before this one overwrote it. Whichever worker writes last reads Redis
        after it, so the row is right in the end.
        """
        try:
            fields = await self.entries.read(list(recorded)) if recorded else {}
        except REDIS_LOST:
            return {}
        overtaken = {}
        for user_id, one in recorded.items():
            local = self._local(user_id)
            # This worker's entry outlives the last device by `OFFLINE_SECONDS`, and the worker's end.
            there = self._states(fields[user_id]) if one.is_online else self._elsewhere(fields[user_id])
            if bool(local or there) is not one.is_online:
                overtaken[user_id] = Transition(is_online=not one.is_online)
        return overtaken

    def _elsewhere(self, fields: dict[bytes, bytes]) -> set[bytes]:
        """Return the states at other workers that are not known to be dead."""
        return self._states({worker: state for worker, state in fields.items() if worker != self._worker})


def _of_device(states: Collection[bytes], left_at: float | None = None) -> PresenceNews:
    """Return the announcement of a device's arrival or departure. By default a departure counts as now, as for the
    users of a dead worker.
    """
    return PresenceNews(Reason.DEVICE, None if states else left_at or time.time())


def _seen(user_id: UserId, choice: Visibility, states: Iterable[bytes]) -> Seen:
    states = set(states)
    status: PresenceStatus
    if not choice.is_shown:
        return Seen(user_id=user_id, status="offline", revision=choice.revision)
    if not states or choice.status == "invisible":
        status = "offline"
    elif choice.status == "busy":
        status = "busy"
    else:
        status = "away" if states == {b"away"} else "online"
    last_seen = choice.last_seen_at
    return Seen(
        user_id=user_id,
        status=status,
        custom_status=choice.custom_status,
        last_seen_at=datetime.fromtimestamp(last_seen, UTC) if status == "offline" and last_seen else None,
        revision=choice.revision,
    )
