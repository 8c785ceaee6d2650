"""`openchat check`: whether what is stored is what it should be. While the server runs, and without a lock."""

import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import NamedTuple

from server.db.database import Db
from server.queries import checks
from server.queries.checks import CHECKS, Violations

PAIRS = 50
"""For so many people and conversations that one picks the other of, and as many who are in, is looked what they see."""
NOBODY_SEES = "nobody sees what they may not (a sample)"


class CheckLine(NamedTuple):
    """A line of the table: what was asked, how long that took in seconds, and what was found."""

    name: str
    seconds: float
    found: Violations | None
    """None if it could not be asked."""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return self.found is None or not self.found.number


async def run_checks(
    db: Db, *, begins: Callable[[str], None], grace: timedelta = checks.GRACE
) -> AsyncIterator[CheckLine]:
    """Ask all questions, one after the other. `begins` is told of each before it is asked; `checks.run` has `grace`."""
    for check in CHECKS:
        begins(check.name)
        began = time.monotonic()
        found = await checks.run(db, check, grace=grace)
        yield CheckLine(check.name, time.monotonic() - began, found)
    begins(NOBODY_SEES)
    began = time.monotonic()
    leaks = await checks.leaks(db, many=PAIRS) if await checks.may_make_roles(db) else None
    yield CheckLine(NOBODY_SEES, time.monotonic() - began, leaks)
