"""The messages between a supervisor and its workers."""

import msgspec

from server.core.config import Settings

READY = "ready\n"
"""A worker's output when it accepts connections. Any other output is the reason why it cannot."""
DRAIN_SECONDS = 15
"""Max time for a worker to finish frames in progress, in seconds."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """The parameters of a worker: its settings, its number, the listening socket, the folder that workers share, and
    whether it is the only one.
    """

    settings: Settings
    number: int
    listener: int
    folder: str
    is_alone: bool = False
