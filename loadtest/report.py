"""The report: one self-contained HTML file with tables and plots, in a light or dark color scheme."""

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import msgspec

from loadtest import figures
from loadtest.counters import Tally
from loadtest.histogram import Histogram
from loadtest.plot import Series, axis, svg
from loadtest.run import Moment, Phase, Result
from server.core.atomic_file import aside

MS = 1_000
SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --s0: #2563eb; --s1: #ea580c; --s2: #16a34a; --s3: #9333ea }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.verdict { padding: .6rem 1rem; border-radius: .5rem; font-weight: 600; color: #fff }
.good { background: #15803d } .bad { background: #b91c1c }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td { padding: .2rem .5rem; border-bottom: 1px solid var(--line) } td + td { text-align: right }
figure { margin: 1.2rem 0 } figcaption { font-weight: 600 } small span { margin-left: .8em; font-weight: 400 }
svg { width: 100% } .grid { stroke: var(--line) } .tick { font-size: 11px; fill: currentColor; opacity: .7 }
.span { fill: #ea580c44 } .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
.s0 { color: var(--s0) } .s1 { color: var(--s1) } .s2 { color: var(--s2) } .s3 { color: var(--s3) }
"""


def write(folder: Path, name: str, results: msgspec.Struct, text: str) -> Path:
    """Write results as JSON, and their page `text` as HTML. Return the path of the page. Raises Fatal if that fails."""
    stem = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with aside(stem.with_suffix(".json")) as write_json:
        write_json(msgspec.json.format(msgspec.json.encode(results)))
    with aside(stem.with_suffix(".html")) as write_html:
        write_html(text.encode())
    return stem.with_suffix(".html")


def page(result: Result) -> str:
    """Return the report of a run."""
    is_good, sentence = figures.verdict(result)
    title = f"{result.scenario} at {result.where}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{time.strftime('%Y-%m-%d %H:%M')}: {result.people:,} people, {result.connections:,} connections.</p>",
        f"<p>{escape(str(result.load_average))}</p>",
        f"<p class='verdict {'good' if is_good else 'bad'}'>{escape(sentence)}</p>",
    ]
    driven = result.phases[1:]
    if len({phase.rate for phase in driven}) > 1:
        parts.append(_limit(driven))
    parts += [_phase(phase, result) for phase in result.phases]
    return "\n".join(parts) + "\n"


def _limit(phases: list[Phase]) -> str:
    """Return a plot of latency by offered rate."""
    rates = sorted(phases, key=lambda phase: phase.rate)
    spans = [(phase.rate, Histogram(phase.tally.deliveries or phase.tally.answers)) for phase in rates]
    series = [
        Series(name, [(rate, span.percentile(share) * MS) for rate, span in spans])
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]
    values = [value for one in series for _, value in one.points]
    plot = svg(series, axis("offered per second", [rate for rate, _ in spans]), axis("ms", values, is_log=True))
    return "<h2>Search for the limit</h2>" + plot


def _phase(phase: Phase, result: Result) -> str:
    title = phase.name + (f" at {phase.rate:,.0f} per second" if phase.rate else "")
    rows = "".join(f"<tr><td>{escape(one.name)}<td>{escape(one.value)}" for one in figures.of_phase(phase, result))
    plots = "".join(_over_time(phase.moments, phase.tally) + _distributions(phase.tally))
    return f"<h2>{escape(title)}</h2><table>{rows}</table>{plots}"


def _over_time(moments: Sequence[Moment], tally: Tally) -> list[str]:
    if len(moments) < 2:  # noqa: PLR2004 - one point is no line
        return []
    seconds = axis("seconds", [moment.at for moment in moments])
    plots = []
    if tally.sent:
        flow = [Series("sent", [(one.at, one.sent) for one in moments])]
        if tally.delivered:
            flow.append(Series("delivered", [(one.at, one.delivered) for one in moments]))
        values = [value for one in flow for _, value in one.points]
        plots.append(svg(flow, seconds, axis("per second", values, is_log=max(values) > 20 * min(values))))
        late = [
            Series("answer p50", [(one.at, one.answer_p50 * MS) for one in moments if one.answer_p50]),
            Series("answer p99", [(one.at, one.answer_p99 * MS) for one in moments if one.answer_p99]),
            Series("delivery p99", [(one.at, one.delivery_p99 * MS) for one in moments if one.delivery_p99]),
        ]
        late = [one for one in late if one.points]
        plots.append(svg(late, seconds, axis("ms", [value for one in late for _, value in one.points], is_log=True)))
    if any(one.returned for one in moments):
        back = Series("reconnected", [(one.at, one.returned) for one in moments])
        plots.append(svg([back], seconds, axis("reconnected per second", [one.returned for one in moments])))
    if any(one.cpu for one in moments):
        kinds = sorted({kind for one in moments for kind in one.cpu})
        used = [Series(kind, [(one.at, one.cpu.get(kind, 0.0)) for one in moments]) for kind in kinds]
        plots.append(svg(used, seconds, axis("cores", [value for one in used for _, value in one.points])))
    return plots


def _distributions(tally: Tally) -> list[str]:
    spans = [("answers", tally.answers), ("deliveries", tally.deliveries), ("connects", tally.opened)]
    curves = [
        Series(name, [(1 / (1 - share), Histogram(counts).percentile(share) * MS) for share in SHARES])
        for name, counts in spans
        if counts
    ]
    if not curves:
        return []
    slow = axis("one in this many is slower", [1 / (1 - share) for share in SHARES], is_log=True)
    values = [value for one in curves for _, value in one.points]
    return [svg(curves, slow, axis("max ms", values, is_log=True))]
