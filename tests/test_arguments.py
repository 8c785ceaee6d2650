"""The command line's arguments: options before a command mean what they mean after it, and none starts a server."""

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from loadtest import command as load
from prove import command as prove
from server.cli import admin, main, maintenance
from server.core.config import Settings
from server.core.terminal import status_of
from server.processes.embedded.reach import Reached

SOME_ID = "01a20000-0000-7000-8000-000000000001"
LINES = (
    [], ["run"], ["migrate"], ["new-epoch"],
    ["user", "create", "Ada", "ada@example.org"], ["user", "sessions", "ada@example.org"],
    ["user", "list"], ["user", "list", "ada"], ["conversation", "list"], ["conversation", "list", "engines"],
    *(["user", one, "ada@example.org"] for one in ("show", "disable", "enable", "promote", "demote", "reset-password")),
    *(["conversation", one, SOME_ID] for one in ("show", "export", "delete", "audit")),
    ["erase", "ada@example.org"], ["check"], ["why", SOME_ID], ["reindex"], ["export"], ["export", "file"],
    ["import", "slack", "path"], ["load"], ["prove"],
)  # fmt: skip
"""Every command, with its operands."""
OPTIONS = (
    ["--data-dir", "folder"], ["--data-dir=folder"], ["--data", "folder"], ["--host", "localhost"], ["--port", "0"],
    ["--workers", "2"], ["--plan"], ["--json"], ["--admin"], ["--verify"], ["--yes"], ["--revoke"], ["--user", "ada"],
    ["--limit", "5"], ["--after", SOME_ID],
    ["--match-accounts", "none"], ["--url", "http://localhost"], ["--nonsense"],
)  # fmt: skip
SERVER = ["--data-dir", "--data", "--host", "--port", "--workers"]
"""Options of the server, without their values."""


# Building the parsers takes longer than their work.
PARSERS = [(module, functools.cache(module._parser)) for module in (main, admin, maintenance)]  # noqa: SLF001


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of what begins. Nothing begins in earnest."""
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

    async def run(*arguments: object) -> int:
        (options,) = (one for one in arguments if isinstance(one, argparse.Namespace))
        found.append({**vars(options), "work": options.work.__name__})
        return 0

    async def administer(servers: Reached, **options: object) -> None:
        found.append((servers, options))

    def from_outside(*arguments: object) -> int:
        found.append(arguments)
        return 0

    monkeypatch.setattr(main, "Supervisor", Server)
    monkeypatch.setattr(main, "_migrate", administer)
    monkeypatch.setattr(main, "_begin_epoch", administer)
    monkeypatch.setattr(main, "_from_outside", from_outside)
    monkeypatch.setattr("server.core.log.configure", lambda _: None)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for module, parser in PARSERS:
        monkeypatch.setattr(module, "_parser", parser)
        monkeypatch.setattr(module, "reached", reached)
    for group in (admin, maintenance):
        monkeypatch.setattr(group, "_run", run)
    monkeypatch.setattr(admin, "_show", lambda *_, **__: None)
    return found


def outcome(arguments: list[str], began: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Any], str]:
    """Return the status of a command line, what began, and the last line on standard error."""
    began.clear()
    status = status_of(lambda: main._run(arguments))  # noqa: SLF001
    said = capsys.readouterr().err.splitlines()
    return status, list(began), said[-1] if said else ""


def test_the_lines_cover_every_command() -> None:
    assert {line[0] for line in LINES if line} == set(main.COMMANDS)


def is_a_server(began: list[Any]) -> bool:
    return any(isinstance(one, tuple) and one[0] == "a server" for one in began)


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_an_option_before_a_command_means_what_it_means_after_it(
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
        if name in {"--data-dir", "--data"} and line[:1] not in (["load"], ["prove"]):
            assert (after[0], after[2]) == (0, ""), line
            settings = after[1][0][1] if is_a_server(after[1]) else after[1][0]
            assert settings.data_dir == "folder", line
            assert outcome([*line[:1], *option, *line[1:]], began, capsys) == after, line
        elif name == "--plan":
            assert (after[0] == 0) == (line in (["migrate"], ["load"], ["prove"])), line


def test_folder_beside_the_url_of_a_database_begins_nothing(
    began: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://ada:secret@db/live")
    for line in LINES:
        if line[:1] in (["load"], ["prove"]):
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
    ("arguments", "said"),
    [
        (["--prot", "3"], "`--prot` is not an option. Give `--port`."),
        (["--port", "99999999"], "--port must be a whole number from 0 to 65535, not 99999999."),
        (["chekc"], "`chekc` is not a command. Give the command first, then its options."),
        (["--data-dir", "folder", "chekc"], "`chekc` is not a command. Give the command first, then its options."),
        (["--data-dir", "check"], "`--data-dir check` names a folder. Write `--data-dir ./check`, or give the folder."),
        (["export", ""], "argument file: give the name of a file or a folder; one that is named `-` is `./-`"),
        (["new-epoch", "--plan"], "`openchat new-epoch` has no option --plan."),
        (["--port", "0", "migrate", "--plan"], "`openchat migrate` has no option --port."),
        (["--plan"], "`openchat` has no option --plan."),
        (["run", "--plan"], "`openchat run` has no option --plan."),
        (["why", "nonsense"], "argument message: invalid UUID value: 'nonsense'. `openchat why --help` says what it"),
        (["conversation", "show", "nope"], "`openchat conversation show --help` says what it takes."),
        (["user", "list", "--foo"], "`openchat user list` has no option --foo. `openchat user list --help` says what"),
        (["user"], "the following arguments are required: what. `openchat user --help` says what it takes."),
        (["user", "nonsense"], "`openchat user --help` says what it takes."),
        (["import", "irc", "file"], "`openchat import --help` says what it takes."),
        (["--data-dir", "folder", "--", "check"], "unrecognized arguments"),
        (["run", "check"], "unrecognized arguments: check"),
        (["--port"], "argument --port: expected one argument"),
        (["user", "list", "--limit", "501"], "argument --limit: give a number from 1 to 500"),
        (["conversation", "list", "--limit", "0"], "argument --limit: give a number from 1 to 500"),
        (["conversation", "list", "--after", "5"], "argument --after: invalid UUID value: '5'"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_arguments_that_cannot_be_meant_begin_nothing(
    arguments: list[str], said: str, began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    began.clear()
    status = status_of(lambda: main._run(arguments))  # noqa: SLF001
    (line,) = capsys.readouterr().err.splitlines()
    assert (status, began) == (1, [])
    assert line.startswith("openchat: ")
    assert said in line


def test_no_argument_names_a_file_or_folder_by_a_dash_or_nothing(
    began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """`-` is standard output where a command prints, and no name elsewhere: a file `-` would be there by mistake."""
    for name in ("", "-"):
        for line in [one for one in LINES if one[:1] not in (["load"], ["prove"])]:
            status, nothing, said = outcome([*line, "--data-dir", name], began, capsys)
            assert (status, nothing) == (1, []), line
            assert "argument --data-dir: give the name of a file or a folder" in said, line
        assert "argument path: give the name of" in outcome(["import", "slack", name], began, capsys)[2]
        for module in (load, prove):
            assert status_of(functools.partial(module.main, ["--report", name])) == 1
            assert "argument --report: give the name of" in capsys.readouterr().err
    for line in (["export"], ["export", "--user", "ada"]):
        status, began_with, _ = outcome([*line, "-"], began, capsys)
        assert (status, began_with) == outcome(line, began, capsys)[:2], line


@pytest.mark.parametrize("module", [load, prove])
def test_commands_that_speak_to_a_server_refuse_in_the_same_form(
    module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda: module.main(["--foo"])) == 1
    name = module.__name__.partition(".")[0].removesuffix("test")
    assert capsys.readouterr().err.startswith(f"openchat: `openchat {name}` has no option --foo. `openchat {name} --h")


def test_help_and_version_go_with_every_option(began: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--help"], "usage: openchat [COMMAND] [OPTIONS]"),
        (["--port", "0", "--version"], "openchat "),
        (["--data-dir", "folder", "check", "--help"], "usage: openchat check"),
        (["--help", "check"], "usage: openchat check"),
        (["--data-dir", "folder", "user", "show", "--help"], "usage: openchat user show"),
        (["--version", "check"], "openchat "),
        *(
            ([*line[: 2 if line[0] in admin.GROUPS else 1], "--help"], f"usage: openchat {line[0]}")
            for line in LINES
            if line and line[0] not in main.OUTSIDE
        ),
    ):
        assert status_of(lambda arguments=arguments: main._run(arguments)) == 0, arguments  # type: ignore[misc] # noqa: SLF001
        assert capsys.readouterr().out.startswith(said)
    assert began == []
    assert status_of(lambda: main._run(["--help"])) == 0  # noqa: SLF001
    listed = capsys.readouterr().out
    assert [name for name in main.COMMANDS if f"\n  {name} " not in listed] == []
    assert status_of(lambda: main._run(["new-epoch", "--help"])) == 0  # noqa: SLF001
    said = capsys.readouterr().out
    assert "--yes" in said
    assert "--port" not in said
