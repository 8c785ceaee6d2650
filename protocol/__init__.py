"""The wire: all frames and values that clients and servers exchange, with their limits and error codes.

This package imports nothing of the server, so clients, bots, tests and load tools can import it. Start with `client`
(frames of clients) and `server` (frames of the server).
"""

PROTOCOL_VERSION = 1
"""The version in the subprotocol's name. Additions keep the number; incompatible changes increment it."""

SUBPROTOCOL = "openchat.v1.json"
"""The WebSocket subprotocol: clients offer it in `Sec-WebSocket-Protocol`, and the server selects it."""
