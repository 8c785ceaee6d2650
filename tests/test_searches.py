"""Search finds all matches that the user may see, and nothing else, in stable pages."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.payloads import File, Poll
from protocol.values import ConversationSettings
from prove.client import Client
from server.core.config import Settings
from server.domain import search_text
from server.fairness.share import Share
from server.gateway.dispatch import Rate
from server.limits.shared_rate_limit import SharedRateLimit
from tests.world import Room, World, refused, sent, until


async def found(one: Client, text: str | None = None, **fields: Any) -> list[str]:
    page = await one.call(client.Search(text=text, **fields), server.SearchPage)
    return [hit.message.content for hit in page.hits]


async def test_search_finds_words_and_prefixes(room: Room, world: World) -> None:
    for content in ("The Analytical Engine", "An engine of difference", "Looms"):
        await sent(room.ada, room.group, content)
    await world.indexed()
    assert await found(room.charles, "engine") == ["An engine of difference", "The Analytical Engine"]
    assert await found(room.charles, "ENG anal") == ["The Analytical Engine"]
    assert await found(room.charles, "gine") == []
    assert await found(room.charles, "engine & ! | <-> ':*") == ["An engine of difference", "The Analytical Engine"]
    with refused(ErrorCode.INVALID, "text"):
        await found(room.charles, "&!|")
    with refused(ErrorCode.INVALID, "text"):
        await found(room.charles, sender_id=room.users[0].id)


async def test_search_finds_only_visible_messages(room: Room, world: World) -> None:
    message_id = await sent(room.ada, room.group, "Secret engine")
    stranger = await world.connect(await world.user("Stranger"))
    await world.indexed()
    assert await found(stranger, "engine") == []
    assert await found(stranger, "engine", conversation_id=room.group) == []
    await world.moderate_as_owner(client.Moderate(**room.at(message_id), reason="Rude"))
    assert await found(room.charles, "engine") == []
    await world.moderate_as_owner(client.Unmoderate(**room.at(message_id)))
    assert await found(room.charles, "engine") == ["Secret engine"]
    await room.ada.call(client.Edit(**room.at(message_id), content="Public loom"))
    assert (await found(room.charles, "engine"), await found(room.charles, "loom")) == ([], ["Public loom"])
    await room.charles.call(client.Leave(conversation_id=room.group))
    assert await found(room.charles, "loom") == []
    await room.ada.call(client.Delete(**room.at(message_id)))
    assert await found(room.ada, "loom") == []
    about = await world.channel(room.ada, is_public=True, settings=ConversationSettings(history="from_joining"))
    await sent(room.ada, about, "Before he came: engine")
    await room.charles.call(client.Join(conversation_id=about))
    await sent(room.ada, about, "After he came: engine")
    await world.indexed()
    assert await found(room.charles, "engine") == ["After he came: engine"]


async def test_each_filter_restricts_the_results(room: Room, world: World) -> None:
    other = await world.channel(room.ada)
    root = await sent(room.ada, room.group, "engine root #loom")
    await sent(room.charles, room.group, "engine reply", parent_message_id=root)
    await sent(room.ada, room.group, "engine file", payload=File(url="https://x.y", name="drawing of a wheel.pdf"))
    await sent(room.charles, room.group, "engine @ada")
    await sent(room.charles, room.group, "engine poll", payload=Poll(options=["Brass", "Steel"]))
    await sent(room.ada, other, "engine elsewhere")
    await room.ada.call(client.Pin(**room.at(root)))
    charles = room.users[1].id
    here: dict[str, Any] = {"conversation_id": room.group}
    await world.indexed()
    assert await found(room.ada, "engine", conversation_id=other) == ["engine elsewhere"]
    assert await found(room.ada, "engine", sender_id=charles, **here) == ["engine poll", "engine @ada", "engine reply"]
    assert await found(room.ada, "engine", content_type="poll") == ["engine poll"]
    assert await found(room.ada, "engine", has_file=True) == ["engine file"]
    assert await found(room.ada, "engine", in_thread=root) == ["engine reply", "engine root #loom"]
    assert await found(room.ada, "engine", mentions_me=True) == ["engine @ada"]
    assert await found(room.charles, "engine", mentions_me=True) == []
    assert await found(room.ada, "engine", is_pinned=True) == ["engine root #loom"]
    assert await found(room.ada, hashtag="Loom") == ["engine root #loom"]
    assert await found(room.ada, mentions_me=True) == ["engine @ada"]
    assert await found(room.ada, is_pinned=True, **here) == ["engine root #loom"]
    assert await found(room.ada, "wheel") == ["engine file"], "the name of a file"
    assert await found(room.ada, "steel") == ["engine poll"], "the options of a poll"
    at = (await room.ada.call(client.GetMessage(**room.at(root)), server.OneMessage)).message.created_at
    assert await found(room.ada, "engine", sent_before=at) == []
    assert "engine root #loom" not in await found(room.ada, "engine", sent_after=at)
    assert await found(room.ada, "engine", sent_after=datetime.now(UTC) + timedelta(days=1)) == []


@pytest.mark.parametrize("order", ["newest", "relevance"])
async def test_pages_do_not_shift_when_messages_are_added(room: Room, world: World, order: str) -> None:
    for number in range(7):
        await sent(room.ada, room.group, "engine " * (1 + number % 3) + str(number))
    await world.indexed()
    everything = await found(room.charles, "engine", order=order)
    assert len(everything) == 7
    if order == "relevance":
        assert everything[0].count("engine") == 3
    seen: list[str] = []
    after = None
    while len(seen) < 7:
        page = await room.charles.call(
            client.Search(text="engine", order=order, limit=2, after=after),  # type: ignore[arg-type]
            server.SearchPage,
        )
        seen += [hit.message.content for hit in page.hits]
        after = page.after
        await sent(room.ada, room.group, "engine engine engine and more")
    assert (seen, after) == (everything, None)


async def test_matches_are_highlighted(room: Room, world: World) -> None:
    await sent(room.ada, room.group, "Before \x02 it, the engine; after it, engines")
    await world.indexed()
    page = await room.charles.call(client.Search(text="engine"), server.SearchPage)
    (hit,) = page.hits
    assert hit.snippet[1::2] == ["engine", "engines"]
    assert "".join(hit.snippet) == "Before  it, the engine; after it, engines"
    page = await room.charles.call(client.Search(conversation_id=room.group), server.SearchPage)
    assert page.hits[0].snippet == ["Before  it, the engine; after it, engines"]


class TestInEnglish:
    """The language is a setting."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return msgspec.structs.replace(settings, search_language="english")

    async def test_words_with_the_same_stem_match(self, room: Room, world: World) -> None:
        await sent(room.ada, room.group, "They were weaving")
        await world.indexed()
        assert await found(room.charles, "weaves") == ["They were weaving"]
        assert await found(room.charles, "the weaver") == []
        assert await found(room.charles, "the") == [], "a stop word matches nothing"


# ------------------------------------------------------------------------- searches do not block other queries


async def asker(world: World, name: str) -> Client:
    """Connect a new user who takes part in a conversation, without which a search reads nothing."""
    one = await world.connect(await world.user(name))
    await world.channel(one)
    return one


class TestSearchesThatTakeLong:
    """The test locks the table of words, so that no search ends before the lock is released."""

    @pytest.fixture
    async def holding(self, world: World, settings: Settings) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        await world.users("Nobody")
        holding = await asyncpg.connect(settings.database_url)
        await holding.execute("BEGIN; LOCK TABLE message_search IN ACCESS EXCLUSIVE MODE")
        yield holding
        await holding.close()

    async def test_others_read_while_many_search(self, world: World, holding: Any) -> None:
        askers = [await asker(world, f"User {number}") for number in range(12)]
        searching = [asyncio.create_task(one.ask(client.Search(text="engine"))) for one in askers[:8]]
        for _ in range(20):
            await askers[8].call(client.GetMe())
        assert not any(one.done() for one in searching[:1])
        await holding.execute("ROLLBACK")
        answers = await asyncio.gather(*searching)
        refusals = {one.code for one in answers if isinstance(one, server.Error)}
        assert refusals <= {ErrorCode.UNAVAILABLE}, "a search that waited too long is refused"
        assert any(isinstance(one, server.Reply) for one in answers)

    async def test_badge_is_available_while_others_search(self, world: World, holding: Any) -> None:
        askers = [await asker(world, f"User {number}") for number in range(12)]
        searching = [asyncio.create_task(one.ask(client.Search(text="engine"))) for one in askers[:11]]
        await until(lambda: any(one.done() for one in searching))  # the queue of searches is full
        counting = asyncio.create_task(askers[11].ask(client.GetBadge()))
        await holding.execute("ROLLBACK")
        assert isinstance(await counting, server.Reply)
        await asyncio.gather(*searching)

    async def test_user_can_run_one_search_at_a_time(self, world: World, holding: Any) -> None:
        who, other = await world.users("Ada", "Charles")
        one, two = await world.connect(who), await world.connect(who)
        await world.channel(one)
        searching = asyncio.create_task(one.ask(client.Search(text="engine")))
        await until(lambda: bool(world.workers[0].app.searching))
        for frame in (client.Search(text="engine"), client.SearchUsers(text="ada"), client.FindConversations(text="a")):
            answer = await two.ask(frame)
            assert isinstance(answer, server.Error)
            assert (answer.code, answer.retry_after_ms) == (ErrorCode.RATE_LIMITED, 500)
        await two.call(client.GetMe())
        await holding.execute("ROLLBACK")
        assert isinstance(await searching, server.Reply)
        await two.call(client.Search(text="engine"))
        await (await world.connect(other)).call(client.Search(text="engine"))

    async def test_search_that_takes_too_long_is_refused(self, world: World, holding: Any) -> None:
        one = await asker(world, "Ada")
        answer = await one.ask(client.Search(text="engine"))
        assert isinstance(answer, server.Error)
        assert (answer.code, answer.retry_after_ms) == (ErrorCode.UNAVAILABLE, 4_000)
        assert "longer or rarer words" in answer.message
        await holding.execute("ROLLBACK")
        other = await asker(world, "Charles")
        await other.call(client.Search(text="engine"))

    async def test_full_queue_refuses_with_a_retry_time(self) -> None:
        share = Share(1, waiting=1, patience=60.0)
        async with share.hold(nullcontext()):
            waiting = asyncio.create_task(share.hold(nullcontext()).__aenter__())
            await asyncio.sleep(0)
            with refused(ErrorCode.UNAVAILABLE, None):
                await share.hold(nullcontext()).__aenter__()
        await waiting


async def test_searches_have_their_own_rate(settings: Settings) -> None:
    async with World(msgspec.structs.replace(settings, search_rate=0.5), workers=1) as world:
        one = await world.connect(await world.user("Ada"))
        for frame in (client.Search(text="engine"), client.SearchUsers(text="charles")):
            await one.call(frame)
        with refused(ErrorCode.RATE_LIMITED, None):
            await one.call(client.FindConversations(text="engine"))
        await one.call(client.GetMe())


async def test_user_with_slow_searches_waits_between_them(settings: Settings) -> None:
    """Only the time at the database counts, not the wait for a turn or a connection."""
    async with World(msgspec.structs.replace(settings, search_rate=2.0), workers=1) as world:
        app = world.workers[0].app
        ada, charles, dora = await world.users("Ada", "Charles", "Dora")
        one, other, third = [await world.connect(who) for who in (ada, charles, dora)]
        app._rate_limits[Rate.SEARCH] = SharedRateLimit("search", 2.0, None, clock=lambda: 1)  # noqa: SLF001
        for asker, seconds, answered in ((one, 0.0, 8), (other, 1.0, 1)):
            app._database._state.searches._clock = count(0.0, seconds).__next__  # noqa: SLF001
            answers = [await asker.ask(client.Search(text="engine")) for _ in range(9)]
            late = [answer for answer in answers if isinstance(answer, server.Error)]
            assert len(answers) - len(late) == answered
            assert {answer.code for answer in late} == {ErrorCode.RATE_LIMITED}
            assert all(answer.retry_after_ms for answer in late)
        now = 0.0
        app._database._state.searches._clock = lambda: now  # noqa: SLF001
        pool = app._database._state.pool  # noqa: SLF001
        held = [await pool.take() for _ in range(pool._most)]  # noqa: SLF001
        waiting = asyncio.create_task(third.call(client.Search(text="engine"), server.SearchPage))
        await until(lambda: dora.id in pool._waiting._lines)  # noqa: SLF001
        now = 10.0
        for connection in held:
            pool.give(connection, is_usable=True)
        await waiting
        for _ in range(7):
            await third.call(client.Search(text="engine"))


async def test_word_of_two_letters_is_not_a_prefix(room: Room, world: World) -> None:
    await sent(room.ada, room.group, "An engine")
    await world.indexed()
    assert await found(room.charles, "an engi") == ["An engine"]
    assert await found(room.charles, "en") == []
    await sent(room.ada, room.group, "日本語")
    await world.indexed()
    assert await found(room.charles, "日") == ["日本語"]


async def test_snippet_of_a_long_message_contains_the_match(room: Room, world: World) -> None:
    await sent(room.ada, room.group, "loom " * 1_500 + "the Engine " + "loom " * 400)
    await world.indexed()
    page = await room.charles.call(client.Search(text="engi"), server.SearchPage)
    assert "Engine" in page.hits[0].snippet[1::2]


async def test_words_are_found_between_any_punctuation(room: Room, world: World) -> None:
    said = "See report-v2.pdf, ada@example.org, src/engines/loom_card.py; <b>3.14</b>"
    await sent(room.ada, room.group, said)
    for text in ("pdf", "report v2", "report-v2.pdf", "example.org", "ada@example.org", "loom_card.py", "3.14"):
        await world.indexed()
        assert await found(room.charles, text) == [said], text


async def test_queries_and_messages_are_split_into_the_same_words(room: Room, world: World) -> None:
    """Accents, vowel signs and joiners are part of words; a superscript is not."""
    for said in ("e\u0301tude", "हिन्दी भाषा", "می\u200cخو", "กินข้าว", "x²y", "loom_card_a"):
        await sent(room.ada, room.group, said)
        await world.indexed()
        assert await found(room.charles, said) == [said], said


async def test_word_with_underscores_is_split(room: Room, world: World) -> None:
    """Otherwise 255 characters could hold more than `MAX_WORDS` words, and prefixes of one letter."""
    await sent(room.ada, room.group, "apple banana")
    await world.indexed()
    assert await found(room.charles, "a_b") == []
    assert search_text.query("a_b_" * 60, prefix=3) == " & ".join("ab" * 5)


async def test_snippet_keeps_punctuation_and_highlights_words(room: Room, world: World) -> None:
    said = "<b>See</b> report-v2.pdf \x01& ada@example.org/loom_card &amp; <!-- the rest --> \\1 \\\\& it's"
    await sent(room.ada, room.group, said)
    await world.indexed()
    page = await room.charles.call(client.Search(text="see pdf card it"), server.SearchPage)
    assert "".join(page.hits[0].snippet) == said.replace("\x01", "").removeprefix("<b>").removesuffix("'s")
    assert page.hits[0].snippet[1::2] == ["See", "pdf", "card", "it"]
