"""The token of a request: in a header, or in the session cookie of a page with an allowed origin."""

from collections.abc import Collection
from datetime import timedelta

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from protocol.errors import ErrorCode, Refused

COOKIE = "openchat_session"
HOST_COOKIE = f"__Host-{COOKIE}"
"""The cookie with TLS. Browsers accept this prefix from the host itself only, and not from a sibling subdomain."""
COOKIE_LASTS = timedelta(days=400)
"""Lifetime of the cookie in browsers, which is the max that they support. The server decides when the session
expires.
"""
SAFE_METHODS = frozenset({"GET", "HEAD"})


def token_of(request: HTTPConnection, allowed_origins: Collection[str]) -> str | None:
    """Return the token of a request, from `Authorization: Bearer` or from the session cookie.

    Raises Refused if the cookie came from a page whose origin is not allowed. A browser adds cookies to requests of any
    page. So a WebSocket, or a request that changes something, must have an allowed `Origin`.
    """
    header = request.headers.get("authorization", "")
    scheme, _, token = header.partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    cookies = _values(request, _cookie_of(request))
    if not cookies:
        return None
    method = request.scope.get("method", "WEBSOCKET")
    if method not in SAFE_METHODS and not _is_allowed(request, allowed_origins):
        raise _not_allowed(request, "use the session cookie")
    if len(cookies) > 1:
        raise Refused(
            ErrorCode.UNAUTHENTICATED,
            "The request has two session cookies, and another site may have set one. Delete both, and log in again.",
            path="cookie",
        )
    return cookies.pop()


def set_cookie(request: Request, response: Response, token: str) -> None:
    """Set the session cookie. It outlasts the session, because use extends the session."""
    response.set_cookie(
        _cookie_of(request),
        token,
        max_age=int(COOKIE_LASTS.total_seconds()),
        httponly=True,
        samesite="lax",
        secure=_is_secure(request),
    )


def forget_cookie(request: Request, response: Response) -> None:
    """Delete the session cookie. Browsers require the attributes that the prefix of its name needs."""
    response.delete_cookie(_cookie_of(request), httponly=True, samesite="lax", secure=_is_secure(request))


def require_origin(request: HTTPConnection, allowed_origins: Collection[str]) -> None:
    """Raise Refused for a page whose origin is not allowed, because the response would set a session cookie in its
    visitor's browser. Programs send no `Origin`, and may pass.
    """
    if "origin" in request.headers and not _is_allowed(request, allowed_origins):
        raise _not_allowed(request, "log in")


def _is_allowed(request: HTTPConnection, allowed_origins: Collection[str]) -> bool:
    origin = request.headers.get("origin")
    if origin is None:
        return False
    return origin.lower() == _own(request) or origin.rstrip("/") in allowed_origins


def _own(request: HTTPConnection) -> str:
    """Return the origin of the server's own pages, in lower case, as its proxies report it."""
    return f"{'https' if _is_secure(request) else 'http'}://{request.headers.get('host', '').lower()}"


def _not_allowed(request: HTTPConnection, what: str) -> Refused:
    origin, own = request.headers.get("origin"), _own(request)
    if origin is None:
        sentence = f"A request without `Origin` may not {what}. Send the token as `Authorization: Bearer`."
    elif origin.lower().partition("://")[2] == own.partition("://")[2]:
        # Allowing such an origin would admit the page with a cookie that lacks `Secure` and `__Host-`.
        sentence = (
            f"This page may not {what}, because the server expects its own pages at `{own.partition('//')[0]}//`. "
            "Ask the operator to set `OPENCHAT_TRUSTED_PROXIES`, and `X-Forwarded-Proto` in the proxy."
        )
    else:
        sentence = f"This origin may not {what}. Ask the operator to add it to `OPENCHAT_ORIGINS`."
    return Refused(ErrorCode.FORBIDDEN, sentence, path="origin")


def _is_secure(request: HTTPConnection) -> bool:
    return request.url.scheme in {"https", "wss"}


def _cookie_of(request: HTTPConnection) -> str:
    return HOST_COOKIE if _is_secure(request) else COOKIE


def _values(request: HTTPConnection, name: str) -> set[str]:
    """Return all values of a cookie. A browser sends several if other hosts or paths have set it, too."""
    pairs = (pair.partition("=") for line in request.headers.getlist("cookie") for pair in line.split(";"))
    return {value.strip() for key, _, value in pairs if key.strip() == name}
