"""Payloads of messages that are more than text: one struct per content type, which `type` names.

A message with a payload still has `content`: the caption of a picture, the question of a poll, or the code itself.
Clients that do not know the type show `content`. Only the server sends messages of the type `system`.
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
    """The base of all payloads."""


class Image(_Payload, tag="image", frozen=True, kw_only=True):
    """A picture. `alt` describes it for users who cannot see it."""

    url: Link
    alt: Annotated[str, Meta(max_length=1_000, pattern=LINES)] | None = None
    width: Pixels | None = None
    height: Pixels | None = None


class File(_Payload, tag="file", frozen=True, kw_only=True):
    """A file of any other type."""

    url: Link
    name: Name
    mime_type: MimeType | None = None
    size_bytes: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None


class Audio(_Payload, tag="audio", frozen=True, kw_only=True):
    """An audio recording."""

    url: Link
    name: Name | None = None
    duration_ms: Milliseconds | None = None


class Video(_Payload, tag="video", frozen=True, kw_only=True):
    """A video. `poster` is a picture to show before it plays."""

    url: Link
    name: Name | None = None
    poster: Link | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    duration_ms: Milliseconds | None = None


class Code(_Payload, tag="code", frozen=True, kw_only=True):
    """Source code, which is in `content`. `language` is a name such as `python`."""

    language: Language


class Location(_Payload, tag="location", frozen=True, kw_only=True):
    """A place on Earth, in degrees (WGS 84)."""

    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]
    accuracy_meters: Annotated[float, Meta(ge=0, le=1e7)] | None = None
    name: Text | None = None


class Poll(_Payload, tag="poll", frozen=True, kw_only=True):
    """A poll, whose question is in `content`. The options must differ by more than white space. With `is_multiple`, a
    vote may name several options. An anonymous poll reveals only counts.

    The server refuses votes after `closes_at`, which must be later than the time in `message_id` and than `send_at`. A
    scheduled poll fails if it cannot be sent before `closes_at`. The question cannot be edited once the poll has a vote
    or is closed.
    """

    options: Options
    is_multiple: bool = False
    is_anonymous: bool = False
    closes_at: Moment | None = None

    def __post_init__(self) -> None:
        if len(set(self.options)) != len(self.options):
            raise ValueError("`options` must all be different")
        require_moment(self.closes_at, "closes_at")


Payload = Image | File | Audio | Video | Code | Location | Poll
