"""The bounds of everything a client may send, as types that the decoder enforces, and as `Limits` in `ready`."""

from typing import Annotated

import msgspec
from msgspec import Meta

NO_NUL = r"^[^\x00]*$"
"""PostgreSQL's text cannot hold U+0000, so no text on the wire may."""

MAX_FRAME_BYTES = 256 * 1024
MAX_CONTENT = 10_000
MAX_PAGE = 100
DEFAULT_PAGE = 20
MAX_PARTICIPANTS_NAMED = 100
MAX_WATCHED = 500
MAX_RESUMED = 5_000
MAX_CHANGES = 1_000
MAX_METADATA_BYTES = 16 * 1024
MAX_MENTIONS = 50
MAX_EMOJI_PER_MESSAGE = 20
MAX_POLL_OPTIONS = 20
MAX_PINS = 100
MAX_HASHTAGS = 50
MAX_SCHEDULED = 100
"""Messages of one user that wait for their time."""
MAX_PUSH_ENDPOINTS = 20
MAX_COUNTED = 100
"""Where unread counts stop."""
MAX_NAMED_PARTICIPANTS = 1_000
"""In a conversation with more than this, `@name` mentions nobody; `<@id>` does."""
MAX_SHARED_PARTICIPANTS = 100
"""In a conversation with more than this, who types and who has read is not broadcast."""

Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
Title = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
Description = Annotated[str, Meta(max_length=1_000, pattern=NO_NUL)]
InviteCode = Annotated[str, Meta(min_length=1, max_length=50, pattern=NO_NUL)]
CustomStatus = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
Text = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
Bio = Annotated[str, Meta(max_length=500, pattern=NO_NUL)]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=NO_NUL)]
Link = Annotated[str, Meta(min_length=1, max_length=2_000, pattern=r"^https?://[^\x00\s]+$")]
"""An address on the web: nothing that a page could be made to run."""
PinOrder = Annotated[int, Meta(ge=0, le=10_000)]
Seconds = Annotated[int, Meta(ge=1, le=365 * 86_400)]
Content = Annotated[str, Meta(min_length=1, max_length=MAX_CONTENT, pattern=NO_NUL)]
MAX_FORMATTED = 15_000
DraftContent = Annotated[str, Meta(max_length=MAX_CONTENT, pattern=NO_NUL)]
Emoji = Annotated[str, Meta(min_length=1, max_length=32, pattern=NO_NUL)]
Email = Annotated[str, Meta(min_length=3, max_length=254, pattern=r"^[^\x00\s@]+@[^\x00\s@]+$")]
Password = Annotated[str, Meta(min_length=8, max_length=128)]
Token = Annotated[str, Meta(min_length=1, max_length=128)]
Cursor = Annotated[str, Meta(min_length=1, max_length=128)]
PageSize = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
Version = Annotated[int, Meta(ge=0, le=2**53 - 1)]
"""A number of a conversation's clock: exact in JavaScript, too."""


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket that never runs dry on the server if it does not on the client, with a second to spare for frames
    that arrive closer together than they were sent.
    """

    per_second: float
    burst: int


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client has to keep to; sent in `ready` so that none has to be guessed."""

    frame_bytes: int = MAX_FRAME_BYTES
    content_characters: int = MAX_CONTENT
    metadata_bytes: int = MAX_METADATA_BYTES
    mentions: int = MAX_MENTIONS
    page: int = MAX_PAGE
    participants_named: int = MAX_PARTICIPANTS_NAMED
    watched_users: int = MAX_WATCHED
    resumed_conversations: int = MAX_RESUMED
    changes_before_start_over: int = MAX_CHANGES
    frames: RateLimit
    """All frames on this connection."""
    writes: RateLimit
    """Frames that count as `write`, of all connections of the user together; so the next three."""
    reads: RateLimit
    ephemeral: RateLimit
    searches: RateLimit
