"""The bodies of the HTTP endpoints under /v1/auth."""

import unicodedata
from datetime import datetime

import msgspec

from protocol.ids import SessionId
from protocol.limits import Email, KnownEmail, Name, Password
from protocol.values import Session, User


class Register(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Make an account."""

    name: Name
    email: Email
    password: Password


class Login(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Begin a session."""

    email: KnownEmail
    password: Password


class Confirm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The password once more, for what cannot be taken lightly."""

    password: Password


class ChangePassword(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another password. `password` is the present one."""

    password: Password
    new_password: Password


class LoggedIn(msgspec.Struct, frozen=True, kw_only=True):
    """A session has begun. The token is shown this once: the server keeps only its hash."""

    token: str
    session_id: SessionId
    expires_at: datetime
    user: User


class SessionList(msgspec.Struct, frozen=True, kw_only=True):
    """The user's sessions, newest first."""

    sessions: list[Session]


def canonical(email: str) -> str:
    """Return an e-mail address in the one form that is stored: in lower case, accents composed (NFC)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", email).lower())
