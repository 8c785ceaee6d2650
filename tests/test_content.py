"""Content of messages: payloads of every type, safe Markdown, mentions and hashtags, polls."""

import asyncio
import contextlib
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import client, server
from protocol.codec import encode
from protocol.errors import ErrorCode, Refused
from protocol.ids import EditId, MessageId, UserId, uuid7
from protocol.limits import MAX_MENTIONS
from protocol.payloads import Audio, Code, File, Image, Location, Payload, Poll, Video
from protocol.server import Reply
from protocol.values import Message
from server.domain import markdown, mentions
from server.queries import mentions as meaning
from tests.world import Room, World, message, received_message, refused, sent, until

WEB = "https://example.org/x"
PAYLOADS: list[Payload] = [
    Image(url=WEB, alt="A loom", width=640, height=480),
    File(url=WEB, name="notes.pdf", mime_type="application/pdf", size_bytes=2**33),
    Audio(url=WEB, duration_ms=1_500),
    Video(url=WEB, poster=WEB, width=1_920, height=1_080, duration_ms=60_000),
    Code(language="c++"),
    Location(latitude=51.5007, longitude=-0.1246, accuracy_meters=5.0, name="Westminster"),
    Poll(options=["Tea", "Coffee"], is_multiple=True, closes_at=datetime(2030, 1, 1, tzinfo=UTC)),
]


async def test_payload_of_each_type_is_delivered_unchanged(room: Room) -> None:
    for payload in PAYLOADS:
        frame = message(room.group, "Words for who does not know the type", payload=payload)
        first = await room.ada.call(frame, server.Sent)
        told = await received_message(room.charles, frame.message_id)
        got = await room.charles.call(client.GetMessage(**room.at(frame.message_id)), server.OneMessage)
        assert got.message == told
        assert (told.payload, told.content_type) == (payload, payload.__struct_config__.tag)
        assert await room.ada.call(frame, server.Sent) == first
        other = client.Send(conversation_id=room.group, message_id=frame.message_id, content=frame.content)
        with refused(ErrorCode.CONFLICT, "message_id"):
            await room.ada.call(other)
        await room.ada.call(client.Delete(**room.at(frame.message_id)))
        assert await room.ada.call(frame, server.Sent) == first
        left = await room.charles.call(client.GetMessage(**room.at(frame.message_id)), server.OneMessage)
        assert (left.message.payload, left.message.poll_counts) == (None, None)


# ---------------------------------------------------------------------------------------------------- Markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java\tscript:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:msgbox(1))",
    "[click](file:///etc/passwd)",
    "![x](https://example.org/pixel.gif)",
    "![x](javascript:alert(1))",
    '<https://example.org/" onmouseover="alert(1)>',
    '[x](https://example.org "onclick=alert(1)")',
    '[x](https://example.org/"><script>alert(1)</script>)',
    "`<script>alert(1)</script>`",
    "```html\n<script>alert(1)</script>\n```",
    '```" onload=alert(1)\nx\n```',
    "<iframe src=https://example.org></iframe>",
    "<style>*{display:none}</style>",
    '<math><mtext></mtext><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    '<a href="javascript:alert(1)">x</a>',
    "<form action=//example.org><input name=q></form>",
    "<base href=//example.org>",
    "\u202ereversed\u202c and \ufeff zero",
    "[a]: javascript:alert(1)\n\n[a]",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<!--[if gte IE 4]><script>alert(1)</script><![endif]-->",
    "# Heading\n\nUnder\n===",
]
ALLOWED = re.compile(
    r"</?(p|em|strong|s|code|pre|blockquote|ul|ol|li)>|<(br|hr)>|<ol start=\"\d+\">|</a>"
    r"|<a( href=\"(https?|mailto):[^\"<>]*\")? rel=\"noopener noreferrer nofollow\">"
)


def assert_safe(html: str) -> None:
    """Assert that a text without the allowed elements contains no further markup."""
    rest = ALLOWED.sub("", html)
    assert "<" not in rest, html
    assert ">" not in rest, html


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_markdown_is_harmless(text: str) -> None:
    assert_safe(markdown.render(text))


SCRAPS = st.sampled_from([
    "<", ">", '"', "'", "`", "```", "*", "**", "_", "[", "](", ")", "![", "<a ", "href=", "javascript:", "https://x.y/",
    "\n", "\n\n", "> ", "- ", "1. ", "&lt;", "&#60;", "</", "script", "onerror=", "\\", "~~", "    ", "\t", "é",
])  # fmt: skip


@given(st.lists(SCRAPS, max_size=60).map("".join))
def test_any_combination_of_markup_is_harmless(text: str) -> None:
    assert_safe(markdown.render(text))


@given(
    st.lists(
        st.sampled_from(["\\", "<", ">", "<a href='https://evil.example'>", "</a>", "<b>", "&amp;", "\n", "x", " "]),
        max_size=12,
    ).map("".join)
)
def test_html_of_the_sender_never_becomes_an_element(text: str) -> None:
    assert re.findall(r"</?(?:a|b)[ >]", markdown.render(text)) == []


def test_text_after_an_escaped_backslash_is_shown() -> None:
    assert "&lt;script&gt;lost text" in markdown.render(r"\\<script>lost text</script> end")


def test_common_markdown_is_rendered() -> None:
    text = "**Bold** and *soft*, ~~gone~~, `code`,\n[a link](https://example.org/?a=1&b=2)\n\n> said\n\n1. one\n2. two"
    assert markdown.render(text) == (
        "<p><strong>Bold</strong> and <em>soft</em>, <s>gone</s>, <code>code</code>,<br>\n"
        '<a href="https://example.org/?a=1&amp;b=2" rel="noopener noreferrer nofollow">a link</a></p>\n'
        "<blockquote>\n<p>said</p>\n</blockquote>\n<ol>\n<li>one</li>\n<li>two</li>\n</ol>"
    )


def test_deeply_nested_markdown_is_rendered_quickly() -> None:
    for text in (">" * 10_000, "[" * 10_000, "*a " * 3_333, "- " * 5_000, "`" * 9_999, "![[]()" * 1_600, "<a" * 5_000):
        try:
            assert_safe(markdown.render(text))
        except Refused as refusal:
            assert refusal.path == "content"
    assert markdown.render(">" * (markdown.MAX_DEPTH - 1) + " a").count("<blockquote>") == markdown.MAX_DEPTH - 1
    with refused(ErrorCode.INVALID, "content"):
        markdown.render(">" * markdown.MAX_DEPTH + " a")


def test_unsupported_markup_is_shown_as_text() -> None:
    """This applies to HTML, entities, images, headings and link definitions, and everything within code."""
    for text, html in {
        "List<String> & a < b &copy;": "List&lt;String&gt; &amp; a &lt; b &amp;copy;",
        r"\<b\> \&amp;": "&lt;b&gt; &amp;amp;",
        "# Heading": "# Heading",
        "a\n===": "a<br>\n===",
        "[a]: https://example.org": "[a]: https://example.org",
        "`![x](y) <b> &amp;`": "<code>![x](y) &lt;b&gt; &amp;amp;</code>",
        "one\r\ntwo\\\nthree": "one<br>\ntwo<br>\nthree",
    }.items():
        assert markdown.render(text) == f"<p>{html}</p>"
    link = '<a href="https://example.org/?a=1&amp;b=2" rel="noopener noreferrer nofollow">x</a>'
    assert markdown.render("![x](https://example.org/?a=1&b=2)") == f"<p>!{link}</p>"
    assert markdown.render("```\n# a < b\n=\n```") == "<pre><code># a &lt; b\n=\n</code></pre>"
    assert markdown.render("\ue0f0b> \ue0f1lt; \ue0f2") == "<p>\ufffdb&gt; \ufffdlt; \ufffd</p>"


COSTLY = [
    "[", "*a_", "- - a\n", "- a\n", "*_", "a*b*", "***a", "_a*", "[[a]](", "a**b_c~~", "[](", "![[]()", "`", "``a`",
    "<a", "> ", "<https://a.b/", "a\n", "\\", "&", "1. ", "~~a ", "[a](b) ", "> > > a\n", "=\n", "# a\n",
    "[a]: b\n", ">", "\n", "<<", "a\n\n* * *\n", "\\&", "> - a\n![a\n",
]  # fmt: skip


def test_no_markdown_is_much_slower_to_render_than_ordinary_text() -> None:
    """The baseline is ordinary text. A renderer in pure Python took more than 50 times as long."""
    ordinary = "Some *ordinary* words, and a [link](https://example.org) here and there.\n" * 140

    def cost(text: str) -> float:
        took = []
        for _ in range(5):
            began = time.process_time_ns()
            with contextlib.suppress(Refused):
                markdown.render(text[:10_000])
            took.append(time.process_time_ns() - began)
        return min(took)

    base = cost(ordinary)
    ratios = {text: cost(text * (10_000 // len(text) + 1)) / base for text in COSTLY}
    assert max(ratios.values()) < 10, ratios


async def test_long_messages_of_one_user_delay_others_by_at_most_one_message(
    room: Room, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = markdown.render
    order: list[str] = []
    released = threading.Event()

    def held(content: str) -> str:
        order.append(content[0])
        assert released.wait(10)
        return render(content)

    monkeypatch.setattr(markdown, "render", held)
    devices = [await world.connect(room.users[0]) for _ in range(5)]
    try:
        asked = [
            asyncio.create_task(one.ask(message(room.group, "a *word* " * 500, is_markdown=True))) for one in devices
        ]
        await until(lambda: bool(order))
        theirs = asyncio.create_task(room.charles.ask(message(room.group, "b *word* " * 500, is_markdown=True)))
        await until(lambda: markdown._thread._work_queue.qsize() == 1)  # noqa: SLF001
    finally:
        released.set()
    assert all(isinstance(one, Reply) for one in await asyncio.gather(theirs, *asked))
    assert "".join(order) == "abaaaa"


async def test_long_markdown_is_rendered_in_a_thread_and_in_order(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    render = markdown.render
    begun, released = threading.Event(), threading.Event()

    def held(content: str) -> str:
        assert threading.current_thread() is not threading.main_thread(), "the event loop is blocked"
        begun.set()
        assert released.wait(10)
        return render(content)

    monkeypatch.setattr(markdown, "render", held)
    try:
        dear = message(room.group, "*word* and " * 500, is_markdown=True)
        first = asyncio.create_task(room.ada.ask(dear))
        after = message(room.group, "After it")
        second = asyncio.create_task(room.ada.ask(after))
        await until(lambda: begun.is_set() or first.done())
        assert not first.done(), first.result()
        meanwhile = await sent(room.charles, room.group, "Meanwhile")
        assert not second.done(), "order within a connection"
        released.set()
        assert isinstance(await first, Reply)
        assert isinstance(await second, Reply)
    finally:
        released.set()
    versions = [
        (await received_message(room.charles, message_id)).version
        for message_id in (meanwhile, dear.message_id, after.message_id)
    ]
    assert versions == sorted(versions)
    monkeypatch.setattr(markdown, "render", render)
    with refused(ErrorCode.INVALID, "content"):
        await sent(room.ada, room.group, "- - a\n" * 1_500, is_markdown=True)


async def test_unchanged_edit_is_not_rendered(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await sent(room.ada, room.group, "*Hello* #loom", is_markdown=True)
    rendered: list[str] = []
    render = markdown.render

    def noted(content: str) -> str:
        rendered.append(content)
        return render(content)

    monkeypatch.setattr(markdown, "render", noted)
    await room.ada.call(client.Edit(**room.at(one), content="*Hello* #loom", is_markdown=True))
    assert rendered == []
    await room.ada.call(client.Edit(**room.at(one), content="*Hello* #loom!", is_markdown=True))
    assert rendered == ["*Hello* #loom!"]


async def test_too_long_html_is_refused(room: Room) -> None:
    with refused(ErrorCode.INVALID, "content"):
        await sent(room.ada, room.group, "&" * 9_000, is_markdown=True)
    await sent(room.ada, room.group, "&" * 9_000)


# ---------------------------------------------------------------------------------------- mentions and hashtags


async def said(room: Room, content: str, **fields: Any) -> Message:
    message_id = await sent(room.ada, room.group, content, **fields)
    return (await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)).message


async def test_users_are_mentioned_by_id_and_by_name(room: Room, world: World) -> None:
    charles = room.users[1].id
    for content in (
        f"<@{charles}> look",
        "@charles: look",
        "(@Charles)",
        "@CHARLES.",
        "Hi @charles, @charles and @charles",
    ):
        assert (await said(room, content)).mentions == [charles], content
    for content in (
        "ada@charles.org",
        "https://x.y/@charles",
        "@nobody",
        "@charlesx",
        f"<@{uuid7()}>",
        "@",
        "`@charles`",
    ):
        assert (await said(room, content, is_markdown=True)).mentions == [], content
    assert (await said(room, "@charles", payload=Code(language="c"))).mentions == []
    spaced = await world.user("Mary Somerville")
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[spaced.id]))
    for content in ("@Mary.Somerville", "@mary_somerville", "@marysomerville"):
        assert (await said(room, content)).mentions == [spaced.id]
    assert (await said(room, "@mary")).mentions == []


async def test_mention_of_an_unavailable_or_ambiguous_user_is_plain_text(room: Room, world: World) -> None:
    outside, gone, blocked, blocking, twin, other = await world.users(
        "Out", "Gone", "Blocked", "Blocking", "Twin", "Twin"
    )
    inside = [gone, blocked, blocking, twin, other]
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[one.id for one in inside]))
    assert set((await said(room, "@gone @blocked @blocking")).mentions) == {gone.id, blocked.id, blocking.id}
    await world.db.execute('UPDATE "user" SET is_active = false WHERE id = $1', gone.id)
    await room.ada.call(client.Block(user_id=blocked.id))
    await (await world.connect(blocking)).call(client.Block(user_id=room.users[0].id))
    text = "@out @gone @blocked @blocking @twin " + " ".join(
        f"<@{one.id}>" for one in (outside, gone, blocked, blocking)
    )
    assert (await said(room, text)).mentions == [blocking.id], "a block stays hidden"
    assert (await said(room, f"<@{twin.id}>")).mentions == [twin.id], "an id is unambiguous"
    await room.ada.call(client.RemoveParticipant(conversation_id=room.group, user_id=twin.id))
    assert (await said(room, f"<@{twin.id}>")).mentions == []


async def test_mentions_of_everyone_and_roles_need_a_permission(room: Room, world: World) -> None:
    loud = "@everyone, @here and @moderator"
    assert (await said(room, loud)).loud_mentions == ["everyone", "here", "moderator"]
    quiet = await sent(room.charles, room.group, loud)
    got = await room.charles.call(client.GetMessage(**room.at(quiet)), server.OneMessage)
    assert got.message.loud_mentions == [], "plain text from a member"
    await room.ada.call(client.SetRole(conversation_id=room.group, user_id=room.users[1].id, role="moderator"))
    allowed = await sent(room.charles, room.group, loud)
    got = await room.charles.call(client.GetMessage(**room.at(allowed)), server.OneMessage)
    assert got.message.loud_mentions == ["everyone", "here", "moderator"]
    direct = (await room.ada.call(client.CreateDirect(user_id=room.users[1].id), server.OneConversation)).view
    there = await sent(room.ada, direct.conversation.id, "@everyone @charles")
    got = await room.ada.call(
        client.GetMessage(conversation_id=direct.conversation.id, message_id=there), server.OneMessage
    )
    assert (got.message.loud_mentions, got.message.mentions) == ([], [room.users[1].id])
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE 'here' = ANY(loud_mentions)") == 2


async def test_hashtags_are_found_in_messages_and_edits(room: Room) -> None:
    first = await said(room, "#Loom and #loom, #42 but #42nd, a#b, https://x.y/#z, #überholt @charles")
    assert (first.hashtags, first.mentions) == (["loom", "42nd", "überholt"], [room.users[1].id])
    await room.ada.call(client.Edit(**room.at(first.id), content="Only #cards"))
    event = await room.charles.event(server.MessageEdited)
    assert (event.message.hashtags, event.message.mentions) == (["cards"], [])


@given(st.text(max_size=300))
def test_mentions_and_hashtags_are_found_in_any_text(text: str) -> None:
    found = mentions.find(text, is_code=False, is_markdown=True)
    assert len(found.hashtags) <= 50
    assert all(name == name.lower() for name in (*found.names, *found.hashtags))


# ----------------------------------------------------------------------------------------------------- polls


async def poll(room: Room, **fields: Any) -> MessageId:
    return await sent(room.ada, room.group, "Tea?", payload=Poll(options=["Yes", "No", "Later"], **fields))


async def test_vote_can_be_changed_and_withdrawn_and_is_published(room: Room, world: World) -> None:
    message_id = await poll(room)
    place = room.at(message_id)
    first = await room.charles.call(client.Vote(**place, options=[1]), server.Changed)
    assert await room.charles.call(client.Vote(**place, options=[1]), server.Changed) == first, (
        "repeating a vote changes nothing"
    )
    await room.ada.call(client.Vote(**place, options=[0]))
    await room.charles.call(client.Vote(**place, options=[2]))
    await room.ada.event(server.PollVoted, lambda event: event.version == first.version + 2)
    events = [event for event in room.ada.events if isinstance(event, server.PollVoted)]
    assert [(one.poll_counts, one.poll_voters) for one in events] == [([0, 1, 0], 1), ([1, 1, 0], 2), ([1, 0, 1], 2)]
    assert (events[2].user_id, events[2].options) == (room.users[1].id, [2])
    got = await room.charles.call(client.GetMessage(**place), server.OneMessage)
    assert (got.message.poll_counts, got.message.poll_voters, got.vote) == ([1, 0, 1], 2, [2])
    page = await room.charles.call(client.History(conversation_id=room.group), server.MessagePage)
    assert page.votes == {message_id: [2]}
    votes = await room.ada.call(client.ListVotes(**place), server.VotePage)
    assert {one.user_id: one.options for one in votes.votes} == {room.users[0].id: [0], room.users[1].id: [2]}
    await room.charles.call(client.Vote(**place, options=[]))
    got = await room.charles.call(client.GetMessage(**place), server.OneMessage)
    assert (got.message.poll_counts, got.message.poll_voters, got.vote) == ([1, 0, 0], 1, [])
    assert await world.db.fetchval("SELECT count(*) FROM poll_vote WHERE options <> '{}'") == 1


async def test_invalid_vote_is_refused(room: Room) -> None:
    single, many = room.at(await poll(room)), room.at(await poll(room, is_multiple=True))
    for place, options in ((single, [0, 1]), (single, [3]), (many, [0, 3])):
        with refused(ErrorCode.INVALID, "options"):
            await room.charles.call(client.Vote(**place, options=options))
    await room.charles.call(client.Vote(**many, options=[2, 0]))
    plain = room.at(await sent(room.ada, room.group))
    for frame in (client.Vote(**plain, options=[0]), client.ClosePoll(**plain), client.ListVotes(**plain)):
        with refused(ErrorCode.CONFLICT, "message_id"):
            await room.charles.call(frame)


async def test_poll_that_closes_before_it_is_sent_is_refused(room: Room) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)

    def asked(closes_at: datetime, **fields: Any) -> dict[str, Any]:
        payload = Poll(options=["Yes", "No"], closes_at=closes_at)
        said = {"conversation_id": room.group, "message_id": MessageId(uuid7()), "content": "Tea?", "payload": payload}
        return said | fields

    for closes_at in (datetime(2020, 1, 1, tzinfo=UTC), datetime.now(UTC) - timedelta(seconds=1)):
        with refused(ErrorCode.INVALID, "payload.closes_at"):
            await room.ada.call(client.Send(**asked(closes_at)))
        with refused(ErrorCode.INVALID, "payload.closes_at"):
            await room.ada.call(client.Schedule(**asked(closes_at, send_at=datetime(2020, 1, 1, tzinfo=UTC))))
    with refused(ErrorCode.INVALID, "payload.closes_at"):
        await room.ada.call(client.Schedule(**asked(soon, send_at=soon)))
    await room.ada.call(client.Schedule(**asked(soon + timedelta(seconds=1), send_at=soon)))
    # A repeated frame gets the first reply, however late it comes.
    an_hour_ago = MessageId(UUID(int=uuid7().int - (3_600_000 << 80)))
    late = client.Send(**asked(datetime.now(UTC) - timedelta(seconds=1), message_id=an_hour_ago))
    assert await room.ada.call(late, server.Sent) == await room.ada.call(late, server.Sent)


async def test_poll_with_votes_or_closed_cannot_be_edited(room: Room, world: World) -> None:
    over, closed, voted, withdrawn = [room.at(await poll(room)) for _ in range(4)]

    def edit(place: dict[str, Any], **fields: Any) -> client.Edit:
        return client.Edit(**place, content="Coffee?", **fields)

    before = edit(voted, edit_id=EditId(uuid7()))
    first = await room.ada.call(before, server.Changed)
    for place in (voted, withdrawn):
        await room.charles.call(client.Vote(**place, options=[0]))
    await room.charles.call(client.Vote(**withdrawn, options=[]))
    await room.ada.call(client.ClosePoll(**closed))
    await world.db.execute(
        """UPDATE message SET payload = payload || '{"closes_at": "2026-01-01T00:00:00Z"}' WHERE id = $1""",
        over["message_id"],
    )
    for place in (over, closed, voted):
        with refused(ErrorCode.FORBIDDEN, "message_id"):
            await room.ada.call(client.Edit(**place, content="Poison?"))
    await room.ada.call(edit(withdrawn))
    # A repeated edit from before the vote gets its first reply.
    assert await room.ada.call(before, server.Changed) == first


STORED = '{"options": ["Tea", "Tea ", "Te a"]}'


async def test_options_that_differ_only_in_whitespace_are_duplicates(room: Room, world: World) -> None:
    for options in (["Tea", "Tea "], ["\u00a0Tea", "Tea"], ["Tea\u3164", "Tea"], ["Green  tea", "Green tea"]):
        payload = {"type": "poll", "options": options}
        frame = {"type": "send", "id": 1, "conversation_id": str(room.group), "message_id": str(uuid7())}
        refusal = await room.ada.raw(encode(frame | {"content": "?", "payload": payload}).decode())
        assert (refusal.code, refusal.path) == (ErrorCode.INVALID, "payload.options"), options
    message_id = await sent(room.ada, room.group, "?", payload=Poll(options=["Green  tea", "Tea", "Te a"]))
    # A poll stored before this rule existed keeps its options.
    await world.db.execute("UPDATE message SET payload = payload || $2 WHERE id = $1", message_id, STORED)
    await room.charles.call(client.Vote(**room.at(message_id), options=[1]))
    found = await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)
    assert found.message.payload == Poll(options=["Tea", "Tea ", "Te a"])
    assert found.message.poll_counts == [0, 1, 0]


async def test_closed_poll_refuses_votes(room: Room, world: World) -> None:
    over = room.at(await poll(room, closes_at=datetime.now(UTC) + timedelta(hours=1)))
    await world.db.execute(
        """UPDATE message SET payload = jsonb_set(payload, '{closes_at}', '"2026-01-01T00:00:00Z"') WHERE id = $1""",
        over["message_id"],
    )
    closed = room.at(await poll(room))
    await room.charles.call(client.Vote(**closed, options=[0]))
    with refused(ErrorCode.FORBIDDEN, None):
        await room.charles.call(client.ClosePoll(**closed))
    await room.ada.call(client.ClosePoll(**closed))
    assert (await room.charles.event(server.MessageEdited)).message.poll_closed_at is not None
    for place in (over, closed):
        with refused(ErrorCode.FORBIDDEN, "message_id"):
            await room.charles.call(client.Vote(**place, options=[1]))
    await room.charles.call(client.Vote(**closed, options=[0]))  # unchanged


async def test_anonymous_poll_shows_only_counts(room: Room, world: World) -> None:
    place = room.at(await poll(room, is_anonymous=True))
    await room.charles.call(client.Vote(**place, options=[1]))
    event = await room.ada.event(server.PollVoted)
    assert (event.poll_counts, event.user_id, event.options) == ([0, 1, 0], None, None)
    with refused(ErrorCode.FORBIDDEN, "message_id"):
        await room.ada.call(client.ListVotes(**place))
    # A client that resumes does not learn it either.
    frame = client.Resume(epoch=room.ada.ready.epoch, versions={room.group: event.version - 1})
    phone = await world.connect(room.users[0], query="?resume=1")
    await phone.call(frame)
    (told,) = (await phone.event(server.Changes)).events
    assert isinstance(told, server.PollVoted)
    assert (told.poll_counts, told.user_id) == ([0, 1, 0], None)


async def test_concurrent_votes_are_all_counted(room: Room, world: World) -> None:
    message_id = await poll(room, is_multiple=True)
    crowd = await world.users(*(f"Voter {number}" for number in range(8)))
    await room.ada.call(client.AddParticipants(conversation_id=room.group, participants=[one.id for one in crowd]))
    clients = [await world.connect(one, number % 2) for number, one in enumerate(crowd)]
    choices: list[list[int]] = [[0], [1], [0, 1], [], [2], [0, 2]]
    frames = [
        one.call(client.Vote(**room.at(message_id), options=choices[(number + turn) % len(choices)]), server.Changed)
        for turn in range(6)
        for number, one in enumerate(clients)
    ]
    await asyncio.gather(*frames)
    rows = [row[0] for row in await world.db.fetch("SELECT options FROM poll_vote WHERE options <> '{}'")]
    got = (await room.ada.call(client.GetMessage(**room.at(message_id)), server.OneMessage)).message
    assert got.poll_counts == [sum(option in one for one in rows) for option in range(3)]
    assert got.poll_voters == len(rows)


def test_a_user_id_is_a_uuid() -> None:
    one = UserId(uuid7())
    assert mentions.find(f"<@{str(one).upper()}>", is_code=False, is_markdown=False).ids == [one]


PEOPLE = """
WITH made AS (
    INSERT INTO "user" (name, display_name, email)
    SELECT repeat('a b ', 55) || n, repeat('c d ', 55) || n, n || '@example.org' FROM generate_series(1, 300) n
    RETURNING id
), counted AS (UPDATE conversation SET participant_count = participant_count + 300 WHERE id = $1)
INSERT INTO conversation_participant (conversation_id, user_id, role, status)
SELECT $1, id, 'member', 'active' FROM made
"""


async def test_mentions_among_many_long_names_are_found_quickly(room: Room, world: World) -> None:
    await world.db.execute(PEOPLE, room.group)
    names = ["a_b_" * 55 + f"{number}" for number in range(1, MAX_MENTIONS + 1)]

    async def took(some: list[str]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            meant = await meaning.resolve(world.db, room.group, room.users[0].id, [], some)
            times.append(time.perf_counter() - began)
            assert len(meant.user_ids) == len(some)
        return min(times)

    one = await took(names[:1])
    assert await took(names) < 6 * one
