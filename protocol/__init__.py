"""The wire: everything a client and a server say to each other, and nothing else.

Imports nothing of the server, so clients, bots, tests and load tools may use it as it is. Read `client` and
`server` first: what clients say and what the server says.
"""

PROTOCOL_VERSION = 1
"""The number in the subprotocol's name. Additions keep it; anything else takes the next one."""

SUBPROTOCOL = "openchat.v1.json"
"""What a client offers in Sec-WebSocket-Protocol and what the server accepts."""
