"""Random tokens, and what is kept of them."""

import hashlib
import secrets

TOKEN_BYTES = 32


def new_token() -> str:
    """Return a token of 256 random bits."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_hash(token: str) -> str:
    """Return what is stored of a token. It is random, so one round of SHA-256 is enough, and looked up by
    equality in an index, so comparing it leaks nothing of use.
    """
    return hashlib.sha256(token.encode()).hexdigest()
