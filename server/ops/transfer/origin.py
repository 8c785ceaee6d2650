"""Where an archive comes from, and the ids that follow from it: the same in each import from the same source.

A client that could foresee an id could take it first, and keep a part of the import out. So ids also follow from a
secret of this installation.
"""

import hmac
import secrets
from typing import NamedTuple, Self
from uuid import UUID

import msgspec

from server.db.database import Db
from server.queries import push

KEY = "import"
"""The name of the secret among the keys of the server."""
KEY_BYTES = 32

_encode = msgspec.json.Encoder().encode


class Origin(NamedTuple):
    """The kind of the other chat, which server or workspace it was, and the secret of this installation."""

    kind: str
    source: str
    secret: str

    @classmethod
    async def of(cls, db: Db, kind: str, source: str) -> Self:
        """Return an origin with the secret of this installation, which is made if there is none."""
        return cls(kind, source, await push.key(db, KEY, secrets.token_urlsafe(KEY_BYTES)))

    def made_id(self, at_ms: int, *parts: str) -> UUID:
        """Return a UUIDv7 that follows from a moment and from words: the same again for the same."""
        words = _encode([self.kind, self.source, *parts])
        random = int.from_bytes(hmac.digest(self.secret.encode(), words, "sha256")[:10])
        high = (at_ms & 0xFFFF_FFFF_FFFF) << 80
        return UUID(int=high | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & 0x3FFF_FFFF_FFFF_FFFF)
