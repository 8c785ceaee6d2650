"""Entries: the events of one message on the bus.

While a release replaces another one, workers of both share the bus. A worker leaves out what it cannot read, and logs
that once per minute.
"""

import logging
import struct
from collections.abc import Iterator
from uuid import UUID

from server.core.faults import ONCE

ID_BYTES = 16
NOBODY = bytes(ID_BYTES)
"""The user of an entry by which nobody left."""
_HEADER = struct.Struct("!QI16s")
"""The header of an entry: its version or kind, the length of its frame, and the user who left by it. On the channel of
watchers, the revision of the presence or face takes the place of the user.
"""

log = logging.getLogger(__name__)


def pack(version: int, frame: bytes, gone: bytes = NOBODY) -> bytes:
    """Return an entry. A message is a sequence of them."""
    return _HEADER.pack(version, len(frame), gone) + frame


def unpack(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the version or kind, the frame and the user of each entry, up to one that is cut off."""
    end = 0
    while (start := end + _HEADER.size) <= len(message):
        version, size, gone = _HEADER.unpack_from(message, end)
        end = start + size
        if end > len(message):
            break
        yield version, message[start:end], gone
        if end == len(message):
            return
    log_ignored("it is cut off")


def ids_of(frame: bytes) -> list[UUID]:
    """Return the ids in a frame of a worker, or none if one is cut off."""
    if len(frame) % ID_BYTES:
        log_ignored("its list of ids is cut off")
        return []
    return [UUID(bytes=frame[start : start + ID_BYTES]) for start in range(0, len(frame), ID_BYTES)]


def log_ignored(why: str) -> None:
    """Log that this worker left out a message or a part of it. `why` is one of few texts."""
    text = "ignored a message on the bus: %s; perhaps another worker runs another release"
    log.warning(text, why, extra={ONCE: f"ignored messages on the bus ({why})"})
