"""A client of the wire protocol, independent of the server's code. The tests use it, too."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from protocol import SUBPROTOCOL
from protocol.client import Frame, Ping
from protocol.codec import decode_server, encode
from protocol.errors import Refused
from protocol.limits import MAX_SENT_BYTES
from protocol.server import Conversations, Error, Ready, Reply, Result, ServerFrame

TIMEOUT_SECONDS = 10.0
"""Max wait for an expected frame or close, in seconds."""

Kind = TypeVar("Kind", bound=ServerFrame)
Answer = TypeVar("Answer", bound=Result)


class Client:
    """One connection. Frames that are not replies are collected in `events`, in the order of arrival."""

    def __init__(self, url: str, token: str | None, **options: Any) -> None:  # noqa: ANN401 - passed to websockets
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        options.setdefault("subprotocols", [SUBPROTOCOL])
        self._connecting = connect(
            url.replace("http", "ws", 1) + "/v1/ws" + options.pop("query", ""),
            additional_headers=headers | options.pop("headers", {}),
            compression=None,
            proxy=None,
            max_size=MAX_SENT_BYTES,
            **options,
        )
        self.socket: ClientConnection
        self.events: list[ServerFrame] = []
        self.on_event: Callable[[ServerFrame], None] = self.events.append
        self.ready: Ready
        self.failure: Exception | None = None
        self._replies: dict[int | str | None, asyncio.Future[Reply | Error]] = {}
        self._changed = asyncio.Condition()
        self._next = 0
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        ready = await self.event(Ready)
        self.ready = ready
        return self

    async def open(self) -> None:
        """Connect, without waiting for `ready`."""
        self.socket = await self._connecting
        self._reader = asyncio.create_task(self._read())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection, and wait for its last frames."""
        await self.socket.close()
        if self._reader is not None:
            await self._reader

    @property
    def is_over(self) -> bool:
        """Whether no more frames will arrive."""
        return self._reader is not None and self._reader.done()

    async def drop(self) -> None:
        """Abort the connection without a close handshake, like a lost network."""
        if self._reader is not None:
            self.socket.transport.abort()
            await self._reader

    async def settled(self) -> Self:
        """Wait until all conversations have arrived."""
        await self.event(Conversations, lambda event: event.is_last)
        return self

    async def ask(self, frame: Frame) -> Reply | Error:
        """Send a frame and return its answer. Raises ConnectionError if the connection ends before that."""
        self._next += 1
        frame.id = self._next
        future: asyncio.Future[Reply | Error] = asyncio.get_running_loop().create_future()
        self._replies[frame.id] = future
        try:
            await self.socket.send(encode(frame).decode())
        except ConnectionClosed as error:
            raise ConnectionError from error
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await future

    async def call(self, frame: Frame, kind: type[Answer] | None = None) -> Answer:
        """Send a frame and return its result. Raises Refused if the server answers with an error."""
        answer = await self.ask(frame)
        if isinstance(answer, Error):
            raise Refused(answer.code, answer.message, path=answer.path, retry_after_ms=answer.retry_after_ms)
        assert kind is None or isinstance(answer.result, kind), answer  # noqa: S101 - the protocol guarantees it
        return answer.result  # type: ignore[return-value]

    async def raw(self, data: str | bytes) -> Error:
        """Send raw data and return the error that answers it."""
        seen = len(self.events)
        await self.socket.send(data)
        return await self.event(Error, start=seen)

    async def event(self, kind: type[Kind], where: Callable[[Kind], bool] = lambda _: True, *, start: int = 0) -> Kind:
        """Return the first event of a kind. Wait for it if it has not arrived."""
        async with asyncio.timeout(TIMEOUT_SECONDS), self._changed:
            while True:
                for event in self.events[start:]:
                    if isinstance(event, kind) and where(event):
                        return event
                if self.is_over:
                    raise ConnectionError(f"closed with {self.socket.close_code} before {kind.__name__}")
                await self._changed.wait()

    async def closed(self) -> int | None:
        """Wait until the server closes the connection, and return the close code."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self.socket.wait_closed()
        return self.socket.close_code

    async def synced(self) -> None:
        """Wait until all frames that the worker sent before this call have arrived."""
        await self.call(Ping())

    async def _read(self) -> None:
        try:
            async for message in self.socket:
                frame = decode_server(message)
                if isinstance(frame, (Reply, Error)) and (waiting := self._replies.pop(frame.re, None)) is not None:
                    if not waiting.done():  # The caller may have given up.
                        waiting.set_result(frame)
                    continue
                self.events.append(frame)
                if self.on_event != self.events.append:
                    self.on_event(frame)
                async with self._changed:
                    self._changed.notify_all()
        except ConnectionClosed:
            pass
        except Exception as error:
            self.failure = error
            raise
        finally:
            for waiting in self._replies.values():
                if not waiting.done():
                    ended = ConnectionError(
                        f"the connection ended before the answer: {self.failure or self.socket.close_code}"
                    )
                    waiting.set_exception(ended)
                    waiting.exception()
            async with self._changed:
                self._changed.notify_all()
