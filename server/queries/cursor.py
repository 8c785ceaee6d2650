"""Cursors: the end of a page as a time and an id. Clients pass the opaque text back to get the next page."""

from datetime import UTC, datetime
from typing import Any, NamedTuple, Self
from uuid import UUID

from protocol.errors import ErrorCode, Refused


def moment_of(text: str) -> datetime:
    """Return a time in UTC. Raises ValueError without a time zone, or outside the years 1 to 9999."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError from None


class Cursor(NamedTuple):
    """A place in a list that is sorted by time, and then by id."""

    at: datetime
    id: UUID

    def __str__(self) -> str:
        return f"{self.at.isoformat()}/{self.id}"

    @classmethod
    def of(cls, columns: Any) -> str | None:  # noqa: ANN401 - a row has no type
        """Return the cursor of a row, whose second and third column are its time and id. Return None for a NULL time,
        which stands for one before the year 1. The list ends there.
        """
        return None if columns[1] is None else str(cls(columns[1], UUID(int=columns[2].int)))

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Parse the text of a cursor. Return None for None. Raises Refused if it is invalid."""
        if text is None:
            return None
        moment, _, one = text.partition("/")
        try:
            return cls(moment_of(moment), UUID(one))
        except ValueError:
            raise not_a_cursor() from None


def not_a_cursor() -> Refused:
    """Return the refusal for an `after` that is not from a page."""
    return Refused(ErrorCode.INVALID, "`after` must be the `after` of an earlier page, unchanged.", path="after")
