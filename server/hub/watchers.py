"""Watchers: the sockets that are told each user's presence and face, and whether they still may be."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_WATCHED
from protocol.server import PresenceChanged
from protocol.values import Presence
from server.core.errors import is_lost, log_defect, log_failure
from server.hub.bus import Bus
from server.hub.doubts import Batch, Doubts, Pair, Whole
from server.hub.online_users import Sight, Socket

TRIES = 3
"""Max reads for one `watch`, when what it reads changes meanwhile."""

LOST_SECONDS = 1.0
"""Pause of all questions after the database was found to be away, in seconds."""

log = logging.getLogger(__name__)


class WatchablePair(Protocol):
    """What the database knows of a pair whose watcher may see at least the face: a `Watchable` of `queries`."""

    @property
    def is_seen(self) -> bool:
        """Whether the watcher may have the presence as well."""


class WatchRecord(Protocol):
    """What is asked of the database about watchers, by way of `PostgresHubStore`."""

    async def watchable(self, pairs: Sequence[Pair], *, asker: UserId | None = None) -> Mapping[Pair, WatchablePair]:
        """Return those of the pairs whose watcher may see the face; `asker` is the user who asks, if one does."""


Describe = Callable[[Mapping[Pair, Any]], Awaitable[Mapping[Pair, Presence]]]
"""Returns the presences of pairs that were found watchable."""


class WatchAnswer(NamedTuple):
    """What the database knew of a pair when the stamp was `since`."""

    since: int
    sight: Sight
    presence: Presence | None


class Watchers:
    """Who watches whom at this worker.

    A pair is in doubt from when something changed that may forbid it until the database was asked. What would be
    delivered meanwhile is held back: of each kind the newest, since each frame says all.
    """

    def __init__(self, record: WatchRecord, bus: Bus, *, describe: Describe) -> None:
        self._record = record
        self._bus = bus
        self._describe = describe
        self._watchers: dict[UserId, dict[Socket, Callable[[bytes], None]]] = {}
        self._sockets: dict[UserId, dict[Socket, None]] = {}
        self._doubts = Doubts(self._pairs)
        self._asking: asyncio.Task[None] | None = None
        self._has_doubts = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._is_failing = False

    @property
    def are_in_doubt(self) -> bool:
        """Whether anything is held back."""
        return bool(self._doubts)

    async def watch(self, socket: Socket, user_ids: Collection[UserId]) -> Mapping[UserId, Presence]:
        """Deliver the presence and the faces of users to a socket; return how they are seen now.

        Those that it may not see are left out. Raises Refused if the socket would watch too many.
        """
        new = {user_id for user_id in user_ids if user_id not in socket.watched}
        pairs = {Pair(socket.user_id, user_id) for user_id in user_ids}
        answers: dict[Pair, WatchAnswer] = {}
        seen: dict[UserId, Presence] = {}
        # In doubt first, and asked second: what changes in between is noticed.
        self._doubts.begin(pairs)
        try:
            self._add(socket, new)
            await self._bus.subscribe([channel(user_id) for user_id in new])
            open_pairs = list(pairs)
            for _ in range(TRIES):
                since = self._doubts.since()
                found = await self._record.watchable(open_pairs, asker=socket.user_id)
                presences = await self._describe(found)
                for pair in open_pairs:
                    answers[pair] = WatchAnswer(since, sight_of(found.get(pair)), presences.get(pair))
                open_pairs = [pair for pair, one in answers.items() if not self._doubts.is_current(pair, one.since)]
                if not open_pairs:
                    break
            for pair in open_pairs:
                del answers[pair]
            self.remove(socket, new & {pair.watched for pair, one in answers.items() if one.presence is None})
            if len(socket.watched) > MAX_WATCHED:
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"A connection can watch at most {MAX_WATCHED} users. Unwatch some first.",
                    path="user_ids",
                )
            for pair, (_, sight, presence) in answers.items():
                if presence is not None and pair.watched in socket.watched:
                    socket.watched[pair.watched] = sight
                    seen[pair.watched] = presence
        except BaseException:
            self.remove(socket, new)
            raise
        finally:
            # The reply is written before the loop gets to this: what is newer comes after it.
            self._loop.call_soon(self._release, Whole(socket.user_id, is_watcher=True), pairs, answers)
        return seen

    def remove(self, socket: Socket, user_ids: Iterable[UserId]) -> None:
        """Deliver them no more."""
        for user_id in user_ids:
            socket.watched.pop(user_id, None)
            watchers = self._watchers.get(user_id)
            if watchers is not None and watchers.pop(socket, None) is not None and not watchers:
                del self._watchers[user_id]
                self._bus.unsubscribe(channel(user_id))
            pair = Pair(socket.user_id, user_id)
            if self._doubts and not self._is_watched(pair):
                self._doubts.settle(pair)
        if not socket.watched and (sockets := self._sockets.get(socket.user_id)) is not None:
            sockets.pop(socket, None)
            if not sockets:
                del self._sockets[socket.user_id]

    def tell(self, user_id: UserId, frame: bytes, *, is_face: bool) -> None:
        """Write a user's presence, or their face, to the sockets that may have it."""
        needed = Sight.FACE if is_face else Sight.ALL
        in_doubt = self._doubts.of(user_id)
        for socket, write in self._watchers.get(user_id, {}).items():
            if in_doubt is not None and in_doubt.has(socket.user_id):
                self._doubts.hold(Pair(socket.user_id, user_id), frame, is_face=is_face)
            elif socket.watched[user_id] >= needed:
                write(frame)

    def doubt_watchers(self, user_id: UserId, watcher: UserId | None) -> None:
        """Ask again whether all who watch a user may, or one of them."""
        whole = Whole(user_id, is_watcher=False)
        if watcher is None and user_id in self._watchers:
            self._doubts.add_all(whole, cause=whole)
        elif watcher is not None and self._is_watched(pair := Pair(watcher, user_id)):
            self._doubts.add(pair, cause=whole)
        self._ask_soon()

    def doubt_watched(self, user_id: UserId, *, cause: Hashable = None) -> None:
        """Ask again whether a user may watch whom they watch. `cause`, or else the user, is what waits its turn."""
        if user_id in self._sockets:
            whole = Whole(user_id, is_watcher=True)
            self._doubts.add_all(whole, cause=whole if cause is None else cause)
        self._ask_soon()

    def doubt_all(self) -> None:
        """Ask again about everybody: news that forbids something may have been missed."""
        for user_id in self._sockets:
            self.doubt_watched(user_id)

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    # ------------------------------------------------------------------------------------------------- asking

    def _pairs(self, whole: Whole) -> set[Pair]:
        if whole.is_watcher:
            sockets = self._sockets.get(whole.user_id, {})
            return {Pair(whole.user_id, user_id) for socket in sockets for user_id in socket.watched}
        return {Pair(socket.user_id, whole.user_id) for socket in self._watchers.get(whole.user_id, {})}

    def _add(self, socket: Socket, user_ids: Iterable[UserId]) -> None:
        self._sockets.setdefault(socket.user_id, {})[socket] = None
        for user_id in user_ids:
            socket.watched[user_id] = Sight.NOTHING
            self._watchers.setdefault(user_id, {})[socket] = socket.write

    def _is_watched(self, pair: Pair) -> bool:
        return any(pair.watched in socket.watched for socket in self._sockets.get(pair.watcher, ()))

    def _ask_soon(self) -> None:
        if self._asking is None and self._doubts:
            self._asking = asyncio.create_task(self._ask())
        self._has_doubts.set()

    async def _ask(self) -> None:
        """Ask about all pairs in doubt, one statement after the other: many changes take no more of the database."""
        try:
            while True:
                self._has_doubts.clear()
                batch = self._doubts.take(self._loop.time())
                if batch.turns:
                    await self._ask_about(batch)
                elif (pause := self._doubts.pause(self._loop.time())) is not None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._has_doubts.wait(), pause)
                else:
                    return
        finally:
            self._asking = None

    async def _ask_about(self, batch: Batch) -> None:
        began = self._loop.time()
        try:
            found = await self._record.watchable(batch.pairs)
            regained = {pair: one for pair, one in found.items() if one.is_seen and self._is_unseen(pair)}
            presences = await self._describe(regained) if regained else {}
        except Exception as error:  # noqa: BLE001 - what is held back stays so until it could be asked
            if not self._is_failing:
                log_failure(log, "asking who may watch whom", error)
            self._is_failing = True
            if is_lost(error) and not isinstance(error, TimeoutError):
                # No cause is to blame, as it may be for a long statement. Each of thousands would fail alone.
                self._doubts.put_back(batch)
                await asyncio.sleep(LOST_SECONDS)
            else:
                self._doubts.failed(batch, self._loop.time())
            return
        seconds = self._loop.time() - began
        failed = self._decide_all({
            pair: WatchAnswer(batch.since, sight_of(found.get(pair)), presences.get(pair)) for pair in batch.pairs
        })  # fmt: skip
        self._doubts.answered(batch, self._loop.time(), seconds=seconds, failed=failed)
        self._is_failing = bool(failed)

    def _is_unseen(self, pair: Pair) -> bool:
        sockets = self._sockets.get(pair.watcher, ())
        return any(socket.watched.get(pair.watched, Sight.ALL) is not Sight.ALL for socket in sockets)

    def _release(self, watcher: Whole, pairs: Iterable[Pair], answers: Mapping[Pair, WatchAnswer]) -> None:
        """Decide about the pairs that a `watch` has asked about, unless another one still does. Ask again about those
        that it has no current answer of.
        """
        self._doubts.end(pairs)
        self._decide_all(answers)
        for pair in pairs:
            if not self._is_watched(pair):
                self._doubts.settle(pair)
            elif not self._doubts.is_asked_about(pair):
                self._doubts.ask_again(pair, cause=watcher)
        self._ask_soon()

    def _decide_all(self, answers: Mapping[Pair, WatchAnswer]) -> list[Pair]:
        """Decide about those pairs that nothing has put in doubt since they were asked about, and that no `watch` asks
        about. Return those with which that failed; they stay in doubt.
        """
        failed: list[Pair] = []
        for pair, (since, sight, presence) in answers.items():
            if self._doubts.is_current(pair, since) and not self._doubts.is_asked_about(pair):
                try:
                    self._decide(pair, sight, presence)
                except Exception as error:  # noqa: BLE001 - a defect with one pair decides nothing about the others
                    if not self._is_failing:
                        log_defect(log, "deciding who may watch whom", error)
                    self._is_failing = True
                    failed.append(pair)
        if failed:
            self._doubts.retry(failed, self._loop.time())
            self._ask_soon()
        return failed

    def _decide(self, pair: Pair, sight: Sight, presence: Presence | None) -> None:
        """Deliver what was held back of a user, as far as the watcher may see it, after their presence if the watcher
        may see that again. The pair stays in doubt if this fails.
        """
        frames = self._doubts.held(pair)
        for socket in list(self._sockets.get(pair.watcher, ())):
            before = socket.watched.get(pair.watched)
            if before is None:
                continue
            if before is Sight.ALL and sight is not Sight.ALL:
                socket.say(PresenceChanged(presence=Presence(user_id=pair.watched, status="offline")))
            elif before is not Sight.ALL and sight is Sight.ALL and presence is not None:
                socket.say(PresenceChanged(presence=presence))
            socket.watched[pair.watched] = sight
            for is_face, frame in frames.items():
                if sight >= (Sight.FACE if is_face else Sight.ALL):
                    socket.write(frame)
        self._doubts.settle(pair)


def sight_of(found: WatchablePair | None) -> Sight:
    """Return what a watcher may see, by what was found of the pair."""
    # In a conversation a face is seen when presence is not, whoever hides it from whom.
    return Sight.NOTHING if found is None else Sight.ALL if found.is_seen else Sight.FACE


def channel(user_id: UserId) -> bytes:
    """Return the bus channel of a user's presence and face."""
    return b"p:" + user_id.hex.encode()
