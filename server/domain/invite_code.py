"""Invite codes: whoever has one may join."""

import secrets

BYTES = 12
"""Of randomness in a code: 96 bits, 16 characters."""


def new_code() -> str:
    """Return a new code."""
    return secrets.token_urlsafe(BYTES)
