"""Doubts: pairs of a watcher and a watched user that have to be checked in the database. Causes take turns."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import NamedTuple

from protocol.ids import UserId

PAIRS = 200
"""Max pairs per statement. Other causes wait for at most that many."""
PAIRS_PER_CAUSE = 50
"""Max pairs of one cause per statement, while others wait."""
CHECK_PAUSE_FACTOR = 4
"""Pause of a cause after all its pairs were checked, as a multiple of the duration of the checks."""
RETRY_SECONDS, RETRY_MOST_SECONDS = 1.0, 10.0
"""Pause of a cause after a failure, which doubles with each one, and the max pause of a cause."""


class Pair(NamedTuple):
    """A watcher and a watched user."""

    watcher: UserId
    watched: UserId


class Whole(NamedTuple):
    """All pairs of a watcher, or all pairs of a watched user."""

    user_id: UserId
    is_watcher: bool


class HeldFrame(NamedTuple):
    """A frame for a pair in doubt, and its revision."""

    revision: int
    frame: bytes


class Doubt:
    """A pair in doubt. `stamp` is the time of the last change that concerns it, as a counter. `frames` has the latest
    held frame of each kind, presence or face. `askers` is the number of callers of `begin` that have not ended.
    `is_missed` tells whether frames may have been lost.
    """

    __slots__ = ("askers", "frames", "is_missed", "stamp", "turn")

    def __init__(self) -> None:
        self.askers = 0
        self.stamp = 0
        self.is_missed = False
        self.turn: Turn | None = None
        self.frames: dict[bool, HeldFrame] = {}


class Turn:
    """The pairs of one cause that are in doubt and not being checked."""

    __slots__ = ("cause", "done", "failures", "most", "not_before", "pairs", "seconds", "wholes")

    def __init__(self, cause: Hashable) -> None:
        self.cause = cause
        self.pairs: OrderedDict[Pair, None] = OrderedDict()
        # Each has its stamp.
        self.wholes: OrderedDict[Whole, int] = OrderedDict()
        # Those of the current round. One that is put in doubt again belongs to the next round, after a pause.
        self.done: set[Whole] = set()
        self.seconds = 0.0
        self.not_before = 0.0
        self.failures = 0
        self.most = PAIRS_PER_CAUSE

    @property
    def next_whole(self) -> Whole | None:
        """The next one of this round whose pairs are not looked up yet."""
        whole = next(iter(self.wholes), None)
        return None if whole in self.done else whole


class Batch(NamedTuple):
    """Pairs of one statement. Its result includes all changes up to the stamp `since`."""

    since: int
    turns: dict[Turn, list[Pair]]

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of the batch."""
        return [pair for pairs in self.turns.values() for pair in pairs]


class InDoubt(NamedTuple):
    """The watchers of one user that are in doubt."""

    are_all: bool
    alone: Collection[UserId]
    with_all_they_watch: Collection[UserId]

    def has(self, watcher: UserId) -> bool:
        """Whether a watcher is in doubt."""
        return self.are_all or watcher in self.alone or watcher in self.with_all_they_watch


class Doubts:
    """All pairs in doubt. Putting all pairs of a user in doubt takes constant time."""

    def __init__(self, pairs_of: Callable[[Whole], Iterable[Pair]]) -> None:
        """`pairs_of` returns the current pairs."""
        self._pairs_of = pairs_of
        self._doubts: dict[UserId, dict[UserId, Doubt]] = {}
        self._wholes: dict[Whole, Turn] = {}
        # Those in `_wholes` whose frames may have been lost.
        self._missed: set[Whole] = set()
        # The watchers in `_wholes`.
        self._watchers: set[UserId] = set()
        self._turns: OrderedDict[Hashable, Turn] = OrderedDict()
        self._stamp = 0

    def __bool__(self) -> bool:
        return bool(self._doubts or self._wholes)

    def add(self, pair: Pair, cause: Hashable) -> None:
        """Put a pair in doubt. It is checked in the turn of its cause, or in an earlier one."""
        self._add(pair, cause, self.since())

    def add_all(self, whole: Whole, cause: Hashable, *, is_missed: bool = False) -> None:
        """Put all pairs of a user in doubt. `is_missed` tells whether frames for them may have been lost."""
        turn = self._wholes.get(whole)
        if turn is None:
            turn = self._wholes[whole] = self._turn(cause)
            if whole.is_watcher:
                self._watchers.add(whole.user_id)
        turn.wholes[whole] = self.since()
        if is_missed:
            self._missed.add(whole)

    def begin(self, pairs: Iterable[Pair]) -> None:
        """Put pairs in doubt that the caller checks. They stay in doubt until each caller has called `end`."""
        for pair in pairs:
            self._there(pair).askers += 1

    def end(self, pairs: Iterable[Pair]) -> None:
        """End what `begin` began. The pairs are still in doubt."""
        for pair in pairs:
            self._there(pair).askers -= 1

    def is_asked_about(self, pair: Pair) -> bool:
        """Whether a caller of `begin` checks a pair now."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return doubt is not None and doubt.askers > 0

    def since(self) -> int:
        """Return a new stamp."""
        self._stamp += 1
        return self._stamp

    def ask_again(self, pair: Pair, cause: Hashable) -> None:
        """Check a pair that is still in doubt, in the turn of the cause or in an earlier one."""
        if pair.watcher in self._doubts.get(pair.watched, {}):
            self._add(pair, cause, 0)

    def of(self, watched: UserId) -> InDoubt | None:
        """Return the watchers of a user that are in doubt, or None if none is."""
        are_all = Whole(watched, is_watcher=False) in self._wholes
        alone = self._doubts.get(watched, {})
        return InDoubt(are_all, alone, self._watchers) if are_all or alone or self._watchers else None

    def hold(self, pair: Pair, held: HeldFrame, *, is_face: bool) -> None:
        """Hold a frame for a pair in doubt. Of each kind, only the one with the highest revision is kept."""
        if pair.watcher not in self._doubts.get(pair.watched, {}):
            for turn, stamp in self._wholes_of(pair):
                self._add(pair, turn.cause, stamp)
        frames = self._there(pair).frames
        if is_face not in frames or held.revision >= frames[is_face].revision:
            frames[is_face] = held

    def held(self, pair: Pair) -> dict[bool, HeldFrame]:
        """Return the held frames of a pair."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return {} if doubt is None else doubt.frames

    def is_current(self, pair: Pair, since: int) -> bool:
        """Whether a pair is in doubt, and only because of changes up to the stamp `since`."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return doubt is not None and max(doubt.stamp, *(stamp for _, stamp in self._wholes_of(pair)), 0) <= since

    def is_missed(self, pair: Pair) -> bool:
        """Whether frames for a pair in doubt may have been lost."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return doubt is not None and doubt.is_missed

    def settle(self, pair: Pair) -> None:
        """Remove a doubt and its held frames. The pair stays in doubt while a caller of `begin` checks it."""
        of_watched = self._doubts.get(pair.watched, {})
        doubt = of_watched.get(pair.watcher)
        if doubt is None:
            return
        if doubt.turn is not None:
            del doubt.turn.pairs[pair]
        if doubt.askers:
            doubt.turn = None
            doubt.is_missed = False
            doubt.frames.clear()
            return
        del of_watched[pair.watcher]
        if not of_watched:
            del self._doubts[pair.watched]

    # ---------------------------------------------------------------------------------------------------- turns

    def take(self, now: float) -> Batch:
        """Return pairs to check, a share of each cause in turn. The batch is empty if all causes pause."""
        batch, count = Batch(self.since(), {}), 0
        for _ in range(len(self._turns)):
            cause, turn = self._turns.popitem(last=False)
            if turn.not_before > now:
                self._turns[cause] = turn
            elif turn.failures and count:
                # Check it alone, so that its failure does not affect other causes.
                self._turns[cause] = turn
                self._turns.move_to_end(cause, last=False)
                break
            elif turn.pairs or turn.wholes:
                self._turns[cause] = turn
                if some := self._share(turn):
                    batch.turns[turn] = some
                    count += len(some)
                if count > PAIRS - PAIRS_PER_CAUSE or (count and turn.failures):
                    break
        return batch

    def _share(self, turn: Turn) -> list[Pair]:
        if not turn.pairs:
            turn.done.clear()
        while len(turn.pairs) < turn.most and (whole := turn.next_whole) is not None:
            stamp = turn.wholes.pop(whole)
            del self._wholes[whole]
            if whole.is_watcher:
                self._watchers.discard(whole.user_id)
            turn.done.add(whole)
            is_missed = whole in self._missed
            self._missed.discard(whole)
            for pair in self._pairs_of(whole):
                self._add(pair, turn.cause, stamp)
                self._there(pair).is_missed |= is_missed
        some = [turn.pairs.popitem(last=False)[0] for _ in range(min(turn.most, len(turn.pairs)))]
        for pair in some:
            self._there(pair).turn = None
        return some

    def pause(self, now: float) -> float | None:
        """Return the seconds until there may be pairs to check. Return None if nothing is in doubt and no
        cause pauses.
        """
        return min((max(0.0, turn.not_before - now) for turn in self._turns.values()), default=None)

    def answered(self, batch: Batch, now: float, *, seconds: float, failed: Collection[Pair] = ()) -> None:
        """Make causes pause whose pairs are all checked. Causes with pairs that `failed` keep their delays."""
        count = len(batch.pairs)
        for turn, pairs in batch.turns.items():
            turn.seconds += seconds * len(pairs) / count
            if not turn.pairs and turn.next_whole is None:
                turn.not_before = now + min(CHECK_PAUSE_FACTOR * turn.seconds, RETRY_MOST_SECONDS)
                turn.seconds = 0.0
                turn.done.clear()
            if turn.failures and not any(pair in failed for pair in pairs):
                turn.failures, turn.most = 0, PAIRS_PER_CAUSE

    def retry(self, pairs: Iterable[Pair], now: float) -> None:
        """Check pairs again, each as a cause of its own with growing delays, so that others do not wait."""
        for pair in pairs:
            self._add(pair, pair, 0)
            self._pause(self._turn(pair), now)

    def put_back(self, batch: Batch) -> None:
        """Check the pairs of a batch again, without a delay."""
        for turn, pairs in batch.turns.items():
            for pair in pairs:
                self.ask_again(pair, turn.cause)

    def failed(self, batch: Batch, now: float) -> None:
        """Check the pairs again, each cause alone. With each further failure, the delay grows and the number of pairs
        shrinks.
        """
        for turn, pairs in batch.turns.items():
            if len(batch.turns) == 1:
                turn.most = max(1, len(pairs) // 2)
                self._pause(turn, now)
            else:
                turn.failures = max(1, turn.failures)
        self.put_back(batch)

    def _pause(self, turn: Turn, now: float) -> None:
        turn.not_before = now + min(RETRY_SECONDS * 2**turn.failures, RETRY_MOST_SECONDS)
        turn.failures = min(turn.failures + 1, 10)

    def _add(self, pair: Pair, cause: Hashable, stamp: int) -> None:
        doubt = self._there(pair)
        doubt.stamp = max(doubt.stamp, stamp)
        if doubt.turn is None:
            doubt.turn = self._turn(cause)
            doubt.turn.pairs[pair] = None

    def _wholes_of(self, pair: Pair) -> list[tuple[Turn, int]]:
        if not self._wholes:
            return []
        both = Whole(pair.watcher, is_watcher=True), Whole(pair.watched, is_watcher=False)
        return [(turn, turn.wholes[whole]) for whole in both if (turn := self._wholes.get(whole)) is not None]

    def _there(self, pair: Pair) -> Doubt:
        of_watched = self._doubts.setdefault(pair.watched, {})
        doubt = of_watched.get(pair.watcher)
        if doubt is None:
            doubt = of_watched[pair.watcher] = Doubt()
        return doubt

    def _turn(self, cause: Hashable) -> Turn:
        turn = self._turns.get(cause)
        if turn is None:
            turn = self._turns[cause] = Turn(cause)
        return turn
