"""The rules of prose that a machine can check hold for docstrings, also those of constants, and for comments."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.prose import faults, sentences
from tests.trees import parsed

ROOT = Path(__file__).parent.parent
DONE = ("protocol", "server", "prove", "loadtest", "benchmarks", "fuzz", "deploy", "tests")
"""Folders whose docstrings and comments are checked."""
MARKS = re.compile(r"#!?(?: (?:(?:ruff: )?noqa: [A-Z0-9, ]+|type: ignore\S*|fmt: \w+|-{3,}.*?)(?: - |  # |$))*\s*")
"""The parts of a comment that are for tools or divide a file."""


def files() -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file of the rooms that are done."""
    for room in DONE:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield all docstrings of a file with their lines, those of constants and fields included."""
    for node in ast.walk(parsed(path)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Yield all comments of a file with their lines. Comments on consecutive lines are one comment."""
    text, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            is_continued = token.line.strip().startswith("#") and last == token.start[0] - 1
            if text and not is_continued:
                yield last, text
                text = ""
            text = f"{text} {MARKS.sub('', token.string)}".strip()
            last = token.start[0]
    if text:
        yield last, text


def assert_no_faults(texts: Callable[[Path], Iterator[tuple[int, str]]], *, least: int) -> None:
    """Fail if a text of the files breaks a rule, or if there are not more than `least` of them."""
    found, count = [], 0
    for name, path in files():
        for line, text in texts(path):
            count += 1
            found += [f"{name}:{line} {fault}" for fault in faults(text)]
    assert found == [], "\n".join(found)
    assert count > least


def test_docstrings_are_short_sentences_that_begin_with_their_subject() -> None:
    assert_no_faults(docstrings, least=2_500)


def test_comments_are_short_sentences_that_begin_with_their_subject() -> None:
    assert_no_faults(comments, least=500)


def test_faults_of_prose_are_found(tmp_path: Path) -> None:
    assert len(faults("What is kept of them. Whoever asks: is told: twice. Of how many users at once.")) == 5
    assert faults(f"Max {'very ' * 25}long.") != []
    assert faults("Max users per membership query.\n\n- `a: b: c` is one: quoted.\n- Max bytes.") == []
    assert list(sentences("Return it. Raises `X` (e.g. this one).\n\nNext\nline.")) == [
        "Return it.",
        "Raises `X` (e.g. this one).",
        "Next line.",
    ]
    path = tmp_path / "one.py"
    path.write_text(
        "# One\n# sentence.\nx = 1  # noqa: E501, S101 - a reason\ny = 2  # type: ignore[misc]  # it is so\n"
    )
    assert [text for _, text in comments(path)] == ["One sentence.", "a reason", "it is so"]
