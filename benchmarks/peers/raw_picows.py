"""A broadcast in Python, the upper bound of WebSocket throughput: one prepared frame is written to every socket.

Messages are not stored.

python -m benchmarks.peers.raw_picows PORT
"""

import asyncio
import sys

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from protocol.codec import text_frame


class Member(WSListener):
    """One connection."""

    everyone: "dict[Member, asyncio.Transport]" = {}  # noqa: RUF012 - shared by all connections

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Add the connection."""
        transport.send(WSMsgType.TEXT, b'{"type":"ready"}')
        self.everyone[self] = transport.underlying_transport

    def on_ws_disconnected(self, _: WSTransport) -> None:
        """Remove the connection."""
        self.everyone.pop(self, None)

    def on_ws_frame(self, _: WSTransport, frame: WSFrame) -> None:
        """Send the same frame to everyone."""
        if frame.msg_type == WSMsgType.TEXT:
            data = text_frame(frame.get_payload_as_bytes())
            for transport in self.everyone.values():
                transport.write(data)


async def main(port: int) -> None:
    """Serve on a port."""

    def enter(_: WSUpgradeRequest) -> WSListener:
        return Member()

    server = await ws_create_server(enter, "127.0.0.1", port, enable_auto_ping=False)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
