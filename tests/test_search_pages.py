"""A search reads a bounded number of messages per page. Its pages together have each match once, in order."""

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId
from protocol.payloads import File, Location, Poll
from server.core.config import Settings
from server.queries import search_matches
from server.queries.search import SearchPosition
from tests.world import Room, World, refused, sent

# $1 conversation, $2 sender, $3 contents, $4 seconds of each message since 1940.
FILL = """
WITH said AS (
    INSERT INTO message (conversation_id, sender_id, content, sent_version, version, created_at)
    SELECT $1, $2, f.content, 1000000 + f.n, 1000000 + f.n, '1940-01-01'::timestamptz + f.at * interval '1 second'
    FROM unnest($3::text[], $4::float8[]) WITH ORDINALITY f (content, at, n)
    RETURNING *
)
INSERT INTO message_search (message_id, conversation_id, created_at, words)
SELECT id, conversation_id, created_at, search_words(conversation_id, content, NULL, '{}', '{}', '{}') FROM said
"""
READ = """
SELECT f.messages_read FROM newest_matches(to_tsquery($1), $2, '{0}', '{member}', now(),
    'ffffffff-ffff-ffff-ffff-ffffffffffff', NULL, NULL, NULL, NULL, NULL, $3, $4, 60000) f WHERE f.message_id IS NULL
"""
YEAR = 365 * 86_400.0
SPREADS = {"steadily": 60.0, "rarely": YEAR / 12, "densely": 0.0001, "at one time": 0.0}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Tests search more often than users."""
    return msgspec.structs.replace(settings, search_rate=1_000_000.0)


async def pages(room: Room, **fields: Any) -> tuple[list[str], list[server.SearchPage]]:
    """Return the contents of all hits, and the pages."""
    found: list[server.SearchPage] = []
    after = None
    while not found or after is not None:
        answer = await room.ada.ask(client.Search(after=after, **fields))
        if isinstance(answer, server.Error) and answer.code is ErrorCode.RATE_LIMITED:
            await asyncio.sleep((answer.retry_after_ms or 0) / 1_000)
            continue
        assert isinstance(answer, server.Reply)
        assert isinstance(answer.result, server.SearchPage)
        found.append(answer.result)
        after = found[-1].after
    return [hit.message.content for page in found for hit in page.hits], found


async def fill(world: World, room: Room, place: ConversationId, said: Sequence[tuple[str, float]]) -> None:
    await world.db.execute(FILL, place, room.users[0].id, [one for one, _ in said], [at for _, at in said])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search index always takes too long, and few messages are read for a page."""

    async def late(*_: object) -> None:
        return None

    monkeypatch.setattr(search_matches, "_by_index", late)
    monkeypatch.setattr(search_matches, "PROBED", 10)
    monkeypatch.setattr(search_matches, "FURTHER", 20)


@pytest.fixture(params=["patient", "impatient"])
def patience(request: pytest.FixtureRequest) -> str:
    if request.param == "impatient":
        request.getfixturevalue("impatient")
    return str(request.param)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("spread", SPREADS)
async def test_pages_have_each_match_once_in_order(room: Room, world: World, spread: str) -> None:
    dice = random.Random(spread)
    everything: list[tuple[float, str]] = []
    for place in (room.group, await world.channel(room.ada), await world.channel(room.ada)):
        count = dice.choice((300, 900))
        at = [float(dice.randrange(count)) * SPREADS[spread] for _ in range(count)]
        said = [(f"{dice.choice(('common', 'rare' if n % 50 == 7 else 'other'))} {place} {n}", one)
                for n, one in enumerate(at)]  # fmt: skip
        await fill(world, room, place, said)
        everything += [(one, content) for content, one in said]
    for word in ("common", "rare"):
        expected = sorted([one for one in everything if one[1].startswith(word)], reverse=True)
        found, _ = await pages(room, text=word, limit=100)
        assert sorted(found) == sorted(content for _, content in expected)
        at_of = {content: at for at, content in everything}
        assert [at_of[content] for content in found] == [at for at, _ in expected]


async def test_common_word_is_found_without_reading_all_messages(room: Room, world: World) -> None:
    await fill(world, room, room.group, [(f"common {n}", 60.0 * n) for n in range(5_000)])
    read = await world.db.fetchval(READ, "common", [room.group], 21, 20_000)
    assert 21 <= read < 1_000
    assert await world.db.fetchval(READ, "rare", [room.group], 21, 20_000) == 5_000
    assert 2_000 <= await world.db.fetchval(READ, "rare", [room.group], 21, 2_000) < 3_000


@pytest.mark.parametrize("few", [0, 50])
async def test_rare_word_is_found_by_the_index(
    room: Room, world: World, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_matches, "FEW", few)
    await fill(world, room, room.group, [("rare", 0.0), *((f"common {n}", 60.0 * n) for n in range(1, 3_000))])
    found, (page,) = await pages(room, text="rare")
    assert (found, page.is_partial, page.searched_to) == (["rare"], False, None)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("order", ["newest", "relevance"])
async def test_search_that_takes_long_says_how_far_it_looked(room: Room, world: World, order: Any) -> None:
    await fill(world, room, room.group, [("rare", 0.0), *((f"common {n}", 60.0 * n) for n in range(1, 3_000))])
    page = await room.ada.call(client.Search(text="rare", order=order), server.SearchPage)
    assert (page.hits, page.is_partial) == ([], True)
    assert page.searched_to is not None
    assert datetime(1940, 1, 1, tzinfo=UTC) < page.searched_to
    if order == "newest":
        found, parts = await pages(room, text="rare")
        assert found == ["rare"]
        assert [part.is_partial for part in parts] == [True] * (len(parts) - 1) + [False]
    else:
        assert page.after is None, "older messages are not ranked"


@pytest.mark.usefixtures("impatient")
async def test_pages_by_relevance_rank_the_same_messages(room: Room, world: World) -> None:
    """Each page reads the messages that the first one read."""
    await fill(world, room, room.group, [(f"common {n}", 60.0 * n) for n in range(2_000)])
    found, parts = await pages(room, text="common", order="relevance", limit=100)
    assert len(found) == len(set(found))
    assert {part.searched_to for part in parts} == {parts[0].searched_to}


@pytest.mark.parametrize("order", ["newest", "relevance"])
@pytest.mark.parametrize("count", [1, 3])
async def test_page_whose_matches_were_deleted_meanwhile_is_not_the_last(
    room: Room, world: World, order: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search finds the messages by one statement, and reads them by a later one."""
    said = [await sent(room.charles, room.group, f"common {n}") for n in range(5)]
    await world.indexed()
    newest, gone = search_matches.newest, said[-count:]

    async def deleted_after(*asked: Any) -> search_matches.Matches:
        found = await newest(*asked)
        while gone:
            await room.charles.call(client.Delete(**room.at(gone.pop())))
        return found

    monkeypatch.setattr(search_matches, "newest", deleted_after)
    found, parts = await pages(room, text="common", order=order, limit=2)
    assert sorted(found, reverse=True) == found == [f"common {n}" for n in reversed(range(5 - count))]
    assert not any(part.is_partial for part in parts)


async def test_index_that_takes_too_long_is_given_up(room: Room, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(world, room, room.group, [("rare", 0.0), *((f"common {n}", 60.0 * n) for n in range(1, 3_000))])
    slow = search_matches.INDEXED_IN_FEW.replace("WHERE s.words", "WHERE pg_sleep(9) IS NOT NULL AND s.words", 1)
    monkeypatch.setattr(search_matches, "INDEXED_IN_FEW", slow)
    monkeypatch.setattr(search_matches, "FURTHER", 10)
    page = await room.ada.call(client.Search(text="rare"), server.SearchPage)
    assert (page.hits, page.is_partial) == ([], True)
    assert (await pages(room, text="rare"))[0] == ["rare"]


@pytest.mark.usefixtures("patience")
async def test_files_pins_and_threads_are_found_among_many_messages(room: Room, world: World) -> None:
    await fill(world, room, room.group, [(f"common {n}", 60.0 * n) for n in range(1_200)])
    root = None
    for number in range(3):
        await sent(room.ada, room.group, f"common file {number}", payload=File(url="https://x.y", name="a.pdf"))
        await sent(room.ada, room.group, f"common poll {number}", payload=Poll(options=["a", "b"]))
        root = await sent(room.ada, room.group, f"common root {number}")
        await sent(room.ada, room.group, f"common reply {number}", parent_message_id=root)
        await room.ada.call(client.Pin(**room.at(root)))
    await sent(room.ada, room.group, "common place", payload=Location(latitude=1.0, longitude=2.0))
    await world.indexed()
    for text in ("common", None):
        here: dict[str, Any] = {"text": text, "conversation_id": room.group}
        assert (await pages(room, has_file=True, **here))[0] == [f"common file {n}" for n in (2, 1, 0)]
        assert (await pages(room, has_file=True, limit=1, **here))[0] == [f"common file {n}" for n in (2, 1, 0)]
        assert (await pages(room, content_type="poll", **here))[0] == [f"common poll {n}" for n in (2, 1, 0)]
        assert (await pages(room, content_type="poll", has_file=True, **here))[0] == []
        assert (await pages(room, is_pinned=True, limit=2, **here))[0] == [f"common root {n}" for n in (2, 1, 0)]
        assert (await pages(room, in_thread=root, **here))[0] == ["common reply 2", "common root 2"]
    assert (await pages(room, text="file", is_pinned=True))[0] == []
    assert (await pages(room, text="common", in_thread=UUID(int=7)))[0] == []


async def test_positions_of_earlier_workers_are_read(room: Room) -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    position = SearchPosition(at, 0.5, at, UUID(int=7), at)
    assert str(position).count("/") == 4
    assert SearchPosition.read(str(position)) == position
    further = position._replace(down_to=at)
    assert SearchPosition.read(str(further)) == further
    for text in ("a/b", f"{position}/yesterday", f"{further}/{at.isoformat()}"):
        with refused(ErrorCode.INVALID, "after"):
            await room.ada.call(client.Search(text="common", after=text))
