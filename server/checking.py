"""`openchat check`: whether what is stored is what it should be. While the server runs, and without a lock."""

import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import NamedTuple

from server.database import Db
from server.queries import checks
from server.queries.checks import CHECKS, Found

PAIRS = 50
"""For so many people and conversations that one picks the other of, and as many who are in, is looked what they see."""
NOBODY_SEES = "nobody sees what they may not (a sample)"


class Line(NamedTuple):
    """A line of the table: what was asked, of about how many rows, how long that took, and what was found."""

    name: str
    rows: int
    seconds: float
    found: Found | None
    """None if it could not be asked."""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return self.found is None or not self.found.number


async def run(db: Db, *, begins: Callable[[str], None], grace: timedelta = checks.GRACE) -> AsyncIterator[Line]:
    """Ask all questions, one after the other. `begins` is told of each before it is asked; `checks.run` has `grace`."""
    sizes = await checks.sizes(db)
    for check in CHECKS:
        begins(check.name)
        began = time.monotonic()
        found = await checks.run(db, check, grace=grace)
        yield Line(check.name, sizes.get(check.over, 0), time.monotonic() - began, found)
    begins(NOBODY_SEES)
    began = time.monotonic()
    leaks = await checks.leaks(db, many=PAIRS) if await checks.may_make_roles(db) else None
    yield Line(NOBODY_SEES, 2 * PAIRS, time.monotonic() - began, leaks)
