"""Identifiers: one type per kind of object. Clients make UUIDv7 for the objects that they create."""

import os
import time
from collections.abc import Collection
from typing import NewType
from uuid import UUID

UserId = NewType("UserId", UUID)
SessionId = NewType("SessionId", UUID)
ConversationId = NewType("ConversationId", UUID)
MessageId = NewType("MessageId", UUID)
EditId = NewType("EditId", UUID)
RelationshipId = NewType("RelationshipId", UUID)
ReportId = NewType("ReportId", UUID)

EVERYONE = UserId(UUID(int=2**128 - 1))
"""Stands for all users. No user has this id (RFC 9562, section 5.10)."""

_VERSION_7 = 7


_latest = [0]


def uuid7() -> UUID:
    """Return a new UUIDv7: 48 bits of Unix time in milliseconds, then 74 random bits (RFC 9562, section 5.7).

    Each id is greater than all that this process made before, also within a millisecond (section 6.2, method 2).
    """
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    high = (milliseconds & 0xFFFF_FFFF_FFFF) << 80
    made = high | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & 0x3FFF_FFFF_FFFF_FFFF
    _latest[0] = max(made, _latest[0] + 1)
    return UUID(int=_latest[0])


def made_at(value: UUID) -> int:
    """Return the time in a UUIDv7, in milliseconds since 1970."""
    return value.int >> 80


def require_different_hashes(ids: Collection[UUID], field: str) -> None:
    """Raise ValueError, naming `field`, if different ids have the same hash.

    Python's hash of a UUID is its integer modulo 2^61 - 1, without a secret. An attacker can make thousands of ids with
    one hash, and building a dictionary of 5,000 such ids takes seconds. Two of 5,000 random ids share a hash once in
    10^11 times (docs/decisions/0050-ids-that-collide.md).
    """
    if len({hash(one) for one in ids}) < len({one.bytes for one in ids}):
        raise ValueError(f"Ids in `{field}` must be random UUIDs; some have the same hash")


def require_uuid7(value: UUID, field: str) -> None:
    """Raise ValueError, naming `field`, unless `value` is a UUIDv7."""
    if value.int >> 76 & 0xF != _VERSION_7:
        raise ValueError(f"`{field}` must be a UUIDv7 made by the client")
