"""No text takes much longer to process than ordinary words of the same length."""

import contextlib
import itertools
import random
import re
import time
from collections.abc import Callable

import pytest
from asyncpg import Record
from asyncpg.prepared_stmt import PreparedStatement

from protocol import codec, limits
from protocol.errors import Refused
from server.domain import markdown, mentions, search_text
from server.jobs import previews
from server.ops.transfer import slack
from server.queries import search
from tests.world import World

MAX_RATIO = 15
"""Max ratio to the time for ordinary words. Linear work with a word at every second character takes 3 times as long,
up to 10 times on a busy machine. Quadratic work takes 20 times and more.
"""
TRIES = 40
"""Max measurements, of which the shortest counts, since other processes prolong the others."""
PAGE_MS = 30
"""Max time to parse a page, milliseconds. The slowest page takes a third of it."""

_SIGNS = "/.-_~:@&<>!?=%#+'\" e1"
PIECES = [
    *map("".join, itertools.product(_SIGNS, repeat=2)),
    *_SIGNS, "1a@", "a@b.c", "a-1-", "1-a-", "a-b.c-", "x-1.", "a-e_", "a=1&", "http://a", "1e-", "a:1/", "a.b/",
    "<a ", "<a", "<a b=", "<a b='", "<a\t", "</a", "<!--", "<!-- ", "<?", "&#", "&#x", "&lt", "é_", "日_", "é.", "日-",
    "\n", "\x01", "\u200d", "\u0301", "\u093e", "\u00a0", "\u2028", "½", "😀", "a ", "é ",
]  # fmt: skip
"""Pairs of characters for which PostgreSQL's parser looks far ahead, and characters at the edge of words."""
MARKUP = [
    *"*_~`[]()<>!#&\\@|\n{}", "**", "_a_ ", "](", "[a]: ", "![", "```", "`\n", "<@", "@a", "@a-", "#a", ">a", "> ",
    "- ", "1. ", "<http://", "http://a ", "https://", "@a@", ".invalid", "@.", "\u2003", "\u200d ",
    "<a ", "<a b", "a='", "</", "</a", "<!--", "<!->", "<?", "<![", "<![<", "<![CDATA[", "]]>", "&a", "&#x", "<>",
]  # fmt: skip
"""Texts for which patterns, Markdown and HTML look ahead."""
JSON = ['"', '\\"', "[", "{", "[[],", "e", "1e300,", '"a":', '{"a":', "\\u0000", "-e"]

_letters = random.Random(1)
ORDINARY = " ".join("".join(_letters.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2_000))


async def _least(found: "PreparedStatement[Record]", text: str, *, enough: float) -> float:
    """Return the shortest time of a statement in seconds. Stop measuring at `enough`."""
    least = float("inf")
    for _ in range(TRIES):
        begun = time.perf_counter()
        await found.fetch(text, "engine")
        least = min(least, time.perf_counter() - begun)
        if least <= enough:
            break
    return least


_MARKED = search._SNIPPET.replace("(found.m).content", "$1::text").replace("$2", "$2::text")  # noqa: SLF001 - a part


@pytest.mark.long
@pytest.mark.parametrize(
    ("sql", "most"),
    [
        ("SELECT search_words(gen_random_uuid(), $1, NULL, '{}', '{}', '{}') WHERE $2 <> ''", limits.MAX_CONTENT),
        ("SELECT to_tsvector('english', unpunctuated($1)) WHERE $2 <> ''", limits.MAX_CONTENT),
        (f"SELECT {_MARKED} FROM generate_series(1, 5)", search.EXCERPT),
    ],
    ids=["words", "stems", "snippet"],
)
async def test_no_text_is_slow_to_index_or_to_make_a_snippet_of(world: World, sql: str, most: int) -> None:
    """A slow text would delay others in the same statement, and participants who search."""
    found = await world.db.prepare(sql)
    text = f"engine {ORDINARY}"[:most]
    await found.fetch(text, "engine")
    ordinary = await _least(found, text, enough=0)
    for piece in PIECES:
        hostile = f"engine {piece * most}"[:most]
        took = await _least(found, hostile, enough=MAX_RATIO * ordinary)
        assert took <= MAX_RATIO * ordinary, f"{piece!r}: {took * 1e3:.1f} ms, not {ordinary * 1e3:.1f}"


def _patterns(text: str) -> None:
    for pattern in limits.RULES:
        for start in ("", "@", "http://"):
            re.search(pattern, start + text + "\n")


@pytest.mark.parametrize(
    ("work", "size", "most_ms"),
    [
        (lambda text: mentions.find(text, is_code=False, is_markdown=True), limits.MAX_CONTENT, 25),
        (previews.first_link, limits.MAX_CONTENT, 10),
        (slack._text, limits.MAX_CONTENT, 25),  # noqa: SLF001 - used by an import for each text
        (lambda text: search_text.query(text, prefix=3), 255, 10),
        (markdown.render, limits.MAX_CONTENT, 60),
        (_patterns, limits.MAX_CONTENT, 60),
        (limits.visible, limits.MAX_CONTENT, 10),
        (codec.decode_client, limits.MAX_FRAME_BYTES, 80),
        (lambda text: codec.decode_client('{"type":"send","metadata":' + text), limits.MAX_FRAME_BYTES, 80),
    ],
    ids=["mentions", "link", "slack", "query", "markdown", "patterns", "visible", "frame", "metadata"],
)
def test_no_text_is_slow_to_process(work: Callable[[str], object], size: int, most_ms: float) -> None:
    """The bounds are CPU times, about five times those of the slowest text."""
    for piece in (*MARKUP, *JSON):
        text = (piece * size)[:size]
        least = float("inf")
        for _ in range(TRIES):
            begun = time.thread_time()
            with contextlib.suppress(Refused):
                work(text)
            least = min(least, (time.thread_time() - begun) * 1e3)
            if least <= most_ms:
                break
        assert least <= most_ms, f"{piece!r}: {least:.1f} ms"


@pytest.mark.parametrize("start", ["", "<title>", "<meta ", "<meta a='", "<a ", "<script>", "<!--", "<!doctype a ["])
def test_no_page_is_slow_to_make_a_preview_of(start: str) -> None:
    """A pattern search holds the interpreter lock, even in a thread."""
    for piece in (*MARKUP, "</", "<a ", "a ", "a= ", "a='' ", "<meta ", "<title>", "</title>", "<!--", "-->", "&amp;"):
        page = (start + piece * previews.MAX_PAGE_BYTES)[: previews.MAX_PAGE_BYTES].encode()
        least = float("inf")
        for _ in range(TRIES):
            begun = time.thread_time()
            previews.read(page, "http://a", "http://a")
            least = min(least, (time.thread_time() - begun) * 1e3)
            if least <= PAGE_MS:
                break
        assert least <= PAGE_MS, f"{piece!r}: {least:.1f} ms"
