"""Reaching the servers of an installation from a command, whether they run or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from server.core.config import Settings, without_password
from server.core.errors import Fatal
from server.processes.embedded import postgres, valkey
from server.processes.embedded.folder import DataFolder, FolderHeld, run_folder
from server.processes.embedded.postgres import Postgres

CONNECTIONS = 10


class Reached(NamedTuple):
    """Where the servers are. `redis_url` is None if no worker runs, and empty if nobody named it. `name` is for people:
    the database, without its password.
    """

    database_url: str
    redis_url: str | None
    name: str


@contextmanager
def reached(settings: Settings, *, may_create: bool = False) -> Iterator[Reached]:
    """Return where the servers are: those that are named, the running embedded ones, or a PostgreSQL started for this.

    Raises Fatal if there is no embedded database, unless the caller may create it.
    """
    path = settings.data_path
    if settings.database_url:
        yield Reached(settings.database_url, settings.redis_url or _valkey(run_folder(path)) or "", named(settings))
        return
    if not may_create:
        _require_database(path)
    try:
        folder = DataFolder(path)
    except FolderHeld as held:
        yield Reached(postgres.url(held.run), settings.redis_url or _valkey(held.run), named(settings))
        return
    own = Postgres(folder, max_connections=CONNECTIONS)
    try:
        own.start()
        yield Reached(own.url(), None, named(settings))
    finally:
        own.stop()
        folder.release()


def named(settings: Settings) -> str:
    """Return which database is used: its URL without a password, or the data folder that it is in."""
    return without_password(settings.database_url) if settings.database_url else str(settings.data_path)


def _valkey(run: Path) -> str | None:
    return valkey.url(run) if valkey.socket_of(run).exists() else None


def _require_database(path: Path) -> None:
    try:
        postgres.data(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise Fatal(
            f"there is no database in {path}. Correct --data-dir, or set DATABASE_URL instead. To create a database, "
            "start the server or run `openchat migrate` with this --data-dir."
        ) from None
    except OSError:
        return  # DataFolder says why it cannot be used
