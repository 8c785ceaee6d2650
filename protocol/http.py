"""Bodies of the HTTP endpoints under /v1/auth."""

import unicodedata
from datetime import datetime

import msgspec

from protocol.ids import SessionId
from protocol.limits import Email, KnownEmail, Name, Password
from protocol.values import Session, User


class Register(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Create an account."""

    name: Name
    email: Email
    password: Password


class Login(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Log in and start a session."""

    email: KnownEmail
    password: Password


class Confirm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The current password, which sensitive requests require again."""

    password: Password


class ChangePassword(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Change the password. `password` is the current one."""

    password: Password
    new_password: Password


class LoggedIn(msgspec.Struct, frozen=True, kw_only=True):
    """A new session. `token` is in no later response: the server stores only its hash."""

    token: str
    session_id: SessionId
    expires_at: datetime
    user: User


class SessionList(msgspec.Struct, frozen=True, kw_only=True):
    """The user's sessions, newest first."""

    sessions: list[Session]


def canonical(email: str) -> str:
    """Return an e-mail address in its canonical form: lower case, accents composed (NFC)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", email).lower())
