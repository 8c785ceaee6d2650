"""Docstrings, also those of constants, keep the rules of prose that a machine can check, in the rooms that are done."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.prose import faults, sentences

ROOT = Path(__file__).parent.parent
DONE = (
    "protocol",
    "server/app",
    "server/auth",
    "server/cli",
    "server/context.py",
    "server/core",
    "server/db",
    "server/describe",
    "server/domain",
    "server/fairness",
    "server/gateway",
    "server/handlers",
    "server/http",
    "server/hub",
    "server/jobs",
    "server/limits",
    "server/ops",
    "server/processes",
    "server/queries",
    "server/routes.py",
)
"""Rooms whose docstrings were rewritten. Add a room when all of it keeps the rules."""
NOT_YET = {"server/queries/sending.py"}
"""Files in these rooms that are not rewritten yet."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield all docstrings of a file with their lines, those of constants and fields included."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def test_docstrings_are_short_sentences_that_begin_with_their_subject() -> None:
    found, count = [], 0
    for room in DONE:
        for path in sorted((ROOT / room).rglob("*.py")) or [ROOT / room]:
            name = str(path.relative_to(ROOT))
            for line, text in () if name in NOT_YET else docstrings(path):
                count += 1
                found += [f"{name}:{line} {fault}" for fault in faults(text)]
    assert found == [], "\n".join(found)
    assert count > 300


def test_faults_of_prose_are_found() -> None:
    assert len(faults("What is kept of them. Whoever asks: is told: twice. Of how many users at once.")) == 5
    assert faults(f"Max {'very ' * 25}long.") != []
    assert faults("Max users per membership query.\n\n- `a: b: c` is one: quoted.\n- Max bytes.") == []
    assert list(sentences("Return it. Raises `X` (e.g. this one).\n\nNext\nline.")) == [
        "Return it.",
        "Raises `X` (e.g. this one).",
        "Next line.",
    ]
