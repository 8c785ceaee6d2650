"""What messages that are more than text consist of: one struct for each content type, named by it in `type`.

A message with a payload still has `content`, in words: what a client shows that does not know the type, the caption of
a picture, the question of a poll, the code itself. A message of the type `system` is the server's; nobody sends one.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.limits import LANGUAGE, LINES, MAX_POLL_OPTIONS, MIME_TYPE, Link, Name, Text
from protocol.moments import Moment, require_moment

Pixels = Annotated[int, Meta(ge=1, le=100_000)]
Milliseconds = Annotated[int, Meta(ge=0, le=2**31 - 1)]
MimeType = Annotated[str, Meta(max_length=255, pattern=MIME_TYPE)]
Language = Annotated[str, Meta(max_length=50, pattern=LANGUAGE)]
Options = Annotated[list[Text], Meta(min_length=2, max_length=MAX_POLL_OPTIONS)]


class _Payload(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="type"
):
    """A struct that says in `type` what it is."""


class Image(_Payload, tag="image", frozen=True, kw_only=True):
    """A picture; `alt` says what is on it to who cannot see it."""

    url: Link
    alt: Annotated[str, Meta(max_length=1_000, pattern=LINES)] | None = None
    width: Pixels | None = None
    height: Pixels | None = None


class File(_Payload, tag="file", frozen=True, kw_only=True):
    """Any other file."""

    url: Link
    name: Name
    mime_type: MimeType | None = None
    size_bytes: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None


class Audio(_Payload, tag="audio", frozen=True, kw_only=True):
    """A recording."""

    url: Link
    name: Name | None = None
    duration_ms: Milliseconds | None = None


class Video(_Payload, tag="video", frozen=True, kw_only=True):
    """A film; `poster` is a picture to show before it plays."""

    url: Link
    name: Name | None = None
    poster: Link | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    duration_ms: Milliseconds | None = None


class Code(_Payload, tag="code", frozen=True, kw_only=True):
    """Source text, which is in `content`, in a language such as `python`."""

    language: Language


class Location(_Payload, tag="location", frozen=True, kw_only=True):
    """A place on the Earth, in degrees (WGS 84)."""

    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]
    accuracy_meters: Annotated[float, Meta(ge=0, le=1e7)] | None = None
    name: Text | None = None


class Poll(_Payload, tag="poll", frozen=True, kw_only=True):
    """A question, in `content`, with options that are all different, and not in blanks alone. `is_multiple` allows
    votes for several of them. Of an anonymous poll only the counts are told. After `closes_at` no vote is taken; it
    must be after the time in `message_id`, and after `send_at`. A scheduled poll that cannot be sent before fails. The
    question cannot be edited once somebody has voted or the poll is closed.
    """

    options: Options
    is_multiple: bool = False
    is_anonymous: bool = False
    closes_at: Moment | None = None

    def __post_init__(self) -> None:
        if len(set(self.options)) != len(self.options):
            raise ValueError("The `options` must all be different")
        require_moment(self.closes_at, "closes_at")


Payload = Image | File | Audio | Video | Code | Location | Poll
