"""The max cost of each frame, measured with an account at its limits.

It is compared with an ordinary account, and with reading one row by its key in the same run.

`make worst`, or `python -m benchmarks.worst --size 0.1 search_users get_badge`.
"""

import argparse
import asyncio
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import asyncpg
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.worst_database import BOB, MALLORY, Ids, fill
from benchmarks.worst_frames import WORST
from protocol.client import Frame
from protocol.server import Error
from prove.client import Client
from server.auth.tokens import new_token, token_hash
from server.core.config import Settings
from server.db import migrate
from server.processes.embedded.folder import DataFolder
from server.processes.embedded.postgres import Postgres
from server.processes.embedded.valkey import Valkey
from server.processes.supervisor import Worker, listen

REPEATS = 5
SLOW_MS = 500.0
"""Time, in milliseconds, above which a frame is measured only once."""
BY_KEY = "SELECT id, content FROM message WHERE id = $1"
POSTGRES = {
    "fsync": "off", "full_page_writes": "off", "maintenance_work_mem": "512MB", "max_wal_size": "8GB",
    "shared_buffers": "1GB", "autovacuum": "off", "log_min_duration_statement": "0",
}  # fmt: skip
COLUMNS = ("frame", "worst input", "ms of the database", "ordinary", "ratio", "keys", "ms to the answer", "answer")
TOOK = re.compile(rb"duration: ([\d.]+) ms")


class Cost(NamedTuple):
    """The cost of a frame in the database and until its answer, in milliseconds, and a summary of the answer."""

    database: float
    answered: float
    answer: str


def main() -> None:
    """Start and fill a PostgreSQL, send all frames to a worker, and print their costs."""
    parser = argparse.ArgumentParser(prog="benchmarks.worst", description=__doc__)
    parser.add_argument("--size", type=float, default=1.0, help="share of the limits that the account reaches (1.0)")
    parser.add_argument("frames", nargs="*", help="only frames whose names begin with one of these (all)")
    options = parser.parse_args()
    path = Path(tempfile.mkdtemp(prefix="openchat-worst-"))
    folder = DataFolder(path)
    postgres, valkey = Postgres(folder, max_connections=40, options=POSTGRES), Valkey(folder)
    try:
        postgres.start()
        valkey.start()
        settings = Settings(
            database_url=postgres.url(), redis_url=valkey.url,
            database_connections=8, read_rate=1e6, write_rate=1e6, search_rate=1e6,
        )  # fmt: skip
        ids = asyncio.run(prepare(postgres, options.size))
        worker = Worker(settings, 1, listen("127.0.0.1", 0, 1)[0], path)
        try:
            worker.start()
            worker.wait_ready()
            uvloop.run(measure(worker, postgres, ids, tuple(options.frames)))
        finally:
            worker.kill()
    finally:
        valkey.stop()
        postgres.stop()
        folder.release()
        shutil.rmtree(path)


async def prepare(postgres: Postgres, size: float) -> Ids:
    """Create the tables and fill them."""
    began = time.monotonic()
    await migrate.migrate(postgres.url())
    db = await asyncpg.connect(postgres.url(), server_settings={"log_min_duration_statement": "-1"})
    ids = await fill(db, size)
    await db.close()
    Console().print(f"filled in {time.monotonic() - began:.0f} s")
    return ids


async def measure(worker: Worker, postgres: Postgres, ids: Ids, names: tuple[str, ...]) -> None:
    """Measure all frames, and print a table."""
    db = await asyncpg.connect(postgres.url(), server_settings={"log_min_duration_statement": "-1"})
    tokens = [await session(db, user_id) for user_id in (BOB, MALLORY)]
    by_key = await read_by_key(db, ids)
    await db.close()
    host, port = worker.listener.getsockname()[:2]
    table = Table(title=f"one row by its key takes {by_key:.3f} ms", title_justify="left")
    for column in (
        "frame",
        "worst input",
        "ms of the database",
        "ordinary",
        "ratio",
        "keys",
        "ms to the answer",
        "answer",
    ):
        table.add_column(column, justify="left" if column in {"frame", "worst input", "answer"} else "right")
    async with Client(f"http://{host}:{port}", tokens[0]) as bob, Client(f"http://{host}:{port}", tokens[1]) as mallory:
        await mallory.settled()
        for worst in WORST:
            if names and not worst.name.startswith(names):
                continue
            ordinary = await cost(bob, postgres, lambda worst=worst: worst.frame(ids.of_bob))  # type: ignore[misc]
            most = await cost(mallory, postgres, lambda worst=worst: worst.frame(ids.of_mallory))  # type: ignore[misc]
            table.add_row(
                worst.name, worst.about, f"{most.database:.1f}", f"{ordinary.database:.2f}",
                f"{most.database / max(ordinary.database, 0.001):,.0f}", f"{most.database / by_key:,.0f}",
                f"{most.answered:.1f}", most.answer,
            )  # fmt: skip
    Console(width=180).print(table)


async def session(db: "asyncpg.Connection[asyncpg.Record]", user_id: object) -> str:
    """Return the token of a new session."""
    token = new_token()
    await db.execute(
        "INSERT INTO session (user_id, token, expires_at) VALUES ($1, $2, now() + interval '1 day')",
        user_id, token_hash(token),
    )  # fmt: skip
    return token


async def read_by_key(db: "asyncpg.Connection[asyncpg.Record]", ids: Ids) -> float:
    """Return the median time to read one row by its key, in milliseconds."""
    spans = []
    for _ in range(200):
        began = time.perf_counter()
        await db.fetchrow(BY_KEY, ids.of_mallory.root)
        spans.append(time.perf_counter() - began)
    return 1_000 * statistics.median(spans)


async def cost(client: Client, postgres: Postgres, frame: Callable[[], Frame]) -> Cost:
    """Return the median cost of a frame."""
    costs: list[Cost] = []
    while len(costs) < REPEATS and (not costs or costs[-1].answered < SLOW_MS):
        start = postgres.log.path.stat().st_size
        began = time.perf_counter()
        answer = await client.ask(frame())
        answered = 1_000 * (time.perf_counter() - began)
        await asyncio.sleep(0.02)
        with postgres.log.path.open("rb") as log:
            log.seek(start)
            took = sum(float(span) for span in TOOK.findall(log.read()))
        if isinstance(answer, Error):
            came = f"{answer.code}: {answer.message[:40]}"
        else:
            came = f"{len(msgspec.json.encode(answer)) / 1024:,.0f} KiB"
        costs.append(Cost(took, answered, came))
    return sorted(costs)[len(costs) // 2]


if __name__ == "__main__":
    main()
