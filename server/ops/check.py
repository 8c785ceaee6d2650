"""`openchat check` verifies the stored data while the server runs, without locks."""

import time
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from server.db.database import Db
from server.ops.progress import Progress
from server.queries import checks
from server.queries.checks import CHECKS, Violations

PAIRS = 50
"""Size of the sample of users and of conversations whose visibility is checked."""
NO_LEAKS = "no user can read hidden messages (a sample)"


class CheckLine(NamedTuple):
    """The result of a check, with its name and its duration in seconds."""

    name: str
    seconds: float
    found: Violations | None
    """None if the check could not run."""

    @property
    def is_good(self) -> bool:
        """Whether no violations were found."""
        return self.found is None or not self.found.number


async def run_checks(db: Db, *, progress: Progress, grace: timedelta = checks.GRACE) -> AsyncIterator[CheckLine]:
    """Run all checks, one after the other, and show the progress. `grace` is passed to `checks.run`."""
    slices = await checks.slices(db)
    for check in CHECKS:
        progress.begins(check.name)
        began = time.monotonic()
        found = Violations(0, [])
        parts = slices[check.by]
        for number, part in enumerate(parts, start=1):
            found = found.with_more(await checks.run(db, check, part, grace=grace))
            if len(parts) > 1:
                progress.counts(f"{check.name}, parts of {len(parts):,}", number)
        yield CheckLine(check.name, time.monotonic() - began, found)
    progress.begins(NO_LEAKS)
    began = time.monotonic()
    leaks = None
    if await checks.may_make_roles(db):
        leaks = await checks.leaks(db, many=PAIRS, counts=partial(progress.counts, NO_LEAKS))
    yield CheckLine(NO_LEAKS, time.monotonic() - began, leaks)
