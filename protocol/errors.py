"""The two closed lists of what can go wrong: an error answers one frame, a close code ends the connection.

docs/protocol.md has them as tables, with what a client does about each.
"""

from enum import IntEnum, StrEnum


class ErrorCode(StrEnum):
    """Why a frame was refused. The connection lives on. Names are never reused for another meaning."""

    BAD_FRAME = "bad_frame"
    """Not a text frame of JSON, or not one of the known types: correct the client."""
    INVALID = "invalid"
    """A field is missing, of the wrong type or out of bounds; `path` names it: correct it, or have the user do so."""
    UNAUTHENTICATED = "unauthenticated"
    """No session, or an expired or revoked one, or the e-mail address and password do not match. By HTTP (401): log in
    again, but with the `path` `ticket`, use the token. On a socket, the close code that follows says which.
    """
    NOT_FOUND = "not_found"
    """It does not exist, or you may not see it: the answer is the same."""
    FORBIDDEN = "forbidden"
    """You can see it, but may not do this: your role does not let you, or `password` is wrong. Show the message."""
    CONFLICT = "conflict"
    """It contradicts what is there: the same id with other content, a taken address, a full conversation. Show the
    message.
    """
    RATE_LIMITED = "rate_limited"
    """Too many; try again after `retry_after_ms`. With a `path`, only what that field names has to wait: a conversation
    in slow mode, or a user who was invited too often today.
    """
    UNAVAILABLE = "unavailable"
    """The database cannot be reached just now, or the server is busy, shutting down or full. Send the same frame again
    after `retry_after_ms`: it is done once.
    """
    INTERNAL = "internal"
    """A defect of the server. It was logged; nothing was half-written. Show the message."""


class CloseCode(IntEnum):
    """Why a connection was closed, and whether to come back."""

    GOING_AWAY = 1012
    """The server restarts, drains, is full or failed: reconnect, anywhere, and resume. Wait as long as the `going_away`
    or the `error` before says; if none came, as after any lost connection.
    """
    TOO_BIG = 1009
    """The server got a frame larger than `limits.frame_bytes`, or than 4 KiB before `ready`: reconnect, but do not send
    it again. If it is the client that closes with 1009, have it take `limits.sent_bytes`.
    """
    UNAUTHENTICATED = 4001
    """The token is not good, or the first frame is not `authenticate`: log in first."""
    SESSION_ENDED = 4002
    """The session expired or was revoked: log in again."""
    ABUSE = 4003
    """Far too many frames that are refused as `bad_frame`, `invalid` or `internal`, or that exceed `frames` before a
    `retry_after_ms` is over; a message of more than 128 fragments; or too many pings. Do not reconnect before fixing
    the client.
    """
    TOO_MANY_CONNECTIONS = 4004
    """This user has too many connections: close one first."""
    WITH_TOKEN = 4005
    """The return ticket is used or too old, or `authenticate` came too late: reconnect with the token, and keep it. The
    `error` before is `unauthenticated` all the same.
    """
    SLOW = 4008
    """The client read too slowly and its queue was full: reconnect and resume."""
    SILENT = 4009
    """Nothing was heard for two to three heartbeats, not even a pong, or the rest of a message was missing for 30
    seconds: reconnect and resume.
    """
    START_OVER = 4010
    """The database was restored or replaced: reconnect and resume; expect `start_over`."""

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


class Refused(Exception):  # noqa: N818 - a refusal is an answer, not a fault
    """A frame or request that is answered with an error. Raised anywhere; answered in one place.

    `path` is the field at fault, as in `mentions[3]`; `retry_after_ms` is in milliseconds.
    """

    def __init__(
        self, code: ErrorCode, message: str, *, path: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = path
        self.retry_after_ms = retry_after_ms
