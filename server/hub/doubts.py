"""Doubts: pairs of a watcher and a watched user that the database has to be asked about, some of each cause in turn."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import NamedTuple

from protocol.ids import UserId

PAIRS = 200
"""Max pairs in one statement: other causes wait for no more than these."""
SHARE = 50
"""Max pairs of one cause in one statement, while others wait."""
REST = 4
"""Rest of a cause after all its pairs were asked about, as a multiple of the time that took."""
RETRY_SECONDS, RETRY_MOST_SECONDS = 1.0, 10.0
"""Pause of a cause after a failure; it doubles with each one. The most that a cause rests or pauses."""


class Pair(NamedTuple):
    """A watcher and a watched user."""

    watcher: UserId
    watched: UserId


class Whole(NamedTuple):
    """All pairs of a watcher, or all pairs of a watched user."""

    user_id: UserId
    is_watcher: bool


class Doubt:
    """A pair in doubt. `stamp` tells when something last changed; `frames` are held back: of each kind, presence or
    face, the newest. `askers` counts the callers of `begin`.
    """

    __slots__ = ("askers", "frames", "stamp", "turn")

    def __init__(self) -> None:
        self.askers = 0
        self.stamp = 0
        self.turn: Turn | None = None
        self.frames: dict[bool, bytes] = {}


class Turn:
    """What one cause has put in doubt and nobody has asked about."""

    __slots__ = ("cause", "done", "failures", "most", "not_before", "pairs", "seconds", "wholes")

    def __init__(self, cause: Hashable) -> None:
        self.cause = cause
        self.pairs: OrderedDict[Pair, None] = OrderedDict()
        # Each with its stamp.
        self.wholes: OrderedDict[Whole, int] = OrderedDict()
        # Those of this round. One that is put in doubt again belongs to the next round, which a rest precedes.
        self.done: set[Whole] = set()
        self.seconds = 0.0
        self.not_before = 0.0
        self.failures = 0
        self.most = SHARE

    @property
    def next_whole(self) -> Whole | None:
        """The next one to look up the pairs of in this round."""
        whole = next(iter(self.wholes), None)
        return None if whole in self.done else whole


class Batch(NamedTuple):
    """Pairs for one statement. Its answer is about what had changed when the stamp was `since`."""

    since: int
    turns: dict[Turn, list[Pair]]

    @property
    def pairs(self) -> list[Pair]:
        """All of them."""
        return [pair for pairs in self.turns.values() for pair in pairs]


class InDoubt(NamedTuple):
    """Which watchers of one user are in doubt."""

    are_all: bool
    alone: Collection[UserId]
    with_all_they_watch: Collection[UserId]

    def has(self, watcher: UserId) -> bool:
        """Whether this one is."""
        return self.are_all or watcher in self.alone or watcher in self.with_all_they_watch


class Doubts:
    """The pairs in doubt. To put all pairs of a user in doubt costs the same however many they are."""

    def __init__(self, pairs_of: Callable[[Whole], Iterable[Pair]]) -> None:
        """`pairs_of` returns the pairs that there are now."""
        self._pairs_of = pairs_of
        self._doubts: dict[UserId, dict[UserId, Doubt]] = {}
        self._wholes: dict[Whole, Turn] = {}
        # Those of `_wholes` that are of watchers.
        self._watchers: set[UserId] = set()
        self._turns: OrderedDict[Hashable, Turn] = OrderedDict()
        self._stamp = 0

    def __bool__(self) -> bool:
        return bool(self._doubts or self._wholes)

    def add(self, pair: Pair, cause: Hashable) -> None:
        """Put a pair in doubt. It is asked about in the turn of the cause, or in an earlier one."""
        self._add(pair, cause, self.since())

    def add_all(self, whole: Whole, cause: Hashable) -> None:
        """Put all pairs of a user in doubt."""
        turn = self._wholes.get(whole)
        if turn is None:
            turn = self._wholes[whole] = self._turn(cause)
            if whole.is_watcher:
                self._watchers.add(whole.user_id)
        turn.wholes[whole] = self.since()

    def begin(self, pairs: Iterable[Pair]) -> None:
        """Put pairs in doubt that the caller asks about. They stay so until each caller has ended that."""
        for pair in pairs:
            self._there(pair).askers += 1

    def end(self, pairs: Iterable[Pair]) -> None:
        """End what `begin` began. The pairs are still in doubt."""
        for pair in pairs:
            self._there(pair).askers -= 1

    def is_asked_about(self, pair: Pair) -> bool:
        """Whether somebody has begun to ask about a pair."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return doubt is not None and doubt.askers > 0

    def since(self) -> int:
        """Return the stamp now."""
        self._stamp += 1
        return self._stamp

    def ask_again(self, pair: Pair, cause: Hashable) -> None:
        """Ask about a pair that is still in doubt, in the turn of the cause or in an earlier one."""
        if pair.watcher in self._doubts.get(pair.watched, {}):
            self._add(pair, cause, 0)

    def of(self, watched: UserId) -> InDoubt | None:
        """Return which watchers of a user are in doubt; None if none is."""
        are_all = Whole(watched, is_watcher=False) in self._wholes
        alone = self._doubts.get(watched, {})
        return InDoubt(are_all, alone, self._watchers) if are_all or alone or self._watchers else None

    def hold(self, pair: Pair, frame: bytes, *, is_face: bool) -> None:
        """Hold back a frame of a pair in doubt. It takes the place of an older one of its kind."""
        if pair.watcher not in self._doubts.get(pair.watched, {}):
            for turn, stamp in self._wholes_of(pair):
                self._add(pair, turn.cause, stamp)
        self._there(pair).frames[is_face] = frame

    def held(self, pair: Pair) -> dict[bool, bytes]:
        """Return what is held back of a pair."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return {} if doubt is None else doubt.frames

    def is_current(self, pair: Pair, since: int) -> bool:
        """Whether a pair is in doubt, and for nothing that came after this stamp."""
        doubt = self._doubts.get(pair.watched, {}).get(pair.watcher)
        return doubt is not None and max(doubt.stamp, *(stamp for _, stamp in self._wholes_of(pair)), 0) <= since

    def settle(self, pair: Pair) -> None:
        """Take a pair out of doubt, if it is, and drop what is held back. It stays in doubt while somebody asks."""
        of_watched = self._doubts.get(pair.watched, {})
        doubt = of_watched.get(pair.watcher)
        if doubt is None:
            return
        if doubt.turn is not None:
            del doubt.turn.pairs[pair]
        if doubt.askers:
            doubt.turn = None
            doubt.frames.clear()
            return
        del of_watched[pair.watcher]
        if not of_watched:
            del self._doubts[pair.watched]

    # -------------------------------------------------------------------------------------------------- in turn

    def take(self, now: float) -> Batch:
        """Return pairs to ask about, a share of each cause in turn; none if all causes rest."""
        batch, count = Batch(self.since(), {}), 0
        for _ in range(len(self._turns)):
            cause, turn = self._turns.popitem(last=False)
            if turn.not_before > now:
                self._turns[cause] = turn
            elif turn.failures and count:
                # It is asked about alone, so that nobody else's answers are lost with its own.
                self._turns[cause] = turn
                self._turns.move_to_end(cause, last=False)
                break
            elif turn.pairs or turn.wholes:
                self._turns[cause] = turn
                if some := self._share(turn):
                    batch.turns[turn] = some
                    count += len(some)
                if count > PAIRS - SHARE or (count and turn.failures):
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
            for pair in self._pairs_of(whole):
                self._add(pair, turn.cause, stamp)
        some = [turn.pairs.popitem(last=False)[0] for _ in range(min(turn.most, len(turn.pairs)))]
        for pair in some:
            self._there(pair).turn = None
        return some

    def pause(self, now: float) -> float | None:
        """Return in how many seconds there may be pairs to take; None if nothing is in doubt and no cause rests."""
        return min((max(0.0, turn.not_before - now) for turn in self._turns.values()), default=None)

    def answered(self, batch: Batch, now: float, *, seconds: float, failed: Collection[Pair] = ()) -> None:
        """Have the causes rest whose pairs were all asked about. Those with pairs that `failed` keep their pace."""
        count = len(batch.pairs)
        for turn, pairs in batch.turns.items():
            turn.seconds += seconds * len(pairs) / count
            if not turn.pairs and turn.next_whole is None:
                turn.not_before = now + min(REST * turn.seconds, RETRY_MOST_SECONDS)
                turn.seconds = 0.0
                turn.done.clear()
            if turn.failures and not any(pair in failed for pair in pairs):
                turn.failures, turn.most = 0, SHARE

    def retry(self, pairs: Iterable[Pair], now: float) -> None:
        """Ask again about pairs, each in a turn of its own that begins later each time: others do not wait for it."""
        for pair in pairs:
            self._add(pair, pair, 0)
            self._pause(self._turn(pair), now)

    def put_back(self, batch: Batch) -> None:
        """Ask again, as if nothing had been asked."""
        for turn, pairs in batch.turns.items():
            for pair in pairs:
                self.ask_again(pair, turn.cause)

    def failed(self, batch: Batch, now: float) -> None:
        """Ask again, each cause by itself, and later and about fewer pairs each time that this fails."""
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
