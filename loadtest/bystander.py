"""Runs `bystander`: strangers alone, and then beside each kind of hot conversation or user, in one installation.

It starts its own installation, because it holds rows and delays the connections to the database.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import asyncpg
import msgspec

from loadtest.counters import Tally
from loadtest.distance import DistantDatabase
from loadtest.histogram import Histogram
from loadtest.installation import Installation
from loadtest.progress import Progress
from loadtest.run import START_SECONDS, Phase, Result, Run
from loadtest.scenario import Size
from loadtest.scenarios import ALL
from loadtest.target import OpenChat
from protocol.ids import ConversationId

MS = 1_000
SETTINGS = {
    # All accounts are registered from a few addresses, and are not friends of each other.
    "OPENCHAT_LOGIN_ATTEMPTS_PER_ADDRESS": "100000",
    "OPENCHAT_ADD_PEOPLE": "anyone",
}
LEAD_SECONDS = 1.7
"""Time from the order for a phase until its frames are sent and their first ones answered, in seconds."""
HELD_SECONDS, FREE_SECONDS = 4.0, 1.0
"""How long a session holds the row, and pauses, in seconds."""
BACKLOG = 6_000
"""Messages that expire at the same time."""
FILL_RATE = 1_000.0
"""Messages of the backlog per second, before they expire."""
POLL_SECONDS = 0.1
QUIET = 0.5
"""Duration of the strangers alone before each fault, as a share of that beside it."""

HOLD = "SELECT FROM conversation WHERE id = $1 FOR UPDATE"
EXPIRE = "UPDATE message SET expires_at = now() WHERE conversation_id = $1 AND NOT is_deleted"
SPARE = "UPDATE message SET expires_at = NULL WHERE conversation_id = $1 AND NOT is_deleted"
EXPIRED = "SELECT count(*) FROM message WHERE conversation_id = $1 AND is_deleted"


class Beside(NamedTuple):
    """Arguments of `meanwhile`: the database and the hot conversation."""

    url: str
    """URL of the database, without delay."""
    conversation_id: ConversationId
    seconds: float

    async def database(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Connect to the database."""
        return await asyncpg.connect(self.url)


class Fault(NamedTuple):
    """A hot conversation or user: the scenario that drives it, and what happens in the database meanwhile.

    `meanwhile` returns what was reached in words, or an empty string if the frames of the scenario say it.
    """

    name: str
    about: str
    scenario: str
    rate: float
    meanwhile: Callable[[Beside], Awaitable[str]] | None = None
    fill: int = 0
    """Number of messages that are written before."""


async def _hold_row(beside: Beside) -> str:
    """Hold the conversation's row again and again, from the first answers of the phase to its end."""
    await asyncio.sleep(LEAD_SECONDS)
    end = time.monotonic() + beside.seconds
    db = await beside.database()
    try:
        while (left := end - time.monotonic()) > 0:
            async with db.transaction():
                await db.execute(HOLD, beside.conversation_id)
                await asyncio.sleep(min(HELD_SECONDS, left))
            await asyncio.sleep(FREE_SECONDS)
    finally:
        await db.close()
    return ""


async def _expire(beside: Beside) -> str:
    """Make all messages of the conversation due, and measure how fast they expire."""
    await asyncio.sleep(LEAD_SECONDS)
    db = await beside.database()
    try:
        total = int((await db.execute(EXPIRE, beside.conversation_id)).split()[-1])
        began = time.monotonic()
        gone, took = 0, 0.0
        while gone < total and took < beside.seconds:
            await asyncio.sleep(POLL_SECONDS)
            gone, took = await db.fetchval(EXPIRED, beside.conversation_id), time.monotonic() - began
        await db.execute(SPARE, beside.conversation_id)  # so that the next phase begins without a backlog
    finally:
        await db.close()
    return f"{gone:,} of {total:,} expired, {gone / took:,.0f}/s"


FAULTS = (
    Fault("row held", "a session holds the row of a busy conversation, 4 of every 5 s", "writing", 80.0, _hold_row),
    Fault("reactions", "40 people react 6 times a second in one channel", "reacting", 240.0),
    Fault("many reactions", "40 people react 30 times a second in one channel", "reacting", 1_200.0),
    Fault("votes", "40 people vote 6 times a second in one channel", "voting", 240.0),
    Fault("many votes", "40 people vote 30 times a second in one channel", "voting", 1_200.0),
    Fault("busy account", "one account on 5 devices, as busy as its limits", "busy", ALL["busy"].rate),
    Fault("joins and leaves", "20 people join and leave a channel in which 20 write", "joining", 80.0),
    Fault("expiry", f"{BACKLOG:,} messages expire at the same time", "filling", 0.0, _expire, fill=BACKLOG),
)
"""The faults, in the order of the table."""


class Span(msgspec.Struct):
    """Latency in milliseconds, from the time at which a frame was due to its answer."""

    p50: float
    p99: float

    @classmethod
    def of(cls, counts: dict[int, int]) -> "Span":
        """Return the percentiles of a histogram."""
        histogram = Histogram(counts)
        return cls(histogram.percentile(0.5) * MS, histogram.percentile(0.99) * MS)


class Row(msgspec.Struct, kw_only=True):
    """One row of the table: what strangers noticed, and what the hot party reached."""

    delay: float
    """Round trip to PostgreSQL that was added, in milliseconds."""
    fault: str
    """The name of the fault; empty for the strangers alone."""
    send: Span
    history: Span
    refused: int
    """Frames of strangers that were refused or not answered."""
    offered: float = 0.0
    """Frames of the hot party per second, and those of them that were answered without a refusal."""
    answered: float = 0.0
    errors: dict[str, int] = {}
    """Refusals of the hot party, by code."""
    reached: str = ""
    """Progress of the hot party other than frames, in words."""


class Comparison(msgspec.Struct, kw_only=True):
    """A whole run."""

    scenario: str
    where: str
    rows: list[Row]
    strangers: Result
    """The phases of the strangers, whose names are the delay and the fault."""
    hot: list[Phase]


class Bystander:
    """A run of the scenario."""

    def __init__(
        self, faults: Sequence[Fault], *, size: Size, seconds: float, workers: int, progress: Progress
    ) -> None:
        """`seconds` is the duration of each phase."""
        self._faults = faults
        self._size = size
        self._seconds = seconds
        self._workers = workers
        self._progress = progress
        self.rows: list[Row] = []
        self._hot: list[Phase] = []

    async def run(self, delays: Sequence[float]) -> Comparison:
        """Measure all faults at each distance of the database, in milliseconds."""
        self._progress.step("starting an installation …")
        async with Installation(self._workers, SETTINGS) as installation, DistantDatabase(installation.run) as database:
            quiet, hot = (OpenChat(installation.url, is_kept=False) for _ in range(2))
            async with Run(quiet, "bystander", self._size, processes=1, progress=self._progress) as strangers:
                await strangers.connect()
                for delay in delays:
                    await database.set_round_trip(delay / MS)
                    alone, place = Tally(), len(self.rows)
                    self.rows.append(_row(delay, "", alone))
                    for fault in self._faults:
                        # Before each fault, because other programs may use the machine, too.
                        phase = await strangers.drive(
                            self._seconds * QUIET, self._size.rate, name=_name(delay, "quiet")
                        )
                        self.rows[place] = _row(delay, "", alone.add(phase.tally))
                        await self._beside(fault, strangers, delay, hot, database.url("openchat"))
                return Comparison(
                    scenario="bystander",
                    where=f"{_workers(self._workers)}, {self._size.rate:g} frames of strangers per second",
                    rows=self.rows,
                    strangers=strangers.result,
                    hot=self._hot,
                )

    async def _beside(self, fault: Fault, strangers: Run, delay: float, target: OpenChat, url: str) -> None:
        kind = ALL[fault.scenario]
        size = Size(
            people=kind.people, connections=kind.connections or kind.people, group=kind.group, rate=fault.rate
        )  # fmt: skip
        silent = Progress()
        self._progress.step(f"{_name(delay, fault.name)}: {fault.about} …")
        async with Run(target, fault.scenario, size, processes=1, progress=silent) as hot:
            await hot.connect()
            if fault.fill:
                await hot.drive(fault.fill / FILL_RATE, FILL_RATE)
            beside = Beside(url, target.conversations[0], self._seconds)
            busy, phase, reached = await asyncio.gather(
                hot.drive(self._seconds, fault.rate),
                strangers.drive(self._seconds, self._size.rate, name=_name(delay, fault.name)),
                fault.meanwhile(beside) if fault.meanwhile else _nothing(),
            )
        self._hot.append(busy)
        row = _row(delay, fault.name, phase.tally)
        # The phase ends with the last answer, which may be long after the last frame.
        row.offered, row.answered = fault.rate, busy.tally.answered / (busy.seconds - START_SECONDS)
        row.errors, row.reached = busy.tally.errors, reached
        self.rows.append(row)
        await target.leave()


async def _nothing() -> str:
    return ""


def _row(delay: float, fault: str, tally: Tally) -> Row:
    return Row(
        delay=delay, fault=fault, send=Span.of(tally.answers), history=Span.of(tally.pages),
        refused=tally.sent - tally.answered,
    )  # fmt: skip


def _name(delay: float, fault: str) -> str:
    return f"{delay:g} ms, {fault}"


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
