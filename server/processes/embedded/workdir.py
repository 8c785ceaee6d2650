"""Where a process runs: the number in a file may have gone to another process since, or have come with a copy."""

import os
import subprocess
from pathlib import Path

from server.processes.embedded.folder import Owner

PROC = Path("/proc/self/cwd")
PATIENCE_SECONDS = 10.0


def is_in(pid: int, folder: Path, owner: Owner | None) -> bool | None:
    """Return whether the working directory of a living process is `folder`, or None if that cannot be told.

    `owner` is who the process runs as, if that is not the one who asks: without the right to trace processes
    (a container), root does not see the directory of another user's process.
    """
    where = f"/proc/{pid}/cwd" if PROC.exists() else _listed(pid, owner)
    if where is None:
        return None
    here = folder.stat()
    try:
        there = Path(where).stat()
    except PermissionError:
        return _asked_by(owner, where, here)
    except OSError:
        return None
    return os.path.samestat(here, there)


def _asked_by(owner: Owner | None, where: str, here: os.stat_result) -> bool | None:
    if owner is None:
        return None
    said = _said("stat", "-L", "-c", "%d:%i", where, owner=owner)
    return said.strip() == f"{here.st_dev}:{here.st_ino}" if said else None


def _listed(pid: int, owner: Owner | None) -> str | None:
    """Return the path of the working directory as `lsof` knows it, where there is no /proc."""
    lines = _said("lsof", "-a", "-p", str(pid), "-d", "cwd", "-Fn", owner=owner).splitlines()
    return next((line[1:] for line in lines if line.startswith("n/")), None)


def _said(*command: str, owner: Owner | None) -> str:
    try:
        return subprocess.run(  # noqa: S603 - no outside input
            command, user=owner and owner.uid, group=owner and owner.gid, extra_groups=[] if owner else None,
            cwd="/", capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
