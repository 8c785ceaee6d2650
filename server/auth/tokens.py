"""Random tokens, and the hashes that are stored of them."""

import hashlib
import secrets

TOKEN_BYTES = 32


def new_token() -> str:
    """Return a token of 256 random bits."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_hash(token: str) -> str:
    """Return the stored hash of a token. One round of SHA-256 suffices, because tokens are random. The comparison in an
    index leaks nothing useful.
    """
    return hashlib.sha256(token.encode()).hexdigest()
