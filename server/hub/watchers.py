"""Watchers: the sockets that receive a user's presence and face, and whether they still may."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from protocol.codec import encode, text_frame
from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_SHARED_PARTICIPANTS, MAX_WATCHED
from protocol.server import PresenceChanged, UserUpdated
from protocol.values import Presence, User
from server.core.errors import log_defect, log_failure
from server.core.faults import is_lost
from server.hub.bus import Bus
from server.hub.doubts import Batch, Doubts, HeldFrame, Pair, Whole
from server.hub.online_users import Sight, Socket
from server.hub.paced import PacedFrames

TRIES = 3
"""Max reads per `watch`, if their result is outdated by changes meanwhile."""

LOST_SECONDS = 1.0
"""Pause of all checks during an outage of the database, in seconds."""

log = logging.getLogger(__name__)


class WatchablePair(Protocol):
    """The database's result for a pair whose watcher may see at least the face. `Watchable` of `queries`
    implements it.
    """

    @property
    def is_seen(self) -> bool:
        """Whether the watcher may also see the presence."""

    @property
    def face(self) -> User:
        """The face of the watched user."""


class WatchStore(Protocol):
    """Queries about watchers. `PostgresHubStore` implements them."""

    async def watchable(
        self, pairs: Sequence[Pair], *, asker: UserId | None = None
    ) -> tuple[Mapping[Pair, WatchablePair], int]:
        """Return the pairs whose watcher may see at least the face, and the revision of that. `asker` is the user who
        asks, or None.
        """


Describe = Callable[[Mapping[Pair, Any]], Awaitable[Mapping[Pair, Presence]]]
"""Returns the presences of watchable pairs."""


class WatchAnswer(NamedTuple):
    """The database's result for a pair, with all changes up to the stamp `since`. `revision` is that of the presence,
    also for a watcher who may not see it. `found` is None for a watcher who may not even see the face.
    """

    since: int
    found: WatchablePair | None
    presence: Presence | None
    revision: int

    @property
    def sight(self) -> Sight:
        """The parts of the user that the watcher may see."""
        # Participants of a conversation see each other's faces, even when presence is hidden.
        return Sight.NOTHING if self.found is None else Sight.ALL if self.found.is_seen else Sight.FACE


class Watchers:
    """The watchers and watched users at this worker.

    A pair is in doubt from a change that may forbid it until the next check in the database. Frames for it are held
    meanwhile. Only the newest of each kind is kept, because each has the whole state.
    """

    def __init__(self, store: WatchStore, bus: Bus, *, describe: Describe) -> None:
        self._store = store
        self._bus = bus
        self._describe = describe
        self._watchers: dict[UserId, dict[Socket, Callable[[bytes], None]]] = {}
        self._sockets: dict[UserId, dict[Socket, None]] = {}
        self._doubts = Doubts(self._pairs)
        self._paced = PacedFrames(self._write)
        self._asking: asyncio.Task[None] | None = None
        self._has_doubts = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._is_failing = False

    @property
    def are_in_doubt(self) -> bool:
        """Whether any pair is in doubt."""
        return bool(self._doubts)

    async def watch(self, socket: Socket, user_ids: Collection[UserId]) -> Mapping[UserId, Presence]:
        """Deliver the presence and the faces of users to a socket. Return their current presences.

        Users that the socket may not see are left out. Raises Refused if the socket watches too many users.
        """
        new = {user_id for user_id in user_ids if user_id not in socket.watched}
        pairs = {Pair(socket.user_id, user_id) for user_id in user_ids}
        answers: dict[Pair, WatchAnswer] = {}
        seen: dict[UserId, Presence] = {}
        # The pairs are in doubt before the query, so that a change in between is noticed.
        self._doubts.begin(pairs)
        try:
            self._add(socket, new)
            await self._bus.subscribe([channel(user_id) for user_id in new])
            open_pairs = list(pairs)
            for _ in range(TRIES):
                since = self._doubts.since()
                found, revision = await self._store.watchable(open_pairs, asker=socket.user_id)
                presences = await self._describe(found)
                for pair in open_pairs:
                    answers[pair] = WatchAnswer(since, found.get(pair), presences.get(pair), revision)
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
            for pair, answer in answers.items():
                if answer.presence is not None and pair.watched in socket.watched:
                    socket.watched[pair.watched] = answer.sight
                    seen[pair.watched] = answer.presence
        except BaseException:
            self.remove(socket, new)
            raise
        finally:
            # The reply is written before the loop calls this, so newer frames follow it.
            self._loop.call_soon(self._release, Whole(socket.user_id, is_watcher=True), pairs, answers)
        return seen

    def remove(self, socket: Socket, user_ids: Iterable[UserId]) -> None:
        """Stop delivering these users to a socket."""
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

    def deliver(self, user_id: UserId, frame: bytes, revision: int, *, is_face: bool) -> None:
        """Write a user's presence or face to the sockets that may see it. If there are very many, it may wait for
        `CROWD_SECONDS`.
        """
        held = HeldFrame(revision, frame)
        is_crowd = len(self._watchers.get(user_id, ())) > MAX_SHARED_PARTICIPANTS
        # When watchers have left, a frame must not overtake an earlier one that waits.
        is_paced = is_crowd or self._paced.is_waiting(user_id)
        if not is_paced or self._paced.has_passed(user_id, held, is_face=is_face):
            self._write(user_id, held, is_face)

    def _write(self, user_id: UserId, held: HeldFrame, is_face: bool) -> None:  # noqa: FBT001 - a callback
        needed = Sight.FACE if is_face else Sight.ALL
        in_doubt = self._doubts.of(user_id)
        for socket, write in self._watchers.get(user_id, {}).items():
            if in_doubt is not None and in_doubt.has(socket.user_id):
                self._doubts.hold(Pair(socket.user_id, user_id), held, is_face=is_face)
            elif socket.watched[user_id] >= needed:
                write(held.frame)

    def doubt_watchers(self, user_id: UserId, watcher: UserId | None) -> None:
        """Check again whether those who watch a user may do so, or whether `watcher` may."""
        whole = Whole(user_id, is_watcher=False)
        if watcher is None and user_id in self._watchers:
            self._doubts.add_all(whole, cause=whole)
        elif watcher is not None and self._is_watched(pair := Pair(watcher, user_id)):
            self._doubts.add(pair, cause=whole)
        self._ask_soon()

    def doubt_watched(self, user_id: UserId, *, cause: Hashable = None) -> None:
        """Check again whether a user may watch those whom the user watches. `cause`, by default the user, takes turns
        with others.
        """
        if user_id in self._sockets:
            whole = Whole(user_id, is_watcher=True)
            self._doubts.add_all(whole, cause=whole if cause is None else cause)
        self._ask_soon()

    def missed(self, user_id: UserId) -> None:
        """Check again whether those who watch a user may do so, and send them the presence and the face, because these
        may have been missed.
        """
        if user_id in self._watchers:
            whole = Whole(user_id, is_watcher=False)
            self._doubts.add_all(whole, cause=whole, is_missed=True)
            self._ask_soon()

    def missed_all(self) -> None:
        """Check all pairs again, and send all presences and faces, because news that forbids some, or these, may have
        been missed.
        """
        for user_id in self._sockets:
            whole = Whole(user_id, is_watcher=True)
            self._doubts.add_all(whole, cause=whole, is_missed=True)
        self._ask_soon()

    def close(self) -> None:
        """Cancel the checks and the frames that wait."""
        self._paced.close()
        if self._asking is not None:
            self._asking.cancel()

    # ------------------------------------------------------------------------------------------------- checks

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
        """Check all pairs in doubt, one statement after the other, so that many changes do not load the
        database more.
        """
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
            found, revision = await self._store.watchable(batch.pairs)
            shown = {
                pair: one
                for pair, one in found.items()
                if self._doubts.is_missed(pair) or (one.is_seen and self._is_unseen(pair))
            }
            presences = await self._describe(shown) if shown else {}
        except Exception as error:  # noqa: BLE001 - held frames stay until a check succeeds
            if not self._is_failing:
                log_failure(log, "checking who may watch whom", error)
            self._is_failing = True
            if is_lost(error) and not isinstance(error, TimeoutError):
                # The whole database is lost, so no cause is delayed. Otherwise each of thousands would fail separately.
                self._doubts.put_back(batch)
                await asyncio.sleep(LOST_SECONDS)
            else:
                self._doubts.failed(batch, self._loop.time())
            return
        seconds = self._loop.time() - began
        failed = self._decide_all({
            pair: WatchAnswer(batch.since, found.get(pair), presences.get(pair), revision)
            for pair in batch.pairs
        })  # fmt: skip
        self._doubts.answered(batch, self._loop.time(), seconds=seconds, failed=failed)
        self._is_failing = bool(failed)

    def _is_unseen(self, pair: Pair) -> bool:
        sockets = self._sockets.get(pair.watcher, ())
        return any(socket.watched.get(pair.watched, Sight.ALL) is not Sight.ALL for socket in sockets)

    def _release(self, watcher: Whole, pairs: Iterable[Pair], answers: Mapping[Pair, WatchAnswer]) -> None:
        """Decide about the pairs of a `watch`, unless another one still checks them. Check those without a current
        result again.
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
        """Decide about pairs that were not put in doubt again, and that no `watch` checks. Return the pairs for which
        that failed, which stay in doubt.
        """
        failed: list[Pair] = []
        for pair, answer in answers.items():
            if self._doubts.is_current(pair, answer.since) and not self._doubts.is_asked_about(pair):
                try:
                    self._decide(pair, answer)
                except Exception as error:  # noqa: BLE001 - a defect with one pair must not affect others
                    if not self._is_failing:
                        log_defect(log, "deciding who may watch whom", error)
                    self._is_failing = True
                    failed.append(pair)
        if failed:
            self._doubts.retry(failed, self._loop.time())
            self._ask_soon()
        return failed

    def _decide(self, pair: Pair, answer: WatchAnswer) -> None:
        """Deliver the held frames that the watcher may see. The presence and the face precede them if the watcher
        may see these again, or if some were missed. The pair stays in doubt if this fails.
        """
        frames = self._doubts.held(pair)
        is_missed = self._doubts.is_missed(pair)
        sight = answer.sight
        for socket in list(self._sockets.get(pair.watcher, ())):
            before = socket.watched.get(pair.watched)
            if before is None:
                continue
            if before is Sight.ALL and sight is not Sight.ALL:
                hidden = Presence(user_id=pair.watched, status="offline", revision=answer.revision)
                socket.write(text_frame(encode(PresenceChanged(presence=hidden))))
            elif answer.presence is not None and (is_missed or before is not sight is Sight.ALL):
                # A watcher who may not see the presence receives `offline`, as for a user who is.
                socket.write(text_frame(encode(PresenceChanged(presence=answer.presence))))
            if answer.found is not None and (is_missed or before is Sight.NOTHING):
                socket.write(text_frame(encode(UserUpdated(user=answer.found.face))))
            socket.watched[pair.watched] = sight
            for is_face, held in frames.items():
                if sight >= (Sight.FACE if is_face else Sight.ALL):
                    socket.write(held.frame)
        self._doubts.settle(pair)


def channel(user_id: UserId) -> bytes:
    """Return the bus channel of a user's presence and face."""
    return b"p:" + user_id.hex.encode()
