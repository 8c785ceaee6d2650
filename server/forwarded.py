"""X-Forwarded-For and X-Forwarded-Proto: a trusted proxy's address and scheme become its client's."""

import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import Refused
from server.proxies import FORWARDED_FOR, Proxies, entries
from server.web import refusal_response

log = logging.getLogger(__name__)

SCHEMES = {"http": {"http": "http", "https": "https"}, "websocket": {"http": "ws", "https": "wss"}}


class Forwarded:
    """ASGI middleware. With the setting `trusted_proxies` empty it is not there."""

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it if the address that counts is none."""
        if scope["type"] in SCHEMES:
            try:
                self._rewrite(scope)
            except Refused as refused:
                response = refusal_response(refused)
                response.status_code = 400  # of the request itself, not of a field in its body
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _rewrite(self, scope: Scope) -> None:
        peer = scope["client"]
        forwarded_for = entries(scope["headers"], FORWARDED_FOR)
        client = self._proxies.client(peer and peer[0], forwarded_for)
        if forwarded_for and not client.hops and self._proxies.count and not self._has_warned:
            self._has_warned = True
            log.warning(
                "X-Forwarded-For has %d of the %d entries that OPENCHAT_TRUSTED_PROXIES counts; it is ignored, and "
                "clients are counted by the address of the proxy", len(forwarded_for), self._proxies.count,
            )  # fmt: skip
        if client.hops and (protocols := entries(scope["headers"], b"x-forwarded-proto")):
            proto = protocols[-min(client.hops, len(protocols))].lower()
            scope["scheme"] = SCHEMES[scope["type"]].get(proto, scope["scheme"])
        if client.host is not None:
            scope["client"] = (client.host, 0)
