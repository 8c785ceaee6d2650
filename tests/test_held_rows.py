"""A locked row delays only frames and jobs that need it."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from protocol import client, server
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, EditId, MessageId, uuid7
from protocol.values import ConversationSettings
from prove.client import Client
from prove.truth import recount
from server.app import app, background
from server.core.config import Settings
from server.core.periodic import end, every
from server.describe.handbook import is_for_participants
from server.fairness.batcher import Batcher
from server.queries import scheduled
from server.queries.sending import Outgoing
from server.routes import ROUTES
from tests.test_may_send import let_all_wait, waiting
from tests.test_refusals import frames
from tests.world import Room, World, all_sent, are_stored, message, received_message, refused, sent, until

HOLD = {
    "sender": """SELECT FROM "user" WHERE name = 'Charles' FOR NO KEY UPDATE""",
    "conversation": "SELECT FROM conversation WHERE title = 'Held' FOR NO KEY UPDATE",
}
DAY = timedelta(days=1)
LAPSE = "UPDATE scheduled_message SET claimed_at = claimed_at - interval '1 minute' WHERE status = 'waiting'"
WAITING = "SELECT count(*) FROM scheduled_message WHERE status = 'waiting'"
CONTENTS = (
    "SELECT array_agg(content ORDER BY sent_version) FROM message WHERE NOT is_system_message AND conversation_id = $1"
)


async def schedule(who: Client, about: ConversationId, content: str) -> MessageId:
    """Schedule a message that is due."""
    frame = client.Schedule(
        conversation_id=about, message_id=MessageId(uuid7()), content=content, send_at=datetime.now(UTC)
    )
    return (await who.call(frame, server.OneScheduled)).scheduled.message_id


@pytest.mark.parametrize("held", HOLD)
async def test_due_message_does_not_wait_for_rows_of_another_sender(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        (send_due,) = (job.run for job in world.workers[0].app.background.jobs if job.run.__name__ == "send_due")
        people = await world.users("Ada", "Charles", "Mary")
        ada, charles, mary = [await world.connect(one) for one in people]
        stuck = await world.group(ada, *people[1:], title="Held")
        free = await world.group(ada, *people[1:], title="Free")
        for number in range(3):
            await schedule(charles, stuck, f"Charles {number}")
        async with world.db.transaction():
            await world.db.execute(HOLD[held])
            job = asyncio.create_task(every(0.02, send_due))
            first = await schedule(mary, free, "Mary 1")
            assert (await received_message(ada, first)).content == "Mary 1"
            assert await world.db.fetchval(WAITING) == 3
        # No later message of the same sender overtakes those that could not be sent.
        last = await schedule(charles, stuck, "Charles 3")
        await world.db.execute(LAPSE)
        await received_message(ada, last)
        await end([job])
        assert await world.db.fetchval(CONTENTS, stuck) == [f"Charles {number}" for number in range(4)]
        assert await world.db.fetchval(CONTENTS, free) == ["Mary 1"]
        assert await world.db.fetchval(WAITING) == 0


@pytest.mark.parametrize("more_due", ["nothing", "another message"])
async def test_claim_during_that_of_another_worker_takes_nothing_and_continues_with_other_senders(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, more_due: str
) -> None:
    """The worker's statement begins before the other claim is committed, and ends after it."""
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        scheduler = world.workers[0].app.scheduler
        people = await world.users("Ada", "Charles", "Mary")
        ada, charles, mary = [await world.connect(one) for one in people]
        group = await world.group(ada, *people[1:], title="Held")
        await schedule(charles, group, "Charles 0")
        more = await schedule(charles, group, "Charles 1")
        await world.db.execute("UPDATE scheduled_message SET send_at = now() + interval '1 day' WHERE id = $1", more)
        first = await schedule(mary, group, "Mary")
        claiming = await asyncpg.connect(settings.database_url)
        claim = claiming.transaction()
        await claim.start()
        assert await scheduled.claim(claiming, people[1].id) is not None
        if more_due != "nothing":
            await world.db.execute(
                "UPDATE scheduled_message SET send_at = send_at - interval '1 day' WHERE id = $1", more
            )
        await world.db.execute("SELECT pg_advisory_lock(56)")
        looking = "pg_advisory_xact_lock_shared(56)::text IS NOT NULL AND u.is_active"
        monkeypatch.setattr(scheduled, "SENDER", scheduled.SENDER.replace("u.is_active", looking, 1))
        sending = asyncio.create_task(scheduler.send_due())
        async with asyncio.timeout(5):
            while not await world.db.fetchval(WAITS):
                await world.db.execute("SELECT pg_stat_clear_snapshot()")
                await asyncio.sleep(0.01)
        await claim.commit()
        await claiming.close()
        await world.db.execute("SELECT pg_advisory_unlock(56)")
        await sending
        assert (await received_message(ada, first)).content == "Mary"
        await all_sent(scheduler)
        waiting = await world.db.fetch(
            "SELECT id FROM scheduled_message WHERE claimed_at IS NULL AND status = 'waiting'"
        )
        assert [row[0] for row in waiting] == [more]
        await world.db.execute(LAPSE)
        await world.db.execute("UPDATE scheduled_message SET send_at = now() WHERE id = $1", more)
        await scheduler.send_due()
        await all_sent(scheduler)
        assert await world.db.fetchval(CONTENTS, group) == ["Mary", "Charles 0", "Charles 1"]


async def test_postponed_message_is_not_overtaken_in_its_conversation(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        scheduler = world.workers[0].app.scheduler
        ada, charles, mary = await world.users("Ada", "Charles", "Mary")
        owner, sender, other = await world.connect(ada), await world.connect(charles), await world.connect(mary)
        slow = await world.group(owner, charles, settings=ConversationSettings(slow_mode_seconds=3_600))
        free = await world.group(owner, charles, mary)

        async def send_due() -> tuple[object, object, int]:
            async with asyncio.timeout(5):
                await scheduler.send_due()
                await all_sent(scheduler)
            put_off = await world.db.fetchval("SELECT count(*) FROM scheduled_message WHERE not_before IS NOT NULL")
            assert not await world.db.fetchval(
                "SELECT count(claimed_at) FROM scheduled_message WHERE status = 'waiting'"
            )
            # Two senders take turns in `free`.
            return await world.db.fetchval(CONTENTS, slow), sorted(await world.db.fetchval(CONTENTS, free)), put_off

        await sent(sender, slow, "Now")
        for who, about, content in (
            (sender, slow, "1"), (sender, slow, "2"), (sender, free, "3"), (other, free, "4"),
        ):  # fmt: skip
            await schedule(who, about, content)
        assert await send_due() == (["Now"], ["3", "4"], 1)
        await owner.call(client.UpdateConversation(conversation_id=slow, settings=ConversationSettings()))
        await schedule(sender, slow, "5")
        await schedule(other, free, "6")
        assert await send_due() == (["Now"], ["3", "4", "6"], 1)
        await world.db.execute("UPDATE scheduled_message SET not_before = now() WHERE status = 'waiting'")
        assert await send_due() == (["Now", "1", "2", "5"], ["3", "4", "6"], 0)


async def test_many_locked_senders_do_not_delay_other_senders(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    async with World(settings, workers=1) as world:
        (send_due,) = (job.run for job in world.workers[0].app.background.jobs if job.run.__name__ == "send_due")
        names = [f"Held {number}" for number in range(settings.database_connections)]
        people = await world.users("Ada", "Mary", *names)
        ada, mary, *stuck = [await world.connect(one) for one in people]
        group = await world.group(ada, *people[1:])
        for one in stuck:
            await schedule(one, group, "Held")
        last = await schedule(mary, group, "Mary")
        async with world.db.transaction():
            await world.db.execute("""SELECT FROM "user" WHERE name LIKE 'Held%' FOR NO KEY UPDATE""")
            async with asyncio.timeout(5):
                await send_due()
                await received_message(ada, last)
            assert await world.db.fetchval(WAITING) == len(stuck)
        async with asyncio.timeout(5):
            while await world.db.fetchval(WAITING):
                await send_due()  # again, because a task that found the rows locked may still end its round
                await asyncio.sleep(0.01)


HELD_UP = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"


async def test_scheduled_messages_use_at_most_a_quarter_of_the_connections(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "DUE_SECONDS", 36_000.0)
    settings = msgspec.structs.replace(settings, database_connections=8)
    async with World(settings, workers=1) as world:
        scheduler = world.workers[0].app.scheduler
        senders = [await world.connect(one) for one in await world.users(*(f"Sender {n}" for n in range(6)))]
        for one in senders:
            await schedule(one, await world.channel(one), "Later")
        held: list[int] = []
        async with world.db.transaction(), asyncio.timeout(10):
            await world.db.execute("SELECT FROM conversation FOR UPDATE")
            await scheduler.send_due()
            await senders[-1].call(client.GetMe())
            assert scheduler._sending, "the messages still wait"  # noqa: SLF001
            while scheduler._sending:  # noqa: SLF001
                held.append(await world.db.fetchval(HELD_UP))
                await asyncio.sleep(0.01)
            assert await world.db.fetchval(WAITING) == len(senders)
        assert max(held) == settings.database_connections // 4


async def test_presence_of_others_is_recorded_while_a_row_is_locked(settings: Settings) -> None:
    online = """SELECT is_online FROM "user" WHERE id = $1"""
    async with World(settings, workers=1) as world:
        charles, mary = await world.users("Charles", "Mary")
        async with world.db.transaction():
            await world.db.execute(HOLD["sender"])
            await asyncio.gather(world.connect(charles), world.connect(mary))
            async with asyncio.timeout(5):
                while not await world.db.fetchval(online, mary.id):
                    await asyncio.sleep(0.01)
            assert not await world.db.fetchval(online, charles.id)
        async with asyncio.timeout(5):
            while not await world.db.fetchval(online, charles.id):
                await asyncio.sleep(0.01)


COUNT_CALLS = """
ALTER FUNCTION search_words RENAME TO words_of;
CREATE SEQUENCE found;
CREATE FUNCTION search_words(uuid, text, jsonb, uuid[], text[], text[]) RETURNS tsvector LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('found');
    RETURN words_of($1, $2, $3, $4, $5, $6);
END $$
"""
"""Counts calls in a sequence, which also shows those of uncommitted transactions."""
FOUND = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM found"
WAITS = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"


async def test_words_of_a_message_are_found_before_its_conversation_is_locked(room: Room, world: World) -> None:
    """Words are found only once, since they take longer than the rest for a large message."""
    said = await sent(room.charles, room.group, "Hello")
    await world.indexed()
    place: Any = {"conversation_id": room.group, "message_id": said}
    frames: tuple[tuple[Client, client.Frame], ...] = (
        (room.charles, client.Edit(**place, content="Hello engine")),
        (room.ada, client.Moderate(**place, reason="Rude")),
        (room.ada, client.Unmoderate(**place)),
    )
    await world.db.execute(COUNT_CALLS)
    counts = []
    for one, frame in frames:
        async with world.db.transaction():
            await world.db.execute("SELECT FROM conversation FOR NO KEY UPDATE")
            asked = asyncio.create_task(one.ask(frame))
            async with asyncio.timeout(5):
                while not await world.db.fetchval(WAITS):
                    await world.db.execute("SELECT pg_stat_clear_snapshot()")
            before = await world.db.fetchval(FOUND)
        await asked
        counts.append((before, await world.db.fetchval(FOUND)))
    assert counts == [(1, 1), (1, 1), (2, 2)]
    for words in ("engine", "hello"):
        found = await room.ada.call(client.Search(text=words), server.SearchPage)
        assert said in [hit.message.id for hit in found.hits], words


async def test_batch_is_bounded_by_weight_unless_one_item_exceeds_it() -> None:
    batches: list[list[str]] = []
    may_go_on = asyncio.Event()

    async def work(items: list[str]) -> list[str]:
        batches.append(items)
        await may_go_on.wait()
        return items

    batcher = Batcher(work, most=4, weigh=len, most_weight=10)
    items = ["a", "bbbbb", "ccccc", "d", *"efghi", "j" * 20, "k"]
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    await asyncio.sleep(0)
    may_go_on.set()
    assert await asyncio.gather(*tasks) == items
    assert batches == [["a"], ["bbbbb", "ccccc"], ["d", "e", "f", "g"], ["h", "i"], ["j" * 20], ["k"]]


async def test_pending_list_of_the_search_index_is_32_mib(world: World) -> None:
    """A statement that fills the list merges it, which takes a second at the default of 4 MiB, with locks held."""
    options = await world.db.fetchval("SELECT reloptions FROM pg_class WHERE relname = 'message_search_words_idx'")
    assert options == ["gin_pending_list_limit=32768"]


# PostgreSQL caches these statistics for a transaction until they are cleared.
CLEAR = "SELECT pg_stat_clear_snapshot()"
SENDS_WAIT = """
SELECT count(*) FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND datname = current_database() AND query LIKE '%send_messages%'
"""


async def test_message_does_not_wait_for_other_locked_conversations(settings: Settings) -> None:
    """More conversations are locked than may wait concurrently, each with messages from several connections."""
    held, waiting = settings.database_connections, max(1, settings.database_connections // app.WAITING_SHARE)
    async with World(settings, workers=1) as world:
        ada, charles, mary = await world.users("Ada", "Charles", "Mary")
        one, other, free = [await world.connect(who) for who in (ada, charles, mary)]
        stuck = [await world.group(one, charles, title="Held") for _ in range(held)]
        others = await world.group(free, ada)
        async with asyncio.TaskGroup() as group, world.db.transaction():
            await world.db.execute(HOLD["conversation"])
            frames = [message(about, f"{number}") for about in stuck for number in range(3)]
            sends = world.workers[0].app._sends  # noqa: SLF001 - sends concurrently, as many connections do
            tasks = [group.create_task(sends.submit(Outgoing(ada.id, frame))) for frame in frames]
            again = group.create_task(other.ask(message(stuck[0], "Charles")))
            repeated = group.create_task(sends.submit(Outgoing(ada.id, frames[0])))
            for number in range(3):
                await free.call(message(others, f"Free {number}"), server.Sent)
            while await world.db.fetchval(SENDS_WAIT) < waiting:
                await asyncio.sleep(0.01)
                await world.db.execute(CLEAR)
            await free.call(message(others, "Free 3"), server.Sent)
            await world.db.execute(CLEAR)
            assert await world.db.fetchval(SENDS_WAIT) == waiting, "other sends keep their connections"
            assert not any(task.done() for task in (*tasks, again))
            # Refused messages are refused as usual.
            with refused(ErrorCode.NOT_FOUND, "conversation_id"):
                await free.call(message(ConversationId(uuid7())))
        outcomes = [task.result() for task in (tasks[0], repeated)]
        assert are_stored(task.result() for task in tasks[1:])
        assert are_stored(outcomes[:1]) != are_stored(outcomes[1:]), "a repeated message is stored once"
        assert isinstance(again.result(), server.Reply)
        for about in stuck:
            said = await world.db.fetchval(CONTENTS, about)
            assert sorted(said) == ["0", "1", "2", *(["Charles"] if about == stuck[0] else [])]
        assert await world.db.fetchval(CONTENTS, others) == [f"Free {number}" for number in range(4)]
        assert await recount(world.db) == []
        assert sends.lanes._lanes == {}  # noqa: SLF001 - lanes are removed


def assert_is_empty(worker: app.App) -> None:
    """Assert that nothing is left of frames that waited."""
    lock_queue = worker._lock_queue  # noqa: SLF001
    assert lock_queue._of_key._taken == lock_queue._of_client._taken == lock_queue._waiting == {}  # noqa: SLF001


async def test_frames_that_wait_for_a_row_leave_connections_to_others(settings: Settings) -> None:
    async with World(settings, workers=1) as world, asyncio.TaskGroup() as group:
        mary, *people = await world.users("Mary", *(f"User {number}" for number in range(8)))
        other, (first, *more) = await world.connect(mary), [await world.connect(who) for who in people]
        about, free = await world.group(first, *people[1:], title="Held"), await world.channel(other)
        said = await sent(other, free)
        for one in more:
            await one.event(server.ConversationJoined)
        edits = [
            client.Edit(
                conversation_id=about, message_id=await sent(one, about), edit_id=EditId(uuid7()), content="New"
            )
            for one in (first, *more)
        ]
        async with world.db.transaction():
            await world.db.execute(HOLD["conversation"])
            tasks = [
                group.create_task(one.call(edit, server.Changed))
                for one, edit in zip((first, *more), edits, strict=True)
            ]
            async with asyncio.timeout(5):
                await waiting(world, 1)
                await other.call(client.History(conversation_id=free))
                await other.call(client.Pin(conversation_id=free, message_id=said))
                await sent(other, free)
                while await world.db.fetchval(HELD_UP) > 1:  # first attempts, which do not wait for long
                    await asyncio.sleep(0.01)
            assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        assert_is_empty(world.workers[0].app)
        assert await recount(world.db) == []


async def test_user_whose_row_is_locked_delays_nobody_else(settings: Settings) -> None:
    """Charles waits for his own row, in conversations of others, in several of his own, and in one that is not his."""
    settings = msgspec.structs.replace(settings, database_connections=8)
    async with World(settings, workers=1) as world, asyncio.TaskGroup() as group:
        ada, charles = await world.users("Ada", "Charles")
        one, two = await world.connect(ada), await world.connect(ada)
        devices = [await world.connect(charles) for _ in range(4)]
        shared, foreign = await world.group(one, charles), await world.channel(one)
        said = [(about, await sent(one, about)) for about in (shared, foreign)]
        own = [await world.channel(devices[0]) for _ in range(2)]
        await devices[-1].event(server.ConversationJoined)
        frames: list[client.Frame] = [client.SetDraft(conversation_id=shared, content="Held")]
        frames += [
            client.Schedule(
                conversation_id=about, message_id=MessageId(uuid7()), content="Held", send_at=datetime.now(UTC) + DAY
            )
            for about in own
        ]

        async def cancel() -> None:
            with refused(ErrorCode.NOT_FOUND, "message_id"):
                await devices[-1].call(client.CancelScheduled(conversation_id=foreign, message_id=MessageId(uuid7())))

        async with world.db.transaction():
            await world.db.execute(HOLD["sender"])
            tasks: list[asyncio.Task[Any]] = [group.create_task(cancel())]
            tasks += [group.create_task(device.call(frame)) for device, frame in zip(devices, frames, strict=False)]
            lock_queue = world.workers[0].app._lock_queue  # noqa: SLF001
            await until(lambda: lock_queue.has(charles.id))
            async with asyncio.timeout(3):
                while await world.db.fetchval(HELD_UP) > 1:  # first attempts, which do not wait for long
                    await asyncio.sleep(0.01)
                for about, message_id in said:
                    edit = client.Edit(
                        conversation_id=about, message_id=message_id, edit_id=EditId(uuid7()), content="Edited"
                    )
                    await one.call(edit, server.Changed)
                # Frames of others that wait for a row have a place.
                other = await asyncpg.connect(settings.database_url)
                async with other.transaction():
                    await other.execute("SELECT FROM conversation WHERE id = $1 FOR NO KEY UPDATE", foreign)
                    pair: list[asyncio.Task[Any]] = [
                        group.create_task(one.call(client.Pin(conversation_id=foreign, message_id=said[1][1]))),
                        group.create_task(two.call(message(foreign))),
                    ]
                    await waiting(world, 2)
                await other.close()
                await asyncio.gather(*pair)
            assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        assert_is_empty(world.workers[0].app)


async def test_frames_that_change_only_rows_of_their_user_wait_for_their_user(room: Room, world: World) -> None:
    """Otherwise frames of others in the conversation would wait behind them."""
    here = room.at(await sent(room.charles, room.group))
    other = room.at(await sent(room.ada, room.group))
    public = await world.channel(room.ada, is_public=True)
    charles = room.charles.ready.user.id
    lock_queue = world.workers[1].app._lock_queue  # noqa: SLF001
    frames: list[client.Frame] = [
        client.Star(**here),
        client.Unstar(**here),
        client.FollowThread(**here),
        client.UnfollowThread(**here),
        client.ReadThread(**here, thread_order=1),
        client.Delivered(**other),
        client.Read(**other),
        client.MarkUnread(**here),
        client.SetPreferences(conversation_id=room.group, pin_order=1),
        client.SetDraft(conversation_id=room.group, content="I think"),
        client.Join(conversation_id=public),
    ]
    flagged = {kind for kind, route in ROUTES.items() if route.waits_for_user}
    assert {type(frame) for frame in frames} | {client.CancelScheduled} == flagged  # tested above
    for frame in frames:
        async with world.db.transaction():
            await world.db.execute(HOLD_USER, charles)
            task: asyncio.Task[Any] = asyncio.create_task(room.charles.call(frame))
            await until(lambda: any(lock_queue.has(key) for key in (charles, room.group, public)))
            assert not lock_queue.has(room.group), frame
            assert not lock_queue.has(public), frame
        await task


HOLD_USER = """
WITH parts AS (SELECT FROM conversation_participant WHERE user_id = $1 FOR UPDATE)
SELECT (SELECT count(*) FROM parts) FROM "user" WHERE id = $1 FOR NO KEY UPDATE
"""

HOLD_ALL = """
WITH held AS (SELECT FROM conversation FOR UPDATE), said AS (SELECT FROM message FOR UPDATE),
    parts AS (SELECT FROM conversation_participant WHERE user_id <> ALL ($1) FOR UPDATE),
    people AS (SELECT FROM "user" WHERE id <> ALL ($1) FOR UPDATE)
SELECT (SELECT count(*) FROM held), (SELECT count(*) FROM said), (SELECT count(*) FROM parts),
    (SELECT count(*) FROM people)
"""


async def remove_outsiders(ada: Client, charles: Client, outside: dict[str, Client], about: ConversationId) -> None:
    """Bring each user of `outside` into the state of their name. Charles invites them, and loses the permission to
    add users.
    """
    here: dict[str, Any] = {"conversation_id": about}
    ids = {name: one.ready.user.id for name, one in outside.items()}
    may_add = client.SetPermissions(**here, user_id=charles.ready.user.id, can_add_members=True)
    await ada.call(may_add)
    await charles.call(client.Invite(**here, participants=[ids[name] for name in outside if name != "Stranger"]))
    for name in ("Left", "Removed", "Banned"):
        await outside[name].call(client.Join(**here))
    await outside["Left"].call(client.Leave(**here))
    await outside["Declined"].call(client.Decline(**here))
    for name, ban in (("Removed", False), ("Banned", True), ("Invited", False)):
        await ada.call(client.RemoveParticipant(**here, user_id=ids[name], ban=ban))
    await ada.call(client.Invite(**here, participants=[ids["Invited"]]))
    await ada.call(msgspec.structs.replace(may_add, can_add_members=False))


async def test_locked_rows_do_not_delay_errors_to_non_participants(world: World) -> None:
    """So these frames take no lock, since taking a lock would wait for it."""
    names = ("Owner", "Inviter", "Stranger", "Left", "Removed", "Banned", "Invited", "Declined", "Uninvited")
    owner, inviter, *others = await world.users(*names)
    ada, charles = await world.connect(owner), await world.connect(inviter)
    outside = {one.name: await world.connect(one, 1) for one in others}
    ids = [one.id for one in others]
    group = await world.group(ada, inviter, title="Group", max_participants=100)
    public = await world.channel(ada, is_public=True)
    full = await world.channel(ada, is_public=True)
    await charles.call(client.Join(conversation_id=public))
    refusals: list[tuple[Client, client.Frame]] = []
    for about in (group, public):
        here: dict[str, Any] = {"conversation_id": about}
        said = await sent(ada, about)
        await remove_outsiders(ada, charles, outside, about)
        for name, one in outside.items():
            refusals += [(one, frame) for frame in frames(about, said, inviter.id)]
            if name not in {"Invited", "Uninvited"}:
                refusals.append((one, client.Decline(**here)))
            if name == "Banned" or (about == group and name != "Invited"):
                refusals.append((one, client.Join(**here)))
    await ada.call(client.UpdateConversation(conversation_id=full, max_participants=1))
    refusals.append((outside["Stranger"], client.Join(conversation_id=full)))
    invite = (await ada.call(client.SetInviteCode(conversation_id=group), server.OneConversation)).view.invite
    assert invite is not None
    refusals.append((outside["Banned"], client.Join(invite_code=invite.code)))
    asked = {type(frame) for _, frame in refusals}
    assert asked >= set(filter(is_for_participants, ROUTES))
    free = [await one.ask(frame) for one, frame in refusals]
    async with world.db.transaction():
        held = await world.db.fetchrow(HOLD_ALL, ids)
        assert held is not None
        assert min(held) > 0
        async with asyncio.timeout(60):
            for (one, frame), before in zip(refusals, free, strict=True):
                which = (one.ready.user.name, type(frame).__name__)
                try:
                    async with asyncio.timeout(2):
                        answer = await one.ask(frame)
                except TimeoutError:
                    raise AssertionError(f"waits: {which}") from None
                assert (which, error_of(answer)) == (which, error_of(before))
        # Permitted frames wait.
        let_all_wait(world)
        tasks = [
            asyncio.create_task(one.ask(frame))
            for one, frame in (
                (ada, client.UpdateConversation(conversation_id=group, title="Free")),
                (charles, client.SetDraft(conversation_id=group, content="I think")),
                (outside["Invited"], client.Join(conversation_id=group)),
                (outside["Stranger"], client.Join(conversation_id=public)),
            )
        ]
        await waiting(world, len(tasks) - 1)  # the joins take turns
        assert not any(task.done() for task in tasks)
    assert [error_of(await task) for task in tasks] == [None] * len(tasks)


def error_of(answer: Any) -> tuple[str, str | None, str] | None:
    """Return the content of an error, or None for another reply."""
    return (answer.code, answer.path, answer.message) if isinstance(answer, server.Error) else None
