"""X-Forwarded-For and X-Forwarded-Proto: replaces a trusted proxy's address and scheme by its client's.

A proxy that the settings do not include is logged once. All its clients share the limits of one address, and its
`X-Forwarded-Proto` is ignored.
"""

import logging
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import Refused
from server.core.addresses import parsed
from server.core.proxies import FORWARDED_FOR, Proxies, entries
from server.gateway.responses import refusal_response
from server.http.middleware import PROBES

log = logging.getLogger(__name__)

ADDED = frozenset({FORWARDED_FOR, b"forwarded"})
"""Headers in which a proxy names its client."""
DIRECT = PROBES | {"/metrics"}
"""Paths that are requested without proxies."""
SCHEMES = {"http": {"http": "http", "https": "https"}, "websocket": {"http": "ws", "https": "wss"}}


class Forwarded:
    """ASGI middleware that rewrites the scope of proxied requests."""

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        # Warnings that were logged, because each is logged once.
        self._warned: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request. Refuse it if the client's entry is not an IP address."""
        if scope["type"] in SCHEMES:
            try:
                self._rewrite(scope)
            except Refused as refused:
                response = refusal_response(refused)
                response.status_code = 400  # the fault is in the request itself, not in a field of its body
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _rewrite(self, scope: Scope) -> None:
        peer = scope["client"]
        forwarded_for = entries(scope["headers"], FORWARDED_FOR)
        try:
            client = self._proxies.client(peer and peer[0], forwarded_for)
        except Refused:
            self._warn(
                "refused",
                "refusing requests with 400: the client's entry in X-Forwarded-For is not an IP address. Set "
                "OPENCHAT_TRUSTED_PROXIES to the proxies in front, and have them append addresses without ports",
            )
            raise
        if not client.hops and (forwarded_for or scope["path"] not in DIRECT):
            self._warn_if_ignored(peer and peer[0], forwarded_for, scope["headers"])
        if client.hops and (protocols := entries(scope["headers"], b"x-forwarded-proto")):
            proto = protocols[-min(client.hops, len(protocols))].lower()
            scope["scheme"] = SCHEMES[scope["type"]].get(proto, scope["scheme"])
        if client.host is not None:
            scope["client"] = (client.host, 0)

    def _warn_if_ignored(
        self, peer: str | None, forwarded_for: Sequence[str], headers: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Log what to set if an unknown proxy seems to be in front of the server."""
        if self._proxies.count:
            self._warn(
                "too few",
                "X-Forwarded-For has %d of the %d entries that OPENCHAT_TRUSTED_PROXIES requires. It is ignored, and "
                "clients are counted by the address that connects", len(forwarded_for), self._proxies.count,
            )  # fmt: skip
        elif _is_near(peer) and any(name.lower() in ADDED for name, _ in headers):
            # A client that connects from elsewhere may have written these headers itself.
            self._warn(
                "not named",
                "requests come through a proxy at %s that OPENCHAT_TRUSTED_PROXIES does not include. All its clients "
                "share the limits of one address, and browsers are refused if the proxy terminates TLS. Set it to the "
                "number of proxies in front, or to their networks",
                peer or "a Unix socket",
            )

    def _warn(self, what: str, text: str, *arguments: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(text, *arguments)


def _is_near(peer: str | None) -> bool:
    """Whether a TCP peer is on this machine or in a private network, as proxies usually are."""
    address = None if peer is None else parsed(peer)
    return address is None or not address.is_global
