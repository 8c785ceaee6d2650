"""The bytes of one conversation's events. The first socket of this process that receives them checks them.

The server sends the same bytes to every socket in a conversation. So one socket of a process parses each frame and
checks its version. Every other socket compares its data with these bytes, a chunk at a time, with one memcmp. It
detects each lost, repeated or reordered byte. In this way two processes check millions of deliveries a second.
"""

from bisect import bisect_right
from collections.abc import Iterator


class Stream:
    """The frames of a conversation after a version."""

    __slots__ = ("dues", "ends", "log", "version")

    def __init__(self, version: int) -> None:
        """`version` is the conversation's version before the first frame."""
        self.version = version
        self.log = bytearray()
        self.ends: list[int] = []
        # The due time of each message, in nanoseconds of the monotonic clock; 0 if it is unknown.
        self.dues: list[int] = []

    def append(self, frame: bytes, due: int) -> None:
        """Add the frame of the next version."""
        self.log += frame
        self.ends.append(len(self.log))
        self.dues.append(due)

    def version_at(self, offset: int) -> int:
        """Return the version that a reader has reached at an offset."""
        return self.version + bisect_right(self.ends, offset)

    def begin_of_frame(self, offset: int) -> int:
        """Return where the frame at `offset` begins, or `offset` itself between two frames."""
        before = bisect_right(self.ends, offset)
        return self.ends[before - 1] if before else 0

    def completed(self, before: int, after: int) -> Iterator[tuple[int, int]]:
        """Yield the due times and counts of the frames that a reader completed between two offsets.

        Up to four frames are yielded one by one. For more, all count with the oldest due time, so latencies are never
        underestimated.
        """
        first, last = bisect_right(self.ends, before), bisect_right(self.ends, after)
        if last - first <= 4:  # noqa: PLR2004
            for place in range(first, last):
                yield self.dues[place], 1
        else:
            yield self.dues[first], last - first
