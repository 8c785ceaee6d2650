"""The bounds of everything a client may send, as types that the decoder enforces, and as `Limits` in `ready`."""

import re
from typing import Annotated

import msgspec
from msgspec import Meta

NO_NUL = r"^[^\x00]*\Z"
"""PostgreSQL's text cannot hold U+0000, so no text on the wire may."""
_BREAKS = "\t\n\r"
_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
"""Control characters (Cc), besides `_BREAKS`."""
_FORMAT = (
    "\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
    "\U000e0020-\U000e007f"
)
"""Format characters (Cf) and the separators of lines and paragraphs, without the two joiners: emoji and names in
Persian and in Indian scripts need those.
"""
_JOINERS = "\u200c\u200d"
_BLANK = (
    rf"\s{_JOINERS}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef"
)
"""Characters that show nothing by themselves: white space, fillers, U+2800, selectors of variants."""
LINE = rf"^(?=.*[^{_BLANK}])[^{_BREAKS}{_CONTROL}{_FORMAT}]*\Z"
"""What people are shown on one line: something that is seen, and nothing that hides, reorders or breaks it."""
LINES = rf"^[^{_CONTROL}{_FORMAT}]*\Z"
_SHOWN = re.compile(f"[^{_BLANK}]")
_BLANKS = re.compile(f"[{_BLANK}]+")
_HIDDEN = re.compile(f"[{_BREAKS}{_CONTROL}{_FORMAT}]")
_HIDDEN_IN_LINES = re.compile(f"[{_CONTROL}{_FORMAT}]")
WEB = rf'^https?://[^\s"<>`\\{_CONTROL}{_FORMAT}]+\Z'
_ADDRESS = rf"[^\s@{_CONTROL}{_FORMAT}{_JOINERS}]+"
ADDRESS = rf"^{_ADDRESS}@{_ADDRESS}\Z"
"""An e-mail address that an account may have."""
EMAIL = rf"^(?!.*[@.][Ii][Nn][Vv][Aa][Ll][Ii][Dd]\.?\Z){_ADDRESS}@{_ADDRESS}\Z"
"""An e-mail address that may be registered. The server itself gives addresses in the top-level domain `invalid`
(RFC 2606), which exists nowhere, to users who have none.
"""
ZONE = r"^[A-Za-z0-9_+/-]+\Z"
"""The characters of IANA's names of time zones. The server also compares each name with those that PostgreSQL knows."""
HASHTAG = r"^\w+\Z"
KEY = r"^[A-Za-z0-9_=-]+\Z"
"""A key of a push endpoint, in base64url (RFC 4648, section 5)."""
MIME_TYPE = r"^[a-z0-9.+-]+/[a-z0-9.+-]+\Z"
LANGUAGE = r"^[a-z0-9][a-z0-9+#._-]*\Z"
"""A name of a programming language."""
_NO_ADDRESS = "Give an e-mail address such as ada@example.org, without spaces, control and invisible characters."
RULES = {
    NO_NUL: "The character U+0000 is not allowed. Remove it.",
    LINE: "Give something that is seen, without control characters, line breaks and invisible format characters.",
    LINES: "Control characters and invisible format characters are not allowed. Remove them.",
    WEB: "Give an http or https address without spaces, quotation marks, `<`, `>`, backticks and backslashes.",
    ADDRESS: _NO_ADDRESS,
    EMAIL: f"{_NO_ADDRESS} The domain `invalid` is not allowed.",
    ZONE: "Give an IANA name such as `Europe/London`.",
    HASHTAG: "Give a hashtag without `#`: letters, digits and `_` alone.",
    KEY: "Give a key in base64url, as browsers do.",
    MIME_TYPE: "Give a MIME type in lower case, such as `image/png`.",
    LANGUAGE: "Give the name of a programming language in lower case, such as `python` or `c++`.",
}
"""Sentences for patterns, which say little to people."""

MAX_FRAME_BYTES = 256 * 1024
MAX_CONTENT = 10_000
MAX_PAGE = 100
DEFAULT_PAGE = 20
MAX_PARTICIPANTS_NAMED = 100
MAX_WATCHED = 500
MAX_RESUMED = 5_000
MAX_CHANGES = 1_000
MAX_CHANGES_BYTES = 2 * 1024 * 1024
"""Max bytes of the changes of a conversation that a `resume` tells, in as many `changes` frames as they take."""
MAX_SENT_BYTES = 1024 * 1024
"""Max bytes of a frame that the server sends. Client libraries such as `websockets` refuse larger ones by default."""
MAX_METADATA_BYTES = 16 * 1024
TOKEN_BYTES = 16 * 1024
"""Bytes of a frame per token: a frame takes one token, and another one for every further `TOKEN_BYTES`."""
MAX_PAGE_BYTES = MAX_SENT_BYTES - 128 * 1024
"""Max bytes of the rows of a page, beyond its first one: a hundred messages at their bounds are 11 MB. The rest of
`MAX_SENT_BYTES` is for what stands around them.
"""
ANSWER_TOKEN_BYTES = 32 * 1024
"""Bytes of an answer, with all that a `resume` says before it, per further token of its frame, taken once it was given.
That much costs about one small read.
"""
MAX_EXTREME_NUMBERS = 100
"""Max numbers in a frame with exponents of three digits. Near the largest double, msgspec takes 14 µs for each."""
MAX_FRAME_VALUES = 6_000
"""Max values in a frame outside its texts: a `resume` of `MAX_RESUMED` conversations, and some."""
MAX_JSON_VALUES = 250
"""Max keys and values in `metadata` and `settings.custom`, all levels together: a page holds a hundred of them, and
Python makes an object of each value.
"""
MAX_JSON_DEPTH = 20
"""Max depth of `metadata` and `settings.custom`, levels."""
MAX_MENTIONS = 50
MAX_EMOJI_PER_MESSAGE = 20
MAX_POLL_OPTIONS = 20
MAX_PINS = 100
MAX_HASHTAGS = 50
MAX_SCHEDULED = 100
"""Messages of one user that wait for their time."""
MAX_PUSH_ENDPOINTS = 20
MAX_INVITATIONS_OF_PAIR = 5
"""Max pending invitations, per inviter and invitee."""
MAX_INVITATIONS = 100
"""Max invitations that wait for an answer of one user, sent by users who may not add them: as many as are listed."""
MAX_INVITATIONS_SENT = 1_000
"""Max invitations of one user that wait for an answer."""
MAX_APPROACHES_A_DAY = 10
"""Max invitations, friend requests, follows, blocks, mutes, and switches that are turned off, within 24 hours, per
sender, receiver and kind.
"""
MAX_ADDED_A_DAY = 500
"""Max conversations that a user adds the same user to within 24 hours."""
MAX_MEMBERSHIPS = MAX_RESUMED
"""Max conversations that a user takes part in, as many as a `resume` may name."""
MAX_CONVERSATIONS_A_DAY = 500
"""Max conversations that a user makes within 24 hours."""
MAX_STARS = 10_000
"""Max stars, per user."""
MAX_REMOVED_STARS = 1_000
"""Max tombstones of stars that were taken back, per user."""
MAX_RELATIONSHIPS = 5_000
"""Max relationships of each kind from a user to others that have not ended."""
MAX_REQUESTS_SENT = 500
"""Max friend requests without an answer, per sender."""
MAX_REQUESTS_RECEIVED = 5_000
"""Max friend requests without an answer, per receiver."""
MAX_REPORTS_A_DAY = 200
"""Max messages that a user reports within 24 hours."""
MAX_THREAD_FOLLOWS = 10_000
"""Max threads that a user follows, or has read in, beside those that they replied in."""
MAX_EDITS = 1_000
"""Max edits, per message."""
MAX_EMOJI_OF_USER = 100
"""Max emoji that a user ever puts on a message, those taken back included."""
MAX_SESSIONS = 100
"""Max sessions, per user."""
MAX_COUNTED = 100
"""Where unread counts stop."""
MAX_NAMED_PARTICIPANTS = 1_000
"""In a conversation with more than this, `@name` mentions nobody; `<@id>` does."""
MAX_SHARED_PARTICIPANTS = 100
"""In a conversation with more than this, who types and who has read is not broadcast."""

Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Title = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Description = Annotated[str, Meta(max_length=1_000, pattern=LINES)]
InviteCode = Annotated[str, Meta(min_length=1, max_length=50, pattern=NO_NUL)]
CustomStatus = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Text = Annotated[str, Meta(min_length=1, max_length=255, pattern=LINE)]
Query = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
"""Words that are searched for: whatever somebody has pasted."""
Bio = Annotated[str, Meta(max_length=500, pattern=LINES)]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=LINES)]
Link = Annotated[str, Meta(min_length=1, max_length=2_000, pattern=WEB)]
"""An address on the web: nothing that a page could be made to run."""
PinOrder = Annotated[int, Meta(ge=0, le=10_000)]
Seconds = Annotated[int, Meta(ge=1, le=365 * 86_400)]
Content = Annotated[str, Meta(min_length=1, max_length=MAX_CONTENT, pattern=NO_NUL)]
MAX_FORMATTED = 15_000
DraftContent = Annotated[str, Meta(max_length=MAX_CONTENT, pattern=NO_NUL)]
Emoji = Annotated[str, Meta(min_length=1, max_length=32, pattern=NO_NUL)]
TimeZone = Annotated[str, Meta(min_length=1, max_length=64, pattern=ZONE)]
Email = Annotated[str, Meta(min_length=3, max_length=254, pattern=EMAIL)]
"""An address to register."""
KnownEmail = Annotated[str, Meta(min_length=3, max_length=254, pattern=ADDRESS)]
"""An address to log in with. It may be one that the server gave to somebody who has none."""
Password = Annotated[str, Meta(min_length=8, max_length=128)]
Token = Annotated[str, Meta(min_length=1, max_length=128)]
Cursor = Annotated[str, Meta(min_length=1, max_length=200)]
PageSize = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
Version = Annotated[int, Meta(ge=0, le=2**53 - 1)]
"""A number of a conversation's clock: exact in JavaScript, too."""


def visible(text: str) -> str:
    """Return a text from elsewhere without the characters that `LINE` forbids, for what is not refused but shown; an
    empty one if nothing of it is seen.
    """
    kept = _HIDDEN.sub("", text)
    return kept if _SHOWN.search(kept) else ""


def collapsed(text: str) -> str:
    """Return a text with one space for each run of blanks, and none around it: texts that look alike are the same."""
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
"""Max tokens that a frame takes beside its first, by what it costs the database. A frame that asks for a part of what
it may (`limit`, `user_ids`, `participants`, or up to 50 `@` in `content`) takes that part of them, rounded down;
`forward` goes by the content of its message. `list_conversations`, `list_threads` and those without such a field always
take all: whatever they ask for, the server looks through all threads, badges or conversations of the user, or returns
all that there is. A frame never takes more than
the burst that `ready` tells.
"""


def part_of_mentions(content: str) -> float:
    """Return which part of its further tokens a message takes. Each name is compared with those of everybody there."""
    return min(content.count("@"), MAX_MENTIONS) / MAX_MENTIONS


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket that never runs dry on the server if it does not on the client, with a second to spare for frames
    that arrive closer together than they were sent.
    """

    per_second: float
    burst: int


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client has to keep to; sent in `ready` so that none has to be guessed."""

    frame_bytes: int = MAX_FRAME_BYTES
    """Max bytes of a frame that the client sends."""
    sent_bytes: int = MAX_SENT_BYTES
    """Max bytes of a frame that the server sends."""
    content_characters: int = MAX_CONTENT
    metadata_bytes: int = MAX_METADATA_BYTES
    json_depth: int = MAX_JSON_DEPTH
    json_values: int = MAX_JSON_VALUES
    formatted_characters: int = MAX_FORMATTED
    """Max characters of the HTML that the server makes of a message with `is_markdown`."""
    frame_values: int = MAX_FRAME_VALUES
    """Max values in a frame, at all levels of its lists and objects."""
    token_bytes: int = TOKEN_BYTES
    """A frame takes one token, and another one for every further `token_bytes` of it."""
    further_tokens: dict[str, int] = msgspec.field(default_factory=FURTHER_TOKENS.copy)
    """How many more a frame takes that asks for as much as it may; in proportion, rounded down, if it has a `limit`,
    `user_ids`, `participants` or `content` (by its `@`, up to `mentions`), and asks for less. `list_conversations` and
    `list_threads` always take all. `forward` costs what `send` costs for the same message.
    """
    answer_token_bytes: int = ANSWER_TOKEN_BYTES
    """An answer takes a further token for every `answer_token_bytes` of it, whether there is one or not. What a
    `resume` says before its answer counts as part of it.
    """
    mentions: int = MAX_MENTIONS
    page: int = MAX_PAGE
    page_bytes: int = MAX_PAGE_BYTES
    """A page ends with so much, whatever its `limit`: `after`, `has_before` and `has_after` tell that there is more."""
    participants_named: int = MAX_PARTICIPANTS_NAMED
    watched_users: int = MAX_WATCHED
    resumed_conversations: int = MAX_RESUMED
    changes_before_start_over: int = MAX_CHANGES
    changes_bytes_before_start_over: int = MAX_CHANGES_BYTES
    frames: RateLimit
    """All frames on this connection."""
    writes: RateLimit
    """Frames that count as `write`, of all connections of the user together; so the next three."""
    reads: RateLimit
    ephemeral: RateLimit
    searches: RateLimit
