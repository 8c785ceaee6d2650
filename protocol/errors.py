"""The two closed lists of failures: an error code answers one frame, and a close code ends the connection.

docs/protocol.md lists both, with what a client does about each.
"""

from enum import IntEnum, StrEnum


class ErrorCode(StrEnum):
    """Why the server refused a frame. The connection stays open. A name never gets another meaning."""

    BAD_FRAME = "bad_frame"
    """The frame is not a JSON object in a text message, or its `type` is unknown. Correct the client."""
    INVALID = "invalid"
    """A field is missing, has the wrong type or is out of range; `path` names it. Correct the value, or ask the user
    to.
    """
    UNAUTHENTICATED = "unauthenticated"
    """There is no valid session, or the e-mail address and password do not match. Over HTTP (401), log in again; if
    `path` is `ticket`, use the token instead. On a socket, follow the close code that comes next.
    """
    NOT_FOUND = "not_found"
    """The object does not exist, or you may not see it. The server does not reveal which."""
    FORBIDDEN = "forbidden"
    """You may see the object, but may not do this, for example because of your role. Or `password` is wrong. Show the
    message.
    """
    CONFLICT = "conflict"
    """The frame contradicts stored data, such as an id that has other content, a taken address or a full conversation.
    Show the message.
    """
    RATE_LIMITED = "rate_limited"
    """Too many frames; retry after `retry_after_ms`. With a `path`, hold back only frames with the same value in that
    field, such as a conversation in slow mode.
    """
    UNAVAILABLE = "unavailable"
    """The database cannot be reached or cannot store anything, or the server is busy, full or shutting down. Retry the
    same frame after `retry_after_ms`; it takes effect once.
    """
    INTERNAL = "internal"
    """Internal error; it was logged. No partial change was stored. Show the message."""


class CloseCode(IntEnum):
    """Why the server closed a connection, and whether the client should reconnect."""

    GOING_AWAY = 1012
    """The server restarts, shuts down, is full or failed. Reconnect to any server and resume. First wait for the
    `reconnect_after_ms` of the `going_away` that came before, or the `retry_after_ms` of the `error`. If there was
    neither, wait as after a lost connection.
    """
    TOO_BIG = 1009
    """The client sent a frame larger than `limits.frame_bytes`, or larger than 4 KiB before `ready`. Reconnect, but do
    not send that frame again. If your client closes with 1009 itself, raise its limit to `limits.sent_bytes`.
    """
    UNAUTHENTICATED = 4001
    """The token is invalid, or the first frame was not `authenticate`. Log in first."""
    SESSION_ENDED = 4002
    """The session expired or was revoked. Log in again."""
    ABUSE = 4003
    """The client sent far too many frames that were refused as `bad_frame`, `invalid` or `internal`. Or it kept
    exceeding `limits.frames` without waiting for `retry_after_ms`. More than 128 fragments in a message, and too many
    pings, count as well. Do not reconnect before the client is fixed.
    """
    TOO_MANY_CONNECTIONS = 4004
    """The user has too many connections. Close one first."""
    WITH_TOKEN = 4005
    """The ticket was used or has expired, or `authenticate` came too late. Reconnect with the token, and keep it. The
    `error` before this close code is `unauthenticated` nevertheless.
    """
    SLOW = 4008
    """The client read too slowly, so its queue filled up. Reconnect and resume."""
    SILENT = 4009
    """The server received nothing, not even a pong, for two to three heartbeats. Or the rest of a fragmented message
    was missing for 30 seconds. Reconnect and resume.
    """
    START_OVER = 4010
    """The database was restored or replaced. Reconnect and resume; the server will send `start_over`."""

    @property
    def reconnect(self) -> bool:
        """Whether a client should reconnect by itself."""
        return self in _COME_BACK


_COME_BACK = {
    CloseCode.WITH_TOKEN,
    CloseCode.GOING_AWAY,
    CloseCode.TOO_BIG,
    CloseCode.SLOW,
    CloseCode.SILENT,
    CloseCode.START_OVER,
}


class Refused(Exception):  # noqa: N818 - a refusal is a reply, not a fault
    """An error that answers a frame or a request. Any layer may raise it; the dispatch sends the answer.

    `path` is the field at fault, such as `mentions[3]`.
    """

    def __init__(
        self, code: ErrorCode, message: str, *, path: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = path
        self.retry_after_ms = retry_after_ms
