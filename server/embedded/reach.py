"""Reaching the database of an installation, whether its server runs or not."""

from collections.abc import Iterator
from contextlib import contextmanager

from server.config import Settings
from server.embedded import postgres
from server.embedded.folder import DataFolder, Held
from server.embedded.postgres import Postgres

CONNECTIONS = 10


@contextmanager
def reached(settings: Settings) -> Iterator[str]:
    """Return where the database is: the one that is named, the running embedded one, or that, started for this."""
    if settings.database_url:
        yield settings.database_url
        return
    try:
        folder = DataFolder(settings.data_path)
    except Held as held:
        yield postgres.url(held.run)
        return
    own = Postgres(folder, max_connections=CONNECTIONS)
    try:
        own.start()
        yield own.url()
    finally:
        own.stop()
        folder.release()
