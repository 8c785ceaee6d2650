"""Limits of everything that clients send: types that the decoder enforces, and `Limits` for `ready`."""

import re
from typing import Annotated

import msgspec
from msgspec import Meta

NO_NUL = r"^[^\x00]*\Z"
"""No U+0000. PostgreSQL cannot store it in `text`."""
_BREAKS = "\t\n\r"
_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
"""Control characters (Cc), besides `_BREAKS`."""
_FORMAT = (
    "\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
    "\U000e0020-\U000e007f"
)
"""Format characters (Cf) and separators of lines and paragraphs, without the two joiners. Emoji, Persian and Indian
scripts need those.
"""
_JOINERS = "\u200c\u200d"
_BLANK = (
    rf"\s{_JOINERS}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef"
)
"""Characters that are invisible by themselves: white space, fillers, U+2800, variation selectors."""
LINE = rf"^(?=.*[^{_BLANK}])[^{_BREAKS}{_CONTROL}{_FORMAT}]*\Z"
"""Text that is shown on one line: at least one visible character, and none that hides, reorders or breaks text."""
LINES = rf"^[^{_CONTROL}{_FORMAT}]*\Z"
_SHOWN = re.compile(f"[^{_BLANK}]")
_BLANKS = re.compile(f"[{_BLANK}]+")
_HIDDEN = re.compile(f"[{_BREAKS}{_CONTROL}{_FORMAT}]")
_HIDDEN_IN_LINES = re.compile(f"[{_CONTROL}{_FORMAT}]")
WEB = rf'^https?://[^\s"<>`\\{_CONTROL}{_FORMAT}]+\Z'
_ADDRESS = rf"[^\s@{_CONTROL}{_FORMAT}{_JOINERS}]+"
ADDRESS = rf"^{_ADDRESS}@{_ADDRESS}\Z"
"""An e-mail address of an account."""
EMAIL = rf"^(?!.*[@.][Ii][Nn][Vv][Aa][Ll][Ii][Dd]\.?\Z){_ADDRESS}@{_ADDRESS}\Z"
"""An e-mail address that can be registered. The top-level domain `invalid` (RFC 2606) is reserved: the server gives
such addresses to users who have none.
"""
ZONE = r"^[A-Za-z0-9_+/-]+\Z"
"""Characters of IANA time zone names. The server also checks each name against those that PostgreSQL knows."""
HASHTAG = r"^\w+\Z"
KEY = r"^[A-Za-z0-9_=-]+\Z"
"""A key of a push endpoint, in base64url (RFC 4648, section 5)."""
MIME_TYPE = r"^[a-z0-9.+-]+/[a-z0-9.+-]+\Z"
LANGUAGE = r"^[a-z0-9][a-z0-9+#._-]*\Z"
"""A name of a programming language."""
_NO_ADDRESS = "Give an e-mail address such as ada@example.org, without spaces, control or invisible characters."
RULES = {
    NO_NUL: "The character U+0000 is not allowed. Remove it.",
    LINE: "Give at least one visible character, no control characters, line breaks or invisible format characters.",
    LINES: "Control characters and invisible format characters are not allowed. Remove them.",
    WEB: "Give an http or https URL without spaces, quotation marks, `<`, `>`, backticks or backslashes.",
    ADDRESS: _NO_ADDRESS,
    EMAIL: f"{_NO_ADDRESS} Addresses that end in `.invalid` are reserved.",
    ZONE: "Give an IANA name such as `Europe/London`.",
    HASHTAG: "Give a hashtag of letters, digits and `_` only, without `#`.",
    KEY: "Give the key in base64url, as browsers provide it.",
    MIME_TYPE: "Give a MIME type in lower case, such as `image/png`.",
    LANGUAGE: "Give the name of a programming language in lower case, such as `python` or `c++`.",
}
"""Sentences for patterns, because a pattern says little to people."""

MAX_FRAME_BYTES = 256 * 1024
"""Max bytes per frame of a client."""
MAX_CONTENT = 10_000
"""Max characters of `content`, per message."""
MAX_PAGE = 100
"""Max rows per page."""
DEFAULT_PAGE = 20
"""Rows per page without `limit`."""
MAX_PARTICIPANTS_NAMED = 100
"""Max users per frame that adds or invites."""
MAX_WATCHED = 500
"""Max watched users, per frame and per connection."""
MAX_RESUMED = 5_000
"""Max conversations per `resume`."""
MAX_CHANGES = 1_000
"""Max changes per conversation that a `resume` sends."""
MAX_CHANGES_BYTES = 2 * 1024 * 1024
"""Max bytes of changes per conversation that a `resume` sends, in all its `changes` frames together."""
MAX_SENT_BYTES = 1024 * 1024
"""Max bytes per frame of the server. Client libraries such as `websockets` refuse larger ones by default."""
MAX_METADATA_BYTES = 16 * 1024
"""Max bytes of `metadata`, per message, and of `custom`, per conversation."""
TOKEN_BYTES = 16 * 1024
"""Bytes per token: a frame takes one token, and another one for each further `TOKEN_BYTES`."""
MAX_PAGE_BYTES = MAX_SENT_BYTES - 128 * 1024
"""Max bytes per page after its first row, because a hundred messages of max size are 11 MB. The rest of
`MAX_SENT_BYTES` is for the frame around the rows.
"""
ANSWER_TOKEN_BYTES = 32 * 1024
"""Bytes per further token for a reply, taken after it was sent. The frames that a `resume` sends before its reply
count, too. Sending this many bytes costs about as much as a small read.
"""
MAX_EXTREME_NUMBERS = 100
"""Max numbers with three-digit exponents, per frame. msgspec takes 14 µs to parse one near the largest double."""
MAX_FRAME_VALUES = 6_000
"""Max values outside strings, per frame: enough for a `resume` of `MAX_RESUMED` conversations."""
MAX_JSON_VALUES = 250
"""Max keys and values of `metadata` or `settings.custom`, all levels together. Python makes an object of each, and a
page holds a hundred messages.
"""
MAX_JSON_DEPTH = 20
"""Max depth of `metadata` and `settings.custom`, levels."""
MAX_MENTIONS = 50
"""Max mentions, per message."""
MAX_EMOJI_PER_MESSAGE = 20
"""Max different emoji, per message."""
MAX_POLL_OPTIONS = 20
"""Max options, per poll."""
MAX_PINS = 100
"""Max pinned messages, per conversation."""
MAX_HASHTAGS = 50
"""Max hashtags, per message."""
MAX_SCHEDULED = 100
"""Max scheduled messages that wait, per user."""
MAX_PUSH_ENDPOINTS = 20
"""Max push endpoints, per user."""
MAX_INVITATIONS_OF_PAIR = 5
"""Max pending invitations, per inviter and invitee."""
MAX_INVITATIONS = 100
"""Max pending invitations from users who may not add the invitee, per invitee: as many as `list_invitations` lists."""
MAX_INVITATIONS_SENT = 1_000
"""Max pending invitations, per inviter."""
MAX_APPROACHES_A_DAY = 10
"""Max invitations, friend requests, follows, blocks, mutes and switches turned off in 24 hours, per sender, receiver
and kind.
"""
MAX_ADDED_A_DAY = 500
"""Max conversations in 24 hours that one user adds another to, per pair."""
MAX_MEMBERSHIPS = MAX_RESUMED
"""Max conversations that a user takes part in, per user: as many as a `resume` may name."""
MAX_CONVERSATIONS_A_DAY = 500
"""Max conversations created in 24 hours, per user."""
MAX_STARS = 10_000
"""Max stars, per user."""
MAX_REMOVED_STARS = 1_000
"""Max tombstones of removed stars, per user."""
MAX_RELATIONSHIPS = 5_000
"""Max relationships that have not ended, per user and kind."""
MAX_REQUESTS_SENT = 500
"""Max unanswered friend requests, per sender."""
MAX_REQUESTS_RECEIVED = 5_000
"""Max unanswered friend requests, per receiver."""
MAX_REPORTS_A_DAY = 200
"""Max reports in 24 hours, per user."""
MAX_THREAD_FOLLOWS = 10_000
"""Max threads that a user follows or has read, besides those that they replied in, per user."""
MAX_EDITS = 1_000
"""Max edits, per message."""
MAX_EMOJI_OF_USER = 100
"""Max emoji that a user has ever added to a message, removed ones included, per user and message."""
MAX_SESSIONS = 100
"""Max sessions, per user."""
MAX_COUNTED = 100
"""Max unread count; counting stops there."""
MAX_COUNTED_READERS = 1_000
"""Max `read_by` and `delivered_to` in `get_message` and `list_readers`; counting stops there."""
MAX_COUNTED_PARTICIPANTS = 2_000
"""Max participants among whom `get_message` and `list_readers` count readers, highest roles and then oldest first."""
MAX_TRACED_PARTICIPANTS = 10_000
"""Max participants whom `why` considers, past ones included."""
MAX_NAMED_PARTICIPANTS = 1_000
"""Max participants of a conversation in which `@name` mentions a user. `<@id>` works in larger ones, too."""
MAX_SHARED_PARTICIPANTS = 100
"""Max participants of a conversation that broadcasts typing and read positions."""

Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Title = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Description = Annotated[str, Meta(max_length=1_000, pattern=LINES)]
InviteCode = Annotated[str, Meta(min_length=1, max_length=50, pattern=NO_NUL)]
CustomStatus = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Text = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Query = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
"""Search words, which users may paste from anywhere."""
Bio = Annotated[str, Meta(max_length=500, pattern=LINES)]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=LINES)]
Link = Annotated[str, Meta(min_length=1, max_length=2_000, pattern=WEB)]
"""An http or https URL, so that no page can be made to run it."""
PinOrder = Annotated[int, Meta(ge=0, le=10_000)]
Seconds = Annotated[int, Meta(ge=1, le=365 * 86_400)]
Content = Annotated[str, Meta(min_length=1, max_length=MAX_CONTENT, pattern=NO_NUL)]
MAX_FORMATTED = 15_000
"""Max characters of the HTML that the server renders, per message with `is_markdown`."""
DraftContent = Annotated[str, Meta(max_length=MAX_CONTENT, pattern=NO_NUL)]
Emoji = Annotated[str, Meta(min_length=1, max_length=32, pattern=NO_NUL)]
TimeZone = Annotated[str, Meta(min_length=1, max_length=64, pattern=ZONE)]
Email = Annotated[str, Meta(min_length=3, max_length=254, pattern=EMAIL)]
"""An address to register."""
KnownEmail = Annotated[str, Meta(min_length=3, max_length=254, pattern=ADDRESS)]
"""An address to log in with, including those that the server gave to users who have none."""
Password = Annotated[str, Meta(min_length=8, max_length=128)]
Token = Annotated[str, Meta(min_length=1, max_length=128)]
Cursor = Annotated[str, Meta(min_length=1, max_length=200)]
PageSize = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
Version = Annotated[int, Meta(ge=0, le=2**53 - 1)]
"""A version of a conversation or user. JavaScript represents it exactly."""


def visible(text: str) -> str:
    """Return a text without the characters that `LINE` forbids, for texts from elsewhere that are shown and not
    refused. The result is empty if nothing of it is visible.
    """
    kept = _HIDDEN.sub("", text)
    return kept if _SHOWN.search(kept) else ""


def collapsed(text: str) -> str:
    """Return a text with single spaces for runs of blanks, and none around it. Texts that look alike become the
    same.
    """
    return _BLANKS.sub(" ", text).strip()


def visible_lines(text: str) -> str:
    """Return a text from elsewhere without the characters that `LINES` forbids."""
    return _HIDDEN_IN_LINES.sub("", text)


FURTHER_TOKENS = {
    "watch": 100, "list_threads": 20, "get_users": 20, "resume": 20, "get_badge": 20, "create_group": 20,
    "add_participants": 20, "invite": 20, "list_conversations": 10,
    "list_relationships": 10, "list_stars": 10, "why": 10, "send": 10, "edit": 10, "schedule": 10,
    "forward": 10,
    "history": 3, "list_participants": 3, "list_replies": 3, "list_reports": 3, "list_audit": 3,
    "list_pins": 3, "list_edits": 3, "list_drafts": 3, "list_scheduled": 3, "list_invitations": 3,
}  # fmt: skip
"""Max tokens that a frame takes besides its first, by its cost in the database. A frame that asks for less takes a
proportional part, rounded down. The part is that of `limit`, `user_ids` or `participants` in their max, or of the `@`
in `content` in 50.

`forward` takes what its message would take. `list_conversations`, `list_threads` and frames without such a field always
take the max, because the server reads all rows of the user in any case. No frame takes more than the burst in `ready`.
"""


def part_of_mentions(content: str) -> float:
    """Return the part of its further tokens that a message takes. The server compares each `@name` with all
    participants.
    """
    return min(content.count("@"), MAX_MENTIONS) / MAX_MENTIONS


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket. A client that keeps to it is never rate limited. The server allows another second's worth,
    because frames may arrive closer together than they were sent.
    """

    per_second: float
    burst: int


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that a client must keep to. `ready` carries them."""

    frame_bytes: int = MAX_FRAME_BYTES
    """Max bytes per frame that the client sends."""
    sent_bytes: int = MAX_SENT_BYTES
    """Max bytes per frame that the server sends."""
    content_characters: int = MAX_CONTENT
    metadata_bytes: int = MAX_METADATA_BYTES
    json_depth: int = MAX_JSON_DEPTH
    json_values: int = MAX_JSON_VALUES
    formatted_characters: int = MAX_FORMATTED
    """Max characters of the HTML that the server renders, per message with `is_markdown`."""
    frame_values: int = MAX_FRAME_VALUES
    """Max values per frame, at all levels of its lists and objects."""
    token_bytes: int = TOKEN_BYTES
    """A frame takes one token, and another one for each further `token_bytes`."""
    further_tokens: dict[str, int] = msgspec.field(default_factory=FURTHER_TOKENS.copy)
    """Max further tokens, per frame type. A frame that asks for less takes a proportional part, rounded down. The part
    is that of `limit`, `user_ids` or `participants` in their max, or of the `@` in `content` in `mentions`.
    `list_conversations` and `list_threads` always take the max. `forward` takes as much as `send` does for the same
    message.
    """
    answer_token_bytes: int = ANSWER_TOKEN_BYTES
    """A reply takes a further token for each `answer_token_bytes`, even if the bucket is empty. The frames that a
    `resume` sends before its reply count as part of it.
    """
    mentions: int = MAX_MENTIONS
    page: int = MAX_PAGE
    page_bytes: int = MAX_PAGE_BYTES
    """Max bytes per page. A page may end before its `limit`; `after`, `has_before` and `has_after` say whether there is
    more.
    """
    participants_named: int = MAX_PARTICIPANTS_NAMED
    watched_users: int = MAX_WATCHED
    resumed_conversations: int = MAX_RESUMED
    """Max conversations per `resume`. Name more of them in further frames."""
    changes_before_start_over: int = MAX_CHANGES
    changes_bytes_before_start_over: int = MAX_CHANGES_BYTES
    frames: RateLimit
    """Rate limit of all frames, per connection."""
    writes: RateLimit
    """Rate limit of frames that count as `write`, per user; `reads`, `ephemeral` and `searches` are per user, too."""
    reads: RateLimit
    ephemeral: RateLimit
    searches: RateLimit
