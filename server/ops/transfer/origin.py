"""The origin of an archive, and ids that derive from it. They are equal in each import from the same origin.

A client that could predict an id could take it first, and so keep a part of the import out. So ids also derive from a
secret of this installation.
"""

import hmac
import secrets
from typing import NamedTuple, Self
from uuid import UUID

import msgspec

from protocol.ids import MessageId
from server.db.database import Db
from server.ops.transfer.archive import ArchivePlace, ArchivePost
from server.queries import push

KEY = "import"
"""The name of the secret among the server's keys."""
KEY_BYTES = 32

_encode = msgspec.json.Encoder().encode


class Origin(NamedTuple):
    """The kind of the other chat, its server or workspace, and the secret of this installation."""

    kind: str
    source: str
    secret: str

    @classmethod
    async def of(cls, db: Db, kind: str, source: str) -> Self:
        """Return an origin with the secret of this installation, which is created if there is none."""
        return cls(kind, source, await push.key(db, KEY, secrets.token_urlsafe(KEY_BYTES)))

    def made_id(self, at_ms: int, *parts: str) -> UUID:
        """Return a UUIDv7 that derives from a time and from texts. Equal arguments give equal ids."""
        words = _encode([self.kind, self.source, *parts])
        random = int.from_bytes(hmac.digest(self.secret.encode(), words, "sha256")[:10])
        high = (at_ms & 0xFFFF_FFFF_FFFF) << 80
        return UUID(int=high | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & 0x3FFF_FFFF_FFFF_FFFF)

    def message_id(self, place: ArchivePlace, post: ArchivePost) -> MessageId:
        """Return the id of the message that a post becomes."""
        return MessageId(self.made_id(post.at_ms, place.key, post.key))

    def participant_id(self, place: ArchivePlace, key: str) -> UUID:
        """Return the id of the participation of the person `key` in a conversation."""
        return self.made_id(0, "participant", place.key, key)
