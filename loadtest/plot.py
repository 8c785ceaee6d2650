"""Line plots as SVG, without external resources, for a report in one file."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
STEPS = (1, 2, 5)


class Series(NamedTuple):
    """A named line through points."""

    name: str
    points: Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """An axis, with its title and range."""

    title: str
    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value, from 0 to 1."""
        low, high, value = (max(1e-9, one) for one in (self.low, self.high, value))
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Return round values along the axis."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = STEPS if last - first <= 2 else (1,)  # noqa: PLR2004 - few decades have room for more ticks
            ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            rough = (self.high - self.low) / 4
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(one * power for one in (*STEPS, 10) if one * power >= rough)
            ticks = [step * count for count in range(math.ceil(self.low / step), int(self.high / step) + 1)]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def axis(title: str, values: Sequence[float], *, is_log: bool = False) -> Axis:
    """Return an axis that includes all values. It begins at zero unless it is logarithmic."""
    positive = [value for value in values if value > 0] or [1.0]
    high = max(positive) * (1.3 if is_log else 1.08)
    return Axis(title, min(positive) / 1.3 if is_log else 0.0, high, is_log)


def svg(series: Sequence[Series], x: Axis, y: Axis, *, spans: Sequence[tuple[float, float, str]] = ()) -> str:
    """Return a plot. `spans` are shaded ranges of x values with names."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y.title)} by {escape(x.title)}">']
    for begin, end, name in spans:
        left, right = _across(x, begin), _across(x, end)
        parts.append(
            f'<rect class="span" x="{left:.1f}" width="{max(1.5, right - left):.1f}" y="{TOP}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(name)}</title></rect>'
        )
    for tick in y.ticks():
        at = _down(y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in x.ticks():
        at = _across(x, tick)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:,.6g}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x.title)}</text>')
    for number, one in enumerate(series):
        way = " ".join(f"{_across(x, first):.1f},{_down(y, second):.1f}" for first, second in one.points)
        parts.append(f'<polyline class="line s{number}" points="{way}"><title>{escape(one.name)}</title></polyline>')
    parts.append("</svg>")
    legend = " ".join(f'<span class="s{number}">{escape(one.name)}</span>' for number, one in enumerate(series))
    return f"<figure><figcaption>{escape(y.title)} <small>{legend}</small></figcaption>{''.join(parts)}</figure>"


def _across(x: Axis, value: float) -> float:
    return LEFT + x.place(value) * (WIDTH - LEFT - RIGHT)


def _down(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM)
