"""The shipped deploy/openchat.service uses valid options, and leaves the program the time to stop."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from server.cli import main
from server.core.config import Settings, variable
from server.processes import supervisor
from server.processes.embedded import postgres, valkey
from server.processes.embedded.folder import MAKE_USER, USER

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "deploy" / "openchat.service"
ANALYZE = shutil.which("systemd-analyze")
PROGRAM = "/opt/openchat/bin/openchat"


@pytest.fixture
def service() -> configparser.SectionProxy:
    """Return the `Service` section of the unit."""
    unit = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return unit["Service"]


def test_unit_uses_existing_options_and_settings(service: configparser.SectionProxy) -> None:
    program, *arguments = shlex.split(service["ExecStart"])
    assert program == PROGRAM
    given = main.openchat.make_context("openchat", [*arguments]).params
    assert (given["host"], given["port"]) == (Settings().host, str(Settings().port))
    with pytest.raises(click.NoSuchOption, match="--bind"):
        main.openchat.make_context("openchat", [*arguments, "--bind"])
    text = UNIT.read_text()
    named = set(re.findall(r"\b(?:OPENCHAT_[A-Z_]+|DATABASE_URL|REDIS_URL)\b", text))
    assert named
    assert named <= {variable(field) for field in Settings.__struct_fields__}
    assert service["User"] == service["StateDirectory"] == USER
    assert service["Environment"] == "OPENCHAT_DATA_DIR=%S/openchat", "the folder of StateDirectory"


def test_unit_lets_the_supervisor_stop_its_servers(service: configparser.SectionProxy) -> None:
    assert service["KillMode"] == "mixed"
    most = supervisor.STOP_SECONDS + postgres.STOP_SECONDS + valkey.STOP_SECONDS
    assert int(service["TimeoutStopSec"]) > most


def test_handbook_describes_the_installation_of_the_unit() -> None:
    handbook = (ROOT / "docs" / "operations.md").read_text()
    assert f"{' '.join(MAKE_USER)}\n" in handbook
    for words in ("deploy/openchat.service", PROGRAM.rpartition("/bin/")[0], "/etc/openchat.env"):
        assert words in handbook
        assert words.rpartition("deploy/")[2] in UNIT.read_text() + UNIT.name


@pytest.mark.skipif(ANALYZE is None, reason="needs systemd")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    for option, said in (("", ""), ("NoNewPrivilege=yes\n", "Unknown key")):
        # The program is not installed at this path.
        copy.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true").replace("UMask=", f"{option}UMask="))
        done = subprocess.run([str(ANALYZE), "verify", "--man=no", copy], capture_output=True, text=True, check=False)
        ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
        assert (said in "".join(ours), bool(ours)) == (True, bool(said)), ours
