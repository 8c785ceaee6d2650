"""The messages between the command and its processes: lines of JSON on standard input and output."""

import msgspec

from loadtest.connection import User
from loadtest.counters import Tally
from loadtest.scenario import Size


class _Order(msgspec.Struct, tag_field="order", kw_only=True):
    """An order to a process, which answers it with `Done`."""


class Connect(_Order, tag="connect", kw_only=True):
    """Connect these users, max `at_once` of them concurrently."""

    connection: str
    host: str
    address: str
    port: int
    users: list[User]
    members: dict[str, list[str]]
    at_once: int
    is_quiet: bool = False
    """Whether these connections are not counted, because only later ones are measured."""


class Drive(_Order, tag="drive", kw_only=True):
    """Perform `rate` actions per second from `begin` to `end`, in nanoseconds of the monotonic clock."""

    scenario: str
    size: Size
    rate: float
    begin: int
    end: int
    seed: int


class Settle(_Order, tag="settle", kw_only=True):
    """Wait at most `seconds` until all events up to `versions` have arrived. Events that have not count as lost."""

    versions: dict[str, int]
    seconds: float


class Fill(_Order, tag="fill", kw_only=True):
    """Write the messages of one conversation from `first` up to `last`, as fast as possible."""

    conversation_id: str
    first: int
    last: int


Order = Connect | Drive | Settle | Fill


class Tick(msgspec.Struct, tag="tick", tag_field="what", kw_only=True):
    """The counts since the last tick."""

    tally: Tally
    open: int
    """Number of open connections."""
    behind: float = 0.0
    """Lateness of the process's actions, in seconds."""


class Done(msgspec.Struct, tag="done", tag_field="what", kw_only=True):
    """An order was carried out. `versions` are the highest versions received, by conversation."""

    versions: dict[str, int] = {}
    failed: str = ""


Report = Tick | Done
