"""A histogram of durations, with buckets two per cent apart, from a microsecond to hours."""

import math
from collections import Counter
from collections.abc import Iterable

STEPS = 50
"""Buckets per factor of e."""


class Histogram:
    """A histogram of durations. Histograms can be merged, so each process has its own."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration `count` times."""
        self.counts[int(math.log(seconds * 1e6) * STEPS) if seconds > 1e-6 else 0] += count  # noqa: PLR2004

    def merge(self, others: "Iterable[Histogram]") -> "Histogram":
        """Add the counts of other histograms."""
        for other in others:
            self.counts.update(other.counts)
        return self

    def __len__(self) -> int:
        return sum(self.counts.values())

    def percentile(self, share: float) -> float:
        """Return the percentile for a `share` from 0 to 1, in seconds, or 0 without durations."""
        wanted = share * len(self)
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return math.exp((bucket + 1) / STEPS) / 1e6
        return 0.0
