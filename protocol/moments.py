"""Times that a client sends: with a time zone, and in the range of Python and PostgreSQL in UTC."""

from datetime import UTC, datetime, time
from typing import Annotated

from msgspec import Meta, UnsetType

Moment = Annotated[datetime, Meta(tz=True)]
"""A struct with a field of this type must call `require_moment` for it."""
TimeOfDay = Annotated[time, Meta(tz=False)]
FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
"""The driver stores these two as `-infinity` and `infinity`."""


def require_moment(value: datetime | UnsetType | None, field: str) -> None:
    """Raise ValueError, naming `field`, if `value` is not between `FIRST` and `LAST`, such as
    `0001-01-01T00:00+01:00`.
    """
    # Times are compared in UTC, without a conversion that could overflow.
    if isinstance(value, datetime) and not FIRST < value < LAST:
        raise ValueError(
            f"`{field}` must be later than 0001-01-01T00:00:00Z and earlier than 9999-12-31T23:59:59.999999Z"
        )
