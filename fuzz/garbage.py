"""Sends garbage to an OpenChat server for some minutes, and prints the memory of its worker.

`python fuzz/garbage.py 60` runs for an hour. The exit status is 1 if the worker's memory grows by more than a tenth
after the first tenth of the time.
"""

import asyncio
import contextlib
import os
import random
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import uvloop

from prove.cluster import OwnCluster

TALKERS = 8
REPORTS = 20
GROWTH = 1.1
PATIENCE = 5.0
PAGE = os.sysconf("SC_PAGE_SIZE")
ACCOUNT = {"name": "Garbage", "email": "garbage@example.org", "password": "correct horse"}
WORDS = (
    b"{",
    b'{"type":"send"',
    b'{"type":"resume","epoch":"","versions":{}}',
    b'{"type":"ping","id":1}',
    b"[" * 5000,
    b"\xff",
)


def held(pid: int) -> int:
    """Return the resident memory of a process, in KiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE // 1024


def frame(rng: random.Random) -> bytes:
    """Return a random WebSocket frame, which may be malformed."""
    payload = rng.choice((rng.randbytes(rng.randrange(400)), rng.choice(WORDS)))
    kind = rng.choice((0x81, 0x81, 0x81, 0x01, 0x80, 0x82, 0x88, 0x89, 0x8A, 0xC1, rng.randrange(256)))
    size = len(payload) + rng.choice((0, 0, 0, 1, 100_000))
    head = (
        bytes((0x80 | size,))
        if size < 126
        else b"\xfe" + size.to_bytes(2)
        if size < 1 << 16
        else b"\xff" + size.to_bytes(8)
    )
    return bytes((kind,)) + head + bytes(4) + payload


async def talk(address: tuple[str, int], token: str, end: float, rng: random.Random) -> int:
    """Connect, send garbage and disconnect until `end`. Return the number of connections."""
    count = 0
    head = (
        "GET /v1/ws?resume=1 HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()
    while time.monotonic() < end:
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head if rng.random() < 0.9 else head[: rng.randrange(len(head))] + rng.randbytes(50))
            for _ in range(rng.randrange(12)):
                writer.write(frame(rng))
            async with asyncio.timeout(PATIENCE):
                await reader.read(1 << 16)
            if rng.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()
        count += 1
    return count


async def main(minutes: float) -> int:
    """Return 1 if the worker's memory grew after the first tenth of the time."""
    async with OwnCluster(1) as cluster, httpx.AsyncClient(trust_env=False) as http:
        token = (await http.post(f"{cluster.url}/v1/auth/register", json=ACCOUNT)).json()["token"]
        (worker,) = cluster.workers()
        begin = time.monotonic()
        end = begin + minutes * 60
        address = (urlsplit(cluster.url).hostname or "", urlsplit(cluster.url).port or 0)
        talking = [asyncio.create_task(talk(address, token, end, random.Random(number))) for number in range(TALKERS)]
        seen = []
        while time.monotonic() < end:
            await asyncio.sleep(minutes * 60 / REPORTS)
            seen.append(held(worker))
            print(f"{time.monotonic() - begin:6.0f} s   {seen[-1]:,} KiB")
        print(f"{sum(await asyncio.gather(*talking)):,} connections")
        assert (await http.get(f"{cluster.url}/healthz")).is_success
        assert cluster.workers() == [worker], "the worker ended"
        return int(seen[-1] > GROWTH * seen[REPORTS // 10 - 1])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)))
