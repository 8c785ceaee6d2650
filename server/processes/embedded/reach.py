"""Connects commands to the servers of an installation, whether these run or not."""

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
"""Max connections of a PostgreSQL that a command starts."""


class Reached(NamedTuple):
    """The addresses of the servers. `redis_url` is None if no worker runs, and empty if it is unknown. `name` is the
    database's name for people, without a password.
    """

    database_url: str
    redis_url: str | None
    name: str


@contextmanager
def reached(settings: Settings, *, may_create: bool = False) -> Iterator[Reached]:
    """Yield the addresses of the servers: the given ones, the running embedded ones, or a PostgreSQL that is started
    for the block.

    Raises Fatal if there is no embedded database, unless `may_create` allows to create it.
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
    """Return the database's URL without a password, or its data folder."""
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
        return  # DataFolder raises with the reason
