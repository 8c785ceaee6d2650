"""Child processes that do not outlive their parent."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from server.processes.embedded.folder import DataFolder
from server.processes.embedded.logfile import LogFile

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def start(
    command: list[str | Path], *, folder: DataFolder, log: LogFile, last_signal: signal.Signals
) -> subprocess.Popen[bytes]:
    """Start `command` as the folder's owner, in a process group of its own. Its output goes to `log`.

    On Linux, the kernel sends it `last_signal` when this process ends in any way. On other systems, the next start
    finds the orphan and stops it. The caller is the main thread, because the signal comes when the calling thread ends.
    """
    owner = folder.owner
    with log.open() as output:
        return subprocess.Popen(  # noqa: S603 - no outside input, no threads
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder.path,
            # A terminal sends Ctrl-C to its whole foreground group. The supervisor stops these processes last.
            start_new_session=True,
            preexec_fn=_dies_with_parent(last_signal),  # noqa: PLW1509 - it makes one system call
            user=owner and owner.uid,
            group=owner and owner.gid,
            extra_groups=[] if owner else None,
        )


def _dies_with_parent(last_signal: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None

    def ask() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(last_signal), 0, 0, 0)

    return ask


def stop(process: subprocess.Popen[bytes], how: signal.Signals, *, patience: float) -> None:
    """Send the signal `how`, wait up to `patience` seconds, and then kill the process."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
