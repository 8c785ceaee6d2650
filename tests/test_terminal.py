"""The administrator's terminal shows text of users, and never interprets control characters in it."""

import contextlib
import io
import logging
import os
import pty
import re
import sys
import termios
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from loadtest import command as load
from loadtest.counters import Tally
from loadtest.run import Moment
from prove import command as prove
from prove.run import Proof
from server.cli import tables
from server.core import log
from server.core.terminal import plain, plain_json
from server.ops.progress import Progress
from server.processes import supervisor
from tests.test_administration import Shell, shell
from tests.world import sent

__all__ = ("shell",)
ROOT = Path(__file__).parent.parent
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\x7f\u202eevil\u2066\u2028\u2029\u200b\U000e0041"
CONTROL = {"Cc", "Cf", "Cs", "Zl", "Zp"}
MAY_WRITE = {
    "core.terminal": "it escapes lines",
    "cli.tables": "it draws escaped text, which core.terminal prints",
    "ops.progress": "it moves the cursor itself",
    "processes.worker": "a pipe to the supervisor, which escapes the text",
    "describe.__main__": "names of our own files",
}


def control_characters(text: str) -> set[str]:
    return {character for character in text if unicodedata.category(character) in CONTROL} - {"\n"}


async def test_commands_print_no_control_characters_of_users(shell: Shell) -> None:
    db = shell.world.db
    ada, charles = await shell.world.users("Ada", "Charles")
    connection = await shell.world.connect(ada)
    about = await shell.world.group(connection, charles)
    said = await sent(connection, about, f"Hello {HOSTILE}")
    await db.execute('UPDATE "user" SET name = $2, display_name = $2, bio = $2 WHERE id = $1', ada.id, f"Ada {HOSTILE}")
    await db.execute(
        'UPDATE "user" SET name = $2, email = $3 WHERE id = $1', charles.id, HOSTILE, f"{HOSTILE}@x".lower()
    )
    await db.execute("UPDATE session SET user_agent = $1, ip_address = $1", HOSTILE)
    await db.execute("UPDATE conversation SET title = $1, description = $1", HOSTILE)
    printed = []
    for words in (
        f"user show {ada.id}", f"user show {ada.id} --json", "user list", "user list --json", "conversation list",
        f"conversation list --user {ada.id} --json",
        f"user sessions {ada.id}", f"user sessions {ada.id} --json",
        f"user promote {ada.id}", f"user demote {ada.id}", f"user enable {charles.id}", f"user show {charles.id}",
        f"conversation show {about}", f"conversation show {about} --json", f"conversation export {about}",
        f"conversation audit {about}", f"why {said}", f"why {said} --json",
        f"export --user {ada.id}", "check", "check --json", f"user disable {charles.id}",
    ):  # fmt: skip
        text = await shell.run(*words.split())
        assert not control_characters(text), (words, control_characters(text))
        printed.append(text)
    _, more = await shell.both("user", "list", "--limit", "1")
    assert "there are more" in more
    assert not control_characters(more)
    refused = await shell.run("erase", str(ada.id), status=1)
    assert not control_characters(refused)
    assert refused.count("\n") == 1
    for text in printed[:2]:
        assert r"\u202e" in text, "the text is shown escaped"
    assert (await shell.json("user", "show", str(ada.id)))["name"] == f"Ada {HOSTILE}", "JSON decodes to the same text"
    assert not control_characters(await shell.run("user", "show", HOSTILE, status=1))
    assert not control_characters(
        await shell.run("import", "openchat", f"/nowhere/{HOSTILE}".replace("\n", ""), status=1)
    )


ESCAPES = re.compile(r"\x1b\[[\d;]*m")
"""The sequences that rich itself writes to a terminal."""


def on_a_terminal(columns: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the output of `work` on a terminal with `columns` columns."""
    primary, secondary = pty.openpty()
    try:
        termios.tcsetwinsize(secondary, (24, columns))
        with os.fdopen(secondary, "w") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            work()
        found = b""
        with contextlib.suppress(OSError):  # no more output follows
            while piece := os.read(primary, 65_536):
                found += piece
    finally:
        os.close(primary)
    return found.decode().replace("\r\n", "\n")


def test_tables_fit_the_terminal_and_cells_have_no_control_characters_or_markup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [[f"{number}", f"Ada [red]{HOSTILE}[/]", "x" * 20] for number in range(3)]

    def work() -> None:
        tables.show_rows(("number", "name [b]", "rest"), rows)
        tables.show_fields([("name", f"[blink]{HOSTILE}")])

    wide, narrow = (on_a_terminal(columns, work, monkeypatch) for columns in (160, 80))
    for shown in (wide, narrow):
        assert "\x1b[5m" not in shown, "markup in a cell has no effect"
        bare = ESCAPES.sub("", shown)
        assert not control_characters(bare)
        assert "[red]\\x1b" in bare
    assert len(wide.splitlines()) == 1 + 3 + 1
    assert ESCAPES.sub("", wide).splitlines()[0].split() == ["number", "name", "[b]", "rest"]
    assert all(len(line) <= 80 for line in ESCAPES.sub("", narrow).splitlines())
    assert re.findall(r"^number +(\d)$", narrow, re.MULTILINE) == ["0", "1", "2"]


def test_each_row_of_a_table_is_one_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_rows(("a", "b"), [["x" * 300, f"[red]{HOSTILE}"], ["", ""]])
    printed = capsys.readouterr().out
    assert not control_characters(printed)
    assert len(printed.splitlines()) == 3
    assert "x" * 300 + "  [red]" in printed


def test_load_and_prove_escape_answers_of_the_server() -> None:
    hostile = f"[blink]{HOSTILE}[/]"
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=200)
    load_screen = load.Screen(console)
    moment = Moment(
        at=1, sent=1, delivered=1, answer_p50=0, answer_p99=0, delivery_p50=0, delivery_p99=0, returned=0, cpu={}
    )
    with load_screen:
        load_screen.step(hostile)
        load_screen.update("load", moment, Tally(errors={hostile: 1}))
    plain_console = Console(file=drawn, width=200)
    load.Screen(plain_console).step(hostile)
    prove.Screen(plain_console, Proof(seed=1, people=1, rate=1, where="")).step(hostile)
    shown = drawn.getvalue()
    assert shown.count(r"\u202eevil") >= 3
    assert "\x1b[5m" not in shown, "markup in a cell has no effect"
    assert not control_characters(re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)) - {"\r"}


async def test_supervisor_and_progress_print_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    supervisor.tell(HOSTILE)
    Progress().line(HOSTILE)
    printed = capsys.readouterr().out
    assert not control_characters(printed)
    assert printed.count("\n") == 2
    terminal = Progress(is_terminal=True)
    terminal.begins(HOSTILE)
    assert not control_characters(capsys.readouterr().err.removeprefix("\r\x1b[K"))


def test_log_entry_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("worker 1")
    logging.getLogger("test").warning("by %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("test").exception("failed")
    printed = capsys.readouterr().err
    assert not control_characters(printed)
    lines = printed.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [
        line for line in lines if re.match(r"\d{4}-.* worker 1 (WARNING|ERROR) ", line)
    ], "a line within a text cannot be taken for an entry"


def test_exactly_the_control_characters_are_replaced() -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if unicodedata.category(character) in CONTROL:
            assert not control_characters(plain(character) + plain_json(character).replace("\n", " "))
        elif unicodedata.category(character) not in {"Co", "Cn"}:
            assert plain(character) == plain_json(character) == character


def test_only_the_terminal_module_writes_to_the_terminal() -> None:
    writes = re.compile(r"sys\.(stdout|stderr)\.(write|buffer\.write)|= sys\.(stdout|stderr)\.|\bprint\(")
    for path in sorted((ROOT / "server").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "server").with_suffix("").parts)
        assert name in MAY_WRITE or not writes.search(path.read_text()), f"{name}: use server/core/terminal.py"
