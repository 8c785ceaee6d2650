"""Points in time that a client names: with a time zone, and within what Python and PostgreSQL hold in UTC."""

from datetime import UTC, datetime, time
from typing import Annotated

from msgspec import Meta, UnsetType

Moment = Annotated[datetime, Meta(tz=True)]
"""A struct with a field of this type calls `require_moment` for it."""
TimeOfDay = Annotated[time, Meta(tz=False)]


def require_moment(value: datetime | UnsetType | None, field: str) -> None:
    """Raise ValueError, naming `field`, if `value` leaves the years 1 to 9999 in UTC, as `0001-01-01T00:00+01:00`."""
    if isinstance(value, datetime):
        try:
            value.astimezone(UTC)
        except OverflowError:
            raise ValueError(f"`{field}` must be within the years 1 to 9999 in UTC") from None
