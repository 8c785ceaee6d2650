"""Frames about the connection itself."""

from protocol import client
from protocol.codec import now
from protocol.server import Pong, Resumed
from server.context import Context
from server.domain import sync


async def ping(context: Context, frame: client.Ping) -> Pong:  # noqa: ARG001 - the table's shape
    """Return the server's time."""
    return Pong(server_time=now())


async def resume(context: Context, frame: client.Resume) -> Resumed:
    """Send the changes that the client missed."""
    return await sync.resume(context, frame)
