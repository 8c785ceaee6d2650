"""The data folder: who may use it, who holds it, and as whom the servers in it run."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from server.errors import Fatal

MAX_SOCKET_DIR = 80
"""Longest folder for Unix sockets, in bytes: sun_path holds 104 to 108 with the file's name."""

SHARED_BINARIES = Path("/var/cache/openchat")
"""Where root puts binaries that the unprivileged user cannot reach where they were installed."""


class Held(Fatal):
    """Another process has the data folder. `run` is where its servers listen."""

    def __init__(self, path: Path, run: Path) -> None:
        super().__init__(f"another openchat runs with the data folder {path}; stop it or choose another --data-dir.")
        self.run = run


class Owner(NamedTuple):
    """The user that runs the embedded servers, when that is not the one who runs the program."""

    name: str
    uid: int
    gid: int


class DataFolder:
    """A data folder that this process holds, alone, until it ends."""

    def __init__(self, path: Path) -> None:
        """Make and lock the folder. Raises Fatal if it cannot be written, Held if another process has it."""
        self.path = path
        self.owner = _unprivileged() if os.geteuid() == 0 else None
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A folder that another user owns (a volume) stays as open as it is: what is in it is closed itself.
            with contextlib.suppress(PermissionError):
                path.chmod(0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Fatal(
                f"the data folder {path} cannot be written ({error.strerror}); choose one by --data-dir."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Held(path, _run(path)) from None
        self.run = _run(path)
        self.run.mkdir(mode=0o700, exist_ok=True)
        if self.run.stat().st_uid not in {os.geteuid(), self.owner.uid if self.owner else os.geteuid()}:
            raise Fatal(f"{self.run} belongs to someone else.")
        self._give_to_owner()

    def release(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def reachable(self, binaries: Path) -> Path:
        """Return `binaries`, or a copy of that folder which the servers' user can reach."""
        if self.owner is None or self._reaches(binaries):
            return binaries
        stamp = hashlib.sha256(f"{binaries}{binaries.stat().st_mtime_ns}".encode()).hexdigest()[:12]
        copy = SHARED_BINARIES / f"{binaries.name}-{stamp}"
        if not copy.exists():
            SHARED_BINARIES.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=SHARED_BINARIES))
            shutil.copytree(binaries, unfinished / "copy", symlinks=True)
            (unfinished / "copy").rename(copy)
            unfinished.rmdir()
        return copy

    def _give_to_owner(self) -> None:
        if self.owner is None:
            return
        for folder in (self.path, self.run):
            os.chown(folder, self.owner.uid, self.owner.gid)
        if not self._reaches(self.run):
            raise Fatal(
                f"PostgreSQL refuses to run as root, and the user {self.owner.name}, who runs it instead, "
                f"cannot reach {self.path}; choose a --data-dir outside closed folders."
            )

    def _reaches(self, path: Path) -> bool:
        assert self.owner is not None  # noqa: S101 - only asked of another user
        return (
            subprocess.run(  # noqa: S603 - no outside input
                ["/bin/ls", path], user=self.owner.uid, group=self.owner.gid, extra_groups=[],
                cwd="/", capture_output=True, check=False,
            ).returncode == 0
        )  # fmt: skip


def _run(path: Path) -> Path:
    """Return the folder for the Unix sockets of a data folder's servers."""
    if len(os.fsencode(path)) < MAX_SOCKET_DIR:
        return path / "run"
    return Path(tempfile.gettempdir()) / f"openchat-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def installed(package: str) -> Path:
    """Return the folder of an installed package, without importing it. Raises Fatal if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Fatal(f"the package {package} is not installed: set DATABASE_URL and REDIS_URL, or install it.")
    return Path(spec.origin).parent


def _unprivileged() -> Owner:
    for name in ("openchat", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Owner(name, entry.pw_uid, entry.pw_gid)
    raise Fatal("PostgreSQL refuses to run as root, and there is no user `openchat` or `nobody` to run it as.")
