"""The cost of searches among a million messages or more, relative to reading one row by its key in the same run.

`make search`, or `python -m benchmarks.search --messages 10000000 --plans`.
"""

import argparse
import asyncio
import bisect
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from rich.console import Console
from rich.progress import track
from rich.table import Table

from protocol.client import Search
from protocol.ids import ConversationId, MessageId, UserId
from protocol.server import SearchPage
from server.core.config import Settings
from server.db import migrate
from server.db.database import SEARCHING, SESSION, Database
from server.domain import search_text
from server.ops.check import run_checks
from server.ops.progress import Progress
from server.ops.reindex import FIRST
from server.processes.embedded.folder import DataFolder
from server.processes.embedded.postgres import Postgres
from server.queries import search, search_index

CONVERSATIONS, PEOPLE, IN_EACH = 1_000, 1_000, 50
"""Number of conversations, number of people, and number of conversations per person. One more is in all of them."""
WORDS, IN_A_MESSAGE = 50_000, 12
"""Size of the vocabulary, and words per message. As in natural languages, the n-th word is n times rarer than the
first (Zipf's law).
"""
MESSAGES_PER_INSERT = 50_000
REPEATS = 50
BEGAN_MS = 1_700_000_000_000
BY_KEY = "SELECT id, content FROM message WHERE id = $1"
MS = 1e3
FILL = {"fsync": "off", "full_page_writes": "off", "maintenance_work_mem": "1GB", "max_wal_size": "16GB",
        "shared_buffers": "1GB", "autovacuum": "off"}  # fmt: skip


class Asked(NamedTuple):
    """A search to measure, and the number of the user who searches."""

    what: str
    frame: Search
    user: int = 0


def main() -> None:
    """Start and fill a PostgreSQL, search in it, and print the durations."""
    parser = argparse.ArgumentParser(prog="benchmarks.search", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, help="messages in 1,000 conversations (1,000,000)")
    parser.add_argument("--check", action="store_true", help="also run `openchat check` on the database")
    parser.add_argument("--plans", action="store_true", help="also print the plans")
    options = parser.parse_args()
    console = Console()
    path = Path(tempfile.mkdtemp(prefix="openchat-search-"))
    folder = DataFolder(path)
    postgres = Postgres(folder, max_connections=20, options=FILL)
    try:
        postgres.start()
        asyncio.run(fill(postgres.url(), options.messages))
        asyncio.run(measure(postgres.url(), options.messages, console, with_plans=options.plans))
        if options.check:
            asyncio.run(check(postgres.url()))
    finally:
        postgres.stop()
        folder.release()
        shutil.rmtree(path)


async def fill(url: str, messages: int) -> None:
    """Insert people, conversations and messages, and build the search index."""
    await migrate.migrate(url)
    db = await asyncpg.connect(url)
    await db.execute("SET session_replication_role = replica")
    await db.execute("DROP INDEX message_search_words_idx")
    await db.copy_records_to_table(
        "user",
        records=[(user(n), f"User {n}", f"{n}@example.org") for n in range(PEOPLE + 1)],
        columns=["id", "name", "email"],
    )
    each = messages // CONVERSATIONS
    await db.copy_records_to_table(
        "conversation",
        records=[
            (about(n), "group", "A title", user(0), each + 2 + IN_EACH, 2 + IN_EACH, IN_EACH + 1, each, 1)
            for n in range(CONVERSATIONS)
        ],
        columns=[
            "id",
            "type",
            "title",
            "created_by",
            "version",
            "access_version",
            "participant_count",
            "message_count",
            "settings_version",
        ],
    )
    await db.copy_records_to_table(
        "conversation_participant",
        records=[
            (about((n * 7 + k * 13) % CONVERSATIONS), user(n), 2 + k, "owner" if k == 0 else "member")
            for n in range(PEOPLE)
            for k in range(IN_EACH)
        ]
        + [(about(n), user(PEOPLE), 2 + IN_EACH, "member") for n in range(CONVERSATIONS)],
        columns=["conversation_id", "user_id", "version", "role"],
    )
    rng = random.Random(1)  # noqa: S311 - words, not secrets
    starts = range(0, messages, MESSAGES_PER_INSERT)
    for start in track(starts, f"writing {messages:,} messages"):
        numbers = range(start, min(start + MESSAGES_PER_INSERT, messages))
        await db.copy_records_to_table(
            "message",
            records=rows(numbers, rng),
            columns=["id", "conversation_id", "sender_id", "content", "sent_version", "version", "created_at"],
        )
    after = FIRST
    for _ in track(itertools.count(), "building the search index", total=messages / search_index.MAX_MESSAGES):
        if not (message_ids := await search_index.following(db, after)):
            break
        await search_index.page(db, message_ids, only_missing=False)
        after = message_ids[-1]
    began = time.monotonic()
    await db.execute("CREATE INDEX message_search_words_idx ON message_search USING gin (words)")
    await db.execute("VACUUM (FREEZE, ANALYZE)")
    Console().print(f"indexed in {time.monotonic() - began:.0f} s")
    await db.close()


def rows(numbers: range, rng: random.Random) -> Iterator[tuple[Any, ...]]:
    """Yield messages as rows for COPY."""
    for number in numbers:
        content = " ".join(words(rng))
        at = datetime.fromtimestamp((BEGAN_MS + number) / 1000, UTC)
        version = number // CONVERSATIONS + 3 + IN_EACH
        yield message_id(number), about(number % CONVERSATIONS), user(number % PEOPLE), content, version, version, at


_weights = list(itertools.accumulate(1 / (n + 1) for n in range(WORDS)))


def words(rng: random.Random) -> list[str]:
    """Return random words for a message."""
    return [f"w{bisect.bisect(_weights, rng.random() * _weights[-1])}x" for _ in range(IN_A_MESSAGE)]


def message_id(number: int) -> MessageId:
    """Return the id of a message, a UUIDv7 in the order of messages."""
    return MessageId(UUID(int=(BEGAN_MS + number) << 80 | 7 << 76 | 2 << 62 | number))


def about(number: int) -> ConversationId:
    """Return the id of a conversation."""
    return ConversationId(UUID(int=1 << 64 | number))


def user(number: int) -> UserId:
    """Return the id of a user."""
    return UserId(UUID(int=1 << 65 | number))


def asked() -> list[Asked]:
    """Return the searches. Most are made as the first user, who is in 50 of 1,000 conversations."""
    here, busy = about(0), PEOPLE
    return [
        Asked("a rare word", Search(text="w30000x")),
        Asked("a common word (in a third of all)", Search(text="w2x")),
        Asked("two common words", Search(text="w2x w5x")),
        Asked("a prefix of many words", Search(text="w12")),
        Asked("a common word in one conversation", Search(text="w2x", conversation_id=here)),
        Asked("a common word of a sender who never wrote it", Search(text="w2x", sender_id=user(7))),
        Asked("a common word in a file, of which there are none", Search(text="w2x", has_file=True)),
        Asked("a common word in a pin, of which there are none", Search(text="w2x", is_pinned=True)),
        Asked("a common word, by relevance", Search(text="w2x", order="relevance")),
        Asked("all messages of one conversation", Search(conversation_id=here)),
        Asked("files of one conversation, of which there are none", Search(conversation_id=here, has_file=True)),
        Asked("a rare word, in 1,000 conversations", Search(text="w30000x"), busy),
        Asked("a common word, in 1,000 conversations", Search(text="w2x"), busy),
        Asked("a word in one of 280 messages, of nobody", Search(text="w300x", sender_id=user(busy))),
    ]


async def measure(url: str, messages: int, console: Console, *, with_plans: bool) -> None:
    """Measure the searches and print a table, and with `with_plans` the plans."""
    database = await Database.open(Settings(database_url=url, database_connections=2))
    one = message_id(messages // 2)
    async with database.connection() as db:
        by_key = statistics.median(await durations(lambda: db.fetchrow(BY_KEY, one)))
    table = Table(title=f"{messages:,} messages in {CONVERSATIONS:,} conversations, {IN_EACH} of them the user's")
    for column in ("search", "found", "median, ms", "max, ms", "relative to one row by its key", "partial"):
        table.add_column(column, justify="left" if column in {"search", "partial"} else "right")
    table.add_row("(reading a row by its key)", "1", f"{by_key * MS:.2f}", "", "1", "")
    for what, frame, who in asked():
        text = None if frame.text is None else search_text.query(frame.text, prefix=search_text.PREFIX_OF_WORDS)

        async def once(frame: Search = frame, text: str | None = text, who: int = who) -> SearchPage:
            async with database.searching() as db:
                page = await search.find(db, user(who), frame, text, limit=frame.limit)
            return await page.decoded()

        page = await once()
        spans = await durations(once)
        table.add_row(
            what,
            str(len(page.hits)),
            f"{statistics.median(spans) * MS:.1f}",
            f"{max(spans) * MS:.1f}",
            f"{statistics.median(spans) / by_key:,.0f}",
            "" if page.searched_to is None else "yes",
        )
    console.print(table)
    await database.close()
    if with_plans:
        await plans(url, console)


async def durations(work: Any) -> list[float]:  # noqa: ANN401 - returns any awaitable
    """Return the durations of `work`, in seconds."""
    spans = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        await work()
        spans.append(time.perf_counter() - began)
    return spans


async def check(url: str) -> None:
    """Run the checks of `openchat check`, and print their durations."""
    db = await asyncpg.connect(url)
    table = Table(title="openchat check")
    for column in ("check", "s", ""):
        table.add_column(column, justify="right" if column == "s" else "left")
    seconds = 0.0
    async for line in run_checks(db, progress=Progress(is_on=False)):
        table.add_row(line.name, f"{line.seconds:.1f}", "ok" if line.is_good else "WRONG")
        seconds += line.seconds
    table.add_row("total", f"{seconds:.1f}", "")
    Console().print(table)
    await db.close()


EXPLAINING = """
LOAD 'auto_explain';
SET auto_explain.log_min_duration = 0;
SET auto_explain.log_nested_statements = on;
SET auto_explain.log_analyze = on;
SET client_min_messages = log
"""
"""Makes PostgreSQL send the plan of each statement to the client."""


async def plans(url: str, console: Console) -> None:
    """Print the plans of each search, with the server's session settings."""
    db = await asyncpg.connect(url, server_settings=SESSION)

    def note(_: object, message: asyncpg.PostgresLogMessage) -> None:
        console.print(message.message or "", highlight=False, markup=False, soft_wrap=True)

    await db.execute(EXPLAINING)
    db.add_log_listener(note)
    for what, frame, who in asked():
        text = None if frame.text is None else search_text.query(frame.text, prefix=search_text.PREFIX_OF_WORDS)
        console.print(f"\n[bold]{what}[/]")
        async with db.transaction():
            await db.execute(SEARCHING)
            await search.find(db, user(who), frame, text, limit=frame.limit)
    await db.close()


if __name__ == "__main__":
    main()
