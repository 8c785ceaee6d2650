"""Deactivation, deletion and erasure of accounts, and the export of a user's own data."""

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import msgspec
import pytest

from protocol import client, json_object, server
from protocol.codec import now
from protocol.errors import CloseCode, ErrorCode
from protocol.export import Export
from protocol.ids import MessageId, UserId, uuid7
from protocol.payloads import Poll
from prove.client import Client
from prove.truth import recount
from server.db.database import Single
from server.domain.erasure import erase
from server.domain.export import written
from server.queries import erasure
from server.queries.export import ROWS_PER_PAGE
from server.queries.participants import ParticipantChange
from tests.world import UserSession, World, http_client, message, refused, sent

PASSWORD = "correct horse"
ADA = {"name": "Ada Lovelace", "email": "ada.lovelace@example.org", "password": PASSWORD}


class Person:
    """A user with a password, over HTTP and on a socket."""

    def __init__(self, world: World, http: httpx.AsyncClient) -> None:
        self.world, self.http = world, http

    async def register(self) -> Client:
        answer = (await self.http.post("/v1/auth/register", json=ADA)).json()
        return await self._on_socket(answer["token"])

    async def log_in(self) -> Client:
        login = {"email": ADA["email"], "password": PASSWORD}
        answer = await self.http.post("/v1/auth/login", json=login)
        assert answer.status_code == 200, answer.text
        return await self._on_socket(answer.json()["token"])

    async def post(self, what: str, **body: Any) -> int:
        return (await self.http.post(f"/v1/auth/{what}", json=body, headers=self.headers)).status_code

    async def _on_socket(self, token: str) -> Client:
        self.headers = {"authorization": f"Bearer {token}"}
        return await self.world.connect(UserSession(UserId(uuid7()), "Ada", token), 1)


@pytest.fixture
async def ada(world: World) -> AsyncIterator[Person]:
    async with http_client(world.url) as http:
        yield Person(world, http)


async def test_deactivated_account_is_hidden_until_the_next_login(world: World, ada: Person) -> None:
    one = await ada.register()
    other = await world.connect(await world.user("Charles"))
    me = one.ready.user.id
    assert await ada.post("deactivate", password="wrong horse") == 403
    assert await ada.post("deactivate") == 422
    assert await ada.post("deactivate", password=PASSWORD) == 204
    assert await one.closed() == CloseCode.SESSION_ENDED
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await other.call(client.GetProfile(user_id=me))
    assert (await other.call(client.SearchUsers(text="Lovelace"), server.UserList)).users == []
    back = await ada.log_in()
    assert back.ready.user.id == me
    assert (await other.call(client.GetProfile(user_id=me), server.OneProfile)).profile.user.name == "Ada Lovelace"


async def test_deleted_account_can_be_restored_for_a_while(world: World, ada: Person) -> None:
    await ada.register()
    assert await ada.post("delete", password=PASSWORD) == 204
    assert await ada.post("delete", password=PASSWORD) == 401
    await world.workers[0].app.background.erase_due()
    await ada.log_in()
    assert await world.db.fetchval('SELECT deleted_at IS NULL AND is_active AND NOT is_deleted FROM "user"')


async def test_friend_request_of_a_deleted_account_cannot_be_accepted_until_its_return(
    world: World, ada: Person
) -> None:
    one = await ada.register()
    me, (charles, mary) = one.ready.user.id, await world.users("Charles", "Mary")
    for who in (charles, mary):
        await one.call(client.RequestFriend(user_id=who.id))
    assert await ada.post("delete", password=PASSWORD) == 204
    other, third = await world.connect(charles), await world.connect(mary)
    with refused(ErrorCode.NOT_FOUND, "user_id"):
        await other.call(client.AnswerFriend(user_id=me, accept=True))
    await third.call(client.AnswerFriend(user_id=me, accept=False))
    await ada.log_in()
    await other.call(client.AnswerFriend(user_id=me, accept=True))
    assert await world.db.fetchval("SELECT count(*) FROM user_relationship WHERE status = 'accepted'") == 2


async def test_disabled_account_cannot_be_reactivated_by_a_login(world: World, ada: Person) -> None:
    await ada.register()
    await world.db.execute('UPDATE "user" SET is_disabled = true, is_active = false')
    login = {"email": ADA["email"], "password": PASSWORD}
    assert (await ada.http.post("/v1/auth/login", json=login)).status_code == 401


LEFT_LONG_AGO = """
UPDATE "user" SET deleted_at = now() - interval '31 days', quiet_from = '22:00', quiet_until = '06:00',
    time_zone = 'Europe/London', feed_seen_at = now(), last_seen_at = now(), last_close = 1000, is_online = true,
    visible_since = now(),
    custom_status = 'Thinking', custom_status_until = now(), image = 'https://example.org/ada', is_private = true
WHERE id = $1
"""
DIFFER = {
    "id", "name", "email", "created_at", "updated_at", "version", "own_version", "hidden_version", "own_moves",
    "face_version", "is_active", "is_deleted", "deleted_at", "erased_at", "status",
}  # fmt: skip
"""Columns in which an erased user's row may differ from a new one's."""


async def test_name_within_hashes_keys_and_ids_is_no_trace(world: World) -> None:
    """`Cid` occurred in a password's hash, and `Ada`, which is hexadecimal, in ids and in hashes of sessions."""
    await world.user("Charles")
    whole = "5ada0000-0000-4000-8000-000000000ada"
    note = "INSERT INTO audit_entry (chain, number, action, details, previous_hash, hash) VALUES "
    await world.db.execute("UPDATE session SET token = repeat('ada', 20)")
    await world.db.execute("UPDATE account SET password = 'ada'")
    await world.db.execute("INSERT INTO server_key (name, value) VALUES ('another', 'ada')")
    await world.db.execute(note + "(gen_random_uuid(), 1, 'x', jsonb_build_object('id', $1::text), '', '')", whole)
    assert await world.db.fetch(erasure.TRACES, ["%ada%"]) == []
    # A search for a whole id finds it, and a name outside an id is found too.
    (found,) = await world.db.fetch(erasure.TRACES, [f"%{whole}%"])
    assert tuple(found) == ("audit_entry.details", False, 1)
    await world.db.execute(note + "(gen_random_uuid(), 1, 'x', jsonb_build_object('name', 'Ada'), '', '')")
    (found,) = await world.db.fetch(erasure.TRACES, ["%ada%"])
    assert tuple(found) == ("audit_entry.details", False, 1)
    # The rows that the search leaves out exist.
    source = await world.db.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'traces'")
    opaque = set(re.findall(r"'([a-z_.]+)'", source.partition("opaque CONSTANT")[2].partition(";")[0]))
    columns = await world.db.fetch(
        "SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'public'"
    )
    assert len(opaque) > 5
    assert opaque <= {column[0] for column in columns}


async def test_erased_user_leaves_only_their_messages(world: World, ada: Person) -> None:
    one = await ada.register()
    charles = await world.user("Charles")
    other = await world.connect(charles)
    me = one.ready.user.id
    await one.call(client.UpdateProfile(bio="Poetical science", location="Marylebone", display_name="The Countess"))
    owned = await world.channel(one, title="Engines", is_public=True)
    await other.call(client.Join(conversation_id=owned))
    said = await sent(one, owned, "Hello")
    await one.call(client.RequestFriend(user_id=charles.id, message="It is Ada"))
    direct = (await one.call(client.CreateDirect(user_id=charles.id), server.OneConversation)).view.conversation.id
    await sent(one, direct, "Dear Charles")
    texts = await erasure.words(world.db, me)
    assert {"ada.lovelace@example.org", "The Countess", "Poetical science"} <= set(texts)
    assert await erasure.traces(world.db, me, texts)
    await one.call(client.SetDraft(conversation_id=owned, content="A secret thought"))
    await one.call(client.Star(conversation_id=owned, message_id=said))
    regretted = await sent(one, owned, "Never mind")
    await one.call(client.Delete(conversation_id=owned, message_id=regretted))
    assert await world.db.fetchval("SELECT count(*) FROM message_edit WHERE content = 'Never mind'") == 1
    assert await ada.post("delete", password=PASSWORD) == 204
    await world.db.execute(LEFT_LONG_AGO, me)
    await world.workers[0].app.background.erase_due()

    erased, new = [
        dict(await world.db.fetchrow('SELECT * FROM "user" WHERE id = $1', who) or {})
        for who in (me, (await world.user("Mary")).id)
    ]
    assert {column for column, value in erased.items() if value != new[column]} <= DIFFER
    # Messages that they deleted themselves are erased too.
    assert await world.db.fetchval("SELECT count(*) FROM message_edit WHERE content = 'Never mind'") == 0
    promoted = await other.event(server.ParticipantChanged, lambda event: event.participant.user_id == charles.id)
    assert promoted.participant.role == "owner"
    for table in ("draft", "message_star", "scheduled_message", "push_endpoint"):
        assert await world.db.fetchval(f"SELECT count(*) FROM {table}") == 0
    assert [trace for trace in await erasure.traces(world.db, me, texts) if not trace.is_said] == []
    got = await other.call(client.GetMessage(conversation_id=owned, message_id=said), server.OneMessage)
    assert (got.message.content, got.message.sender_id) == ("Hello", me)
    (face,) = (await other.call(client.GetUsers(user_ids=[me]), server.UserList)).users
    assert (face.name, face.display_name) == ("Deleted user", None)
    with refused(ErrorCode.FORBIDDEN, "conversation_id"):
        await other.call(message(direct, "Where are you?"))
    login = {"email": ADA["email"], "password": PASSWORD}
    assert (await ada.http.post("/v1/auth/login", json=login)).status_code == 401
    assert (await ada.http.post("/v1/auth/register", json=ADA)).status_code == 201
    assert await recount(world.db) == []
    changes: list[ParticipantChange] = []
    await erase(Single(world.db), me, changes.append)
    assert changes == []


async def test_export_contains_all_data_of_the_user(world: World, ada: Person) -> None:
    one = await ada.register()
    charles = await world.user("Charles")
    other = await world.connect(charles)
    about = await world.channel(one, is_public=True)
    await other.call(client.Join(conversation_id=about))
    theirs = await sent(other, about, "Not hers")
    said = [await sent(one, about, f"Message {number}") for number in range(3)]
    await one.call(client.Edit(conversation_id=about, message_id=said[0], content="Edited"))
    await one.call(client.React(conversation_id=about, message_id=theirs, emoji="👍"))
    await one.call(client.Follow(user_id=charles.id))
    await other.call(client.Block(user_id=one.ready.user.id))
    await one.call(client.ReportMessage(conversation_id=about, message_id=theirs, reason="Not mine"))
    await one.call(client.UpdateConversation(conversation_id=about, title="Ours"))
    poll = await sent(other, about, "Tea?", payload=Poll(options=["Yes", "No"]))
    await one.call(client.Vote(conversation_id=about, message_id=poll, options=[1]))
    await one.call(client.Star(conversation_id=about, message_id=theirs))
    await one.call(client.SetDraft(conversation_id=about, content="I thi"))
    await one.call(client.FollowThread(conversation_id=about, message_id=theirs))
    later = client.Schedule(
        conversation_id=about, message_id=MessageId(uuid7()), content="Later", send_at=now() + timedelta(days=1)
    )
    await one.call(later)
    # The messages need more than one page.
    await world.db.execute("""
        INSERT INTO message (conversation_id, sender_id, content, sent_version, version)
        SELECT $1, $2, 'Filler', 1000 + n, 1000 + n FROM generate_series(1, 600) n
    """, about, one.ready.user.id)  # fmt: skip
    answer = await ada.http.get("/v1/auth/export", headers=ada.headers)
    assert answer.status_code == 200
    export = msgspec.json.decode(answer.content, type=Export, dec_hook=json_object.read)
    assert (export.me.email, export.logins[0].provider_id, len(export.sessions)) == (ADA["email"], "credential", 1)
    assert [entry.conversation_id for entry in export.conversations] == [about]
    # A block, which is not announced, leaves her follow in place (docs/decisions/0042).
    assert [(one.kind, one.status) for one in export.relationships] == [("follow", "active")]
    assert [reaction.message_id for reaction in export.reactions] == [theirs]
    assert [report.reason for report in export.reports] == ["Not mine"]
    assert [(vote.message_id, vote.options) for vote in export.votes] == [(poll, [1])]
    assert ([star.message_id for star in export.stars], [draft.content for draft in export.drafts]) == (
        [theirs], ["I thi"],
    )  # fmt: skip
    assert [one.words.content for one in export.scheduled] == ["Later"]
    assert [thread.root_id for thread in export.threads] == [theirs]
    assert [deed["action"] for deed in export.deeds] == ["update_conversation"]
    mine = {entry.message.id: entry for entry in export.messages}
    assert len(mine) == len(export.messages) == 3 + 1 + 600  # the change of the title is exported too
    assert theirs not in mine
    assert [edit.content for edit in mine[said[0]].edits] == ["Message 0"]
    ada.http.cookies.clear()
    assert (await ada.http.get("/v1/auth/export")).status_code == 401
    for _ in range(3):
        answer = await ada.http.get("/v1/auth/export", headers=ada.headers)
    assert answer.status_code == 429


async def test_export_is_made_in_parts_however_often_a_message_was_edited(world: World) -> None:
    ada = await world.user("Ada")
    one = await world.connect(ada)
    about = await world.channel(one)
    often, never = await sent(one, about, "Often"), await sent(one, about, "Never")
    large = "repeat(U&'\\0001', 10000)"  # six bytes each in JSON
    await world.db.execute(
        f"""INSERT INTO message_edit (id, conversation_id, message_id, content, edited_by, version)
        SELECT gen_random_uuid(), $1, $2, {large}, $3, n FROM generate_series(1, 130) n""",
        about, often, ada.id,
    )  # fmt: skip
    await world.db.execute(
        f"""WITH made AS (INSERT INTO conversation (type, title, created_by)
            SELECT 'group', 'G', $1 FROM generate_series(1, 120) RETURNING id)
        INSERT INTO draft (user_id, conversation_id, content, user_version) SELECT $1, id, {large}, 1 FROM made""",
        ada.id,
    )  # fmt: skip
    pieces = [piece async for piece in written(world.workers[0].app._database.connection, ada.id)]  # noqa: SLF001
    assert max(map(len, pieces)) < (ROWS_PER_PAGE + 1) * 61_000
    export = msgspec.json.decode(b"".join(pieces), type=Export, dec_hook=json_object.read)
    assert {message.message.id: [edit.version for edit in message.edits] for message in export.messages} == {
        often: list(range(1, 131)), never: [],
    }  # fmt: skip
    assert (len(export.drafts), len({draft.conversation_id for draft in export.drafts})) == (120, 120)


async def test_export_is_made_in_parts_however_often_a_user_reacted_voted_and_moderated(world: World) -> None:
    ada, charles = await world.users("Ada", "Charles")
    one = await world.connect(ada)
    about = await world.channel(one)
    await world.db.execute("SET session_replication_role = replica")
    for who in (ada, charles):
        for statement in (
            """INSERT INTO message_reaction (message_id, user_id, emoji, conversation_id, version, author_id)
            SELECT md5((n / 3)::text)::uuid, $1, 'e' || n % 3, $2, n, $1 FROM generate_series(1, 170) n""",
            """INSERT INTO poll_vote (message_id, user_id, conversation_id, options, version)
            SELECT md5(n::text)::uuid, $1, $2, '{1}', n FROM generate_series(1, 170) n""",
            """INSERT INTO audit_entry (actor_id, chain, number, action, previous_hash, hash)
            SELECT $1, md5((n / 30)::text || $1::uuid || $2::uuid)::uuid, n, 'x', '', ''
            FROM generate_series(1, 170) n""",
        ):
            await world.db.execute(statement, who.id, about)
    pieces = [piece async for piece in written(world.workers[0].app._database.connection, ada.id)]  # noqa: SLF001
    assert max(map(len, pieces)) < (ROWS_PER_PAGE + 1) * 400
    export = msgspec.json.decode(b"".join(pieces), type=Export, dec_hook=json_object.read)
    reactions = {(each.message_id, each.emoji) for each in export.reactions}
    deeds = {(str(each["chain"]), each["number"]) for each in export.deeds}
    assert len(reactions) == len({each.message_id for each in export.votes}) == len(deeds) == 170
    assert [len(export.reactions), len(export.votes), len(export.deeds)] == [170, 170, 170]


async def test_export_shows_a_deleted_conversation_like_one_that_was_left(world: World) -> None:
    ada, charles, mary, left = await world.users("Ada", "Charles", "Mary", "Left")
    owner, gone = await world.connect(ada), await world.connect(left)
    about = await world.group(owner, charles, mary, left, title="Secret")
    kept = await world.group(owner, charles, title="Kept")
    await gone.call(client.Leave(conversation_id=about))
    await owner.call(client.DeleteConversation(conversation_id=about))
    while await world.db.fetchval("SELECT has_remains FROM conversation WHERE id = $1", about):
        await world.workers[0].app.background.clear_remains()
    # An invitation that cannot be accepted any more and that no job has ended yet.
    await world.db.execute("UPDATE conversation_participant SET status = 'invited' WHERE user_id = $1", mary.id)
    for who in (ada, charles, mary, left):
        pieces = [piece async for piece in written(world.workers[0].app._database.connection, who.id)]  # noqa: SLF001
        export = msgspec.json.decode(b"".join(pieces), type=Export, dec_hook=json_object.read)
        told = {one.conversation_id: (one.title, one.participant.status) for one in export.conversations}
        assert told[about] == (None, "left"), who.name
        assert b"Secret" not in b"".join(pieces)
        if who in (ada, charles):
            assert told[kept] == ("Kept", "active")
