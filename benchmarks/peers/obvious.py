"""The same chat with the same libraries, in a straightforward implementation.

It loops over sockets, and executes one statement and one publish per message. Start it with
`uvicorn benchmarks.peers.obvious:app`, with DATABASE_URL and REDIS_URL in the environment.
"""

import asyncio
import contextlib
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

rooms: dict[str, set[WebSocket]] = defaultdict(set)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Connect to PostgreSQL and Redis, and listen to all workers."""
    app.state.pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=2, max_size=8)
    app.state.redis = Redis.from_url(os.environ["REDIS_URL"])
    listening = asyncio.create_task(listen(app))
    yield
    listening.cancel()


async def listen(app: Starlette) -> None:
    """Deliver published messages to this worker's sockets of their conversations."""
    async with app.state.redis.pubsub() as pubsub:
        await pubsub.psubscribe("conversation:*")
        async for message in pubsub.listen():
            if message["type"] == "pmessage":
                text = message["data"].decode()
                for socket in list(rooms[message["channel"].decode().partition(":")[2]]):
                    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                        await socket.send_text(text)


async def chat(socket: WebSocket) -> None:
    """Serve one connection: authenticate it, join its conversations, and handle its frames."""
    pool, redis = socket.app.state.pool, socket.app.state.redis
    token = socket.headers.get("authorization", "").removeprefix("Bearer ")
    user_id = await pool.fetchval("SELECT user_id FROM session WHERE token = $1 AND expires_at > now()", token)
    if user_id is None:
        await socket.close()
        return
    await socket.accept()
    found = await pool.fetch("SELECT conversation_id FROM participant WHERE user_id = $1", user_id)
    mine = {str(row["conversation_id"]) for row in found}
    for about in mine:
        rooms[about].add(socket)
    await socket.send_text(json.dumps({"type": "ready"}))
    try:
        async for text in socket.iter_text():
            frame = json.loads(text)
            await socket.send_text(json.dumps(await send(pool, redis, mine, user_id, frame)))
    finally:
        for about in mine:
            rooms[about].discard(socket)


async def send(pool: Any, redis: Any, mine: set[str], user_id: Any, frame: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Store a message and publish it."""
    about = frame["conversation_id"]
    if about not in mine:
        return {"type": "error", "re": frame["id"], "code": "not_found"}
    created_at = await pool.fetchval(
        "INSERT INTO message (id, conversation_id, sender_id, content) VALUES ($1, $2, $3, $4) RETURNING created_at",
        frame["message_id"],
        about,
        user_id,
        frame["content"],
    )
    message = {
        "id": frame["message_id"],
        "conversation_id": about,
        "sender_id": str(user_id),
        "content": frame["content"],
        "created_at": created_at.isoformat(),
    }
    await redis.publish(f"conversation:{about}", json.dumps({"type": "message_sent", "message": message}))
    return {"type": "reply", "re": frame["id"], "result": {"created_at": created_at.isoformat()}}


app = Starlette(routes=[WebSocketRoute("/v1/ws", chat)], lifespan=lifespan)
