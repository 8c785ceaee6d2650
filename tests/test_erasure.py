"""Erasure of a user who is online and active leaves no data, which `openchat check` verifies."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import asyncpg
import pytest

from protocol import client
from protocol.errors import ErrorCode, Refused
from protocol.ids import ConversationId, MessageId, UserId, uuid7
from prove.client import Client
from server.app import background
from server.core.config import Settings
from server.core.errors import Fatal
from server.db import database
from server.db.database import Db, Single, speak
from server.domain.erasure import Result, erase
from server.ops.check import run_checks
from server.ops.progress import Progress
from server.queries import sending
from server.queries.checks import CHECKS
from server.queries.checks import run_all as ask
from server.queries.participants import ParticipantChange
from server.queries.sending import Outgoing
from tests.test_credentials import administer
from tests.test_lock_order import ConflictingWrites
from tests.test_may_send import waiting
from tests.world import UserSession, World, are_stored, http_client, message, sent

ERASED = next(check for check in CHECKS if check.name == "erased users have no data left")


def publish_nothing(_: ParticipantChange) -> None:
    """Publish nothing."""


async def failed_checks(world: World) -> list[str]:
    """Return the failed checks of `openchat check`."""
    lines = [line async for line in run_checks(world.db, progress=Progress(is_on=False))]
    return [f"{line.name}: {line.found}" for line in lines if not line.is_good]


async def left(world: World, user_id: UserId) -> int:
    return int(
        await world.db.fetchval(
            "SELECT count(*) FROM conversation_participant WHERE user_id = $1 AND status IN ('active', 'invited')",
            user_id,
        )
    )


async def busy(one: Client, frames: Any) -> int:
    """Send frames as fast as they are answered until the connection ends. Return how many were accepted."""
    count = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while True:
            try:
                await one.call(frames())
                count += 1
            except Refused as refused:
                assert refused.code not in {ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE}, refused
    return count


async def test_user_erased_while_creating_groups_leaves_no_data(world: World) -> None:
    who, charles = await world.users("Ada", "Charles")
    other = await world.connect(charles)
    await other.call(client.Follow(user_id=who.id))
    public = await world.channel(other, is_public=True)

    def group() -> client.Frame:
        return client.CreateGroup(conversation_id=ConversationId(uuid7()), title="More", participants=[charles.id])

    def again() -> client.Frame:
        return client.Join(conversation_id=public)

    def profile() -> client.Frame:
        return client.UpdateProfile(bio="I am still here")

    def friend() -> client.Frame:
        return client.Follow(user_id=charles.id)

    def added() -> client.Frame:
        return client.AddParticipants(conversation_id=public, participants=[who.id])

    clients = [await world.connect(who, number % 2) for number in range(4)]
    working = [
        asyncio.create_task(busy(one, frames))
        for one, frames in zip(clients, (group, again, profile, friend), strict=True)
    ]
    adding = asyncio.create_task(busy(other, added))
    while await left(world, who.id) < 10:
        await asyncio.sleep(0)
    await administer(world, "erase", str(who.id), "--yes")
    assert await left(world, who.id) == 0
    # This call does not use the bus, so connections stay open until the workers compare versions.
    for worker in world.workers:
        worker.app.hub.comparisons.soon()
    assert sum(await asyncio.gather(*working)) > 10
    adding.cancel()
    assert await left(world, who.id) == 0
    assert await failed_checks(world) == []
    mine = await world.db.fetchval(
        "SELECT count(*) FROM conversation_participant WHERE user_id = $1 AND role = 'owner' AND status = 'active'",
        who.id,
    )
    assert mine == 0


async def test_second_erasure_deletes_later_data(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    other = await world.connect(charles)
    group = await world.group(other, ada)
    await erase(Single(world.db), ada.id, publish_nothing)
    await world.db.execute(
        "UPDATE conversation_participant SET status = 'active' WHERE conversation_id = $1 AND user_id = $2",
        group,
        ada.id,
    )
    await world.db.execute("UPDATE conversation SET participant_count = 2 WHERE id = $1", group)
    await world.db.execute('UPDATE "user" SET bio = $2 WHERE id = $1', ada.id, "Something")
    assert (await ask(world.db, ERASED)).number == 2
    await erase(Single(world.db), ada.id, publish_nothing)
    assert await failed_checks(world) == []


async def test_participant_of_a_deleted_conversation_is_erased(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    one = await world.connect(ada)
    group = await world.group(one, charles)
    await one.call(client.DeleteConversation(conversation_id=group))
    await erase(Single(world.db), ada.id, publish_nothing)
    assert await failed_checks(world) == []


async def test_reply_to_an_erased_user_contains_none_of_their_data(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    one, other = await world.connect(ada), await world.connect(charles)
    group = await world.group(other, ada)
    said = await sent(one, group, "Hello")
    await erase(Single(world.db), ada.id, publish_nothing)
    await sent(other, group, "Farewell", parent_message_id=said)
    assert await failed_checks(world) == []


LAST = """
CREATE FUNCTION last() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
CREATE TRIGGER last AFTER UPDATE ON "user" FOR EACH ROW
WHEN (old.erased_at IS NULL AND new.erased_at IS NOT NULL) EXECUTE FUNCTION last()
"""
HELD = "SELECT FROM conversation FOR UPDATE"


@pytest.mark.parametrize("order", ["the reply, then the erasure", "the erasure's end, then the reply", "both meet"])
async def test_reply_during_an_erasure_contains_none_of_their_data(
    settings: Settings, world: World, order: str
) -> None:
    """This includes a reply whose statement began before the erasure and ends after it."""
    ada, charles = await world.users("Ada", "Charles")
    one, other = await world.connect(ada), await world.connect(charles)
    group = await world.group(other, ada)
    said = await sent(one, group, "Hello")
    await one.call(client.Leave(conversation_id=group))
    reply = message(group, "Farewell", parent_message_id=said)
    await world.db.execute(LAST)
    eraser, holder = [await asyncpg.connect(settings.database_url) for _ in range(2)]
    await speak(holder, settings.search_language)
    erase_ada = partial(erase, Single(eraser), ada.id, publish_nothing)
    hold = holder.transaction()
    await hold.start()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        if order == "the reply, then the erasure":
            assert are_stored(await sending.send(holder, [Outgoing(charles.id, reply)]))
            tasks.create_task(erase_ada())
            await waiting(world, 1)
        elif order == "the erasure's end, then the reply":
            await holder.execute("SELECT pg_advisory_xact_lock(1)")
            tasks.create_task(erase_ada())
            await waiting(world, 1)
            tasks.create_task(other.call(reply))
            await waiting(world, 2)
        else:
            await holder.execute(HELD)
            tasks.create_task(other.call(reply))
            await waiting(world, 1)
            await erase_ada()
        await hold.commit()
    for connection in (eraser, holder):
        await connection.close()
    assert await world.db.fetchval("SELECT count(*) FROM message WHERE content = 'Farewell'") == 1
    assert await failed_checks(world) == []


async def test_frames_of_others_during_and_after_an_erasure_leave_no_data(world: World) -> None:
    """Every frame that writes is sent during each step of the erasure, and after it."""
    async with http_client(world.url) as http:
        conflicting = ConflictingWrites(world, http)
        await conflicting.begin()

        async def do_all() -> None:
            charles = conflicting.charles
            lasting = [client.Mute(user_id=charles), client.SetSwitches(user_id=charles, can_see_profile=False),
                       client.Block(user_id=charles)]  # fmt: skip
            for frame in [*conflicting.frames(), *lasting]:
                await conflicting.run(conflicting.ada, frame)

        class Meanwhile(Single):
            async def atomically(self, what: str, work: Callable[[Db], Awaitable[Result]]) -> Result:
                result, _ = await asyncio.gather(super().atomically(what, work), do_all())
                return result

        await erase(Meanwhile(world.db), conflicting.charles, publish_nothing)
        await do_all()
    assert await failed_checks(world) == []


async def test_user_who_logs_in_during_the_grace_period_is_not_erased(world: World) -> None:
    ada = await world.user("Ada")
    await erase(Single(world.db), ada.id, publish_nothing, grace=world.workers[0].app.background._grace)  # noqa: SLF001
    assert await world.db.fetchval('SELECT is_active AND erased_at IS NULL FROM "user"')


PLANTED = {
    "participant": "UPDATE conversation_participant SET status = 'invited' WHERE user_id = $1",
    "session": "INSERT INTO session (user_id, token, expires_at) VALUES ($1, 'planted', now())",
    "account": "INSERT INTO account (user_id, provider_id, account_id) VALUES ($1, 'credential', 'planted')",
    "relationship": "INSERT INTO user_relationship (from_user_id, to_user_id, type) VALUES ($1, $2, 'mute')",
    "relationship to": "INSERT INTO user_relationship (from_user_id, to_user_id, type) VALUES ($2, $1, 'mute')",
    "draft": "INSERT INTO draft (user_id, conversation_id, content, user_version) VALUES ($1, $3, 'x', 0)",
    "scheduled": "INSERT INTO scheduled_message (id, sender_id, conversation_id, words, send_at, user_version)"
    " VALUES ($3, $1, $3, '{}', now(), 0)",
    "star": "INSERT INTO message_star (user_id, message_id, conversation_id, user_version) VALUES ($1, $4, $3, 0)",
    "push": "INSERT INTO push_endpoint (user_id, session_id, endpoint, p256dh, auth)"
    " SELECT $1, s.id, 'x', '', '' FROM session s LIMIT 1",
    "thread": "INSERT INTO thread_follow (root_id, user_id, conversation_id) VALUES ($4, $1, $3)",
    "name": "UPDATE \"user\" SET name = 'Ada' WHERE id = $1",
    "words": "UPDATE \"user\" SET custom_status = 'Still here' WHERE id = $1",
}


async def test_check_finds_any_remaining_data_of_an_erased_user(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    other = await world.connect(charles)
    group = await world.group(other, ada)
    said = await sent(other, group)
    await erase(Single(world.db), ada.id, publish_nothing)
    assert await failed_checks(world) == []
    for name, statement in PLANTED.items():
        transaction = world.db.transaction()
        await transaction.start()
        await plant(world, statement, ada, charles, group=group, said=said)
        found = await world.db.fetch(ERASED.FINDS)
        assert [row[0] for row in found] == [ada.id], name
        await transaction.rollback()


async def plant(
    world: World, statement: str, ada: UserSession, charles: UserSession, *, group: ConversationId, said: MessageId
) -> None:
    """Run a statement with those parameters that it uses."""
    values = [ada.id, charles.id, group, said]
    uses = [number for number in range(1, 5) if f"${number}" in statement]
    for place, number in enumerate(uses, 1):
        statement = statement.replace(f"${number}", f"${place}")
    await world.db.execute(statement, *(values[number - 1] for number in uses))


@pytest.mark.parametrize("table", ["conversation_participant", "session", "account", "user_relationship", "draft",
                                   "scheduled_message", "message_star", "push_endpoint", "thread_follow"])  # fmt: skip
def test_check_covers_every_table_that_erasure_empties(table: str) -> None:
    assert table in ERASED.FINDS


async def test_address_of_an_erased_account_cannot_be_registered(world: World) -> None:
    fields = {"name": "Mallory", "password": "correct horse"}
    async with http_client(world.url) as http:
        for address in (f"erased-{uuid7()}@invalid", "x@INVALID", "x@mail.invalid", "x@invalid."):
            refused = await http.post("/v1/auth/register", json=fields | {"email": address})
            assert (refused.status_code, refused.json()["path"]) == (422, "email"), address
            assert "end in `.invalid` are reserved" in refused.json()["message"]
            with pytest.raises(Fatal, match="cannot be an e-mail address"):
                await administer(world, "user", "create", "Mallory", address)
        taken = await http.post("/v1/auth/register", json=fields | {"email": "invalid@invalid.example"})
        assert taken.status_code == 201


async def test_no_taken_address_prevents_an_erasure(world: World) -> None:
    ada, mallory = await world.users("Ada", "Mallory")
    squat = f"erased-{ada.id}@invalid"
    await world.db.execute('UPDATE "user" SET email = $2 WHERE id = $1', mallory.id, squat)
    await administer(world, "erase", str(ada.id), "--yes", "--verify")
    assert await world.db.fetchval('SELECT name FROM "user" WHERE id = $1', ada.id) == "Deleted user"
    assert await failed_checks(world) == []
    # An erased account gets no password.
    with pytest.raises(Fatal, match="it is erased"):
        await administer(world, "user", "reset-password", str(ada.id))
    assert await failed_checks(world) == []


RANDOM, CLIENT, PARTS = "random, chosen by the server", "chosen by the client", "ids of other rows"
UNIQUE = {
    "user_pkey": RANDOM, "user_email_key": "chosen by the client, or random: see the tests above",
    "session_pkey": RANDOM, "session_token_key": RANDOM,
    "account_pkey": RANDOM, "account_provider_key": "the user's address, which is also unique",
    "verification_pkey": RANDOM,
    "conversation_pkey": CLIENT, "conversation_id_hash_key": CLIENT,
    "conversation_invite_code_key": RANDOM, "conversation_direct_pair_key": PARTS,
    "conversation_participant_pkey": RANDOM, "conversation_participant_key": PARTS,
    "message_pkey": CLIENT, "message_conversation_created_idx": PARTS, "message_search_pkey": PARTS,
    "message_reaction_pkey": PARTS, "message_edit_pkey": CLIENT, "message_star_pkey": PARTS,
    "poll_vote_pkey": PARTS, "thread_follow_pkey": PARTS, "draft_pkey": PARTS,
    # This id is also that of the message. Its first sender owns both.
    "scheduled_message_pkey": CLIENT,
    "push_endpoint_pkey": RANDOM, "push_endpoint_key": CLIENT,
    "attachment_pkey": RANDOM, "user_relationship_pkey": RANDOM, "user_relationship_key": PARTS,
    "approach_pkey": PARTS, "report_pkey": RANDOM, "report_key": PARTS, "audit_entry_pkey": PARTS,
    "database_epoch_pkey": "a constant", "server_key_pkey": "a constant", "schema_migration_pkey": "a constant",
}  # fmt: skip
"""The source of the values of each unique index. Values that the server derives must not be predictable, or a client
could take them first. Imported rows have ids derived from a secret (tests/test_import.py).
"""


async def test_every_unique_index_is_listed_with_its_source(world: World) -> None:
    found = await world.db.fetch("""
        SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE i.indisunique AND c.relnamespace = 'public'::regnamespace
    """)
    assert {row[0] for row in found} == set(UNIQUE)


SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(10); RETURN new; END $$;
CREATE TRIGGER slow BEFORE UPDATE ON "user" FOR EACH ROW WHEN (old.name IN ('Ada', 'Charles')) EXECUTE FUNCTION slow();
CREATE TRIGGER slow BEFORE UPDATE ON message FOR EACH ROW
WHEN (new.is_deleted AND old.content LIKE 'Slow%') EXECUTE FUNCTION slow()
"""


@pytest.mark.parametrize("by", ["the server", "the client"])
async def test_erasure_that_times_out_is_logged_and_delays_no_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    """This holds whether the server or the client ends the statement, and also for messages that expire."""
    for name in ("CLEAR_SECONDS", "DUE_SECONDS"):
        monkeypatch.setattr(background, name, 36_000.0)
    if by == "the server":
        monkeypatch.setattr(database, "begin", lambda _: "BEGIN; SET LOCAL statement_timeout = '50ms'")
        monkeypatch.setitem(database.SESSION, "statement_timeout", "500ms")  # of the expiry
    else:
        monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.2)
        monkeypatch.setitem(database.SESSION, "statement_timeout", "10s")
    async with World(settings, workers=1) as world:
        people = await world.users("Ada", "Charles", "Mary")
        keeper = await world.connect(await world.user("Keeper"))
        stuck, free = [await world.channel(keeper, title=title) for title in ("Stuck", "Free")]
        for number, (about, content) in enumerate(((stuck, "Slow"), (free, "Fast"))):
            said = await sent(keeper, about, content)
            await world.db.execute(
                "UPDATE message SET expires_at = now() - interval '1 day' * $2::int WHERE id = $1", said, 2 - number
            )
        for number, one in enumerate(people):
            await world.db.execute(
                """UPDATE "user" SET is_deleted = true, is_active = false,
                deleted_at = now() - interval '1 year' + $2 * interval '1 day' WHERE id = $1""",
                one.id,
                number,
            )  # fmt: skip
        await world.db.execute(SLOW)
        await world.workers[0].app.background.erase_due()
        erased = await world.db.fetch('SELECT name FROM "user" WHERE erased_at IS NOT NULL')
        logged = [record.getMessage() for record in caplog.records if record.name == "server.domain.erasure"]
        assert [line.split(" failed")[0] for line in logged] == [f"erasing {one.id}" for one in people[:2]]
        assert len(erased) == 1
        await world.workers[0].app.background.expire_due()
        logged = [record.getMessage() for record in caplog.records if record.name == "server.jobs.expiry"]
        # The statement of both conversations holds the locks until the server ends it.
        held = [stuck] if by == "the server" else [stuck, free]
        assert {line.split(" failed")[0] for line in logged} == {f"expiry in {one}" for one in held}
        assert await world.db.fetchval("SELECT count(*) FROM message WHERE is_deleted") == 2 - len(held)
        assert not any(record.exc_info for record in caplog.records)
