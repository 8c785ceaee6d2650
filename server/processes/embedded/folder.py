"""The data folder: its lock, its owner, and the user who runs the embedded servers."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from server.core.errors import Fatal

MAX_SOCKET_DIR = 80
"""Max length of the folder for Unix sockets, in bytes. `sun_path` holds 104 to 108 bytes, including the file's name."""

USER = "openchat"
"""The system user that runs the servers if root starts them. No other program uses it."""

MAKE_USER = ("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER)

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_READ = 4096

SHARED_BINARIES = Path("/var/cache/openchat")
"""The folder for copies of binaries that the unprivileged user cannot reach where they are installed."""


class FolderHeld(Fatal):
    """Another process has locked the data folder. `run` is the folder of its servers' sockets."""

    def __init__(self, path: Path, run: Path, advice: str) -> None:
        super().__init__(f"another openchat runs with the data folder {path}; stop it, or {advice}.")
        self.run = run


class Owner(NamedTuple):
    """The user that runs the embedded servers, if it is not the user of this process."""

    name: str
    uid: int
    gid: int


class DataFolder:
    """A data folder, which this process locks until it ends."""

    def __init__(self, path: Path, *, advice: str = "choose another one by --data-dir") -> None:
        """Create and lock the folder. `advice` tells how to do without it. Raises Fatal if it cannot be written, and
        FolderHeld if another process has locked it.
        """
        self.path = path
        self._advice = advice
        self.owner = _unprivileged() if os.geteuid() == 0 else None
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A folder of another user, such as a volume, keeps its permissions. The files in it have their own.
            with contextlib.suppress(PermissionError):
                path.chmod(0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Fatal(f"the data folder {path} cannot be written ({error.strerror}); {advice}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise FolderHeld(path, run_folder(path), advice) from None
        self._here = os.open(path.resolve(), FOLDER)
        self.run = run_folder(path)
        self.run.mkdir(mode=0o700, exist_ok=True)
        # Beside the data folder, it must belong to this user. Inside, root changes the owner of an earlier user's
        # folder.
        is_ours = self.run.stat().st_uid in {os.geteuid(), self.uid}
        if self.run.is_symlink() or not (is_ours or (self.owner and self.run.parent == path)):
            raise Fatal(f"{self.run} belongs to another user. Remove it.")
        self._give_to_owner()

    @property
    def uid(self) -> int:
        """The id of the user who runs the servers."""
        return self.owner.uid if self.owner else os.geteuid()

    def release(self) -> None:
        """Unlock the folder for other processes."""
        os.close(self._here)
        os.close(self._lock)

    def reachable(self, package: Path) -> Path:
        """Return the folder of an installed package, or a copy that the servers' user can reach."""
        if self.owner is None or self._reaches(package):
            return package
        stamp = hashlib.sha256(f"{package}{package.stat().st_mtime_ns}".encode()).hexdigest()[:12]
        copy = SHARED_BINARIES / f"{package.name}-{stamp}"
        try:
            if not copy.exists():
                _copy(package, copy)
        except OSError as error:
            if not copy.exists():  # otherwise another process created it meanwhile
                raise Fatal(f"{package} cannot be copied to {SHARED_BINARIES} ({error}).") from None
        if not self._reaches(copy / package.name):
            raise Fatal(
                f"the user {self.owner.name} cannot reach {copy}. Make the folders above it accessible to everyone."
            )
        return copy / package.name

    def give(self, tree: Path) -> None:
        """Give a folder tree to the servers' user, if another user owns it. The tree's own folder comes last."""
        if self.owner is None or tree.lstat().st_uid == self.owner.uid:
            return
        with self._opened(tree) as top:
            for _, folders, files, here in os.fwalk(".", dir_fd=top):
                for name in (*folders, *files):
                    self._give_entry(name, here)
            os.fchown(top, self.owner.uid, self.owner.gid)

    def _give_entry(self, name: str, here: int) -> None:
        assert self.owner is not None  # noqa: S101 - the caller has checked it
        try:
            entry = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        except OSError:  # a link or a socket, whose owner does not matter
            return
        try:
            what = os.fstat(entry)
            # A file with a second name may be a file elsewhere, which must keep its owner.
            if stat.S_ISDIR(what.st_mode) or (stat.S_ISREG(what.st_mode) and what.st_nlink == 1):
                os.fchown(entry, self.owner.uid, self.owner.gid)
        finally:
            os.close(entry)

    def make(self, prefix: str) -> Path:
        """Create a new folder in this one for the servers' user, and return it."""
        name = f"{prefix}{secrets.token_hex(4)}"
        os.mkdir(name, 0o700, dir_fd=self._here)
        made = os.open(name, FOLDER, dir_fd=self._here)
        try:
            if self.owner:
                os.fchown(made, self.owner.uid, self.owner.gid)
        finally:
            os.close(made)
        return self.path / name

    def write(self, path: Path, text: str) -> None:
        """Write a file that only the servers' user may read. It replaces an existing one."""
        new = f"{path.name}.new"
        with self._opened(path.parent) as here:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=here)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(new, flags, 0o600, dir_fd=here), "w") as file:
                file.write(text)
                if self.owner:
                    os.fchown(file.fileno(), self.owner.uid, self.owner.gid)
            os.replace(new, path.name, src_dir_fd=here, dst_dir_fd=here)

    def read(self, path: Path) -> str | None:
        """Return the beginning of a file, or None if it does not exist."""
        try:
            with self._opened(path.parent) as here:
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(path.name, flags, dir_fd=here), errors="replace") as file:
                    return file.read(MAX_READ)
        except FileNotFoundError:
            return None

    def remove(self, path: Path) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError), self._opened(path.parent) as here:
            os.unlink(path.name, dir_fd=here)

    @contextlib.contextmanager
    def _opened(self, folder: Path) -> Iterator[int]:
        """Open a folder inside this one step by step. The servers' user owns it, and may have replaced any part by a
        link.

        Raises Fatal if a part is a link.
        """
        is_inside = folder.is_relative_to(self.path)
        here = os.dup(self._here) if is_inside else os.open(folder, FOLDER)
        try:
            for name in folder.relative_to(self.path).parts if is_inside else ():
                try:
                    below = os.open(name, FOLDER, dir_fd=here)
                except OSError as error:
                    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                        raise Fatal(f"{folder} is a link or not a folder. Check who has changed {self.path}.") from None
                    raise
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)

    @property
    def users(self) -> list[str]:
        """The system users who may connect to the servers: the one who runs them, the one who runs this program, and
        root.
        """
        uids = {0, os.geteuid(), self.owner.uid if self.owner else os.geteuid()}
        return [pwd.getpwuid(uid).pw_name for uid in sorted(uids)]

    def _give_to_owner(self) -> None:
        if self.owner is None:
            return
        for folder in (self.path, self.run):
            opened = os.open(folder.resolve() if folder == self.path else folder, os.O_DIRECTORY | os.O_NOFOLLOW)
            os.fchown(opened, self.owner.uid, self.owner.gid)
            os.close(opened)
        if not self._reaches(self.run):
            raise Fatal(
                f"PostgreSQL runs as the user {self.owner.name}, because it refuses to run as root. This user cannot "
                f"reach {self.path}. Make the folders above it accessible to everyone, or {self._advice}."
            )

    def _reaches(self, path: Path) -> bool:
        assert self.owner is not None  # noqa: S101 - needed for another user only
        return (
            subprocess.run(  # noqa: S603 - no outside input
                ["/bin/ls", path], user=self.owner.uid, group=self.owner.gid, extra_groups=[],
                cwd="/", capture_output=True, check=False,
            ).returncode == 0
        )  # fmt: skip


def run_folder(path: Path) -> Path:
    """Return the folder for the Unix sockets of a data folder's servers."""
    if len(os.fsencode(path)) < MAX_SOCKET_DIR:
        return path / "run"
    return Path(tempfile.gettempdir()) / f"openchat-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def installed(package: str) -> Path:
    """Return the folder of an installed package, without importing it. Raises Fatal if the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Fatal(f"the package {package} is not installed. Install it, or set DATABASE_URL and REDIS_URL.")
    return Path(spec.origin).parent


def _copy(package: Path, copy: Path) -> None:
    """Copy a package and the libraries beside it, readable for everyone whatever the umask is."""
    SHARED_BINARIES.mkdir(parents=True, exist_ok=True)
    SHARED_BINARIES.chmod(0o755)
    unfinished = Path(tempfile.mkdtemp(dir=SHARED_BINARIES))
    try:
        for part in (package, package.with_name(f"{package.name}.libs")):
            if part.exists():
                shutil.copytree(part, unfinished / part.name, symlinks=True)
        for path in (unfinished, *unfinished.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
        unfinished.rename(copy)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unprivileged() -> Owner:
    """Return the user who runs the servers for root. Create the user if it does not exist."""
    reason = f"there is no user {USER} to run it as"
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        if shutil.which(MAKE_USER[0]):
            made = subprocess.run(MAKE_USER, capture_output=True, text=True, check=False)  # noqa: S603 - a constant
            reason = (made.stderr.strip().splitlines() or [reason])[0]
        try:
            entry = pwd.getpwnam(USER)
        except KeyError:
            raise Fatal(
                f"PostgreSQL refuses to run as root, and {reason}. Create the user ({' '.join(MAKE_USER)}), "
                "or start openchat as a user other than root."
            ) from None
    if entry.pw_uid == 0:
        raise Fatal(f"PostgreSQL refuses to run as root, and the user {USER} is root. Give it a uid of its own.")
    return Owner(entry.pw_name, entry.pw_uid, entry.pw_gid)
