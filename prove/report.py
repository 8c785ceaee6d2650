"""The results, as cells of a table, as a sentence, and as one HTML file with a timeline."""

import time
from html import escape

from loadtest.plot import Series, axis, svg
from loadtest.report import STYLE
from prove.run import Outcome, Proof

HEADS = ("fault", "at", "sent", "acknowledged", "lost", "duplicated", "out of order", "phantom", "wrong",
         "reconnects", "wait p50", "wait max")  # fmt: skip
WIDE = "body { max-width: 62rem } th { text-align: right; font-weight: 600 } th:first-child { text-align: left }"


def cells(outcome: Outcome) -> list[str]:
    """Return the figures of one row of the table, without its name. Without frames, most columns have no figures."""
    counts = (
        outcome.sent, outcome.acknowledged, outcome.lost, outcome.duplicated, outcome.out_of_order, outcome.phantom,
    )  # fmt: skip
    if not outcome.sent:
        return [*(f"{count:,}" if count else "-" for count in counts), f"{outcome.wrong:,}", "-", "-", "-"]
    return [
        *(f"{count:,}" for count in (*counts, outcome.wrong, outcome.reconnects)),
        f"{outcome.wait_p50:.2f} s", f"{outcome.wait_max:.2f} s",
    ]  # fmt: skip


def verdict(proof: Proof) -> str:
    """Return one sentence about the whole run."""
    acknowledged = sum(one.acknowledged for one in proof.outcomes)
    phases = sum(one.sent > 0 for one in proof.outcomes)
    if proof.is_good:
        return (
            f"{acknowledged:,} frames were answered in {'1 phase' if phases == 1 else f'{phases} phases'}. "
            "Nothing was lost, duplicated, out of order, phantom or wrong."
        )
    broken = [one.name for one in proof.outcomes if not one.is_good]
    return f"Guarantees were violated in: {', '.join(dict.fromkeys(broken))}." if broken else "No phase was completed."


def page(proof: Proof) -> str:
    """Return the report as one self-contained HTML file."""
    rows = "".join(
        f"<tr><td title='{escape(one.about)}'>{escape(one.name)}<td>{one.begin:.0f} s"
        + "".join(f"<td>{cell}" for cell in cells(one))
        for one in proof.outcomes
    )
    violations = "".join(
        f"<li>{escape(one.name)}: {escape(violation)}" for one in proof.outcomes for violation in one.violations
    )
    return "".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
            f"<title>openchat prove</title><style>{STYLE}{WIDE}</style><h1>openchat prove</h1>",
            f"<p>{time.strftime('%Y-%m-%d %H:%M')}: {escape(_circumstances(proof))}</p>",
            f"<p>{escape(str(proof.load_average))}</p>",
            f"<p class='verdict {'good' if proof.is_good else 'bad'}'>{escape(verdict(proof))}</p>",
            _timeline(proof),
            "<h2>Faults</h2><table><tr>" + "".join(f"<th>{head}" for head in HEADS) + rows + "</table>",
            *(f"<p>{escape(one.name)}: {escape(one.remark)}" for one in proof.outcomes if one.remark),
            f"<h2>Violations</h2><ul>{violations}</ul>" if violations else "",
        ]
    )


def _circumstances(proof: Proof) -> str:
    return f"{proof.people} people, {proof.rate:,.0f} frames per second, seed {proof.seed}, {proof.where}."


def _timeline(proof: Proof) -> str:
    moments = proof.moments
    if len(moments) < 2:  # noqa: PLR2004 - one point is no line
        return ""
    seconds = axis("seconds", [one.at for one in moments])
    spans = [(one.begin, max(one.end, one.begin + 0.5), one.name) for one in proof.outcomes if one.begin]
    plots = (
        ("answers per second", [one.answers for one in moments]),
        ("longest current wait, in seconds", [one.waiting for one in moments]),
        ("connected", [float(one.connected) for one in moments]),
    )
    return "<h2>Timeline</h2>" + "".join(
        svg([Series(title, [(one.at, value) for one, value in zip(moments, values, strict=True)])],
            seconds, axis(title, values), spans=spans)
        for title, values in plots
    )  # fmt: skip
