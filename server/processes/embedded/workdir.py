"""The working directory of a process. The id in a file may belong to another process by now, or come from a copied
folder.
"""

import os
import subprocess
from pathlib import Path

from server.processes.embedded.folder import Owner

PROC = Path("/proc/self/cwd")
PATIENCE_SECONDS = 10.0
"""Max time of a command, in seconds."""


def is_in(pid: int, folder: Path, owner: Owner | None) -> bool | None:
    """Return whether the working directory of a living process is `folder`. Return None if that is unknown.

    `owner` is the user of the process, if it is not the user of this one. Without the right to trace processes, as in a
    container, root cannot see the directory of another user's process.
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
    """Return the path of the working directory from `lsof`, for systems without /proc."""
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
