"""Doubts about who may watch whom: their causes, the order of database queries, and failures."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from protocol import client, server
from protocol.client import Frame
from protocol.ids import ConversationId, UserId, uuid7
from prove.client import Client
from server.core.config import Settings
from server.db.database import Db
from server.hub import doubts
from server.hub import watchers as watchers_module
from server.hub.doubts import CHECK_PAUSE_FACTOR, PAIRS, PAIRS_PER_CAUSE, Doubts, HeldFrame, Pair, Whole
from server.hub.online_users import Sight
from server.hub.watchers import WatchAnswer, Watchers
from server.queries import presence
from server.queries.presence import Sightings
from tests.twins import CHEAP, WORDS
from tests.world import World, http_client, sent, until

Queries = list[list[tuple[UserId, UserId]]]


def some_pairs(count: int) -> list[Pair]:
    """Return pairs with the same watcher."""
    watcher = UserId(uuid7())
    return [Pair(watcher, UserId(uuid7())) for _ in range(count)]


# ----------------------------------------------------------------------------------------------------- order of queries


def test_each_cause_has_a_share_of_each_statement() -> None:
    there = Doubts(lambda _: ())
    for number in range(3):
        for pair in some_pairs(10 * PAIRS):
            there.add(pair, cause=f"attacker {number}")
    (mine,) = some_pairs(1)
    there.add(mine, cause="me")
    batch = there.take(0.0)
    assert mine in batch.pairs
    assert {len(pairs) for pairs in batch.turns.values()} == {PAIRS_PER_CAUSE, 1}


def test_all_pairs_of_a_user_are_looked_up_in_their_turn() -> None:
    lookups: list[Whole] = []
    mine = some_pairs(PAIRS_PER_CAUSE)

    def look(whole: Whole) -> list[Pair]:
        lookups.append(whole)
        return mine

    there = Doubts(look)
    whole = Whole(mine[0].watcher, is_watcher=True)
    for _ in range(1_000):
        there.add_all(whole, cause=whole)
    assert lookups == []
    assert (found := there.of(mine[0].watched)) is not None
    assert found.has(mine[0].watcher), "held back immediately"
    there.hold(mine[0], HeldFrame(7, b"newest"), is_face=False)
    there.hold(mine[0], HeldFrame(6, b"older"), is_face=False)
    batch = there.take(0.0)
    assert (lookups, set(batch.pairs)) == ([whole], set(mine))
    assert there.held(mine[0]) == {False: HeldFrame(7, b"newest")}
    for pair in batch.pairs:
        assert there.is_current(pair, batch.since)
        there.settle(pair)
    there.answered(batch, 0.0, seconds=0.0)
    assert not there
    assert there.of(mine[0].watched) is None


def test_only_pairs_in_doubt_are_held_back() -> None:
    pair, whole_watcher, whole_watched, other = (some_pairs(1)[0] for _ in range(4))
    there = Doubts(lambda _: ())
    assert there.of(pair.watched) is None, "nothing is in doubt"
    there.add(pair, cause="pair")
    there.add_all(Whole(whole_watcher.watcher, is_watcher=True), cause="watcher")
    there.add_all(Whole(whole_watched.watched, is_watcher=False), cause="watched")
    watchers = [one.watcher for one in (pair, whole_watcher, whole_watched, other)]
    for one in (pair, whole_watcher, whole_watched, other):
        found = there.of(one.watched)
        assert found is not None
        expected = {one.watcher} - {other.watcher} | {whole_watcher.watcher}
        assert {watcher for watcher in watchers if found.has(watcher)} == (
            set(watchers) if one is whole_watched else expected
        )


def test_pair_stays_in_doubt_until_the_last_query_has_ended() -> None:
    (pair,) = some_pairs(1)
    there = Doubts(lambda _: ())
    there.begin([pair])
    before = there.since()
    there.add(pair, cause="a block")
    there.begin([pair])
    after = there.since()
    there.end([pair])
    assert there.is_asked_about(pair)
    there.settle(pair)
    assert (there.is_current(pair, before), there.is_current(pair, after)) == (False, True)
    there.end([pair])
    there.settle(pair)
    assert not there


def test_cause_pauses_between_rounds_and_others_do_not_wait() -> None:
    mine, (other,) = some_pairs(3 * PAIRS_PER_CAUSE), some_pairs(1)
    there, whole = Doubts(lambda _: mine), Whole(mine[0].watcher, is_watcher=True)
    now, rounds, asked_at = 0.0, 0.0, 0.0
    while now < 100.0:
        there.add_all(whole, cause=whole)
        there.add(other, cause="other")
        batch = there.take(now)
        rounds += sum(pair in mine for pair in batch.pairs) / len(mine)
        if other in batch.pairs:
            asked_at = now
        assert now - asked_at <= 2 * PAIRS_PER_CAUSE / 100
        # Each pair takes 10 ms.
        now += max(0.05, len(batch.pairs) / 100)
        for pair in batch.pairs:
            there.settle(pair)
        there.answered(batch, now, seconds=len(batch.pairs) / 100)
    most = 100.0 / (len(mine) / 100)
    assert 0.8 * most / (CHECK_PAUSE_FACTOR + 1) <= rounds <= 1.2 * most / (CHECK_PAUSE_FACTOR + 1)


@pytest.mark.parametrize("is_whole", [False, True])
def test_result_from_before_a_doubt_is_not_current(*, is_whole: bool) -> None:
    (pair,) = some_pairs(1)
    there, whole = Doubts(lambda _: [pair]), Whole(pair.watched, is_watcher=False)
    there.add(pair, cause="cause")
    batch = there.take(0.0)
    assert there.is_current(pair, batch.since)
    if is_whole:
        there.add_all(whole, cause=whole)
    else:
        there.add(pair, cause="another cause")
    assert not there.is_current(pair, batch.since)
    assert there.is_current(pair, there.take(0.0).since)


def test_failed_pairs_are_retried_apart_in_halves_with_growing_pauses() -> None:
    bad, good = some_pairs(PAIRS_PER_CAUSE), some_pairs(PAIRS_PER_CAUSE)
    there = Doubts(lambda _: ())
    for pair in bad:
        there.add(pair, cause="bad")
    for pair in good:
        there.add(pair, cause="good")
    there.failed(there.take(0.0), 0.0)
    now = 0.0
    sizes: list[int] = []
    pauses: list[float] = []
    while len(sizes) < 8:
        batch = there.take(now)
        if set(batch.pairs) == set(good):
            there.answered(batch, now, seconds=0.0)
        elif batch.turns:
            assert not set(batch.pairs) & set(good)
            there.failed(batch, now)
            sizes.append(len(batch.pairs))
            pauses.append(there.pause(now) or 0.0)
        now += there.pause(now) or 0.0
    assert sizes == [50, 25, 12, 6, 3, 1, 1, 1]
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1] == doubts.RETRY_MOST_SECONDS


# --------------------------------------------------------------------------------------------- causes of doubt


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> Queries:
    """The pairs of each query about who may watch whom."""
    found: Queries = []
    watchable = presence.watchable

    async def noted(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
        found.append(list(pairs))
        return await watchable(db, pairs)

    monkeypatch.setattr(presence, "watchable", noted)
    return found


async def certain(world: World) -> None:
    """Wait until the first worker has no pairs in doubt."""
    await until(lambda: not world.workers[0].app.hub.watchers.are_in_doubt)


async def test_only_relevant_changes_cause_queries(settings: Settings, queries: Queries) -> None:
    async with World(settings, workers=1) as world:
        people = await world.users("Ada", "Charles", "Mary")
        ada, again, charles = [await world.connect(one) for one in (people[0], *people[:2])]
        group = await world.group(ada, people[1])
        message = await sent(charles, group)
        queries.clear()
        for one in (ada, again):
            await one.call(client.Watch(user_ids=[people[1].id, people[2].id]))
        mine = {(people[0].id, one.id) for one in people[1:]}
        assert [set(pairs) for pairs in queries] == [mine, mine], "one query per watch"
        await certain(world)
        queries.clear()
        at: dict[str, Any] = {"conversation_id": group, "message_id": message}
        frames: list[Frame] = [
            client.SetDraft(conversation_id=group, content="Dear"), client.Star(**at), client.Unstar(**at),
            client.FollowThread(**at), client.ReadThread(**at, thread_order=1), client.UnfollowThread(**at),
            client.MarkUnread(**at), client.Read(**at), client.SetPreferences(conversation_id=group, is_muted=True),
            client.SeeFeed(), client.SetPresence(status="busy"), client.UpdateProfile(display_name="Countess"),
            client.UpdateProfile(allow_adding=False), client.Follow(user_id=people[1].id),
            client.Mute(user_id=people[1].id),
            client.SetRole(conversation_id=group, user_id=people[1].id, role="moderator"),
            client.SetPermissions(conversation_id=group, user_id=people[1].id, can_pin_messages=True),
            client.Invite(conversation_id=group, participants=[people[2].id]),
            client.CreateChannel(conversation_id=ConversationId(uuid7()), title="Us"),
        ]  # fmt: skip
        for frame in frames:
            assert isinstance(await ada.ask(frame), server.Reply), frame
        await certain(world)
        assert queries == []
        await ada.call(client.CreateDirect(user_id=people[2].id))
        await certain(world)
        await world.group(ada, people[2])
        await certain(world)
        assert [set(pairs) for pairs in queries] == [mine, mine], "all users whom Ada watches, once for both sockets"
        queries.clear()
        # One pair, once for both sockets.
        await ada.call(client.Block(user_id=people[1].id))
        await again.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
        await certain(world)
        assert queries == [[(people[0].id, people[1].id)]]


async def test_sockets_follow_the_rules_after_every_change(world: World) -> None:  # noqa: C901, PLR0915
    people = await world.users("Ada", "Charles", "Mary")
    ada, charles, mary = [await world.connect(one, number % 2) for number, one in enumerate(people)]
    await world.db.execute("UPDATE account SET password = $1", CHEAP.hash(WORDS))
    email = await world.db.fetchval('SELECT email FROM "user" WHERE id = $1', people[1].id)
    them = {one.id for one in people[:2]}

    async def made() -> ConversationId:
        return await world.group(mary, *people[:2])

    async def added() -> ConversationId:
        group = await world.group(mary, people[0])
        await mary.call(client.AddParticipants(conversation_id=group, participants=[people[1].id]))
        return group

    async def joined() -> ConversationId:
        group = await world.group(mary, people[1])
        opened = await mary.call(client.SetInviteCode(conversation_id=group), server.OneConversation)
        assert opened.view.invite is not None
        await ada.call(client.Join(invite_code=opened.view.invite.code))
        return group

    async def invited() -> ConversationId:
        group = await world.group(mary, people[0])
        await mary.call(client.Invite(conversation_id=group, participants=[people[1].id]))
        await charles.call(client.Join(conversation_id=group))
        return group

    async def together(begin: Callable[[], Awaitable[ConversationId]], *, watching: bool = False) -> ConversationId:
        group = await begin()
        for one in (ada, charles):
            await one.event(server.ConversationJoined, lambda event: event.view.conversation.id == group)
            if watching:
                await one.call(client.Watch(user_ids=list(them)))
        assert await agrees(begin.__name__) == [everything, everything]
        return group

    async def by_http(path: str, **body: str) -> None:
        headers = {"authorization": f"Bearer {people[1].token}"}
        async with http_client(world.workers[1].url) as http:
            answer = await http.post(f"/v1/auth/{path}", headers=headers, json={"password": WORDS, **body})
        assert answer.is_success, answer.text

    async def agrees(what: str) -> list[Sight]:
        """Wait until the sockets of Ada and Charles agree with the rules, and return what each may see."""
        pairs = [(one, other) for one in them for other in them - {one}]
        rules: dict[tuple[UserId, UserId], Sight] = {}
        sights: dict[tuple[UserId, UserId], Sight] = {}
        try:
            async with asyncio.timeout(3):
                while True:
                    found = (await presence.watchable(world.db, pairs)).pairs
                    rules = {
                        pair: Sight.NOTHING if pair not in found else Sight.ALL if found[pair].is_seen else Sight.FACE
                        for pair in pairs
                    }
                    sights = {
                        (who.id, other): socket.watched[other]
                        for number, who in enumerate(people[:2])
                        for socket in world.workers[number].app.hub.online_users.sockets(who.id)
                        for other in them - {who.id}
                    }
                    if sights == {pair: sight for pair, sight in rules.items() if pair in sights}:
                        return [rules[people[0].id, people[1].id], rules[people[1].id, people[0].id]]
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"{what}: the rules are {rules}, but the sockets show {sights}")

    async def are_friends() -> None:
        await ada.call(client.RequestFriend(user_id=people[1].id))
        await charles.call(client.AnswerFriend(user_id=people[0].id, accept=True))

    nothing, face, everything = Sight.NOTHING, Sight.FACE, Sight.ALL
    for who in people[:2]:
        await world.befriend(people[2], who)
    for one in (charles, ada):
        await one.call(client.UpdateProfile(is_private=True))
    endings: list[Callable[[ConversationId], Awaitable[object]]] = [
        lambda group: charles.call(client.Leave(conversation_id=group)),
        lambda group: ada.call(client.Leave(conversation_id=group)),
        lambda group: mary.call(client.RemoveParticipant(conversation_id=group, user_id=people[0].id)),
        lambda group: mary.call(client.DeleteConversation(conversation_id=group)),
    ]
    group = await together(made, watching=True)
    for number, (begin, end) in enumerate(zip((added, joined, invited, made), endings, strict=True)):
        await end(group)
        assert await agrees(f"ending {number}") == [nothing, nothing]
        group = await together(begin)
    await mary.call(client.DeleteConversation(conversation_id=group))
    steps: list[tuple[str, Callable[[], Awaitable[object]], list[Sight]]] = [
        ("Charles is public", lambda: charles.call(client.UpdateProfile(is_private=False)), [everything, nothing]),
        ("Ada is public", lambda: ada.call(client.UpdateProfile(is_private=False)), [everything, everything]),
        ("Charles blocks", lambda: charles.call(client.Block(user_id=people[0].id)), [nothing, face]),
        ("Charles unblocks", lambda: charles.call(client.Unblock(user_id=people[0].id)), [everything, everything]),
        ("Charles is private", lambda: charles.call(client.UpdateProfile(is_private=True)), [nothing, everything]),
        ("friends", are_friends, [everything, everything]),
        ("switched off", lambda: charles.call(
            client.SetSwitches(user_id=people[0].id, can_see_online_status=False)), [face, everything]),
        ("switched on", lambda: charles.call(
            client.SetSwitches(user_id=people[0].id, can_see_online_status=True)), [everything, everything]),
        ("hides from all", lambda: charles.call(client.UpdateProfile(show_online_status=False)),
         [everything, everything]),
        ("shows all", lambda: charles.call(client.UpdateProfile(show_online_status=True)), [everything, everything]),
        ("no friends", lambda: ada.call(client.Unfriend(user_id=people[1].id)), [nothing, everything]),
        ("direct", lambda: charles.call(client.CreateDirect(user_id=people[0].id)), [everything, everything]),
        ("friends again", are_friends, [everything, everything]),
        ("deactivated", lambda: by_http("deactivate"), [nothing, everything]),
        ("came back", lambda: by_http("login", email=email), [everything, everything]),
    ]  # fmt: skip
    for what, act, expected in steps:
        await act()
        assert await agrees(what) == expected, what


# -------------------------------------------------------------------------------------------------------- failures


async def test_failures_of_some_pairs_delay_no_others_and_are_resolved(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doubts, "RETRY_SECONDS", 0.01)
    sizes: list[int] = []
    defects: list[Pair] = []
    watchable, decide = presence.watchable, Watchers._decide  # noqa: SLF001

    async def late(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
        sizes.append(len(pairs))
        if len(pairs) > 3:
            raise TimeoutError
        return await watchable(db, pairs)

    def fails(self: Watchers, pair: Pair, answer: WatchAnswer) -> None:
        if pair.watcher == ada_.id and len(defects) < 3:
            defects.append(pair)
            raise RuntimeError("a defect")
        decide(self, pair, answer)

    async with World(settings, workers=1) as world:
        ada_, charles_ = await world.users("Ada", "Charles")
        charles = await world.connect(charles_)
        watching = [await world.connect(one) for one in [ada_, *await world.users(*[f"W{n}" for n in range(6)])]]
        for one in watching:
            await one.call(client.Watch(user_ids=[charles_.id]))
        await certain(world)
        monkeypatch.setattr(presence, "watchable", late)
        monkeypatch.setattr(Watchers, "_decide", fails)
        caplog.clear()
        seen = len(watching[0].events)
        await charles.call(client.UpdateProfile(is_private=True, display_name="Charles the Secret"))
        for one in reversed(watching):
            await one.event(server.PresenceChanged, lambda event: event.presence.status == "offline")
        await certain(world)
    assert sizes[:3] == [7, 3, 3], "half as many pairs after a timeout"
    assert len(defects) == 3
    logged = [
        record.getMessage().split(" failed")[0] for record in caplog.records if "may watch" in record.getMessage()
    ]
    assert logged == ["checking who may watch whom", "deciding who may watch whom"]
    assert not [event for event in watching[0].events[seen:] if isinstance(event, server.UserUpdated)]


async def test_unreachable_database_does_not_count_as_a_failure_of_a_cause(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers_module, "LOST_SECONDS", 0.02)
    sizes: list[int] = []
    watchable = presence.watchable

    async def lost(db: Db, pairs: Sequence[tuple[UserId, UserId]]) -> Sightings:
        sizes.append(len(pairs))
        if len(sizes) <= 3:
            raise ConnectionRefusedError
        return await watchable(db, pairs)

    async with World(settings, workers=1) as world:
        charles = await world.user("Charles")
        for one in await world.users(*[f"W{n}" for n in range(5)]):
            await (await world.connect(one)).call(client.Watch(user_ids=[charles.id]))
        await certain(world)
        monkeypatch.setattr(presence, "watchable", lost)
        world.workers[0].app.hub.watchers.missed_all()
        await certain(world)
    assert sizes == [5] * 4, "each query has all five pairs"


async def test_change_missed_while_the_bus_was_down_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    people = await world.users("Ada", "Charles")
    ada, charles = [await world.connect(one, number) for number, one in enumerate(people)]
    await ada.call(client.Watch(user_ids=[people[1].id]))
    with monkeypatch.context() as away:
        away.setattr(world.workers[1].app.hub.bus, "publish", lambda *_: None)
        await charles.call(client.UpdateProfile(is_private=True))
    seen = len(ada.events)
    world.workers[0].app.hub.comparisons.soon()
    news = await ada.event(server.PresenceChanged, start=seen)
    assert (news.presence.user_id, news.presence.status) == (people[1].id, "offline")


# ------------------------------------------------------------------------------------------------------ visible again


async def test_user_who_becomes_visible_again_is_published_immediately_and_alike(world: World) -> None:
    ada_ = await world.user("Ada")
    ada = await world.connect(ada_)

    def privacy(*, is_private: bool) -> Callable[[Client], Awaitable[object]]:
        return lambda one: one.call(client.UpdateProfile(is_private=is_private))

    def switch(*, is_on: bool) -> Callable[[Client], Awaitable[object]]:
        return lambda one: one.call(client.SetSwitches(user_id=ada_.id, can_see_online_status=is_on))

    def blocks(one: Client) -> Awaitable[object]:
        return one.call(client.Block(user_id=ada_.id))

    def unblocks(one: Client) -> Awaitable[object]:
        return one.call(client.Unblock(user_id=ada_.id))

    cases = {
        "blocks in a group": (True, blocks, unblocks),
        "switches off in a group": (True, switch(is_on=False), switch(is_on=True)),
        "blocks a stranger": (False, blocks, unblocks),
        "is private to a stranger": (False, privacy(is_private=True), privacy(is_private=False)),
    }
    received: dict[str, list[tuple[str, str | None]]] = {}
    for number, (name, (is_together, act, undo)) in enumerate(cases.items()):
        who = await world.user(f"X{number}")
        if is_together:
            await world.befriend(ada_, who)
            await world.group(ada, who)
            await ada.call(client.Unfriend(user_id=who.id))
        await ada.call(client.Watch(user_ids=[who.id]))
        one = await world.connect(who, 1)
        await one.call(client.SetPresence(status="busy", custom_status="Here"))
        await ada.event(
            server.PresenceChanged,
            lambda event: (event.presence.user_id, event.presence.status) == (who.id, "busy"),  # noqa: B023
        )
        await one.call(client.Mute(user_id=ada_.id))
        await ada.synced()
        seen = len(ada.events)
        await act(one)
        await ada.event(server.PresenceChanged, lambda event: event.presence.status == "offline", start=seen)
        await undo(one)
        await ada.event(server.PresenceChanged, lambda event: event.presence.status == "busy", start=seen)
        await ada.synced()
        # An event may be repeated.
        received[name] = list(
            dict.fromkeys(
                (event.presence.status, event.presence.custom_status)
                for event in ada.events[seen:]
                if isinstance(event, server.PresenceChanged)
            )
        )
    assert all(events == [("offline", None), ("busy", "Here")] for events in received.values()), received


async def test_connection_that_never_resumes_sees_no_more_than_others(world: World) -> None:
    """It follows no conversation, so no event tells it that a conversation was deleted."""
    people = await world.users("Ada", "Charles", "Mary")
    for one in people[:2]:
        await world.befriend(people[2], one)
    charles, mary = [await world.connect(one, 1) for one in people[1:]]
    group = await world.group(mary, *people[:2])
    await charles.call(client.UpdateProfile(is_private=True))
    ada = await world.connect(people[0], query="?resume=1")
    listed = await ada.call(client.Watch(user_ids=[people[1].id]), server.PresenceList)
    assert len(listed.presences) == 1
    await ada.synced()
    await mary.call(client.DeleteConversation(conversation_id=group))
    await ada.event(
        server.PresenceChanged, lambda event: event.presence.last_seen_at is None and event.presence.status == "offline"
    )
