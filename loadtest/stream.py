"""One conversation's events as bytes, as the first socket of this process that read them checked them.

The server sends the same bytes to every socket that follows a conversation. So one socket of a process takes each
frame apart and checks its version, and every other one compares what it reads with that, a chunk at a time:
a byte lost, repeated or moved shows, at the cost of a memcmp. This is what lets two processes check millions of
deliveries a second.
"""

from bisect import bisect_right
from collections.abc import Iterator


class Stream:
    """The frames of a conversation after a version."""

    __slots__ = ("dues", "ends", "log", "version")

    def __init__(self, version: int) -> None:
        """`version` is the conversation's clock before the first frame."""
        self.version = version
        self.log = bytearray()
        self.ends: list[int] = []
        # When each message was due to be sent, in nanoseconds of the monotonic clock; 0 if nobody knows.
        self.dues: list[int] = []

    def append(self, frame: bytes, due: int) -> None:
        """Add the frame of the next version."""
        self.log += frame
        self.ends.append(len(self.log))
        self.dues.append(due)

    def version_at(self, offset: int) -> int:
        """Return the version that a reader is at who has read this far."""
        return self.version + bisect_right(self.ends, offset)

    def begin_of_frame(self, offset: int) -> int:
        """Return where the frame begins that a reader is in the middle of, or `offset` between two."""
        before = bisect_right(self.ends, offset)
        return self.ends[before - 1] if before else 0

    def completed(self, before: int, after: int) -> Iterator[tuple[int, int]]:
        """Yield when the frames were due that a reader completed between two offsets, each with how many.

        Few of them one by one; of many only the oldest, for all: so spans are never made shorter than they were.
        """
        first, last = bisect_right(self.ends, before), bisect_right(self.ends, after)
        if last - first <= 4:  # noqa: PLR2004
            for place in range(first, last):
                yield self.dues[place], 1
        else:
            yield self.dues[first], last - first
