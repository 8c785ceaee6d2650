"""Arguments of the command line: the order of options and commands, errors, help and completion."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest

from loadtest import command as load
from prove import command as prove
from server.cli import admin, main, maintenance, schema, serve
from server.cli.arguments import Documented
from server.core.config import Settings
from server.processes.embedded.reach import Reached

PROGRAM = [sys.executable, "-P", "-m", "server.cli.main"]
SOME_ID = "01a20000-0000-7000-8000-000000000001"
WITHOUT_DATABASE = (["load"], ["prove"], ["settings"], ["completion", "bash"])
"""Commands that use no database."""
LINES = (
    [], ["run"], ["migrate"], ["new-epoch"],
    ["user", "create", "Ada", "ada@example.org"], ["user", "sessions", "ada@example.org"],
    ["user", "list"], ["user", "list", "ada"], ["conversation", "list"], ["conversation", "list", "engines"],
    *(["user", one, "ada@example.org"] for one in ("show", "disable", "enable", "promote", "demote", "reset-password")),
    *(["conversation", one, SOME_ID] for one in ("show", "export", "delete", "audit")),
    ["erase", "ada@example.org"], ["check"], ["why", SOME_ID], ["reindex"], ["export"], ["export", "file"],
    ["import", "slack", "path"], *WITHOUT_DATABASE,
)  # fmt: skip
"""Every command, with its operands."""
OPTIONS = (
    ["--data-dir", "folder"], ["--data-dir=folder"], ["--data", "folder"], ["--host", "localhost"], ["--port", "0"],
    ["--workers", "2"], ["--plan"], ["--json"], ["--admin"], ["--verify"], ["--yes"], ["--revoke"], ["--user", "ada"],
    ["--limit", "5"], ["--after", SOME_ID],
    ["--match-accounts", "none"], ["--url", "http://localhost"], ["--nonsense"],
)  # fmt: skip
SERVER = ["--data-dir", "--data", "--host", "--port", "--workers"]
"""Options of the server, without values."""


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the work of all commands, and return a list of the calls."""
    found: list[Any] = []

    class Server:
        def __init__(self, settings: Settings) -> None:
            found.append(("a server", settings))

        def run(self) -> None:
            pass

    @contextmanager
    def reached(settings: Settings, **_: object) -> Iterator[Reached]:
        found.append(settings)
        yield Reached("", None, "the database")

    async def work(*_: object, **__: object) -> int:
        asked = click.get_current_context()
        found.append((asked.command_path, asked.params))
        return 0

    monkeypatch.setattr(serve, "Supervisor", Server)
    monkeypatch.setattr("server.core.log.configure", lambda _: None)
    monkeypatch.setattr("prove.command.signal.signal", lambda *_: None)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for module in (admin, maintenance, schema):
        monkeypatch.setattr(module, "reached", reached)
    for module, name in (
        (admin, "_run"), (maintenance, "_run"), (schema, "_migrate"), (schema, "_begin_epoch"), (load, "_load"),
        (prove, "_prove"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(admin, "_show", lambda *_, **__: None)
    return found


def outcome(arguments: list[str], began: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Any], str]:
    """Return the status of a command line, the calls of `began`, and the last line on standard error."""
    began.clear()
    status = main.run(arguments)
    said = capsys.readouterr().err.splitlines()
    return status, list(began), said[-1] if said else ""


def test_lines_cover_every_command() -> None:
    assert {line[0] for line in LINES if line} == set(main.COMMANDS)


def is_a_server(began: list[Any]) -> bool:
    return any(isinstance(one, tuple) and one[0] == "a server" for one in began)


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_option_has_the_same_meaning_before_and_after_a_command(
    option: list[str], began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name = option[0].partition("=")[0]
    for line in LINES:
        after = outcome([*line, *option], began, capsys)
        before = outcome([*option, *line], began, capsys)
        if name in {"--user", "--limit", "--after", "--match-accounts", "--url"} and line:
            status, nothing, said = before
            assert (status, nothing) == (1, []), line
            assert said.endswith("Give the command first, then its options. `openchat --help` lists both."), line
        else:
            assert before == after, line
        assert is_a_server(after[1]) == (line in ([], ["run"]) and name in SERVER), line
        if name in {"--data-dir", "--data"} and line not in WITHOUT_DATABASE:
            assert (after[0], after[2]) == (0, ""), line
            settings = after[1][0][1] if is_a_server(after[1]) else after[1][0]
            assert settings.data_dir == "folder", line
            assert outcome([*line[:1], *option, *line[1:]], began, capsys) == after, line
        elif name == "--plan":
            assert (after[0] == 0) == (line == ["migrate"]), line


def test_data_dir_together_with_a_database_url_is_refused(
    began: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://ada:secret@db/live")
    for line in LINES:
        if line in WITHOUT_DATABASE:
            continue
        status, nothing, said = outcome([*line, "--data-dir", "folder"], began, capsys)
        assert (status, nothing) == (1, []), line
        assert "Leave out --data-dir" in said, line
        assert "unset DATABASE_URL" in said, line
        status, something, _ = outcome(line, began, capsys)
        assert (status, bool(something)) == (0, True), line
    monkeypatch.setenv("DATABASE_URL", "")
    assert outcome(["check", "--data-dir", "folder"], began, capsys)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--prot", "3"], "`--prot` is not an option. Use `--port`."),
        (["--port", "99999999"], "--port must be a whole number from 0 to 65535, not '99999999'."),
        (["chekc"], "`chekc` is not a command. Did you mean `check`? Give the command first, then its options."),
        (["xyzzy"], "`xyzzy` is not a command. Give the command first, then its options."),
        (["--data-dir", "folder", "chekc"], "`chekc` is not a command. Did you mean `check`? Give the command first"),
        (
            ["--data-dir", "check"],
            "`--data-dir check` names a folder. Write `--data-dir ./check`, or name another folder.",
        ),
        (["export", ""], "FILE must be the name of a file or a folder, not ''."),
        (["new-epoch", "--plan"], "`openchat new-epoch` has no option --plan."),
        (["--port", "0", "migrate", "--plan"], "`openchat migrate` has no option --port."),
        (["--plan"], "`openchat` has no option --plan."),
        (["run", "--plan"], "`openchat run` has no option --plan."),
        (["why", "nonsense"], f"MESSAGE must be an id such as {SOME_ID}, not 'nonsense'. `openchat why --help` tells"),
        (["conversation", "show", "nope"], "`openchat conversation show --help` tells more."),
        (["user", "list", "--foo"], "`openchat user list` has no option --foo. `openchat user list --help` tells"),
        (["user"], "`openchat user` needs one of its commands: create, list, show, disable"),
        (["user", "nonsense"], "`openchat user` has no command `nonsense`. `openchat user --help` tells more."),
        (["import", "irc", "file"], "FORMAT must be `openchat`, `slack` or `mattermost`, not 'irc'."),
        (["--data-dir", "folder", "--", "check"], "give the command before `--`."),
        (["run", "check"], "`openchat run` takes no further `check`."),
        (["--port"], "--port needs a value."),
        (["--port", "--workers", "2"], "--port needs a value."),
        (["--data-dir", "--json", "check"], "--data-dir needs a value."),
        (["user", "create", "Ada"], "`openchat user create` needs EMAIL."),
        (["--workers", "-1"], "--workers must be a whole number from 0 to 256, not '-1'."),
        (["--workers", "many"], "--workers must be a whole number from 0 to 256, not 'many'."),
        (["load", "--rate", "0"], "--rate must be a number from 0.01 to 1000000, not '0'."),
        (["load", "--rate", "nan"], "--rate must be a number from 0.01 to 1000000, not 'nan'."),
        (["load", "--people", "0"], "--people must be a whole number from 1 to 1000000, not '0'."),
        (["load", "--people", "1_0"], "--people must be a whole number from 1 to 1000000, not '1_0'."),
        (["load", "teems"], "SCENARIO must be `room`, `teams`"),
        (["prove", "--workers", "-1"], "--workers must be a whole number from 1 to 256, not '-1'."),
        (["prove", "--minutes", "inf"], "--minutes must be a number from 0 to 100000, not 'inf'."),
        (["completion", "sh"], "SHELL must be `bash`, `zsh` or `fish`, not 'sh'."),
        (["settings", "xyzzy"], "no setting has `xyzzy` in its name."),
        (["user", "list", "--limit", "501"], "--limit must be a whole number from 1 to 500"),
        (["conversation", "list", "--limit", "0"], "--limit must be a whole number from 1 to 500"),
        (["conversation", "list", "--after", "5"], f"--after must be an id such as {SOME_ID}, not '5'."),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_invalid_arguments_are_refused_with_advice(
    arguments: list[str], error: str, began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    began.clear()
    status = main.run(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert (status, began) == (1, [])
    assert line.startswith("openchat: ")
    assert error in line


def test_dash_and_empty_string_are_refused_as_file_names(began: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`-` means standard output for commands that print, and is refused elsewhere."""
    for name in ("", "-"):
        for line in [one for one in LINES if one not in WITHOUT_DATABASE]:
            status, nothing, said = outcome([*line, "--data-dir", name], began, capsys)
            assert (status, nothing) == (1, []), line
            assert "--data-dir must be the name of a file or a folder" in said, line
        assert "PATH must be the name of" in outcome(["import", "slack", name], began, capsys)[2]
        for command in ("load", "prove"):
            assert "--report must be the name of" in outcome([command, "--report", name], began, capsys)[2]
    for line in (["export"], ["export", "--user", "ada"]):
        status, began_with, _ = outcome([*line, "-"], began, capsys)
        assert (status, began_with) == outcome(line, began, capsys)[:2], line


@pytest.mark.parametrize("name", ["load", "prove"])
def test_load_and_prove_refuse_options_in_the_same_form(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "--foo"]) == 1
    assert capsys.readouterr().err.startswith(f"openchat: `openchat {name}` has no option --foo. `openchat {name} --h")


def commands(command: click.Command = main.openchat, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command and group, with its words."""
    yield words, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            assert below is not None
            yield from commands(below, *words, name)


def test_help_and_version_work_with_every_option(began: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--help"], "Usage: openchat [COMMAND] [OPTIONS]"),
        (["-h"], "Usage: openchat [COMMAND] [OPTIONS]"),
        (["--port", "0", "--version"], "openchat "),
        (["--data-dir", "folder", "check", "--help"], "Usage: openchat check"),
        (["--help", "check"], "Usage: openchat check"),
        (["--data-dir", "folder", "user", "show", "--help"], "Usage: openchat user show"),
        (["--version", "check"], "openchat "),
        *(([*words, "--help"], " ".join(["Usage: openchat", *words])) for words, _ in commands()),
    ):
        assert main.run(arguments) == 0, arguments
        printed = capsys.readouterr().out
        assert printed.startswith(said)
        assert [line for line in printed.splitlines() if len(line) > 80] == [], "fits a terminal of 80 columns"
    assert began == []
    assert main.run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in main.COMMANDS if f"\n  {name} " not in listed] == []
    assert main.run(["new-epoch", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--yes" in said
    assert "--port" not in said


def test_every_command_has_a_one_line_summary_and_valid_examples() -> None:
    for words, command in commands():
        assert command.get_short_help_str(60).endswith("."), words
        assert "..." not in command.get_short_help_str(60), words
        assert isinstance(command, Documented)
        assert command.examples, words
        for example in command.examples:
            _, _, line = example.partition("openchat ") if "$(" not in example else ("", "", "completion zsh")
            arguments = shlex.split(line.partition(">")[0].partition("|")[0], comments=True)
            if "--help" in arguments:
                continue
            ctx = main.openchat.make_context("openchat", arguments)
            while isinstance(ctx.command, click.Group) and ctx._protected_args:  # noqa: SLF001 - click has no other way
                _, below, rest = ctx.command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])  # noqa: SLF001
                assert below is not None, example
                ctx = below.make_context(below.name, rest, parent=ctx)
            assert not isinstance(ctx.command, click.Group) or ctx.command is main.openchat, example
    for name, entry in main.COMMANDS.items():
        found = main.openchat.get_command(click.Context(main.openchat), name)
        assert found is not None
        assert (found.help or "").splitlines()[0] == entry.about


@pytest.fixture
def bash(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that lists the completions of bash for the last word, by the script that the program prints."""
    program = tmp_path / "openchat"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o700)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def completions(*words: str) -> list[str]:
        script = f"""
            eval "$(openchat completion bash)"
            COMP_WORDS=({" ".join(word or "''" for word in words)}) COMP_CWORD={len(words) - 1}
            _openchat_completion openchat
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        command = ["bash", "--norc", "-c", script]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
        assert ended.stderr == ""
        return ended.stdout.split()

    return completions


@pytest.mark.long
def test_bash_completes_commands_and_options(bash: Callable[..., list[str]]) -> None:
    assert bash("openchat", "") == list(main.COMMANDS)
    assert bash("openchat", "--data-dir", "folder", "ch") == ["check"]
    assert bash("openchat", "user", "re") == ["reset-password"]
    assert bash("openchat", "conversation", "delete", "--") == ["--yes", "--json", "--data-dir", "--help"]
    assert bash("openchat", "import", "s") == ["slack"]
    assert bash("openchat", "xyzzy", "") == list(main.COMMANDS)


def test_help_and_completion_do_not_import_commands() -> None:
    code = "import sys, server.cli.main as m; m.run(['--help']); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "server.cli.main" in modules
    heavy = ("server.app", "server.queries", "server.processes", "rich")
    assert [one for one in modules if one.startswith(heavy)] == []
