"""Where a request carries its token: a header, or the cookie of a page that may."""

import hmac
from collections.abc import Collection

from starlette.requests import HTTPConnection

from protocol.errors import ErrorCode, Refused

COOKIE = "openchat_session"
SAFE_METHODS = frozenset({"GET", "HEAD"})


def token_of(request: HTTPConnection, allowed_origins: Collection[str]) -> str | None:
    """Return the token that a request carries, from `Authorization: Bearer` or the session cookie.

    Raises Refused if the cookie came from a page whose origin is not allowed: a browser sends cookies along
    whoever asks, so a WebSocket, or a request that changes something, must say where it comes from.
    """
    header = request.headers.get("authorization", "")
    scheme, _, token = header.partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    cookie = request.cookies.get(COOKIE)
    if cookie is None:
        return None
    method = request.scope.get("method", "WEBSOCKET")
    if method not in SAFE_METHODS and not _is_allowed(request, allowed_origins):
        raise Refused(
            ErrorCode.FORBIDDEN,
            "This origin may not use the session cookie. Ask the operator to add it to `OPENCHAT_ORIGINS`.",
            path="origin",
        )
    return cookie


def require_origin(request: HTTPConnection, allowed_origins: Collection[str]) -> None:
    """Raises Refused for a page whose origin is not allowed: what it asks for would set the session cookie of whoever
    looks at it. Programs, which send no Origin, may.
    """
    if "origin" in request.headers and not _is_allowed(request, allowed_origins):
        raise Refused(
            ErrorCode.FORBIDDEN,
            "This origin may not log in. Ask the operator to add it to `OPENCHAT_ORIGINS`.",
            path="origin",
        )


def _is_allowed(request: HTTPConnection, allowed_origins: Collection[str]) -> bool:
    origin = request.headers.get("origin")
    if origin is None:
        return False
    scheme = {"ws": "http", "wss": "https"}.get(request.url.scheme, request.url.scheme)
    own = f"{scheme}://{request.headers.get('host', '')}"
    return hmac.compare_digest(origin.lower(), own.lower()) or origin.rstrip("/") in allowed_origins
