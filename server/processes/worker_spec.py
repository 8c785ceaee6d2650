"""What a supervisor and its workers say to each other."""

import msgspec

from server.core.config import Settings

READY = "ready\n"
"""What a worker says on standard output when it takes connections; anything else is why it cannot."""
DRAIN_SECONDS = 15
"""How long a worker may take to finish what is in flight."""


class Orders(msgspec.Struct, frozen=True):
    """What a worker is told: its settings, its number, the listening socket, the folder workers share, and whether
    it is the only one.
    """

    settings: Settings
    number: int
    listener: int
    folder: str
    is_alone: bool = False
