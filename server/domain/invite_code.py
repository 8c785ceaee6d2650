"""Invite codes, which allow to join a conversation."""

import secrets

BYTES = 12
"""Random bytes of a code. 96 bits are 16 characters."""


def new_code() -> str:
    """Return a new code."""
    return secrets.token_urlsafe(BYTES)
