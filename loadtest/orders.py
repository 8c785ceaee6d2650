"""What the command and its processes say to each other: lines of JSON on standard input and output."""

import msgspec

from loadtest.ledger import Tally
from loadtest.line import Seat
from loadtest.scenario import Size


class _Order(msgspec.Struct, tag_field="order", kw_only=True):
    """What a process is to do; it says `Done` afterwards."""


class Connect(_Order, tag="connect", kw_only=True):
    """Take these seats, `at_once` of them at a time."""

    line: str
    host: str
    address: str
    port: int
    seats: list[Seat]
    members: dict[str, list[str]]
    at_once: int
    is_quiet: bool = False
    """Take the seats without counting that: more of them come, to be measured."""


class Drive(_Order, tag="drive", kw_only=True):
    """Do `rate` things a second, from one time of the monotonic clock to another (nanoseconds)."""

    scenario: str
    size: Size
    rate: float
    begin: int
    end: int
    seed: int


class Settle(_Order, tag="settle", kw_only=True):
    """Wait for all that is still to come, at most so many seconds; then count what has not come as lost."""

    versions: dict[str, int]
    seconds: float


class Fill(_Order, tag="fill", kw_only=True):
    """Write the messages of one conversation from one number to another, as fast as it goes."""

    conversation_id: str
    first: int
    last: int


Order = Connect | Drive | Settle | Fill


class Tick(msgspec.Struct, tag="tick", tag_field="what", kw_only=True):
    """What was counted since the last one."""

    tally: Tally
    open: int
    """How many lines there are now."""
    behind: float = 0.0
    """How late, in seconds, the process is with what it should do."""


class Done(msgspec.Struct, tag="done", tag_field="what", kw_only=True):
    """An order has been carried out; `versions` are how far each conversation has come."""

    versions: dict[str, int] = {}
    failed: str = ""


Report = Tick | Done
