"""How long things took: counts in buckets that are two per cent apart, from a microsecond to hours."""

import math
from collections import Counter
from collections.abc import Iterable

STEPS = 50
"""Buckets for each factor of e."""


class Histogram:
    """Spans of time. Two of them add up to one, so every process keeps its own."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a span, `count` times."""
        self.counts[int(math.log(seconds * 1e6) * STEPS) if seconds > 1e-6 else 0] += count  # noqa: PLR2004

    def merge(self, others: "Iterable[Histogram]") -> "Histogram":
        """Take in what others counted."""
        for other in others:
            self.counts.update(other.counts)
        return self

    def __len__(self) -> int:
        return sum(self.counts.values())

    def percentile(self, share: float) -> float:
        """Return the span, in seconds, that `share` (0 to 1) of all are not longer than; 0 if there are none."""
        wanted = share * len(self)
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return math.exp((bucket + 1) / STEPS) / 1e6
        return 0.0
