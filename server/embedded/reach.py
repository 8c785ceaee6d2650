"""Reaching the servers of an installation from a command, whether they run or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from server.config import Settings
from server.embedded import postgres, valkey
from server.embedded.folder import DataFolder, Held, run_folder
from server.embedded.postgres import Postgres
from server.errors import Fatal

CONNECTIONS = 10


class Reached(NamedTuple):
    """Where the servers are. `redis_url` is None if no worker runs, and empty if nobody named it."""

    database_url: str
    redis_url: str | None


@contextmanager
def reached(settings: Settings, *, may_create: bool = False) -> Iterator[Reached]:
    """Return where the servers are: those that are named, the running embedded ones, or a PostgreSQL started for this.

    Raises Fatal if there is no embedded database, unless the caller may create it.
    """
    path = settings.data_path
    if settings.database_url:
        yield Reached(settings.database_url, settings.redis_url or _valkey(run_folder(path)) or "")
        return
    if not may_create:
        _require_database(path)
    try:
        folder = DataFolder(path)
    except Held as held:
        yield Reached(postgres.url(held.run), settings.redis_url or _valkey(held.run))
        return
    own = Postgres(folder, max_connections=CONNECTIONS)
    try:
        own.start()
        yield Reached(own.url(), None)
    finally:
        own.stop()
        folder.release()


def _valkey(run: Path) -> str | None:
    return valkey.url(run) if valkey.socket_of(run).exists() else None


def _require_database(path: Path) -> None:
    try:
        postgres.data(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise Fatal(
            f"there is no database in {path}. Correct --data-dir, or set DATABASE_URL; for a new database, start the "
            "server with that --data-dir, or run `openchat migrate` with it."
        ) from None
    except OSError:
        return  # DataFolder says why it cannot be used
