"""`openchat load`: its report on a correct server, and on a network that loses, repeats and reorders events."""

import asyncio
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import msgspec
import pytest
from rich.console import Console

from loadtest.bystander import Comparison
from loadtest.command import Screen
from loadtest.connection import Connection, User
from loadtest.crowd import Crowd
from loadtest.histogram import Histogram
from loadtest.load_average import LoadAverage
from loadtest.machine import Machine
from loadtest.plot import axis
from loadtest.proxy import Proxy
from loadtest.run import Result
from loadtest.scenarios import ALL
from loadtest.scenarios.history import message_id
from protocol.codec import encode
from protocol.errors import ErrorCode
from protocol.server import Error
from server.cli import main
from server.core.config import Settings
from tests.cluster import Cluster
from tests.relay import Relay

PEOPLE = ["--people", "6", "--group", "3", "--rate", "60", "--seconds", "1.5", "--processes", "1"]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The default of OPENCHAT_ADD_PEOPLE: the clients are strangers, who accept invitations."""
    return msgspec.structs.replace(settings, add_people=Settings().add_people)


class Faults:
    """Drops, repeats and swaps events, one of each."""

    def __init__(self) -> None:
        self._faults = ["lose", "repeat", "swap"]
        self._seen = 0
        self._held: list[bytes] = []

    def __call__(self, frame: bytes) -> list[bytes]:
        if b'"type":"message_sent"' in frame:
            self._seen += 1
            if self._seen > 10 and self._faults and not self._held:
                fault = self._faults.pop()
                self._held = [frame] if fault == "swap" else []
                return [frame, frame] if fault == "repeat" else []
        held, self._held = self._held, []
        return [frame, *held]


async def load(port: int, folder: Path, *arguments: str) -> tuple[int, str, Result | None]:
    """Run `openchat load` and return its exit status, its output and its report."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "server.cli.main", "load", *arguments,
        "--url", f"http://127.0.0.1:{port}", "--report", str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode(), written(folder)


def written(folder: Path) -> Result | None:
    reports = list(folder.glob("*.json"))
    return msgspec.json.decode(reports[0].read_bytes(), type=Result) if reports else None


def compared_in(folder: Path) -> Comparison:
    (report,) = folder.glob("bystander-*.json")
    assert "<svg" in report.with_suffix(".html").read_text()
    return msgspec.json.decode(report.read_bytes(), type=Comparison)


@pytest.mark.long
async def test_load_reports_exactly_the_faults_of_the_network(cluster: Cluster, tmp_path: Path) -> None:
    port = cluster.workers[0].listener.getsockname()[1]
    good, bad = tmp_path / "good", tmp_path / "bad"
    faults = Faults()
    async with Relay(port, lambda: faults).serve() as bad_port:
        (status, said, result), (bad_status, bad_said, bad_result) = await asyncio.gather(
            load(port, good, "teams", *PEOPLE), load(bad_port, bad, "teams", *PEOPLE)
        )
    assert status == 0, said
    assert "once and in order" in said
    assert result is not None
    assert (result.wrong, result.errors) == (0, {})
    assert "6: first 1, then 5 in " in said
    assert "creating conversations: 2 of 2" in said
    assert str(result.load_average) in said
    tally = result.phases[-1].tally
    assert tally.sent == tally.answered > 0
    assert tally.delivered == 3 * tally.sent
    assert len(Histogram(tally.answers)) == tally.sent
    assert sum(result.phases[-1].cpu.values()) > 0
    (page,) = good.glob("*.html")
    assert "<svg" in page.read_text()
    assert "src=" not in page.read_text()

    assert bad_status == 1, bad_said
    assert bad_result is not None
    assert bad_result.phases[-1].tally.duplicated >= 1, bad_said
    # The dropped event left a gap. The swapped one left a gap and came late.
    assert bad_result.phases[-1].tally.skipped >= 2, bad_said
    assert "out of order" in bad_said


@pytest.mark.long
async def test_bystander_measures_strangers_beside_a_busy_conversation_at_a_distance(tmp_path: Path) -> None:
    size = ("--people", "8", "--rate", "40", "--seconds", "1.5")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "server.cli.main", "load", "bystander", *size,
        "--only", "row", "--database-delay", "20", "--report", str(tmp_path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert "row held" in said.decode()
    quiet, held = compared_in(tmp_path).rows
    assert (quiet.fault, held.fault, quiet.delay, held.delay) == ("", "row held", 20, 20)
    assert 20 < quiet.send.p50 <= quiet.send.p99
    assert 20 < quiet.history.p50 <= quiet.history.p99
    assert 0 < held.answered <= held.offered


@pytest.mark.parametrize(
    ("argument", "why"), [(["--only", "earthquake"], "no fault matches"), (["--url", "http://a.example"], "--url")]
)
def test_bystander_refuses_options_that_do_not_fit(
    argument: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["load", "bystander", "--report", str(tmp_path), *argument]) == 1
    assert why in capsys.readouterr().err


async def test_proxy_between_unix_sockets_keeps_the_order_of_data_when_its_delay_changes(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(echo, tmp_path / "server")
    async with server, Proxy(tmp_path / "server", listen=tmp_path / "proxy") as proxy:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "proxy")
        for number in range(20):
            proxy.delay = (20 - number) / 1_000
            writer.write(b"%02d" % number)
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            heard = await reader.readexactly(40)
        proxy.delay = 0.02
        began = asyncio.get_running_loop().time()
        writer.write(b"late")
        async with asyncio.timeout(5):
            assert await reader.readexactly(4) == b"late"
        assert asyncio.get_running_loop().time() - began >= 0.04
        writer.close()
        await writer.wait_closed()
    assert heard == b"".join(b"%02d" % number for number in range(20))


async def test_load_reports_a_missing_server(tmp_path: Path) -> None:
    status, said, _ = await load(9, tmp_path, "idle")
    assert status == 1
    assert "cannot connect to http://127.0.0.1:9" in said


@pytest.mark.parametrize("command", ["load", "prove"])
def test_command_ends_before_its_work_if_its_report_cannot_be_written(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prove.command.signal.signal", lambda *_: None)
    monkeypatch.setattr("prove.command._run", lambda *_: pytest.fail("the command ran"))
    (tmp_path / "file").write_text("")
    assert main.run([command, "--report", str(tmp_path / "file" / "reports")]) == 1
    assert re.fullmatch(
        r"openchat \w+: /\S+/reports cannot be written: Not a directory\. .*\n", capsys.readouterr().err
    )


def test_crowd_counts_refused_frames_by_code() -> None:
    crowd = Crowd()
    connection = Connection(crowd, User(token="", user_id="", source="", conversations=[]))
    connection.on_frame(encode(Error(re=1, code=ErrorCode.CONFLICT, message="It is closed.")), b"")
    connection.on_frame(encode(Error(code=ErrorCode.INVALID, message="It is no frame.")), b"")
    assert crowd.counters.errors == {"conflict": 1, "invalid": 1}


BURN = """
( i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done; echo burnt; read line )
echo ended; read line
"""


@pytest.mark.parametrize(("name", "kind"), [("worker", "server"), ("postgres", "PostgreSQL")])
def test_cpu_time_of_an_ended_process_is_counted_once(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/bin/sh")
    with subprocess.Popen(
        [tmp_path / name, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        machine = Machine([parent.pid])
        before = machine.usage().cpu[kind]
        assert parent.stdout.readline() == "burnt\n"
        alive = machine.usage().cpu[kind] - before
        parent.stdin.write("\n")
        assert parent.stdout.readline() == "ended\n"
        ended = machine.usage().cpu[kind] - before
        again = machine.usage().cpu[kind] - before
        parent.stdin.write("\n")
        parent.wait()
        gone = machine.usage().cpu[kind] - before
    assert alive > 0.04
    assert alive <= ended <= again <= gone < 1.5 * alive


def test_load_average_names_a_machine_that_was_busy_at_the_start() -> None:
    idle = LoadAverage(start=2.0, end=7.0, cores=2)
    assert str(idle) == "Load average: 2.0 at the start, 7.0 at the end, 2 cores."
    busy = LoadAverage(start=2.1, end=1.0, cores=2)
    assert str(busy).endswith("2 cores. Other programs used the machine, so latencies cannot be compared with those of "
                              "other runs.")  # fmt: skip
    assert LoadAverage.begin().update().cores == os.cpu_count()


def test_counts_outside_a_terminal_are_printed_now_and_then_and_at_the_end() -> None:
    console = Console(file=io.StringIO())
    screen = Screen(console)
    for number in range(1, 1_001):
        screen.count("creating conversations", number, 1_000)
    printed = cast(io.StringIO, console.file).getvalue().splitlines()
    assert printed == [f"creating conversations: {number} of 1,000 …" for number in ("1", "1,000")]


def test_percentiles_have_the_documented_precision() -> None:
    spans = Histogram()
    for number in range(1, 1_001):
        spans.add(number / 1_000)
    both = Histogram().merge([spans, spans])
    for share in (0.5, 0.9, 0.99):
        assert spans.percentile(share) == pytest.approx(share, rel=0.025)
        assert both.percentile(share) == spans.percentile(share)
    assert Histogram().percentile(0.5) == 0


def test_message_ids_are_reproducible_ordered_and_distinct() -> None:
    made = [message_id("a", number) for number in range(1_000)]
    assert made == sorted(set(made))
    assert all(one.version == 7 for one in made)
    assert made[7] == message_id("a", 7) != message_id("b", 7)


def test_every_scenario_has_the_name_of_its_function() -> None:
    assert all(name == one.name and one.about for name, one in ALL.items())


@pytest.mark.parametrize("is_log", [False, True])
def test_axes_have_round_ticks(is_log: bool) -> None:  # noqa: FBT001 - a parameter of the test
    ticks = axis("ms", [3.0, 870.0], is_log=is_log).ticks()
    assert 2 <= len(ticks) <= 12
    assert all(float(f"{tick:.1g}") == pytest.approx(tick) for tick in ticks)
