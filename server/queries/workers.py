"""The workers that are connected to the database."""

import re

from server.db.database import APPLICATION, Db

CONNECTED = "SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = current_database()"
NAME = re.compile(rf"{APPLICATION}(?: ((?:[0-9a-f]{{2}})+))?")


async def connected(db: Db) -> list[bytes]:
    """Return the ids of the workers. The connections of earlier releases name no id, so it is empty."""
    names = [NAME.fullmatch(row[0] or "") for row in await db.fetch(CONNECTED)]
    return [bytes.fromhex(name[1] or "") for name in names if name is not None]
