"""The shipped deploy/nginx.conf, in a real nginx."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CONF = Path(__file__).parent.parent / "deploy" / "nginx.conf"

pytestmark = pytest.mark.more


def nginx() -> str:
    found = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    assert found, "these tests need nginx"
    return found


def test_the_shipped_configuration_is_understood(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text(re.sub(r"server server-\d:8000", "server 127.0.0.1:1", CONF.read_text()))
    subprocess.run(
        [nginx(), "-t", "-q", "-p", tmp_path, "-e", tmp_path / "error.log", "-g", f"pid {tmp_path}/pid;", "-c", conf],
        check=True,
        timeout=20,
    )
